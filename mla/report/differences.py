"""Differences of losses against baselines that are named in advance, with intervals, and what byte budgets buy."""

from __future__ import annotations

import dataclasses
import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mla.evaluation.perplexity import Documents
from mla.evaluation.perplexity import of_row as quality_of
from mla.report import budgets, failures
from mla.report.compute import training_flops
from mla.report.layout import markdown
from mla.report.points import Point
from mla.report.rows import Row
from mla.report.statistics import (
    CONFIDENCE,
    POWER,
    RESAMPLES,
    Interval,
    concordance,
    holm,
    paired,
    percentiles,
    resampled_ratios,
    seeds_needed,
    smallest_effect,
    unpaired,
)

MATTERS = 0.01  # nats: a smaller difference is not worth a claim
FEWEST_POINTS = 3  # of a frontier


@dataclasses.dataclass(frozen=True, eq=False)
class Comparison:
    """A point against a baseline.

    Attributes:
      point, baseline: the two.
      pairs: their paired difference, over the seeds that both have.
      apart: the same as two independent samples.
      p: of the paired difference, adjusted for all comparisons of the list.
      sample: the percentile interval of the difference, for the models as they are, over documents drawn anew; None where
        the rows do not tell documents apart.
    """

    point: Point
    baseline: Point
    pairs: Interval
    apart: Interval
    p: float
    sample: tuple[float, float] | None = None

    @property
    def resolved(self) -> bool:
        """Whether the adjusted test tells the two apart."""
        return self.p < 1 - CONFIDENCE

    @property
    def verdict(self) -> str:
        """What the comparison says, in words."""
        near = self.pairs.within(MATTERS)
        if self.resolved:
            return ("worse" if self.pairs.value > 0 else "better") + (f", by less than {MATTERS:g}" if near else "")
        return "not resolved" + (f", less than {MATTERS:g} apart" if near else "")


def _text_of(row: Row) -> tuple[object, ...]:
    """What a row was evaluated on: losses on other texts are not compared."""
    return row.corpus and (row.corpus.sha256, row.corpus.tokenizer, row.corpus.split), row.context


def matched(compared: Sequence[Point]) -> np.ndarray:
    """Losses of several points over the seeds that all of them have, on one text.

    Returns:
      float64 [points, seeds]; no seeds where there are none in common, or where texts differ.
    """
    if len({_text_of(row) for point in compared for row in point.rows}) > 1:
        return np.zeros((len(compared), 0))
    of_seed = [{row.seed: row.loss for row in point.rows if row.seed is not None} for point in compared]
    common = sorted(set.intersection(*map(set, of_seed))) if of_seed else []
    return np.array([[losses[seed] for seed in common] for losses in of_seed], np.float64).reshape(len(compared), -1)


def comparisons(compared: Sequence[Point], against: Sequence[str]) -> list[Comparison]:
    """Every point against every baseline, each pair once; those with less than two seeds in common are left out.

    Args:
      compared: all points.
      against: labels of points, named before the losses were looked at; those that are not there are left out.
    """
    baselines = [point for name in against for point in compared if point.label == name]
    pairs = [(p, b) for number, b in enumerate(baselines) for p in compared if p not in baselines[: number + 1]]
    enough = [(point, baseline, runs) for point, baseline in pairs if (runs := matched([point, baseline])).shape[1] > 1]
    intervals = [paired(*runs) for _, _, runs in enough]
    adjusted = holm([interval.p for interval in intervals])
    drawn = _resampled(list(dict.fromkeys(point for pair in enough for point in pair[:2])))
    return [
        Comparison(point, baseline, interval, unpaired(*runs), p, _sample(drawn, point, baseline))
        for (point, baseline, runs), interval, p in zip(enough, intervals, adjusted, strict=True)
    ]


def _agreement(compared: Sequence[Point]) -> str:
    """A line on how far seeds agree on the order of the points; "" for fewer than `FEWEST_POINTS`."""
    runs = matched(compared)
    if min(runs.shape) < 2 or len(runs) < FEWEST_POINTS:
        return ""
    agreement, spread = concordance(runs), float(np.median(np.std(runs, axis=1, ddof=1)))
    if math.isnan(agreement):
        return ""
    return (
        f"Order: Kendall's W of the {runs.shape[1]} seeds over the {len(runs)} points is {agreement:.3f} (1: the same order"
        f" in each, 0: none in common); the median deviation of a point's seeds is {spread:.4f} nats, the losses span"
        f" {float(np.ptp(runs.mean(axis=1))):.4f}."
    )


