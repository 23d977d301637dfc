"""EsViT: pieces, skipped steps, mixed images, names in files, what is drawn, and what is refused."""

import copy

import numpy as np
import pytest
import torch
import torch.nn as nn

from data.deit_views import DeiTCropViews
from data.mixing import build_mixup
from methods.base import Clock
from methods.distillation import cross_view_loss, mixed_view_loss
from methods.esvit import EsViT, RegionNetwork, names_in_files, names_of_ours
from methods.heads import DINOHead
from models.swin import SwinTransformer
from models.vit import VisionTransformer
from tests.twins import random
from training.health import diagnose
from training.options import check_options, parse_options
from utils import UsageError, World

ALONE = World(0, 1, 0, torch.device("cpu"))
K = 12


def swin(rate: float = 0.0) -> nn.Module:
    sizes = {"embed_dim": 4, "depths": (1, 2), "num_heads": (1, 2), "window_size": 3, "mlp_ratio": 2.0}
    return SwinTransformer(img_size=32, drop_path_rate=rate, **sizes)


def vit(rate: float = 0.0) -> nn.Module:
    return VisionTransformer(img_size=32, patch_size=8, embed_dim=8, depth=2, num_heads=2, drop_path_rate=rate)


def esvit(dense: bool = True, backbone=swin, use_bn: bool = False, **options) -> EsViT:
    torch.manual_seed(0)
    networks = []
    for rate in (0.4, 0.0):
        body = backbone(rate)
        sizes = {"hidden_dim": 9, "bottleneck_dim": 6, "use_bn": use_bn, "norm_last_layer": False}
        networks.append(RegionNetwork(body, *(DINOHead(body.embed_dim, K, **sizes) for _ in range(1 + dense))))
    return EsViT(*networks, teacher_temps=np.array([0.05]), **options).double()


def crops(images: int = 4, sizes: tuple[int, ...] = (32, 32, 16, 16)) -> list[torch.Tensor]:
    return [random(images, 3, size, size, seed=v) for v, size in enumerate(sizes)]


def clock(first_sample: int = 0, momentum: float = 0.5) -> Clock:
    return Clock(0, 3, momentum=momentum, first_sample=first_sample, global_batch=4)


