"""The plain formulation of a training step: what our fast path is measured against. One file for a method.

Textbook form, nothing clever: explicit softmax attention over all tokens in every block, every size of crops on its
own, dropped branches computed and multiplied by zero, heads on all tokens they are defined for, one log-softmax for
every pair of views, Python loops over parameters for clipping and EMA, AdamW one tensor at a time (textbook.py). It
reads the same modules as the fast path and must give the same loss.
"""

from collections.abc import Callable

from plain import dino, esvit, masked_distillation, mugs, udi, unic

FORWARD: dict[str, Callable] = {
    "dino": dino.forward,
    "ibot": masked_distillation.forward,
    "attmask": masked_distillation.forward,
    "udi": udi.forward,
    "unic": unic.forward,
    "esvit": esvit.forward,
    "mugs": mugs.forward,
}
