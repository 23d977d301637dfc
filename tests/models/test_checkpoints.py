"""Every published layout is recognised and loads whole; whatever is not right is refused in words."""

import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn as nn
from safetensors.torch import save_file
from timm.layers import SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer

from models import SWIN, build_backbone, swin, vit
from models.blocks import SwiGLU
from models.checkpoints import main, network_from_file, weights_hash
from models.layouts.names import to_timm
from models.layouts.shapes import NAME_OF_SHAPE, SWIN_OF_SHAPE, describe, nearest_layout, swin_arguments, vit_arguments
from models.layouts.table import recorded_arguments, recorded_image_size
from models.matching import load_backbone, load_tensors
from models.reading import read_backbone
from models.safe_load import CheckpointError, load_file
from models.vit import Variant, VisionTransformer
from utils import UsageError, run_cli

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"


def tiny(**kwargs) -> VisionTransformer:
    model = VisionTransformer(**{"embed_dim": 12, "depth": 2, "num_heads": 3, "patch_size": 8, "img_size": 32} | kwargs)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.eval()


def saved(tmp_path: Path, content, name: str = "file.pth") -> Path:
    torch.save(content, tmp_path / name)
    return tmp_path / name


# ---- golden files: made by the authors' code ------------------------------------------------------------------------

IBOT_LIKE, TRAINING = "backbone under state_dict (iBOT, AttMask)", "{} training checkpoint"
COMBINED = "backbone with a linear classifier (combined by iBOT or AttMask)"
FILES = [  # file, layout, method, epoch, (width, depth, patch, image, class tokens), the key it stands under
    ("dino/checkpoint_full.pth", TRAINING.format("DINO"), "dino", 1, (12, 2, 8, 32, 1), "teacher"),
    ("dino/checkpoint_plain.pth", TRAINING.format("DINO"), "dino", 1, (12, 2, 8, 32, 1), "teacher"),
    ("dino/backbone_only.pth", "backbone only", None, None, (12, 2, 8, 32, 1), None),
    ("ibot/checkpoint_full.pth", TRAINING.format("iBOT"), "ibot", 1, (12, 2, 8, 32, 1), "teacher"),
    ("ibot/checkpoint_plain.pth", TRAINING.format("iBOT"), "ibot", 1, (12, 2, 8, 32, 1), "teacher"),
    ("ibot/checkpoint_teacher.pth", IBOT_LIKE, None, None, (12, 2, 8, 32, 1), "state_dict"),
    ("ibot/checkpoint_student.pth", "iBOT backbone", "ibot", None, (12, 2, 8, 32, 1), "state_dict"),
    ("attmask/checkpoint_namespace.pth", TRAINING.format("AttMask"), "attmask", 2, (12, 4, 4, 32, 1), "teacher"),
    ("attmask/checkpoint_plain.pth", TRAINING.format("AttMask"), "attmask", 2, (12, 4, 4, 32, 1), "teacher"),
    ("attmask/backbone_only.pth", IBOT_LIKE, None, None, (12, 4, 4, 32, 1), "state_dict"),
    ("attmask/combined.pth", COMBINED, None, 3, (12, 4, 4, 32, 1), "state_dict"),
    ("attmask/checkpoint_teacher_linear.pth", "linear classifier", None, 3, None, "state_dict"),
    ("attmask/linear_for_combine.pth", "linear classifier", None, 3, None, "state_dict"),
    ("esvit/checkpoint_full_namespace.pth", TRAINING.format("EsViT"), "esvit", 2, None, "teacher"),
    ("esvit/checkpoint_plain.pth", TRAINING.format("EsViT"), "esvit", 2, None, "teacher"),
    ("mugs/checkpoint_namespace.pth", TRAINING.format("Mugs"), "mugs", 1, (12, 3, 4, 16, 1), "teacher"),
    ("mugs/checkpoint_plain.pth", TRAINING.format("Mugs"), "mugs", 1, (12, 3, 4, 16, 1), "teacher"),
    ("mugs/backbone_only_finetune.pth", "Mugs backbone", "mugs", None, (12, 3, 4, 16, 1), None),
    ("mugs/backbone_only_det_seg.pth", "Mugs backbone", "mugs", None, (12, 3, 4, 16, 1), "state_dict"),
    ("udi/checkpoint_full.pth", TRAINING.format("UDI"), "udi", 2, (24, 2, 4, 32, 2), "teacher"),
    ("udi/checkpoint_plain.pth", TRAINING.format("UDI"), "udi", 2, (24, 2, 4, 32, 2), "teacher"),
    ("udi/backbone_only.pth", "UDI backbone", "udi", None, (24, 2, 4, 32, 2), None),
    ("unic/checkpoint_namespace.pth", TRAINING.format("UNIC"), "unic", 3, (18, 2, 8, 32, 1), "model"),
    ("unic/checkpoint_plain.pth", TRAINING.format("UNIC"), "unic", 3, (18, 2, 8, 32, 1), "model"),
    ("unic/teacher_dino.pth", "backbone only", None, None, (24, 2, 8, 32, 1), None),
    ("unic/teacher_ibot.pth", IBOT_LIKE, None, None, (20, 3, 8, 32, 1), "state_dict"),
    ("unic/teacher_deit3.pth", "DeiT", "deit", None, (30, 2, 8, 32, 1), "model"),
    ("unic/teacher_dbotft.pth", "fine-tuned MAE", "mae", None, None, "model"),
    ("unic/teacher_openclip_visual.pth", "CLIP", "clip", None, None, None),
]