def _by_document(point: Point) -> np.ndarray | None:
    """Tokens and nats by document, [2, N], the mean over the rows; None where a row does not say, or of another N."""
    each = [documents for row in point.rows if (documents := quality_of(row).documents) and _whole(documents)]
    if len(each) < len(point.rows) or len({len(documents.tokens) for documents in each}) != 1:
        return None
    return np.mean([(documents.tokens, documents.nats) for documents in each], axis=0)


def _whole(documents: Documents) -> bool:
    return len(documents.tokens) == len(documents.nats) and min(documents.tokens, default=0) > 0


def _resampled(compared: Sequence[Point]) -> dict[Point, np.ndarray]:
    """Losses of points, [B], on the same resamples of the documents: of those on the text of the first that says."""
    sums = {point: documents for point in compared if (documents := _by_document(point)) is not None}
    if not sums:
        return {}
    first = next(iter(sums))
    text, tokens = _text_of(first.rows[0]), sums[first][0]
    same = [
        point
        for point, documents in sums.items()
        if _text_of(point.rows[0]) == text and np.array_equal(documents[0], tokens) and len(tokens) > 1
    ]
    losses = resampled_ratios([sums[point][1] for point in same], tokens) if same else np.zeros((0, 0))
    return dict(zip(same, losses.T, strict=True))


def _sample(drawn: Mapping[Point, np.ndarray], point: Point, baseline: Point) -> tuple[float, float] | None:
    """The interval of the difference of two points on the same resamples."""
    return percentiles(drawn[point] - drawn[baseline]) if point in drawn and baseline in drawn else None


def section(compared: Sequence[Point], against: Sequence[str], places: Sequence[str | os.PathLike[str]] = ()) -> str:
    """The section "Differences" of a report, and "Frontier" below it; "" where no point has two seeds.

    Args:
      compared: all points.
      against: see `comparisons`.
      places: where failed runs may have left logs; see `failures.told`.
    """
    if max(len(point.rows) for point in compared) < 2:
        return ""
    parts = ["## Differences"]
    listed = comparisons(compared, against)
    if listed:
        parts += [_table(listed), _told(listed)]
    else:
        parts.append(
            f"No baseline: no point called {' or '.join(against)} has two seeds in common with another one. `mla report PATH"
            " --against=POINT,..` names other points."
        )
    parts += [_agreement(compared), failures.told(compared, places), frontier(compared, against)]
    return "\n\n".join(part for part in parts if part)


def _table(listed: Sequence[Comparison]) -> str:
    spent = {point: training_flops(point.rows[0]) for c in listed for point in (c.point, c.baseline)}

    def ratio(c: Comparison) -> str:
        own, base = spent[c.point], spent[c.baseline]
        return f"{own / base:.2f}" if own and base else ""

    header = ["point", "against", "seeds", "difference", "± paired", "± unpaired", "rho", "p, Holm", "FLOPs", "verdict"]
    sampled = any(c.sample for c in listed)
    if sampled:
        header.insert(-1, "documents")
    lines = [header]
    for c in listed:
        rho = "" if c.pairs.rho is None else f"{c.pairs.rho:.2f}"
        cells = [c.point.label, c.baseline.label, f"{c.pairs.runs}", f"{c.pairs.value:+.4f}", f"{c.pairs.half:.4f}"]
        interval = "" if c.sample is None else f"{c.sample[0]:+.4f} to {c.sample[1]:+.4f}"
        told = [f"{c.apart.half:.4f}", rho, f"{c.p:.4f}", ratio(c), *([interval] if sampled else []), c.verdict]
        lines.append([*cells, *told])
    return markdown(lines)


