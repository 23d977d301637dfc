import pytest
import torch

from methods import METHODS
from methods.dino import DINO
from training.checkpointing import _differing_options
from training.options import (
    FREE_OPTIONS,
    check_options,
    get_args_parser,
    options_named,
    parse_options,
    trajectory_options,
)
from utils import UsageError, World, cosine_scheduler

ALONE = World(0, 1, 0, torch.device("cpu"))

# A new option is a decision: it is added here, to the README or the help, and to FREE_OPTIONS if it changes no number.
SHARED = """
    accept_changes accum_iter arch augment avgpool_patchtokens backend batch_size_per_gpu class_token clip_grad
    cfg compile config data_path dataset deterministic device devices dist_url drop_path_rate dry_run
    epochs exif grad_checkpointing init_from init_progress knn_data knn_every
    knn_per_class knn_temperature load_from local_rank lr max_bad_images max_image_pixels max_skipped method min_lr
    n_last_blocks nb_knn num_workers refresh_index
    optimizer output_dir patch_size precision print_freq rel_pos_embed replay sampler save_every_minutes saveckp_freq
    seed split subset tsv_mode use_cuda
    use_fp16 vil_arch vil_mode warmup_epochs weight_decay weight_decay_end window_size zip_mode
"""
CROPS = "global_crops_scale global_crops_size local_crops_number local_crops_scale local_crops_size"
TEACHER = """
    freeze_last_layer momentum_teacher norm_last_layer teacher_temp warmup_teacher_temp warmup_teacher_temp_epochs
"""
MASKED = """
    act_in_head global_crops_number lambda1 lambda2 norm_in_head out_dim patch_out_dim pred_ratio pred_ratio_var
    pred_shape pred_start_epoch shared_head shared_head_teacher teacher_patch_temp use_masked_im_modeling
    warmup_teacher_patch_temp
"""
SAMPLED = "alpha global_sampling_window_size include_patch local_sampling_window_size number_cls_token"
DISTILLED = """
    download_teachers fresh_statistics image_size lam_lcos lam_lsl1 lp_args optim_args t_drop_prob teachers
    tnorm_ema_momentum_end tnorm_ema_momentum_start
"""
REGIONS = """
    aa aug_opt color_jitter cutmix cutmix_minmax mixup mixup_mode mixup_prob mixup_switch_prob num_mixup_views recount
    remode reprob smoothing train_interpolation use_dense_prediction use_mixup
"""
CONTRASTED = f"""
    {CROPS} color_aug ddpjob debug freeze_last_layer group_bottleneck_dim group_out_dim group_student_temp
    group_teacher_temp group_warmup_teacher_temp group_warmup_teacher_temp_epochs instance_out_dim instance_queue_size
    instance_temp local_group_advance_once local_group_knn_top_n local_group_out_dim local_group_queue_size
    local_group_temp loss_weights momentum_teacher norm_before_pred norm_last_layer patch_embed_lr_mult prob rank
    re_prob strong_ratio timm_auto_augment_par use_bn_in_head use_prefetcher vanilla_weak_augmentation world_size
"""
OPTIONS = {
    "dino": f"{CROPS} {TEACHER} out_dim use_bn_in_head",
    "ibot": f"{CROPS} {TEACHER} {MASKED}",
    "attmask": f"{CROPS} {TEACHER} {MASKED} masking_prob show_max",
    "udi": f"{CROPS} {TEACHER} {SAMPLED} out_dim use_bn_in_head",
    "unic": DISTILLED,
    "esvit": f"{CROPS} {TEACHER} {REGIONS} out_dim use_bn_in_head",
    "mugs": CONTRASTED,
}
DEFAULTS_OF_DINO = {
    "arch": "vit_small",
    "patch_size": 16,
    "norm_last_layer": True,
    "momentum_teacher": 0.996,
    "warmup_teacher_temp": 0.04,
    "teacher_temp": 0.04,
    "weight_decay": 0.04,
    "weight_decay_end": 0.4,
    "clip_grad": 3.0,
    "epochs": 100,
    "freeze_last_layer": 1,
    "lr": 0.0005,
    "warmup_epochs": 10,
    "min_lr": 1e-6,
    "optimizer": "adamw",
    "drop_path_rate": 0.1,
    "local_crops_scale": (0.05, 0.4),
    "output_dir": ".",
    "seed": 0,
    "num_workers": 10,
    "dist_url": "env://",
}
DEFAULTS_OF_IBOT = {
    "window_size": 7,
    "out_dim": 8192,
    "patch_out_dim": 8192,
    "shared_head": False,
    "shared_head_teacher": True,
    "norm_in_head": None,
    "act_in_head": "gelu",
    "use_masked_im_modeling": True,
    "pred_ratio": [0.3],
    "pred_ratio_var": [0.0],
    "pred_shape": "block",
    "pred_start_epoch": 0,
    "lambda1": 1.0,
    "lambda2": 1.0,
    "warmup_teacher_patch_temp": 0.04,
    "teacher_patch_temp": 0.07,
    "warmup_teacher_temp_epochs": 30,
    "batch_size_per_gpu": 128,
    "global_crops_number": 2,
    "global_crops_scale": (0.14, 1.0),
    "local_crops_number": 0,
    "saveckp_freq": 40,
    "load_from": None,
}
DEFAULTS_OF_THE_ORIGINAL = {
    "udi": {
        "out_dim": 65536,
        "include_patch": True,
        "number_cls_token": 2,
        "use_bn_in_head": False,
        "alpha": 0.5,
        "teacher_temp": 0.07,
        "warmup_teacher_temp_epochs": 30,
        "weight_decay_end": 0.1,
        "batch_size_per_gpu": 128,
        "epochs": 300,
        "min_lr": 1e-5,
        "global_crops_scale": (0.25, 1.0),
        "local_crops_number": 6,
        "local_crops_scale": (0.05, 0.25),
        "global_sampling_window_size": 3,
        "local_sampling_window_size": 2,
        "saveckp_freq": 20,
    },
    "dino": {
        "out_dim": 65536,
        "use_bn_in_head": False,
        "warmup_teacher_temp_epochs": 0,
        "batch_size_per_gpu": 64,
        "global_crops_scale": (0.4, 1.0),
        "local_crops_number": 8,
        "saveckp_freq": 20,
    },
    "ibot": DEFAULTS_OF_IBOT,
    "esvit": {
        "arch": "deit_small",
        "out_dim": 65536,
        "use_bn_in_head": False,
        "use_dense_prediction": False,
        "warmup_teacher_temp_epochs": 0,
        "batch_size_per_gpu": 64,
        "global_crops_scale": (0.4, 1.0),
        "local_crops_number": [8],
        "local_crops_size": [96],
        "aug_opt": "dino_aug",
        "color_jitter": 0.4,
        "aa": "rand-m9-mstd0.5-inc1",
        "train_interpolation": "bicubic",
        "reprob": 0.25,
        "remode": "pixel",
        "recount": 1,
        "use_mixup": False,
        "num_mixup_views": 10,
        "mixup": 0.8,
        "cutmix": 1.0,
        "cutmix_minmax": None,
        "mixup_prob": 1.0,
        "mixup_switch_prob": 0.5,
        "mixup_mode": "batch",
        "smoothing": 0.0,
        "saveckp_freq": 5,
    },
    "unic": {
        "arch": "vit_base",
        "patch_size": 16,
        "drop_path_rate": 0.1,
        "teachers": "dino_vitbase_16,deit3_vitbase_16,ibot_vitbase_16,dbotft_vitbase_16",
        "tnorm_ema_momentum_start": 1.0,
        "tnorm_ema_momentum_end": 0.001,
        "t_drop_prob": 0.5,
        "lam_lcos": 0.5,
        "lam_lsl1": 0.5,
        "data_path": None,
        "image_size": 224,
        "clip_grad": 0.0,
        "batch_size_per_gpu": 128,
        "epochs": 200,
        "weight_decay": 3e-2,
        "weight_decay_end": 3e-2,
        "lr": 3e-4,
        "min_lr": 1e-6,
        "warmup_epochs": 10,
        "output_dir": "./output",
        "saveckp_freq": 20,
        "seed": 22,
        "num_workers": 12,
        "dist_url": "env://",
        "optimizer": "adamw",
    },
    "mugs": {
        "arch": "vit_small",
        "patch_size": 16,
        "batch_size_per_gpu": 64,
        "epochs": 100,
        "warmup_epochs": 10,
        "lr": 0.0008,
        "min_lr": 1e-6,
        "patch_embed_lr_mult": 0.2,
        "optimizer": "adamw",
        "weight_decay": 0.04,
        "weight_decay_end": 0.2,
        "clip_grad": 3.0,
        "freeze_last_layer": 1,
        "drop_path_rate": 0.1,
        "momentum_teacher": 0.996,
        "loss_weights": [1.0, 1.0, 1.0],
        "use_bn_in_head": False,
        "norm_before_pred": True,
        **{f"{loss}_out_dim": 256 for loss in ("instance", "local_group")},
        **{f"{loss}_queue_size": 65536 for loss in ("instance", "local_group")},
        **{f"{loss}_temp": 0.2 for loss in ("instance", "local_group")},
        "local_group_knn_top_n": 8,
        "group_out_dim": 65536,
        "group_bottleneck_dim": 256,
        "norm_last_layer": True,
        "group_student_temp": 0.1,
        "group_warmup_teacher_temp": 0.04,
        "group_teacher_temp": 0.04,
        "group_warmup_teacher_temp_epochs": 0,
        "global_crops_scale": (0.25, 1.0),
        "global_crops_size": 224,
        "local_crops_number": 10,
        "local_crops_scale": (0.05, 0.25),
        "local_crops_size": 96,
        "timm_auto_augment_par": "rand-m9-mstd0.5-inc1",
        "color_aug": False,
        "strong_ratio": 0.45,
        "re_prob": 0.25,
        "vanilla_weak_augmentation": False,
        "prob": 0.5,
        "output_dir": "./exp/",
        "saveckp_freq": 50,
        "seed": 0,
        "num_workers": 12,
        "dist_url": "env://",
        "use_prefetcher": True,
        "debug": False,
        "ddpjob": False,
        "local_group_advance_once": False,
    },
    "attmask": DEFAULTS_OF_IBOT
    | {
        "out_dim": 65536,
        "pred_shape": "attmask_high",
        "masking_prob": 0.5,
        "show_max": 0.1,
        "knn_every": 10,
        "nb_knn": [10, 20, 100, 200],
        "n_last_blocks": 1,
        "knn_per_class": -1,
        "use_cuda": True,
    },
}


