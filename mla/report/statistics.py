"""Statistics of comparisons: intervals, paired differences, resampled documents, Holm's correction, seeds needed.

Three noises are told apart. Of training: what another seed changes, by the t intervals of `mean`, `paired` and `unpaired`.
Of the evaluated sample, for models as they are: `resampled_ratios` of documents. Of selection: `best_of_bias`.

Legend: N runs or documents, M models, B resamples.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy import special
from scipy.stats import rankdata

CONFIDENCE = 0.95
POWER = 0.8
RESAMPLES = 10_000
MOST_SEEDS = 100_000  # beyond which `seeds_needed` does not look
_PART = 2**22  # numbers of resampled counts that exist at once


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean, or a difference of two, with its t interval.

    Attributes:
      value, error: the mean and its standard error.
      low, high: the ends of the interval.
      p: two-sided, of the hypothesis that the true value is 0.
      runs: how many values, or pairs of values, it is of; of two independent samples those of the smaller one.
      rho: correlation of the pairs; None where there are none, or where the values of a side do not differ.
    """

    value: float
    error: float
    low: float
    high: float
    p: float
    runs: int
    rho: float | None = None

    @property
    def half(self) -> float:
        """Half the width of the interval."""
        return (self.high - self.low) / 2

    def within(self, limit: float) -> bool:
        """Whether the whole interval lies in [-limit, limit]: larger effects are excluded."""
        return -limit <= self.low and self.high <= limit


def _interval(value: float, error: float, degrees: float, confidence: float, runs: int) -> Interval:
    """The t interval of a value whose standard error has been estimated with some degrees of freedom."""
    half = float(special.stdtrit(degrees, (1 + confidence) / 2)) * error
    if error:
        p = float(2 * special.stdtr(degrees, -abs(value) / error))
    else:
        p = 1.0 if value == 0 else 0.0
    return Interval(value, error, value - half, value + half, p, runs)


def _runs(values: ArrayLike, name: str) -> np.ndarray:
    """float64 [N], N from 2. Raises ValueError for others."""
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or len(array) < 2:
        raise ValueError(f"{name} has shape {array.shape}: a standard error takes a line of at least 2 values")
    return array


def mean(values: ArrayLike, confidence: float = CONFIDENCE) -> Interval:
    """The mean of N runs with its t interval of N - 1 degrees of freedom.

    Args:
      values: [N], N from 2.
      confidence: the share of such intervals that hold the true mean.
    """
    array = _runs(values, "values")
    error = float(np.std(array, ddof=1)) / math.sqrt(len(array))
    return _interval(float(np.mean(array)), error, len(array) - 1, confidence, len(array))


def paired(a: ArrayLike, b: ArrayLike, confidence: float = CONFIDENCE) -> Interval:
    """The mean of a - b over runs that share a seed, with the t interval of the differences and their correlation.

    Args:
      a, b: [N], N from 2; run i of both has the same order of the data.
      confidence: as of `mean`.
    """
    first, second = _runs(a, "a"), _runs(b, "b")
    if len(first) != len(second):
        raise ValueError(f"a has {len(first)} runs and b {len(second)}: pairs take as many")
    of_differences = mean(first - second, confidence)
    varied = np.ptp(first) > 0 and np.ptp(second) > 0
    return dataclasses.replace(of_differences, rho=float(np.corrcoef(first, second)[0, 1]) if varied else None)


def unpaired(a: ArrayLike, b: ArrayLike, confidence: float = CONFIDENCE) -> Interval:
    """The difference of two means of independent runs, with Welch's interval: the variances may differ.

    Args:
      a: [N], N from 2.
      b: [N'], N' from 2.
      confidence: as of `mean`.
    """
    first, second = _runs(a, "a"), _runs(b, "b")
    parts = np.array([np.var(side, ddof=1) / len(side) for side in (first, second)])
    below = sum(part**2 / (len(side) - 1) for part, side in zip(parts, (first, second), strict=True))
    degrees = float(parts.sum() ** 2 / below) if below else float(len(first) + len(second) - 2)
    value, error = float(np.mean(first) - np.mean(second)), math.sqrt(parts.sum())
    return _interval(value, error, degrees, confidence, min(len(first), len(second)))


