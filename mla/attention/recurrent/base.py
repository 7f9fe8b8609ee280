"""What recurrent mechanisms inherit: subclasses write `empty_state` and `recur`, the rest follows."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mla.attention.contract import Mixer
from mla.cache.state import StateCache


class RecurrentMixer(Mixer):
    """A mechanism that remembers a state of constant size. Legend: B batch, S new tokens, D model width."""

    def empty_state(self, batch: int) -> Any:
        """The state before the first token: a pytree of fp32 arrays [B, ...]."""
        raise NotImplementedError

    def recur(self, x: jax.Array, real: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        """x [B, S, D] of which `real` bool [B, S] are no padding, and a state -> outputs [B, S, D] and the new state."""
        raise NotImplementedError

    def __call__(self, x: jax.Array, positions: jax.Array | None = None) -> jax.Array:
        real = jnp.ones(x.shape[:2], bool) if positions is None else jnp.broadcast_to(positions >= 0, x.shape[:2])
        return self.recur(x, real, self.empty_state(x.shape[0]))[0]

    def init_cache(self, batch: int, capacity: int, dtype: Any, codec: str = "none") -> StateCache:
        """A state has no per-token streams: no codec changes it."""
        return StateCache(self.empty_state(batch))

    def extend(self, x: jax.Array, positions: jax.Array, cache: StateCache) -> tuple[jax.Array, StateCache]:
        y, state = self.recur(x, positions >= 0, cache.state)
        return y, StateCache(state)
