"""Cache tricks on trained models: what each changes and what it holds, as a table and as a picture.

Rows are those of a sweep over finished runs (`Run.trained`): one a model and trick.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

from mla.evaluation.frontier import PLOT_FILE, Row, get
from mla.evaluation.plot import STYLES

HEADER = ("trick", "kind", "live B/token", "share", "positions", "loss after the prompt", "change")
LINEAR_BELOW = 0.01  # nats: the y axis is linear up to here and logarithmic beyond


def is_grid(rows: Sequence[Row]) -> bool:
    return any("trained" in row for row in rows)


def model_of(row: Row) -> str:
    return Path(str(row["trained"])).name


def trick_of(row: Row) -> str:
    """The run's name without its model's."""
    return str(row["run"]).removeprefix(f"{model_of(row)}-")


def held(row: Row) -> float:
    """Live bytes a token of the window, when its last one is through."""
    return float(row["cache"]["bytes_after_window"] / row["context"])


def change(row: Row) -> float:
    """Nats a token that the trick adds to the loss on the tokens after the windows' prompts, same tokens, same model."""
    return float(row["decoded"]["loss"] - row["decoded"]["loss_full_cache"])


def by_model(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        if "trained" in row:
            found.setdefault(model_of(row), []).append(row)
    return found


def lines(rows: Sequence[Row]) -> list[list[str]]:
    """Header and cells of one model's table, most bytes first."""
    whole = max(held(row) for row in rows)
    recall = any("recall" in row for row in rows)
    found = [[*HEADER, *["recall"] * recall]]
    for row in sorted(rows, key=lambda row: (-held(row), change(row))):
        places = row["cache"].get("bookkeeping_after_window", 0) / row["context"]
        cells = [trick_of(row), str(row["family"]), f"{held(row):,.1f}", f"{held(row) / whole:.3f}", f"{places:,.1f}"]
        cells += [f"{row['decoded']['loss']:.4f}", f"{change(row):+.4f}"]
        found.append(cells + [f"{get(row, 'recall', 'accuracy'):.4f}" if "recall" in row else ""] * recall)
    return found


def table(rows: Sequence[Row]) -> str:
    """Markdown, a table a model."""
    parts = []
    for model, own in by_model(rows).items():
        header, *cells = lines(own)
        rule = ["---", "---", *["---:"] * (len(header) - 2)]
        parts.append(f"**{model}**\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *cells)))
    return "\n\n".join(parts)


def draw(rows: Sequence[Row], path: str | os.PathLike[str]) -> None:
    """Saves a PNG: a panel a model, change of the loss over live bytes a token, a line a trick; below it recall."""
    models = by_model(rows)
    families = list(dict.fromkeys(str(row["family"]) for own in models.values() for row in own))
    measures: list[tuple[str, Any]] = [("change of the loss after the prompt, nats", change)]
    if any("recall" in row for row in rows):
        measures.append(("recall accuracy", lambda row: get(row, "recall", "accuracy")))
    figure = Figure(figsize=(4.2 * len(models) + 2.4, 3.9 * len(measures) + 0.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(measures), len(models), squeeze=False, sharey="row", sharex="col")
    for line, (label, measure) in enumerate(measures):
        for column, (model, own) in enumerate(models.items()):
            axes = panels[line][column]
            for number, family in enumerate(families):
                members = sorted((row for row in own if row["family"] == family), key=held)
                colour, _, _ = STYLES[number % len(STYLES)]
                marker = "osD^vP*X<>hp"[(number + number // len(STYLES)) % 12]
                style = "-" if number < len(STYLES) else ":"
                xs, ys = [held(row) for row in members], [measure(row) for row in members]
                axes.plot(xs, ys, marker=marker, markersize=5, linewidth=1.1, linestyle=style, color=colour, label=family)
            axes.set_xscale("log", base=2)
            xs = [held(row) for row in own]
            ticks = 2.0 ** np.arange(np.floor(np.log2(min(xs))), np.ceil(np.log2(max(xs))) + 1)
            axes.xaxis.set_major_locator(FixedLocator(ticks.tolist()))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.10g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
            if measure is change:
                axes.set_yscale("symlog", linthresh=LINEAR_BELOW)
                axes.axhline(0, color="#888888", linewidth=0.8, zorder=0)
            axes.grid(True, color="#DDDDDD", linewidth=0.6)
            axes.set_axisbelow(True)
            if line == 0:
                axes.set_title(model, fontsize=11, fontweight="bold", loc="left")
            if line == len(measures) - 1:
                axes.set_xlabel("live cache bytes a token of the window")
            if column == 0:
                axes.set_ylabel(label)
    handles, names = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, names, fontsize=7.5, frameon=False, loc="outside right center")
    figure.savefig(path, format="png")


def section(rows: Sequence[Row]) -> str:
    """What report.md says of a grid."""
    formula = [get(row, "cache", "bytes_per_token") == get(row, "cache", "bytes_per_token_formula") for row in rows]
    return f"""# Cache tricks on trained models

![change of the loss over live cache bytes]({PLOT_FILE})

Each model is evaluated as it was trained and with each trick on its cache, one seed, on the same tokens. The weights do not
change, so small differences between the rows of a model are real for these weights and this text; whether they carry over to
another seed or another size is not asked here.

- **live B/token**: bytes of the live arrays of one sequence after the last token of a window, all layers; scales, raw
  windows, scores and memos included; divided by the window's tokens. **share**: of the largest of the model's rows.
  **positions**: int32 that say where entries stand, apart: once for all layers, or for each layer and group of heads that
  keeps a set of its own.
- **loss after the prompt**: mean nats over the tokens after each window's first half, which goes through the cache in one
  piece, as policies that cut a prompt expect. Where entries leave or merge, the rest comes one by one. **change**: from the
  same model with its whole cache, on the same tokens. Coded entries are read as they are stored by the prompt's own queries
  too; a prompt that is cut or merged afterwards is attended whole.
- Bytes grow by their formula in {formula.count(True)} of {len(formula)} rows.

{table(rows)}"""
