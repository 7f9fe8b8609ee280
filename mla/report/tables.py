"""The table of a comparison, for a terminal and for report.md."""

from __future__ import annotations

from collections.abc import Sequence

from mla.report import grid
from mla.report.points import Point, points
from mla.report.rows import Row

HEADER = (
    "point",
    "mechanism",
    "parameters",
    "vs MHA",
    "loss",
    "perplexity",
    "bits/byte",
    "B/token",
    "formula",
    "constant B",
    "B at 8,192",
    "decode tok/s",
)


def cells(point: Point) -> tuple[str, ...]:
    """One line of the table; empty where a figure was not measured."""

    def number(form: str, *path: str) -> str:
        value = point.mean(*path)
        return "" if value is None else format(value, form)

    spread = "" if point.error is None else f" ± {point.error:.4f}"
    seeds = f" ({len(point.rows)} seeds)" if len(point.rows) > 1 else ""
    return (
        point.label + seeds,
        str(point.rows[0]["mechanism"]),
        number(",.0f", "params", "total"),
        number("+.2%", "params", "mismatch"),
        f"{point.loss:.4f}{spread}",
        f"{point.perplexity:,.3f}" if point.perplexity < 1e9 else f"{point.perplexity:.4g}",
        number(".4f", "bits_per_byte"),
        number(",.10g", "cache", "bytes_per_token"),
        number(",.10g", "cache", "bytes_per_token_formula"),
        number(",.10g", "cache", "constant_bytes"),
        number(",.10g", "cache", "bytes_at", "8192"),
        number(",.0f", "decode", "tokens_per_second"),
    )


def text_table(rows: Sequence[Row]) -> str:
    """The table for a terminal."""
    parts = [f"{model}\n{_aligned(grid.lines(own))}" for model, own in grid.by_model(rows).items()]
    others = [cells(point) for point in points([row for row in rows if "trained" not in row])]
    return "\n\n".join([*parts, *([_aligned([HEADER, *others])] if others else [])])


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    """In columns, the first two to the left; a rule under the header."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]

    def line(values: Sequence[str]) -> str:
        padded = [v.ljust(w) if i < 2 else v.rjust(w) for i, (v, w) in enumerate(zip(values, widths, strict=True))]
        return "  ".join(padded).rstrip()

    return "\n".join([line(lines[0]), "  ".join("-" * width for width in widths), *map(line, lines[1:])])


def markdown_table(rows: Sequence[Row]) -> str:
    """The table for report.md."""
    rule = ["---", "---", *["---:"] * (len(HEADER) - 2)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [HEADER, rule, *(cells(p) for p in points(rows))])
