"""Mixture of block attention (MoBA, Lu et al. 2502.13189): grouped-query attention over a few blocks of the text.

The text is cut into blocks of B tokens. A query head scores every block that lies wholly before its own by the mean of the
block's keys, without parameters and without a scale, and reads the best of them together with its own block:

    s_i = q_t . mean(k_j of block i), in fp32    chosen: the own block, and the top_k - 1 blocks with the highest s_i
    o_t = softmax(q_t k_j^T / sqrt(head_dim)) v_j over the tokens j <= t of the chosen blocks

The choice has no gradient. The mean of the own block is never used: it would tell of tokens to come. Of equal scores the
earlier block is taken. With top_k blocks or fewer in the text, or a block as long as it, this is full attention.

Remembers 2 K head_dim elements a token, K head_dim a finished block (its mean key), and in fp32 the sum of the open block's
keys. A decode step reads the means, and the tokens of the blocks that the heads of a group chose.

Legend: B batch, S queries, C entries, M blocks, H query heads, K key heads, D width of a head.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from mla.attention.contract import Surroundings, Term, constant, mechanism, require
from mla.attention.softmax.base import Memory, NewEntries
from mla.attention.sparse.base import BY_PLACE, SparseMixer, slots_at
from mla.cache.clock import Clock
from mla.cache.stores import Entries, LayerCache, State, StoreSpec
from mla.layers.basic import wide_dtype
from mla.ops.indexer import best
from mla.ops.mask import Mask

GQAConfig, GroupedQuery = mechanism("gqa")


class Mean(NamedTuple):
    """Of the keys of each finished block, [B, M, K, D]."""

    mean: jax.Array


class Blocks(NamedTuple):
    """Finished blocks: means [B, M, K, D] of their keys, and where their last tokens stand, int32 [B, M]; -1: no block."""

    means: jax.Array
    ends: jax.Array


@dataclasses.dataclass
class BlockMixtureConfig(GQAConfig):  # type: ignore[misc, valid-type]
    """Mixture of block attention.

    Paper: 2502.13189
    Remembers: k and v of K heads, and the mean key of every block
    Elements: (2 + 1 / B) K d_h, and K d_h in fp32
    Use: reads the blocks its queries choose; no parameters of its own
    """

    block: int = 64  # tokens a block
    top_k: int = 4  # blocks that a query head reads, its own included

    def validate(self, around: Surroundings) -> None:
        super().validate(around)
        require(self.window == 0, "window", "blocks are chosen from the whole text; set it to 0")
        require(self.block >= 1, "block", f"{self.block} is not a positive number of tokens")
        require(self.top_k >= 1, "top_k", f"{self.top_k} is below 1, the block that a query stands in")

    def cache_formula(self, around: Surroundings) -> list[Term]:
        keys = self.kv_heads(around) * self.width(around)
        return [*super().cache_formula(around), Term(keys, stride=self.block), constant(keys)]


class BlockMixture(SparseMixer, GroupedQuery):  # type: ignore[misc, valid-type, type-arg]
    """Grouped-query attention whose query heads choose blocks by their mean keys."""

    stays: ClassVar[str] = BY_PLACE

    def stores(self) -> dict[str, StoreSpec]:
        shape, dtype = (self.num_kv_heads, self.head_dim), self.around.dtype
        like = Mean(jax.ShapeDtypeStruct((1, 1, *shape), dtype))  # type: ignore[arg-type]
        opened = State(jax.ShapeDtypeStruct(shape, wide_dtype(dtype)))
        return super().stores() | {"blocks": Entries(like, Clock(self.config.block)), "open": opened}

    def new_entries(self, x: jax.Array, positions: jax.Array, cache: LayerCache | None) -> NewEntries:
        """Keys and values; beside them, the means of all blocks that are finished after these tokens."""
        new, where = self.entries(x, positions), jnp.broadcast_to(positions, x.shape[:2])
        before = cache or self.init_cache(x.shape[0], x.shape[1], self.around.dtype)
        first, sums = self.block_sums(new.key, where, before["open"].state)
        size, last = self.config.block, jnp.max(where, axis=1)  # -1 in a row of nothing but padding
        ends = before["blocks"].clock.beats(where)[1]
        mean = Mean((_take(sums, ends // size - first[:, None]) / size).astype(x.dtype))
        seen, blocks = before["blocks"].extend(mean, ends)
        finished = (last >= 0) & ((last + 1) % size == 0)
        still = _take(sums, (jnp.maximum(last // size, first) - first)[:, None])[:, 0]
        still = jnp.where(finished[:, None, None], 0, still)
        after = cache and cache.replace(blocks=blocks, open=before["open"].holding(still, where))
        return NewEntries(new, after, beside=Blocks(seen.read(self.around.dtype).mean, seen.positions))

    def block_sums(self, keys: jax.Array, positions: jax.Array, opened: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Sums of keys by block.

        Args:
          keys: [B, S, K, D] at int32 positions [B, S]; -1 is padding.
          opened: [B, K, D], the sum of what the open block had before them.

        Returns:
          int32 [B], the number of the block that the first of these tokens stands in; and in fp32 the sums of that block,
          what it had before included, and of those after it that S tokens may reach: [B, N, K, D].
        """
        size, real = self.config.block, positions >= 0
        count = -(-(keys.shape[1] - 1) // size) + 1
        number = positions // size
        first = jnp.where(real.any(axis=1), jnp.min(jnp.where(real, number, jnp.iinfo(jnp.int32).max), axis=1), 0)
        belongs = real[..., None] & (number[..., None] - first[:, None, None] == jnp.arange(count))
        wide = opened.dtype
        highest = jax.lax.Precision.HIGHEST
        sums = jnp.einsum("bsn,bskd->bnkd", belongs.astype(wide), keys.astype(wide), precision=highest)
        return first, sums.at[:, 0].add(opened)

    def choose(self, x: jax.Array, positions: jax.Array, queries: Any, memory: Memory, mask: Mask) -> jax.Array:
        """Tokens [B, S, H, top_k * block] of the blocks that each head chose, and of its own block."""
        size, (means, ends) = self.config.block, memory.beside
        own = (mask.query_positions // size * size)[:, :, None, None]
        wide = wide_dtype(queries.dtype)
        grouped = queries.reshape(*queries.shape[:2], self.num_kv_heads, -1, self.head_dim).astype(wide)
        highest = jax.lax.Precision.HIGHEST
        scores = jnp.einsum("bskgd,bmkd->bskgm", grouped, means.astype(wide), precision=highest)
        scores = scores.reshape(*queries.shape[:3], -1)
        past = (ends >= 0)[:, None, None] & (ends[:, None, None] < own)
        picked = best(scores, past, self.config.top_k - 1)
        starts = jnp.where(picked < 0, -size, _take(ends, picked) - size + 1)
        starts = jnp.concatenate([jnp.broadcast_to(own, (*picked.shape[:3], 1)), starts], axis=-1)
        tokens = starts[..., None] + jnp.arange(size, dtype=jnp.int32)
        return slots_at(tokens.reshape(*starts.shape[:3], -1), memory.positions)

    def seen(self, tokens: int) -> int:
        before, own = divmod(tokens - 1, self.config.block)
        return int(own + 1 + min(before, self.config.top_k - 1) * self.config.block)

    def mixing_flops(self, tokens: int, decode: bool = False) -> float:
        """A score of every block before its own, and attention to those that are chosen."""
        scores = 2.0 * self.num_heads * self.head_dim * ((tokens - 1) // self.config.block)
        return scores + float(super().mixing_flops(tokens, decode))

    def reads(self, tokens: int) -> dict[str, int]:
        size, group = self.config.block, self.num_heads // self.num_kv_heads
        before = max(tokens - 1, 0) // size
        read = min(before, group * (self.config.top_k - 1)) * size + tokens - before * size
        return {"key": read, "value": read}


def _take(array: jax.Array, index: jax.Array) -> jax.Array:
    """array [B, n, ...] at int32 [B, ...] of its second axis; something finite where an index is out of range."""
    return jax.vmap(lambda a, i: a.at[i].get(mode="fill", fill_value=0))(array, index)
