"""Quality against cache bytes: from rows (the objects of eval.json) to points, to a table, to report.md and frontier.png.

    mla report DIR        # redraws both files in the folder of a sweep or a run, and prints the table; see `redraw`

A row may say what a sweep knows and a model does not: `run` (its name), `family` (which line of the plot it is on) and
`overrides`. Rows of one family whose names differ only in `-s<seed>` are seeds of one point.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shlex
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mla import paths, strict_json
from mla.errors import UserError

Row = dict[str, Any]

EVAL_FILE = "eval.json"
RESULTS_FILE = "results.jsonl"
REPORT_FILE = "report.md"
PLOT_FILE = "frontier.png"
MOST_NATS = 100.0  # losses of working models are below: guessing among the 256,000 ids of a large tokenizer is 12.5


@dataclasses.dataclass(frozen=True, eq=False)
class Point:
    """One model of a comparison, averaged over its seeds.

    Attributes:
      label, family: its name, and the line of the plot it is on.
      rows: one a seed.
      loss: mean nats per token over the seeds.
      error: standard error of that mean; None with a single seed.
      cache_bytes: where it stands on the x axis, bytes a token.
      amortised: the model holds bytes whatever the length (a window, a state), so no number of bytes per token describes
        it: `cache_bytes` is then what it holds at the evaluation context, divided by the context.
    """

    label: str
    family: str
    rows: tuple[Row, ...]
    loss: float
    error: float | None
    cache_bytes: float
    amortised: bool

    @property
    def perplexity(self) -> float:
        """exp of the mean loss."""
        return math.exp(self.loss)

    @property
    def bounds(self) -> tuple[float, float]:
        """Perplexities one standard error below and above; the perplexity itself with a single seed."""
        error = self.error or 0.0
        return math.exp(self.loss - error), math.exp(self.loss + error)

    def mean(self, *path: str) -> float | None:
        """Mean over the seeds of the figure at a path of keys; None where a row has none."""
        values = [get(row, *path) for row in self.rows]
        return None if None in values else statistics.fmean(values)


def get(row: Any, *path: str) -> Any:
    """The value at a path of keys, or None."""
    for key in path:
        row = row.get(key) if isinstance(row, dict) else None
    return row


COUNT = "a number from 0 to 1e18"
# What tables and plots read of a row, by kind; of these, what must be there.
FIELDS = {
    "an object": (
        *("params", "corpus", "baseline", "cache", "cache.bytes_at", "decode", "decoded", "recall", "compression"),
        *("environment", "overrides", "config", "config.optimizer"),
    ),
    "a text": ("name", "mechanism"),
    "a number": (
        *("loss", "loss_cached", "perplexity", "bits_per_byte", "params.mismatch", "config.optimizer.learning_rate"),
        *("decoded.loss", "decoded.loss_full_cache", "recall.accuracy"),
    ),
    COUNT: (
        *("context", "train_tokens", "eval_tokens", "params.total", "baseline.unigram_perplexity", "decode.batch"),
        *("decode.context", "decode.tokens_per_second", "cache.bytes_per_token", "cache.bytes_per_token_formula"),
        *("cache.constant_bytes", "cache.bytes_after_window", "cache.bookkeeping_after_window"),
        *("compression.bytes_per_token", "compression.ratio", "compression.ratio_mean"),
    ),
}
NEEDED = ("name", "mechanism", "loss", "cache", "cache.bytes_per_token", "cache.constant_bytes")
# Also of an evaluation of a finished run.
NEEDED_IN_GRID = ("run", "family", "context", "cache.bytes_after_window", "decoded.loss", "decoded.loss_full_cache")


def check(row: Any, file: str | os.PathLike[str] = "") -> Row:
    """A row as it is, if table, report and plot can be made of it.

    Args:
      row: what was read, an object of eval.json.
      file: where it was read, for the error line.

    Raises:
      UserError: one line with the file, the run and the first field that is missing, of the wrong kind or not finite; or
        the loss of no working model.
    """
    if not isinstance(row, dict):
        raise UserError(f"{file}: is no file of evaluation results (holds {str(row)[:40]!r})")
    where = f"{file}: run {row.get('run', row.get('name'))!r}".removeprefix(": ")
    if wrong := strict_json.not_finite(row):
        raise UserError(f"{where}: {wrong}, not a finite number; evaluate it again")
    for path in NEEDED + NEEDED_IN_GRID * ("trained" in row):
        if get(row, *path.split(".")) is None:
            raise UserError(f"{where}: {path} is missing")
    lengths = get(row, "cache", "bytes_at")
    at_lengths = [f"cache.bytes_at.{length}" for length in lengths] if isinstance(lengths, dict) else []
    for kind, fields in FIELDS.items():
        for path in (*fields, *at_lengths) if kind == COUNT else fields:
            value = get(row, *path.split("."))
            if value is not None and not _fits(value, kind):
                raise UserError(f"{where}: {path} is {str(value)[:40]!r}, not {kind}")
    if not -1e-3 < row["loss"] < MOST_NATS:  # rounding may leave less than 0 of nothing
        raise UserError(f"{where}: loss is {row['loss']:g} nats a token: no working model has that; evaluate it again")
    try:
        fits = _fits(position(row)[0], COUNT)
    except (KeyError, TypeError, ZeroDivisionError):
        fits = False
    if not fits:
        raise UserError(f"{where}: context and cache.bytes_at do not say what it holds at its context")
    return row


def _fits(value: Any, kind: str) -> bool:
    if kind in ("an object", "a text"):
        return isinstance(value, dict if kind == "an object" else str)
    return isinstance(value, int | float) and not isinstance(value, bool) and (kind == "a number" or 0 <= value <= 1e18)


def label(row: Row) -> str:
    """What its point is called: the run without the seed at its end."""
    return str(row.get("run", row["name"])).removesuffix(f"-s{row.get('seed')}")


def points(rows: Sequence[Row]) -> list[Point]:
    """Rows -> points, fewest cache bytes first.

    Raises:
      UserError: what `check` refuses, or two rows of one point with one seed.
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in map(check, rows):
        groups.setdefault((str(row.get("family") or row["mechanism"]), label(row)), []).append(row)
    found = []
    for (family, name), members in groups.items():
        seeds = [str(row.get("seed")) for row in members]
        if len(set(seeds)) < len(seeds):
            raise UserError(
                f"{len(seeds)} rows are called {name!r}, not all with a seed of their own; rename or remove some"
            )
        losses = [row["loss"] for row in members]
        error = statistics.stdev(losses) / len(losses) ** 0.5 if len(losses) > 1 else None
        cache_bytes, amortised = position(members[0])
        found.append(Point(name, family, tuple(members), statistics.fmean(losses), error, cache_bytes, amortised))
    return sorted(found, key=lambda point: (point.cache_bytes, point.loss))


