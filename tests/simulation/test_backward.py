"""The backward pass in Python gives autograd's gradients, on numbers."""

import torch
import torch.nn as nn

from methods.distillation import cross_view_loss
from models.vit import VisionTransformer
from simulation.backward import backward_in_python


def gradients(model: nn.Module, loss_of, python: bool) -> list[torch.Tensor]:
    model.zero_grad(set_to_none=True)
    if python:
        with backward_in_python():
            loss_of(model).backward()
    else:
        loss_of(model).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def small(**options) -> VisionTransformer:
    torch.manual_seed(0)
    sizes = {"embed_dim": 12, "depth": 3, "num_heads": 3, "patch_size": 8, "img_size": 32}
    return VisionTransformer(**sizes, **options).double()


def prototypes_loss(model: VisionTransformer) -> torch.Tensor:
    """Crops of two sizes, a Function of ours, a weight used twice."""
    torch.manual_seed(1)
    crops = [torch.randn(4, 3, side, side, dtype=torch.float64) for side in (32, 32, 16)]
    probs = torch.randn(2, 4, 12, dtype=torch.float64).softmax(dim=-1)
    z = model.forward_crops(crops)
    return cross_view_loss(z, model.blocks[0].attn.proj.weight, probs, 0.1) + z.square().sum()


def test_gradients_are_those_of_autograd():
    model = small()
    expected = gradients(model, prototypes_loss, python=False)
    for ours, theirs in zip(gradients(model, prototypes_loss, python=True), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_blocks_that_are_computed_again_give_the_same_gradients():
    model = small()
    expected = gradients(model, prototypes_loss, python=False)
    model.grad_checkpointing = True
    for ours, theirs in zip(gradients(model, prototypes_loss, python=True), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_gradients_of_two_passes_add_up():
    layer = nn.Linear(3, 2)
    x = torch.randn(5, 3)
    with backward_in_python():
        layer(x).sum().backward()
        once = layer.weight.grad.clone()
        layer(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, 2 * once)


def test_what_was_saved_is_released_when_its_node_has_run():
    layers = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    with backward_in_python() as saved:
        loss = layers(torch.randn(2, 4)).square().sum()
        assert saved._kept
        loss.backward()
        assert not saved._kept
