"""Runners: Mugs's checkpoints, and the features that its evaluations take from them."""

import re
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from evaluation.features import NORMALISED_MEAN, Feature, class_token
from evaluation.retrieval import multiscale
from methods.memory import Memory
from methods.mugs import Mugs
from models.matching import load_tensors
from models.reading import read_backbone
from models.safe_load import load_file
from models.vit import VisionTransformer
from tests.parity import Case
from tests.parity.mugs_training import small_mugs
from training.checkpointing import unwrapped

# <key>.<feature> on the square images, <key>.rect.<feature> on the others
OUTPUT = re.compile(r"out\.(?P<key>student|teacher)\.(?P<rect>rect\.)?(?P<feature>\w+)")
FEATURE = re.compile(
    r"linear_n(?P<n>\d+)(?P<interleaved>_avgpool_interleaved)?|multi_avg(?P<avgpool>\d)(_n(?P<blocks>\d+))?"
)


def checkpoint_features(case: Case) -> Iterator[tuple]:
    names = [said.split()[0] for said in case.params["files"].values()]
    files = {name: load_file(case.folder / name) for name in names}
    training = {name: file for name, file in files.items() if "teacher" in file}
    for name, file in training.items():
        yield from layout(case, name, file)
    for name in names:
        for key in ("teacher", "student") if name in training else ("teacher",):
            for label in case.names(f"out.{key}."):
                yield f"{label} of {name}", feature_of(case, name, label), case.arrays[label]


def layout(case: Case, name: str, file: dict) -> Iterator[tuple]:
    """What stands in a file, and that a method of its sizes has and takes the same."""
    p = case.params
    sizes = {"dim": "embed_dim", "depth": "depth", "heads": "num_heads", "patch": "patch_size", "img": "img_size"}
    sizes |= {"mlp_ratio": "mlp_ratio"}
    ours = {short: p["model"][long] for short, long in sizes.items()}
    names = {"hid": "hidden", "pred": "pred_hidden", "out": "out", "gout": "group_out", "bott": "bottleneck"}
    ours |= {short: p["head_sizes"][long] for short, long in names.items()}
    method = small_mugs(ours, queue_sizes=(p["queue_size"], p["queue_size"]), top_n=p["top_n"])
    for side in ("student", "teacher"):
        method.memories[side] = Memory(ours["dim"], p["memory_size"])
    parts = method.checkpoint_parts()
    yield f"top_level_keys of {name}", list(file), p["top_level_keys"]
    yield f"parts of {name}", sorted({*parts, "optimizer", "epoch", "args"}), sorted(p["top_level_keys"])
    said = {"student": p["student_keys"], "teacher": p["teacher_keys"], "student_mem": p["student_mem_keys"]}
    said |= {"teacher_mem": p["student_mem_keys"], **p["loss_keys"]}
    for key, part in parts.items():
        prefix = "module." if key in method.wrapped else ""
        yield f"names of {key}, {name}", [f"{prefix}{n}" for n in part.state_dict()], said[key]
        part.load_state_dict(unwrapped(file[key]))
        for tensor, value in part.state_dict().items():
            if tensor != "block.queue_v":  # ours is queue_k once more: nothing reads it
                yield f"{key} {tensor} of {name}", value, file[key][f"{prefix}{tensor}"]
    yield from groups(p, name, file, method)


def groups(p: dict, name: str, file: dict, method: Mugs) -> Iterator[tuple]:
    own = method.param_groups()
    yield f"optimizer_groups of {name}", [group["name"] for group in own], [g["name"] for g in p["optimizer_groups"]]
    decays = [group.get("wd_multiplier", 1.0) > 0 for group in own]
    yield f"decays of {name}", decays, [group.get("apply_wd", True) for group in p["optimizer_groups"]]
    stored = file["optimizer"]["param_groups"]
    yield f"groups in {name}", [len(group["params"]) for group in own], [len(group["params"]) for group in stored]


def feature_of(case: Case, name: str, label: str) -> torch.Tensor:
    match = OUTPUT.fullmatch(label)
    images, feature = case.tensor("in.images_rect" if match["rect"] else "in.images"), match["feature"]
    pooled = feature.endswith("_feature_meanpool")
    names = ("embed_dim", "depth", "num_heads", "patch_size", "img_size", "mlp_ratio", "qkv_bias")
    sizes = {size: case.params["model"][size] for size in names}
    model = VisionTransformer(**sizes).to(case.dtype).eval()
    load_tensors(model, *read_backbone(case.folder / name, match["key"]))
    if pooled:  # with a norm that is fresh
        single, model = model, VisionTransformer(**sizes, use_mean_pooling=True).to(case.dtype).eval()
        model.load_state_dict(single.state_dict(), strict=False)
    with torch.no_grad():
        if feature in ("knn", "knn_l2") or pooled or feature.endswith("_feature_cls"):
            found = class_token(model, images)
            return F.normalize(found, dim=1) if feature == "knn_l2" else found
        if feature == "multi_scale":
            return multiscale(model, images)
        return chosen(FEATURE.fullmatch(feature))(model, images)


def chosen(match: re.Match) -> Feature:
    """Its linear probe's avgpool 1 is the mean of patches after the norm, which is not what iBOT calls so."""
    if match["n"]:
        return Feature(int(match["n"]), "interleaved" if match["interleaved"] else "0")
    return Feature(int(match["blocks"] or 1), {"1": NORMALISED_MEAN}.get(match["avgpool"], match["avgpool"]))


RUNNERS = {
    "mugs/checkpoint_features": checkpoint_features,
}
