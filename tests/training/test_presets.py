import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from training.options import check_options, compare_with_presets, parse_options, trajectory_options, unused_arguments
from training.presets import CONFIGS, read_preset
from utils import UsageError, World

ALONE = World(0, 1, 0, torch.device("cpu"))

PRESETS = pytest.mark.parametrize(
    "path", sorted(CONFIGS.glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}"
)


@PRESETS
def test_every_preset_is_read_by_its_methods_parser(path):
    args = parse_options(["--method", path.parent.name, "--config", str(path)])
    preset = read_preset(path)
    assert preset.expected, "a preset says what the published run reached"
    for name, (value, _) in preset.options.items():
        got = getattr(args, name)
        assert (list(got) if isinstance(got, tuple) else got) == value, name
    assert len(path.read_text().splitlines()) <= 40


def gpus_of(path):
    """Number of processes that a preset's remark gives its batch for."""
    remark = re.search(r"^batch_size_per_gpu: \d+  # (?:on (\d+) GPUs|in one process)", path.read_text(), re.MULTILINE)
    return int(remark[1] or 1)


@PRESETS
def test_every_preset_can_be_started_and_has_the_images_per_step_it_names(path):
    args = parse_options(["--config", str(path), "--method", path.parent.name])
    check_options(args, ALONE)
    images = str(read_preset(path).expected["global_batch"]).split()[0]
    assert args.batch_size_per_gpu * gpus_of(path) == int(images)


