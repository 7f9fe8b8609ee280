"""Cache tricks on trained models: what each changes and what it holds, as a table and as a picture.

Rows are those of a sweep over finished runs: one a model and trick.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

from mla.evaluation.cache_bytes import CacheBytes, live, of_row
from mla.evaluation.contract import Axis
from mla.evaluation.measures import REGISTRY
from mla.evaluation.perplexity import decoded_change
from mla.report.layout import markdown
from mla.report.plot import STYLES, left_edge
from mla.report.rows import PLOT_FILE, EvaluatedRow, Row

TITLE = "# Cache tricks on trained models"  # first line of the report
SHOWN_ABOVE = 0.15  # nats above the worst model as it was trained
LINEAR_BELOW = 0.01  # of a signed axis: linear up to here and logarithmic beyond
MARKERS = "osD^vP*X<>hp"


def is_grid(rows: Sequence[Row]) -> bool:
    return any(isinstance(row, EvaluatedRow) for row in rows)


def folder_of(row: EvaluatedRow) -> Path:
    """The folder of the finished run that a row evaluates, as the sweep named it."""
    return Path(os.path.normpath(row.trained))


def trick_of(row: EvaluatedRow) -> str:
    """The trick on the cache: the name of the row's point without that of its model."""
    return row.point.removeprefix(f"{folder_of(row).name}-")


def held(row: EvaluatedRow) -> float:
    """Live bytes a token of the window, when its last one is through."""
    return live(row) or 0.0


def change(row: EvaluatedRow) -> float:
    """Nats a token that the trick adds to the loss after the windows' prompts, same tokens, same model."""
    return decoded_change(row) or 0.0


def by_model(rows: Sequence[Row]) -> dict[str, list[EvaluatedRow]]:
    """The evaluations of finished runs, by the end of their folder's path: its name, and more where several end alike."""
    by_folder: dict[Path, list[EvaluatedRow]] = {}
    for row in rows:
        if isinstance(row, EvaluatedRow):
            by_folder.setdefault(folder_of(row), []).append(row)
    return {_name(folder, by_folder): rows_of_it for folder, rows_of_it in by_folder.items()}


def _name(folder: Path, among: Iterable[Path]) -> str:
    """The shortest end of a path, from a folder's name on, that no other one has."""
    others = [path.parts for path in among if path != folder]
    for length in range(1, len(folder.parts) + 1):
        end = folder.parts[-length:]
        if all(parts[-length:] != end for parts in others):
            return str(Path(*end))
    return str(folder)


def lines(rows: Sequence[EvaluatedRow]) -> list[list[str]]:
    """Header and cells of one model's table, most bytes first."""
    whole = max(map(held, rows)) or 1.0
    # Live bytes first, which are the x axis of the picture.
    measures = sorted(REGISTRY.values(), key=lambda measure: not isinstance(measure, CacheBytes))
    every = [column for measure in measures for column in measure.trick_columns]
    first, *others = (column for column in every if column.always or any(column.value(row) is not None for row in rows))
    written = [["trick", "kind", first.title, "share", *(column.title for column in others)]]
    for row in sorted(rows, key=lambda row: (-held(row), change(row))):
        cells = [trick_of(row), row.family, first.text(first.value(row)), f"{held(row) / whole:.3f}"]
        written.append([*cells, *(column.text(column.value(row)) for column in others)])
    return written


def table(rows: Sequence[Row]) -> str:
    """Markdown, a table a model."""
    return "\n\n".join(f"**{model}**\n\n{markdown(lines(tricks_of_it))}" for model, tricks_of_it in by_model(rows).items())


@rc_context({"text.parse_math": False})  # a name may hold a $
def draw(rows: Sequence[Row], path: str | os.PathLike[str]) -> None:
    """Saves a PNG. A panel a model: an axis of some measure over live bytes a token, a line a kind of trick; then all models
    in one panel, windows and states that take no trick among them. Below it other axes, where they were measured."""
    models = by_model(rows)
    tricks = {model: of_model for model, of_model in models.items() if len(of_model) > 1}
    families = list(dict.fromkeys(row.family for of_model in tricks.values() for row in of_model))
    every = [axis for measure in REGISTRY.values() for axis in measure.trick_axes]
    shown = [axis for axis in every if any(axis.value(row) is not None for of_model in models.values() for row in of_model)]
    width = len(tricks) + 1
    figure = Figure(figsize=(4.0 * width + 1.8, 3.9 * len(shown) + 0.5), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(shown), width, squeeze=False)
    for line, axis in zip(panels, shown, strict=True):
        for axes, (model, of_model) in zip(line, tricks.items(), strict=False):
            _families(axes, of_model, families, axis)
            axes.set_title(model, fontsize=11, fontweight="bold", loc="left")
            if axis.signed:
                _signed(axes)
        line[0].set_ylabel(axis.label)
        across = axis.across or axis
        _all(line[-1], models, across)
        line[-1].set_ylabel(across.label)
    handles, names = panels[0][0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, names, fontsize=7.5, frameon=False, loc="outside right center")
    figure.savefig(path, format="png")


