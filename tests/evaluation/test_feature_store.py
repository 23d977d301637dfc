"""Features are extracted once, whatever asks for them, and an extraction goes on where it was stopped."""

import json
from pathlib import Path

import pytest
import torch

from evaluation import cache
from evaluation.cache import FeatureStore, Preparation
from evaluation.features import Feature, extract_features, token_features
from models import build_backbone
from models.checkpoints import Network
from tests.sources import Stripes
from utils import UsageError, World

ALONE = World(0, 1, 0, torch.device("cpu"))
SIDES = Preparation(32, 36)
FEATURES = [Feature(), Feature(2), Feature(1, "mean"), Feature(2, "2")]


def network(seed: int = 0) -> Network:
    torch.manual_seed(seed)
    return Network(build_backbone("vit_micro", 8, img_size=32), "vit_micro", {"patch_size": 8}, None)


def asked(store: FeatureStore, source, wanted, of: Network | None = None):
    options = {"world": ALONE, "batch_size": 4, "num_workers": 0}
    return store.features(of or network(), source, SIDES, wanted, **options)


def passes(monkeypatch) -> list[int]:
    """Images of every pass through a network from here on."""
    seen = []
    real = cache.token_features
    monkeypatch.setattr(cache, "token_features", lambda m, x, f: (seen.append(len(x)), real(m, x, f))[1])
    return seen


def test_features_are_those_of_an_extraction_and_are_extracted_once(tmp_path, monkeypatch):
    source, seen = Stripes(bad=(3, 17)), passes(monkeypatch)
    found, unreadable = asked(FeatureStore(tmp_path, chunk=10), source, FEATURES)
    transform = cache.eval_transform(*SIDES)
    for feature, rows in zip(FEATURES, found, strict=True):
        wanted, bad = extract_features(
            network().model, source, transform, world=ALONE, batch_size=5, num_workers=0, device=ALONE.device,
            feature=feature,
        )  # fmt: skip
        torch.testing.assert_close(rows, wanted, rtol=1e-5, atol=1e-6)
        assert bad == unreadable and [image.index for image in bad] == [3, 17]
    assert sum(seen) == len(source) - 2  # all features in one pass
    again, _ = asked(FeatureStore(tmp_path), source, FEATURES[::-1])
    assert all(map(torch.equal, again[::-1], found)) and sum(seen) == len(source) - 2
    asked(FeatureStore(tmp_path), source, [Feature(3), FEATURES[0]])
    assert sum(seen) == 2 * (len(source) - 2)  # of the new one alone


def test_an_extraction_that_was_stopped_goes_on_in_the_middle(tmp_path, monkeypatch):
    source, seen, real = Stripes(), passes(monkeypatch), cache._Place.note
    whole, _ = asked(FeatureStore(tmp_path / "whole"), source, FEATURES)

    def stops(self, feature, rows, done, unreadable):
        if done > 12:
            raise KeyboardInterrupt
        real(self, feature, rows, done, unreadable)

    monkeypatch.setattr(cache._Place, "note", stops)
    with pytest.raises(KeyboardInterrupt):
        asked(FeatureStore(tmp_path / "cut", chunk=6), source, FEATURES)
    monkeypatch.setattr(cache._Place, "note", real)
    seen.clear()
    found, _ = asked(FeatureStore(tmp_path / "cut", chunk=6), source, FEATURES)
    assert all(map(torch.equal, found, whole)) and sum(seen) == len(source) - 12


def test_nothing_of_another_network_set_or_preparation_is_used(tmp_path, monkeypatch):
    seen, store = passes(monkeypatch), FeatureStore(tmp_path)
    for images in (Stripes(), Stripes(seed=1)):
        for seed in (0, 1):
            seen.clear()
            asked(store, images, [Feature()], network(seed))
            assert sum(seen) == len(images)
    assert len(list(tmp_path.iterdir())) == 4
    key = json.loads(next(tmp_path.glob("*/set.json")).read_text())
    assert key["preprocessing"] == "resize 36 bicubic, centre crop 32, ImageNet normalisation"


def test_an_image_that_was_mended_and_a_damaged_file_are_extracted_anew(tmp_path, caplog):
    class Mended(Stripes):
        fingerprint = "the same list"

    store = FeatureStore(tmp_path)
    rows, unreadable = asked(store, Mended(bad=(2,)), [Feature()])
    assert len(unreadable[0]) == 3 and len(rows[0]) == 23
    rows, unreadable = asked(store, Mended(), [Feature()])
    assert not unreadable and len(rows[0]) == 24
    (path,) = Path(tmp_path).glob("*/*.npy")
    path.write_bytes(path.read_bytes()[:50])
    assert torch.equal(asked(store, Mended(), [Feature()])[0][0], rows[0]) and "damaged" in caplog.text


def test_features_that_are_not_finite_are_refused(tmp_path):
    broken = network()
    broken.model.norm.weight.data[0] = float("nan")
    with pytest.raises(UsageError, match="not finite"):
        asked(FeatureStore(tmp_path), Stripes(), [Feature()], broken)


def test_the_mean_of_normalised_patches_is_a_feature_of_its_own():
    model, images = network().model.eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        tokens = model.get_intermediate_layers(images, 1)[0]
        (mean, before) = token_features(model, images, [Feature(1, "mean"), Feature(1, "1")])
    torch.testing.assert_close(mean, tokens[:, 1:].mean(dim=1))
    assert (mean - before).abs().max() > 1e-3
