"""Whether what was computed is what was expected."""

import numpy as np
import torch


def compare(actual, expected, rtol: float, atol: float, share: float = 0.0) -> tuple[float, str]:
    """Largest absolute difference, and what is wrong ('' when every element is within atol + rtol * |expected|).

    ``share``: of the elements may be farther off.
    """
    if not is_numeric(expected):
        same = actual == expected
        return (0.0, "") if same else (float("inf"), f"{str(actual)[:200]} instead of {str(expected)[:200]}")
    actual, expected = _as_array(actual), _as_array(expected)
    if actual.shape != expected.shape:
        return float("inf"), f"shape {actual.shape} instead of {expected.shape}"
    if not expected.size:
        return 0.0, ""
    if expected.dtype == bool or actual.dtype == bool:
        wrong = int((actual != expected).sum())
        return float(wrong > 0), f"{wrong} of {expected.size} differ" if wrong > share * expected.size else ""
    actual, expected = (np.atleast_1d(x).astype(np.float64) for x in (actual, expected))
    difference = np.abs(actual - expected)
    difference[np.isnan(actual) & np.isnan(expected)] = 0.0
    excess = ~(difference <= atol + rtol * np.abs(np.nan_to_num(expected)))
    deviation = float(np.nanmax(difference)) if not np.isnan(difference).all() else float("inf")
    if excess.sum() <= share * excess.size:
        return deviation, ""
    where = np.unravel_index(np.argmax(np.where(excess, np.nan_to_num(difference, nan=np.inf), -1)), difference.shape)
    return deviation, f"{actual[where]!r} instead of {expected[where]!r} at {tuple(map(int, where))}"


def count(expected) -> int:
    """How many values a comparison with it looks at."""
    return _as_array(expected).size if is_numeric(expected) else 1


def is_numeric(value) -> bool:
    """Numbers and truth values in any nesting; a single truth value is taken as it is."""
    if isinstance(value, (str, bool, type(None))):
        return False
    if isinstance(value, (list, tuple, dict)):
        try:
            return np.asarray(value).dtype.kind in "fiub"
        except ValueError:
            return False
    return True


def _as_array(value) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
