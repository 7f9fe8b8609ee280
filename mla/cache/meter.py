"""Bytes, read off arrays. Works on live arrays and, under `jax.eval_shape`, on shapes that were never allocated."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax

from mla.cache.contract import Cache


def tree_bytes(tree: Any) -> int:
    """Bytes of every array of a pytree (of arrays or of shapes)."""
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(tree))


def content_bytes(cache: Cache) -> int:
    """Bytes of streams, states, scales and tails: what the formulas of the papers are about."""
    return tree_bytes(cache.content())


def bookkeeping_bytes(cache: Cache) -> int:
    """Bytes of positions and lengths: once for all layers that store the same tokens, apart where layers keep others."""
    return tree_bytes(cache.bookkeeping())


def content_bytes_at(init_cache: Callable[[int], Cache], length: int) -> int:
    """Content bytes of a cache for `length` tokens, without allocating it."""
    return content_bytes(jax.eval_shape(lambda: init_cache(length)))


def content_bytes_per_device(cache: Cache) -> int:
    """Content bytes that the fullest device holds of a live cache: replicated arrays count on every device."""
    held: dict[Any, int] = {}
    for array in jax.tree.leaves(cache.content()):
        for shard in array.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    return max(held.values(), default=0)
