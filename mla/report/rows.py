"""Rows, the objects of eval.json and the lines of results.jsonl, as frozen types that hold what tables and plots need."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from mla import strict_json
from mla.errors import UserError
from mla.evaluation import perplexity
from mla.evaluation.contract import SCHEMA, XPosition
from mla.evaluation.measures import REGISTRY
from mla.strict_json import Count, Number
from mla.workdir import EVAL_FILE

F = TypeVar("F")
MOST_CACHE_BYTES = 1e18  # a token; beyond is no cache

RESULTS_FILE = "results.jsonl"
REPORT_FILE = "report.md"
PLOT_FILE = "frontier.png"
PAGE_FILE = "report.html"
RATES_FILE = "learning_rates.png"


@dataclasses.dataclass(frozen=True)
class Parameters:
    """Parameters of a model, and how far they are from those of the MHA model it was matched to, relative."""

    total: Count | None = None
    mismatch: Number | None = None


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The text of an evaluation: as the config names it, the hash of its documents, its tokenizer, the split."""

    name: str = ""
    sha256: str = ""
    tokenizer: str = ""
    split: str = ""


@dataclasses.dataclass(frozen=True)
class Baseline:
    """What a model that knows token frequencies alone reaches on the same text."""

    unigram_perplexity: Count | None = None


@dataclasses.dataclass(frozen=True)
class OptimizerFields:
    """Fields of `config.optimizer` that reports show."""

    learning_rate: Number | None = None


