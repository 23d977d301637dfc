"""Heads side by side are heads by themselves, and their files are those of the originals."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from evaluation.linear_heads import (
    LinearHeads,
    Probe,
    Recipe,
    best_head,
    cosine_factor,
    heads_of,
    initial_heads,
    restore_heads,
    saved_heads,
)
from models.safe_load import CheckpointError
from training.optim import LARS

RECIPES = [Recipe(0.5), Recipe(3.0), Recipe(2.0, 0.01), Recipe(20.0, 0.01, "lars"), Recipe(5.0, 0.0, "lars")]
CLASSES, EPOCHS = 6, 3


def problem(count=40, dim=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLASSES, dim, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    return centres[labels] + torch.randn(count, dim, generator=generator, dtype=torch.float64), labels


def make_probe(dims=(7,), recipes=RECIPES, dtype=torch.float64) -> Probe:
    groups = []
    for dim in dims:
        weight, bias = (tensor.to(dtype) for tensor in initial_heads(len(recipes), CLASSES, dim))
        groups.append(LinearHeads(weight, bias, recipes))
    return Probe(groups)


def train(probe: Probe, features: list[torch.Tensor], labels: torch.Tensor, start=0, stop=EPOCHS, batch=16):
    for epoch in range(start, stop):
        for i in range(0, len(labels), batch):
            part = slice(i, i + batch)
            images = len(labels[part])
            losses = probe.train_step([x[part] for x in features], labels[part], images, cosine_factor(epoch, EPOCHS))
    return losses


def train_alone(layer: nn.Linear, recipe: Recipe, x: torch.Tensor, labels: torch.Tensor, batch=16):
    """The plain form: autograd, an optimiser of its own, torch's scheduler."""
    kind = torch.optim.SGD if recipe.optimizer == "sgd" else LARS
    optimizer = kind(layer.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    for _ in range(EPOCHS):
        for i in range(0, len(labels), batch):
            loss = F.cross_entropy(layer(x[i : i + batch]), labels[i : i + batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()
    return loss


def test_heads_side_by_side_equal_heads_by_themselves():
    (first, labels), (second, _) = problem(), problem(dim=5, seed=1)
    probe = make_probe((7, 5))
    layers = []
    for weight, bias, *_ in probe.tensors():
        layer = nn.Linear(weight.shape[1], CLASSES).double()
        layer.load_state_dict({"weight": weight.clone(), "bias": bias.clone()})
        layers.append(layer)
    losses = train(probe, [first, second], labels)  # of 40 images the last batch has 8
    recipes = [(x, recipe) for x in (first, second) for recipe in RECIPES]
    for i, ((x, recipe), layer) in enumerate(zip(recipes, layers, strict=True)):
        loss = train_alone(layer, recipe, x, labels)
        weight, bias, *_ = probe.tensors()[i]
        torch.testing.assert_close(weight, layer.weight, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(bias, layer.bias, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(losses[i], loss, rtol=1e-10, atol=1e-12)


def test_a_head_does_not_depend_on_its_neighbours():
    features, labels = problem()
    together = make_probe()
    train(together, [features], labels)
    for recipe, tensors in zip(RECIPES, together.tensors(), strict=True):
        alone = make_probe(recipes=[recipe])
        train(alone, [features], labels)
        for ours, theirs in zip(alone.tensors()[0], tensors, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_a_head_that_diverges_leaves_the_others_alone():
    features, labels = problem()
    probe, alone = make_probe(recipes=[Recipe(1e200), Recipe(0.5)]), make_probe(recipes=[Recipe(0.5)])
    train(probe, [features * 1e100], labels)
    train(alone, [features * 1e100], labels)
    assert not probe.groups[0].weight[0].isfinite().all()
    torch.testing.assert_close(probe.groups[0].weight[1], alone.groups[0].weight[0], equal_nan=True)


def test_shares_of_a_batch_add_up_even_if_one_is_empty():
    features, labels = problem(10)
    heads = make_probe().groups[0]
    whole = [torch.empty_like(p) for p in heads.parameters]
    loss = heads.loss_and_gradients(features, labels, 10, whole)
    sums, losses = [torch.zeros_like(p) for p in heads.parameters], 0
    for part in (slice(0, 7), slice(7, 10), slice(10, 10)):
        gradients = [torch.empty_like(p) for p in heads.parameters]
        losses = losses + heads.loss_and_gradients(features[part], labels[part], 10, gradients)
        sums = [a + b for a, b in zip(sums, gradients, strict=True)]
    torch.testing.assert_close([*sums, losses], [*whole, loss])


def test_weights_are_small_and_random_and_biases_zero():
    weight, bias = initial_heads(3, 50, 400, seed=1)
    assert torch.equal(weight[0], weight[2]) and not bias.any()
    assert abs(float(weight.std()) - 0.01) < 2e-4 and abs(float(weight.mean())) < 2e-4
    assert not torch.equal(weight, initial_heads(3, 50, 400, seed=2)[0])


def test_the_test_counts_and_few_classes_have_no_more_than_all_of_them():
    heads = LinearHeads(torch.eye(7, dtype=torch.float64)[None], torch.zeros(1, 7).double(), [Recipe(1.0)])
    scores = torch.tensor([[7, 6, 5, 4, 3, 2, 1.0]] * 3, dtype=torch.float64)
    sums, hits = heads.test(scores, torch.tensor([0, 4, 5]))
    loss, first, five = sums.flatten().tolist()
    assert int(hits.sum()) == first and hits.shape == (1, 3)
    assert (first, five) == (1, 2)
    assert loss == pytest.approx(F.cross_entropy(scores, torch.tensor([0, 4, 5]), reduction="sum").item())
    few = LinearHeads(torch.eye(3)[None], torch.zeros(1, 3), [Recipe(1.0)])
    assert few.test(torch.eye(3), torch.tensor([0, 1, 0]))[0][1:].flatten().tolist() == [2, 3]


def test_the_last_of_equally_good_heads_is_the_best():
    assert best_head([10.0, 52.5, 52.5, 31.0]) == 2 and best_head([1.0]) == 0


@pytest.mark.parametrize("recipes", [RECIPES, RECIPES[:1]], ids=["several", "one"])
def test_what_is_saved_and_restored_goes_on_as_if_nothing_had_been(tmp_path, recipes):
    features, labels = problem()
    whole, first, second = (make_probe(recipes=recipes) for _ in range(3))
    train(whole, [features], labels)
    train(first, [features], labels, stop=2)
    torch.save(saved_heads(first, 2, EPOCHS) | {"best_acc": 1.0}, tmp_path / "file.pth")
    file = torch.load(tmp_path / "file.pth", weights_only=True)
    assert restore_heads(second, file, "file.pth") == 2
    train(second, [features], labels, start=2)
    for ours, theirs in zip(second.tensors(), whole.tensors(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert len(heads_of(file)) == len(recipes)


def test_the_optimisers_of_a_file_are_torchs():
    features, labels = problem()
    probe = make_probe(recipes=RECIPES[:1])
    train(probe, [features], labels, stop=1)
    file = saved_heads(probe, 1, EPOCHS)
    optimizer = torch.optim.SGD([nn.Parameter(t) for t in probe.tensors()[0][:2]], lr=1.0)
    optimizer.load_state_dict(file["optimizer"])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * cosine_factor(1, EPOCHS))
    assert len(optimizer.state_dict()["state"]) == 2


def test_a_head_is_found_under_the_words_of_any_wrapper():
    weight, bias = torch.randn(3, 4), torch.randn(3)
    for prefix in ("", "module.", "_orig_mod.module.", "module._orig_mod.", "_fsdp_wrapped_module."):
        file = {"state_dict": {f"{prefix}linear.weight": weight, f"{prefix}linear.bias": bias}}
        assert all(torch.equal(*pair) for pair in zip(heads_of(file)[0], (weight, bias), strict=True))


def test_heads_of_another_shape_or_number_are_refused():
    file = saved_heads(make_probe(), 1, EPOCHS)
    with pytest.raises(CheckpointError, match=r"f.pth: holds heads of shape 5 x \(6, 7\), these are 5 x \(6, 8\)"):
        restore_heads(make_probe((8,)), file, "f.pth")
    with pytest.raises(CheckpointError, match="none"):
        restore_heads(make_probe(), {"epoch": 3}, "f.pth")
