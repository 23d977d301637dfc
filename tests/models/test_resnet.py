"""torchvision's ResNets with the last map as tokens."""

import copy

import pytest
import torch
import torch.nn as nn
import torchvision

from models import RESNET, build_backbone
from models.layouts.libraries import RESNETS


def test_every_resnet_of_torchvision_is_known_and_told_by_its_shapes():
    kinds = ("resnet", "resnext", "wide_resnet")
    theirs = [name for name in torchvision.models.list_models(module=torchvision.models) if name.startswith(kinds)]
    assert sorted(theirs) == sorted(RESNETS.values()) == sorted(RESNET.networks)
    for name in RESNETS.values():
        with torch.device("meta"):
            state = torchvision.models.get_model(name).state_dict()
        assert RESNET.shapes(state) == {"arch": name}


@pytest.mark.parametrize("training", [True, False])
def test_regions_are_the_map_that_torchvisions_network_pools(training, double):
    ours = build_backbone("resnet18").train(training)
    theirs = torchvision.models.resnet18()
    theirs.fc = nn.Identity()
    theirs.load_state_dict(ours.state_dict())
    theirs.train(training)
    maps = []
    theirs.layer4.register_forward_hook(lambda module, inputs, output: maps.append(output))
    crops = [torch.randn(2, 3, 64, 64), torch.randn(2, 3, 40, 33), torch.randn(2, 3, 40, 33)]
    with torch.no_grad():
        expected = [theirs(crops[0]), theirs(torch.cat(crops[1:]))]
        pooled, tokens = ours.forward_regions(crops)
    torch.testing.assert_close(pooled, torch.cat(expected), rtol=0, atol=0)
    assert [tuple(part.shape) for part in tokens] == [(2, 4, 512), (4, 4, 512)]
    for part, last in zip(tokens, maps, strict=True):
        torch.testing.assert_close(part[:, 3], last[:, :, 1, 1], rtol=0, atol=0)
    torch.testing.assert_close(dict(ours.named_buffers()), dict(theirs.named_buffers()), rtol=0, atol=0)


def test_recomputed_activations_give_the_same_gradients_and_the_same_running_statistics():
    start, images, found = build_backbone("resnet18"), torch.randn(2, 3, 32, 32), []
    for recompute in (False, True):
        model = copy.deepcopy(start)
        model.grad_checkpointing = recompute
        model(images).square().sum().backward()
        found.append(({name: p.grad for name, p in model.named_parameters()}, dict(model.named_buffers())))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
