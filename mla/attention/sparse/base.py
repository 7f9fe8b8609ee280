"""What sparse mechanisms inherit: queries that choose the entries they read, and the bytes that this leaves to be read.

A mechanism is a softmax mechanism, with its caches, windows, sinks, codecs and readers, that also writes

    choose   which entries each query reads: these are gathered, in training and in decoding, and no others
    reads    how many entries of each stream that is one decode step

What it needs beside entries in order to choose, such as means of blocks, are stores of its own (`new_entries`,
`Memory.beside`).

Legend: B batch, S queries, C entries, H query heads, G groups of heads that choose together, N entries chosen.
"""

from __future__ import annotations

from typing import ClassVar, Generic, TypeVar

import jax
import jax.numpy as jnp

from mla.attention.softmax.base import E, Memory, Q, SoftmaxConfig, SoftmaxMixer
from mla.ops.mask import Mask

C = TypeVar("C", bound=SoftmaxConfig)

BY_PLACE = "finds tokens by where they stand"  # `Mixer.stays` of mechanisms that look entries up with `slots_at`


class SparseMixer(SoftmaxMixer[C, Q, E], Generic[C, Q, E]):
    """Attention by softmax over the entries that each query chooses."""

    paged: ClassVar[bool] = False  # they choose already

    def choose(self, x: jax.Array, positions: jax.Array, queries: Q, memory: Memory[E], mask: Mask) -> jax.Array | None:
        raise NotImplementedError

    def reads(self, tokens: int) -> dict[str, int]:
        raise NotImplementedError


def slots_at(wanted: jax.Array, positions: jax.Array) -> jax.Array:
    """The entries that stand at wanted positions: int32 [B, ...] like `wanted`, -1 where there is none.

    Args:
      wanted: int32 [B, ...], positions in the text; below 0: none.
      positions: int32 [B, C], where entries stand: those of tokens that follow one another, as in a cache that keeps all
        of them, perhaps behind or before padding.
    """
    first = jnp.argmax(positions >= 0, axis=1).astype(jnp.int32)
    offset = jnp.take_along_axis(positions, first[:, None], axis=1)[:, 0] - first
    found = wanted - offset.reshape(-1, *(1,) * (wanted.ndim - 1))
    return jnp.where((wanted >= 0) & (found >= 0) & (found < positions.shape[1]), found, -1)


def slots_among(wanted: jax.Array, positions: jax.Array) -> jax.Array:
    """`slots_at` for entries in any order, as in a ring: by sorting them."""
    order = jnp.argsort(positions, axis=1).astype(jnp.int32)

    def find(wanted: jax.Array, positions: jax.Array, order: jax.Array) -> jax.Array:
        ordered = positions[order]
        index = jnp.minimum(jnp.searchsorted(ordered, wanted), positions.shape[0] - 1)
        return jnp.where((wanted >= 0) & (ordered[index] == wanted), order[index], -1)

    return jax.vmap(find)(wanted, positions, order)
