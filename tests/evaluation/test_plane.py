"""Points in the plane and the picture of them; t-SNE itself where scikit-learn is there."""

import numpy as np
import pytest
import torch

from evaluation.drawing import shortened, text_width
from evaluation.plane import COLOURS, MARGIN, SIDE, check_plane, class_colours, embed, plane_picture, purity, scatter
from utils import UsageError


def clusters(classes: int = 6, each: int = 20, dim: int = 16) -> tuple[torch.Tensor, np.ndarray]:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(classes, dim, generator=generator)
    labels = np.repeat(np.arange(classes), each)
    return centres[labels] + 0.2 * torch.randn(len(labels), dim, generator=generator), labels


def test_separated_clusters_stay_separated_and_the_divergence_falls():
    pytest.importorskip("sklearn")
    features, labels = clusters()
    long, short = (embed(features, 12, iterations, 0) for iterations in (500, 300))
    assert long.points.shape == (120, 2) and purity(long.points, labels) > 0.95
    assert long.divergence < short.divergence
    assert np.array_equal(embed(features, 12, 300, 0).points, short.points)
    assert not np.array_equal(
        embed(features, 12, 250, 1, "random").points, embed(features, 12, 250, 2, "random").points
    )


def test_purity_is_the_share_of_neighbours_of_the_same_class():
    points = np.array([[0, 0], [1, 0], [2, 0], [50, 0], [51, 0], [52, 0.0]])
    assert purity(points, np.array([0, 0, 0, 1, 1, 1]), 2) == 1.0
    assert purity(points, np.array([0, 1, 0, 1, 0, 1]), 2) == pytest.approx(1 / 3)
    assert purity(points[:2], np.array([0, 0])) == 1.0


@pytest.mark.parametrize(
    ("options", "said"),
    [((30, 30, 1000), "30 images are too few"), ((9, 0.5, 1000), "--perplexity 0.5"), ((9, 5, 250), "--iters 250")],
)
def test_what_cannot_be_laid_out_is_refused(options, said):
    with pytest.raises(UsageError, match=said):
        check_plane(*options)


def test_every_class_has_a_colour_of_its_own():
    assert class_colours(6) == list(COLOURS[:6])
    assert all(len(set(class_colours(count))) == count for count in (10, 11, 40))


def test_points_stand_where_they_belong_in_the_colours_of_their_classes():
    points = np.array([[-1.0, -1.0], [1.0, 1.0], [1.0, -1.0]])
    pixels = np.asarray(scatter(points, np.array([0, 1, 2]), COLOURS[:3]))
    near, far = round(0.04 * SIDE), round(0.96 * SIDE)  # the plane's second coordinate points upwards
    for (row, column), colour in zip(((far, near), (near, far), (far, far)), COLOURS[:3], strict=True):
        assert np.abs(pixels[row, column].astype(int) - colour).max() < 60
    assert (pixels[SIDE // 2, SIDE // 2] == 255).all()
    assert np.asarray(scatter(np.zeros((2, 2)), np.array([0, 0]), COLOURS)).shape == (SIDE, SIDE, 3)


@pytest.mark.parametrize("panels", [1, 3])
def test_the_picture_holds_all_panels_and_a_legend(panels):
    points, names = np.random.default_rng(0).normal(size=(20, 2)), ["a", "x" * 200, "b\nc"] + ["d"] * 37
    labels = np.arange(20) * 2
    picture = plane_picture([("caption", points)] * panels, labels, names, "title")
    assert picture.dtype == np.uint8 and picture.shape[0] * picture.shape[1] > panels * SIDE**2
    legend = picture[:, MARGIN + panels * (SIDE + MARGIN) :].astype(int) @ (1, 256, 65536)
    assert np.isin(np.array(class_colours(40)) @ (1, 256, 65536), legend).all()


def test_long_names_are_cut_where_they_no_longer_fit():
    assert shortened("short", 20, 300) == "short" and shortened("a\x1b[2J", 20, 300) == r"a\x1b[2J"
    long = shortened("w" * 100, 20, 300)
    assert long.endswith("\u2026") and text_width(long, 20) <= 300
