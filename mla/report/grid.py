"""Cache tricks on trained models: what each changes and what it holds, as a table and as a picture.

Rows are those of a sweep over finished runs (`Run.trained`): one a model and trick.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

from mla.report.plot import STYLES, left_edge
from mla.report.rows import PLOT_FILE, Row, check, get

TITLE = "# Cache tricks on trained models"  # first line of the report
HEADER = ("trick", "kind", "live B/token", "share", "loss after the prompt", "change")
SHOWN_ABOVE = 0.15  # nats above the worst model as it was trained
LINEAR_BELOW = 0.01  # nats: the y axis is linear up to here and logarithmic beyond


def is_grid(rows: Sequence[Row]) -> bool:
    return any("trained" in row for row in rows)


def folder_of(row: Row) -> Path:
    """Of the model, as the sweep named it."""
    return Path(os.path.normpath(str(row["trained"])))


def trick_of(row: Row) -> str:
    """The run's name without its model's."""
    return str(row["run"]).removeprefix(f"{folder_of(row).name}-")


def held(row: Row) -> float:
    """Live bytes a token of the window, when its last one is through."""
    return float(row["cache"]["bytes_after_window"] / row["context"])


def change(row: Row) -> float:
    """Nats a token that the trick adds to the loss on the tokens after the windows' prompts, same tokens, same model."""
    return float(row["decoded"]["loss"] - row["decoded"]["loss_full_cache"])


