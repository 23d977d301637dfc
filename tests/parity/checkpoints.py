"""Runners: published layouts of checkpoints, and the features evaluations take from them."""

import re
from collections.abc import Iterator

import torch

from features import block_class_tokens, class_token, class_token_and_patch_mean, multiscale_class_token
from models.checkpoints import choose_tensors, load_tensors, read_backbone
from models.layouts import LAYOUTS, plain_name
from models.safe_load import load_file
from tests.parity import Case
from tests.parity.networks import build_vit
from visualize_attention import attention_maps

# <key>_<feature>[_<input>], as in teacher_linear_n2_avgpool or student_attn_y
OUTPUT = re.compile(
    r"out/(?P<key>[^_]+)_(?P<feature>knn|linear_n(?P<n>\d+)|multiscale|attn)(?P<avgpool>_avgpool)?(?P<input>_\w+)?"
)


def checkpoint_and_features(case: Case) -> Iterator[tuple]:
    files = {name: load_file(case.folder / name) for name in case.extra_files}
    training = {name: file for name, file in files.items() if "teacher" in file}
    for name in case.entry["outputs"]:
        if "value" in case.entry["outputs"][name]:
            yield from training_layout(case, name, training)
    for name in case.extra_files:
        for key in ("teacher", "student") if name in training else ("teacher",):
            model = build_vit(case.params).to(case.dtype).eval()
            load_tensors(model, *read_backbone(case.folder / name, key))
            for label in case.names(f"out/{key}_"):
                yield f"{label} of {name}", feature_of(case, model, label), case.arrays[label]


def training_layout(case: Case, output: str, training: dict[str, dict]) -> Iterator[tuple]:
    """What stands at the top level and under which names, in the files that a training run wrote."""
    expected = case.value(output)
    if output == "top_level_keys":
        yield output, sorted(max(training.values(), key=len)), sorted(expected)
        yield f"{output} beyond", [key for file in training.values() for key in file if key not in expected], []
    for name, file in training.items():
        if output.endswith("_keys_sample"):
            tensors = file[output.removesuffix("_keys_sample")]
            yield f"{output} of {name}", [tensor for tensor in expected if tensor in tensors], expected
        elif output == "dino_loss_keys":
            shapes = {tensor: list(value.shape) for tensor, value in file["dino_loss"].items()}
            yield f"{output} of {name}", shapes, expected


def feature_of(case: Case, model: torch.nn.Module, label: str) -> torch.Tensor:
    match = OUTPUT.fullmatch(label)
    if not match:
        raise NotImplementedError(f"no feature is known by the name {label}")
    images = case.tensor(f"in/{(match['input'] or '_x')[1:]}")
    with torch.no_grad():
        if match["feature"] == "knn":
            return class_token(model, images)
        if match["feature"] == "multiscale":
            return multiscale_class_token(model, images)
        if match["feature"] == "attn":
            return attention_maps(model, images).flatten(2)
        if match["avgpool"]:
            return class_token_and_patch_mean(model, images)
        return block_class_tokens(model, images, int(match["n"]))


def checkpoint_key_handling(case: Case) -> Iterator[tuple]:
    backbone_only = next(layout for layout in LAYOUTS if layout.name == "backbone only")
    for saved, offered in case.value("examples"):
        name, _, remark = offered.partition(" (")
        yield f"examples {saved}", plain_name(saved), name
        yield f"examples {saved} ignored", not backbone_only.belongs_to_backbone(plain_name(saved)), "ignored" in remark
    tensor = {"cls_token": torch.zeros(1, 1, 2)}
    for key, file, found in (
        ("student", {"teacher": tensor, "student": tensor}, "student"),
        ("teacher", {"state_dict": tensor}, "state_dict"),
        ("teacher", tensor, None),
    ):
        yield f"lookup_order {key} in {list(file)}", choose_tensors(file, key)[0], found


RUNNERS = {
    "dino/checkpoint_and_features": checkpoint_and_features,
    "eval_core/checkpoint_key_handling": checkpoint_key_handling,
}