def test_every_golden_file_is_in_the_table():
    assert {str(path.relative_to(GOLDEN)) for path in GOLDEN.glob("*/*.pth")} == {name for name, *_ in FILES}


@pytest.mark.parametrize(("name", "layout", "method", "epoch", "sizes", "key"), FILES, ids=[row[0] for row in FILES])
def test_a_golden_file_is_recognised_and_loads_whole(name, layout, method, epoch, sizes, key):
    state, info = read_backbone(GOLDEN / name)
    assert (info.layout.name, info.method, info.epoch, info.key) == (layout, method, epoch, key)
    if sizes is None:
        return
    width, depth, patch, image, classes = sizes
    model = VisionTransformer(
        embed_dim=width,
        depth=depth,
        patch_size=patch,
        img_size=image,
        num_class_tokens=classes,
        num_heads=2,
        init_values=1e-5 if "deit3" in name else 0.0,
    )
    report = load_backbone(model, GOLDEN / name)
    assert report.complete and len(report.matched) == report.total == len(model.state_dict())
    assert all(torch.equal(model.state_dict()[tensor], state[tensor]) for tensor in report.matched)
    shape = vit_arguments(state)
    found = [shape[key] for key in ("embed_dim", "depth", "patch_size", "img_size", "num_class_tokens")]
    assert found == list(sizes)


def test_the_student_is_another_network_than_the_teacher_and_its_mask_token_is_left_aside():
    student, teacher = tiny(), tiny()
    report = load_backbone(student, GOLDEN / "ibot" / "checkpoint_full.pth", "student")
    load_backbone(teacher, GOLDEN / "ibot" / "checkpoint_full.pth", "teacher")
    assert "masked_embed" in report.ignored
    assert not torch.equal(student.blocks[0].mlp.fc1.weight, teacher.blocks[0].mlp.fc1.weight)
    load_backbone(masking := tiny(masked_im_modeling=True), GOLDEN / "ibot" / "checkpoint_full.pth", "student")
    assert torch.equal(
        masking.masked_embed, load_file(GOLDEN / "ibot/checkpoint_student.pth")["state_dict"]["masked_embed"]
    )


def test_training_arguments_are_read_from_a_namespace_and_from_a_dict():
    for name in ("checkpoint_full.pth", "checkpoint_plain.pth"):
        arguments = recorded_arguments(load_file(GOLDEN / "dino" / name))
        assert (arguments["arch"], arguments["patch_size"], arguments["local_crops_number"]) == ("vit_small", 8, 8)
    assert recorded_arguments(load_file(GOLDEN / "dino" / "backbone_only.pth")) == {}
    assert (
        len(recorded_arguments(load_file(GOLDEN / "unic" / "checkpoint_namespace.pth"))["lr_schedule"]) > 1
    )  # a NumPy array


# ---- layouts without a golden file ----------------------------------------------------------------------------------


