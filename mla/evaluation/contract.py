"""What a measure of a trained model provides: figures for eval.json, and how tables and plots show them.

Adding a measure is one file with a `Measure`, and one line in `mla.evaluation.measures`.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol, TypeVar

from jax.sharding import Mesh

from mla.cache.plan import WHOLE, CachePlan
from mla.config import Config
from mla.data.prepared import Split, TokenData
from mla.model import Model

F = TypeVar("F")
SCHEMA = 1  # of eval.json


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is measured.

    Attributes:
      config: of the run, with the settings of this evaluation.
      model, mesh: the trained model with its parameters, and where they live.
      data: the text, tokenised.
      plan: what the model's caches do beside storing entries, as `config.eval.cache` asks.
    """

    config: Config
    model: Model
    mesh: Mesh
    data: TokenData
    plan: CachePlan = WHOLE

    @property
    def is_text(self) -> bool:
        """Whether there are documents to predict; of a task there are not."""
        return self.data.task is None

    @property
    def split(self) -> Split:
        """The part of the text that is evaluated: `config.eval.split`."""
        return self.data.split(self.config.eval.split)


class MeasuredRow(Protocol):
    """What columns and axes read of a row, the object of an eval.json; see `mla.report.rows.Row`."""

    @property
    def context(self) -> float | None:
        """Tokens of an evaluation window."""

    @property
    def trained(self) -> str:
        """The folder of the finished run that a sweep evaluated with a trick on its cache; '' if it trained the run."""

    def figures(self, kind: type[F]) -> F | None:
        """The figures of a class in some measure's `schema`; None where they were not measured."""


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
      title: its header.
      value: the figure in a row, None where it was not measured. A point of several seeds has their mean.
      show: a format specification, or what writes the mean.
      spread: whether the standard error over the seeds stands behind it.
      always: whether the column is there when no row has the figure.
    """

    title: str
    value: Callable[[MeasuredRow], float | None]
    show: str | Callable[[float], str]
    spread: bool = False
    always: bool = True

    def text(self, value: float | None) -> str:
        """A cell; empty where there is no figure."""
        if value is None:
            return ""
        return format(value, self.show) if isinstance(self.show, str) else self.show(value)


@dataclasses.dataclass(frozen=True)
class Axis:
    """A y axis of a picture whose x axis are cache bytes.

    Attributes:
      label: what it shows.
      value: the figure in a row, None where it was not measured.
      shown: what is drawn of the mean over the seeds of a point.
      per_token: whether that is of one token, so that the label names the tokenizer.
      signed: whether figures lie on both sides of 0, on an axis that is linear near it and logarithmic beyond.
      lowest: whether less is better: where several models stand in one panel, a line joins what no other point beats in
        bytes and height, and the best models fill the panel.
      across: what stands for this axis in that panel; None: the same.
    """

    label: str
    value: Callable[[MeasuredRow], float | None]
    shown: Callable[[float], float] = float
    per_token: bool = False
    signed: bool = False
    lowest: bool = False
    across: Axis | None = None


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of a report about the rows that have a figure.

    Attributes:
      text: Markdown, with its heading.
      columns: of the table below, after the point's name; where the first one is empty, the point is left out.
    """

    text: str
    columns: tuple[Column, ...]


@dataclasses.dataclass(frozen=True)
class XPosition:
    """Where a row stands on the x axis.

    Attributes:
      bytes: a token, content of the cache of one sequence.
      note: why no number of bytes a token describes the model, and what is shown instead: a footnote; '' where one does.
    """

    bytes: float
    note: str = ""


class Measure(abc.ABC):
    """One kind of figures of a trained model.

    Attributes:
      schema: key of eval.json ('': the object itself) -> frozen dataclass of what tables and plots read there; see
        `mla.strict_json.read`. What an evaluation did not measure is absent.
      always: keys of `schema` that every row has.
      always_of_tricks: dotted paths that every evaluation of a finished run has.
      columns: of the table that compares trained models.
      trick_columns: of the table of tricks on the cache of one model.
      axes, trick_axes: of the pictures beside these tables.
      section: of the report that compares trained models.
    """

    schema: ClassVar[Mapping[str, type]] = {}
    always: ClassVar[tuple[str, ...]] = ()
    always_of_tricks: ClassVar[tuple[str, ...]] = ()
    columns: ClassVar[tuple[Column, ...]] = ()
    trick_columns: ClassVar[tuple[Column, ...]] = ()
    axes: ClassVar[tuple[Axis, ...]] = ()
    trick_axes: ClassVar[tuple[Axis, ...]] = ()
    section: ClassVar[Section | None] = None

    def applies(self, subject: Subject) -> bool:
        """Whether text and model offer what is measured, and whether the config asks for it."""
        return True

    def require(self, subject: Subject) -> None:  # noqa: B027, most have nothing to refuse
        """Raises UserError for what `measure` would refuse only after hours of other measures."""

    @abc.abstractmethod
    def measure(self, subject: Subject) -> dict[str, Any]:
        """The part of eval.json that comes from here; parts of several measures are merged, nested objects too.

        Returns:
          Plain Python values; empty where there is nothing to measure.

        Raises:
          UserError: a model or a cache that is not what it should be.
        """

    @abc.abstractmethod
    def said(self, figures: dict[str, Any], config: Config) -> str:
        """One line for the terminal about what `measure` returned, which is not empty."""

    def place(self, row: MeasuredRow) -> XPosition | None:
        """Where a row stands on the x axis; None: this measure cannot say. The last of the registry that can decides."""
        return None
