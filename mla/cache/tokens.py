"""What softmax mechanisms remember: per-token streams in preallocated slots, a growing buffer or a ring, plain or coded.

How a stream is kept is a small object: `Coded` where each token is coded as it is written, `Settling` where its form changes
later, or a plain array. The rule for all: a query at position i sees each token in the form that is stored right after token
i has been written, so no split of a text changes an answer.

Legend: B batch, S new tokens, C slots, E entries a query may look at.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mla.cache.codecs import Codec

Codecs = dict[str, Codec | None]  # of each stream, by its name
Streams = Any  # a NamedTuple of arrays [B, tokens, ...]: what a mechanism's `entries` returns
NEVER = np.iinfo(np.int32).max  # a position that no query reaches


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
    if slot.size == 1:
        # A single update XLA's CPU compiler turns into a slice under a select, for which it copies the stream up to four
        # times; beside one that is dropped it stays a scatter, in place.
        new, slot = jnp.concatenate([new, new], axis=1), jnp.pad(slot, ((0, 0), (0, 1)), constant_values=stream.shape[1])
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

    def write(self, new: jax.Array, slot: jax.Array, lengths: jax.Array) -> Coded:
        del lengths
        payload = jax.tree.map(lambda a, n: write(a, n, slot), self.payload, self.codec.encode(new))
        return Coded(payload, self.codec)

    def read(self, dtype: Any, lengths: jax.Array | None = None) -> jax.Array:
        del lengths
        return self.codec.decode(self.payload, dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Settling:
    """A stream whose tokens stay raw for a while, by `codec.unit` and `codec.lag`: there is no other copy of it.

    Attributes:
      payload: what `codec.encode` returns of the units that can be coded within the capacity, [B, units, ...]. Zeros until
        a unit is coded.
      raw: a ring of the newest tokens, [B, min(C, codec.held), ...]: token j of a row in slot j mod held.
      codec, capacity: static.
    """

    payload: Any
    raw: jax.Array
    codec: Codec = dataclasses.field(metadata={"static": True})
    capacity: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def empty(cls, like: jax.ShapeDtypeStruct, codec: Codec) -> Settling:
        """Zeros for a stream of this shape."""
        batch, capacity, *vector = like.shape
        unit = jax.eval_shape(codec.encode, jax.ShapeDtypeStruct((batch, codec.unit, *vector), like.dtype))
        units = codec.settled(capacity)
        payload = jax.tree.map(lambda a: jnp.zeros((batch, units, *a.shape[2:]), a.dtype), unit)
        return cls(payload, jnp.zeros((batch, min(capacity, codec.held), *vector), like.dtype), codec, capacity)

    def write(self, new: jax.Array, slot: jax.Array, lengths: jax.Array) -> Settling:
        """With new [B, S, ...] in slot [B, S] (C: not stored) of rows that have int32 [B] tokens so far."""
        held, unit = self.raw.shape[1], self.codec.unit
        stored = slot < self.capacity
        start = jnp.minimum(lengths, self.capacity)
        stop = start + jnp.sum(stored, axis=1, dtype=jnp.int32)
        newest = stored & (slot >= stop[:, None] - held)
        raw = write(self.raw, new, jnp.where(newest, slot % held, held))

        units = min(self.codec.settled(self.capacity), -(-new.shape[1] // unit))  # as many can be coded by this call
        if not units:
            return dataclasses.replace(self, raw=raw)
        first = self.codec.settled(start)[:, None]
        tokens = first * unit + jnp.arange(units * unit, dtype=jnp.int32)
        earlier = jax.vmap(lambda ring, index: ring[index])(self.raw, tokens % held)
        fresh = stored & (slot >= tokens[:, :1])
        whole = write(earlier, new, jnp.where(fresh, slot - tokens[:, :1], units * unit))
        number = first + jnp.arange(units, dtype=jnp.int32)
        number = jnp.where(number < self.codec.settled(stop)[:, None], number, self.codec.settled(self.capacity))
        payload = jax.tree.map(lambda a, n: write(a, n, number), self.payload, self.codec.encode(whole))
        return dataclasses.replace(self, payload=payload, raw=raw)

    def read(self, dtype: Any, lengths: jax.Array) -> jax.Array:
        """[B, C, ...] as they are after so many tokens, int32 [B]."""
        coded = jnp.arange(self.capacity) < (self.codec.settled(lengths) * self.codec.unit)[:, None]
        return _choose(coded, self.read_coded(dtype), self.read_raw(dtype))

    def read_raw(self, dtype: Any) -> jax.Array:
        """[B, C, ...], right where a token is raw."""
        return self.raw[:, np.arange(self.capacity) % self.raw.shape[1]].astype(dtype)

    def read_coded(self, dtype: Any) -> jax.Array:
        """[B, C, ...], right where a token is coded."""
        batch, _, *vector = self.raw.shape
        units = self.codec.settled(self.capacity)
        decoded = self.codec.decode(self.payload, dtype) if units else jnp.zeros((batch, 0, *vector), dtype)
        return jnp.pad(decoded, [(0, 0), (0, self.capacity - decoded.shape[1]), *[(0, 0)] * len(vector)])

    def coded_since(self, positions: jax.Array) -> jax.Array:
        """The position of the token that, once written, had each one coded: int32 [B, C], given those of all tokens."""
        unit, last = self.codec.unit, self.capacity - 1
        settler = (np.arange(self.capacity) // unit + 1) * unit - 1 + self.codec.lag
        found = positions[:, np.minimum(settler, last)]
        return jnp.where((settler <= last) & (found >= 0), found, NEVER)


def write_stored(stream: Any, new: jax.Array, slot: jax.Array, lengths: jax.Array) -> Any:
    """`write` for an array or a coded stream, of rows that have int32 [B] tokens so far."""
    return stream.write(new, slot, lengths) if _is_stored(stream) else write(stream, new, slot)


def read_stored(stream: Any, dtype: Any, lengths: jax.Array | None) -> jax.Array:
    """[B, C, ...] as it is after int32 [B] tokens: a coded stream in `dtype`, an array in its own."""
    return stream.read(dtype, lengths) if _is_stored(stream) else stream


def _choose(condition: jax.Array, yes: jax.Array, no: jax.Array) -> jax.Array:
    """[B, C, ...] by a condition [B, C]."""
    return jnp.where(condition.reshape(*condition.shape, *(1,) * (yes.ndim - 2)), yes, no)


def _is_stored(stream: Any) -> bool:
    return isinstance(stream, Coded | Settling)


def is_unrotated(stream: Any) -> bool:
    """Whether it is stored before its rotation."""
    return _is_stored(stream) and bool(stream.codec.unrotated)


def map_streams(function: Any, streams: Streams, *rest: Streams) -> Streams:
    """`jax.tree.map` over streams of all kinds."""
    return jax.tree.map(function, streams, *rest, is_leaf=_is_stored)


def _settling(streams: Streams) -> list[Settling]:
    return [stream for stream in jax.tree.leaves(streams, is_leaf=_is_stored) if isinstance(stream, Settling)]


def empty_stream(shape: tuple[int, ...], dtype: Any, codec: Codec | None) -> Any:
    """A stream [B, C, ...] of zeros, stored as the codec says."""
    if codec is None:
        return jnp.zeros(shape, dtype)
    return (Settling if codec.held else Coded).empty(jax.ShapeDtypeStruct(shape, dtype), codec)


def empty_streams(like: Streams, batch: int, capacity: int, dtype: Any, codecs: Codecs) -> Streams:
    """Streams [B, C, ...] of zeros for entries shaped like `like`, each stored as `codecs` says by its name."""

    def one(name: str, stream: Any) -> Any:
        return None if stream is None else empty_stream((batch, capacity, *stream.shape[2:]), dtype, codecs.get(name))

    return type(like)(*(one(name, stream) for name, stream in zip(like._fields, like, strict=True)))


def _write(streams: Streams, new: Streams, slot: jax.Array, lengths: jax.Array) -> Streams:
    """`write` for streams of all kinds, of rows that have int32 [B] tokens so far."""
    return map_streams(lambda s, n: write_stored(s, n, slot, lengths), streams, new)


def read(streams: Streams, like: Streams, lengths: jax.Array | None) -> Streams:
    """Arrays [B, C, ...] as they are after int32 [B] tokens: coded streams in the dtypes of `like`."""
    return map_streams(lambda s, n: read_stored(s, n.dtype, lengths), streams, like)


def _as_stored(new: Streams, streams: Streams) -> Streams:
    """New entries as they will be read once they are stored."""

    def one(stream: Any, entries: jax.Array) -> jax.Array:
        if isinstance(stream, Coded):
            return stream.codec.decode(stream.codec.encode(entries), entries.dtype)
        return entries.astype(stream.dtype)

    return map_streams(one, streams, new)


class Seen(NamedTuple):
    """What new queries may look at.

    entries [B, E, ...] each; their positions int32 [B, E]; and, where a token is there in several forms, from which
    position on queries see each and up to which one they do, int32 [B, E]. moved, int32 [B, E]: entries are to be looked at
    as if they stood so many tokens later (`SoftmaxMixer.shift`).
    """

    entries: Streams
    positions: jax.Array
    since: jax.Array | None = None
    until: jax.Array | None = None
    moved: jax.Array | None = None


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
        cls, like: Streams, batch: int, capacity: int, dtype: Any, window: int | None = None, codecs: Codecs | None = None
    ) -> TokenCache:
        """An empty cache for entries shaped like `like`, a NamedTuple ([B, tokens, ...]; only the trailing shape matters).

        With a window the buffer is a ring of at most that many slots, whatever the capacity. `codecs` says how each stream
        is stored, by its name; those without one are plain arrays of `dtype`.
        """
        ring, capacity = window is not None, capacity if window is None else min(capacity, window)
        streams = empty_streams(like, batch, capacity, dtype, codecs or {})
        assert not (ring and _settling(streams)), "a ring forgets tokens that a codec has yet to code"
        return cls(streams, Slots.empty(batch, capacity, ring))

    def extend(self, new: Streams, positions: jax.Array) -> tuple[Seen, TokenCache]:
        """Stores new entries and answers what the new queries may look at.

        Args:
          new: entries of the S new tokens, [B, S, ...] each.
          positions: int32 [B, S]; -1 is padding, which is not stored.

        Returns:
          What is seen, and the new cache. A growing cache answers with its slots after writing, in place. A ring answers
          with [ring, new] as they were before writing, because a chunk may overwrite what its own first tokens still see;
          a single token may only overwrite the slot that leaves its window. Coded streams are read as they are stored, new
          entries included. Where the form of a token changes, several new tokens get all forms, each with its lifetime.
        """
        assert self.slots is not None, "a layer's cache is read through ModelCache, which holds its slots"
        single = positions.shape[1] == 1
        if not self.slots.ring and positions.shape[1] > self.slots.positions.shape[1]:
            raise ValueError(f"{positions.shape[1]} new tokens for a cache of {self.slots.positions.shape[1]}")
        slot, slots = self.slots.assign(positions)
        cache = TokenCache(_write(self.streams, new, slot, self.slots.lengths), slots)
        if not single and slots.ring:
            before, after = read(self.streams, new, self.slots.lengths), _as_stored(new, self.streams)
            joined = jax.tree.map(lambda old, n: jnp.concatenate([old, n.astype(old.dtype)], 1), before, after)
            return Seen(joined, jnp.concatenate([self.slots.positions, positions], 1)), cache
        if not single and _settling(self.streams):
            return self._forms(new, slot, cache.streams, slots.positions), cache
        return Seen(read(cache.streams, new, slots.lengths), slots.positions), cache

    def _forms(self, new: Streams, slot: jax.Array, after: Streams, positions: jax.Array) -> Seen:
        """All forms of each token: all streams raw, then coded one after the other in the order in which that happens."""
        times = {(s.codec.unit, s.codec.lag): s.coded_since(positions) for s in _settling(after)}
        edges = jnp.sort(jnp.stack(list(times.values())), axis=0)
        since, until = [jnp.zeros_like(positions), *edges], [*edges, jnp.full_like(positions, NEVER)]

        def forms(before: Any, stream: Any, entries: jax.Array) -> jax.Array:
            if not isinstance(stream, Settling):
                return jnp.concatenate([read(stream, entries, None)] * len(since), axis=1)
            raw = write(before.read_raw(entries.dtype), entries.astype(stream.raw.dtype), slot)
            coded, time = stream.read_coded(entries.dtype), times[stream.codec.unit, stream.codec.lag]
            return jnp.concatenate([_choose(time <= start, coded, raw) for start in since], axis=1)

        joined = [jnp.concatenate(each, axis=1) for each in ([positions] * len(since), since, until)]
        return Seen(map_streams(forms, self.streams, after, new), *joined)

    def unrotated(self) -> list[str]:
        """Streams that are stored before their rotation."""
        named = zip(getattr(self.streams, "_fields", ()), self.streams, strict=False)
        return [name for name, stream in named if is_unrotated(stream)]

    def content(self) -> Any:
        """The arrays that count as content when bytes are measured."""
        return self.streams

    def bookkeeping(self) -> Any:
        return self.slots