def _told(listed: Sequence[Comparison]) -> str:
    seeds, resolved = min(c.pairs.runs for c in listed), sum(c.resolved for c in listed)
    text = (
        "Loss minus the baseline's, nats a token, of runs that share a seed and so the order of the data;"
        f" ±: {CONFIDENCE:.0%} t intervals, paired and as if unpaired (Welch); rho: correlation of the pairs; p: paired t"
        f" test, Holm over these {len(listed)} comparisons; FLOPs: of a training step, over the baseline's. {resolved} of"
        f" {len(listed)} are resolved at {1 - CONFIDENCE:.0%}. Pairs chosen after a look at the losses are exploration."
    )
    if any(c.sample for c in listed):
        text += (
            f" documents: {CONFIDENCE:.0%} percentile interval over {RESAMPLES:,} draws of the evaluated documents with"
            " replacement, both models on the same ones: what other texts would change, not other seeds."
        )
    sd = statistics.median(c.pairs.error * math.sqrt(c.pairs.runs) for c in listed)
    if not sd:
        return text
    try:  # pairs that correlate by .5 deviate as one run does
        needed = f"take {seeds_needed(MATTERS, sd, rho=0.5)} seeds"
    except ValueError:
        needed = "are out of reach"
    smallest = smallest_effect(seeds, pairs=True) * sd
    return (
        f"{text} At the median deviation of such differences, {sd:.4f}, {seeds} pairs resolve {smallest:.2g} nats with a"
        f" chance of {POWER:.0%}, before Holm; {MATTERS:g} nats {needed}."
    )


def frontier(compared: Sequence[Point], against: Sequence[str]) -> str:
    """FA, hypervolume and iso-loss bytes of all points, and of each family with `FEWEST_POINTS` or more.

    "" where there is no reference, or too few points have a seed in common.

    The range of bytes is that of all points, which is known before anything is trained; the reference is the loss of token
    frequencies alone.
    """
    unigrams = {row.baseline.unigram_perplexity for point in compared for row in point.rows}
    sizes = np.array([point.cache_bytes for point in compared])
    held = sizes[sizes > 0]
    unigram = unigrams.pop() if len(unigrams) == 1 else None
    if not unigram or len(held) < 1 or held.min() >= held.max():
        return ""
    low, high, reference = float(held.min()), float(held.max()), math.log(unigram)
    families = list(dict.fromkeys(point.family for point in compared))
    sets = {"all points": list(compared)} | {name: [p for p in compared if p.family == name] for name in families}
    sets = {name: members for name, members in sets.items() if len(members) >= FEWEST_POINTS}
    baseline = next((point for name in against for point in compared if point.label == name), None)
    header = ["points", "number", "seeds", "FA", "hypervolume"]
    if baseline:
        header.append(f"B/token for the loss of {baseline.label} + {MATTERS:g}")
    lines = [header]
    for name, members in sets.items():
        runs, at = matched(members), np.array([point.cache_bytes for point in members])
        if not runs.shape[1]:
            continue

        def over(of: Callable[..., float], runs: np.ndarray = runs, at: np.ndarray = at) -> str:
            return _with_error(budgets.over_seeds(runs, lambda losses: of(at, losses, low, high, reference)))

        line = [name, f"{len(members)}", f"{runs.shape[1]}", over(budgets.average), over(budgets.hypervolume)]
        if baseline:
            fewest = budgets.bytes_for(at, [point.loss for point in members], baseline.loss + MATTERS)
            line.append("" if fewest is None else f"{fewest:,.6g}")
        lines.append(line)
    if len(lines) == 1:
        return ""
    text = (
        f"FA: mean over log2 of the budget, {low:,.6g} to {high:,.6g} B/token as in the picture"
        f" ({math.log2(high / low):.2f} octaves), of the lowest loss within it, and of that of token frequencies"
        f" ({reference:.4f}) where no point fits; hypervolume: the area below that reference, nats x octaves. Of each seed"
        " by itself, mean ± standard error. Sets of more points do better by that alone."
    )
    return "\n\n".join(["## Frontier", markdown(lines, names=1), text, _dominated(compared)]).rstrip()


def _dominated(compared: Sequence[Point]) -> str:
    """A line about points that others beat."""
    runs = matched(compared)
    if runs.shape[1] < 2:
        return ""
    sizes, names = [point.cache_bytes for point in compared], [point.label for point in compared]
    surely = budgets.confidently_dominated(sizes, runs)
    only = budgets.dominated(sizes, runs.mean(axis=1)) & ~surely
    parts = []
    for beaten, what in ((surely, "by a paired interval that excludes 0"), (only, "in the mean alone")):
        if beaten.any():
            parts.append(f"{what}: {', '.join(name for name, is_it in zip(names, beaten, strict=True) if is_it)}")
    return f"Dominated (another point has no more bytes and less loss) {'; '.join(parts)}." if parts else ""


def _with_error(interval: Interval) -> str:
    return f"{interval.value:.4f}" + ("" if math.isnan(interval.error) else f" ± {interval.error:.4f}")
