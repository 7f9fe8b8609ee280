"""What dynamic memory compression remembers: slots into which tokens are averaged, a number of them for each key head.

Legend: B batch, S new tokens, C slots, K key heads, d width of a head, R tokens that are kept apart, L = R + S, and E the
channels of a contribution: omega * k before its rotation, omega * v, omega.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mla.cache.tokens import NEVER


def running_sums(contributions: jax.Array, alpha: jax.Array, span: int) -> jax.Array:
    """N_t = alpha_t N_{t-1} + c_t over the last `span` tokens: contributions [B, L, K, E], alpha [B, L, K] -> [B, L, K, E].

    Unrolled over the span and parallel over L: sum over o < span of c_{t-o} times the product of alpha_{t-o+1} .. alpha_t.
    """

    def back(a: jax.Array, by: int) -> jax.Array:
        return jnp.pad(a, ((0, 0), (by, 0), *((0, 0),) * (a.ndim - 2)))[:, : a.shape[1]]

    total, carried = contributions, jnp.ones_like(alpha)
    for offset in range(1, min(span, alpha.shape[1])):
        carried = carried * back(alpha, offset - 1)
        total = total + carried[..., None] * back(contributions, offset)
    return total


class Line(NamedTuple):
    """The tokens kept apart and the new ones, padding first so that tokens that follow one another stand side by side.

    Attributes:
      sums: [B, L, K, E], the segment of each token up to it.
      positions: int32 [B, L]; -1 where there is no new token.
      merges: bool [B, L, K], whether the token joins the slot of the one before.
      state: [B, K, R, E] after the last token.
    """

    sums: jax.Array
    positions: jax.Array
    merges: jax.Array
    state: jax.Array

    @property
    def until(self) -> jax.Array:
        """int32 [B, L, K]: the position of the token that overwrites what each one wrote."""
        joined = jnp.pad(self.merges[:, 1:], ((0, 0), (0, 1), (0, 0)))
        return jnp.where(joined, jnp.pad(self.positions[:, 1:], ((0, 0), (0, 1)))[..., None], NEVER)


def line_up(state: jax.Array, started: jax.Array, contributions: jax.Array, merges: jax.Array, positions: jax.Array) -> Line:
    """Continues segments with S new tokens.

    Args:
      state: [B, K, R, E], contributions of the last tokens; those outside the open segment are 0.
      started: bool [B], whether there is a slot that a token could join; the first token of a row opens one.
      contributions, merges: [B, S, K, E], bool [B, S, K].
      positions: int32 [B, S]; -1 is padding.
    """
    kept, real = state.shape[2], positions >= 0
    opens = (jnp.cumsum(real, axis=1) == 1) & ~started[:, None]
    merges = merges & (real & ~opens)[..., None]
    contributions = jnp.where(real[..., None, None], contributions, 0)
    order = jnp.argsort(jnp.pad(real, ((0, 0), (kept, 0)), constant_values=True), axis=1, stable=True)

    def join(old: jax.Array, new: jax.Array) -> jax.Array:
        joined = jnp.concatenate([old, new], axis=1)
        return jnp.take_along_axis(joined, order.reshape(*order.shape, *(1,) * (joined.ndim - 2)), axis=1)

    batch, heads = state.shape[:2]
    where = join(jnp.full((batch, kept), -1, jnp.int32), positions)
    # What is kept apart has been cut to the open segment, so all of it joins.
    alpha = join(jnp.ones((batch, kept, heads), state.dtype), merges.astype(state.dtype))
    line = join(state.swapaxes(1, 2).astype(contributions.dtype), contributions)
    last = alpha[:, alpha.shape[1] - kept :]
    still = jnp.cumprod(jnp.pad(last[:, 1:], ((0, 0), (0, min(1, kept)), (0, 0)), constant_values=1)[:, ::-1], axis=1)
    after = (still[:, ::-1, :, None] * line[:, line.shape[1] - kept :]).swapaxes(1, 2).astype(state.dtype)
    merges = join(jnp.zeros((batch, kept, heads), bool), merges)
    return Line(running_sums(line, alpha.astype(line.dtype), kept + 1), where, merges, after)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HeadSlots:
    """Which token wrote each slot last.

    Attributes:
      positions: int32 [B, C, K], -1 for an empty slot.
      lengths: int32 [B, K], slots in use.
    """

    positions: jax.Array
    lengths: jax.Array


def _write(stream: jax.Array, new: jax.Array, slot: jax.Array) -> jax.Array:
    """stream [B, C, K, ..] with new [B, L, K, ..] at slot [B, L, K]; slots out of range are dropped."""

    def one(s: jax.Array, n: jax.Array, i: jax.Array) -> jax.Array:
        return s.at[i].set(n.astype(s.dtype), mode="drop")

    return jax.vmap(jax.vmap(one, 1, 1))(stream, new, slot)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AccumulatedCache:
    """One layer's slots.

    Attributes:
      streams: rotated keys, values, ..: arrays [B, C, K, ..] of a NamedTuple.
      state: [B, K, R, E] in fp32 at least, the last tokens' contributions. A slot holds an average that a bounded segment
        cannot be continued from; with R = segment - 1 tokens kept apart it is summed anew, so that nothing drifts.
      slots: bookkeeping.
    """

    streams: Any
    state: jax.Array
    slots: HeadSlots

    @classmethod
    def empty(cls, like: Any, batch: int, capacity: int, dtype: Any, kept: int) -> AccumulatedCache:
        """Room for every token of `capacity`, should none be merged. `like`: one token's streams, [1, 1, K, ..] each."""
        heads, width = like[0].shape[2], 1 + sum(stream.shape[3] for stream in like)
        streams = jax.tree.map(lambda a: jnp.zeros((batch, capacity, *a.shape[2:]), dtype), like)
        slots = HeadSlots(jnp.full((batch, capacity, heads), -1, jnp.int32), jnp.zeros((batch, heads), jnp.int32))
        return cls(streams, jnp.zeros((batch, heads, kept, width), jnp.promote_types(dtype, jnp.float32)), slots)

    def extend(
        self,
        contributions: jax.Array,
        merges: jax.Array,
        positions: jax.Array,
        place: Callable[[jax.Array, jax.Array], Any],
    ) -> tuple[Any, jax.Array, jax.Array | None, AccumulatedCache]:
        """Stores S new tokens and answers what their queries may look at.

        Args:
          contributions, merges, positions: as `line_up` takes them.
          place: what makes streams [B, L, K, ..] of sums and int32 [B, L] positions.

        Returns:
          (entries, their positions [B, C', K], until when each is seen, the new cache). A single token sees the slots as it
          leaves them. Of several, each sees the slots of its time: those from before, and what each token made of its own.
        """
        streams, slots = self.streams, self.slots
        capacity = slots.positions.shape[1]
        if positions.shape[1] > capacity:
            raise ValueError(f"{positions.shape[1]} new tokens for a cache of {capacity}")
        line = line_up(self.state, slots.lengths[:, 0] > 0, contributions, merges, positions)
        new = jax.tree.map(lambda n, s: n.astype(s.dtype), place(line.sums, line.positions), streams)

        real = line.positions >= 0
        opened = real[..., None] & ~line.merges
        slot = slots.lengths[:, None] - 1 + jnp.cumsum(opened, axis=1, dtype=jnp.int32)
        closes = real[..., None] & (line.until == NEVER)  # the last token of its slot, so far
        written, where = jnp.where(closes, slot, capacity), jnp.broadcast_to(line.positions[..., None], slot.shape)
        lengths = slots.lengths + jnp.sum(opened, axis=1, dtype=jnp.int32)
        cache = AccumulatedCache(
            jax.tree.map(lambda s, n: _write(s, n, written), streams, new),
            line.state,
            HeadSlots(_write(slots.positions, where, written), lengths),
        )
        if positions.shape[1] == 1:
            return cache.streams, cache.slots.positions, None, cache
        # The newest of the old slots goes when the first new token joins it.
        first = real & (jnp.cumsum(real, axis=1) == 1)
        joins = jnp.any(first[..., None] & line.merges, axis=1)
        ends = jnp.where(joins, jnp.max(jnp.where(first, line.positions, -1), axis=1)[:, None], NEVER)
        newest = jnp.arange(capacity)[:, None] == slots.lengths[:, None] - 1
        until = jnp.concatenate([jnp.where(newest, ends[:, None], NEVER), line.until], axis=1)
        entries = jax.tree.map(lambda s, n: jnp.concatenate([s, n], axis=1), streams, new)
        return entries, jnp.concatenate([slots.positions, where], axis=1), until, cache

    def content(self) -> Any:
        """The arrays that count as content when bytes are measured."""
        return self.streams, self.state

    def bookkeeping(self) -> Any:
        return self.slots

    def cut(self) -> AccumulatedCache:
        """Live arrays of as many slots as the fullest row and head uses."""
        longest = int(self.slots.lengths.max())
        slots = HeadSlots(self.slots.positions[:, :longest], self.slots.lengths)
        return AccumulatedCache(jax.tree.map(lambda a: a[:, :longest], self.streams), self.state, slots)

    def by_head(self) -> Any:
        """The content with an array for each head, [B, ..] of as many slots as its fullest row uses: live arrays too."""
        longest = [int(n) for n in self.slots.lengths.max(axis=0)]
        return [[a[:, :n, head] for a in self.streams] for head, n in enumerate(longest)], self.state
