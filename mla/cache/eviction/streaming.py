"""StreamingLLM (2309.17453): the first few tokens, the sinks, and the last ones; positions count what is in the cache.

All heads and layers keep the same. Keys are stored where they stood; what the paper does by rotating all keys anew, to
0 .. n-1, is done for the sinks alone: to the recent entries the query stands as far as ever, to the sinks nearer by the
number of tokens that have left (section 3.2: a cache of 0 1 2 3 6 7 8 and token 9 stand at 0 .. 7).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from mla.cache.eviction.contract import FIRST, Choice, Evidence, Policy


@dataclasses.dataclass(frozen=True)
class Streaming(Policy):
    """The first `sinks` entries and the last, positions counted in the cache (StreamingLLM, 2309.17453)."""

    per_head: ClassVar[bool] = False

    sinks: int = 4
    reindex: bool = True  # false: original positions, as kvpress has it

    def least(self) -> int:
        return self.sinks + 1

    def choose(self, seen: Evidence, budget: int) -> Choice:
        return Choice(jnp.where(seen.positions < self.sinks, FIRST, seen.positions.astype(jnp.float32)))

    def moved(self, positions: jax.Array, gap: jax.Array) -> jax.Array | None:
        return jnp.where((positions >= 0) & (positions < self.sinks), gap, 0) if self.reindex else None
