"""Runners: UNIC's student, its stochastic depth, the teachers and their targets."""

from collections.abc import Iterator

import numpy as np

from models.blocks import BatchDraws, Block, kept_samples
from tests.parity import Case


def stochastic_depth(case: Case) -> Iterator[tuple]:
    """Draws that keep what the case kept: the largest are those that come first in its permutation."""
    p = case.params
    rates = {f"subset{i}": rate for i, rate in enumerate(p["subset_rates"])} | {"persample": p["persample_rate"]}
    for kind, rate in rates.items():
        block = Block(p["dim"], p["heads"], drop_path=rate, norm_eps=1e-6).to(case.dtype)
        block.load_state_dict(case.state("sd") if case.names("sd/") else case.state(f"{kind}/sd"))
        x = case.tensor(f"{kind}/in/x")
        batch, tokens, _ = x.shape
        uniforms = np.zeros((1, 2, batch))
        for branch, name in enumerate(("attn", "ffn")):
            if kind == "persample":
                uniforms[0, branch] = case.arrays[f"{kind}/in/keep_{name}"]
            else:
                uniforms[0, branch, case.arrays[f"{kind}/in/perm_{name}"]] = np.arange(batch, 0, -1) / batch
        for skip in (True, False):
            (kept,) = kept_samples([block], BatchDraws(uniforms, 0, batch), x.device, skip)
            groups = [(batch, tokens)]
            y = block(x.flatten(0, 1), groups, None, *block.drops(kept, x.flatten(0, 1), groups, None))
            yield f"{kind}/out/y, {'gathered' if skip else 'multiplied'}", y.view_as(x), case.arrays[f"{kind}/out/y"]


RUNNERS = {"unic/stochastic_depth": stochastic_depth}
