"""iBOT: image BERT pre-training with an online tokenizer (Zhou et al., 2111.07832).

Masked self-distillation (methods/masked_distillation.py) with masks that know nothing of the image: blocks or random
cells, drawn for every global crop in the data loader.
"""

import argparse
from collections.abc import Callable

from methods.masked_distillation import MaskedDistillation, mask_grid
from methods.masking import SHAPES, MaskedViews, add_mask_arguments, check_mask_arguments, mask_ratio
from methods.multicrop import multi_crop_views


class IBOT(MaskedDistillation):
    name = "ibot"

    @staticmethod
    def add_arguments(parser: argparse._ArgumentGroup) -> None:
        MaskedDistillation.add_arguments(parser)
        add_mask_arguments(parser, SHAPES)

    @staticmethod
    def check_arguments(args: argparse.Namespace) -> None:
        check_mask_arguments(args)
        MaskedDistillation.check_arguments(args)

    @staticmethod
    def views(args: argparse.Namespace) -> Callable:
        crops = multi_crop_views(args)
        return MaskedViews(crops, args.global_crops_number, mask_grid(args), args.pred_shape, mask_ratio(args))
