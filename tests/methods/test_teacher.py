import argparse

import numpy as np
import pytest

from methods.teacher import (
    add_following_arguments,
    add_temperature_arguments,
    check_following_arguments,
    check_temperature_arguments,
    temperatures,
)
from utils import Parser, UsageError


def options(*argv: str) -> argparse.Namespace:
    """As of a method with two losses, one of which has a temperature of its own."""
    parser = Parser()
    parser.add_argument("--epochs", type=int, default=4)
    group = parser.add_argument_group("the method")
    add_following_arguments(group)
    add_temperature_arguments(group)
    add_temperature_arguments(group, "group_")
    return parser.parse_args(list(argv))


def test_a_prefix_gives_a_loss_its_own_temperature():
    args = options("--group_warmup_teacher_temp", "0.1", "--group_warmup_teacher_temp_epochs", "2")
    for prefix in ("", "group_"):
        check_temperature_arguments(args, prefix)
    assert np.allclose(temperatures(args), [0.04, 0.04, 0.04, 0.04])
    assert np.allclose(temperatures(args, "group_"), [0.1, 0.04, 0.04, 0.04])


def test_a_method_without_temperatures_checks_what_follows_alone():
    parser = Parser()
    add_following_arguments(parser.add_argument_group("the method"))
    args = parser.parse_args([])
    check_following_arguments(args)
    assert sorted(vars(args)) == ["freeze_last_layer", "momentum_teacher", "norm_last_layer"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--group_teacher_temp 0", "--group_teacher_temp 0.0: a temperature must be positive"),
        ("--group_warmup_teacher_temp nan", "--group_warmup_teacher_temp nan: a temperature must be positive"),
        ("--group_warmup_teacher_temp_epochs 5", "--group_warmup_teacher_temp_epochs 5 is longer than --epochs 4"),
        ("--group_warmup_teacher_temp_epochs -1", "--group_warmup_teacher_temp_epochs -1: must not be negative"),
    ],
)
def test_a_temperature_that_cannot_work_is_refused_under_its_own_name(argv, message):
    args = options(*argv.split())
    check_temperature_arguments(args)
    with pytest.raises(UsageError, match=message):
        check_temperature_arguments(args, "group_")
