"""Rows, the objects of eval.json and results.jsonl: read, and held against what tables and plots need of them.

A row may say what a sweep knows and a model does not: `run` (its name), `family` (which line of the plot it is on) and
`overrides`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from mla import strict_json
from mla.errors import UserError
from mla.evaluation.perplexity import MOST_NATS
from mla.workdir import EVAL_FILE

Row = dict[str, Any]

RESULTS_FILE = "results.jsonl"
REPORT_FILE = "report.md"
PLOT_FILE = "frontier.png"


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


def gather(path: str) -> list[Row]:
    """The rows of a results.jsonl or an eval.json, of the folder of a sweep, or of the folder of a run.

    A row of an eval.json is called what the folder of the run is called, with what its file is named after.

    Raises:
      UserError: nothing like that is there, or a row that `check` refuses.
    """
    folder = Path(path)
    if not os.path.isdir(folder):
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
