"""MiniCache (2405.14366): one direction for two adjacent layers, a norm for each.

    u, v      unit vectors of a token's stream and head in the lower and the upper layer; Omega = arccos(u . v)
    e         = [sin((1 - t) Omega) u + sin(t Omega) v] / sin Omega, spherical interpolation, stored once for the pair
    restored  |x| e

Keys, values, a latent and its rotary key are merged each by itself, as they are stored: keys after their rotation. Of a
prompt's tokens those whose directions are farthest apart, Omega / pi, are retained: both layers' vectors stay beside the
merged ones, and are read in their place. (The paper's printed inequality would retain the closest; its text and its code do
not.) A query reads the tokens of its own call as they are, because merging needs the upper layer, and all others restored:
a prompt is attended exactly.

A codec stores directions as it would store the entries: the paper's 5.02x is 4/3 of the merged half times 16 / 4.25 bits.
Norms stay in the cache's dtype, and so do retained vectors under codecs that leave tokens raw for a while; the others code
them too. Before their rotation (`Codec.unrotated`) keys are merged as they are stored. Norms saturate where the dtype ends,
so that what is restored of finite vectors is finite.

Legend: B batch, S new tokens, C slots, R retained tokens, .. the heads of a stream.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from mla.cache.clock import EVERY_TOKEN, Clock, Slots, write
from mla.cache.codecs import Codec
from mla.cache.contract import STREAM, replaced
from mla.cache.eviction import parse
from mla.cache.finite import norm, saturate
from mla.cache.tokens import (
    Codecs,
    Coded,
    Seen,
    Streams,
    empty_stream,
    is_unrotated,
    read_stored,
    write_stored,
)
from mla.errors import UserError

FIELD = "config.eval.cache.merge"
REGISTRY = {"minicache": "mla.cache.merged:MiniCache"}
FINEST = 1000  # retained shares are multiples of 1 / FINEST


@dataclasses.dataclass(frozen=True)
class MiniCache:
    """What is merged, and how. Static. Fields are settings."""

    start: int = -1  # the lowest merged layer; by default (-1) half of them: the upper half is merged
    t: float = 0.6  # from the lower (0) to the upper layer's direction (1)
    retain: float = 0.05  # of a prompt's tokens in each head, rounded up

    def __post_init__(self) -> None:
        for name in ("t", "retain"):
            value = getattr(self, name)
            if value > 1:
                raise UserError(f"{FIELD}: minicache: {name}={value} is above 1")
        if abs(self.retain * FINEST - round(self.retain * FINEST)) > 1e-6:
            raise UserError(f"{FIELD}: minicache: retain={self.retain} is no whole number of thousandths")

    def pairs(self, layers: int) -> list[int]:
        """The lower layer of each pair: (S, S + 1), (S + 2, S + 3), .. of so many layers. An odd last one stays alone."""
        start = layers // 2 if self.start < 0 else self.start
        return list(range(start, layers - 1, 2))

    def retained(self, tokens: Any) -> Any:
        """How many of a prompt's tokens are retained: ceil(retain * tokens), an int or an int32 array, in whole numbers."""
        return -(-round(self.retain * FINEST) * tokens // FINEST)

    @property
    def unit(self) -> int:
        """Prompts of so many tokens, and multiples of it, have a whole number of retained ones."""
        return FINEST // math.gcd(FINEST, round(self.retain * FINEST))


def merge(spec: str) -> MiniCache | None:
    """What `minicache[:setting=value,...]` says; None for `none`.

    Raises:
      UserError: an unknown name or setting, with the nearest match, or a value of the wrong type.
    """
    found: MiniCache | None = parse(spec, REGISTRY, FIELD)
    return found


# ------------------------------------------------------------------------------------------------------------- vectors


def unit_and_norm(vectors: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[.., D] -> directions [.., D] and norms [..], fp32; where all is zero the direction is too."""
    vectors, norms = vectors.astype(jnp.float32), norm(vectors)
    return vectors / jnp.where(norms == 0, 1, norms)[..., None], norms


def slerp(lower: jax.Array, upper: jax.Array, t: float) -> tuple[jax.Array, jax.Array]:
    """Unit vectors [.., D] -> what lies between them, a unit vector, and their angle Omega [..]."""
    # Of an arc cosine near 1 half the digits would be lost; the chord and its complement keep them.
    angle = 2 * jnp.arctan2(jnp.linalg.norm(lower - upper, axis=-1), jnp.linalg.norm(lower + upper, axis=-1))
    sine = jnp.sin(angle)
    straight = sine < 1e-4
    sine = jnp.where(straight, 1, sine)
    low = jnp.where(straight, 1 - t, jnp.sin((1 - t) * angle) / sine)
    high = jnp.where(straight, t, jnp.sin(t * angle) / sine)
    return unit_and_norm(low[..., None] * lower + high[..., None] * upper)[0], angle


# --------------------------------------------------------------------------------------------------------------- cache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Merged:
    """One stream of a pair of layers.

    Attributes:
      directions: [B, C, .., D], of both layers; an array, or as a codec stores it.
      norms: of the lower and of the upper layer, [B, C, ..] each.
      raw: the retained vectors of both, [B, R, .., D] each; arrays or `Coded`.
      index: int32 [B, R, ..], the slot of each retained token; C: none.
    """

    directions: Any
    norms: tuple[jax.Array, jax.Array]
    raw: tuple[Any, Any]
    index: jax.Array

    @classmethod
    def empty(cls, shape: tuple[int, ...], retained: int, dtype: Any, codec: Codec | None = None) -> Merged:
        batch, capacity, *heads, width = shape
        norms = jnp.zeros((batch, capacity, *heads), dtype)
        alone = codec_of_retained(codec) if retained else None
        raw = empty_stream((batch, retained, *heads, width), dtype, alone)
        index = jnp.full((batch, retained, *heads), capacity, jnp.int32)
        return cls(empty_stream(shape, dtype, codec), (norms, norms), (raw, raw), index)

    def write(self, new: tuple[jax.Array, jax.Array], slot: jax.Array, lengths: jax.Array, merge: MiniCache) -> Merged:
        """With both layers' new [B, S, .., D] in slot [B, S] of rows that have int32 [B] tokens so far; 0: their prompt."""
        (lower, low), (upper, high) = unit_and_norm(new[0]), unit_and_norm(new[1])
        directions, angle = slerp(lower, upper, merge.t)
        low, high = (saturate(norms, self.norms[0].dtype) for norms in (low, high))
        merged = dataclasses.replace(
            self,
            directions=write_stored(self.directions, directions, slot, lengths),
            norms=(write(self.norms[0], low, slot), write(self.norms[1], high, slot)),
        )
        retained = min(self.index.shape[1], merge.retained(slot.shape[1]))
        return merged._retain(retained, new, angle, slot, lengths == 0, merge) if retained else merged

    def _retain(
        self,
        most: int,
        new: tuple[jax.Array, jax.Array],
        angle: jax.Array,
        slot: jax.Array,
        first: jax.Array,
        merge: MiniCache,
    ) -> Merged:
        """Keeps both layers' new vectors where the angle [B, S, ..] is largest, of at most so many tokens."""
        there = slot < self.norms[0].shape[1]
        order = jnp.argsort(-jnp.where(_over(there, angle), angle, -1), axis=1, stable=True)[:, :most]
        allowed = merge.retained(there.sum(1, keepdims=True))  # a padded row has fewer
        kept = _over((jnp.arange(most) < allowed) & first[:, None], order)

        def put(old: jax.Array, vectors: jax.Array) -> jax.Array:
            chosen = jnp.where(_over(kept, vectors), vectors.astype(old.dtype), old[:, :most])
            return old.at[:, :most].set(chosen)

        def put_vectors(old: Any, vectors: jax.Array) -> Any:
            vectors = _at(vectors, order[..., None])
            if not isinstance(old, Coded):
                return put(old, vectors)
            return dataclasses.replace(old, payload=jax.tree.map(put, old.payload, old.codec.encode(vectors)))

        raw = (put_vectors(self.raw[0], new[0]), put_vectors(self.raw[1], new[1]))
        index = _at(jnp.broadcast_to(_over(slot, angle), angle.shape), order)
        return dataclasses.replace(self, raw=raw, index=put(self.index, index))

    def restored(self, half: int, lengths: jax.Array) -> jax.Array:
        """The lower (0) or the upper (1) layer's entries, [B, C, .., D], after int32 [B] tokens, in the dtype of norms."""
        norms, dtype = self.norms[half].astype(jnp.float32), self.norms[half].dtype
        restored = saturate(norms[..., None] * read_stored(self.directions, jnp.float32, lengths), dtype)

        def put(stream: jax.Array, index: jax.Array, raw: jax.Array) -> jax.Array:
            return stream.at[index].set(raw, mode="drop")

        for _ in range(self.index.ndim - 2):
            put = jax.vmap(put, in_axes=(1, 1, 1), out_axes=1)
        return jax.vmap(put)(restored, self.index, read_stored(self.raw[half], dtype, None))

    def of(self, half: int) -> Any:
        """What reading one half reads."""
        return self.directions, self.norms[half], self.raw[half], self.index


def codec_of_retained(codec: Codec | None) -> Codec | None:
    """How retained vectors are stored where directions are stored by `codec`: alone, without tokens that they wait for."""
    return None if codec is None or codec.held else codec


def _over(array: jax.Array, like: jax.Array) -> jax.Array:
    """[B, n] to be broadcast over the heads and channels of `like`, [B, n, ..]."""
    return array.reshape(*array.shape, *(1,) * (like.ndim - array.ndim))


def _at(array: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take_along_axis(array, index, axis=1)


def _is_merged(stream: Any) -> bool:
    return isinstance(stream, Merged)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PairCache:
    """What two layers remember; it stands at the lower one, and an `Upper` at the upper.

    Attributes:
      streams: the mechanism's entries, `Merged` each; None for a stream without channels, or that is not there.
      merge: static.
    """

    streams: Streams
    merge: MiniCache = dataclasses.field(metadata={"static": True})

    def content(self) -> Any:
        """The arrays that count as content when bytes are measured: retained vectors and indices too."""
        return self.streams

    def bookkeeping(self) -> Any:
        return None

    def axes(self) -> Any:
        """What the axes of its arrays mean, in their place; see `Meaning`."""
        return replaced(self, streams=STREAM)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Upper:
    """Marks the upper layer of a pair: the layer below holds its entries."""

    def content(self) -> Any:
        return None

    def bookkeeping(self) -> Any:
        return None

    def axes(self) -> Any:
        return self


class New(NamedTuple):
    """Entries of a call that have not been merged yet: where they go, and how many tokens each row had before."""

    entries: Streams
    slot: jax.Array
    lengths: jax.Array


@dataclasses.dataclass(frozen=True)
class PairHalf:
    """A pair's cache as one of its layers sees it: the lower (0) or the upper (1). Lives within a call only."""

    pair: PairCache
    slots: Slots
    half: int
    new: New | None = None
    clock: ClassVar[Clock] = EVERY_TOKEN

    @classmethod
    def empty(
        cls, like: Streams, batch: int, capacity: int, dtype: Any, merge: MiniCache, prompt: int, codecs: Codecs
    ) -> list[PairHalf]:
        """Both halves of an empty pair for entries like `like`, see `TokenCache.empty`, and prompts of so many tokens."""

        def one(name: str, stream: Any) -> Merged | None:
            if stream is None or not stream.size:
                return None
            shape = (batch, capacity, *stream.shape[2:])
            return Merged.empty(shape, merge.retained(prompt), dtype, codecs.get(name))

        pair = PairCache(like._make(map(one, like._fields, like)), merge)
        return [cls(pair, Slots.empty(batch, capacity), half) for half in (0, 1)]

    def extend(self, new: Streams, positions: jax.Array) -> tuple[Seen, PairHalf]:
        """See `TokenCache.extend`: stored tokens restored, new ones as they are; `join` stores them."""
        slot, slots = self.slots.assign(positions)

        def seen(stream: Merged | None, entries: Any) -> jax.Array | None:
            if stream is not None:
                return write(stream.restored(self.half, self.slots.lengths), entries, slot)
            return None if entries is None else jnp.zeros((*slots.positions.shape, *entries.shape[2:]), entries.dtype)

        streams = new._make(map(seen, self.pair.streams, new))
        half = dataclasses.replace(self, slots=slots, new=New(new, slot, self.slots.lengths))
        return Seen(streams, slots.positions), half

    def join(self, upper: PairHalf) -> PairCache:
        """The pair's cache with what both halves have been given, the lower one's being `self`."""
        if self.new is None or upper.new is None:
            return self.pair
        (lower, slot, lengths), merge = self.new, self.pair.merge

        def one(stream: Merged | None, low: Any, high: Any) -> Merged | None:
            return None if stream is None else stream.write((low, high), slot, lengths, merge)

        return dataclasses.replace(self.pair, streams=lower._make(map(one, self.pair.streams, lower, upper.new.entries)))

    def unrotated(self) -> list[str]:
        """Streams that are merged before their rotation."""
        named = zip(self.pair.streams._fields, self.pair.streams, strict=True)
        return [name for name, stream in named if stream is not None and is_unrotated(stream.directions)]

    def content(self) -> Any:
        """What a decode step of this layer reads."""
        return jax.tree.map(lambda stream: stream.of(self.half), self.pair.streams, is_leaf=_is_merged)


def formula_bytes(
    merge: MiniCache, streams: Iterable[tuple[tuple[int, ...], Codec | None]], itemsize: int, length: int
) -> int:
    """Content bytes of a pair of layers for a prompt of so many tokens, that leaves streams [.., D] of these shapes.

    Of each token a direction, as its codec stores it, and two norms; of each retained one two vectors and an index.
    """
    retained, total = merge.retained(length), 0
    for shape, codec in streams:
        heads, alone = math.prod(shape[:-1]), codec_of_retained(codec)
        vector = alone.unit_bytes(shape) if alone else math.prod(shape) * itemsize
        directions = codec.allocated_bytes(shape, itemsize, length) if codec else length * math.prod(shape) * itemsize
        total += directions + length * heads * 2 * itemsize + retained * (2 * vector + heads * 4)
    return total
