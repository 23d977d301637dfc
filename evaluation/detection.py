"""Detection: torchvision's Mask R-CNN (1703.06870) on the pyramid of a vision transformer, and COCO's AP.

Numbers of the heads are those of UDI's runs (2407.17671): anchors of 8 strides, three shapes, strides 4 to 64; RPN 0.7
and 0.3, 256 samples, 1000 proposals; boxes 0.5, 512 samples, two layers of 1024; four convolutions for masks; scores
above 0.05, suppression at 0.5, 100 boxes. What torchvision does its own way: boxes cost a smooth L1 (beta 1/9) where
the original has L1.
"""

import contextlib
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from data.coco import Instances, masks_module
from data.preprocess import MEAN, STD
from models.dense import BLOCKS, DenseBackbone, decayed_group, lay_out, without_class_tokens
from models.vit import VisionTransformer
from randomness import counted_seed

SHORTER, LONGER = 800, 1333
_HEAD, _SAMPLES = 0xDE7, 0x5A3


@dataclass(frozen=True)
class Preset:
    """A published schedule. ``layer_decay`` None: one rate, and positions, class token and norms do not decay."""

    lr: float
    batch: int  # images of a step, over all processes
    drop_path: float
    layer_decay: float | None
    class_tokens: bool
    warmup: int  # steps
    weight_decay: float = 0.05
    epochs: int = 12
    drops: tuple[int, ...] = (8, 11)  # epochs after which the rate is a tenth


PRESETS = {
    "udi": Preset(5e-5, 8, 0.05, None, class_tokens=False, warmup=1000),
    "ibot_small": Preset(1e-4, 32, 0.1, 0.8, class_tokens=True, warmup=500),
    "ibot_base": Preset(1e-4, 16, 0.2, 0.75, class_tokens=True, warmup=500),
    "mugs": Preset(2e-4, 32, 0.1, 0.8, class_tokens=True, warmup=500),
}


class Pyramid(nn.Module):
    """Images -> five maps of 256 channels, by name: four of the adapter's, and the last once more at half its size."""

    out_channels = 256

    def __init__(self, adapter: DenseBackbone):
        super().__init__()
        self.adapter = adapter
        width = adapter.network.embed_dim
        self.fpn = FeaturePyramidNetwork([width] * 4, self.out_channels, extra_blocks=LastLevelMaxPool())
        self.draws: object = None  # for stochastic depth of the next batch; torchvision hands images on alone

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.fpn({str(level): x for level, x in enumerate(self.adapter(images, self.draws))})


class Scale(GeneralizedRCNNTransform):
    """Training images have their size already."""

    def resize(self, image: torch.Tensor, target: dict | None = None) -> tuple[torch.Tensor, dict | None]:
        return (image, target) if self.training else super().resize(image, target)


