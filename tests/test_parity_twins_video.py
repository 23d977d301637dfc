"""Twins of the golden cases of video: other grids, radii, frames, patches and sizes, by the textbook form.

``agrees`` also makes every expected number another one, and the runner has to notice.
"""

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from tests.twins import agrees, golden, random, rewrite


def allowed(rows: int, columns: int, radius: int) -> torch.Tensor:
    places = [(r, c) for r in range(rows) for c in range(columns)]
    near = [[max(abs(a - c), abs(b - d)) <= radius or radius == 0 for c, d in places] for a, b in places]
    return torch.tensor(near)


def carried(features: list, first: torch.Tensor, radius: int, frames: int, k: int) -> list[torch.Tensor]:
    """Soft labels (classes, rows, columns) of every later frame; one token after the other."""
    classes, rows, columns = first.shape
    near, known = allowed(rows, columns, radius), [(features[0], first.flatten(1))]
    for tokens in features[1:]:
        context = [known[0], *known[1:][max(0, len(known) - 1 - frames) :]]
        labels = torch.zeros(classes, rows * columns, dtype=first.dtype)
        for target in range(rows * columns):
            weights = torch.cat(
                [
                    (F.cosine_similarity(tokens[target], source, dim=1) / 0.1).exp() * near[target]
                    for source, _ in context
                ]
            )
            best = weights.topk(k).indices
            share = weights[best] / weights[best].sum()
            labels[:, target] = torch.cat([label for _, label in context], dim=1)[:, best] @ share
        known.append((tokens, labels))
    return [labels.view(first.shape) for _, labels in known[1:]]


def hard(soft: torch.Tensor, patch: int) -> np.ndarray:
    pixels = F.interpolate(soft[None], scale_factor=patch, mode="bilinear", align_corners=False)[0]
    planes = []
    for plane in pixels:
        if plane.max() > 0:
            plane = plane - plane.min()
            plane = plane / plane.max()
        planes.append(plane)
    return torch.stack(planes).argmax(0).numpy().astype(np.uint8)


def one_hot(labels: np.ndarray) -> torch.Tensor:
    return torch.stack([torch.from_numpy(labels == number).double() for number in range(labels.max() + 1)])


def labelled(rows: int, columns: int, classes: int) -> np.ndarray:
    return np.random.default_rng(0).permutation(rows * columns).reshape(rows, columns) % classes


@pytest.mark.parametrize(
    ("method", "before", "after", "seg", "labels", "mask", "patch"),
    [
        (
            "eval_core",
            "in/frame{}_patch_features",
            "in/first_labels",
            "out/seg{}",
            "out/argmax{}",
            "out/neighbourhood_mask",
            "patch_size",
        ),
        (
            "mugs",
            "in.frame{}.features",
            "in.first_labels",
            "out.frame{}.seg",
            "out.frame{}.labels",
            "out.neighbourhood_mask",
            "upsample_patch_size",
        ),
    ],
)
@pytest.mark.parametrize(
    ("grid", "radius", "frames", "k", "size", "nth"), [((4, 7), 1, 3, 2, 5, 3), ((7, 3), 0, 1, 6, 4, 1)]
)
def test_other_grids_radii_frames_and_neighbours(
    method, before, after, seg, labels, mask, patch, grid, radius, frames, k, size, nth
):
    case = golden(method, "video_label_propagation")
    case.params |= {"h": grid[0], "w": grid[1], "classes": 4, "dim": 9, "n_last_frames": frames, "topk": k}
    case.params |= {"size_mask_neighborhood": radius, patch: size}
    tokens = [random(grid[0] * grid[1], 9, seed=number) for number in range(12)]  # more than nine: 1 is not 10
    first = labelled(*grid, 4)
    soft = carried(tokens, one_hot(first), radius, frames, k)
    outputs = {mask: allowed(*grid, radius).float()}
    for number, found in enumerate(soft, 1):
        outputs |= {seg.format(number): found[None], labels.format(number): hard(found, size)[::nth, ::nth]}
    inputs = {before.format(number): frame for number, frame in enumerate(tokens)} | {after: first}
    words = {labels.format(number): f"every {nth}th pixel" for number in range(1, 12) if nth > 1}
    agrees(rewrite(case, inputs, outputs, words=words))


def test_a_video_of_another_size_in_one_array():
    case = golden("udi", "video_propagation")
    case.params |= {"grid_h": 7, "grid_w": 5, "patch_size": 3, "n_last_frames": 1, "size_mask_neighborhood": 3}
    case.params |= {"topk": 3, "original_h": 33, "original_w": 21, "frames": 4}
    case.entry["inputs"]["features"]["shape"] = [4, 35, 6]
    original = labelled(33, 21, 3).astype(np.uint8)
    small = np.asarray(Image.fromarray(original).resize((5, 7), Image.Resampling.NEAREST))
    tokens, noise = random(4, 35, 6), random(4, 3, 5)
    noise[1] = -noise[1].abs()  # nothing above 0: left as it is
    soft = carried(list(tokens), one_hot(small), 3, 1, 3)
    expected = [torch.as_tensor((p - p.min()) / (p - p.min()).max() if p.max() > 0 else p) for p in noise]
    frame = np.random.default_rng(1).integers(0, 256, (100, 55, 3), dtype=np.uint8)
    pixels = cv2.resize(frame, (70, 70 * 100 // 55 // 64 * 64)) / 255.0
    outputs = {
        "seg_small": small,
        "first_seg": one_hot(small)[None],
        "neighbourhood": allowed(7, 5, 3),
        "seg_probs": torch.stack(soft),
        "masks": [np.asarray(Image.fromarray(hard(s, 3)).resize((21, 33), Image.Resampling.NEAREST)) for s in soft],
        "norm_out": torch.stack(expected),
        "frame_tensor": ((pixels - (0.485, 0.456, 0.406)) / (0.228, 0.224, 0.225)).transpose(2, 0, 1),
    }
    inputs = {"features": tokens, "seg_original": original, "norm_in": noise, "frame_rgb": frame}
    agrees(rewrite(case, inputs, outputs, words={"frame_tensor": "network input for scale_size=[70]"}))


@pytest.mark.parametrize("shape", [(40, 90), (83, 50)])
def test_frames_of_other_sizes_upright_too(shape):
    case = golden("eval_core", "video_frame_io")
    case.params |= {"short_side": 100, "multiple": 20, "patch": 5}
    image = np.random.default_rng(2).integers(0, 256, (*shape, 3), dtype=np.uint8)
    labels = labelled(*shape, 5).astype(np.uint8)
    size = (100, 220) if shape[0] < shape[1] else (160, 100)
    pixels = cv2.resize(image, size[::-1]) / 255.0
    small = np.asarray(Image.fromarray(labels).resize((size[1] // 5, size[0] // 5), Image.Resampling.NEAREST))
    normalised = ((pixels - (0.485, 0.456, 0.406)) / (0.228, 0.224, 0.225)).transpose(2, 0, 1)
    outputs = {"out/sub": normalised[:, ::7, ::7], "out/onehot": one_hot(small)[None]}
    values = {"shape": [3, *size], "original_hw": list(shape)}
    words = {"out/sub": "every 7th pixel"}
    agrees(rewrite(case, {"in/image": image, "in/labels": labels}, outputs, values, words))
