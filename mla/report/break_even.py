"""Break-even lengths: from how many tokens on a cache that starts large holds no more bytes than one that grows faster."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from mla.evaluation.cache_bytes import of_row
from mla.report.layout import markdown
from mla.report.points import Point

MOST_COLUMNS = 8
MARKERS = "os^DvPX*"


def length(constant: float, growth: float, other: float) -> float:
    """Tokens T from which constant + growth T <= other T, a whole number; infinite where there is none.

    constant, growth: bytes of one sequence that are held from the start, and a token; other: those of a cache that starts
    empty, a token.
    """
    return math.ceil(constant / (other - growth)) if other > growth else math.inf


def compared_lengths(compared: Sequence[Point]) -> tuple[list[Point], list[Point]]:
    """Points that hold states or windows, and at most `MOST_COLUMNS` points that grow alone, fewest bytes first.

    Of points with equal growth one is taken, a mechanism as it is where there is one.
    """
    plain = {point.label for point in compared if point.label == point.rows[0].mechanism}
    growing: dict[float, Point] = {}
    caches = [(point, of_row(point.rows[0])) for point in compared]
    for point, cache in sorted(caches, key=lambda pair: (pair[1].bytes_per_token, pair[0].label not in plain)):
        if not cache.constant_bytes and cache.bytes_per_token:
            growing.setdefault(cache.bytes_per_token, point)
    others = list(growing.values())
    if len(others) > MOST_COLUMNS:
        others = [others[round(i * (len(others) - 1) / (MOST_COLUMNS - 1))] for i in range(MOST_COLUMNS)]
    return [point for point, cache in caches if cache.constant_bytes], others


def section(compared: Sequence[Point]) -> str:
    """A table of `compared_lengths`: states and windows against what grows; "" without either.

    Bytes are measured ones, in the dtypes the arrays have: fp32 states beside a bf16 cache count as they are.
    """
    starting, growing = compared_lengths(compared)
    if not growing or not starting:
        return ""
    lines = [["tokens from which no more bytes are held than by", *(point.label for point in growing)]]
    for point in starting:
        cache = of_row(point.rows[0])
        others = (of_row(other.rows[0]).bytes_per_token for other in growing)
        lengths = (length(cache.constant_bytes, cache.bytes_per_token, other) for other in others)
        lines.append([point.label, *("never" if math.isinf(tokens) else f"{tokens:,}" for tokens in lengths)])
    return "## Break-even lengths\n\n" + markdown(lines, names=1)


def draw(axes: Axes, compared: Sequence[Point]) -> None:
    """Bytes of one sequence over its length, both log, of `compared_lengths`: what grows alone is dashed."""
    starting, growing = compared_lengths(compared)
    for line, part in (("-", starting), ("--", growing)):
        for number, point in enumerate(part):
            at = sorted(
                (int(tokens), held) for tokens, held in of_row(point.rows[0]).bytes_at.items() if held and tokens.isdecimal()
            )
            if not at:
                continue
            style = {"color": "#444444", "alpha": 0.75} if line == "--" else {"color": f"C{number % 10}"}
            axes.plot(
                *zip(*at, strict=True), line, marker=MARKERS[number % len(MARKERS)], markersize=4, label=point.label, **style
            )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.set_xlabel("tokens of a text")
    axes.set_ylabel("bytes its cache holds (content, all layers, one sequence)")
    axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0), ncols=1 + (len(starting) > 24))
