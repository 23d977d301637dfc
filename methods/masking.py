"""Which patches are hidden from the student: random cells, blocks, or what the teacher's class token looks at.

iBOT (2111.07832) draws a mask for every global crop in the data loader, as BEiT (2106.08254) does. AttMask (2203.12719)
hides the patches with the most (or least) attention of the teacher's last block, and shows some again as hints.

Every draw is made on the host from counted randomness; the device only sorts its attention, by which drawn *ranks*
become patches. So how many patches are hidden is known without asking the device.
"""

import argparse
import math
import random
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image

from data.loader import stack
from randomness import counted_seed
from utils import UsageError, to_device

SHAPES = ("block", "rand")
LOG_ASPECT = (math.log(0.3), math.log(1 / 0.3))
_MASKS = 0x3A5C  # keeps these draws apart from those of the crops


class MaskRatio:
    """How large a share of the patches is hidden: mean and half width of a uniform distribution, or several of them.

    Drawn from every pair, then one of the draws is taken; nothing is hidden before ``start_epoch``. A single variance
    serves all means.
    """

    def __init__(self, means: Sequence[float], variances: Sequence[float], start_epoch: int = 0):
        variances = list(variances) * (len(means) if len(variances) == 1 else 1)
        self.pairs = list(zip(means, variances, strict=True))
        self.start_epoch = start_epoch

    def draw(self, epoch: int, rng: random.Random) -> float:
        """parity: ``rng`` advances as the original's generator does."""
        if epoch < self.start_epoch:
            return 0.0
        drawn = [rng.uniform(mean - var, mean + var) if var > 0 else mean for mean, var in self.pairs]
        return rng.choice(drawn) if len(drawn) > 1 else drawn[0]


def add_mask_arguments(parser: argparse._ArgumentGroup, shapes: Sequence[str]) -> None:
    """``shapes``: the masks the method knows, its default first."""
    add = parser.add_argument
    add("--pred_ratio", default=[0.3], type=float, nargs="+", help="share of hidden patches; of several one is drawn")
    add("--pred_ratio_var", default=[0.0], type=float, nargs="+", help="that share varies by so much, up and down")
    add("--pred_shape", default=shapes[0], choices=shapes, help="which patches are hidden")
    add("--pred_start_epoch", default=0, type=int, help="nothing is hidden in the epochs before")


def check_mask_arguments(args: argparse.Namespace) -> None:
    """Raises UsageError for ratios that hide fewer than no patches or all of them."""
    ratios, variances = args.pred_ratio, args.pred_ratio_var
    if len(variances) not in (1, len(ratios)):
        raise UsageError(
            f"--pred_ratio_var {_spaced(variances)}: needs one value, or one for each of --pred_ratio {_spaced(ratios)}"
        )
    for mean, var in mask_ratio(args).pairs:
        if not (var >= 0 and mean - var >= 0 and mean + var < 1):
            raise UsageError(
                f"--pred_ratio {_spaced(ratios)} --pred_ratio_var {_spaced(variances)}: {mean:g} +- {var:g} leaves "
                "[0, 1); it is a share of the patches, of which some have to stay visible"
            )
    if args.pred_start_epoch < 0:
        raise UsageError(f"--pred_start_epoch {args.pred_start_epoch}: must not be negative")


def mask_ratio(args: argparse.Namespace) -> MaskRatio:
    return MaskRatio(args.pred_ratio, args.pred_ratio_var, args.pred_start_epoch)


def _spaced(values: Sequence[float]) -> str:
    return " ".join(f"{value:g}" for value in values)


# ---------------------------------------------------------------------------------------------------------------------
# Masks that know nothing of the image
# ---------------------------------------------------------------------------------------------------------------------


