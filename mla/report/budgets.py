"""What a budget of cache bytes buys: the lowest loss within it, its mean over budgets, the area below a reference.

Between points nothing is interpolated: no model was trained there. More points in a set never make it worse, so sets that
are compared have equally many; range and reference are fixed before the losses are looked at.

Legend: N points, S seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from mla.report import statistics
from mla.report.statistics import Interval


def lowest(sizes: ArrayLike, losses: ArrayLike, budget: ArrayLike, reference: float) -> np.ndarray:
    """F(b), the lowest loss among the points with at most b bytes, a step function.

    Args:
      sizes, losses: [N], bytes a token and loss of each point.
      budget: b, bytes a token, of any shape.
      reference: the loss where no point is that small, such as that of token frequencies alone.

    Returns:
      float64, of the shape of `budget`.
    """
    held, loss, at = (np.asarray(values, np.float64) for values in (sizes, losses, budget))
    reached = np.where(held <= at[..., None], loss, np.inf).min(axis=-1, initial=np.inf)
    return np.where(np.isinf(reached), reference, reached)


def _steps(sizes: ArrayLike, losses: ArrayLike, low: float, high: float, reference: float) -> tuple[np.ndarray, np.ndarray]:
    """The widths in octaves of the steps of `lowest` between two budgets, and its value on each."""
    if not 0 < low < high:
        raise ValueError(f"from {low} to {high} bytes there are no octaves")
    inside = [size for size in np.unique(np.asarray(sizes, np.float64)) if low < size < high]
    edges = np.array([low, *inside, high])
    return np.diff(np.log2(edges)), lowest(sizes, losses, edges[:-1], reference)


def average(sizes: ArrayLike, losses: ArrayLike, low: float, high: float, reference: float) -> float:
    """FA, the mean of `lowest` over log2 of the budget from `low` to `high`, in nats; see there for the rest."""
    widths, values = _steps(sizes, losses, low, high, reference)
    return float(widths @ values / widths.sum())


def hypervolume(sizes: ArrayLike, losses: ArrayLike, low: float, high: float, reference: float) -> float:
    """The area between the reference and `lowest` where that is below it, over log2 of the budget: nats times octaves."""
    widths, values = _steps(sizes, losses, low, high, reference)
    return float(widths @ np.maximum(0.0, reference - values))


def bytes_for(sizes: ArrayLike, losses: ArrayLike, loss: float) -> float | None:
    """The fewest bytes of a point that reaches a loss; None: none does.

    Args:
      sizes, losses: [N].
      loss: to be reached, such as the MHA model's and .01 nats more.
    """
    enough = np.asarray(sizes, np.float64)[np.asarray(losses, np.float64) <= loss]
    return float(enough.min()) if len(enough) else None


def dominated(sizes: ArrayLike, losses: ArrayLike) -> np.ndarray:
    """Which points another one beats: no more bytes, no more loss, and less of one.

    Args:
      sizes, losses: [N].

    Returns:
      bool [N].
    """
    return np.asarray(_beats(sizes, losses).any(axis=1))


def _beats(sizes: ArrayLike, losses: ArrayLike) -> np.ndarray:
    """bool [N, N]: whether the point of a column beats that of a row."""
    held, loss = np.asarray(sizes, np.float64), np.asarray(losses, np.float64)
    no_more = (held[None] <= held[:, None]) & (loss[None] <= loss[:, None])
    return no_more & ((held[None] < held[:, None]) | (loss[None] < loss[:, None]))


def confidently_dominated(sizes: ArrayLike, runs: ArrayLike, confidence: float = statistics.CONFIDENCE) -> np.ndarray:
    """Which points another one beats by a difference of losses whose paired interval excludes 0.

    Args:
      sizes: [N].
      runs: [N, S], the loss of each point with each seed, S from 2.
      confidence: of the interval.

    Returns:
      bool [N].
    """
    losses = np.asarray(runs, np.float64)
    beaten = _beats(sizes, losses.mean(axis=1))
    for worse, better in np.argwhere(beaten):
        beaten[worse, better] = statistics.paired(losses[worse], losses[better], confidence).low > 0
    return np.asarray(beaten.any(axis=1))


def over_seeds(runs: ArrayLike, of: Callable[[np.ndarray], float]) -> Interval:
    """A number of all points' losses, such as `average`, computed for each seed by itself: its mean and interval.

    Args:
      runs: [N, S]; column i has the losses of seed i.
      of: losses [N] of one seed -> the number.

    Returns:
      The t interval; with a single seed, one without ends (error, low, high and p are NaN).
    """
    values = [of(losses) for losses in np.asarray(runs, np.float64).T]
    if len(values) == 1:
        return Interval(values[0], math.nan, math.nan, math.nan, math.nan, 1)
    return statistics.mean(values)