def build_detector(
    network: VisionTransformer, classes: int, preset: Preset, blocks: Sequence[int] = BLOCKS, scale: float = 1.0, seed=0
) -> MaskRCNN:
    """``classes`` without the background. ``scale``: times all lengths of images; 1 are the published ones."""
    if preset.class_tokens:
        lay_out(network, round(SHORTER * scale) // network.patch_size, round(1008 * scale) // network.patch_size)
    else:
        network = without_class_tokens(network)
    rates = torch.linspace(0, preset.drop_path, network.depth).tolist()
    for block, rate in zip(network.blocks, rates, strict=True):
        block.drop_path = rate
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(counted_seed(seed, _HEAD))
        anchors = AnchorGenerator(tuple((8 * stride,) for stride in (4, 8, 16, 32, 64)), ((0.5, 1.0, 2.0),) * 5)
        model = MaskRCNN(
            Pyramid(DenseBackbone(network, blocks)),
            classes + 1,
            rpn_anchor_generator=anchors,
            rpn_pre_nms_top_n_train=2000,
            rpn_post_nms_top_n_train=1000,
            rpn_pre_nms_top_n_test=1000,
            rpn_post_nms_top_n_test=1000,
        )
    for pool in (model.roi_heads.box_roi_pool, model.roi_heads.mask_roi_pool):
        _fix_strides(pool)
    sides = round(SHORTER * scale), round(LONGER * scale)
    model.transform = Scale(*sides, list(MEAN), list(STD), size_divisible=32)
    return model


def _fix_strides(pool: nn.Module) -> None:
    """torchvision reads the strides off the first batch a pool sees, and keeps them; here it sees the true ones first,
    so that a run that is continued, whose first batch is another, has the same.
    """
    maps = {str(level): torch.zeros(1, 1, 256 // stride, 256 // stride) for level, stride in enumerate((4, 8, 16, 32))}
    pool(maps, [torch.tensor([[0.0, 0.0, 8.0, 8.0]])], [(256, 256)])


def detector_groups(model: MaskRCNN, preset: Preset, depth: int) -> list[dict]:
    """All that is trained, in groups of one rate and decay."""
    groups: dict[tuple, dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        ours = name.replace("backbone.adapter.network.", "backbone.", 1)
        scale, decays = 1.0, True
        if preset.layer_decay is not None:
            ours = ours if ours != name else f"decoder.{name}"
            _, scale, decays = decayed_group(ours, parameter.ndim == 1, depth, preset.layer_decay)
        elif ours != name and re.search("pos_embed|cls_token|norm", ours):
            decays = False
        start = {"params": [], "lr_scale": scale, "weight_decay": preset.weight_decay if decays else 0.0}
        groups.setdefault((scale, decays), start)["params"].append(parameter)
    return list(groups.values())


def learning_rate(iteration: int, base: float, niter: int, preset: Preset) -> float:
    """A tenth after every epoch of ``preset.drops``; in the warm-up also times a line from 0.001 to 1."""
    rate = base * 0.1 ** sum(iteration // niter >= epoch for epoch in preset.drops)
    return rate * (1 - (1 - iteration / preset.warmup) * (1 - 0.001)) if iteration < preset.warmup else rate


def losses_of(
    model: MaskRCNN, piece: Mapping[str, list[torch.Tensor]], draws: object, key: tuple[int, ...]
) -> dict[str, torch.Tensor]:
    """torchvision's five losses of a batch. Which proposals are sampled is decided by ``key``, of torch's generator."""
    names = ("boxes", "masks", "labels")
    targets = [dict(zip(names, parts, strict=True)) for parts in zip(*(piece[name] for name in names), strict=True)]
    model.backbone.draws = draws
    torch.manual_seed(counted_seed(*key, _SAMPLES))
    return model([image.float().div(255) for image in piece["image"]], targets)


@torch.no_grad()
def results_of(model: MaskRCNN, image: torch.Tensor, index: int, source: Instances) -> list[dict]:
    """What is found on an image (3, height, width), as COCO's result files hold it."""
    model.backbone.draws = None
    (found,) = model([image])
    coco, categories = masks_module(), list(source.numbers)
    results = []
    rows = zip(*(found[name].cpu() for name in ("boxes", "scores", "labels", "masks")), strict=True)
    for box, score, label, mask in rows:
        left, top, right, bottom = box.tolist()
        code = coco.encode((mask > 0.5).to(torch.uint8).permute(1, 2, 0).numpy().copy(order="F"))[0]
        result = {"image_id": source.ids[index], "category_id": categories[int(label) - 1], "score": float(score)}
        box = [left, top, right - left, bottom - top]
        results.append(result | {"bbox": box, "segmentation": {"size": code["size"], "counts": code["counts"]}})
    return results


NUMBERS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def average_precision(source: Instances, results: list[dict], images: Sequence[int]) -> dict[str, float]:
    """COCO's six numbers in percent, of boxes and (``mask_...``) of masks, on these indices of the source's images."""
    masks_module()
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    numbers = {}
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(source.path))
        for kind, prefix in (("bbox", ""), ("segm", "mask_")):
            if not results:
                numbers |= {prefix + name: 0.0 for name in NUMBERS}
                continue
            found = [dict(result) for result in results]
            if kind == "segm":  # else loadRes would take the boxes' area
                found = [{k: v for k, v in result.items() if k != "bbox"} for result in found]
            judge = COCOeval(truth, truth.loadRes(found), kind)
            judge.params.imgIds = [source.ids[index] for index in images]
            judge.evaluate()
            judge.accumulate()
            judge.summarize()
            numbers |= {prefix + n: round(100 * float(v), 2) for n, v in zip(NUMBERS, judge.stats, strict=False)}
    return numbers
