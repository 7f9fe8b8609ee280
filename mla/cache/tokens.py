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

from mla.cache.clock import EVERY_TOKEN, NEVER, Clock, Slots, by_head, overwritten, write
from mla.cache.codecs import Codec
from mla.cache.contract import ROWS, STREAM, Meaning, replaced

Codecs = dict[str, Codec | None]  # of each stream, by its name
Streams = NamedTuple  # of arrays [B, tokens, ...], or of what stores them: what a mechanism's `entries` returns


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


def joined(streams: Streams, new: Streams) -> Streams:
    """[stored, new] as they are stored: arrays, and streams whose tokens are coded as they are written."""

    def one(stream: Any, entries: jax.Array) -> Any:
        if not isinstance(stream, Coded):
            return jnp.concatenate([stream, entries.astype(stream.dtype)], axis=1)
        coded = stream.codec.encode(entries)
        return Coded(jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), stream.payload, coded), stream.codec)

    return map_streams(one, streams, new)


class Seen(NamedTuple):
    """A view of what new queries may look at: as it is stored, to be decoded by `read`, or by a kernel that knows the codes.

    Attributes:
      stored: streams of E entries each, arrays [B, E, ...], `Coded` or `Settling`.
      positions: int32 [B, E], where entries stand; [B, E, K] where key heads have kept different ones.
      since, until: int32 like positions: queries at since <= t < until see an entry that is there in several forms.
      moved: int32 [B, E], how many tokens later than where they stand entries are looked at (`SoftmaxMixer.shift`).
      lengths: int32 [B], tokens each row has stored, where that decides their form.
    """

    stored: Streams
    positions: jax.Array
    since: jax.Array | None = None
    until: jax.Array | None = None
    moved: jax.Array | None = None
    lengths: jax.Array | None = None

    def read(self, dtype: Any) -> Streams:
        """The entries as arrays [B, E, ...] of `dtype`."""
        return map_streams(lambda stream: read_stored(stream, dtype, self.lengths).astype(dtype), self.stored)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenCache:
    """Streams of one layer that have an entry for each beat of a clock.

    Attributes:
      streams: a NamedTuple, each an array [B, C, ...], `Coded` or `Settling`.
      slots: where each entry stands; None while a model keeps it once for all layers of one clock (`ModelCache`).
      clock: static.
      names: static, what the leading axes of the streams' arrays mean.
    """

    streams: Any
    slots: Slots | None
    clock: Clock = dataclasses.field(default=EVERY_TOKEN, metadata={"static": True})
    names: tuple[str | None, ...] = dataclasses.field(default=STREAM.names, metadata={"static": True})

    @classmethod
    def empty(
        cls,
        like: Streams,
        batch: int,
        capacity: int,
        dtype: Any,
        clock: Clock = EVERY_TOKEN,
        codecs: Codecs | None = None,
        names: tuple[str | None, ...] = STREAM.names,
    ) -> TokenCache:
        """No entries yet, and room for those of a text of `capacity` tokens.

        Args:
          like: a NamedTuple of arrays or shapes [B, tokens, ...], of which only the trailing shape matters.
          dtype: of streams that `codecs`, by their names, does not say how to store.
        """
        streams = empty_streams(like, batch, clock.slots(capacity), dtype, codecs or {})
        assert not (clock.refusal and _settling(streams)), "entries leave before a codec has coded them"
        return cls(streams, Slots.empty(batch, capacity, clock), clock, names)

    def extend(self, new: Streams, positions: jax.Array, joins: jax.Array | None = None) -> tuple[Seen, TokenCache]:
        """Stores new entries and answers what the new queries may look at.

        Args:
          new: the S new entries, [B, S, ...] each.
          positions: int32 [B, S]; -1 is padding, which is not stored.
          joins: bool [B, S], of an open clock, or [B, S, K], where heads keep time of their own: whether an entry takes the
            place of the one before it.

        Returns:
          What is seen, and the new cache. A growing cache answers with its slots after writing, in place. A ring answers
          with [ring, new] as they were before writing, because a chunk may overwrite what its own first tokens still see;
          a single token may only overwrite the slot that leaves its window. Coded streams are read as they are stored, new
          entries included. Where the form of a token changes, several new tokens get all forms, each with its lifetime.
        """
        assert self.slots is not None, "a layer's cache is read through ModelCache, which holds its slots"
        stride, ring = self.clock.stride, self.clock.window is not None
        single = positions.shape[1] == 1 and not (ring and stride > 1)  # one entry, but perhaps of several tokens
        if self.clock.open:
            least = -(-positions.shape[1] // stride)
        else:
            least = positions.shape[1] - (stride > 1)
        if not ring and least > self.slots.positions.shape[1]:
            raise ValueError(f"{positions.shape[1]} new tokens for a cache of {self.slots.positions.shape[1]}")
        slot, slots = self.slots.assign(positions, joins)
        cache = dataclasses.replace(self, streams=_write(self.streams, new, slot, self.slots.lengths), slots=slots)
        if joins is not None and not single:
            return self._replaced(new, positions, joins), cache
        if ring and not single:
            where = jnp.concatenate([self.slots.positions, positions], 1)
            # A mask's window counts tokens; of pooled entries it is said here when each one leaves.
            until = None if stride == 1 else where + stride * (self.clock.window or 0)
            return Seen(joined(self.streams, new), where, until=until), cache
        if not single and _settling(self.streams):
            return self._forms(new, slot, cache.streams, slots.positions), cache
        return Seen(cache.streams, slots.positions, lengths=slots.lengths), cache

    def _replaced(self, new: Streams, positions: jax.Array, joins: jax.Array) -> Seen:
        """[stored, new]: each until an entry takes its place. The newest stored one goes when the first new one joins it."""
        assert self.slots is not None
        where, lengths = by_head(positions, joins), self.slots.lengths
        first = (where >= 0) & (jnp.cumsum(where >= 0, axis=1) == 1)
        ends = jnp.min(jnp.where(first & joins, where, NEVER), axis=1, keepdims=True)
        slots = jnp.arange(self.slots.positions.shape[1]).reshape(-1, *(1,) * (lengths.ndim - 1))
        newest = slots == lengths[:, None] - 1
        until = jnp.concatenate([jnp.where(newest, ends, NEVER), overwritten(joins, positions)], axis=1)
        return Seen(joined(self.streams, new), jnp.concatenate([self.slots.positions, where], axis=1), until=until)

    def _forms(self, new: Streams, slot: jax.Array, after: Streams, positions: jax.Array) -> Seen:
        """All forms of each token, decoded: all streams raw, then coded one after the other as that happens."""
        times = {(s.codec.unit, s.codec.lag): s.coded_since(positions) for s in _settling(after)}
        edges = jnp.sort(jnp.stack(list(times.values())), axis=0)
        since, until = [jnp.zeros_like(positions), *edges], [*edges, jnp.full_like(positions, NEVER)]

        def forms(before: Any, stream: Any, entries: jax.Array) -> jax.Array:
            if not isinstance(stream, Settling):
                return jnp.concatenate([read_stored(stream, entries.dtype, None)] * len(since), axis=1)
            raw = write(before.read_raw(entries.dtype), entries.astype(stream.raw.dtype), slot)
            coded, time = stream.read_coded(entries.dtype), times[stream.codec.unit, stream.codec.lag]
            return jnp.concatenate([_choose(time <= start, coded, raw) for start in since], axis=1)

        lives = [jnp.concatenate(each, axis=1) for each in ([positions] * len(since), since, until)]
        return Seen(map_streams(forms, self.streams, after, new), *lives)

    def newest(self, dtype: Any) -> tuple[Streams, jax.Array]:
        """The newest entry of each row, [B, 1, ...] of `dtype`, and where it stands, int32 [B], -1 where there is none.

        Of streams that are plain or coded token by token.
        """
        assert self.slots is not None
        slot, where = self.slots.newest()

        def row(a: jax.Array) -> jax.Array:
            return jax.vmap(lambda rows, index: rows[index][None])(a, slot)

        def one(stream: Any) -> jax.Array:
            kept = Coded(jax.tree.map(row, stream.payload), stream.codec) if isinstance(stream, Coded) else row(stream)
            return read_stored(kept, dtype, None).astype(dtype)

        return map_streams(one, self.streams), where

    def unrotated(self) -> list[str]:
        """Streams that are stored before their rotation."""
        named = zip(getattr(self.streams, "_fields", ()), self.streams, strict=False)
        return [name for name, stream in named if is_unrotated(stream)]

    def content(self) -> Any:
        """The arrays that count as content when bytes are measured."""
        return self.streams

    def bookkeeping(self) -> Any:
        return self.slots

    def axes(self) -> Any:
        """What the axes of its arrays mean, in their place; see `Meaning`."""
        return replaced(self, streams=Meaning(self.names), slots=None if self.slots is None else ROWS)
