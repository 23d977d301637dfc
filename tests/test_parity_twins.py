"""Golden cases with a number changed fail; with fewer numbers, or files of other names, they pass as before."""

import json
import re
import shutil

import pytest

from tests.parity import Case, find_runner, judge, load_cases
from tests.twins import GOLDEN, agrees, golden, rewrite, unnoticed

# ---------------------------------------------------------------------------------------------------------------------
# Every expected number matters
# ---------------------------------------------------------------------------------------------------------------------

SLOW = {"augmentation_statistics", "masks_statistics", "vit_structure", "swin_structure", "resnet_forward"}
NEVER = {  # what does not stand in manifest or arrays, or is only words, an input, or a bound beside what is compared
    "attmask/linear_probe": ["checkpoint_teacher_linear.pth"],
    "attmask/hint_stats": ["observed_mask_sizes"],
    "attmask/in9_map": ["percent_2dp"],
    "eval_core/checkpoint_key_handling": ["lookup_order"],
    "udi/knn": ["results"],
    "unic/semseg_pipeline": [f"crop/seg{number}" for number in (0, 1, 2, 3, 5)],  # what a rule is asked about
}
QUICK = [c for c in load_cases(GOLDEN) if find_runner(c) and c.name not in SLOW and not c.name.endswith("_two_ranks")]


@pytest.mark.parametrize("case", QUICK, ids=lambda case: f"{case.method}/{case.name}")
def test_another_number_in_any_output_fails(case):
    assert unnoticed(case) == NEVER.get(f"{case.method}/{case.name}", [])


OF_THE_PRODUCT = [  # numbers that cannot be set here, or that arrays show anyway
    "dino/vit_forward layernorm_eps",
    "ibot/vit_masked layernorm_eps",
    "esvit/swin_forward_a norm_eps",
    "udi/head bn_momentum",
    "udi/srs_module layernorm_eps",
    "udi/trajectory_no_patch_lars lars eta",
    "udi/trajectory_one_cls_sgd sgd momentum",
    "dino/trajectory_adamw adamw eps",
    "dino/trajectory_adamw local_crops_number",
    "ibot/trajectory_swin drop_path",
    "attmask/traj_low teacher_temp 1",
    "attmask/topn_0 n_tokens",
    "attmask/topn_0 masking_prob",
    "attmask/subset_1000 runs 0 subset",
    "attmask/init model hidden",
    "eval_core/linear_probe_training momentum",
    "udi/loss_no_patch student_temp",
    "udi/loss_no_patch center_momentum",
    "unic/student_vit interpolate_offset",
    "unic/student_vit_reg_ls_swiglu num_register_tokens",
    "unic/stochastic_depth persample_rate",
    "unic/teachers dims dbotft depth",
    "unic/teacher_openclip logit_scale",
]


@pytest.mark.parametrize("place", OF_THE_PRODUCT)
def test_another_number_among_the_parameters_fails(place):
    case, *keys = place.split()
    twin = golden(*case.split("/"))
    container = twin.params
    for key in keys[:-1]:
        container = container[int(key) if key.isdigit() else key]
    key = int(keys[-1]) if keys[-1].isdigit() else keys[-1]
    container[key] += 1 if isinstance(container[key], int) else container[key] / 4 or 0.1
    assert judge(twin, find_runner(twin)).status == "FAIL"


# ---------------------------------------------------------------------------------------------------------------------
# Less of the same: nothing is computed anew
# ---------------------------------------------------------------------------------------------------------------------


def test_fewer_neighbours_and_classes_of_votes_are_looked_at():
    case = golden("eval_core", "knn_small_classes")
    case.params["nb_knn"] = [3, 20]
    kept = {"out/pred_k3": case.arrays["out/pred_k3"], "out/scores_k100": case.arrays["out/scores_k100"][:7, :5]}
    accuracy = {k: v for k, v in case.value("accuracy").items() if k in ("3", "20")}
    inputs = {name: case.arrays[name] for name in case.names("in/")}
    agrees(rewrite(case, inputs, kept, {"accuracy": accuracy}))


def test_fewer_ratios():
    case = golden("attmask", "topn_0")
    for key in ("masking_ratios", "expected_masked_per_row"):
        case.params[key] = case.params[key][3:4]
    masks = {f"mask_{kind}_0": case.arrays[f"mask_{kind}_3"] for kind in ("high", "low")}
    agrees(rewrite(case, {"attention": case.arrays["attention"]}, masks))


@pytest.mark.parametrize("name", ["pred_ratio", "subset_small", "unsup_cls"])
def test_fewer_runs_in_another_order(name):
    case = golden("attmask", name)
    case.params["runs"] = case.params["runs"][1::-1]
    agrees(case)


def test_fewer_crops_of_the_wrapper():
    case = golden("dino", "multicrop_wrapper")
    batch, crops = len(case.arrays["in/crop0"]), 3
    inputs = {name: case.arrays[name] for name in case.arrays if not name.startswith(("out/", "in/"))}
    inputs |= {f"in/crop{i}": case.arrays[f"in/crop{i}"] for i in range(crops)}
    outputs = {name: case.arrays[name] for name in ("out/logits", "out/logits_single")}
    outputs["out/logits"] = outputs["out/logits"][: crops * batch]
    large, small, single = case.value("backbone_call_shapes")
    agrees(rewrite(case, inputs, outputs, {"backbone_call_shapes": [large, [batch, *small[1:]], single]}))


def test_a_masked_wrapper_without_local_crops():
    case = golden("ibot", "multicrop_wrapper")
    kept = {name: value for name, value in case.arrays.items() if "local" not in name}
    outputs = {name: value for name, value in kept.items() if name.startswith("out/")}
    agrees(rewrite(case, kept, outputs))


@pytest.mark.parametrize(("method", "name"), [("udi", "loss_alpha03_nl4"), ("ibot", "loss_global_local")])
def test_fewer_steps(method, name):
    case = golden(method, name)
    case.params["epoch_of_step"] = case.params["epoch_of_step"][:2]
    late = re.compile(r"step[2-9]/.*|out/(?!center2_\d).*[2-9]|out/center2_[2-9]|out/temp_.*")
    kept = {name: said for name, said in case.entry["outputs"].items() if not late.fullmatch(name)}
    kept |= {name: said for name, said in case.entry["outputs"].items() if name.startswith("out/temp_")}
    case.__dict__["arrays"] = {k: v for k, v in case.arrays.items() if k in kept or k not in case.entry["outputs"]}
    case.entry["outputs"] = kept
    agrees(case)


RENAMED = ["attmask/init", "attmask/forward", "attmask/traj_low", "attmask/checkpoint", "attmask/in9_model"]
RENAMED += ["ibot/checkpoint_and_features", "udi/checkpoint_eval_features", "dino/vit_backward", "attmask/knn_full"]


@pytest.mark.parametrize("name", RENAMED)
def test_files_of_other_names(name, tmp_path):
    """All files that a manifest names are called otherwise, in the folder and in the manifest."""
    method, name = name.split("/")
    case = golden(method, name)
    text = json.dumps(case.entry)
    files = [path for path in case.folder.iterdir() if path.name in text and path.name != "manifest.json"]
    for number, path in enumerate(sorted(files, key=lambda path: -len(path.name))):
        shutil.copy(path, tmp_path / f"file{number}{path.suffix}")
        text = text.replace(path.name, f"file{number}{path.suffix}")
    assert files
    twin = Case(tmp_path, method, json.loads(text))
    result = judge(twin, find_runner(twin))
    assert result.status == "ok", result.problems