def position(row: Row) -> tuple[float, bool]:
    """Bytes a token for the x axis, and whether they are amortised over the context; see `Point`."""
    cache = row["cache"]
    if "compression" in row:  # what the text needed, not what is allocated for the worst of texts
        return row["compression"]["bytes_per_token"], True
    if "trained" in row:  # of a trick: what is live when a window is through
        return cache["bytes_after_window"] / row["context"], True
    if not cache["constant_bytes"]:
        return cache["bytes_per_token"], False
    context = row.get("context") or row["decode"]["context"]
    return cache["bytes_at"][str(context)] / context, True


def read_rows(path: str | os.PathLike[str]) -> list[Row]:
    """The rows of a results.jsonl, or the one of an eval.json.

    Raises:
      UserError: no such file, one that holds something else, or a row that `check` refuses.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        lines = [text] if text.startswith("{\n") else text.split("\n")
        rows = [check(json.loads(line), path) for line in lines if line.strip()]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is no file of evaluation results ({type(error).__name__}: {error})") from error
    if not rows:
        raise UserError(f"{path}: holds no results")
    return rows


# ------------------------------------------------------------------------------------------------------------------ table

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
    from mla.report import grid

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


# ------------------------------------------------------------------------------------------------------------------ files


def write(rows: Sequence[Row], directory: str | os.PathLike[str], command: str = "", redraw: str | None = None) -> Path:
    """Writes report.md and frontier.png into a folder, each whole or not at all.

    Args:
      rows: at least one.
      command: what made the results; the report quotes it.
      redraw: what draws both files again; by default `frontier` on the folder's results.

    Returns:
      The path of the plot.
    """
    from mla.report import grid
    from mla.report import plot as plain
    from mla.report.text import report

    folder = Path(directory)
    plot, text = folder / PLOT_FILE, folder / REPORT_FILE
    temporary = folder / f".{PLOT_FILE}"
    (grid if grid.is_grid(rows) else plain).draw(rows, temporary)
    os.replace(temporary, plot)
    if redraw is None:
        redraw = f"python -m mla.evaluation.frontier {folder / RESULTS_FILE}"
    temporary = folder / f".{REPORT_FILE}"
    temporary.write_text(report(rows, command=command, redraw=redraw), encoding="utf-8")
    os.replace(temporary, text)
    return plot


def gather(path: str) -> list[Row]:
    """The rows of a results.jsonl or an eval.json, of the folder of a sweep, or of the folder of a run.

    A row of an eval.json is called what the folder of the run is called, with what its file is named after.

    Raises:
      UserError: nothing like that is there, or a row that `check` refuses.
    """
    folder = Path(path)
    if not folder.is_dir():
        rows = read_rows(folder)
        if folder.name == RESULTS_FILE or len(rows) > 1:
            return rows
        run, told = folder.absolute().parent.name, folder.stem.removeprefix("eval").removeprefix("-")
        return [{"run": f"{run}-{told}" if told else run} | rows[0]]
    if (folder / RESULTS_FILE).is_file():
        return read_rows(folder / RESULTS_FILE)
    files = [folder / EVAL_FILE] if (folder / EVAL_FILE).is_file() else sorted(folder.glob(f"*/{EVAL_FILE}"))
    if not files:
        raise UserError(f"{path}: holds no {RESULTS_FILE}, no {EVAL_FILE} and no run with one; evaluate a run first")
    return [row for file in files for row in gather(str(file))]


def redraw(places: Sequence[str], out: str = "") -> None:
    """Prints the table of what is there, and writes report.md and frontier.png.

    Args:
      places: at least one path as `gather` takes it.
      out: folder for both files, made if it is not there; '': the folder of the one place.

    Raises:
      UserError: no place, several of them without `out`, an `out` with results of its own, what `gather` refuses, or rows
        that cannot stand in one table.
    """
    if not places:
        raise UserError("a PATH is missing: the folder of a sweep or a run, or its results.jsonl or eval.json")
    if len(places) > 1 and not out:
        raise UserError("--out is missing: which folder receives the report of several paths")
    given = [paths.expand(place, "PATH") for place in places]
    rows = [row for place in given for row in gather(place)]
    points(rows)
    first = Path(given[0])
    folder = Path(out) if out else first if first.is_dir() else first.parent
    results = folder / RESULTS_FILE
    if results.exists() and len(given) == 1 and first.resolve() in (folder.resolve(), results.resolve()):
        again = None
    elif results.exists():
        raise UserError(f"--out={folder}: the report there is of its {RESULTS_FILE}; choose another folder")
    else:
        again = shlex.join(["mla", "report", *places, *([f"--out={out}"] if out else [])])
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise UserError(f"--out={folder}: is a file, not a folder") from error
    old = folder / REPORT_FILE
    before = old.read_text(encoding="utf-8", errors="replace") if old.exists() else ""
    made = re.search(r"^Made by\n\n    (.+)$", before, re.MULTILINE)  # a redrawn report still says where it is from
    plot = write(rows, folder, made[1] if made else "", again)
    print(text_table(rows))
    print(f"plot: {plot}")


def main(arguments: Sequence[str]) -> int:
    """See the module's docstring."""
    try:
        if len(arguments) != 1:
            raise UserError("usage: python -m mla.evaluation.frontier DIR/results.jsonl")
        redraw(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