def dinov2_names(state: dict, chunk: int) -> dict:
    """Under DINOv2's names, blocks in chunks of ``chunk``."""
    names = {"masked_embed": "mask_token"}
    renamed = {}
    for name, tensor in state.items():
        name = names.get(name, name).replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma")
        if name.startswith("blocks."):
            number = int(name.split(".")[1])
            name = f"blocks.{number // chunk}.{name.removeprefix('blocks.')}"
        renamed[name] = tensor
    return renamed


@pytest.mark.parametrize("chunk", [1, 2])
def test_dinov2_with_chunks_registers_layerscale_and_mask_token_loads(tmp_path, chunk):
    model = tiny(num_registers=4, init_values=1.0, masked_im_modeling=True, depth=3)
    path = saved(tmp_path, dinov2_names(model.state_dict(), chunk))
    other = tiny(num_registers=4, init_values=1.0, depth=3)
    report = load_backbone(other, path)
    images = torch.randn(2, 3, 32, 32)
    assert report.info.layout.name == "DINOv2" and report.ignored == ["masked_embed"]
    assert torch.equal(model(images), other(images))


def test_the_encoder_of_unic_alone_loads(tmp_path):
    model = tiny()
    state = {f"encoder.{name}": tensor for name, tensor in dinov2_names(model.state_dict(), chunk=9).items()}
    report = load_backbone(tiny(), saved(tmp_path, state))
    assert report.info.method == "unic" and report.complete


def test_stages_of_a_library_are_no_chunks_of_a_vision_transformer(tmp_path):
    model = build_backbone("timm/mobilenetv3_small_050").eval()
    report = load_backbone(build_backbone("timm/mobilenetv3_small_050"), saved(tmp_path, model.state_dict()))
    assert report.complete and report.info.method != "unic"
    file = {"teacher": model.state_dict(), "tutelage": {"arch": "timm/mobilenetv3_small_050"}}
    assert load_backbone(build_backbone("timm/mobilenetv3_small_050"), saved(tmp_path, file)).complete


def test_mae_with_and_without_decoder_and_deit_with_classifier_load(tmp_path):
    state = tiny().state_dict()
    decoder = {"mask_token": torch.zeros(1, 1, 8), "decoder_pos_embed": torch.zeros(1, 17, 8)}
    decoder |= {"decoder_blocks.0.norm1.weight": torch.ones(8), "decoder_pred.bias": torch.zeros(3)}
    classifier = {"head.weight": torch.zeros(5, 12), "head.bias": torch.zeros(5)}
    for extra, layout, ignored in (
        ({}, "MAE", 0),
        (decoder, "MAE with decoder", 4),
        (classifier, "DeiT", 2),
    ):
        report = load_backbone(tiny(), saved(tmp_path, {"model": state | extra}))
        assert (report.info.layout.name, len(report.ignored), report.complete) == (layout, ignored, True)


def test_timm_files_with_registers_and_without_a_class_position_give_the_same_features(tmp_path):
    theirs = timm_vit(reg_tokens=4, no_embed_class=True, init_values=1e-1).eval()
    path = saved(tmp_path, theirs.state_dict() | {"head.weight": torch.zeros(5, 12)})
    ours = tiny(num_registers=4, init_values=1.0)
    assert load_backbone(ours, path).info.layout.name == "timm"
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(images), theirs(images))


def test_a_file_of_ours_is_recognised_and_says_its_method_and_architecture(tmp_path):
    model = tiny()
    file = {
        "student": {f"module.backbone.{name}": tensor for name, tensor in model.state_dict().items()},
        "teacher": {f"backbone.{name}": tensor for name, tensor in model.state_dict().items()}
        | {"head.mlp.0.weight": torch.zeros(3, 12), "head.last_layer.weight_g": torch.ones(4, 1)},
        "optimizer": {"state": {}, "param_groups": []},
        "epoch": 3,
        "args": {"arch": "vit_tiny", "global_crops_size": 64},
        "dino_loss": {"center": torch.zeros(1, 4)},
        "tutelage": {"format": 1, "method": "dino", "arch": "vit_micro", "image_size": 48, "iteration": 30},
    }
    report = load_backbone(tiny(), saved(tmp_path, file))
    info = report.info
    assert (info.layout.name, info.method, info.epoch) == ("Tutelage training checkpoint", "dino", 3)
    assert info.arguments == {"arch": "vit_micro", "global_crops_size": 64, "image_size": 48}
    assert report.ignored == ["head.mlp.0.weight", "head.last_layer.weight_g"]


