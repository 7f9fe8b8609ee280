"""Quest (2406.10774): decoding reads a few pages of a whole cache, those whose keys could answer a query best.

    page p      the tokens p S .. p S + S - 1 of a text, in the order in which they are cached
    low, high   of each page, key head and channel, the least and the largest value of its keys, kept beside the entries
    bound       sum_c max(q_c high_c, q_c low_c), which no q . k of the page exceeds

Each query head attends to the page that is being filled and to the `pages` - 1 others with the highest bounds, exactly.
Calls of several tokens, such as prompts, and the layers below `start` read everything. Keys are those that queries meet in
the cache, after their rotation; where a latent serves all heads, a key is [latent ; rotary key], and queries meet it
absorbed. Under a codec bounds are of keys as they were before it.

Legend: B batch, S new tokens, C slots, P pages, H query heads, K key heads, D channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mla.cache.clock import Slots, write
from mla.cache.contract import STREAM, replaced
from mla.cache.eviction import parse
from mla.errors import UserError
from mla.ops.indexer import best

FIELD = "config.eval.cache.read"
REGISTRY = {"quest": "mla.cache.pages:Quest"}

Parts = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class Quest:
    """What a decode step reads. Static. Fields are settings."""

    page: int = 16  # tokens a page
    pages: int = 64  # that a query head reads, the one that is being filled included
    start: int = 2  # layers below read everything

    def __post_init__(self) -> None:
        for name in ("page", "pages"):
            if getattr(self, name) < 1:
                raise UserError(f"{FIELD}: quest: {name}={getattr(self, name)} is below 1")

    def tokens(self, held: int, heads: int) -> int:
        """Tokens that a step reads of `held`, for `heads` heads that share entries, as if no two of them chose alike."""
        before = max(held - 1, 0) // self.page
        return min(before, heads * (self.pages - 1)) * self.page + held - before * self.page

    def exact(self, tokens: int) -> bool:
        """Whether a cache of so many tokens is read whole."""
        return self.page * self.pages >= tokens


def reading(spec: str) -> Quest | None:
    """What `quest[:setting=value,...]` says; None for `none`.

    Raises:
      UserError: an unknown name or setting, with the nearest match, or a value of the wrong type.
    """
    found: Quest | None = parse(spec, REGISTRY, FIELD)
    return found


def formula_bytes(quest: Quest, elements: int, itemsize: int, length: int) -> int:
    """Bytes of the bounds of `length` tokens whose keys have so many elements: two for each page that was begun."""
    return 2 * elements * itemsize * -(-length // quest.page)


class Bounds(NamedTuple):
    """The least and the largest values of each page's keys: parts [B, P, K_i, D_i]; 0 in a page that was not begun."""

    low: Parts
    high: Parts


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PageCache:
    """Bounds of the pages of one layer's cache.

    Attributes:
      bounds: see `Bounds`.
      quest: static.
    """

    bounds: Bounds
    quest: Quest = dataclasses.field(metadata={"static": True})

    @classmethod
    def empty(cls, keys: Sequence[Any], batch: int, capacity: int, dtype: Any, quest: Quest) -> PageCache:
        """No page begun, and room for those of `capacity` tokens, whose keys are shaped like `keys` [1, 1, K_i, D_i]."""
        low, high = (
            tuple(jnp.zeros((batch, -(-capacity // quest.page), *key.shape[2:]), dtype) for key in keys) for _ in range(2)
        )
        return cls(Bounds(low, high), quest)

    def extend(self, keys: Parts, positions: jax.Array, before: Slots) -> PageCache:
        """With the keys of new tokens, parts [B, S, K_i, D_i] at int32 positions [B, S], -1 for padding.

        `before` says what was cached before these.
        """
        size, (slot, after) = self.quest.page, before.assign(positions)
        count = (keys[0].shape[1] + size - 2) // size + 1  # pages that so many tokens can stand in
        number = before.lengths[:, None] // size + jnp.arange(count)
        begun = number * size < before.lengths[:, None]
        local = jnp.where(slot < before.positions.shape[1], slot // size - number[:, :1], count)

        def one(bound: jax.Array, key: jax.Array, least: bool) -> jax.Array:
            worst = jnp.inf if least else -jnp.inf
            old = jax.vmap(lambda rows, index: rows.at[index].get(mode="fill", fill_value=0))(bound, number)
            old = jnp.where(begun[..., None, None], old, jnp.asarray(worst, bound.dtype))

            def merged(rows: jax.Array, index: jax.Array, new: jax.Array) -> jax.Array:
                at = rows.at[index]
                return (at.min if least else at.max)(new.astype(rows.dtype), mode="drop")

            new = jax.vmap(merged)(old, local, key)
            return write(bound, new, jnp.where(number * size < after.lengths[:, None], number, bound.shape[1]))

        low = tuple(one(bound, key, True) for bound, key in zip(self.bounds.low, keys, strict=True))
        high = tuple(one(bound, key, False) for bound, key in zip(self.bounds.high, keys, strict=True))
        return dataclasses.replace(self, bounds=Bounds(low, high))

    def scores(self, queries: Parts) -> jax.Array:
        """The bound of each page for each query: parts [B, S, H, D_i] -> [B, S, H, P], in fp32 at least."""
        total: Any = 0.0
        for query, low, high in zip(queries, self.bounds.low, self.bounds.high, strict=True):
            if not query.shape[3]:
                continue
            wide = jnp.promote_types(query.dtype, jnp.float32)
            grouped = query.reshape(*query.shape[:2], low.shape[2], -1, query.shape[3]).astype(wide)
            for sign, bound in ((1, high), (-1, low)):
                signed = sign * jax.nn.relu(sign * grouped)
                part = jnp.einsum("bskgd,bpkd->bskgp", signed, bound.astype(wide), precision=jax.lax.Precision.HIGHEST)
                total += part.reshape(*query.shape[:3], -1)
        return jnp.asarray(total)

    def choose(self, queries: Parts, lengths: jax.Array, capacity: int) -> jax.Array | None:
        """Slots [B, S, H, N] of the pages that each head reads, of rows that hold int32 [B] tokens; None: all of them."""
        size, pages = self.quest.page, self.bounds.low[0].shape[1]
        if self.quest.pages >= pages:
            return None
        newest = (jnp.maximum(lengths - 1, 0) // size)[:, None, None, None]
        picked = best(self.scores(queries), jnp.arange(pages) < newest, self.quest.pages - 1)
        numbers = jnp.concatenate([jnp.broadcast_to(newest, (*picked.shape[:3], 1)), picked], axis=-1)[..., None]
        slots = numbers * size + jnp.arange(size, dtype=jnp.int32)
        return jnp.where((numbers >= 0) & (slots < capacity), slots, -1).reshape(*picked.shape[:3], -1)

    def content(self) -> Any:
        """The arrays that count as content when bytes are measured."""
        return self.bounds

    def bookkeeping(self) -> Any:
        return None

    def axes(self) -> Any:
        """What the axes of its arrays mean, in their place; see `Meaning`."""
        return replaced(self, bounds=STREAM)
