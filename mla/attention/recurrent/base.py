"""What recurrent mechanisms inherit: subclasses declare `stores` and write `recur`, the rest follows."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp

from mla.attention.contract import C, Mixer
from mla.cache.stores import LayerCache


class RecurrentMixer(Mixer[C, None]):
    """A mechanism that remembers a state of constant size. Legend: B batch, S new tokens, D model width."""

    private: ClassVar[str] = "a state and no entries"

    def recur(self, x: jax.Array, positions: jax.Array, before: LayerCache) -> tuple[jax.Array, LayerCache]:
        """Outputs [B, S, D] of new tokens x [B, S, D] after what is remembered, and what is remembered after them.

        positions: int32 [B, S]; -1 is padding, which must leave no trace: no decay of a state, nothing added to it, and the
        tail of a convolution as it was (`TailCache.line` sees to that); its outputs are 0.
        """
        raise NotImplementedError

    def __call__(self, x: jax.Array, positions: jax.Array | None = None) -> jax.Array:
        where = jnp.arange(x.shape[1], dtype=jnp.int32) if positions is None else positions
        empty = self.init_cache(x.shape[0], x.shape[1], self.around.dtype)
        return self.recur(x, jnp.broadcast_to(where, x.shape[:2]), empty)[0]

    def extend(self, x: jax.Array, positions: jax.Array, cache: LayerCache) -> tuple[jax.Array, LayerCache]:
        return self.recur(x, positions, cache)
