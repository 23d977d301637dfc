"""Training images of detection: boxes, masks and pixels stay together."""

import numpy as np
import torch

from data.coco import InstanceViews
from tests.stamps import picture


def instances(number: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    pixels, found = picture(number, 64, 80)
    masks = np.stack([where for _, where in found if where.sum() > 30]).astype(np.uint8)
    boxes = []
    for mask in masks:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        boxes.append([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
    labels = np.array([kind + 1 for kind, where in found if where.sum() > 30])
    return pixels, {"boxes": np.array(boxes, np.float32), "masks": masks, "labels": labels}


def test_boxes_enclose_their_masks_after_every_view():
    views, sizes, fewer = InstanceViews(0.1), set(), 0
    for index in range(40):
        pair = instances(index % 5)
        view = views(pair, (0, 0, index))
        height, width = view["image"].shape[1:]
        sizes.add(min(height, width))
        fewer += len(view["boxes"]) < len(pair[1]["boxes"])
        assert view["masks"].shape[1:] == (height, width) and len(view["masks"]) == len(view["boxes"]) == len(
            view["labels"]
        )
        for box, mask in zip(view["boxes"], view["masks"], strict=True):
            rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
            if len(rows):
                seen = torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
                assert (seen[:2] >= box[:2] - 3).all() and (seen[2:] <= box[2:] + 3).all()
    assert len(sizes) > 5 and max(sizes) <= 80 and fewer > 0


def test_a_view_depends_on_its_key_alone():
    views = InstanceViews(0.1)
    one, again = views(instances(1), (0, 1, 2)), views(instances(1), (0, 1, 2))
    assert all(torch.equal(one[name], again[name]) for name in one)
    batch = views.collate([one, again])
    assert [image.shape for image in batch["image"]] == [one["image"].shape] * 2
