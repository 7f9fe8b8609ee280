"""Random choices for many episodes at once. Legend: N rows, one an episode."""

from __future__ import annotations

import numpy as np


def _lowest(scores: np.ndarray, count: int) -> np.ndarray:
    """Columns of the `count` lowest scores of each row, lowest first: [N, P] -> [N, count]."""
    chosen = np.argpartition(scores, count - 1, axis=1)[:, :count]
    order = np.argsort(np.take_along_axis(scores, chosen, 1), axis=1)
    return np.take_along_axis(chosen, order, 1)


def distinct(random: np.random.Generator, rows: int, population: int, count: int) -> np.ndarray:
    """Numbers below `population`, uniform and without replacement, in random order: [N, count]."""
    if count**2 > population:
        return _lowest(random.random((rows, population)), count)
    drawn = random.integers(population, size=(rows, count))
    while (twice := (np.diff(np.sort(drawn, axis=1), axis=1) == 0).any(axis=1)).any():
        drawn[twice] = random.integers(population, size=(int(twice.sum()), count))
    return drawn


def weighted(random: np.random.Generator, rows: int, log_weights: np.ndarray, count: int) -> np.ndarray:
    """Indices drawn one after the other without replacement, with odds exp(log_weights [P]): [N, count] in that order.

    The largest of log-weights with Gumbel noise are that, exactly (Yellott 1977).
    """
    return _lowest(-(log_weights + random.gumbel(size=(rows, len(log_weights)))), count)


def outside(random: np.random.Generator, population: int, taken: np.ndarray, width: int) -> np.ndarray:
    """Numbers below `population`, uniform among those that are not in the row of `taken` [N, K]: [N, width]."""
    rows = len(taken)
    barred = np.zeros((rows, population), bool)
    np.put_along_axis(barred, taken, True, 1)
    drawn = random.integers(population, size=(rows, width))
    while (again := np.take_along_axis(barred, drawn, 1)).any():
        drawn[again] = random.integers(population, size=int(again.sum()))
    return drawn


def scattered(random: np.random.Generator, rows: int, room: int, count: int, size: int) -> np.ndarray:
    """Where blocks of `size` tokens start that lie in `room` tokens and share none, all ways alike: [N, count], sorted."""
    points = np.sort(distinct(random, rows, room - count * (size - 1), count), axis=1)
    return points + np.arange(count) * (size - 1)
