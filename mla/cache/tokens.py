"""What softmax mechanisms remember: per-token streams in preallocated slots, a growing buffer or a ring, plain or coded.

Legend: B batch, S new tokens, C slots, E entries a query may look at.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from mla.cache.codecs import Codec

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
class Coded:
    """A stream as a codec stores it: there is no other copy of it.

    Attributes:
      payload: what `codec.encode` returns, a pytree of arrays [B, C, ...].
      codec: static.
    """

    payload: Any
    codec: Codec = dataclasses.field(metadata={"static": True})

    @classmethod
    def empty(cls, like: jax.ShapeDtypeStruct, codec: Codec) -> Coded:
        """Zeros for a stream of this shape; every codec decodes them to finite numbers."""
        return cls(jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(codec.encode, like)), codec)


def _is_coded(stream: Any) -> bool:
    return isinstance(stream, Coded)


def _write(streams: Streams, new: Streams, slot: jax.Array) -> Streams:
    """`write` for streams of either kind."""

    def one(stream: Any, entries: jax.Array) -> Any:
        if not _is_coded(stream):
            return write(stream, entries, slot)
        payload = jax.tree.map(lambda a, n: write(a, n, slot), stream.payload, stream.codec.encode(entries))
        return Coded(payload, stream.codec)

    return jax.tree.map(one, streams, new, is_leaf=_is_coded)


def _read(streams: Streams, like: Streams) -> Streams:
    """Arrays [B, C, ...]: coded streams in the dtypes of `like`."""

    def one(stream: Any, entries: jax.Array) -> jax.Array:
        return stream.codec.decode(stream.payload, entries.dtype) if _is_coded(stream) else stream

    return jax.tree.map(one, streams, like, is_leaf=_is_coded)


def _as_stored(new: Streams, streams: Streams) -> Streams:
    """New entries as they will be read once they are stored."""

    def one(stream: Any, entries: jax.Array) -> jax.Array:
        if _is_coded(stream):
            return stream.codec.decode(stream.codec.encode(entries), entries.dtype)
        return entries.astype(stream.dtype)

    return jax.tree.map(one, streams, new, is_leaf=_is_coded)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenCache:
    """Per-token streams of one layer.

    Attributes:
      streams: the mechanism's entries, each an array [B, C, ...] or `Coded`.
      slots: where each token stands; None while the model keeps it once for all layers (`mla.model.ModelCache`).
    """

    streams: Streams
    slots: Slots | None

    @classmethod
    def empty(
        cls,
        like: Streams,
        batch: int,
        capacity: int,
        dtype: Any,
        window: int | None = None,
        codecs: dict[str, Codec | None] | None = None,
    ) -> TokenCache:
        """An empty cache for entries shaped like `like`, a NamedTuple ([B, tokens, ...]; only the trailing shape matters).

        With a window the buffer is a ring of at most that many slots, whatever the capacity. `codecs` says how each stream
        is stored, by its name; those without one are plain arrays of `dtype`.
        """
        ring, codecs = window is not None, codecs or {}
        capacity = min(capacity, window) if window is not None else capacity
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct((batch, capacity, *a.shape[2:]), dtype), like)
        streams = type(like)(
            *(
                shape if shape is None else Coded.empty(shape, codec) if codec else jnp.zeros(shape.shape, dtype)
                for shape, codec in ((shape, codecs.get(name)) for name, shape in zip(like._fields, shapes, strict=True))
            )
        )
        return cls(streams, Slots.empty(batch, capacity, ring))

    def extend(self, new: Streams, positions: jax.Array) -> tuple[Streams, jax.Array, TokenCache]:
        """Stores new entries and answers what the new queries may look at.

        Args:
          new: entries of the S new tokens, [B, S, ...] each.
          positions: int32 [B, S]; -1 is padding, which is not stored.

        Returns:
          (entries [B, E, ...], their positions int32 [B, E], the new cache). A growing cache answers with its slots after
          writing, in place. A ring answers with [ring, new] as they were before writing, because a chunk may overwrite
          what its own first tokens still see; a single token may only overwrite the slot that leaves its window. Coded
          streams are read as they are stored, new entries included, so that no split of a text changes an answer.
        """
        assert self.slots is not None, "a layer's cache is read through ModelCache, which holds its slots"
        if not self.slots.ring and positions.shape[1] > self.slots.positions.shape[1]:
            raise ValueError(f"{positions.shape[1]} new tokens for a cache of {self.slots.positions.shape[1]}")
        slot, slots = self.slots.assign(positions)
        cache = TokenCache(_write(self.streams, new, slot), slots)
        if not slots.ring or positions.shape[1] == 1:
            return _read(cache.streams, new), slots.positions, cache
        before, after = _read(self.streams, new), _as_stored(new, self.streams)
        joined = jax.tree.map(lambda old, n: jnp.concatenate([old, n.astype(old.dtype)], 1), before, after)
        return joined, jnp.concatenate([self.slots.positions, positions], 1), cache

    def content(self) -> Any:
        """The arrays that count as content when bytes are measured."""
        return self.streams

    def bookkeeping(self) -> Any:
        return self.slots