@pytest.mark.parametrize("backbone", [swin, vit])
@pytest.mark.parametrize("dense", [True, False])
def test_pieces_give_the_gradient_and_the_centres_of_the_whole_batch(dense, backbone):
    whole, parts, batch = *(esvit(dense, backbone) for _ in range(2)), crops()
    whole({"crops": batch}, clock())["loss"].backward()
    for first in (0, 2):
        piece = [crop[first : first + 2] for crop in batch]
        (parts({"crops": piece}, clock(first))["loss"] / 2).backward()
    for method in (whole, parts):
        method.after_step(clock(), None)
    for (name, one), other in zip(whole.named_parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(other, one, msg=lambda text, name=name: f"{name}: {text}")
        if one.grad is not None:
            torch.testing.assert_close(other.grad, one.grad, msg=lambda text, name=name: f"{name}: {text}")
    torch.testing.assert_close(parts.centres.state_dict(), whole.centres.state_dict())
    assert len(whole.centres.state_dict()) == 1 + dense


@pytest.mark.parametrize("sizes", [(32, 32), (32, 32, 32), (32, 32, 16, 24, 24)])
def test_crops_of_any_number_of_sizes_will_do_and_everything_gets_a_gradient(sizes):
    method = esvit()
    losses = method({"crops": crops(1, sizes)}, clock())
    losses["loss"].backward()
    assert losses["loss"].item() == pytest.approx((losses["view"] + losses["region"]).item() / 2)
    assert all(p.grad is not None for p in method.student.parameters())


def test_a_skipped_step_leaves_both_centres_and_the_teacher():
    method = esvit()
    before = copy.deepcopy(method.state_dict())
    method({"crops": crops()}, clock())["loss"].backward()
    method.after_step(clock(), torch.tensor(0.0))
    assert all(torch.equal(method.state_dict()[name], value) for name, value in before.items() if name[:7] != "student")
    method({"crops": crops()}, clock())
    method.after_step(clock(), torch.tensor(1.0))
    assert (method.centres.center != 0).all() and (method.centres.center_grid != 0).all()


@pytest.mark.parametrize("backbone", [swin, vit])
def test_regions_of_all_crops_are_those_of_every_crop_by_itself(backbone):
    network = backbone().double().eval()
    batch = crops(2, (32, 32, 16))
    with torch.no_grad():
        pooled, tokens = network.forward_regions(batch)
        each = [network.forward_features(crop) for crop in batch]
        together = network.forward_crops(batch)
    prefix = network.num_prefix_tokens
    torch.testing.assert_close(pooled, torch.cat([features[:, 0] for features in each]))
    torch.testing.assert_close(pooled, together)
    torch.testing.assert_close(tokens[0], torch.cat([features[:, prefix:] for features in each[:2]]))
    torch.testing.assert_close(tokens[1], each[2][:, prefix:])


# ---- mixed images ---------------------------------------------------------------------------------------------------


def test_the_loss_of_mixed_images_is_the_double_loop_and_that_of_whole_ones_is_the_view_loss():
    views, batch = 4, 3
    z, weight = random(views * batch, 5), random(K, 5, seed=1)
    probs = random(2, batch, K, seed=2).softmax(dim=-1)
    mixes = random(views, batch, batch, seed=3).softmax(dim=-1)
    logs, expected = torch.log_softmax(z @ weight.t() / 0.1, dim=1).unflatten(0, (views, batch)), 0.0
    for i in range(2):
        for v in set(range(views)) - {i}:
            for j in range(batch):
                for b in range(batch):
                    expected = expected - mixes[v, j, b] * (probs[i, b] @ logs[v, j]) / batch
    expected = expected / (2 * (views - 1))
    torch.testing.assert_close(mixed_view_loss(z, weight, probs, mixes, 0.1), expected)
    whole = torch.eye(batch).double().expand(views, -1, -1)
    torch.testing.assert_close(mixed_view_loss(z, weight, probs, whole, 0.1), cross_view_loss(z, weight, probs, 0.1))


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_the_students_first_crops_are_mixed_by_the_key_and_the_teachers_are_not(mode):
    args = parse_options(["--method", "esvit", "--use_mixup", "true", "--cutmix", "0", "--mixup_mode", mode])
    method = esvit(dense=False, mixup=build_mixup(args, 4), mixed_views=3)
    batch = crops()
    kept = [crop.clone() for crop in batch]
    shown, mixes = method.mixed(batch, clock())
    assert all(torch.equal(one, other) for one, other in zip(batch, kept, strict=True))
    for v in range(4):
        torch.testing.assert_close(
            shown[v], torch.einsum("jb,bchw->jchw", mixes[v].double(), batch[v]), rtol=1e-6, atol=1e-6
        )
    assert torch.equal(mixes[3], torch.eye(4)) and not torch.equal(mixes[0], mixes[1])
    again, _ = method.mixed(batch, clock())
    assert all(torch.equal(one, other) for one, other in zip(shown, again, strict=True))
    losses = method({"crops": batch}, clock())
    assert losses["loss"].isfinite() and method.identity() == {"images mixed with each other": "4"}


def test_crops_as_deit_makes_them_are_a_function_of_the_key_and_normalised():
    from PIL import Image

    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (50, 60, 3), np.uint8))
    views = DeiTCropViews(32, [(2, 16), (1, 24)], erase=1.0)
    one, same, other = (views(image, key)["crops"] for key in ((0, 0, 1), (0, 0, 1), (0, 0, 2)))
    assert [crop.shape[-1] for crop in one] == [32, 32, 16, 16, 24]
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not torch.equal(one[0], one[1]) and not torch.equal(one[0], other[0])
    assert one[0].dtype == torch.float32 and one[0].min() < -0.5


# ---- names, draws, health -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "backbone.backbone."])
def test_names_in_files_are_the_originals_and_lead_back(prefix):
    state = {"backbone.norm.weight": 1, "head.mlp.0.weight": 2, "head_dense.last_layer.weight_g": 3}
    named = names_in_files(state, prefix)
    assert list(named) == [f"{prefix}norm.weight", "head.mlp.0.weight", "head_dense.last_layer.weight_g"]
    assert (
        names_of_ours(named)
        == names_of_ours({f"backbone.{n}" if n[0] == "n" else n: v for n, v in named.items()})
        == state
    )


def test_a_teacher_with_batch_norm_is_wrapped_in_files_as_in_the_originals():
    assert esvit().wrapped == ("student",) and esvit(use_bn=True).wrapped == ("student", "teacher")


