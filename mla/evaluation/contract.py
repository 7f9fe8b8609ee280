"""What a measure of a trained model provides: figures for eval.json, and how tables and plots show them.

Adding a measure is one file with a `Measure`, and one line in `mla.evaluation.measures`.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol, TypeVar

from jax.sharding import Mesh

from mla.config import Config
from mla.data.prepared import Split, TokenData
from mla.model import Model

F = TypeVar("F")


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is measured.

    Attributes:
      config: of the run, with the settings of this evaluation.
      model, mesh: the trained model with its parameters and its cache as `config.eval` has it, and where they live.
      data: the text, tokenised.
    """

    config: Config
    model: Model
    mesh: Mesh
    data: TokenData

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
      across: of tricks on one model's cache, what is drawn where several models stand in one panel; None: the same.
      joined: whether a line joins what no other point beats in bytes and height, and the lowest points fill the panel.
    """

    label: str
    value: Callable[[MeasuredRow], float | None]
    shown: Callable[[float], float] = float
    across: Axis | None = None
    joined: bool = False


class Measure(abc.ABC):
    """One kind of figures of a trained model.

    Attributes:
      schema: key of eval.json ('': the object itself) -> frozen dataclass of what tables and plots read there; see
        `mla.strict_json.read`. What an evaluation did not measure is absent.
      always: keys of `schema` that every row has.
      columns: of the table that compares trained models.
      trick_columns: of the table of tricks on the cache of one model.
      axes, trick_axes: of the pictures beside these tables.
    """

    schema: ClassVar[Mapping[str, type]] = {}
    always: ClassVar[tuple[str, ...]] = ()
    columns: ClassVar[tuple[Column, ...]] = ()
    trick_columns: ClassVar[tuple[Column, ...]] = ()
    axes: ClassVar[tuple[Axis, ...]] = ()
    trick_axes: ClassVar[tuple[Axis, ...]] = ()

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

    def cache_bytes(self, row: MeasuredRow) -> tuple[float, bool] | None:
        """Where a row stands on the x axis of the pictures.

        Returns:
          Bytes a token, and whether they are amortised: bytes that are held whatever the length, over the window's tokens.
          None: this measure does not know. The last of the registry that knows decides.
        """
        return None
