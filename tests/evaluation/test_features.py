"""Row i is image i, whatever happens; and kept features are never those of something else."""

import warnings

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from data.preprocess import eval_transform
from evaluation import features
from evaluation.features import (
    POOLINGS,
    Feature,
    class_token,
    evaluating,
    extract_features,
    gather_rows,
    token_features,
)
from evaluation.retrieval import multiscale
from evaluation.unreadable import readable
from models.vit import VisionTransformer
from tests.sources import Stripes
from utils import World

ALONE = World(0, 1, 0, torch.device("cpu"))
TRANSFORM = eval_transform(32, 36)


def small(**kwargs) -> VisionTransformer:
    return VisionTransformer(**{"embed_dim": 12, "depth": 3, "num_heads": 3, "patch_size": 8, "img_size": 32} | kwargs)


def extract(model, source, **kwargs):
    options = {"world": ALONE, "device": ALONE.device, "batch_size": 4, "num_workers": 0}
    return extract_features(model, source, TRANSFORM, **options | kwargs)


# ---- extraction -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images_per_class", [1, 5])
def test_rows_are_images_in_order(images_per_class):
    model, source = small().eval(), Stripes(classes=3, per_class=images_per_class)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        matrix, unreadable = extract(model, source)
    assert matrix.shape == (len(source), 12) and matrix.dtype == torch.float32 and unreadable == []
    for index in range(len(source)):
        with torch.no_grad():
            alone = model(TRANSFORM(source.pil(index))[None])[0]
        torch.testing.assert_close(matrix[index], alone, rtol=1e-5, atol=1e-6)


def test_neither_batches_nor_workers_change_a_row():
    model, source = small(), Stripes()
    reference, _ = extract(model, source)
    for options in ({"batch_size": 7}, {"batch_size": 100}, {"num_workers": 2}):
        torch.testing.assert_close(extract(model, source, **options)[0], reference, rtol=1e-5, atol=1e-6)


def test_the_network_evaluates_without_gradients_and_every_part_returns_to_its_mode():
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(3 * 32 * 32, 5))
    model.train()
    model[1].eval()
    seen = []
    model[2].register_forward_hook(lambda *_: seen.append((model.training, torch.is_grad_enabled())))
    first, _ = extract(model, Stripes(2, 2))
    assert set(seen) == {(False, False)}
    assert [module.training for module in model.modules()] == [True, True, False, True]
    assert not first.requires_grad
    with pytest.raises(ZeroDivisionError), evaluating(model):
        raise ZeroDivisionError
    assert [module.training for module in model.modules()] == [True, True, False, True]


