import numpy as np
import pytest

from evaluation.bars import COLOURS, PLOT, bar_chart, ticks_over


def height(picture: np.ndarray, colour: tuple[int, ...], part: slice) -> int:
    """Of the bar of this colour: rows of its fullest column."""
    return (np.abs(picture[100:, part].astype(int) - colour).sum(axis=2) < 40).sum(axis=0).max()


def test_bars_are_as_high_as_their_values_and_stand_on_zero():
    picture = bar_chart("a title", "and more", ["one", "two"], [("x", "", [4.0, -2.0]), ("y", "", [8.0, None])])
    middle = picture.shape[1] // 2
    ticks = ticks_over(-2.0, 8.0)
    per_unit = PLOT / (ticks[-1] - ticks[0])
    heights = [height(picture, COLOURS[0], slice(0, middle)), height(picture, COLOURS[1], slice(0, middle)),
               height(picture, COLOURS[0], slice(middle, None))]  # fmt: skip
    assert heights == pytest.approx([4 * per_unit, 2 * per_unit, 8 * per_unit], abs=2)
    assert height(picture, COLOURS[1], slice(middle, None)) == 0


@pytest.mark.parametrize(("low", "high"), [(-2.0, 8.0), (0.0, 0.0), (0.0, 137.0), (-0.03, 0.0), (-0.2, 0.01)])
def test_ticks_are_round_hold_zero_and_leave_room(low, high):
    ticks = ticks_over(low, high)
    step = ticks[1] - ticks[0]
    assert any(abs(tick) < 1e-9 for tick in ticks) and ticks[0] <= low and ticks[-1] >= high
    assert len(ticks) <= 10 and float(f"{step:.0e}") == pytest.approx(step)