@pytest.mark.parametrize("chunk", [1, 2])
def test_a_file_of_ours_with_blocks_in_chunks_gives_the_same_features(tmp_path, chunk):
    model = tiny(init_values=1.0, masked_im_modeling=True)
    state = {f"module.encoder.{name}": t for name, t in dinov2_names(model.state_dict(), chunk).items()}
    state["module.lp.dino.cls.0.weight"] = torch.zeros(3, 12)
    file = {"model": state, "epoch": 2, "args": {}, "tutelage": {"format": 1, "method": "unic", "iteration": 30}}
    report = load_backbone(other := tiny(init_values=1.0), saved(tmp_path, file))
    assert (report.info.layout.name, report.info.method) == ("Tutelage training checkpoint", "unic")
    assert report.ignored == ["masked_embed", "lp.dino.cls.0.weight"]
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(other(images), model(images))


def test_a_residual_network_wrapped_for_batch_norm_loads_and_its_counters_are_not_needed(tmp_path):
    model = build_backbone("resnet18")
    state = {f"module.backbone.{n}": t for n, t in model.state_dict().items() if "num_batches" not in n}
    path = saved(tmp_path, {"teacher": state, "dino_loss": {}, "args": {"arch": "resnet18"}})
    network = network_from_file(path)
    assert (network.arch, network.label, network.report.complete) == ("resnet18", "resnet18", True)
    assert torch.equal(network.model.conv1.weight, model.conv1.weight)


# ---- refusals -------------------------------------------------------------------------------------------------------


def refusal(function, *args) -> str:
    with pytest.raises(CheckpointError) as caught:
        function(*args)
    assert isinstance(caught.value, UsageError)
    return str(caught.value)


def test_a_network_is_left_alone_when_the_file_does_not_fit(tmp_path):
    model = tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    refusal(load_backbone, model, saved(tmp_path, tiny(depth=3).state_dict()))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_refusal_says_what_the_file_holds_and_what_to_pass(tmp_path):
    micro = build_backbone("vit_micro", 8, img_size=64).state_dict()
    path = saved(tmp_path, micro)
    other_patch = refusal(load_backbone, build_backbone("vit_micro", 16, img_size=128), path)
    assert "matched 53 of 54" in other_patch and "--patch_size 8" in other_patch
    assert "patch_embed.proj.weight: network (128, 3, 16, 16), file (128, 3, 8, 8)" in other_patch
    other_size = refusal(load_backbone, build_backbone("vit_micro", 8), path)
    assert "8 x 8 positions (64 px)" in other_size and "img_size=64" in other_size
    other_arch = refusal(load_backbone, build_backbone("vit_tiny", 8, img_size=64), path)
    assert "matched 0 of" in other_arch and "--arch vit_micro" in other_arch and "more" in other_arch
    assert len(other_arch.splitlines()) < 30
    no_vit = refusal(load_backbone, build_backbone("resnet18"), path)
    assert "vit_micro" in no_vit
    registers = refusal(load_backbone, build_backbone("vit_micro", 8, img_size=64, num_registers=2), path)
    assert "missing     register_tokens" in registers and "num_registers=0" in registers


def test_weights_that_have_no_place_are_a_refusal_too(tmp_path):
    deeper, scaled = tiny(depth=3).state_dict(), tiny(init_values=1.0).state_dict()
    assert "unexpected  blocks.2.norm1.weight" in refusal(load_backbone, tiny(), saved(tmp_path, deeper))
    assert "unexpected  blocks.0.gamma_1" in refusal(load_backbone, tiny(), saved(tmp_path, scaled))