def resampled_ratios(sums: ArrayLike, counts: ArrayLike, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Ratios of sums over N documents that are drawn with replacement, the same ones for all models.

    Tokens of a document are not independent, so documents are drawn. Nats over tokens give losses, nats / ln 2 over bytes
    bits a byte, correct answers over questions an accuracy.

    Args:
      sums: [M, N], what each model has of each document, such as nats.
      counts: [N], or [M, N] where models count differently, such as tokens; above 0.
      resamples: B.
      seed: of the draws.

    Returns:
      float64 [B, M].
    """
    above = np.asarray(sums, np.float64)
    below = np.broadcast_to(np.asarray(counts, np.float64), above.shape)
    documents = above.shape[1]
    generator, parts = np.random.default_rng(seed), []
    step = max(1, _PART // documents)
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        drawn = generator.multinomial(documents, np.full(documents, 1 / documents), size=size).astype(np.float64)
        parts.append((drawn @ above.T) / (drawn @ below.T))
    return np.concatenate(parts)


def percentiles(samples: ArrayLike, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The percentile interval of a bootstrap.

    Args:
      samples: [B], the resampled statistic, such as one model's ratio or the difference of two of `resampled_ratios`.
      confidence: the share of the samples that lie in it.
    """
    low, high = np.quantile(np.asarray(samples, np.float64), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def holm(p: Sequence[float]) -> list[float]:
    """Adjusted p values of all comparisons of a list, by Holm (1979): one below a level is rejected at that level, and the
    chance that any true hypothesis of the list is rejected is at most the level.

    Args:
      p: of each comparison that was named in advance, in any order.
    """
    adjusted, least = [0.0] * len(p), 0.0
    for rank, index in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        least = max(least, min(1.0, (len(p) - rank) * p[index]))
        adjusted[index] = least
    return adjusted


def concordance(losses: ArrayLike) -> float:
    """Kendall's W: how far N seeds agree on the order of M models, from 0, not at all, to 1, the same order in each.

    Ties share their ranks, with the correction for them (Kendall 1945); NaN where every seed ties all models.

    Args:
      losses: [M, N], M and N from 2.
    """
    ranks = rankdata(np.asarray(losses, np.float64), axis=0)
    models, seeds = ranks.shape
    spread = float(np.sum((ranks.sum(axis=1) - seeds * (models + 1) / 2) ** 2))
    ties = sum(float(np.sum(count**3 - count)) for run in ranks.T for count in [np.unique(run, return_counts=True)[1]])
    most = (seeds**2 * (models**3 - models) - seeds * ties) / 12
    return spread / most if most else math.nan


def best_of_bias(runs: int) -> float:
    """By how many standard deviations the expected best of equal runs is better than their mean: what choosing among so
    many learning rates, checkpoints or seeds makes up.

    Args:
      runs: from 1.
    """
    x = np.linspace(-12.0, 12.0, 24_001)
    below = special.ndtr(x) ** runs  # the largest of them is below x
    return float(x[-1] - np.trapezoid(below, x))  # its mean, by parts


def power(effect: float, sd: float, runs: int, pairs: bool = False, level: float = 1 - CONFIDENCE) -> float:
    """The chance that a two-sided t test resolves a difference.

    Args:
      effect: the true difference, above 0.
      sd: of one run; with `pairs`, of the differences.
      runs: of each side, from 2.
      pairs: whether runs are compared pair by pair; otherwise as two independent samples.
      level: of the test.
    """
    degrees = runs - 1 if pairs else 2 * runs - 2
    shift = effect / sd * math.sqrt(runs if pairs else runs / 2)
    limit = special.stdtrit(degrees, 1 - level / 2)
    below = np.nan_to_num(special.nctdtr(degrees, shift, -limit))  # far in that tail scipy has no number for what is 0
    return float(1 - special.nctdtr(degrees, shift, limit) + below)


def seeds_needed(effect: float, sd: float, rho: float | None = None, comparisons: int = 1, chance: float = POWER) -> int:
    """Runs of each side that resolve a difference at the 5 % level.

    Args:
      effect: the true difference, above 0.
      sd: of one run over seeds, above 0.
      rho: correlation of runs that share a seed, below 1, for pairs; None: two independent samples.
      comparisons: among which the level is divided (Bonferroni).
      chance: the power that is asked for.

    Raises:
      ValueError: more than `MOST_SEEDS`.
    """
    of = sd if rho is None else sd * math.sqrt(2 * (1 - rho))

    def enough(runs: int) -> bool:
        return power(effect, of, runs, rho is not None, (1 - CONFIDENCE) / comparisons) >= chance

    low, high = 1, 2  # more runs never resolve less
    while not enough(high):
        low, high = high, 2 * high
        if high > MOST_SEEDS:
            raise ValueError(f"a difference of {effect} takes more than {low:,} seeds at a deviation of {sd}")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def smallest_effect(runs: int, pairs: bool = False, comparisons: int = 1, chance: float = POWER) -> float:
    """The least difference that so many runs of each side resolve at the 5 % level, in standard deviations of a run, or with
    `pairs` of the differences.

    Args:
      runs: from 2.
      pairs, comparisons, chance: as of `power` and `seeds_needed`.
    """

    def enough(effect: float) -> bool:
        return power(effect, 1.0, runs, pairs, (1 - CONFIDENCE) / comparisons) >= chance

    low, high = 0.0, 1.0
    while not enough(high):
        low, high = high, 1.5 * high
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
