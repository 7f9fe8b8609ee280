"""The control: in every layer and owner each token draws a number, and the highest stay.

A number belongs to its token for good, so that what is kept after any number of steps is a fair sample of all that came.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from mla.cache.eviction.contract import FIRST, Choice, Evidence, Policy


@dataclasses.dataclass(frozen=True)
class Random(Policy):
    """See the module's docstring. Without protected tokens it loses by the sinks alone: give both controls."""

    sinks: int = 0  # tokens at the start that stay
    recent: int = 0  # newest entries that stay
    seed: int = 0

    def least(self) -> int:
        return self.sinks + self.recent + 1

    def choose(self, seen: Evidence, budget: int) -> Choice:
        batch, owners, _ = seen.positions.shape
        key = jax.random.fold_in(jax.random.key(self.seed), seen.layer)

        def draw(lane: jax.Array, position: jax.Array) -> jax.Array:
            return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, lane), position))

        lanes = jnp.broadcast_to(jnp.arange(batch * owners).reshape(batch, owners, 1), seen.positions.shape)
        numbers = jax.vmap(draw)(lanes.ravel(), seen.positions.ravel()).reshape(seen.positions.shape)
        protected = (seen.positions < self.sinks) | (seen.rank < self.recent)
        return Choice(jnp.where(protected, FIRST, numbers))