MULTI_CROP = "--local_crops_number 10 --global_crops_scale 0.25 1 --local_crops_scale 0.05 0.25"
TEACHER_OF_IBOT = "--teacher_temp 0.07 --warmup_teacher_temp_epochs 30 --norm_last_layer false"
IBOT_RUN = f"{TEACHER_OF_IBOT} --shared_head true --out_dim 8192 {MULTI_CROP} --pred_ratio 0 0.3 --pred_ratio_var 0 0.2"
ATTMASK_RUN = (
    f"--arch vit_small {TEACHER_OF_IBOT} --shared_head True --out_dim 8192 --num_workers 4 --eval_every 20 "
    "--pred_ratio 0.3 --pred_ratio_var 0.2 --masking_prob 0.5"
)
ESVIT_RUN = (
    "--epochs 300 --teacher_temp 0.07 --warmup_epochs 10 --warmup_teacher_temp_epochs 30 --norm_last_layer false "
    "--use_dense_prediction True"
)
HINT = "--pred_shape attmask_hint --show_max 0.1"
PUBLISHED = {  # the options of the commands in the originals' READMEs
    "ibot/vit_small_p16_ep800": f"{IBOT_RUN} --arch vit_small --epochs 800 --batch_size_per_gpu 64",
    "ibot/swin_tiny_w14_ep300": f"{IBOT_RUN} --arch swin_tiny --epochs 300 --batch_size_per_gpu 26 "
    "--pred_start_epoch 50 --patch_size 4 --window_size 14",
    "attmask/hint_ep100": f"{ATTMASK_RUN} {MULTI_CROP} {HINT} --epochs 100 --batch_size_per_gpu 60 "
    "--momentum_teacher 0.996 --subset -1",
    "attmask/high_ep100": f"{ATTMASK_RUN} {MULTI_CROP} --pred_shape attmask_high --epochs 100 --batch_size_per_gpu 60 "
    "--momentum_teacher 0.996 --subset -1",
    "attmask/high_ep300": f"{ATTMASK_RUN} --local_crops_number 10 --global_crops_scale 0.32 1 "
    "--local_crops_scale 0.05 0.32 --pred_shape attmask_high --epochs 300 --batch_size_per_gpu 100 "
    "--momentum_teacher 0.996 --subset -1",
    "attmask/hint_ep100_subset260": f"{ATTMASK_RUN} {MULTI_CROP} --local_crops_number 6 {HINT} --epochs 100 "
    "--batch_size_per_gpu 60 --momentum_teacher 0.99 --subset 260",
    "udi/vit_small_ep300": f"--arch vit_small {MULTI_CROP} --norm_last_layer false --epochs 300 "
    "--batch_size_per_gpu 128",
    "esvit/swin_tiny_w7_regions": f"--arch swin_tiny --batch_size_per_gpu 32 {ESVIT_RUN} "
    "--cfg experiments/imagenet/swin/swin_tiny_patch4_window7_224.yaml",
    "esvit/cvt_regions": f"--arch cvt_tiny --batch_size_per_gpu 32 {ESVIT_RUN} --aug-opt dino_aug "
    "--cfg experiments/imagenet/cvt_v4/s1.yaml",
    "esvit/vil_regions": f"--arch vil_2262 --batch_size_per_gpu 32 {ESVIT_RUN} --aug-opt dino_aug "
    "--cfg experiments/imagenet/vil/vil_small/base.yaml MODEL.SPEC.MSVIT.ARCH l1,h3,d96,n2,s1,g1,p4,f7,a0_"
    "l2,h6,d192,n2,s1,g1,p2,f7,a0_l3,h12,d384,n6,s0,g1,p2,f7,a0_l4,h24,d768,n2,s0,g0,p2,f7,a0 "
    "MODEL.SPEC.MSVIT.MODE 1 MODEL.SPEC.MSVIT.VIL_MODE_SWITCH 0.75",
    "esvit/swin_small_w14_regions": f"--arch swin_small --batch_size_per_gpu 16 {ESVIT_RUN} --aug-opt dino_aug "
    "--cfg experiments/imagenet/swin/swin_small_patch4_window14_224.yaml",
    "unic/unic": "--data_dir imagenet --output_dir . --seed 22",  # whose seed is a random number
}
MUGS_LONG = "--weight_decay_end 0.1 --group_teacher_temp 0.07 --group_warmup_teacher_temp_epochs"
ON_NODES = "--ddpjob true --rank 1 --world_size 2 --debug false --use_prefetcher true"  # of a launcher, no number
PUBLISHED |= {
    "mugs/vit_small_ep100": "--arch vit_small --group_teacher_temp 0.04 --group_warmup_teacher_temp_epochs 0 "
    "--weight_decay_end 0.2 --norm_last_layer false --epochs 100",
    "mugs/vit_small_ep300": f"--arch vit_small {MUGS_LONG} 30 --norm_last_layer false --epochs 300 {ON_NODES}",
    "mugs/vit_small_ep800": f"--arch vit_small {MUGS_LONG} 30 --norm_last_layer false --epochs 800 {ON_NODES}",
    # whose commands leave out the batch that was used
    "mugs/vit_base_ep400": f"--arch vit_base {MUGS_LONG} 50 --min_lr 2e-6 --freeze_last_layer 3 --epochs 400 "
    f"--norm_last_layer false --batch_size_per_gpu 42 --size_crops 96 {ON_NODES}",
    "mugs/vit_large_ep250": "--arch vit_large --lr 0.0015 --min_lr 1.5e-4 --weight_decay 0.025 --weight_decay_end 0.08 "
    "--norm_last_layer true --group_teacher_temp 0.07 --group_warmup_teacher_temp_epochs 50 --freeze_last_layer 3 "
    f"--drop_path_rate 0.3 --epochs 250 --batch_size_per_gpu 16 {ON_NODES}",
}
PUBLISHED["attmask/high_ep100_subset260"] = PUBLISHED["attmask/hint_ep100_subset260"].replace(
    HINT, "--pred_shape attmask_high"
)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_is_the_command_of_the_originals_readme(name):
    published = parse_options(["--method", name.split("/")[0], *PUBLISHED[name].split()])
    preset = parse_options(["--method", name.split("/")[0], "--config", str(CONFIGS / f"{name}.yaml")])
    for args in (published, preset):
        check_options(args, ALONE)
    assert trajectory_options(published) == trajectory_options(preset)
    assert published.batch_size_per_gpu == preset.batch_size_per_gpu
    if name.startswith("attmask"):
        assert published.knn_every == preset.knn_every


