"""RandAugment as Mugs has it: what a policy says, what is drawn how often, and what no operation may do."""

import random
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from data.randaugment import (
    INCREASING,
    OPERATIONS,
    UNIFORMS_PER_OPERATION,
    Operation,
    argument,
    carry_out,
    draw_counted,
    draw_generators,
    parse_policy,
)
from randomness import counted_uniforms
from tests.data.helpers import photograph
from utils import UsageError

MUGS = "rand-m9-mstd0.5-inc1"
IMAGES = 3000


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("augmix-m3", "starts with rand"),
        ("", "starts with rand"),
        ("rand-m9-foo", "no part 'foo'"),
        ("rand-m9.5", "no part 'm9.5'"),
        ("rand-mstdinf", "no part 'mstdinf'"),
        ("rand-w1", "no part 'w1'"),
        ("rand-inc", "no part 'inc'"),
        ("rand-p0.3", "no part 'p0.3'"),
        ("rand--m9", "no part ''"),
        ("rand-n16", "16 operations of 15"),
        ("rand-n14-w0", "14 operations of 13"),
    ],
)
def test_a_policy_of_unknown_parts_is_refused_in_one_line(text, said):
    with pytest.raises(UsageError, match=said) as refused:
        parse_policy(text)
    assert f"--timm_auto_augment_par {text}" in str(refused.value) and "\n" not in str(refused.value)


def both(text: str) -> list[list[list[Operation]]]:
    """The operations of many images, from counted numbers and from the generators."""
    policy = parse_policy(text)
    numbers = np.arange(policy.count * UNIFORMS_PER_OPERATION)
    uniforms = counted_uniforms(3, np.arange(IMAGES)[:, None], numbers).tolist()
    random.seed(0), np.random.seed(0)
    return [[draw_counted(policy, u) for u in uniforms], [draw_generators(policy) for _ in range(IMAGES)]]


def within_chance(shares: list[float], expected: float, trials: float = IMAGES) -> bool:
    return np.abs(np.array(shares) - expected).max() <= 4.5 * (expected * (1 - expected) / trials) ** 0.5


def test_every_operation_has_the_same_probability_in_both_families_and_none_comes_twice():
    for drawn in both(MUGS):
        counts = Counter(operation.name for operations in drawn for operation in operations)
        assert set(counts) == set(INCREASING)
        assert within_chance([count / IMAGES for count in counts.values()], 2 / 15 / 2)
        assert within_chance([sum(len(operations) == n for operations in drawn) / IMAGES for n in (0, 2)], 0.25)
        assert all(len({operation.name for operation in operations}) == len(operations) for operations in drawn)
        first = Counter(operations[0].name for operations in drawn if len(operations) == 2)
        assert within_chance([count / first.total() for count in first.values()], 1 / 15, first.total())


def test_levels_signs_and_interpolations_have_the_same_distribution_in_both_families():
    for drawn in both(MUGS):
        angles = np.array([o.argument for operations in drawn for o in operations if o.name == "Rotate"])
        assert within_chance([(angles < 0).mean()], 0.5, len(angles))
        assert abs(np.abs(angles).mean() - 27) < 0.5 and 1.1 < np.abs(angles).std() < 1.7
        moved = [o for operations in drawn for o in operations if o.interpolation]
        assert within_chance([sum(o.interpolation == "bicubic" for o in moved) / len(moved)], 0.5, len(moved))
        assert {o.name for o in moved} == {"Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"}
        levels = [abs(o.argument) / 0.3 * 10 for o in moved if o.name.startswith("Shear")]
        assert within_chance([np.mean(np.array(levels) > 9.999)], 0.023, len(levels))


def test_weights_decide_how_often_an_operation_is_drawn_without_replacement():
    counted, generators = (
        Counter(operation.name for operations in drawn for operation in operations) for drawn in both("rand-w0-n3")
    )
    assert not {"Invert", "Posterize"} & (set(counted) | set(generators))
    for name in OPERATIONS:
        expected = (counted[name] + generators[name]) / 2 / IMAGES
        assert within_chance([counted[name] / IMAGES, generators[name] / IMAGES], expected)
    assert counted["Rotate"] > counted["TranslateXRel"] > 5 * counted["Solarize"]


def test_a_level_without_deviation_is_not_drawn():
    random.seed(7)
    np.random.seed(0)
    draw_generators(parse_policy("rand-m9-n0-mstd1"))
    assert random.random() == random.Random(7).random()
    assert {o.argument for operations in both("rand-m10")[0] for o in operations if o.name == "Posterize"} == {4}


def test_no_bits_are_black_and_stop_no_run():
    image = Image.fromarray(photograph(0, 12, 16))
    black = Operation("PosterizeIncreasing", argument("PosterizeIncreasing", 10.0))
    assert black.argument == 0 and not np.asarray(carry_out(image, black)).any()
