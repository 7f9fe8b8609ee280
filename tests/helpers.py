"""What several test files need: comparisons that keep a record of how near they came to their bounds."""

from __future__ import annotations

from typing import Any

import numpy as np

# (name of the comparison, error / bound) of every comparison of the running test; conftest.py collects and prints them.
MARGINS: list[tuple[str, float]] = []


def close(actual: Any, reference: Any, bound: float, what: str = "", *, unit: bool = False) -> None:
    """Asserts max |actual - reference| < bound, elementwise over arrays of one shape, and records error / bound.

    Args:
      actual, reference: arrays or numbers; compared in float64. Neither may hold NaN; infinities must be equal.
      bound: what rounding can do, with room: a test whose recorded ratio passes 1/3 on one machine fails on another.
      what: names the comparison in messages and in the record.
      unit: divides both by the root mean square of `reference` first, so that a bound means the same at any scale.
    """
    a, b = np.asarray(actual, np.float64), np.asarray(reference, np.float64)
    assert a.shape == b.shape, f"{what}: shapes {a.shape} and {b.shape}"
    assert not np.isnan(a).any() and not np.isnan(b).any(), f"{what}: NaN"
    scale = float(np.sqrt(np.mean(b**2))) if unit else 1.0
    assert scale > 0, f"{what}: the reference is 0 everywhere"
    error = float(np.max(np.abs(a - b), initial=0.0, where=a != b)) / scale
    MARGINS.append((what, error / bound))
    assert error < bound, f"{what}: differs by {error:.3g}, bound {bound:.3g}"


def relative_norm(actual: Any, reference: Any) -> float:
    """|actual - reference| / |reference| in float64, over all elements: how bf16 is judged."""
    a, b = np.asarray(actual, np.float64), np.asarray(reference, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))