def test_a_networks_own_tensors_are_needed_even_where_others_keep_their_heads(tmp_path):
    model = timm.create_model("test_convnext", num_classes=0)  # its last norm is called head.norm
    state = model.state_dict()
    report = load_backbone(model, saved(tmp_path, {"teacher": state | {"head.mlp.0.weight": torch.zeros(2, 2)}}))
    assert report.total == len(state) and report.ignored == ["head.mlp.0.weight"]
    del state["head.norm.weight"]
    assert "missing     head.norm.weight" in refusal(load_backbone, model, saved(tmp_path, {"teacher": state}))


def test_a_network_that_pools_patches_is_not_mistaken_for_one_with_a_class_token():
    model = tiny(embed_dim=16)
    assert "fc_norm" in refusal(load_backbone, model, GOLDEN / "unic" / "teacher_dbotft.pth")


def test_a_network_that_pools_patches_is_built_as_one(tmp_path):
    model = build_backbone("vit_micro", 8, img_size=32, use_mean_pooling=True).eval()
    torch.nn.init.normal_(model.fc_norm.weight)
    path = saved(tmp_path, {"model": model.state_dict() | {"head.weight": torch.zeros(5, 128)}})
    network = network_from_file(path)
    images = torch.randn(2, 3, 32, 32)
    assert network.report.complete and network.report.ignored == ["head.weight"]
    assert torch.equal(network.model.eval()(images), model(images))
    assert "norm.weight" in refusal(
        load_backbone, model, saved(tmp_path, build_backbone("vit_micro", 8, img_size=32).state_dict())
    )


def test_no_part_of_a_linear_classifier_is_taken_for_a_backbone():
    text = refusal(load_backbone, tiny(), GOLDEN / "attmask" / "checkpoint_teacher_linear.pth")
    assert "matched 0 of 30" in text and "linear classifier" in text


# ---- the network a file was written with ----------------------------------------------------------------------------


def test_names_of_architectures_agree_with_the_models():
    for (width, depth), name in NAME_OF_SHAPE.items():
        made = getattr(vit, name)(network=dict)
        assert (made["embed_dim"], made["depth"]) == (width, depth)


def test_names_of_swins_agree_with_the_models():
    for (width, depths), name in SWIN_OF_SHAPE.items():
        made = getattr(swin, name)(network=dict)
        assert (made["embed_dim"], made["depths"]) == (width, depths)
    assert list(SWIN_OF_SHAPE.values()) == list(SWIN.networks)


@pytest.mark.parametrize("name", ["checkpoint_full_namespace.pth", "checkpoint_plain.pth"])
@pytest.mark.parametrize("key", ["teacher", "student"])
def test_a_swin_of_esvit_loads_whole_and_shows_its_sizes(name, key):
    state, info = read_backbone(GOLDEN / "esvit" / name, key)
    shape = swin_arguments(state)
    assert shape == {
        "embed_dim": 4,
        "depths": (1, 2, 1, 1),
        "num_heads": (1, 2, 2, 2),
        "patch_size": 2,
        "mlp_ratio": 2.0,
        "window_size": 4,
    }
    report = load_tensors(model := swin.SwinTransformer(**shape, img_size=48), state, info)
    assert report.complete and {name.split(".")[0] for name in report.ignored} == {"head", "head_dense"}
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_swin_is_built_with_the_window_of_its_file(tmp_path):
    model = build_backbone("swin_tiny", window_size=14, masked_im_modeling=True)
    path = saved(tmp_path, {"state_dict": model.state_dict()})
    network = network_from_file(path)
    assert (network.label, network.arguments) == ("swin_tiny/4", {"patch_size": 4, "window_size": 14})
    assert str(network.report) == "matched 183 of 183 tensors; ignored masked_embed"
    assert torch.equal(network.model.norm.weight, model.norm.weight)
    assert describe(read_backbone(path)[0]) == "swin_tiny (width 96, 2+2+6+2 blocks), patch 4, window 14"
    assert refusal(network_from_file, path, "teacher", None, None, 7).count("pass --window_size 14") == 1
    assert "pass --arch swin_tiny" in refusal(network_from_file, path, "teacher", "vit_micro")
    with pytest.raises(UsageError, match="--patch_size 8: Swin's patches are 4 pixels"):
        network_from_file(path, patch_size=8)


