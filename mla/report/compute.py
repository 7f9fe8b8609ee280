"""Loss for compute: losses of runs at equal tokens, equal time and equal training FLOPs, read off their training curves.

A curve is smoothed by running means over a tenth of the logged steps (at least `FEWEST_STEPS`), of losses and tokens alike,
so that it does not lag; between these means it is linear, and beyond the last one it is not read. Seconds are tokens over
the median of the logged rates, without compilation and pauses. What is read before the end of a run was trained with a
learning rate that had yet to fall.

Legend: L logged steps.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from mla import config as configs
from mla import flops
from mla import model as models
from mla.data.tokenizers import ByteTokenizer
from mla.errors import UserError
from mla.report.layout import markdown
from mla.report.points import Point
from mla.report.rows import Row
from mla.training.logs import read_metrics

SMOOTHED = 0.1  # of the logged steps
FEWEST_STEPS = 3
# Of Marin's speedups (github.com/marin-community/marin): the loss that no compute removes, nats a token, and the exponent of
# the rest over compute. They are of its data and of a tokenizer of subwords, and say nothing about losses of a byte.
FLOOR = 1.6
EXPONENT = 0.094


@dataclasses.dataclass(frozen=True, eq=False)
class Curve:
    """The training loss of a run.

    Attributes:
      tokens, losses: float64 [L], smoothed; tokens ascend.
      rate: tokens a second while it trained, the median of those logged.
    """

    tokens: np.ndarray
    losses: np.ndarray
    rate: float

    def at(self, tokens: float) -> float | None:
        """The loss after so many tokens; None where the curve does not reach."""
        if not self.tokens[0] <= tokens <= self.tokens[-1]:
            return None
        return float(np.interp(tokens, self.tokens, self.losses))


def smoothed(lines: Sequence[Mapping[str, Any]]) -> Curve | None:
    """The curve of the lines of a metrics.jsonl, in order; None where they are too few.

    Args:
      lines: each with tokens, loss and tokens_per_second; others are left out.
    """
    keys = ("tokens", "loss", "tokens_per_second")
    values = np.array([[line[key] for key in keys] for line in lines if all(key in line for key in keys)], np.float64)
    width = max(FEWEST_STEPS, round(SMOOTHED * len(values)))
    if len(values) <= width:
        return None
    tokens, losses = (np.convolve(values[:, column], np.full(width, 1 / width), mode="valid") for column in (0, 1))
    rate = float(np.median(values[1:, 2]))  # the first may have a compilation in it
    return Curve(tokens, losses, rate) if rate > 0 else None


def speedup(loss: float, base: float, throughput: float, floor: float = FLOOR, exponent: float = EXPONENT) -> float | None:
    """How many times less time a model needs for the baseline's loss, if loss - floor goes with compute to the power of
    -exponent (Marin's effective speedup).

    Args:
      loss, base: of the model and of the baseline after equally many tokens, nats a token.
      throughput: tokens a second of the model over those of the baseline.
      floor, exponent: see `FLOOR` and `EXPONENT`.

    Returns:
      None where a loss is not above the floor: the law says nothing there.
    """
    if min(loss, base) <= floor:
        return None
    return ((loss - floor) / (base - floor)) ** (-1 / exponent) * throughput


def training_flops(row: Row) -> float | None:
    """FLOPs of a training step for each of its tokens, by formula (`mla.flops`), of the model that a row's config describes.

    None where the row has no config, or that of another version.
    """
    try:
        config = configs.from_dict(row.json["config"])
        tables = 1 if config.model.tie_embeddings else 2
        vocab_size, left = divmod(int(row.json["params"]["embedding"]), config.model.d_model * tables)
        if left or vocab_size < 1:
            return None
        configs.validate(config)
        return flops.training(nnx.eval_shape(functools.partial(models.create, config, vocab_size)), config.context)
    except (UserError, KeyError, TypeError, ValueError, AttributeError, OverflowError):
        return None


def folder_of(run: str, places: Sequence[str | os.PathLike[str]]) -> Path | None:
    """The folder of a run; None where it is not there.

    Args:
      run: its name.
      places: folders of sweeps, with a folder a run, folders of runs, or files in either.
    """
    for place in map(Path, places):
        place = place if place.is_dir() else place.parent
        if (place / run).is_dir():
            return place / run
        if place.absolute().name == run:
            return place
    return None


def curves(point: Point, places: Sequence[str | os.PathLike[str]]) -> list[Curve]:
    """The curves of a point's runs; empty unless all of them are there.

    Raises:
      UserError: see `read_metrics`.
    """
    folders = [folder_of(row.run, places) for row in point.rows]
    read = [smoothed(read_metrics(folder)) if folder else None for folder in folders]
    return [curve for curve in read if curve] if all(read) else []


@dataclasses.dataclass(frozen=True, eq=False)
class _Trained:
    """A point with its curves.

    Attributes:
      rate: tokens a second, the median over its runs.
      flops: of a training step for each of its tokens; None: not known.
    """

    point: Point
    curves: list[Curve]
    rate: float
    flops: float | None

    @property
    def end(self) -> float:
        """Tokens to which all its curves reach."""
        return min(float(curve.tokens[-1]) for curve in self.curves)

    def at(self, tokens: float) -> float | None:
        """Mean loss over its runs after so many tokens; None where a curve does not reach."""
        losses = [loss for curve in self.curves if (loss := curve.at(tokens)) is not None]
        return statistics.fmean(losses) if len(losses) == len(self.curves) else None


def section(compared: Sequence[Point], places: Sequence[str | os.PathLike[str]], against: Sequence[str]) -> str:
    """Losses at equal tokens, time and training FLOPs, and the effective speedup; "" for less than two points with curves.

    Args:
      compared: all points; those whose runs are not in `places` are left out.
      places: see `folder_of`.
      against: labels of points; the first that has curves is the one of the speedup, on text that is not of bytes.
    """
    trained = []
    for point in compared:
        if of_runs := curves(point, places):
            rate = statistics.median(curve.rate for curve in of_runs)
            trained.append(_Trained(point, of_runs, rate, training_flops(point.rows[0])))
    if len(trained) < 2:
        return ""
    tokens, seconds = min(t.end for t in trained), min(t.end / t.rate for t in trained)
    known = all(t.flops for t in trained)
    spent = min(t.end * (t.flops or 0.0) for t in trained)
    subwords = all(row.corpus and row.corpus.tokenizer != ByteTokenizer.name for point in compared for row in point.rows)
    base = next((t for name in against for t in trained if t.point.label == name and subwords), None)
    header = ["point", "training MFLOPs/token", "training tok/s", f"at {tokens:,.0f} tokens", f"at {seconds:,.3g} s"]
    header += [f"at {spent:.3g} FLOPs"] * known + ([f"speedup over {base.point.label}"] if base else [])
    lines = [header]
    for t in trained:
        line = [t.point.label, f"{t.flops / 1e6:,.4g}" if t.flops else "", f"{t.rate:,.0f}"]
        line += [_text(t.at(tokens)), _text(t.at(seconds * t.rate))]
        line += [_text(t.at(spent / t.flops))] if known and t.flops else []
        if base:
            gain = speedup(t.point.loss, base.point.loss, t.rate / base.rate)
            line.append("" if gain is None else f"{gain:.2f}")
        lines.append(line)
    told = (
        "Training losses, running means over a tenth of the logged steps, where the first of these curves ends:"
        f" {tokens:,.0f} tokens, {seconds:,.3g} s at the median of the logged tokens a second (of the device as it was,"
        " whatever else ran on it)"
        + (f", {spent:.3g} FLOPs by formula" if known else "")
        + ". Of curves that go on from there, the learning rate had yet to fall."
    )
    if base:
        told += (
            f" Speedup: ((loss - {FLOOR:g}) / (that of {base.point.label} - {FLOOR:g})) ^ (-1 / {EXPONENT:g}) x the ratio of"
            f" tokens a second, with evaluated losses and Marin's constants; empty below {FLOOR:g} nats."
        )
    return f"## Loss for compute\n\n{markdown(lines, names=1)}\n\n{told}"


def _text(loss: float | None) -> str:
    return "" if loss is None else f"{loss:.4f}"
