"""--compile: how often torch has to compile a block, told with a compiler that does nothing."""

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

import main_pretrain
from data.device import normalise
from data.loader import stack
from evaluation.features import class_token, evaluating
from methods import method_class
from methods.base import Clock
from tests.launch import argv
from training.options import parse_options
from training.preview import attention_pictures

# two sizes of crops, other patches hidden in every step, branches dropped
OPTIONS = {"method": "ibot", "patch_out_dim": 48, "shared_head": "true", "warmup_teacher_temp_epochs": 0}


@pytest.fixture(autouse=True)
def fresh():
    limit = torch._dynamo.config.cache_size_limit
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    torch._dynamo.config.cache_size_limit = limit


def batch_of(views, images: int) -> dict:
    rng = np.random.default_rng(images)
    samples = [views(rng.integers(0, 256, (40, 50, 3), np.uint8), (0, 0, index)) for index in range(images)]
    batch = getattr(views, "collate", stack)(samples)
    return batch | {"crops": [normalise(crop) for crop in batch["crops"]]}


def test_blocks_are_compiled_whole_and_not_again_after_the_second_size_of_batch(monkeypatch):
    compiled = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled(module, backend="eager"))
    args = parse_options(argv(precision="fp32", compile=True, drop_path_rate=0.1, **OPTIONS))
    method, cls = method_class(args.method).build(args), method_class(args.method)
    main_pretrain.prepare_blocks(method, args)
    frames = []
    for step, images in enumerate((4, 4, 4, 3, 5)):
        method(batch_of(cls.views(args), images), Clock(0, step, global_batch=images))["loss"].backward()
        frames.append(counters["frames"]["ok"])
    # two networks, each with its last block and the others: of batches of one size, as in training, nothing more
    assert frames[:3] == [4, 4, 4] and frames[3] == frames[-1]
    assert counters["frames"]["total"] == counters["frames"]["ok"] and not counters["graph_break"]


def test_a_network_that_is_evaluated_meanwhile_is_not_compiled_for_it(monkeypatch):
    compiled = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled(module, backend="eager"))
    args = parse_options(argv(precision="fp32", compile=True))
    method = method_class(args.method).build(args)
    images, backbone = torch.randn(5, 3, 32, 32), method.evaluation_backbone()
    with evaluating(backbone), torch.no_grad():
        plain = class_token(backbone, images)
    main_pretrain.prepare_blocks(method, args)
    with evaluating(backbone), torch.no_grad():
        assert torch.equal(class_token(backbone, images), plain)
    attention_pictures(backbone, images)
    assert not counters["frames"]
    with torch.no_grad():
        class_token(backbone, images)
    assert counters["frames"]["ok"]
