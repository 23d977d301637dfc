"""EsViT's regions (2106.09785, eq. 4): with which region of a teacher's view a region of a student's crop is compared.

A region is a token of the last stage. Of every crop, each region is compared with the most similar one of the view that
the teacher sees, by the cosine of backbone tokens; where the crops were cut does not matter. Crops may be of any sizes,
since only these similarities relate them.
"""

from collections.abc import Sequence

import torch

from methods.distillation import Targets
from methods.heads import unit_vectors


def tokens_of_crops(groups: Sequence[torch.Tensor], batch: int) -> list[torch.Tensor]:
    """Tokens (crops of a size * batch, n, dim) of every size -> those of every crop (batch, n, dim), in their order."""
    return [crop for group in groups for crop in group.split(batch)]


@torch.no_grad()
def best_matches(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """For every student token the position of the teacher's most similar one: (batch, n) int64.

    Shapes     student (batch, n, dim) and teacher (batch, tokens, dim), unit vectors
    Exactness  cosines in float32 or better, where half precision has ties; of equal ones the first, as the original
    """
    with torch.autocast(student.device.type, enabled=False):
        return torch.bmm(student, teacher.transpose(1, 2)).argmax(dim=2)


@torch.no_grad()
def match_regions(student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """For every student crop the rows of the teacher's tokens that its tokens are compared with.

    Shapes     student: tokens (batch, n, dim) of every crop, the teacher's views first; teacher: tokens (batch, tokens,
               dim) of every view, whose rows are counted view by view, image by image
    Returns    (batch * n, terms) int64 for every crop: a term for every teacher view that is not the crop itself
    """
    batch, tokens, _ = teacher[0].shape
    views = [unit_vectors(view) for view in teacher]
    image = torch.arange(batch, device=teacher[0].device)[:, None] * tokens
    sources = []
    for number, crop in enumerate(student):
        unit = unit_vectors(crop)
        terms = [
            best_matches(unit, view) + image + index * batch * tokens
            for index, view in enumerate(views)
            if index != number
        ]
        sources.append(torch.stack(terms, dim=2).flatten(0, 1))
    return sources


def matched_rows(sources: Sequence[torch.Tensor]) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
    """Which teacher rows are matched at all, and the sources counted among these.

    Only they need a distribution. A GPU would have to be waited for to know how many there are: there it is all of
    them, which None says.
    """
    if sources[0].device.type != "cpu":
        return None, list(sources)
    rows, renumbered = torch.cat([source.flatten() for source in sources]).unique(return_inverse=True)
    parts = renumbered.split([source.numel() for source in sources])
    return rows, [part.view_as(source) for part, source in zip(parts, sources, strict=True)]


def share_matched(sources: Sequence[torch.Tensor], total: int) -> torch.Tensor:
    """Share of ``total`` teacher rows that some student row is compared with."""
    matched = torch.zeros(total, dtype=torch.float32, device=sources[0].device)
    for source in sources:
        matched.index_fill_(0, source.flatten(), 1.0)
    return matched.mean()


def region_targets(probs: torch.Tensor, sources: Sequence[torch.Tensor], pairs: int) -> list[Targets]:
    """What every crop's regions are compared with, so that a step is the mean over pairs, images and regions.

    Shapes     probs (rows, prototypes); sources (batch * n, terms) of every crop, rows of ``probs``
    """
    return [
        Targets(
            probs,
            source if source.shape[1] > 1 else source[:, 0],
            mass=torch.full_like(source[:, 0], source.shape[1], dtype=probs.dtype),
            row_weight=1.0 / (pairs * len(source)),
        )
        for source in sources
    ]
