"""Runners: published layouts of checkpoints, and the features evaluations take from them."""

import re
from collections.abc import Iterator

import torch

from data.preprocess import MEAN, STD
from evaluation.attention import attention_maps
from evaluation.classifier import combine
from evaluation.features import Feature, class_token
from evaluation.linear_heads import heads_of
from evaluation.retrieval import multiscale
from models.layouts.names import plain_name
from models.layouts.table import LAYOUTS
from models.matching import compare, load_tensors
from models.reading import DEFAULT_KEY, choose_tensors, read_backbone
from models.safe_load import load_file
from tests.parity import Case
from tests.parity.networks import build_vit

# <key>_<feature>[_<input>], as in teacher_linear_n2_avgpool, student_n1_avgpool2 or student_attn_y
OUTPUT = re.compile(
    r"out/(?P<key>[^_]+)_(?P<feature>knn|(linear_)?n(?P<n>\d+)|multiscale|attn)"
    r"(?P<avgpool>_avgpool(?P<kind>\d)?)?(?P<input>_\w+)?"
)


def checkpoint_and_features(case: Case) -> Iterator[tuple]:
    files = {name: load_file(case.folder / name) for name in case.extra_files}
    training = {name: file for name, file in files.items() if "teacher" in file}
    for name in case.entry["outputs"]:
        if "value" in case.entry["outputs"][name]:
            yield from training_layout(case, name, training)
    for name in case.extra_files:
        for key in ("teacher", "student") if name in training else (owner(files[name], training),):
            model = build_vit(case.params).to(case.dtype).eval()
            load_tensors(model, *read_backbone(case.folder / name, key if name in training else DEFAULT_KEY))
            for label in case.names(f"out/{key}_"):
                yield f"{label} of {name}", feature_of(case, model, label), case.arrays[label]


def owner(bare: dict, training: dict[str, dict]) -> str:
    """Whose backbone a file holds by itself: the network of a training checkpoint that has the same patch embedding."""
    name = "patch_embed.proj.weight"
    weight = next(tensor for key, tensor in bare.get("state_dict", bare).items() if key.endswith(name))
    for file in training.values():
        for network in ("teacher", "student"):
            if any(key.endswith(name) and torch.equal(tensor, weight) for key, tensor in file[network].items()):
                return network
    raise ValueError("a backbone that no training checkpoint has")


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
        elif output == "student_head_keys":
            yield f"{output} of {name}", [tensor for tensor in file["student"] if ".head." in tensor], expected
        elif output.endswith("_loss_keys"):
            shapes = {tensor: list(value.shape) for tensor, value in file[output.removesuffix("_keys")].items()}
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
            return multiscale(model, images)
        if match["feature"] == "attn":
            return attention_maps(model, images).flatten(2)
        avgpool = match["kind"] or ("interleaved" if match["avgpool"] else "0")
        return Feature(int(match["n"]), avgpool)(model, images)


def attmask_checkpoint(case: Case) -> Iterator[tuple]:
    config, files = case.params["model"], {name: load_file(case.folder / name) for name in case.extra_files}
    training = {name: file for name, file in files.items() if "teacher" in file}
    full, (bare,) = max(training.values(), key=len), (file for name, file in files.items() if name not in training)
    yield "top_level_keys", sorted(full), sorted(case.params["top_level_keys"])
    for key in ("student", "teacher"):
        prefixes = {".".join(name.split(".")[: 2 if key == "student" else 1]) + "." for name in full[key]}
        yield f"{key}_keys_prefix", sorted(prefixes), case.params[f"{key}_keys_prefix"].split(" / ")
    layout, tensors = case.params["backbone_only_layout"], list(bare["state_dict"])
    found = {"top": list(bare), "first_keys": tensors[: len(layout["first_keys"])], "n": len(tensors)}
    yield "backbone_only_layout", found, layout
    for name in files:
        state, info = read_backbone(case.folder / name)
        for label, messages in case.params["load_messages"].items():
            n, avgpool = re.search(r"_n(\d+)_avg(\d)", label).groups()
            model = build_vit(config).to(case.dtype).eval()
            load_tensors(model, state, info)
            with torch.no_grad():
                feature = Feature(int(n), avgpool)(model, case.tensor("images"))
            yield f"{label} of {name}", feature, case.arrays[label]
            if name in training:  # a backbone by itself has no heads to be ignored
                theirs = build_vit(config, use_mean_pooling=avgpool == "1")
                report = compare(theirs.state_dict(), state, info)
                yield f"{label} missing", report.missing, messages["missing"]
                yield f"{label} unexpected", sorted(report.unexpected + report.ignored), sorted(messages["unexpected"])
    for label in case.names("linear_"):
        yield f"linear_ in load_messages {label}", label in case.params["load_messages"], True


def combined_checkpoint(case: Case) -> Iterator[tuple]:
    """AttMask's classifier for ImageNet-9: backbone and linear head in one file, made from two others."""
    files = {name: load_file(case.folder / name) for name in case.extra_files}
    combined, file = next(pair for pair in files.items() if "linear.weight" in pair[1].get("state_dict", {}))
    yield "combined_top_level_keys", list(file), case.params["combined_top_level_keys"]
    yield "combined_state_dict_keys", list(file["state_dict"]), case.params["combined_state_dict_keys"]
    yield "epoch", file["epoch"], case.params["epoch"]
    yield "best_acc", file["best_acc"], case.params["best_acc"]
    model = build_vit(case.params["model"]).to(case.dtype).eval()
    report = load_tensors(model, *read_backbone(case.folder / combined))
    yield "load_missing", report.missing, case.params["load_missing"]
    linear = [name for name in report.ignored if name.startswith("linear.")]  # the original has them in its network
    yield "load_unexpected", [name for name in report.ignored if name not in linear], case.params["load_unexpected"]
    made = combine(*(case.folder / name for name in case.extra_files if name != combined))
    yield "combined_top_level_keys made here", list(made), list(file)
    yield "combined_state_dict_keys made here", list(made["state_dict"]), list(file["state_dict"])
    for name, tensor in file["state_dict"].items():
        yield f"combined_state_dict_keys, {name}", made["state_dict"][name], tensor
    ((weight, bias),) = heads_of(file)
    blocks = weight.shape[1] // model.embed_dim  # class tokens of the last ones, side by side
    mean, std = (torch.tensor(values).to(case.dtype).view(3, 1, 1) for values in (MEAN, STD))  # float32 in the original
    with torch.no_grad():
        features = Feature(blocks)(model, (case.tensor("images").clamp(0, 1) - mean) / std)
    logits = features @ weight.to(case.dtype).T + bias.to(case.dtype)
    yield "logits", logits, case.arrays["logits"]
    predictions, labels = logits.argmax(dim=1), case.tensor("labels")
    yield "pred", predictions, case.arrays["pred"]
    classes = torch.tensor([case.params["class_to_super"][str(number)] for number in range(logits.shape[1])])
    outputs = case.entry["outputs"]
    yield "accuracy_mapped", (classes[predictions] == labels).double().mean(), outputs["accuracy_mapped"]
    yield "accuracy_unmapped", (predictions == labels).double().mean(), outputs["accuracy_unmapped"]


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
    "*/checkpoint_and_features": checkpoint_and_features,
    "attmask/checkpoint": attmask_checkpoint,
    "attmask/in9_model": combined_checkpoint,
    "eval_core/checkpoint_key_handling": checkpoint_key_handling,
}