def test_a_supervised_swin_with_classifier_and_stored_masks_loads(tmp_path):
    sizes = {"img_size": 32, "embed_dim": 8, "depths": (2, 1), "num_heads": (1, 2), "window_size": 4}
    state = swin.SwinTransformer(**sizes).state_dict()
    extra = {"head.weight": torch.zeros(5, 16), "layers.0.blocks.1.attn_mask": torch.zeros(4, 16, 16)}
    report = load_backbone(swin.SwinTransformer(**sizes), saved(tmp_path, {"model": state | extra}))
    assert report.info.layout.name == "supervised Swin" and sorted(report.ignored) == sorted(extra)


def test_the_network_is_built_as_the_file_needs_it(tmp_path):
    model = build_backbone("vit_micro", 8, img_size=64, num_class_tokens=2).eval()
    path = saved(tmp_path, {"teacher": {f"backbone.{n}": t for n, t in model.state_dict().items()}, "udi_loss": {}})
    network = network_from_file(path)
    assert network.label == "vit_micro/8"
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(network.model.eval()(images), model(images))
    assert "--patch_size 8" in refusal(network_from_file, path, "teacher", None, 16)
    assert "--arch vit_micro" in refusal(network_from_file, path, "teacher", "vit_tiny")


def test_a_timm_network_takes_files_under_our_names_and_under_its_own(tmp_path):
    model = build_backbone("vit_tiny").eval()
    images = torch.randn(1, 3, 224, 224)
    for state in (model.state_dict(), to_timm(model.state_dict())):
        network = network_from_file(saved(tmp_path, state), arch="timm/vit_tiny_patch16_224")
        torch.testing.assert_close(network.model.eval()(images), model(images), rtol=1e-4, atol=1e-5)


def test_a_file_that_no_architecture_fits_says_so(tmp_path):
    assert "width 12" in refusal(network_from_file, GOLDEN / "dino" / "backbone_only.pth")
    assert "width 4, 1+2+1+1 blocks" in refusal(network_from_file, GOLDEN / "esvit/checkpoint_plain.pth")
    cvt = {"teacher": {"stage0.0.proj.weight": torch.zeros(1)}, "dino_loss": {}, "args": {"arch": "cvt_huge"}}
    assert "--arch cvt_huge, which is unknown here" in refusal(network_from_file, saved(tmp_path, cvt))
    assert "linear classifier" in refusal(network_from_file, GOLDEN / "attmask" / "checkpoint_teacher_linear.pth")


def test_tensors_of_unknown_names_are_shown_with_the_nearest_layout(tmp_path):
    model = build_backbone("vit_micro", 8, img_size=32).state_dict()
    odd = {name.replace("blocks.", "stack.layer_").replace("cls_token", "class"): t for name, t in model.items()}
    path = saved(tmp_path, {"model": odd})
    for function in (network_from_file, lambda path: load_backbone(tiny(), path)):
        text = refusal(function, path).splitlines()[0]
        assert "network of unknown names, 54 tensors (class, pos_embed, patch_embed.proj.weight, ...)" in text
        assert "nearest is " in text and "DINO" in text and "not cls_token, " in text and "that shape" not in text
    nothing = saved(tmp_path, {"alpha.w": torch.zeros(1), "beta.w": torch.zeros(1)})
    text = refusal(network_from_file, nothing)
    assert (
        "(alpha.w, beta.w); no layout known here has a name in common" in text and "if it is a network of timm" in text
    )


def test_names_that_would_garble_a_terminal_are_refused(tmp_path):
    for name in ("a\nerror: b", "\x1b[2Jcls_token"):
        text = refusal(read_backbone, saved(tmp_path, {name: torch.zeros(1)}))
        assert "\n" not in text and "\x1b" not in text and "could garble a terminal" in text


@pytest.mark.parametrize(
    ("layout", "names"),
    [
        ("DINOv2 and UNIC", [f"trunk.blocks.0.{i}.{part}.weight" for i in (0, 1) for part in ("norm1", "attn.qkv")]),
        ("Swin", ["swin.layers.0.blocks.1.attn.qkv.weight", "swin.patch_embed.norm.bias", "w"]),
        ("Hugging Face's ViT", ["deit.encoder.layer.3.attention.attention.query.weight", "x.layernorm_before.bias"]),
        ("torchvision's ResNet", ["trunk.layer1.0.conv2.weight", "trunk.layer1.0.bn2.weight", "fc.weight"]),
    ],
)
def test_the_nearest_layout_is_found_by_names_wherever_they_stand(layout, names):
    assert f"nearest is {layout}: " in nearest_layout(names)


