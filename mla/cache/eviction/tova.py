"""TOVA (2401.06104): what the last query looks at stays. One set for all heads of a layer, and nothing is protected."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from mla.cache.eviction.contract import Choice, Evidence, Policy


@dataclasses.dataclass(frozen=True)
class Tova(Policy):
    """What the last query looks at (TOVA, 2401.06104)."""

    per_head: ClassVar[bool] = False

    def choose(self, seen: Evidence, budget: int) -> Choice:
        return Choice(seen.pool(seen.columns(last=1)))
