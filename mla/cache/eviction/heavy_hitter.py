"""H2O (2306.14048) and VATP (2406.12335): what has got most attention so far, and the most recent.

    a[h, j] = sum_i A[h, i, j]   over all queries so far, the prompt's and the decoded ones
    H2O: score a;  VATP: a[h, j] * ||v_j||_1, the first `sinks` tokens protected

Each owner keeps the last `recent` of its budget, the newest included, and the heaviest of the rest (the released code that
really drops entries, not the one that masks them). Sums favour old tokens; the paper has it so. The mean over the heads that
share an entry is taken of the product, so one number an entry and owner is stored for either.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from mla.cache.eviction.contract import FIRST, Choice, Evidence, Policy, require
from mla.cache.finite import saturate


@dataclasses.dataclass(frozen=True)
class HeavyHitter(Policy):
    """Most attention so far, and the newest (H2O, 2306.14048)."""

    per_entry: ClassVar[int] = 1

    recent: float = 0.5  # of the budget, kept whatever their attention

    def __post_init__(self) -> None:
        require(self.recent <= 1, type(self).__name__, f"recent={self.recent} is above 1, all of the budget")

    def given(self, seen: Evidence) -> jax.Array:
        """What this call's queries add to each candidate's score: [B, K, C]."""
        return seen.pool(seen.columns())

    def protected(self, seen: Evidence, budget: int) -> jax.Array:
        return seen.rank < int(self.recent * budget)

    def choose(self, seen: Evidence, budget: int) -> Choice:
        attention = saturate(seen.scores[..., 0] + self.given(seen))
        return Choice(jnp.where(self.protected(seen, budget), FIRST, attention), attention[..., None])


@dataclasses.dataclass(frozen=True)
class ValueAware(HeavyHitter):
    """Entries with most attention (`heavy_hitter`) times the value's L1 norm, sinks protected (VATP, 2406.12335)."""

    sinks: int = 20  # tokens at the start of the text that stay

    def least(self) -> int:
        return self.sinks + 1

    def given(self, seen: Evidence) -> jax.Array:
        norms = saturate(jnp.abs(seen.values().astype(jnp.float32)).sum(-1))
        return seen.pool(seen.columns() * norms)

    def protected(self, seen: Evidence, budget: int) -> jax.Array:
        # Sinks take their places from the heavy part, and beyond it from the oldest of the recent.
        recent = min(int(self.recent * budget), budget - self.sinks)
        return (seen.rank < recent) | (seen.positions < self.sinks)
