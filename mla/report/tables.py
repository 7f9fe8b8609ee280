"""The table of a comparison, for a terminal and for report.md."""

from __future__ import annotations

from collections.abc import Sequence

from mla.evaluation.contract import Column
from mla.evaluation.measures import REGISTRY
from mla.report import grid
from mla.report.layout import aligned, markdown
from mla.report.points import Point, points
from mla.report.rows import Row, TrainedRow


def columns() -> list[Column]:
    """What measures say of trained models."""
    return [column for measure in REGISTRY.values() for column in measure.columns]


def header() -> list[str]:
    """The first line of the table."""
    return ["point", "mechanism", "parameters", "vs MHA", *(column.title for column in columns())]


def cells(point: Point) -> list[str]:
    """One line of the table; empty where a figure was not measured."""
    total, mismatch = point.mean(lambda row: row.params.total), point.mean(lambda row: row.params.mismatch)
    return [
        point.label + (f" ({len(point.rows)} seeds)" if len(point.rows) > 1 else ""),
        point.rows[0].mechanism,
        "" if total is None else f"{total:,.0f}",
        "" if mismatch is None else f"{mismatch:+.2%}",
        *measured(point, columns()),
    ]


def measured(point: Point, columns: Sequence[Column]) -> list[str]:
    """The cells of some columns: means over the seeds, with their standard error where the column says so."""
    errors = [point.error_of(column.value) if column.spread else None for column in columns]
    spreads = ["" if error is None else f" ± {error:.4f}" for error in errors]
    return [column.text(point.mean(column.value)) + spread for column, spread in zip(columns, spreads, strict=True)]


def text_table(rows: Sequence[Row]) -> str:
    """The table for a terminal."""
    parts = [f"{model}\n{aligned(grid.lines(own))}" for model, own in grid.by_model(rows).items()]
    others = [cells(point) for point in points([row for row in rows if isinstance(row, TrainedRow)])]
    return "\n\n".join([*parts, *([aligned([header(), *others])] if others else [])])


def markdown_table(rows: Sequence[Row]) -> str:
    """The table for report.md."""
    return markdown([header(), *map(cells, points(rows))])
