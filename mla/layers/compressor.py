"""Learned pooling of tokens into entries by a softmax of each channel over a window of the text (DeepSeek-V4).

Legend: B batch, S new tokens, D model width, R channels of an entry, m tokens of a window, N windows that S tokens touch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mla.cache.clock import Clock
from mla.layers.basic import Linear, RMSNorm, matrix, wide_dtype


class Pool(NamedTuple):
    """Softmax-weighted sums under way, each [..., channels] in fp32 at least: the largest logit so far, the sum of
    exp(logit - largest), and the sum of values so weighed. Zeros, a pool of nothing, are where every pool begins."""

    largest: jax.Array
    total: jax.Array
    values: jax.Array

    def joined(self, other: Pool) -> Pool:
        """The pool of what both have."""
        there = jnp.where(self.total > 0, self.largest, -jnp.inf), jnp.where(other.total > 0, other.largest, -jnp.inf)
        largest = jnp.maximum(*there)
        largest = jnp.where(jnp.isfinite(largest), largest, 0)

        def factor(pool: Pool) -> jax.Array:
            return jnp.exp(jnp.where(pool.total > 0, pool.largest - largest, 0))

        one, two = factor(self), factor(other)
        return Pool(largest, one * self.total + two * other.total, one * self.values + two * other.values)


class Pooled(NamedTuple):
    """What S tokens pool: entries [B, E, R] that they end, normed, where they end, int32 [B, E] (-1: no entry), and the
    pools that stay open after them."""

    entries: jax.Array
    ends: jax.Array
    open: Pool


class Compressor(nnx.Module):
    """One entry for each window of m tokens: RMSNorm(sum_j softmax_j(x_j W_Z + B_j) * (x_j W_C)), j over its tokens.

    The softmax is over tokens, for each channel alone, in fp32. With `overlap` W_C and W_Z give 2 R channels, and an entry
    pools the first half of the channels of the tokens of the window before (none for the first entry) together with the
    second half of those of its own. B starts at 0.

    What an unfinished window has seen is a `Pool` of constant size: a text that is read in pieces gives the entries that it
    gives whole.
    """

    def __init__(self, d_in: int, width: int, tokens: int, *, overlap: bool = False, eps: float, **make: Any):
        channels = width * (1 + overlap)
        self.value, self.weight = (Linear(d_in, channels, ("model", None), **make) for _ in range(2))
        self.bias = matrix(jnp.zeros((tokens, channels), jnp.float32), (None, "latent"), exact=True, multiplies=False)
        self.norm = RMSNorm(width, eps=eps)
        self.width, self.channels, self.tokens = width, channels, tokens

    def opened(self, dtype: Any) -> Pool:
        """Shapes of the pools that are open between tokens; `dtype` is the compute dtype."""
        return Pool(*(jax.ShapeDtypeStruct((self.channels,), wide_dtype(dtype)) for _ in range(3)))  # type: ignore[arg-type]

    def __call__(self, x: jax.Array, positions: jax.Array, opened: Pool | None = None) -> Pooled:
        """What tokens x [B, S, D] pool.

        Args:
          positions: int32 [B, S]; -1 is padding, before or behind a row's tokens, which follow one another.
          opened: [B, channels] each, the pools before them; None: nothing was before.
        """
        m, (batch, count) = self.tokens, positions.shape
        if opened is None:
            like = self.opened(x.dtype)
            opened = jax.tree.map(lambda a: jnp.zeros((batch, *a.shape), a.dtype), like)
        real = positions >= 0
        ahead = jnp.argmax(real, axis=1)
        start = jnp.maximum(jnp.take_along_axis(positions, ahead[:, None], axis=1), 0)
        last = jnp.max(positions, axis=1, keepdims=True)
        first = start // m  # the number of the window that the first token is in
        windows = -(-(count - 1) // m) + 1

        def cut(a: jax.Array) -> jax.Array:
            """[B, S, channels] -> [B, N, m, channels], tokens in their places."""
            line = jnp.pad(a, ((0, 0), (m, windows * m), (0, 0)))
            begin = m + ahead - start[:, 0] % m
            rows = jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, windows * m))(line, begin)
            return rows.reshape(batch, windows, m, -1)

        stands = first * m + jnp.arange(windows * m)
        seen = ((stands >= start) & (stands <= last)).reshape(batch, windows, m, 1)
        pools = self._pools(cut(self.value(x)), cut(self.weight(x)), seen)
        before = Pool(*(a[:, 0] for a in pools)).joined(opened)
        pools = Pool(*(a.at[:, 0].set(b) for a, b in zip(pools, before, strict=True)))
        ends = Clock(m).beats(positions)[1]
        if self.channels > self.width:
            pools = self._overlapping(pools)
        done = _at(Pool(*(a[..., -self.width :] for a in pools)), ends // m - first)
        entries = self.norm(done.values / jnp.where(done.total > 0, done.total, 1)).astype(x.dtype)
        return Pooled(entries, ends, self._open_after(pools, last, first))

    def _pools(self, values: jax.Array, logits: jax.Array, seen: jax.Array) -> Pool:
        """Pools [B, N, channels] of the tokens of each window, from [B, N, m, channels]."""
        lead, wide = values.shape[:2], wide_dtype(values.dtype)

        def rows(a: jax.Array) -> jax.Array:  # XLA's sums on a CPU are slow behind an axis of 1
            return a.reshape(-1, *a.shape[2:])

        seen = rows(seen)
        logits = jnp.where(seen, rows(logits).astype(wide) + self.bias[...].astype(wide), -jnp.inf)
        largest = jax.lax.stop_gradient(jnp.max(logits, axis=1))
        largest = jnp.where(jnp.isfinite(largest), largest, 0)
        weights = jnp.exp(logits - largest[:, None])
        values = jnp.where(seen, rows(values), 0).astype(wide)
        sums = Pool(largest, jnp.sum(weights, axis=1), jnp.sum(weights * values, axis=1))
        return Pool(*(a.reshape(*lead, -1) for a in sums))

    def _overlapping(self, pools: Pool) -> Pool:
        """Second halves of all but the first window joined with the first halves of the window before. (Those of the first
        one were, when it was opened.)"""
        ahead, mine = (Pool(*(half(a) for a in pools)) for half in (self._first, self._second))
        earlier = Pool(*(a[:, :-1] for a in ahead))
        joined = earlier.joined(Pool(*(a[:, 1:] for a in mine)))
        parts = zip(ahead, mine, joined, strict=True)
        return Pool(*(jnp.concatenate([a, b.at[:, 1:].set(c)], axis=-1) for a, b, c in parts))

    def _first(self, a: jax.Array) -> jax.Array:
        return a[..., : self.width]

    def _second(self, a: jax.Array) -> jax.Array:
        return a[..., self.width :]

    def _open_after(self, pools: Pool, last: jax.Array, first: jax.Array) -> Pool:
        """The pools [B, channels] that the last token leaves open; `last`, `first` int32 [B, 1]."""
        still = _at(pools, jnp.maximum(last // self.tokens - first, 0))
        ended = (last >= 0) & ((last + 1) % self.tokens == 0)

        def after(a: jax.Array) -> jax.Array:
            a = a[:, 0]
            empty = jnp.zeros_like(a[:, : self.width])
            following = jnp.concatenate([empty, self._first(a)], axis=-1) if self.channels > self.width else empty
            return jnp.where(ended, following, a)

        return Pool(*map(after, still))


def _at(pools: Pool, index: jax.Array) -> Pool:
    """Pools [B, N, R] -> [B, E, R] at int32 [B, E]; some pool where an index is out of range."""
    index = jnp.clip(index, 0, pools.total.shape[1] - 1)[..., None]
    return Pool(*(jnp.take_along_axis(a, index, axis=1) for a in pools))
