"""AttMask: what to hide from your students (Kakogeorgiou et al., 2203.12719).

Masked self-distillation (methods/masked_distillation.py) whose masks follow the attention of the teacher's class token
in its last block, from the pass that gives the targets: the most attended patches are hidden (high), the least attended
(low), or the most attended but for a few hints (hint). A crop stays unmasked with probability 1 - ``masking_prob``.

The ratio is drawn once per step for all images, as in the original; a second draw decides how many hints are shown.
Which crops are masked is drawn for every image of the whole batch, where the original repeats one process's draws on
all of them: so the numbers do not depend on how a batch is divided.
"""

import argparse
import random
from collections.abc import Callable

import numpy as np
import torch

from data.datasets import ALL
from methods.base import Clock
from methods.masked_distillation import MaskedDistillation, mask_grid
from methods.masking import (
    SHAPES,
    MaskedViews,
    MaskRatio,
    add_mask_arguments,
    attention_mask,
    check_mask_arguments,
    draw_hints,
    hidden_ranks,
    mask_ratio,
)
from methods.multicrop import multi_crop_views
from models import families_that, family_of
from randomness import counted_seed, counted_uniforms
from utils import UsageError

ATTENTION_SHAPES = ("attmask_high", "attmask_hint", "attmask_low")
_RATIO, _GATE, _HINTS = 0xA77, 0xA78, 0xA79  # what a draw is for


class AttMask(MaskedDistillation):
    name = "attmask"

    # ---- options and data -------------------------------------------------------------------------------------------

    @staticmethod
    def add_arguments(parser: argparse._ArgumentGroup) -> None:
        MaskedDistillation.add_arguments(parser)
        add_mask_arguments(parser, (*ATTENTION_SHAPES, *SHAPES))
        add = parser.add_argument
        add("--masking_prob", default=0.5, type=float, help="share of the global crops that are masked by attention")
        add("--show_max", default=0.1, type=float, help="attmask_hint: hints come from this share of the patches")
        # its test during training: all training images, and the temperature of the teacher
        knn = {"knn_per_class": ALL, "nb_knn": [10, 20, 100, 200], "knn_temperature": None}
        parser.set_defaults(out_dim=65536, **knn)

    @staticmethod
    def check_arguments(args: argparse.Namespace) -> None:
        check_mask_arguments(args)
        if args.pred_shape in ATTENTION_SHAPES:
            check_attention_arguments(args)
        MaskedDistillation.check_arguments(args)

    @staticmethod
    def views(args: argparse.Namespace) -> Callable:
        crops = multi_crop_views(args)
        if args.pred_shape in ATTENTION_SHAPES:
            return crops
        return MaskedViews(crops, args.global_crops_number, mask_grid(args), args.pred_shape, mask_ratio(args))

    @staticmethod
    def settings(args: argparse.Namespace) -> dict:
        return MaskedDistillation.settings(args) | {
            "pred_shape": args.pred_shape,
            "ratio": mask_ratio(args),
            "masking_prob": args.masking_prob,
            "show_max": args.show_max,
        }

    def __init__(
        self, *args, pred_shape: str, ratio: MaskRatio, masking_prob: float = 0.5, show_max: float = 0.1, **kwargs
    ):
        super().__init__(*args, **kwargs)
        self.pred_shape, self.ratio, self.masking_prob, self.show_max = pred_shape, ratio, masking_prob, show_max

    # ---- the masks --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def look(self, crops: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.pred_shape not in ATTENTION_SHAPES:
            return super().look(crops)
        backbone = self.teacher.backbone
        tokens, attention = backbone.forward_features_with_attention(torch.cat(crops))
        return tokens, attention[..., backbone.num_prefix_tokens :].mean(dim=1)

    def choose_masks(
        self, batch: dict, clock: Clock, attention: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if attention is None:
            return super().choose_masks(batch, clock, attention)
        hidden = self.draw_hidden_ranks(clock, len(batch["crops"][0]), attention.shape[1])
        masks, masked = attention_mask(attention, hidden, lowest=self.pred_shape == "attmask_low")
        patch = self.teacher.backbone.patch_size
        return masks.unflatten(1, [side // patch for side in batch["crops"][0].shape[-2:]]), masked

    def draw_hidden_ranks(self, clock: Clock, batch: int, tokens: int) -> np.ndarray:
        """Ranks of attention that are hidden in every global crop, (crops * batch, tokens) bool."""
        rng = random.Random(counted_seed(clock.seed, clock.iteration, _RATIO))
        ratio, second = (self.ratio.draw(clock.epoch, rng) for _ in range(2))
        revealed = None
        if self.pred_shape == "attmask_hint":
            top, hints = hint_counts(tokens, self.show_max, second)
            revealed = draw_hints(self.uniforms(clock, _HINTS, batch, top), hints)
        gate = self.uniforms(clock, _GATE, batch, 1)[:, 0]
        return hidden_ranks(tokens, int(tokens * ratio), gate <= self.masking_prob, revealed)

    def uniforms(self, clock: Clock, purpose: int, batch: int, count: int) -> np.ndarray:
        """``count`` numbers in [0, 1) for every global crop of this piece: (crops * batch, count)."""
        crop, sample = np.arange(self.teacher_views)[:, None, None], clock.first_sample + np.arange(batch)[:, None]
        drawn = counted_uniforms(clock.seed, clock.iteration, purpose, crop, sample, np.arange(count))
        return drawn.reshape(-1, count)

    @torch.no_grad()
    def masks(self, batch: dict, clock: Clock) -> torch.Tensor:
        _, attention = self.look(batch["crops"][: self.teacher_views])
        return self.choose_masks(batch, clock, attention)[0].unflatten(0, (self.teacher_views, -1))


def hint_counts(tokens: int, show_max: float, ratio: float) -> tuple[int, int]:
    """From how many of the most attended patches hints are drawn, and how many of them are."""
    return int(tokens * show_max), int(show_max * ratio * tokens)


def check_attention_arguments(args: argparse.Namespace) -> None:
    """Raises UsageError for masks that attention cannot give."""
    if not family_of(args.arch).class_attention:
        raise UsageError(
            f"--arch {args.arch} --pred_shape {args.pred_shape}: masks follow the attention of a class token, which "
            f"{args.arch} has not; pass a {families_that(lambda family: family.class_attention)}"
        )
    if not args.use_masked_im_modeling:
        raise UsageError(
            f"--use_masked_im_modeling false --pred_shape {args.pred_shape}: the student would not see the masks; "
            "leave it true"
        )
    if not 0 <= args.masking_prob <= 1:
        raise UsageError(f"--masking_prob {args.masking_prob}: a probability, from 0 to 1")
    largest = max(mean + var for mean, var in mask_ratio(args).pairs)
    if args.pred_shape == "attmask_hint" and not 0 <= args.show_max <= largest:
        raise UsageError(
            f"--show_max {args.show_max}: hints are shown of what is hidden, so at most the largest mask ratio "
            f"({largest:g}); the published runs have 0.1"
        )