def test_the_neighbours_of_vil_are_a_function_of_seed_iteration_and_call_the_same_for_all_pieces():
    method = esvit()
    assert method.neighbours(crops(), clock()) is None
    method.student.backbone.attention_calls = 50
    drawn = method.neighbours(crops(), clock())
    assert drawn.shape == (2, 50) and set(drawn.flatten()) == set(range(1, 9))
    assert np.array_equal(drawn, method.neighbours([crop[:2] for crop in crops()], clock(first_sample=2)))
    others = method.neighbours(crops(), clock(), network=1), method.neighbours(crops(), Clock(0, 4, global_batch=4))
    assert not any(np.array_equal(drawn, other) for other in others)


def test_health_tells_of_regions_and_a_network_that_finds_one_region_everywhere_is_noticed():
    method = esvit()
    method({"crops": crops()}, clock())
    method.after_step(clock(), None)
    values = {name: value.item() for name, value in method.health().items()}
    assert {"region_entropy", "region_centre_norm", "matched_share", "centre_norm"} <= values.keys()
    assert 0 < values["matched_share"] <= 1
    assert values["matched_tokens"] == pytest.approx(values["matched_share"] * 16)
    assert values["region_entropy_over_ln_k"] == pytest.approx(values["region_entropy"] / np.log(K))
    assert "one region" in diagnose({"matched_tokens": 1.2, "matched_share": 0.08})
    assert "uniform regions" in diagnose({"region_entropy_over_ln_k": 0.99})
    assert not diagnose({"matched_tokens": 1.0, "matched_share": 1.0, "region_entropy_over_ln_k": 0.5})


def test_the_first_image_is_drawn_with_its_matches_and_nothing_moves():
    method = esvit(use_bn=True)
    before = copy.deepcopy(method.state_dict())
    pictures = dict(method.pictures({"crops": crops()}, clock()))
    assert list(pictures) == ["first_batch", "matches"] and pictures["matches"].dtype == np.uint8
    assert all(torch.equal(method.state_dict()[name], value) for name, value in before.items())
    assert method.training and [*dict(esvit(dense=False).pictures({"crops": crops()}, clock()))] == ["first_batch"]


# ---- options --------------------------------------------------------------------------------------------------------


def test_stochastic_depth_left_out_is_the_architectures_own():
    rates = {"swin_tiny": 0.1, "swin_small": 0.2, "swin_base": 0.2, "deit_small": 0.1}
    for arch, rate in rates.items():
        assert parse_options(["--method", "esvit", "--arch", arch]).drop_path_rate == rate
    assert parse_options(["--method", "esvit", "--arch", "swin_base", "--drop_path_rate", "0"]).drop_path_rate == 0


REFUSED = {
    "--aug-opt mocov2_aug": "--aug-opt mocov2_aug: the original names it in a help text",
    "--aug-opt dino": "--aug-opt dino: there are dino_aug, deit_aug",
    "--use_mixup true --use_dense_prediction true": "--use_mixup true with --use_dense_prediction true",
    "--use_mixup true --batch_size_per_gpu 5": "--batch_size_per_gpu 5: --use_mixup mixes images in pairs",
    "--use_mixup true --accum_iter 2": "--accum_iter 2: --use_mixup mixes the images of a process",
    "--use_mixup true --mixup 0 --cutmix 0": "--mixup 0 --cutmix 0: nothing would be mixed",
    "--use_mixup true --num_mixup_views 0": "--num_mixup_views 0",
    "--use_dense_prediction true --arch timm/resnet10t": "--arch timm/resnet10t gives one vector for an image",
    "--local_crops_number 8 2": "--local_crops_number 8 2 --local_crops_size 96: one size each",
    "--arch swin_tiny --local_crops_number 8 2 --local_crops_size 96 63": "does not divide --local_crops_size 63",
    "--out_dim 0": "--out_dim 0",
    "--recount 0": "--recount 0",
    "--reprob 2": "--reprob 2: must be between 0 and 1",
    "--smoothing 1": "--smoothing 1: must be at least 0 and below 1",
    "--mixup -1": "--mixup -1: must not be negative",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_work_is_refused_in_one_line(words):
    with pytest.raises(UsageError) as error:
        check_options(parse_options(["--method", "esvit", "--precision", "fp32", *words.split()]), ALONE)
    assert REFUSED[words] in str(error.value) and "\n" not in str(error.value)
