"""Which place of one view is which of another: matches of tokens, where they should be, and how many are right.

iBOT (2111.07832, section 4.3) and EsViT (2106.09785, section 4.2). Tokens are (batch, rows * columns, dim), row by row.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

Grid = tuple[int, int]  # rows, columns


def best_matches(tokens: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """For every token the most similar one of the other view, by dot product as iBOT has it: (batch, tokens)."""
    return (tokens @ others.transpose(-1, -2)).argmax(dim=-1)


def patch_centres(corners: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Where patches lie in the image that a view was cut from: (batch, tokens, 2), from the top and from the left.

    ``corners`` (batch, 4): top, left, bottom, right; of a mirrored view left is larger than right.
    """
    top, left, bottom, right = corners.unbind(dim=1)
    (rows, columns), like = grid, {"dtype": corners.dtype, "device": corners.device}
    down, along = ((torch.arange(n, **like) + 0.5) / n for n in (rows, columns))
    ys, xs = top[:, None] + (bottom - top)[:, None] * down, left[:, None] + (right - left)[:, None] * along
    centres = ys[:, :, None].expand(-1, rows, columns), xs[:, None, :].expand(-1, rows, columns)
    return torch.stack(centres, dim=-1).flatten(1, 2)


def overlapping(centres: torch.Tensor, others: torch.Tensor, margin: float | torch.Tensor) -> torch.Tensor:
    """Which patches lie in the box around the other view's centres, widened by ``margin``: bool (batch, tokens).

    parity: the margin is half a patch of the whole image, whatever was cut from it.
    """
    low, high = others.amin(dim=1, keepdim=True) - margin, others.amax(dim=1, keepdim=True) + margin
    return ((centres >= low) & (centres <= high)).all(dim=-1)


def true_matches(centres: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """For every patch the one of the other view whose centre is nearest: (batch, tokens)."""
    return torch.cdist(centres, others, compute_mode="donot_use_mm_for_euclid_dist").argmin(dim=-1)


def matched_within(found: torch.Tensor, true: torch.Tensor, columns: int, radius: int = 0) -> torch.Tensor:
    """Whether matches are no more than ``radius`` rows and columns off: bool."""
    down = (found // columns - true // columns).abs()
    return torch.maximum(down, (found % columns - true % columns).abs()) <= radius


# ---------------------------------------------------------------------------------------------------------------------
# An image and its mirror image
# ---------------------------------------------------------------------------------------------------------------------


class MirrorMatches(NamedTuple):
    """Of one image: the best match of every token, and the tokens by falling similarity to it."""

    match: torch.Tensor  # (tokens,)
    order: torch.Tensor  # (tokens,)
    accuracy: float  # share of the best pairs that are exactly right
    distance: float  # their mean error in pixels
    similarity: float  # parity: of the pair after the last one that counts (EsViT analyze_models.py)


def mirror_matches(
    tokens: torch.Tensor, mirrored: torch.Tensor, grid: Grid, cell: int, pairs: int = 10
) -> MirrorMatches:
    """Matches of an image's tokens (tokens, dim) among those of the mirrored image, of which the best ``pairs`` count.

    ``cell``: pixels of a token's side.
    """
    similarity, match = (F.normalize(tokens, dim=-1) @ F.normalize(mirrored, dim=-1).T).max(dim=1)
    order = similarity.argsort(descending=True)
    columns = grid[1]
    best = order[:pairs]
    expected = torch.stack((best // columns, columns - 1 - best % columns), dim=1)
    found = torch.stack((match[best] // columns, match[best] % columns), dim=1)
    errors = cell * (expected - found).double().norm(dim=1)
    after = order[min(pairs, len(order) - 1)]
    return MirrorMatches(
        match, order, float((errors == 0).double().mean()), float(errors.mean()), float(similarity[after])
    )
