"""What softmax mechanisms remember: per-token streams in preallocated slots, a growing buffer or a ring.

Legend: B batch, S new tokens, C slots, E entries a query may look at.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

Streams = Any  # a NamedTuple of arrays [B, tokens, ...]: what a mechanism's `entries` returns


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """Which token stands where: the bookkeeping of token caches, the same for all layers that store the same tokens.

    Attributes:
      positions: int32 [B, C], the position of the token in each slot, -1 for an empty one.
      lengths: int32 [B], tokens each row has written so far. Padding is never written, so rows may differ.
      ring: slots are reused in turn, the newest C tokens stay. Otherwise the buffer must be large enough.
    """

    positions: jax.Array
    lengths: jax.Array
    ring: bool = dataclasses.field(default=False, metadata={"static": True})

    @classmethod
    def empty(cls, batch: int, capacity: int, ring: bool = False) -> Slots:
        return cls(jnp.full((batch, capacity), -1, jnp.int32), jnp.zeros((batch,), jnp.int32), ring)

    def assign(self, positions: jax.Array) -> tuple[jax.Array, Slots]:
        """Gives each new token a slot: int32 [B, S] (C, out of range, for those not stored), and the new bookkeeping."""
        capacity = self.positions.shape[1]
        real = positions >= 0
        rank = jnp.cumsum(real, axis=1) - 1
        count = jnp.sum(real, axis=1, dtype=jnp.int32)
        slot = self.lengths[:, None] + rank
        if self.ring:
            real &= rank >= count[:, None] - capacity  # a chunk longer than the ring leaves only its tail
            slot %= capacity
        slot = jnp.where(real, slot, capacity).astype(jnp.int32)
        stored = write(self.positions, positions, slot)
        return slot, dataclasses.replace(self, positions=stored, lengths=self.lengths + count)


def write(stream: jax.Array, new: jax.Array, slot: jax.Array) -> jax.Array:
    """stream [B, C, ..] with new [B, S, ..] at slot [B, S]; slots out of range are dropped."""
    # vmap, not a two-index scatter: the batch stays a batching dimension, which a mesh can split.
    return jax.vmap(lambda s, n, i: s.at[i].set(n.astype(s.dtype), mode="drop", unique_indices=False))(stream, new, slot)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenCache:
    """Per-token streams of one layer.

    Attributes:
      streams: the mechanism's entries, each array [B, C, ...].
      slots: where each token stands; None while the model keeps it once for all layers (`mla.model.ModelCache`).
    """

    streams: Streams
    slots: Slots | None

    @classmethod
    def empty(cls, like: Streams, batch: int, capacity: int, dtype: Any, window: int | None = None) -> TokenCache:
        """An empty cache for entries shaped like `like` ([B, tokens, ...]; only the trailing shape matters).

        With a window the buffer is a ring of at most that many slots, whatever the capacity.
        """
        ring = window is not None
        capacity = min(capacity, window) if window is not None else capacity
        streams = jax.tree.map(lambda a: jnp.zeros((batch, capacity, *a.shape[2:]), dtype), like)
        return cls(streams, Slots.empty(batch, capacity, ring))

    def extend(self, new: Streams, positions: jax.Array) -> tuple[Streams, jax.Array, TokenCache]:
        """Stores new entries and answers what the new queries may look at.

        Args:
          new: entries of the S new tokens, [B, S, ...] each.
          positions: int32 [B, S]; -1 is padding, which is not stored.

        Returns:
          (entries [B, E, ...], their positions int32 [B, E], the new cache). A growing cache answers with its slots after
          writing, in place. A ring answers with [ring, new] as they were before writing, because a chunk may overwrite
          what its own first tokens still see; a single token may only overwrite the slot that leaves its window.
        """
        assert self.slots is not None, "a layer's cache is read through ModelCache, which holds its slots"
        if not self.slots.ring and positions.shape[1] > self.slots.positions.shape[1]:
            raise ValueError(f"{positions.shape[1]} new tokens for a cache of {self.slots.positions.shape[1]}")
        slot, slots = self.slots.assign(positions)
        streams = jax.tree.map(lambda stream, n: write(stream, n, slot), self.streams, new)
        cache = TokenCache(streams, slots)
        if not slots.ring or positions.shape[1] == 1:
            return streams, slots.positions, cache
        joined = jax.tree.map(lambda old, n: jnp.concatenate([old, n.astype(old.dtype)], 1), self.streams, new)
        return joined, jnp.concatenate([self.slots.positions, positions], 1), cache

    def content(self) -> Any:
        """The arrays that count as content when bytes are measured."""
        return self.streams

    def bookkeeping(self) -> Any:
        return self.slots