def test_dinov2_with_swiglu_loads_under_its_own_names_and_timms(tmp_path):
    model = tiny(variant=Variant(mlp="swiglu"), init_values=1.0, num_registers=2)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    images = torch.randn(2, 3, 40, 40)
    for file in (dinov2_names(model.state_dict(), chunk=1), to_timm(model.state_dict())):
        state, _ = read_backbone(saved(tmp_path, file))
        assert "SwiGLU" in describe(state) and vit_arguments(state)["variant"] == Variant(mlp="swiglu")
        other = VisionTransformer(**vit_arguments(state), num_heads=3)
        assert load_backbone(other, saved(tmp_path, file)).complete
        torch.testing.assert_close(other(images), model(images))
    packed = {"mlp_layer": SwiGLUPacked, "act_layer": torch.nn.SiLU, "mlp_ratio": 2 * 32 / 12}
    theirs = timm_vit(reg_tokens=2, no_embed_class=True, init_values=1.0, **packed).eval()
    theirs.load_state_dict(to_timm(model.state_dict()), strict=True)
    torch.testing.assert_close(theirs(images[..., :32, :32]), model(images[..., :32, :32]))
    giant = vit.vit_giant2(network=dict)
    assert (SwiGLU(giant["embed_dim"], 4 * giant["embed_dim"]).w3.in_features, giant["variant"].mlp) == (4096, "swiglu")


def test_another_gate_than_dinov2s_is_refused_by_what_is_missing_here(tmp_path):
    state = tiny().state_dict()
    plain = {name: tensor for name, tensor in state.items() if ".mlp." not in name}
    apart = plain | {f"blocks.{i}.mlp.{part}.weight": torch.zeros(8, 8) for i in (0, 1) for part in ("w1", "w2", "w3")}
    packed = {f"blocks.{i}.mlp.fc1.weight": torch.zeros(64, 12) for i in (0, 1)}  # without LayerScale, not DINOv2's
    packed |= {f"blocks.{i}.mlp.fc2.weight": torch.zeros(12, 32) for i in (0, 1)}
    for file in (apart, state | packed):
        for function in (network_from_file, lambda path: load_backbone(tiny(), path)):
            text = refusal(function, saved(tmp_path, file)).splitlines()[0]
            assert "gated MLP (blocks.0.mlp." in text and "take a network without it" in text and "--arch" not in text


# ---- the command ----------------------------------------------------------------------------------------------------


def timm_vit(**kwargs) -> TimmVisionTransformer:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 3, "num_classes": 0}
    return TimmVisionTransformer(**sizes | kwargs)