def test_a_plain_function_of_images_will_do_and_so_will_another_feature():
    source = Stripes(2, 3)
    pixels, _ = extract(lambda images: images.flatten(1), source)
    assert pixels.shape == (6, 3 * 32 * 32)
    model = small()
    two, _ = extract(model, source, feature=Feature(2))
    assert two.shape == (6, 24)
    torch.testing.assert_close(two[:, 12:], extract(model, source)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_images_have_no_row_and_are_named_with_the_reason(workers):
    """A single one, a whole batch, all of them."""
    model = small()
    for bad in ((5,), (8, 9, 10, 11, 23), tuple(range(24))):
        matrix, unreadable = extract(model, Stripes(bad=bad), num_workers=workers)
        assert unreadable == [(index, f"stripes/{index}.png", "cut off in the middle") for index in bad]
        kept = readable(24, unreadable)
        assert kept.tolist() == [index for index in range(24) if index not in bad]
        assert len(matrix) == len(kept)
        if len(kept):
            torch.testing.assert_close(matrix, extract(model, Stripes())[0][kept], rtol=1e-5, atol=1e-6)


def test_progress_is_told_with_a_rate(caplog):
    caplog.set_level("INFO", "tutelage")
    extract(small(), Stripes(2, 3))
    assert "6 of 6 images" in caplog.text and "images/s" in caplog.text


def test_missing_and_doubled_rows_are_errors_that_name_them():
    rows = torch.arange(4.0)[:, None]
    assert gather_rows(rows, torch.tensor([2, 0, 3, 1]), 4, ALONE).flatten().tolist() == [1, 3, 0, 2]
    with pytest.raises(RuntimeError, match=r"extracted 3 of 4 images; missing 1; doubled 3"):
        gather_rows(rows, torch.tensor([2, 0, 3, 3]), 4, ALONE)
    with pytest.raises(RuntimeError, match=r"extracted 4 of 20 images; missing 4, 5, 6, 7, 8, 9, 10, 11 and 8 more"):
        gather_rows(rows, torch.tensor([0, 1, 2, 3]), 20, ALONE)


def test_rows_may_be_missing_only_where_they_are_known_to_be():
    rows = torch.arange(3.0)[:, None]
    assert gather_rows(rows, torch.tensor([4, 0, 2]), 5, ALONE, absent=[1, 3]).flatten().tolist() == [1, 2, 0]
    with pytest.raises(RuntimeError, match=r"extracted 3 of 4 images; missing 3"):
        gather_rows(rows, torch.tensor([4, 0, 2]), 5, ALONE, absent=[1])
    with pytest.raises(RuntimeError, match=r"extracted 3 of 3 images; missing 1; doubled 2"):
        gather_rows(rows, torch.tensor([4, 0, 2]), 5, ALONE, absent=[2, 3])


def test_rows_are_placed_in_pieces(monkeypatch):
    monkeypatch.setattr(features, "GATHER_ROWS", 3)
    order = torch.randperm(10)
    assert torch.equal(gather_rows(order[:, None].float(), order, 10, ALONE).flatten(), torch.arange(10.0))


# ---- kinds of features ----------------------------------------------------------------------------------------------


def test_the_class_token_of_several_is_the_first_and_of_a_tuple_the_first_element():
    images = torch.randn(2, 3, 32, 32)
    model = small(num_class_tokens=2).eval()
    assert torch.equal(class_token(model, images), model(images)[:, 0])
    assert torch.equal(class_token(lambda x: (x.flatten(1), None), images), images.flatten(1))


def test_class_token_and_patch_mean_come_interleaved_or_one_after_the_other():
    model, images = small(num_registers=2).eval(), torch.randn(2, 3, 32, 32)
    mixed, plain = Feature(1, "interleaved")(model, images), Feature(1, "2")(model, images)
    torch.testing.assert_close(mixed[:, 0::2], plain[:, :12])
    torch.testing.assert_close(mixed[:, 1::2], plain[:, 12:])
    torch.testing.assert_close(plain[:, 12:], model.forward_features(images)[:, 3:].mean(dim=1))


def test_several_features_of_one_pass_are_those_of_their_own_passes(double):
    model, images = small(num_class_tokens=2).eval(), torch.randn(2, 3, 32, 32)
    wanted = [Feature(n, pooling) for n in (1, 2, 3) for pooling in POOLINGS if n == 1 or pooling != "interleaved"]
    together = token_features(model, images, wanted)
    for feature, found in zip(wanted, together, strict=True):
        torch.testing.assert_close(found, feature(model, images), rtol=1e-12, atol=1e-12)
    widths = dict(zip(wanted, [found.shape[1] for found in together], strict=True))
    assert [widths[Feature(3, p)] for p in "012"] == [36, 12, 48] and widths[Feature(1, "interleaved")] == 24
    chosen = [Feature(2, "0", token) for token in ("cls", "cls+", "both")] + [Feature(1, "interleaved", "cls+")]
    first, second, both, mixed = token_features(model, images, chosen)
    layers = [tokens[:, :2] for tokens in model.get_intermediate_layers(images, 2)]
    assert torch.equal(torch.cat([tokens[:, 0] for tokens in layers], 1), first)
    assert torch.equal(torch.cat([tokens[:, 1] for tokens in layers], 1), second)
    assert torch.equal(torch.cat([tokens.flatten(1) for tokens in layers], 1), both)
    assert torch.equal(mixed[:, 0::2], layers[-1][:, 1])
    bare = small(num_class_tokens=2, use_mean_pooling=True).eval()
    bare.load_state_dict({n: t for n, t in model.state_dict().items() if not n.startswith("norm.")}, strict=False)
    (tokens,) = bare.get_intermediate_layers(images, 1)
    torch.testing.assert_close(Feature(1, "1")(model, images), tokens[:, 2:].mean(dim=1))


def test_more_blocks_than_there_are_is_all_of_them(double):
    model, images = small().eval(), torch.randn(2, 3, 32, 32)
    for pooling in ("0", "2"):
        assert torch.equal(Feature(9, pooling)(model, images), Feature(3, pooling)(model, images))
    together = token_features(model, images, [Feature(9), Feature(1), Feature(2)])
    assert [found.shape[1] for found in together] == [36, 12, 24]


def test_blocks_may_differ_in_width_and_tokens_as_those_of_a_swin_do():
    class Stages(nn.Module):
        num_prefix_tokens = 1

        def get_intermediate_layers(self, images, n):
            stages = [
                torch.full((len(images), 1 + tokens, dim), 1.0 * dim) for tokens, dim in ((16, 4), (4, 8), (4, 8))
            ]
            return stages[-n:]

    shapes = [Feature(n, p)(Stages(), torch.zeros(2, 3, 8, 8)).shape for n, p in ((3, "0"), (3, "1"), (3, "2"))]
    assert shapes == [(2, 20), (2, 8), (2, 28)]


def test_the_multiscale_feature_of_one_image_has_unit_norm():
    feature = multiscale(small().eval(), torch.randn(1, 3, 64, 48))
    torch.testing.assert_close(feature.norm(), torch.tensor(1.0))


# ---- preprocessing -----------------------------------------------------------------------------------------


def test_preprocessing_is_that_of_torchvision_and_normalises():
    image = Stripes(size=50).pil(0)
    out = eval_transform(32, 36)(image)
    assert out.shape == (3, 32, 32) and out.dtype == torch.float32
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    assert float((out * std + mean).min()) > -0.01 and float((out * std + mean).max()) < 1.01
    assert F.mse_loss(out, eval_transform(32, 36)(image)) == 0