@pytest.mark.parametrize(
    ("name", "images", "lr", "steps"),
    [
        ("attmask/hint_ep100", 1_281_167, 4.6875e-4, 5338),
        ("attmask/high_ep100", 1_281_167, 4.6875e-4, 5338),
        ("attmask/high_ep300", 1_281_167, 1.5625e-3, 1601),
        ("attmask/hint_ep100_subset260", 260_000, 4.6875e-4, 1083),
        ("attmask/high_ep100_subset260", 260_000, 4.6875e-4, 1083),
        ("ibot/vit_small_p16_ep800", 1_281_167, 2e-3, 1251),
        ("ibot/swin_tiny_w14_ep300", 1_281_167, 2.03125e-3, 1231),
        ("ibot/vit_base_p16_ep400", 1_281_167, 3e-3, 1251),
        ("udi/vit_small_ep300", 1_281_167, 2e-3, 1251),
        ("unic/unic", 1_281_167, 6e-4, 2502),
        ("esvit/swin_tiny_w7_regions", 1_281_167, 1e-3, 2502),
        ("esvit/cvt", 1_281_167, 2e-3, 1251),
        ("mugs/vit_small_ep100", 1_281_167, 1.6e-3, 2502),
        ("mugs/vit_small_ep800", 1_281_167, 3.2e-3, 1251),
        ("mugs/vit_base_ep400", 1_281_167, 3.15e-3, 1270),  # the original repeats images to 1271
        ("mugs/vit_large_ep250", 1_281_167, 3.75e-3, 2001),
    ],
)
def test_learning_rate_and_steps_of_a_preset_are_those_of_the_original(name, images, lr, steps):
    path = CONFIGS / f"{name}.yaml"
    batch = read_preset(path).expected["global_batch"]
    args = parse_options(["--method", path.parent.name, "--config", str(path)])
    assert (args.lr * batch / 256, images // batch) == (pytest.approx(lr), steps)


def test_the_command_line_overrides_a_preset():
    path = str(CONFIGS / "dino" / "boosted.yaml")
    assert parse_options(["--config", path]).epochs == 300
    assert parse_options(["--config", path, "--epochs", "7"]).epochs == 7
    assert parse_options(["--epochs", "7", "--config", path]).epochs == 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: 0.1\nepocs: 3\n", r"line 2: unknown option 'epocs'; did you mean epochs\?"),
        ("lr: fast\n", r"line 1: argument --lr: invalid float value: 'fast'"),
        ("optimizer: adam\n", "line 1: argument --optimizer: invalid choice: 'adam'"),
        ("- a list\n", "expected lines of the form"),
        ("a: [\n", "not YAML"),
        ("method: mugs\n", "preset of mugs"),
    ],
)
def test_a_faulty_preset_is_answered_with_its_line_and_key(tmp_path, text, message):
    path = tmp_path / "faulty.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        parse_options(["--method", "dino", "--config", str(path)])


def test_the_argument_file_of_an_originals_run_is_read_and_what_means_nothing_here_is_listed(tmp_path):
    path = tmp_path / "dino_args.json"
    theirs = {
        "arch": "vit_tiny",
        "augment": None,
        "clip_grad": 0.0,
        "data_dir": "/home/them/imagenet",
        "dist_url": "env://",
        "dry_run": False,
        "gpu": 3,
        "grad_checkpointing": True,
        "lr_schedule": [0.0, 1e-06, 2e-06],
        "min_lr": 1e-06,
        "nb_knn": [5, 10],
        "output_dir": "/home/them/out",
        "saveckpt_freq": 7,
        "use_fp16": True,
        "wd": 0.03,
    }
    path.write_text(json.dumps(theirs, indent=4, sort_keys=True))
    args = parse_options(["--method", "dino", "--config", str(path), "--epochs", "3"])
    assert (args.arch, args.clip_grad, args.min_lr, args.epochs) == ("vit_tiny", 0.0, 1e-6, 3)
    assert (args.saveckp_freq, args.weight_decay, args.nb_knn, args.use_fp16) == (7, 0.03, [5, 10], True)
    assert (args.grad_checkpointing, args.dry_run, args.augment) == (True, False, "fast")
    assert (args.data_path, args.output_dir) == (None, ".")
    (line,) = unused_arguments(args)
    assert line.endswith("means nothing here: data_dir, dist_url, gpu, lr_schedule, output_dir")
    assert unused_arguments(parse_options(["--config", str(CONFIGS / "dino" / "boosted.yaml")])) == []
    with pytest.raises(UsageError, match="names no method; pass --method"):
        parse_options(["--config", str(path)])
    path.write_text(json.dumps(theirs | {"min_lr": "low"}, indent=4, sort_keys=True))
    with pytest.raises(UsageError, match="line 15: argument --min_lr: invalid float value: 'low'"):
        parse_options(["--method", "dino", "--config", str(path)])