@pytest.fixture
def command(monkeypatch, capsys):
    """Run the command in this process: (exit code, standard output, standard error)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["checkpoints", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            run_cli(main)
        return exit_.value.code, *capsys.readouterr()

    return run


def test_the_command_runs_as_a_module():
    arguments = [sys.executable, "-m", "models.checkpoints", "tests/golden/udi/backbone_only.pth"]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "UDI backbone" in done.stdout and "2 class tokens" in done.stdout


def test_the_command_says_what_a_file_is_and_converts_it_for_timm(command, tmp_path):
    source = GOLDEN / "dino" / "checkpoint_full.pth"
    code, said, _ = command(source, "--to", tmp_path / "flat.pth")
    assert code == 0
    for words in ("DINO training checkpoint", "teacher: 38 tensors", "--arch vit_small", "100.0 %", "head.* (8)"):
        assert words in said
    theirs = timm_vit().eval()
    theirs.load_state_dict(torch.load(tmp_path / "flat.pth", weights_only=True), strict=True)
    load_backbone(ours := tiny(), source)
    images = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(theirs(images), ours(images), rtol=1e-5, atol=1e-6)


def test_safetensors_are_described_loaded_and_written(command, tmp_path):
    micro = build_backbone("vit_micro", 8, img_size=32).eval()
    images = torch.randn(2, 3, 32, 32)
    for prefix in ("", "teacher_backbone."):
        state = {f"{prefix}{name}": tensor for name, tensor in micro.state_dict().items()}
        save_file(state, path := tmp_path / f"{prefix}file.safetensors")
        code, said, _ = command(path, "--to", tmp_path / "timm.safetensors")
        assert code == 0 and "vit_micro (width 128, 4 blocks)" in said and "100.0 %" in said
        assert torch.equal(network_from_file(path).model.eval()(images), micro(images))
        theirs = timm_vit(embed_dim=128, depth=4, num_heads=4).eval()
        theirs.load_state_dict(load_file(tmp_path / "timm.safetensors"), strict=True)
        torch.testing.assert_close(theirs(images), micro(images), rtol=1e-5, atol=1e-6)
    path.write_bytes(path.read_bytes()[:-1])
    code, _, error = command(path)
    assert code == 2 and "damaged" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "heads", "timm_arguments", "our_arguments"),
    [
        ("unic/teacher_deit3.pth", 3, {"no_embed_class": True, "init_values": 1.0}, {"init_values": 1.0}),
        ("unic/checkpoint_namespace.pth", 3, {}, {}),
        ("mugs/backbone_only_finetune.pth", 3, {}, {}),
    ],
)
def test_other_layouts_become_timm_files_with_the_same_features(name, heads, timm_arguments, our_arguments):
    state, info = read_backbone(GOLDEN / name)
    shape = vit_arguments(state)
    sizes = {key: shape[key] for key in ("embed_dim", "depth", "patch_size", "img_size")} | {"num_heads": heads}
    theirs = timm_vit(**sizes | timm_arguments).eval()
    flat = {tensor: value for tensor, value in state.items() if info.layout.belongs_to_backbone(tensor)}
    theirs.load_state_dict(to_timm(flat), strict=True)
    load_backbone(ours := tiny(**sizes | our_arguments), GOLDEN / name)
    images = torch.randn(2, 3, shape["img_size"], shape["img_size"])
    torch.testing.assert_close(theirs(images), ours(images), rtol=1e-5, atol=1e-6)


def test_of_two_class_tokens_timm_gets_the_first_with_its_position():
    state = tiny(num_class_tokens=2).state_dict()
    flat = to_timm(state)
    assert torch.equal(flat["cls_token"], state["cls_token"][:, :1])
    assert torch.equal(flat["pos_embed"], state["pos_embed"][:, [0, *range(2, 18)]])


def test_the_command_refuses_in_one_line_and_reports_a_mismatch_by_its_exit_code(command, tmp_path):
    code, _, error = command(tmp_path / "no.pth")
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1
    micro = saved(tmp_path, build_backbone("vit_micro", 8, img_size=64).state_dict())
    code, said, _ = command(micro, "--arch", "vit_micro", "--patch_size", 16)
    assert code == 1 and "98.1 %" in said and "--patch_size 8" in said
    assert command(micro)[0] == 0
    code, _, error = command(micro, "--to", micro)
    assert code == 2 and "choose another name" in error
    assert command(micro, "--to", tmp_path / "no" / "file.pth")[0] == 2


def test_a_converted_file_loads_into_the_timm_model_of_its_name(tmp_path):
    model = build_backbone("vit_tiny").eval()
    path = saved(tmp_path, to_timm(model.state_dict()))
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=0, checkpoint_path=str(path)).eval()
    images = torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(theirs(images), model(images), rtol=1e-4, atol=1e-5)


def test_one_changed_weight_changes_the_hash():
    model = build_backbone("vit_micro", patch_size=16)
    before = weights_hash(model)
    assert weights_hash(model) == before
    with torch.no_grad():
        model.blocks[1].mlp.fc2.bias[3] += 1e-6
    assert weights_hash(model) != before


@pytest.mark.parametrize(
    ("arguments", "size"),
    [
        ({"global_crops_size": 64}, 64),
        ({"image_size": 336}, 336),
        ({"image_size": 32, "global_crops_size": 64}, 32),
        ({"global_crops_size": "64"}, None),
        ({}, None),
    ],
)
def test_the_size_of_a_runs_images_is_found_under_the_names_it_may_have(arguments, size):
    assert recorded_image_size(arguments) == size