def _signed(axes: Axes) -> None:
    """A y axis that is linear near 0 and logarithmic beyond. Its own labels are formulas, which are not parsed here."""
    axes.set_yscale("symlog", linthresh=LINEAR_BELOW)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.3g}"))
    axes.axhline(0, color="#888888", linewidth=0.8, zorder=0)


def _drawn(rows: Iterable[EvaluatedRow], axis: Axis, edge: float) -> list[tuple[float, float, EvaluatedRow]]:
    """(x, y, row) of those that were measured; no bytes at all stand at the left edge."""
    measured = ((max(held(row), edge), axis.value(row), row) for row in rows)
    return [(x, axis.shown(value), row) for x, value, row in measured if value is not None]


def _families(axes: Axes, rows: Sequence[EvaluatedRow], families: Sequence[str], axis: Axis) -> None:
    """One model: a line a family."""
    edge = left_edge(map(held, rows))
    for number, family in enumerate(families):
        members = _drawn(sorted((row for row in rows if row.family == family), key=held), axis, edge)
        axes.plot(
            [x for x, _, _ in members],
            [y for _, y, _ in members],
            marker=MARKERS[(number + number // len(STYLES)) % len(MARKERS)],
            markersize=5,
            linewidth=1.1,
            linestyle="-" if number < len(STYLES) else ":",
            color=STYLES[number % len(STYLES)][0],
            label=family,
        )
    _octaves(axes, rows)


def _all(axes: Axes, models: dict[str, list[EvaluatedRow]], axis: Axis) -> None:
    """All models: as trained large, with tricks small; where less is better, a line joins what no other point beats."""
    every = [row for tricks_of_it in models.values() for row in tricks_of_it]
    edge = left_edge(map(held, every))
    if axis.lowest:
        best, frontier = math.inf, []
        for x, y, _ in sorted(_drawn(every, axis, edge), key=lambda drawn: (held(drawn[2]), drawn[1])):
            if y < best:
                best = y
                frontier.append((x, y))
        axes.plot(*zip(*frontier, strict=True), color="#AAAAAA", linewidth=1.2, zorder=1)
        as_trained = _drawn([tricks_of_it[0] for tricks_of_it in models.values()], axis, edge)
        axes.set_ylim(best - 0.03, max(y for _, y, _ in as_trained) + SHOWN_ABOVE)
    for number, (model, tricks_of_it) in enumerate(models.items()):
        colour, marker, _ = STYLES[number % len(STYLES)]
        for x, y, row in _drawn(tricks_of_it, axis, edge):
            size, face = (9, colour) if row.family == tricks_of_it[0].family else (4, "none")
            axes.plot(x, y, marker, markersize=size, markerfacecolor=face, color=colour, linestyle="none")
        axes.plot([], [], marker, color=colour, linestyle="none", label=model)
    axes.set_title("all: filled as trained, hollow with a trick", fontsize=9, loc="left")
    axes.legend(fontsize=7.5, frameon=False)
    _octaves(axes, every)


def _octaves(axes: Axes, rows: Sequence[EvaluatedRow]) -> None:
    axes.set_xscale("log", base=2)
    edge = left_edge(map(held, rows))
    xs = [max(held(row), edge) for row in rows]
    ticks = 2.0 ** np.arange(np.floor(np.log2(min(xs))), np.ceil(np.log2(max(xs))) + 1)
    axes.xaxis.set_major_locator(FixedLocator(ticks.tolist()))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.10g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", labelsize=7.5)
    axes.set_xlabel("live cache bytes a token of the window")
    axes.grid(True, color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)


def section(rows: Sequence[Row]) -> str:
    """What report.md says of a grid."""
    formula = [(cache := of_row(row)).bytes_per_token == cache.bytes_per_token_formula for row in rows]
    return f"""{TITLE}

![change of the loss over live cache bytes]({PLOT_FILE})

Each model is evaluated as it was trained and with each trick on its cache, one seed, on the same tokens. The weights do not
change, so small differences between the rows of a model are real for these weights and this text; whether they carry over to
another seed or another size is not asked here.

- **live B/token**: bytes of the live arrays of one sequence after the last token of a window, all layers; scales, raw
  windows, scores and memos included; divided by the window's tokens. **share**: of the largest of the model's rows.
  **positions**, where measured: int32 that say where entries stand, apart: once for all layers, or for each layer and group
  of heads that keeps a set of its own.
- **loss after the prompt**: mean nats over the tokens after each window's first half, which goes through the cache in one
  piece, as policies that cut a prompt expect. Where entries leave or merge, the rest comes one by one. **change**: from the
  same model with its whole cache, on the same tokens. Coded entries are read as they are stored by the prompt's own queries
  too; a prompt that is cut or merged afterwards is attended whole.
- Bytes grow by their formula in {formula.count(True)} of {len(formula)} rows.

{table(rows)}"""