def test_the_argument_file_of_unic_is_its_preset(tmp_path):
    """The names and defaults that UNIC documents, as its program writes them; dictionaries are Python in strings."""
    theirs = {
        "arch": "vit_base",
        "batch_size_per_gpu": 128,
        "clip_grad": 0.0,
        "data_dir": "/home/them/imagenet",
        "dist_url": "env://",
        "drop_path_rate": 0.1,
        "epochs": 200,
        "image_size": 224,
        "lam_lcos": 0.5,
        "lam_lsl1": 0.5,
        "local_rank": 0,
        "lp_args": "{'std': 0.02}",
        "lr": 0.0003,
        "min_lr": 1e-06,
        "num_workers": 12,
        "optim_args": "{'betas':(0.9, 0.99), 'eps':1e-8}",
        "output_dir": "/home/them/out",
        "patch_size": 16,
        "saveckpt_freq": 20,
        "seed": 22,
        "t_drop_prob": 0.5,
        "teachers": ["dbotft_vitbase_16", "deit3_vitbase_16", "dino_vitbase_16", "ibot_vitbase_16"],
        "tnorm_ema_momentum_end": 0.001,
        "tnorm_ema_momentum_start": 1.0,
        "use_fp16": True,
        "warmup_epochs": 10,
        "wd": 0.03,
        "world_size": 4,
    }
    path = tmp_path / "unic_args.json"
    for nested in ({}, {"lp_args": {"std": 0.02}, "optim_args": {"betas": [0.9, 0.99], "eps": 1e-8}}):
        path.write_text(json.dumps(theirs | nested, indent=4, sort_keys=True))
        args = parse_options(["--method", "unic", "--config", str(path)])
        preset = parse_options(["--config", str(CONFIGS / "unic" / "unic.yaml")])
        assert trajectory_options(args) == trajectory_options(preset)
        assert sorted(args.teachers.split(",")) == sorted(preset.teachers.split(","))
        assert args.use_fp16 is True and args.data_path is None
        (line,) = unused_arguments(args)
        assert line.endswith("means nothing here: data_dir, dist_url, local_rank, output_dir, world_size")


def test_numbers_are_read_as_numbers_in_nested_values_too(tmp_path):
    path = tmp_path / "args.json"
    path.write_text('{"optim_args": {"betas": [0.9, 0.99], "eps": 1e-08}, "lr": 1E-3, "name": "1e"}')
    assert {name: value for name, (value, _) in read_preset(path).options.items()} == {
        "optim_args": {"betas": [0.9, 0.99], "eps": 1e-8},
        "lr": 1e-3,
        "name": "1e",
    }


def test_the_nearest_preset_is_named_with_its_result_and_every_difference():
    args = parse_options(["--epochs", "300", "--teacher_temp", "0.07", "--warmup_teacher_temp_epochs", "30"])
    lines = compare_with_presets(args, world_size=16)
    assert "boosted.yaml" in lines[0] and "73.3" in lines[0]
    assert lines[1:] == ["  norm_last_layer: True (preset False)"]


@PRESETS
def test_a_preset_alone_names_its_method_and_is_nearest_to_itself(path):
    args = parse_options(["--config", str(path)])
    assert args.method == path.parent.name
    images = args.batch_size_per_gpu * gpus_of(path)
    lines = compare_with_presets(args, world_size=gpus_of(path))
    assert lines[0].startswith(f"nearest preset: configs/{args.method}/{path.name} ")
    inferred = [f"  images per step: {images} (preset {images} (inferred))"]
    assert lines[1:] in (["  no option differs"], inferred)


def test_patches_left_out_are_no_difference():
    path = CONFIGS / "ibot" / "swin_tiny_w14_ep300.yaml"
    argv = PUBLISHED["ibot/swin_tiny_w14_ep300"].replace("--patch_size 4", "").split()
    lines = compare_with_presets(parse_options(["--method", "ibot", *argv]), world_size=gpus_of(path))
    assert "swin_tiny_w14" in lines[0] and lines[1:] == ["  no option differs"]


def test_presets_keep_to_one_value_per_line():
    for path in CONFIGS.glob("*/*.yaml"):
        assert yaml.safe_load(Path(path).read_text())