@dataclasses.dataclass(frozen=True)
class ConfigFields:
    """Fields of the config that reports show."""

    optimizer: OptimizerFields = OptimizerFields()
    context: Count | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One model, evaluated. What is optional may be missing in rows of other versions.

    Attributes:
      run: the name of its folder.
      point, seed: what its seeds have in common, and which of them this is.
      family: the line of the plot it is on; '' in rows that no sweep made.
      overrides: config fields that the sweep set, 'config.path.to.field' -> value.
      name, mechanism, schema, context, train_tokens, params, corpus, baseline, environment, config: as in eval.json.
      trained: see `EvaluatedRow`; '' in others.
      search: whether the run only found a setting, such as a learning rate, for others.
      measured: class -> the figures of it, for all that `mla.evaluation.measures.REGISTRY` knows and the row has.
      json: the whole object, with what this version does not know.
    """

    run: str
    point: str
    name: str
    mechanism: str
    schema: int
    seed: int | None = None
    family: str = ""
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    context: Count | None = None
    train_tokens: Count | None = None
    params: Parameters = Parameters()
    corpus: Corpus | None = None
    baseline: Baseline = Baseline()
    environment: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    config: ConfigFields = ConfigFields()
    trained: str = ""
    search: bool = False
    measured: Mapping[type, Any]
    json: Mapping[str, Any]

    @property
    def loss(self) -> float:
        """Mean nats per token."""
        return perplexity.of_row(self).loss

    def figures(self, kind: type[F]) -> F | None:
        """The figures of a class in some measure's `schema`; None where they were not measured."""
        return self.measured.get(kind)

    @property
    def place(self) -> XPosition:
        """Where it stands on the x axis of the pictures."""
        place = _place(self)
        assert place is not None
        return place


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedRow(Row):
    """A run that was trained, evaluated as its config says."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluatedRow(Row):
    """A finished run that a sweep evaluated with a trick on its cache: nothing was trained for it.

    Attributes:
      trained: the folder of the finished run.
    """

    trained: str = dataclasses.field()
    family: str = dataclasses.field()
    context: Count = dataclasses.field()


def _place(row: Row) -> XPosition | None:
    place = None
    for measure in REGISTRY.values():
        place = measure.place(row) or place
    return place


def from_json(value: Any, file: str | os.PathLike[str] = "") -> TrainedRow | EvaluatedRow:
    """A row of which table, report and plot can be made.

    Args:
      value: what was read, an object of eval.json. With `trained` it is that of a sweep over finished runs.
      file: where it was read, for the error line.

    Raises:
      UserError: one line with the file, the run and the first field that is missing, of the wrong kind or not finite; or
        another schema, or the loss of no working model.
    """
    if not isinstance(value, dict):
        raise UserError(f"{file}: is no file of evaluation results (holds {str(value)[:40]!r})")
    run = value.get("run", value.get("name"))
    where = f"{file}: run {run!r}".removeprefix(": ")
    if wrong := strict_json.not_finite(value):
        raise UserError(f"{where}: {wrong}, not a finite number; evaluate it again")
    if value.get("schema", SCHEMA) != SCHEMA:
        raise UserError(f"{where}: schema is {value['schema']!r}, and this version reads {SCHEMA}; evaluate it again")
    tricks = "trained" in value
    for path in (path for measure in REGISTRY.values() for path in measure.always + measure.always_of_tricks * tricks):
        if _at(value, path) is None:
            raise UserError(f"{where}: {path} is missing")
    measured: dict[type, Any] = {
        cls: strict_json.read(cls, value[key] if key else value, where, key)
        for measure in REGISTRY.values()
        for key, cls in measure.schema.items()
        if not key or value.get(key) is not None
    }
    if not -1e-3 < (loss := measured[perplexity.Figures].loss) < perplexity.MOST_NATS:  # rounding may leave less than 0
        raise UserError(f"{where}: loss is {loss:g} nats a token: no working model has that; evaluate it again")
    named = {"schema": SCHEMA, "run": run, "point": str(run).removesuffix(f"-s{value.get('seed')}")} | value
    kind: type[TrainedRow | EvaluatedRow] = EvaluatedRow if tricks else TrainedRow
    row = strict_json.read(kind, named, where, measured=measured, json=value)
    place = _place(row)
    if place is None or not place.bytes <= MOST_CACHE_BYTES:
        raise UserError(f"{where}: context and cache.bytes_at do not say what it holds at its context")
    return row


def _at(value: Any, path: str) -> Any:
    """The value at a dotted path of keys, or None."""
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def read_rows(path: str | os.PathLike[str]) -> list[Row]:
    """The rows of a results.jsonl, or the one of an eval.json.

    Raises:
      UserError: no such file, one that holds something else, or a row that `from_json` refuses.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        lines = [text] if text.startswith("{\n") else text.split("\n")
        rows: list[Row] = [from_json(json.loads(line), path) for line in lines if line.strip()]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is no file of evaluation results ({type(error).__name__}: {error})") from error
    if not rows:
        raise UserError(f"{path}: holds no results")
    return rows


def gather(path: str) -> list[Row]:
    """The rows of a results.jsonl or an eval.json, of the folder of a sweep, or of the folder of a run.

    A row of an eval.json is called what the folder of the run is called, with what its file is named after; NAME-s1 and
    NAME-s2 are seeds of one point.

    Raises:
      UserError: nothing like that is there, or a row that `from_json` refuses.
    """
    folder = Path(path)
    if not os.path.isdir(folder):
        rows = read_rows(folder)
        if folder.name == RESULTS_FILE or len(rows) > 1:
            return rows
        run, differs = folder.absolute().parent.name, folder.stem.removeprefix("eval").removeprefix("-")
        return [from_json({"run": f"{run}-{differs}" if differs else run} | dict(rows[0].json), folder)]
    if (folder / RESULTS_FILE).is_file():
        return read_rows(folder / RESULTS_FILE)
    files = [folder / EVAL_FILE] if (folder / EVAL_FILE).is_file() else sorted(folder.glob(f"*/{EVAL_FILE}"))
    if not files:
        raise UserError(f"{path}: holds no {RESULTS_FILE}, no {EVAL_FILE} and no run with one; evaluate a run first")
    return [row for file in files for row in gather(str(file))]