def by_model(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of finished runs, by the end of their folder's path: its name, and more where several end alike.

    Raises:
      UserError: see `rows.check`.
    """
    found: dict[Path, list[Row]] = {}
    for row in map(check, rows):
        if "trained" in row:
            found.setdefault(folder_of(row), []).append(row)
    return {_name(folder, found): of_it for folder, of_it in found.items()}


def _name(folder: Path, among: Iterable[Path]) -> str:
    """The shortest end of a path, from a folder's name on, that no other one has."""
    others = [path.parts for path in among if path != folder]
    for length in range(1, len(folder.parts) + 1):
        end = folder.parts[-length:]
        if all(parts[-length:] != end for parts in others):
            return str(Path(*end))
    return str(folder)


def lines(rows: Sequence[Row]) -> list[list[str]]:
    """Header and cells of one model's table, most bytes first."""
    whole = max(held(row) for row in rows) or 1.0
    recall = any(_measured(row, _recall) for row in rows)
    positions = any("bookkeeping_after_window" in row["cache"] for row in rows)
    found = [[*HEADER[:4], *["positions"] * positions, *HEADER[4:], *["recall"] * recall]]
    for row in sorted(rows, key=lambda row: (-held(row), change(row))):
        places = get(row, "cache", "bookkeeping_after_window")
        cells = [trick_of(row), str(row["family"]), f"{held(row):,.1f}", f"{held(row) / whole:.3f}"]
        cells += ["" if places is None else f"{places / row['context']:,.1f}"] * positions
        cells += [f"{row['decoded']['loss']:.4f}", f"{change(row):+.4f}"]
        found.append(cells + [f"{_recall(row):.4f}" if _measured(row, _recall) else ""] * recall)
    return found


def table(rows: Sequence[Row]) -> str:
    """Markdown, a table a model."""
    parts = []
    for model, own in by_model(rows).items():
        header, *cells = lines(own)
        rule = ["---", "---", *["---:"] * (len(header) - 2)]
        parts.append(f"**{model}**\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *cells)))
    return "\n\n".join(parts)


@rc_context({"text.parse_math": False})  # a name may hold a $
def draw(rows: Sequence[Row], path: str | os.PathLike[str]) -> None:
    """Saves a PNG. A panel a model: change of the loss over live bytes a token, a line a trick; then all models in one
    panel, the loss itself, windows and states that take no trick among them. Below it recall, where it was measured."""
    models = by_model(rows)
    tricks = {model: own for model, own in models.items() if len(own) > 1}
    families = list(dict.fromkeys(str(row["family"]) for own in tricks.values() for row in own))
    measures: list[tuple[str, Any, str, Any]] = [("change of the loss after the prompt, nats", change, "loss, nats", _loss)]
    if any(_measured(row, _recall) for own in models.values() for row in own):
        measures.append(("recall accuracy", _recall, "recall accuracy", _recall))
    width = len(tricks) + 1
    figure = Figure(figsize=(4.0 * width + 1.8, 3.9 * len(measures) + 0.5), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(measures), width, squeeze=False)
    for line, (label, measure, whole_label, whole) in enumerate(measures):
        for axes, (model, own) in zip(panels[line], tricks.items(), strict=False):
            _families(axes, own, families, measure)
            axes.set_title(model, fontsize=11, fontweight="bold", loc="left")
            if measure is change:
                axes.set_yscale("symlog", linthresh=LINEAR_BELOW)
                axes.axhline(0, color="#888888", linewidth=0.8, zorder=0)
        panels[line][0].set_ylabel(label)
        _all(panels[line][-1], models, whole)
        panels[line][-1].set_ylabel(whole_label)
    handles, names = panels[0][0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, names, fontsize=7.5, frameon=False, loc="outside right center")
    figure.savefig(path, format="png")


def _loss(row: Row) -> float:
    return float(row["decoded"]["loss"])


def _recall(row: Row) -> float:
    return float(row["recall"]["accuracy"])


def _measured(row: Row, measure: Any) -> bool:
    return measure is not _recall or get(row, "recall", "accuracy") is not None


def _families(axes: Axes, rows: Sequence[Row], families: Sequence[str], measure: Any) -> None:
    """One model: a line a family."""
    edge = left_edge(map(held, rows))
    for number, family in enumerate(families):
        members = sorted((row for row in rows if row["family"] == family and _measured(row, measure)), key=held)
        axes.plot(
            [max(held(row), edge) for row in members],
            [measure(row) for row in members],
            marker="osD^vP*X<>hp"[(number + number // len(STYLES)) % 12],
            markersize=5,
            linewidth=1.1,
            linestyle="-" if number < len(STYLES) else ":",
            color=STYLES[number % len(STYLES)][0],
            label=family,
        )
    _octaves(axes, rows)


def _all(axes: Axes, models: dict[str, list[Row]], measure: Any) -> None:
    """All models: as trained large, with tricks small, and what no other point beats in bytes and loss joined by a line."""
    every = sorted((row for own in models.values() for row in own), key=lambda row: (held(row), _loss(row)))
    best, frontier = math.inf, []
    for row in every:
        if _loss(row) < best:
            best = _loss(row)
            frontier.append(row)
    edge = left_edge(map(held, every))
    if measure is _loss:
        xs = [max(held(row), edge) for row in frontier]
        axes.plot(xs, [_loss(row) for row in frontier], color="#AAAAAA", linewidth=1.2, zorder=1)
        axes.set_ylim(best - 0.03, max(_loss(row) for own in models.values() for row in own[:1]) + SHOWN_ABOVE)
    for number, (model, own) in enumerate(models.items()):
        colour, marker, _ = STYLES[number % len(STYLES)]
        for row in (row for row in own if _measured(row, measure)):
            plain = row["family"] == own[0]["family"]
            size, face = (9, colour) if plain else (4, "none")
            x = max(held(row), edge)
            axes.plot(x, measure(row), marker, markersize=size, markerfacecolor=face, color=colour, linestyle="none")
        axes.plot([], [], marker, color=colour, linestyle="none", label=model)
    axes.set_title("all: filled as trained, hollow with a trick", fontsize=9, loc="left")
    axes.legend(fontsize=7.5, frameon=False)
    _octaves(axes, every)


def _octaves(axes: Axes, rows: Sequence[Row]) -> None:
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
    formula = [get(row, "cache", "bytes_per_token") == get(row, "cache", "bytes_per_token_formula") for row in rows]
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
