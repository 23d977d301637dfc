"""Zero-shot classification: the class whose text embedding is nearest, in the space that images and texts share.

CLIP (2103.00020). A student of UNIC (2408.05088) has no text of its own: what its ladder makes of an image stands for a
CLIP teacher's class token, and goes through that teacher's projection. That is an interpretation of its README.
"""

from pathlib import Path

import torch
import torch.nn.functional as F

from models.layouts.names import unwrapped
from models.safe_load import load_arrays
from utils import UsageError, escape

LOGIT_SCALE = 100.0  # what CLIP's temperature has become in training
ROWS = 8192  # images whose logits exist at once

# ---------------------------------------------------------------------------------------------------------------------
# The estimator
# ---------------------------------------------------------------------------------------------------------------------


def class_logits(features: torch.Tensor, projection: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """(batch, classes): 100 times the cosine of images and texts.

    ``features`` before the projection (batch, dim); ``projection`` (shared dim, dim); ``texts`` (classes, shared dim).
    """
    return LOGIT_SCALE * F.normalize(features @ projection.t(), dim=1) @ F.normalize(texts, dim=1).t()


def accuracies(
    labels: torch.Tensor, features: torch.Tensor, projection: torch.Tensor, texts: torch.Tensor
) -> dict[str, float]:
    """``top1`` and, from five classes on, ``top5`` of all images, in percent; ``labels`` (images,)."""
    most, found = min(5, len(texts)), []
    for rows, own in zip(features.split(ROWS), labels.split(ROWS), strict=True):
        found.append(class_logits(rows, projection, texts).topk(most).indices == own[:, None])
    hits = torch.cat(found).double()
    top5 = {"top5": 100 * hits.sum(dim=1).mean().item()} if len(texts) >= 5 else {}
    return {"top1": 100 * hits[:, 0].mean().item(), **top5}


# ---------------------------------------------------------------------------------------------------------------------
# Projection and texts as files
# ---------------------------------------------------------------------------------------------------------------------

COLUMNS = ("visual.proj", "proj")  # open_clip's and CLIP's: (dim, shared dim)
ROWWISE = ("head.weight", "visual_projection.weight")  # timm's and Hugging Face's: (shared dim, dim)


def read_projection(path: str | Path, dim: int) -> torch.Tensor:
    """A teacher's projection (shared dim, dim) from a file of it alone or of the whole teacher. Raises UsageError.

    Its name says which way it lies; without one its shape does, and a square is taken as open_clip's.
    """
    name, matrix = _matrix_in("--projection", path, COLUMNS + ROWWISE)
    columns = name in COLUMNS or (name not in ROWWISE and matrix.shape[0] == dim)
    matrix = matrix.t() if columns else matrix
    if matrix.shape[1] != dim:
        shape = tuple(matrix.t().shape if columns else matrix.shape)
        raise UsageError(f"--projection {path}: {shape}, the features are {dim} wide; pass that of the same teacher")
    return matrix


def read_texts(path: str | Path, shared: int, classes: int) -> torch.Tensor:
    """Embeddings of the classes (classes, shared dim), a row each in their order. Raises UsageError."""
    _, matrix = _matrix_in("--texts", path, ())
    if tuple(matrix.shape) != (classes, shared):
        turned = "; it has a column per class: pass its transpose" * (tuple(matrix.shape) == (shared, classes))
        raise UsageError(
            f"--texts {path}: {tuple(matrix.shape)}, expected ({classes}, {shared}): a row per class of the images, as "
            f"wide as what the projection gives{turned}"
        )
    return matrix


def _matrix_in(option: str, path: str | Path, names: tuple[str, ...]) -> tuple[str, torch.Tensor]:
    """(name, matrix): of the first of ``names`` that a file holds, else its only matrix."""
    content = load_arrays(path)
    for key in ("state_dict", "model"):
        content = content[key] if isinstance(content.get(key), dict) else content
    tensors = {unwrapped(str(name)): value for name, value in content.items() if isinstance(value, torch.Tensor)}
    matrices = {name: value for name, value in tensors.items() if value.ndim == 2}
    known = [name for name in names if name in matrices] or list(matrices)
    if not known or (len(known) > 1 and known[0] not in names):
        held = ", ".join(map(escape, list(matrices)[:5])) or "none"
        wanted = f" or one called {', '.join(names)}" if names else ""
        raise UsageError(f"{option} {path}: one matrix{wanted} is wanted; it holds {len(matrices)} ({held})")
    matrix = matrices[known[0]]
    if not matrix.is_floating_point() or not matrix.isfinite().all():
        raise UsageError(f"{option} {path}: {escape(known[0]) or 'the matrix'} has values that are no finite numbers")
    return known[0], matrix
