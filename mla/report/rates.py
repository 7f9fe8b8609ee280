"""Learning rates that were tried: the best of each family, whether the grid was wide enough, and the curves as a picture."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from mla.report.layout import markdown
from mla.report.plot import STYLES
from mla.report.points import Point, points
from mla.report.rows import RATES_FILE, Row

KEY = "config.optimizer.learning_rate"
FEWEST = 3  # rates of a family that make a curve

Tried = Mapping[str, Sequence[tuple[float, Point]]]


def tried(rows: Sequence[Row]) -> Tried:
    """Family -> its rates, rising, each with its point; empty where no family has several.

    Where some runs only looked for a rate, these; otherwise every row that overrides it.
    """
    searched = [row for row in rows if row.search] or rows
    families: dict[str, list[tuple[float, Point]]] = {}
    for point in points(searched):
        try:
            rate = float(point.rows[0].overrides[KEY])
        except (KeyError, TypeError, ValueError):  # not overridden, or by no number
            continue
        if math.isfinite(rate):
            families.setdefault(point.family, []).append((rate, point))
    if all(len({rate for rate, _ in each}) == 1 for each in families.values()):
        return {}
    return {family: sorted(each, key=lambda pair: pair[0]) for family, each in families.items()}


def section(rows: Sequence[Row]) -> str:
    """The section "Learning rates" of a report; "" where nothing was compared."""
    families = tried(rows)
    if not families:
        return ""
    lines, edges = [["family", "best learning rate", "loss", "tried"]], []
    for family, each in families.items():
        rate, best = min(each, key=lambda pair: pair[1].loss)
        if len(each) > 1 and rate in (each[0][0], each[-1][0]):
            edges.append(family)
        losses = ", ".join(f"{r:g}: {point.loss:.4f}" for r, point in each)
        lines.append([family, f"{rate:g}", f"{best.loss:.4f}", losses])
    parts = ["## Learning rates", markdown(lines, names=1)]
    if any(row.search for row in rows):
        parts.append("Of runs that looked for a rate. The losses above are of others, at the best rate, with other seeds.")
    if curves(families):
        parts.append(f"![loss over learning rate]({RATES_FILE})")
    if edges:
        parts.append(
            f"The best rate is at the edge of the grid for {', '.join(edges)}: widen it before trusting the choice."
        )
    return "\n\n".join(parts)


def curves(families: Tried) -> Tried:
    """Those families that were tried at enough rates for a curve."""
    return {family: each for family, each in families.items() if len({rate for rate, _ in each}) >= FEWEST}


@rc_context({"text.parse_math": False})  # a name may hold a $
def draw(rows: Sequence[Row], path: str | os.PathLike[str]) -> None:
    """Saves the curves as PNG: loss over peak learning rate, a line a family, its best rate filled.

    Args:
      rows: with `curves`.
      path: of the file.
    """
    families = curves(tried(rows))
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, (family, each) in enumerate(families.items()):
        colour, marker, line = STYLES[number % len(STYLES)]
        at, losses = [rate for rate, _ in each], [point.loss for _, point in each]
        best = min(range(len(at)), key=losses.__getitem__)
        style: dict[str, Any] = {"color": colour, "marker": marker, "linestyle": line, "markerfacecolor": "white"}
        axes.plot(at, losses, label=f"{family}, best at {at[best]:g}", **style)
        axes.plot(at[best], losses[best], color=colour, marker=marker)
    every = sorted({rate for each in families.values() for rate, _ in each})
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(every))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:g}"))
    axes.set_xlabel("peak learning rate")
    axes.set_ylabel("loss, nats a token")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150, format="png")
