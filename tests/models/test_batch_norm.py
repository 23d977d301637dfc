import copy

import pytest
import torch
import torch.nn as nn
from timm.layers import BatchNormAct2d

from models import build_backbone
from models.batch_norm import BatchNormOverProcesses, batch_norm_of_the_batch


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), "1"),
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval(), None),
        (lambda: nn.Sequential(nn.BatchNorm2d(2, track_running_stats=False)).eval(), "0"),
        (lambda: nn.Sequential(nn.LayerNorm(2), nn.GroupNorm(1, 2), nn.InstanceNorm2d(2)), None),
        (lambda: build_backbone("resnet18"), "bn1"),
        (lambda: build_backbone("timm/xcit_nano_12_p16_224"), "patch_embed.proj.0.1"),
        (lambda: build_backbone("vit_micro", 16), None),
    ],
)
def test_a_batch_norm_is_found_where_it_takes_its_statistics_from_the_batch(module, name):
    assert batch_norm_of_the_batch(module()) == name


@pytest.mark.parametrize("shape", [(7, 5), (3, 5, 4, 2)])
@pytest.mark.parametrize("affine", [True, False])
def test_a_process_alone_has_the_numbers_and_gradients_of_torch(shape, affine):
    torch.manual_seed(0)
    norm = (nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(5, affine=affine).double()
    if affine:
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    ours = BatchNormOverProcesses(copy.deepcopy(norm))
    x = (3 * torch.randn(shape, dtype=torch.float64) + 100).requires_grad_()
    weights = torch.randn(shape, dtype=torch.float64)
    results = []
    for module in (norm, ours):
        for _ in range(2):  # running statistics move twice
            y = module(x)
        parameters = list(module.parameters())
        gradients = torch.autograd.grad((y * weights).sum(), [x, *parameters])
        results.append(
            [y, *gradients, module.running_mean, module.running_var, module.num_batches_tracked, module.eval()(x)]
        )
    for theirs, own in zip(*results, strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-9, atol=1e-9)


def test_half_precision_is_normalised_in_float32():
    x = torch.randn(64, 4).bfloat16()
    y = BatchNormOverProcesses(nn.BatchNorm1d(4))(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), nn.BatchNorm1d(4)(x.float()), rtol=0.01, atol=0.01)


def test_what_a_norm_of_timm_does_after_normalising_is_done_as_well():
    norm = BatchNormAct2d(5, act_layer=nn.SiLU, drop_layer=nn.Dropout).double()
    norm.drop.p = 1.0
    ours, x = BatchNormOverProcesses(copy.deepcopy(norm)), torch.randn(3, 5, 4, 2, dtype=torch.float64)
    assert not ours(x).any() and not norm(x).any()
    norm.drop.p = ours.drop.p = 0.0
    torch.testing.assert_close(ours(x), norm(x))
    torch.testing.assert_close(ours.eval()(x), norm.eval()(x))
