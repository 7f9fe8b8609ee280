"""When a store gets an entry and where it stands: clocks, declared by layers, and their bookkeeping, kept once for each.

Legend: B batch, S new entries, C slots, K key heads.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mla.cache.contract import ROWS, replaced

NEVER = np.iinfo(np.int32).max  # a position that no query reaches


@dataclasses.dataclass(frozen=True)
class Clock:
    """When a store gets an entry, and how many it holds. Static.

    Layers that declare equal clocks store the same tokens in the same slots, and share their bookkeeping.

    Attributes:
      stride: tokens an entry; it stands at the last of them.
      open: an entry is there from the first of its tokens on; each further one takes its place, where it stands included.
      window: entries that are held at most, the newest, in a ring; None: all.
      kept: of every `window` tokens of the text, the last so many stay for good; the ring is of the others.
      heads: key heads that each decide by their data when an entry begins, so that no two share anything; 0: all tokens
        are treated alike.
    """

    stride: int = 1
    window: int | None = None
    heads: int = 0
    open: bool = False
    kept: int = 0

    def slots(self, capacity: int) -> int:
        """Entries that are allocated for a text of up to `capacity` tokens.

        Of those that stay, all that a span of `window` tokens will leave have room once it begins.
        """
        if self.window is not None and self.kept:
            return min(capacity, self.window - self.kept) + self.kept * -(-capacity // self.window)
        entries = -(-capacity // self.stride) if self.open else capacity // self.stride
        return entries if self.window is None else min(entries, self.window)

    @property
    def period(self) -> int:
        """Tokens in which as many entries are added as in any other so many, in the long run."""
        return self.window or 1 if self.kept else self.stride

    @property
    def growth(self) -> float:
        """Entries that a token adds in the long run."""
        return self.kept / self.period if self.window is not None else 1 / self.stride

    def places(self, tokens: jax.Array) -> jax.Array:
        """Where the tokens of these numbers, int32 from 0, go in slots of which some stay."""
        assert self.window is not None
        ring, within = self.window - self.kept, tokens % self.window
        return jnp.where(within < ring, within, tokens // self.window * self.kept + within)

    def beats(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Which of S new tokens end an entry.

        Args:
          positions: int32 [B, S]; -1 is padding, before or behind a row's tokens, which follow one another.

        Returns:
          int32 [B, N] each, for the N entries that S tokens can end at most: the index of the token among the S, and its
          position, -1 where there is no such token.
        """
        count = positions.shape[1]
        ends = (positions >= 0) & ((positions + 1) % self.stride == 0)
        index = jnp.argmax(ends, axis=1)[:, None] + self.stride * jnp.arange(-(-count // self.stride))
        there = (index < count) & ends.any(axis=1, keepdims=True)
        index = jnp.minimum(index, count - 1).astype(jnp.int32)
        return index, jnp.where(there, jnp.take_along_axis(positions, index, axis=1), -1)

    def joins(self, positions: jax.Array, newest: jax.Array) -> jax.Array:
        """Which of S new tokens belong to an entry that is there already, of an open clock: bool [B, S].

        Args:
          positions: int32 [B, S]; -1 is padding, before or behind a row's tokens.
          newest: int32 [B], where the newest entry stands, -1 where there is none.
        """
        before = jnp.concatenate([newest[:, None], positions[:, :-1]], axis=1)
        before = jnp.where(before < 0, newest[:, None], before)
        return (positions >= 0) & (before >= 0) & (positions // self.stride == before // self.stride)

    @property
    def refusal(self) -> str:
        """Why entries can neither leave out of turn nor be merged with another layer's; "" where each token has one."""
        if self.heads:
            return "merges or drops entries by a rule of its own"
        if self.window is not None:
            return "keeps a window of tokens already"
        return "pools tokens already" if self.stride > 1 else ""


EVERY_TOKEN = Clock()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """Which token stands where: the bookkeeping of one clock.

    Attributes:
      positions: int32 [B, C], the position of the token in each slot, -1 for an empty one; [B, C, K] where heads differ.
      lengths: int32 [B], entries each row has written so far, or [B, K]. Padding is never written, so rows may differ.
      clock: static; with a window, slots are reused in turn. Otherwise the buffer must be large enough.
    """

    positions: jax.Array
    lengths: jax.Array
    clock: Clock = dataclasses.field(default=EVERY_TOKEN, metadata={"static": True})

    @classmethod
    def empty(cls, batch: int, capacity: int, clock: Clock = EVERY_TOKEN) -> Slots:
        """No entry yet; room for a text of `capacity` tokens."""
        heads = (clock.heads,) if clock.heads else ()
        positions = jnp.full((batch, clock.slots(capacity), *heads), -1, jnp.int32)
        return cls(positions, jnp.zeros((batch, *heads), jnp.int32), clock)

    def assign(self, positions: jax.Array, joins: jax.Array | None = None) -> tuple[jax.Array, Slots]:
        """Gives each new entry a slot.

        Args:
          positions: int32 [B, S]; -1 is padding, which gets none.
          joins: bool [B, S], or [B, S, K] where heads differ: whether an entry takes the place of the one before it.

        Returns:
          slots int32 [B, S] or [B, S, K], C (out of range) for those not stored, and the new bookkeeping.
        """
        capacity = self.positions.shape[1]
        where = positions if joins is None else by_head(positions, joins)
        real = where >= 0
        opens = real if joins is None else real & ~joins
        rank = jnp.cumsum(opens, axis=1, dtype=jnp.int32) - 1
        count = jnp.sum(opens, axis=1, dtype=jnp.int32)
        slot = self.lengths[:, None] + rank
        if joins is not None:
            real &= overwritten(joins, positions) == NEVER
        if self.clock.window is not None:
            # A chunk longer than the ring leaves only its tail, and what stays.
            if self.clock.kept:
                stays = slot % self.clock.window >= self.clock.window - self.clock.kept
                real &= stays | (rank >= count[:, None] - self.clock.window)
                slot = self.clock.places(slot)
            else:
                real &= rank >= count[:, None] - capacity
                slot %= max(capacity, 1)
        slot = jnp.where(real, slot, capacity).astype(jnp.int32)
        stored = write(self.positions, where, slot)
        return slot, dataclasses.replace(self, positions=stored, lengths=self.lengths + count)

    def newest(self) -> tuple[jax.Array, jax.Array]:
        """Slot and position of the newest entry of each row, int32 [B] each; slot 0 and position -1 where there is none."""
        slot = jnp.maximum(self.lengths - 1, 0) % self.positions.shape[1]
        return slot, jnp.take_along_axis(self.positions, slot[:, None], axis=1)[:, 0]

    def axes(self) -> Any:
        """What the axes of its arrays mean, in their place; see `Meaning`."""
        return replaced(self, positions=ROWS, lengths=ROWS)


def by_head(positions: jax.Array, joins: jax.Array) -> jax.Array:
    """int32 [B, S] in the shape of `joins`, [B, S] or [B, S, K]."""
    return jnp.broadcast_to(positions.reshape(*positions.shape, *(1,) * (joins.ndim - 2)), joins.shape)


def overwritten(joins: jax.Array, positions: jax.Array) -> jax.Array:
    """int32 like joins, [B, S] or [B, S, K]: where the next entry stands if it takes the place of this one, else NEVER."""
    after = by_head(jnp.pad(positions[:, 1:], ((0, 0), (0, 1)), constant_values=-1), joins)
    next_joins = jnp.pad(joins[:, 1:], ((0, 0), (0, 1), *((0, 0),) * (joins.ndim - 2)))
    return jnp.where(next_joins & (after >= 0), after, NEVER)


def write(stream: jax.Array, new: jax.Array, slot: jax.Array) -> jax.Array:
    """stream [B, C, ..] with new [B, S, ..] at slot [B, S], or [B, C, K, ..] at [B, S, K]; out of range is dropped."""

    def put(s: jax.Array, n: jax.Array, i: jax.Array) -> jax.Array:
        return s.at[i].set(n.astype(s.dtype), mode="drop", unique_indices=False)

    if slot.ndim == 3:
        return jax.vmap(jax.vmap(put, 1, 1))(stream, new, slot)
    if slot.size == 1:
        # A single update XLA's CPU compiler turns into a slice under a select, for which it copies the stream up to four
        # times; beside one that is dropped it stays a scatter, in place.
        new, slot = jnp.concatenate([new, new], axis=1), jnp.pad(slot, ((0, 0), (0, 1)), constant_values=stream.shape[1])
    # vmap, not a two-index scatter: the batch stays a batching dimension, which a mesh can split.
    return jax.vmap(put)(stream, new, slot)
