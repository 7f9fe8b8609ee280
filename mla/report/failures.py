"""Runs that failed, which a mean over those that did not would hide: not finite, diverged, unsolved, without a result."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

from mla.evaluation import task
from mla.report.points import Point
from mla.report.rows import Row

# What training says at the end of its log.
NOT_FINITE = re.compile(r"^error: step \d+: \w+ is (nan|-?inf), training stops", re.MULTILINE)
LOG_END = 4096  # bytes of a log that are looked at
MOST_NAMED = 8
SOLVED = 0.5  # share of right answers


def diverged(row: Row) -> bool:
    """Whether a model is no better than token frequencies alone."""
    unigram = row.baseline.unigram_perplexity
    return unigram is not None and unigram > 0 and row.loss >= math.log(unigram)


def unsolved(row: Row) -> bool:
    """Whether a model on a synthetic task gets less than half of the answers right even at its easiest level."""
    levels = task.of_row(row).by_level.values()
    return bool(levels) and max(level.accuracy for level in levels) < SOLVED


def without_result(compared: Sequence[Point]) -> list[str]:
    """Runs, as POINT-sSEED, that are not there though other points have their seed."""
    seeds = sorted({row.seed for point in compared for row in point.rows if row.seed is not None})
    missing = []
    for point in compared:
        there = {row.seed for row in point.rows}
        missing += [f"{point.label}-s{seed}" for seed in seeds if seed not in there]
    return missing


def not_finite(places: Sequence[str | os.PathLike[str]], finished: Sequence[str]) -> list[str]:
    """Runs of sweeps whose training stopped at a number that is not finite, by the end of their log.

    Args:
      places: folders of sweeps, with NAME.log of each run, or files in them.
      finished: names of runs that have a result.
    """
    stopped = []
    for place in map(Path, places):
        for log in sorted((place if place.is_dir() else place.parent).glob("*.log")):
            if log.stem not in finished and stopped_at_infinity(log):
                stopped.append(log.stem)
    return stopped


def stopped_at_infinity(log: Path) -> bool:
    """Whether the end of a run's log says that its training stopped at a number that is not finite."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - LOG_END))
            return bool(NOT_FINITE.search(file.read().decode(errors="replace")))
    except OSError:
        return False


def told(compared: Sequence[Point], places: Sequence[str | os.PathLike[str]]) -> str:
    """One line: how many runs failed, how and which.

    Args:
      compared: all points.
      places: where the runs may be; see `not_finite`.
    """
    rows = [row for point in compared for row in point.rows]
    stopped = not_finite(places, [row.run for row in rows])
    worse = [row.run for row in rows if diverged(row)]
    missing = [run for run in without_result(compared) if run not in stopped]
    counts = (
        (stopped, "stopped at a number that is not finite"),
        (worse, "diverged (no better than token frequencies alone)"),
        ([row.run for row in rows if unsolved(row)], f"unsolved (less than {SOLVED:.0%} right at the easiest level)"),
        (missing, "without a result though other points have that seed"),
    )
    failed = sum(len(names) for names, _ in counts)
    if not failed:
        return f"Failures: none of {len(rows)} runs diverged, and no seed is missing."
    parts = [f"{len(names)} {what}: {_some(names)}" for names, what in counts if names]
    return f"Failures: of {len(rows) + len(stopped) + len(missing)} runs, {'; '.join(parts)}."


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more
