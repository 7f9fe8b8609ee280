"""Loss by position in whole documents, drawn beside the frontier; see `mla.evaluation.stream`."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from mla.evaluation.stream import of_row
from mla.report.points import Point

STYLES = ("-", "--", "-.", ":")  # one for each turn through ten colours


def streamed(compared: Sequence[Point]) -> list[Point]:
    """Points that have losses by position."""
    return [point for point in compared if all(of_row(row) for row in point.rows)]


def draw(axes: Axes, compared: Sequence[Point]) -> None:
    """Mean loss over the middles of bins (log), of `streamed`; a dotted line at the context of training."""
    contexts = set()
    for number, point in enumerate(streamed(compared)):
        contexts |= {row.config.context for row in point.rows if row.config.context}
        bins = [of_row(row) for row in point.rows]
        shared = [stop for stop in bins[0] if all(stop in each for each in bins)]
        middles = [math.sqrt(max(bins[0][stop].start, 1) * int(stop)) for stop in shared]
        means = [sum(each[stop].loss for each in bins) / len(bins) for stop in shared]
        line = STYLES[number // 10 % len(STYLES)]
        axes.plot(middles, means, line, color=f"C{number % 10}", marker="o", markersize=3, label=point.label)
    for context in contexts:
        axes.axvline(context, color="#444444", linestyle=":", linewidth=0.9)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.set_xlabel("position in a document, all of it before through one cache (dotted: the context of training)")
    axes.set_ylabel("loss, nats a token")
    axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0), ncols=1 + (len(compared) > 24))