@pytest.mark.parametrize("method", METHODS)
def test_the_list_of_options_is_the_one_that_was_decided(method):
    names = {action.dest for action in get_args_parser(METHODS[method])._actions} - {"help"}
    assert sorted(names) == sorted(f"{SHARED} {OPTIONS[method]}".split())
    assert names > FREE_OPTIONS


@pytest.mark.parametrize("method", METHODS)
def test_defaults_are_those_of_the_original(method):
    args = vars(parse_options(["--method", method]))
    of_dino = {} if method in ("unic", "mugs") else DEFAULTS_OF_DINO  # of which all others began
    expected = of_dino | DEFAULTS_OF_THE_ORIGINAL[method]
    assert {name: args[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--arch vit_smal", r"--arch vit_smal: .* did you mean vit_small\?"),
        ("--method dinno", r"--method dinno: .* did you mean dino\?"),
        ("--lrr 1", r"unknown option --lrr; did you mean --lr\?"),
        ("--lr much", "invalid float value: 'much'"),
        ("--patch_size 15", "--patch_size 15 does not divide 224"),
        ("--arch swin_tiny --patch_size 16", "--patch_size 16: Swin's patches are 4 pixels; pass --patch_size 4"),
        ("--patch_size 0", "--patch_size 0: must be at least 1"),
        ("--arch swin_tiny --patch_size 4 --local_crops_size 94", "does not divide --local_crops_size 94; nearest 92"),
        ("--arch swin_tiny --patch_size 4 --window_size 0", "--window_size 0: must be at least 1"),
        ("--patch_size 16 --local_crops_size 40", "does not divide --local_crops_size 40; nearest 32 or 48"),
        ("--local_crops_size 8", "--local_crops_size 8 is smaller than one patch of 16"),
        ("--out_dim 0", "--out_dim 0: a head needs"),
        ("--arch vil_2262 --vil_mode 1", "--vil_mode 1: dino draws no neighbours"),
        ("--warmup_epochs 101", "--warmup_epochs 101 is longer than --epochs 100"),
        ("--warmup_teacher_temp_epochs 101", "--warmup_teacher_temp_epochs 101 is longer"),
        ("--warmup_teacher_temp_epochs -1", "--warmup_teacher_temp_epochs -1: must not be negative"),
        ("--momentum_teacher 1.1", "--momentum_teacher 1.1: from 0"),
        ("--method udi --freeze_last_layer -1", "--freeze_last_layer -1: must not be negative"),
        ("--batch_size_per_gpu 63 --accum_iter 2", "must divide; nearest 62 or 64"),
        ("--batch_size_per_gpu 0", "--batch_size_per_gpu 0: must be at least 1"),
        ("--knn_per_class 0", "--knn_per_class 0: must be at least 1"),
        ("--knn_per_class -2", r"--knn_per_class -2: must be at least 1 \(-1: all\)"),
        ("--nb_knn 10 0", "--nb_knn 0: a vote needs"),
        ("--knn_temperature 0", "--knn_temperature 0.0: must be positive"),
        ("--n_last_blocks 0", "--n_last_blocks 0: must be at least 1"),
        ("--max_bad_images 2", "--max_bad_images 2.0: a share of the images, from 0 to 1"),
        ("--local_crops_number -1", "--local_crops_number -1: must be 0"),
        ("--global_crops_scale 0.9 0.4", "--global_crops_scale 0.9 0.4"),
        ("--method ibot --pred_ratio 1", r"--pred_ratio 1 .*: 1 \+- 0 leaves \[0, 1\)"),
        ("--method ibot --pred_ratio -0.1", r"-0.1 \+- 0 leaves"),
        ("--method ibot --pred_ratio 0 0.3 --pred_ratio_var 0 0.4", r"0.3 \+- 0.4 leaves"),
        ("--method ibot --pred_ratio 0.9 --pred_ratio_var 0.1", r"0.9 \+- 0.1 leaves"),
        ("--method ibot --pred_ratio 0 0.3 0.5 --pred_ratio_var 0 0.2", "--pred_ratio_var 0 0.2: needs one value, or"),
        ("--method ibot --pred_shape attmask_high", "argument --pred_shape: invalid choice: 'attmask_high'"),
        ("--method attmask --pred_shape hint", "argument --pred_shape: invalid choice: 'hint'"),
        ("--method ibot --pred_start_epoch -1", "--pred_start_epoch -1: must not be negative"),
        ("--method ibot --pred_start_epoch 71", "together longer than --epochs 100"),
        (
            "--method ibot --arch swin_tiny --patch_size 4 --shared_head true --global_crops_size 200",
            "a mask of swin_tiny has cells of 32 pixels; nearest 192 or 224",
        ),
        (
            "--method ibot --arch swin_tiny --patch_size 4 --shared_head true --local_crops_number 2 "
            "--local_crops_size 28",
            "--local_crops_size 28: smaller than a mask's cell, 32 pixels for swin_tiny",
        ),
        ("--method ibot --arch resnet50 --shared_head true", "--arch resnet50: ibot predicts patches"),
        ("--method ibot --global_crops_number 1", "--global_crops_number 1 --local_crops_number 0: a student learns"),
        ("--method ibot --shared_head true --shared_head_teacher false", "would never follow the student"),
        ("--method ibot --patch_out_dim 4096", "--out_dim 8192 --patch_out_dim 4096: have to be equal"),
        ("--method ibot --teacher_patch_temp 0", "--teacher_patch_temp 0.0: a temperature must be positive"),
        ("--method attmask --arch swin_tiny --patch_size 4", "follow the attention of a class token, which swin_tiny"),
        ("--method attmask --arch resnet50", "follow the attention of a class token, which resnet50 has not"),
        ("--method attmask --use_masked_im_modeling false", "the student would not see the masks"),
        ("--method attmask --masking_prob 1.5", "--masking_prob 1.5: a probability"),
        ("--method udi --global_sampling_window_size 15", "crops of 224 pixels have 14 patches a side"),
        ("--method udi --local_sampling_window_size 7", "crops of 96 pixels have 6 patches a side"),
        ("--method udi --include_patch false", "pass --number_cls_token 1 as well"),
        ("--method udi --number_cls_token 3", "--number_cls_token 3: there are one"),
        ("--method udi --alpha 1.5", "--alpha 1.5: a weight"),
        ("--method udi --arch resnet50", "--arch resnet50: udi needs class tokens"),
        ("--method udi --local_crops_size 90", "does not divide --local_crops_size 90; nearest 80 or 96"),
        ("--method attmask --pred_shape attmask_hint --show_max 0.5", r"at most the largest mask ratio \(0.3\)"),
        ("--method attmask --pred_shape attmask_hint --show_max -0.1", "--show_max -0.1: hints are shown"),
        ("--method mugs --loss_weights 0 0 0", "--loss_weights 0 0 0: nothing would be learnt"),
        ("--method mugs --loss_weights 1 -1 1", "--loss_weights 1 -1 1: must not be negative"),
        ("--method mugs --loss_weights 1 nan 1", "--loss_weights 1 nan 1: must not be negative"),
        ("--method mugs --loss_weights 1 1", "--loss_weights: expected 3 arguments"),
        (
            "--method mugs --local_group_queue_size 64 --local_group_knn_top_n 65",
            "--local_group_knn_top_n 65: the memory",
        ),
        ("--method mugs --local_group_knn_top_n 0", "--local_group_knn_top_n 0: must be at least 1"),
        ("--method mugs --instance_queue_size 63", "--instance_queue_size 63: a step writes 64 images"),
        ("--method mugs --local_group_queue_size 63", "--local_group_queue_size 63: a step writes 64 images"),
        ("--method mugs --size_crops 224", "--size_crops 224 --global_crops_size 224: they have to differ"),
        ("--method mugs --timm_auto_augment_par augmix-m5", "augmix-m5: a policy starts with rand"),
        ("--method mugs --timm_auto_augment_par rand-m9-q3", "rand-m9-q3: no part 'q3' is known"),
        ("--method mugs --prob 1.5", "--prob 1.5: a probability, from 0 to 1"),
        ("--method mugs --re_prob -0.1", "--re_prob -0.1: a probability, from 0 to 1"),
        ("--method mugs --warmup_epochs 101", "--warmup_epochs 101 is longer than --epochs 100"),
        (
            "--method mugs --group_warmup_teacher_temp_epochs 101",
            "--group_warmup_teacher_temp_epochs 101 is longer than --epochs 100",
        ),
        ("--method mugs --instance_temp 0", "--instance_temp 0.0: a temperature must be positive"),
        ("--method mugs --group_out_dim 0", "--group_out_dim 0: must be at least 1"),
        ("--method mugs --group_bottleneck_dim 0.5", "invalid int value: '0.5'"),
        ("--method mugs --patch_embed_lr_mult -1", "--patch_embed_lr_mult -1.0: must not be negative"),
        ("--method mugs --arch swin_tiny", "--arch swin_tiny: mugs reads class tokens and patches; pass a vit_"),
        ("--method mugs --norm_before_pred maybe", "'maybe' is neither true nor false"),
        ("--drop_path_rate 1", "--drop_path_rate 1.0: must be in"),
        ("--teacher_temp 0", "--teacher_temp 0.0: a temperature must be positive"),
        ("--subset 0", "--subset 0"),
        ("--subset -2", r"--subset -2: .*at least 1 \(-1: all\)"),
        ("--use_fp16 true", "fp16 training needs a GPU"),
        ("--precision fp16", "fp16 training needs a GPU"),
        ("--use_fp16 false --precision bf16", "--use_fp16 False contradicts --precision bf16"),
        ("--use_fp16 maybe", "'maybe' is neither true nor false"),
        ("--max_image_pixels 0", "--max_image_pixels: 0: a number of pixels, at least 1"),
        ("--exif sideways", "--exif: 'sideways' is neither true nor false"),
        ("--load_from nowhere.pth", r"--load_from nowhere.pth: no such file in --output_dir \."),
        ("--backend mpi", "--backend: invalid choice: 'mpi'"),
        ("--config nowhere.yaml", "--config nowhere.yaml: No such file"),
        ("--output_dir /dev/null/out", "--output_dir /dev/null/out: /dev/null is a file"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(argv, message):
    with pytest.raises(UsageError, match=message) as caught:
        check_options(parse_options(argv.split()), ALONE)
    assert "\n" not in str(caught.value)


def test_no_local_crops_is_a_valid_choice():
    check_options(parse_options(["--local_crops_number", "0", "--local_crops_size", "1"]), ALONE)
    check_options(parse_options(["--method", "mugs", "--local_crops_number", "0", "--size_crops", "224"]), ALONE)


def test_a_loss_of_no_weight_needs_no_queue():
    argv = ["--method", "mugs", "--loss_weights", "0", "1", "0", "--instance_queue_size", "1"]
    check_options(parse_options(argv), ALONE)


def test_what_changes_no_number_may_change_when_a_run_is_continued():
    one = parse_options(["--num_workers", "1", "--batch_size_per_gpu", "8", "--output_dir", "a"])
    two = parse_options(["--num_workers", "2", "--batch_size_per_gpu", "4", "--output_dir", "b", "--accum_iter", "2"])
    assert trajectory_options(one) == trajectory_options(two)
    assert trajectory_options(one) != trajectory_options(parse_options(["--lr", "1"]))


@pytest.mark.parametrize("argv", ["--exif true", "--max_image_pixels 1000"])
def test_what_decides_which_pixels_are_seen_is_of_the_run(argv):
    assert trajectory_options(parse_options([])) != trajectory_options(parse_options(argv.split()))


def test_options_have_the_names_of_several_originals(tmp_path):
    args = parse_options(["--eval_every", "20", "--nb_knn", "10", "20", "100", "200", "--drop_path", "0.2"])
    assert (args.knn_every, args.nb_knn, args.drop_path_rate) == (20, [10, 20, 100, 200], 0.2)
    args = parse_options(["--data_dir", "images", "--wd", "0.03", "--saveckpt_freq", "5"])
    assert (args.data_path, args.weight_decay, args.saveckp_freq) == ("images", 0.03, 5)
    said = get_args_parser(METHODS["dino"]).format_help()
    assert all(f" {spelling} " in said for spelling in ("--data_dir", "--wd", "--saveckpt_freq"))
    preset = tmp_path / "alias.yaml"
    preset.write_text("wd: 0.03\n")
    with pytest.raises(UsageError, match="line 1: unknown option 'wd'"):  # presets keep to one name
        parse_options(["--config", str(preset)])


def test_options_that_are_named_are_found_under_every_spelling():
    names = ("data_path", "precision")
    for argv in (["--data_path", "a"], ["--data_dir", "a"], ["--data_dir=a", "--lr", "1"]):
        assert options_named(parse_options(argv), names, argv) == {"data_path": "a"}
    argv = ["--data_dir", "a", "--precision", "fp64"]
    assert options_named(parse_options(argv), names, argv) == {"data_path": "a", "precision": "fp64"}
    assert options_named(parse_options([]), names, []) == {}


@pytest.mark.parametrize(
    ("argv", "patch_size"),
    [("", 16), ("--arch deit_tiny", 16), ("--arch swin_tiny", 4), ("--arch resnet50", None), ("--patch_size 8", 8)],
)
def test_patches_left_out_are_those_of_the_architecture(argv, patch_size):
    args = parse_options(argv.split())
    assert args.patch_size == patch_size  # and so in the checkpoint
    check_options(args, ALONE)


def test_swins_train_without_a_word_about_their_patches():
    for method in ("dino", "ibot"):
        argv = ["--method", method, "--arch", "swin_tiny", *(["--shared_head", "true"] if method == "ibot" else [])]
        short, long = parse_options(argv), parse_options([*argv, "--patch_size", "4"])
        assert trajectory_options(short) == trajectory_options(long)
        check_options(short, ALONE)


def recorded_of(*argv):
    """The options as a checkpoint has them."""
    args = vars(parse_options(list(argv)))
    return {name: list(value) if isinstance(value, tuple) else value for name, value in args.items()}


def test_a_run_recorded_with_an_option_that_its_network_does_not_read_continues():
    for arch, unread in (("resnet50", {"patch_size": 16, "window_size": 7}), ("vit_small", {"window_size": 7})):
        recorded = recorded_of("--arch", arch) | unread
        assert _differing_options(parse_options(["--arch", arch, "--window_size", "14"]), recorded) == []
    recorded = recorded_of() | {"patch_size": 16}
    assert _differing_options(parse_options([]), recorded) == []
    eight = parse_options(["--patch_size", "8"])
    assert _differing_options(eight, recorded) == ["--patch_size: 16 there, 8 here"]
    recorded = recorded_of("--arch", "swin_tiny")
    del recorded["window_size"]  # written before there was this option
    wide = parse_options(["--arch", "swin_tiny", "--window_size", "14"])
    assert _differing_options(wide, recorded) == ["--window_size: 7 there, 14 here"]


def test_weight_decay_stays_what_it_is_where_a_method_has_no_other_end(monkeypatch):
    class Constant(DINO):
        @staticmethod
        def add_arguments(parser):
            DINO.add_arguments(parser)
            parser.set_defaults(weight_decay=0.03, weight_decay_end=None)

    monkeypatch.setitem(METHODS, "dino", Constant)
    assert "the first one stays (default" not in " ".join(get_args_parser(Constant).format_help().split())
    for argv, ends in (("", (0.03, 0.03)), ("--wd 0.2", (0.2, 0.2)), ("--weight_decay_end 0.1", (0.03, 0.1))):
        args = parse_options(argv.split())
        assert (args.weight_decay, args.weight_decay_end) == ends
        check_options(args, ALONE)
    values = cosine_scheduler(args.weight_decay, args.weight_decay, 3, 7)
    assert (values == args.weight_decay).all()


def test_a_method_may_set_other_defaults_of_shared_options():
    class Other(METHODS["dino"]):
        @staticmethod
        def add_arguments(parser):
            METHODS["dino"].add_arguments(parser)
            parser.set_defaults(knn_per_class=-1, knn_temperature=None, clip_grad=0.3)

    parser = get_args_parser(Other)
    args = parser.parse_args([])
    assert (args.knn_per_class, args.knn_temperature, args.clip_grad) == (-1, None, 0.3)
    assert parser.parse_args(["--clip_grad", "1"]).clip_grad == 1
    check_options(args, ALONE)


def test_all_images_may_be_written_in_two_ways():
    one, two = parse_options([]), parse_options(["--subset", "-1"])
    for args in (one, two):
        check_options(args, ALONE)
    assert trajectory_options(one) == trajectory_options(two)