def block_mask(rows: int, columns: int, target: float, rng: random.Random) -> np.ndarray:
    """(rows, columns) bool with at most ``target`` cells hidden, in rectangles of random area and aspect (BEiT).

    parity: ``rng`` is used call by call as in the original; sizes are rounded half to even.
    """
    mask = np.zeros((rows, columns), dtype=bool)
    smallest, count = (min(rows, columns) // 3) ** 2, 0
    while count < target:
        for _ in range(10):
            area = rng.uniform(smallest, target - count)
            aspect = math.exp(rng.uniform(*LOG_ASPECT))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if width >= columns or height >= rows:
                continue
            top, left = rng.randint(0, rows - height), rng.randint(0, columns - width)
            cells = mask[top : top + height, left : left + width]
            new = height * width - int(cells.sum())
            if 0 < new <= target - count:
                cells[:] = True
                count += new
                break
        else:
            break
    return mask


def random_mask(rows: int, columns: int, target: float, shuffle: Callable[[np.ndarray], None]) -> np.ndarray:
    """(rows, columns) bool with exactly int(target) cells hidden; ``shuffle`` permutes an array in place."""
    mask = np.zeros(rows * columns, dtype=bool)
    mask[rows * columns - int(target) :] = True
    shuffle(mask)
    return mask.reshape(rows, columns)


class MaskedViews:
    """The crops of ``views``, and for each of the first ``crops`` of them a mask of (rows, columns) cells.

    ``collate`` adds, besides the stacked masks, "masked": the flat positions of all hidden cells in (crops * batch,
    cells), made here because a GPU could not tell their number without being waited for.
    """

    def __init__(self, views: Callable, crops: int, grid: tuple[int, int], shape: str, ratio: MaskRatio):
        self.views, self.crops, self.grid, self.shape, self.ratio = views, crops, grid, shape, ratio
        self.augment = views.augment

    def __repr__(self) -> str:
        return f"{self.views!r}\n  {self.shape} masks of {self.grid[0]} x {self.grid[1]} cells"

    def __call__(self, image: np.ndarray | Image.Image, key: tuple[int, ...]) -> dict[str, list[torch.Tensor]]:
        _, epoch, _ = key
        seed = counted_seed(*key, _MASKS)
        rng, shuffle = random.Random(seed), np.random.RandomState(seed % 2**32).shuffle
        masks = [torch.from_numpy(self.mask(epoch, rng, shuffle)) for _ in range(self.crops)]
        return {**self.views(image, key), "masks": masks}

    def mask(self, epoch: int, rng: random.Random, shuffle: Callable[[np.ndarray], None]) -> np.ndarray:
        rows, columns = self.grid
        target = self.ratio.draw(epoch, rng) * rows * columns
        return (
            block_mask(rows, columns, target, rng)
            if self.shape == "block"
            else random_mask(rows, columns, target, shuffle)
        )

    @staticmethod
    def collate(samples: list[dict]) -> dict:
        piece = stack(samples)
        return piece | {"masked": torch.cat(piece["masks"]).flatten().nonzero().flatten()}


# ---------------------------------------------------------------------------------------------------------------------
# Masks that follow attention
# ---------------------------------------------------------------------------------------------------------------------


def hidden_ranks(tokens: int, count: int, kept: np.ndarray, revealed: np.ndarray | None = None) -> np.ndarray:
    """Which ranks of attention are hidden: (rows, tokens) bool, rank 0 first.

    Shapes     ``kept`` (rows,) bool: rows that are masked at all; ``revealed`` (rows, hints) ranks that are shown again
    """
    hidden = (np.arange(tokens) < count) & kept[:, None]
    if revealed is not None:
        np.put_along_axis(hidden, revealed, False, axis=1)
    return hidden


def draw_hints(uniforms: np.ndarray, count: int) -> np.ndarray:
    """``count`` of the ranks 0..ranks-1 for every row, without replacement: uniforms (rows, ranks) -> (rows, count)."""
    return np.argsort(uniforms, axis=1, kind="stable")[:, :count]


def attention_mask(
    attention: torch.Tensor, hidden: np.ndarray, lowest: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hide the patches whose attention has the hidden ranks; ranks count from the largest, or from the ``lowest``.

    Shapes     attention (rows, tokens) on the device; hidden (rows, tokens) bool by rank, on the host
    Returns    masks (rows, tokens) bool and the flat positions of the hidden patches (positions,) int64, on the device.
               Ties go by position.
    Source     AttMask (2203.12719), section 3.2
    """
    order = attention.argsort(dim=1, descending=not lowest, stable=True)  # the patch of every rank
    device, tokens = attention.device, attention.shape[1]
    by_rank = to_device(torch.from_numpy(hidden), device)
    masks = torch.zeros_like(by_rank).scatter_(1, order, by_rank)
    rows, ranks = (to_device(torch.from_numpy(part), device) for part in np.nonzero(hidden))
    return masks, rows * tokens + order[rows, ranks]
