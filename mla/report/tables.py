"""The table of a comparison, for a terminal and for report.md."""

from __future__ import annotations

from collections.abc import Sequence

from mla.evaluation.contract import Column
from mla.evaluation.measures import REGISTRY
from mla.report import grid
from mla.report.layout import aligned, markdown
from mla.report.points import Point, points
from mla.report.rows import Row, TrainedRow


def lines(compared: Sequence[Point]) -> list[list[str]]:
    """The table of trained models: a header, and a line a point; empty where a figure was not measured."""
    every = [column for measure in REGISTRY.values() for column in measure.columns]
    shown = [column for column in every if column.always or any(p.mean(column.value) is not None for p in compared)]
    header = ["point", "mechanism", "parameters", "vs MHA", *(column.title for column in shown)]
    return [header, *(_line(point, shown) for point in compared)]


def _line(point: Point, columns: Sequence[Column]) -> list[str]:
    total, mismatch = point.mean(lambda row: row.params.total), point.mean(lambda row: row.params.mismatch)
    return [
        point.label + (f" ({len(point.rows)} seeds)" if len(point.rows) > 1 else ""),
        point.rows[0].mechanism,
        "" if total is None else f"{total:,.0f}",
        "" if mismatch is None else f"{mismatch:+.2%}",
        *measured(point, columns),
    ]


def measured(point: Point, columns: Sequence[Column]) -> list[str]:
    """The cells of some columns: means over the seeds, with their standard error where the column says so."""
    errors = [point.error_of(column.value) if column.spread else None for column in columns]
    spreads = ["" if error is None else f" ± {error:.4f}" for error in errors]
    return [column.text(point.mean(column.value)) + spread for column, spread in zip(columns, spreads, strict=True)]


def text_table(rows: Sequence[Row]) -> str:
    """The table for a terminal."""
    parts = [f"{model}\n{aligned(grid.lines(own))}" for model, own in grid.by_model(rows).items()]
    trained = points([row for row in rows if isinstance(row, TrainedRow)])
    return "\n\n".join([*parts, *([aligned(lines(trained))] if trained else [])])


def markdown_table(rows: Sequence[Row]) -> str:
    """The table for report.md."""
    return markdown(lines(points(rows)))
