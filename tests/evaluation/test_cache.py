"""Kept features are never those of something else."""

import json

import pytest
import torch

from evaluation import cache as cache_module
from evaluation.cache import FeatureCache
from utils import UsageError

KEY = {"weights": "a" * 64, "arch": "vit_small/16", "train": "t", "test": "v", "preprocessing": "p", "feature": "f"}


def parts() -> tuple[torch.Tensor, ...]:
    return torch.randn(5, 3), torch.randn(4, 3), torch.arange(5), torch.arange(4)


def test_kept_features_come_back_for_the_same_key_only(tmp_path, caplog):
    caplog.set_level("INFO", "tutelage")
    cache, kept = FeatureCache(tmp_path / "features"), parts()
    assert cache.load(KEY) is None and "no features there yet" in caplog.text
    cache.save(KEY, kept)
    assert all(map(torch.equal, cache.load(KEY), kept)) and "used, same network and images" in caplog.text
    for name in KEY:
        caplog.clear()
        assert cache.load(KEY | {name: "other"}) is None
        assert f"{name} is" in caplog.text and "not used" in caplog.text
    assert cache.load(KEY | {"new": 1}) is None


def test_features_lie_in_the_originals_files(tmp_path):
    kept = parts()
    FeatureCache(tmp_path).save(KEY, kept)
    for name, tensor in zip(("trainfeat", "testfeat", "trainlabels", "testlabels"), kept, strict=True):
        assert torch.equal(torch.load(tmp_path / f"{name}.pth"), tensor)
    assert json.loads((tmp_path / "features.json").read_text()) == KEY


def test_features_without_a_key_or_with_a_damaged_file_are_not_used(tmp_path):
    cache = FeatureCache(tmp_path)
    cache.save(KEY, parts())
    (tmp_path / "testfeat.pth").write_bytes(b"junk")
    assert cache.load(KEY) is None
    cache.save(KEY, parts())
    (tmp_path / "features.json").write_text("{")
    assert "cannot be read" in cache.difference(KEY)
    (tmp_path / "features.json").unlink()  # as the original leaves them
    assert "nobody knows which checkpoint" in cache.difference(KEY)


def test_an_interrupted_save_leaves_no_key(tmp_path, monkeypatch):
    cache = FeatureCache(tmp_path)
    cache.save(KEY, parts())

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(cache_module, "save_torch", full)
    with pytest.raises(UsageError, match="No space left"):
        cache.save(KEY | {"weights": "b" * 64}, parts())
    assert cache.load(KEY | {"weights": "b" * 64}) is None and cache.load(KEY) is None
