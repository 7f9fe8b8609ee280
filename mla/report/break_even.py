"""Break-even lengths: from how many tokens on a cache that starts large holds no more bytes than one that grows faster."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mla.evaluation.cache_bytes import of_row
from mla.report.layout import markdown
from mla.report.points import Point

MOST_COLUMNS = 8


def length(constant: float, growth: float, other: float) -> float:
    """Tokens T from which constant + growth T <= other T, a whole number; infinite where there is none.

    constant, growth: bytes of one sequence that are held from the start, and a token; other: those of a cache that starts
    empty, a token.
    """
    return math.ceil(constant / (other - growth)) if other > growth else math.inf


def section(compared: Sequence[Point]) -> str:
    """A table: points that hold states or windows against points that grow alone, one of each growth; "" without either.

    Bytes are measured ones, in the dtypes the arrays have: fp32 states beside a bf16 cache count as they are.
    """
    held = {point.label: of_row(point.rows[0]) for point in compared}
    plain = {point.label for point in compared if point.label == point.rows[0].mechanism}
    growing: dict[float, str] = {}  # named by a mechanism as it is, where there is one
    for label, cache in sorted(held.items(), key=lambda pair: (pair[1].bytes_per_token, pair[0] not in plain)):
        if not cache.constant_bytes and cache.bytes_per_token:
            growing.setdefault(cache.bytes_per_token, label)
    starting = [(label, cache) for label, cache in held.items() if cache.constant_bytes]
    if not growing or not starting:
        return ""
    others = list(growing.items())
    shown = [others[round(i * (len(others) - 1) / (MOST_COLUMNS - 1))] for i in range(MOST_COLUMNS)]
    shown = shown if len(others) > MOST_COLUMNS else others
    lines = [["tokens from which no more bytes are held than by", *(label for _, label in shown)]]
    for label, cache in starting:
        lengths = (length(cache.constant_bytes, cache.bytes_per_token, other) for other, _ in shown)
        lines.append([label, *("never" if math.isinf(tokens) else f"{tokens:,}" for tokens in lengths)])
    return "## Break-even lengths\n\n" + markdown(lines, names=1)
