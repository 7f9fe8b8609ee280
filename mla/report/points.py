"""Points of a comparison: rows of one model, averaged over its seeds."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence

from mla.errors import UserError
from mla.report.rows import Row


@dataclasses.dataclass(frozen=True, eq=False)
class Point:
    """One model of a comparison, averaged over its seeds.

    Attributes:
      label, family: its name, and the line of the plot it is on.
      rows: one a seed, at least one.
    """

    label: str
    family: str
    rows: tuple[Row, ...]

    @property
    def cache_bytes(self) -> float:
        """Where it stands on the x axis, bytes a token."""
        return self.rows[0].place.bytes

    @property
    def amortised(self) -> bool:
        """Whether no number of bytes per token describes the model, so that it stands elsewhere: see `XPosition.note`."""
        return bool(self.rows[0].place.note)

    @property
    def loss(self) -> float:
        """Mean nats per token over the seeds."""
        return statistics.fmean(row.loss for row in self.rows)

    @property
    def perplexity(self) -> float:
        """exp of the mean loss."""
        return math.exp(self.loss)

    @property
    def error(self) -> float | None:
        """Standard error of the loss; None with a single seed."""
        return self.error_of(lambda row: row.loss)

    def mean(self, value: Callable[[Row], float | None]) -> float | None:
        """Mean over the seeds of a figure; None where a row has none."""
        values = [number for row in self.rows if (number := value(row)) is not None]
        return statistics.fmean(values) if len(values) == len(self.rows) else None

    def error_of(self, value: Callable[[Row], float | None]) -> float | None:
        """Standard error of that mean; None with a single seed, and where a row has no figure."""
        values = [number for row in self.rows if (number := value(row)) is not None]
        return statistics.stdev(values) / len(values) ** 0.5 if len(values) == len(self.rows) > 1 else None


def compared_rows(rows: Sequence[Row]) -> list[Row]:
    """Rows that are compared: those of runs that only found a setting are not, unless there are no others."""
    return [row for row in rows if not row.search] or list(rows)


def points(rows: Sequence[Row]) -> list[Point]:
    """Rows that are compared -> points, fewest cache bytes first.

    Raises:
      UserError: two rows of one point with one seed.
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in compared_rows(rows):
        groups.setdefault((row.family or row.mechanism, row.point), []).append(row)
    for (_, name), members in groups.items():
        if len({row.seed for row in members}) < len(members):
            raise UserError(
                f"{len(members)} rows are called {name!r}, not all with a seed of their own; rename or remove some"
            )
    compared = [Point(name, family, tuple(members)) for (family, name), members in groups.items()]
    return sorted(compared, key=lambda point: (point.cache_bytes, point.loss))
