"""Labels carried through a video: frames, masks, and the estimator on vectors whose answer is known."""

import numpy as np
import pytest
import torch

from evaluation import propagation
from evaluation.propagation import Settings, frame_size, hard_mask, neighbourhood, one_hot_labels, propagate, stretch


def test_a_token_takes_the_labels_of_those_it_resembles():
    first = torch.tensor([[[1.0, 1.0, 0.0]], [[0.0, 0.0, 1.0]]])  # two classes, one row of three tokens
    vectors = torch.eye(3)
    moved = vectors[[2, 0, 1]]
    (labels,) = propagate([vectors, moved], first, Settings(topk=1))
    assert torch.equal(labels, first[..., [2, 0, 1]])
    (labels,) = propagate([vectors, moved], first, Settings(topk=1, size_mask_neighborhood=1))
    assert labels[1].tolist() == [[0, 0, 0]]  # what the first one resembles is too far away


def test_those_that_equal_the_last_neighbour_stay():
    first = torch.tensor([[[1.0, 0.0, 0.0]], [[0.0, 1.0, 1.0]]])
    (labels,) = propagate([torch.ones(3, 2), torch.ones(3, 2)], first, Settings(topk=1))
    torch.testing.assert_close(labels[:, 0, 0], torch.tensor([1 / 3, 2 / 3]))


def test_what_was_carried_is_carried_on_and_forgotten_but_for_the_first_frame():
    first = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    sure, between = torch.eye(2), torch.ones(2, 2)
    run = lambda frames: list(propagate([sure, between, between], first, Settings(frames, topk=2)))[1]  # noqa: E731
    assert not torch.equal(run(1), torch.zeros_like(first)) and torch.allclose(run(0), torch.full_like(first, 0.5))


@pytest.mark.parametrize("band", [1, 3, 50])
def test_bands_change_nothing(band, monkeypatch):
    tokens, first = torch.randn(4, 35, 6).double(), one_hot_labels(np.arange(35).reshape(5, 7) % 3, torch.float64)
    whole = list(propagate(tokens, first, Settings(2, 2, 4)))
    monkeypatch.setattr(propagation, "BAND", band)
    for one, other in zip(whole, propagate(tokens, first, Settings(2, 2, 4)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


def test_neighbours_are_counted_in_rows_and_columns():
    near = neighbourhood(3, range(1, 2), range(4), 1)
    assert near.shape == (1, 3, 4, 3) and near[0, 0, :, 0].tolist() == [True, True, True, False]
    assert near[0, 2, 0].tolist() == [False, True, True] and neighbourhood(2, range(5), range(5), 0).all()


def test_a_class_that_is_everywhere_wins_and_one_that_is_nowhere_is_left_alone():
    soft = torch.stack((torch.zeros(2, 2), torch.full((2, 2), 0.7)))
    assert torch.equal(stretch(soft)[0], torch.zeros(2, 2)) and (hard_mask(soft, 2) == 1).all()


def test_the_longer_side_is_floored():
    assert frame_size(480, 854, 480) == (480, 832) and frame_size(854, 480, 480) == (832, 480)
    assert frame_size(10, 10, 480) == (480, 448)
