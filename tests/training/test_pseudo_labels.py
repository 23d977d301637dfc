"""Prototypes against labels, collected over an epoch."""

import numpy as np
import pytest
import torch

from evaluation.clustering import contingency, fowlkes_mallows
from training.pseudo_labels import PseudoLabels
from utils import World

ALONE = World(0, 1, 0, torch.device("cpu"))


def test_predictions_meet_the_labels_of_their_images():
    labels = np.array([5, 5, 7, 7, 9, 9])
    collected = PseudoLabels(labels, ALONE)
    collected.add(torch.tensor([4, 0]), torch.tensor([100, 300]))
    collected.add(torch.tensor([2, 5]), torch.tensor([200, 100]))
    collected.add(torch.tensor([1, 3]), torch.tensor([300, 200]))
    assert collected.end_epoch() == pytest.approx({"nmi": 1.0, "ari": 1.0, "fscore": 1.0, "adjacc": -1.0})
    assert collected.end_epoch() == {}, "the next epoch begins anew"
    collected.add(torch.tensor([0, 1, 2]), torch.tensor([1, 2, 2]))
    expected = fowlkes_mallows(contingency(labels[:3], np.array([1, 2, 2])))
    assert collected.end_epoch()["fscore"] == expected


def test_what_is_collected_does_not_change_when_the_batch_is_used_again():
    collected = PseudoLabels(np.array([0, 1]), ALONE)
    indices, predictions = torch.tensor([0, 1]), torch.tensor([3, 4])
    collected.add(indices, predictions)
    indices.zero_(), predictions.zero_()
    assert collected.end_epoch()["nmi"] == 1.0


@pytest.mark.parametrize("labels", [[-1, -1], [0, -1]])
def test_without_labels_or_prototypes_there_is_nothing_to_say(labels):
    unknown, without = PseudoLabels(np.array(labels), ALONE), PseudoLabels(np.array([0, 1]), ALONE)
    unknown.add(torch.tensor([0, 1]), torch.tensor([0, 1]))
    without.add(torch.tensor([0, 1]), None)
    assert unknown.end_epoch() == without.end_epoch() == {}


def test_an_interrupted_epoch_is_judged_as_a_whole():
    labels = np.array([5, 5, 7, 7, 9, 9])
    pieces = [(torch.tensor(images), torch.tensor(found)) for images, found in (([4, 0], [1, 2]), ([2, 5], [2, 3]))]
    whole, first, second = (PseudoLabels(labels, ALONE) for _ in range(3))
    for collected, parts in ((whole, pieces), (first, pieces[:1])):
        for part in parts:
            collected.add(*part)
    for _ in range(2):  # saving it changes nothing
        state = first.state_dict()
    second.load_state_dict(state)
    assert torch.equal(second.state_dict()["seen"], state["seen"])
    for collected in (first, second):
        collected.add(*pieces[1])
    expected = whole.end_epoch()
    assert first.end_epoch() == second.end_epoch() == expected
    assert second.state_dict() == {} and second.end_epoch() == {}
