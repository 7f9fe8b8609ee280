"""Points of a comparison: rows of one model, averaged over its seeds.

Rows of one family whose names differ only in `-s<seed>` are seeds of one point.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence

from mla.errors import UserError
from mla.report.rows import Row, check, get, label, position


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
