"""Native sparse attention (NSA, 2502.11089): three branches of grouped-query attention, trained end to end, added by gates.

    o_t = sum of g^c_t o^c_t over the branches c, each with keys and values of its own    g_t = sigmoid(x_t W_g), one a head
    compression   entry i is an MLP of the l keys (values) of the tokens [i d, i d + l), each plus an embedding of its place
                  among them; seen once the last of them is there; p_t is the softmax over all of these
    selection     the text in blocks of l' tokens; score_j = sum over the heads of a group and over entries i of p_t[i] times
                  the d-token pieces that entry i and block j have in common; a query reads the tokens s <= t of the n best
                  blocks, always the first, its own and the one before it among them
    window        the w newest tokens

For d, l, l' of 16, 32, 64 a block's entries have weights 1, 2, 2, 2, 1. Heads that share keys choose together. The choice
has no gradient; the scores learn as the compression branch does. Of equal scores the earlier block is taken. In a text of
n l' tokens or fewer selection is full attention. Where no entry is complete yet, compression gives 0. Keys of selection and
window are rotated; those of compression have the embedding instead, and meet queries that are not rotated. The paper leaves
open how deep the MLP is (here one hidden layer with SiLU, shared by heads), where RoPE is, and the gates' MLP (here one
matrix, as in public code).

Remembers 2 K head_dim elements a token for selection, as many for every d tokens for compression and for each of w tokens in
a ring, and what the l - 1 newest tokens leave to entries that are still open. A decode step reads n l' tokens of the first,
and all of the others.

Legend: B batch, S new tokens, M compressed entries, J blocks, H query heads, K key heads, D width of a head.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mla.attention.contract import Surroundings, Term, constant, mechanism, require
from mla.attention.softmax.base import Memory, NewEntries
from mla.attention.sparse.base import BY_PLACE, SparseMixer, slots_at
from mla.cache.clock import Clock
from mla.cache.stores import Entries, LayerCache, StoreSpec, Tail
from mla.layers.basic import TO_HEADS, Linear, matrix, merge_heads, split_heads
from mla.ops.attention import attention_shares
from mla.ops.indexer import best
from mla.ops.mask import Mask
from mla.ops.rope import rotate

GQAConfig, GroupedQuery = mechanism("gqa")
BRANCHES = 3
FORCED = 3  # blocks that are always chosen


class Compressed(NamedTuple):
    """Keys and values of the compression branch, [B, M, K, D] each."""

    pool_key: jax.Array
    pool_value: jax.Array


class Near(NamedTuple):
    """Keys, rotated, and values of the window branch, [B, C, K, D] each."""

    near_key: jax.Array
    near_value: jax.Array


class Beside(NamedTuple):
    """Memories of the two other branches; a compressed entry stands at the last of its tokens."""

    compressed: Memory
    near: Memory


class Queries(NamedTuple):
    """[B, S, H, D] each: rotated to where they stand, and as they are."""

    turned: jax.Array
    plain: jax.Array


@dataclasses.dataclass
class NativeSparseConfig(GQAConfig):  # type: ignore[misc, valid-type]
    """Native sparse attention.

    Paper: 2502.11089
    Remembers: k and v of K heads, for each of three branches: of every token, of every d tokens, of a window
    Elements: (1 + 1 / d) 2 K d_h, and 2 K d_h for each of w + l - 1 tokens
    Use: learns what to read from the loss alone; three times the projections to keys and values
    """

    pool_block: int = 16  # l, tokens of a compressed entry
    pool_stride: int = 8  # d, tokens from one to the next
    pool_hidden: int = 0  # channels within the MLP; 0: head_dim
    block: int = 32  # l', tokens of a block
    top_k: int = 6  # n, blocks that the heads of a group read
    near: int = 64  # w, tokens of the window, the query's own included

    def validate(self, around: Surroundings) -> None:
        super().validate(around)
        require(self.window == 0, "window", "near says how wide the window branch is; set it to 0")
        for name in ("pool_block", "pool_stride", "block", "near"):
            require(getattr(self, name) >= 1, name, f"{getattr(self, name)} is not a positive number")
        for name in ("pool_block", "block"):
            whole = getattr(self, name) % self.pool_stride == 0
            require(whole, name, f"{getattr(self, name)} is no multiple of pool_stride {self.pool_stride}")
        enough = self.top_k >= FORCED
        require(enough, "top_k", f"{self.top_k} is below {FORCED}: the first block, the query's own and the one before it")

    def cache_formula(self, around: Surroundings) -> list[Term]:
        """Room for a compressed entry is there with every d tokens: l / d - 1 more than the paper counts."""
        entry = self.elements(around)
        pooled = [Term(entry, stride=self.pool_stride), constant((self.pool_block - 1) * entry, itemsize=0)]
        return [*super().cache_formula(around), *pooled, Term(entry, window=self.near)]


class Compressor(nnx.Module):
    """SiLU((tokens + embedding) W_1) W_2: l vectors of D channels, each head's by itself, to one."""

    def __init__(self, block: int, width: int, hidden: int, **make: Any):
        self.place = matrix(
            0.02 * jax.random.normal(make["rngs"].params(), (block, width)), (None, "latent"), multiplies=False
        )
        self.inner = Linear(block * width, hidden, ("latent", None), **make)
        self.outer = Linear(hidden, width, ("latent", None), **make)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """[B, M, l, K, D] -> [B, M, K, D]."""
        placed = (tokens + self.place[...].astype(tokens.dtype)[:, None]).swapaxes(2, 3)
        return self.outer(jax.nn.silu(self.inner(placed.reshape(*placed.shape[:3], -1))))


class NativeSparse(SparseMixer, GroupedQuery):  # type: ignore[misc, valid-type, type-arg]
    """Grouped-query attention to compressed entries, to chosen blocks and to a window."""

    stays: ClassVar[str] = BY_PLACE

    def __init__(self, config: NativeSparseConfig, around: Surroundings, *, rngs: nnx.Rngs):
        super().__init__(config, around, rngs=rngs)
        self.branch_gate = Linear(around.d_model, self.num_heads * BRANCHES, TO_HEADS, rngs=rngs, dtype=around.dtype)

    def make_entries(self, make: dict[str, Any]) -> None:
        super().make_entries(make)
        width, config = self.num_kv_heads * self.head_dim, self.config
        self.pool_key, self.pool_value, self.near_key, self.near_value = (
            Linear(self.around.d_model, width, TO_HEADS, **make) for _ in range(4)
        )
        self.compress_key, self.compress_value = (
            Compressor(config.pool_block, self.head_dim, config.pool_hidden or self.head_dim, **make) for _ in range(2)
        )
        self.pool_norm, self.near_norm = self.make_norm(), self.make_norm()

    def stores(self) -> dict[str, StoreSpec]:
        token = jax.ShapeDtypeStruct((self.num_kv_heads, self.head_dim), self.around.dtype)
        entry: Any = jax.ShapeDtypeStruct((1, 1, *token.shape), token.dtype)
        beside: dict[str, StoreSpec] = {
            "pooled": Entries(Compressed(entry, entry), Clock(self.config.pool_stride)),
            "open": Tail(Compressed(token, token), self.config.pool_block - 1),  # type: ignore[arg-type]
            "near": Entries(Near(entry, entry), Clock(window=self.config.near)),
        }
        return super().stores() | beside

    def queries(self, x: jax.Array, positions: jax.Array) -> Queries:
        plain = split_heads(self.query(x), self.num_heads)
        plain = self.query_norm(plain) if self.query_norm else plain
        return Queries(rotate(plain, positions, self.rope_theta, dim=self.rope_dim), plain)

    def new_entries(self, x: jax.Array, positions: jax.Array, cache: LayerCache | None) -> NewEntries:
        """Keys and values of selection; beside them, those of the other branches."""
        where = jnp.broadcast_to(positions, x.shape[:2])
        key, value = (split_heads(project(x), self.num_kv_heads) for project in (self.near_key, self.near_value))
        near = Near(self.place(key, self.near_norm, positions), value)
        before = cache or self.init_cache(x.shape[0], x.shape[1], self.around.dtype)
        compressed, before = self.compress(x, where, before)
        if cache is None:
            return NewEntries(self.entries(x, positions), None, beside=Beside(compressed, Memory(near, where)))
        seen, ring = before["near"].extend(near, where)
        window = Memory(seen.read(self.around.dtype), seen.positions)
        return NewEntries(self.entries(x, positions), before.replace(near=ring), beside=Beside(compressed, window))

    def compress(self, x: jax.Array, positions: jax.Array, before: LayerCache) -> tuple[Memory, LayerCache]:
        """All compressed entries after tokens x [B, S, D] at int32 [B, S], and the cache with them and with its tail."""
        size, store, tail = self.config.pool_block, before["pooled"], before["open"]
        new = Compressed(*(split_heads(project(x), self.num_kv_heads) for project in (self.pool_key, self.pool_value)))
        line = tail.line(new, positions)  # new token i in row l - 1 + i
        index, ends = store.clock.beats(positions)
        rows = index[..., None] + jnp.arange(size)
        key, value = (jax.vmap(lambda a, i: a[i])(part, rows) for part in line)
        key = self.compress_key(key)
        key = self.pool_norm(key) if self.pool_norm else key
        made = Compressed(key, self.compress_value(value))
        seen, store = store.extend(made, jnp.where(ends >= size - 1, ends, -1))
        memory = Memory(seen.read(self.around.dtype), seen.positions)
        return memory, before.replace(pooled=store, open=tail.after(line, positions))

    def choose(self, x: jax.Array, positions: jax.Array, queries: Queries, memory: Memory, mask: Mask) -> jax.Array | None:
        """Tokens [B, S, K, n l'] of the blocks that the heads of each key head chose; None where those are all."""
        size, entries = self.config.block, memory.positions.shape[1]
        if size * self.config.top_k >= entries:
            return None
        numbers = jnp.arange(-(-entries // size), dtype=jnp.int32)
        own = (mask.query_positions // size)[..., None, None]
        scores = self.scores(queries.plain, memory.beside.compressed, mask.query_positions, len(numbers))
        forced = (numbers == 0) | (numbers == own) | (numbers == own - 1)
        picked = best(jnp.where(forced, jnp.inf, scores), numbers <= own, self.config.top_k)[..., None]
        tokens = jnp.where(picked < 0, -1, picked * size + jnp.arange(size, dtype=jnp.int32))
        return slots_at(tokens.reshape(*picked.shape[:3], -1), memory.positions)

    def scores(self, queries: jax.Array, compressed: Memory, positions: jax.Array, blocks: int) -> jax.Array:
        """What each block gets of the compression branch's attention, for each key head: [B, S, K, J] in fp32 at least.

        Means over the heads of a group, where the paper has sums. Nothing is differentiated.
        """
        queries, keys = jax.lax.stop_gradient((split_groups(queries, self.num_kv_heads), compressed.entries.pool_key))
        if not keys.shape[1]:
            return jnp.zeros((*queries.shape[:3], blocks), jnp.float32)
        modifiers = jax.lax.stop_gradient(self.modifiers())
        sink = modifiers.pop("sink")
        sinks = None if sink is None else sink.reshape(self.num_kv_heads, -1)

        def shares(queries: jax.Array, key: jax.Array, sink: jax.Array | None) -> jax.Array:
            mask = compressed.mask(positions)
            return attention_shares((queries,), (key[:, :, None],), mask, scale=self.scale, sink=sink, **modifiers)

        given = jax.vmap(shares, (2, 2, None if sinks is None else 0), 2)(queries, keys, sinks)
        common = jnp.asarray(in_common(keys.shape[1], blocks, self.config), given.dtype)
        return jnp.matmul(given, common, precision=jax.lax.Precision.HIGHEST)

    def read(self, x: jax.Array, positions: jax.Array | None, memory: Memory) -> jax.Array:
        where = jnp.arange(x.shape[1], dtype=jnp.int32)[None] if positions is None else positions
        mask, queries = memory.mask(jnp.broadcast_to(where, x.shape[:2])), self.queries(x, where)
        chosen = self.choose(x, where, queries, memory, mask)
        mask = mask if chosen is None else dataclasses.replace(mask, chosen=chosen)
        branches = zip(self.branches(queries, memory, mask), jnp.moveaxis(self.gates(x), -1, 0), strict=True)
        return self.finish(x, merge_heads(sum(gate[..., None] * heads for heads, gate in branches)))  # type: ignore[arg-type]

    def gates(self, x: jax.Array) -> jax.Array:
        """Of each head and branch, [B, S, H, 3]."""
        return split_heads(jax.nn.sigmoid(self.branch_gate(x)), self.num_heads)

    def branches(self, queries: Queries, memory: Memory, mask: Mask) -> list[jax.Array]:
        """What compression, selection and window give, [B, S, H, D] each."""
        compressed, near = memory.beside
        near = dataclasses.replace(near, contiguous=memory.contiguous)
        pooled = jnp.zeros_like(queries.plain)
        if compressed.positions.shape[1]:
            seen = compressed.mask(mask.query_positions)
            pooled = self.softmax((queries.plain,), compressed.entries[:1], compressed.entries[1], seen, self.scale)
        selected = self.softmax((queries.turned,), memory.entries[:1], memory.entries[1], mask, self.scale)
        seen = near.mask(mask.query_positions, self.config.near)
        window = self.softmax((queries.turned,), near.entries[:1], near.entries[1], seen, self.scale)
        return [pooled, selected, window]

    sparing: ClassVar[tuple[str, ...]] = ("compress_key", "compress_value")

    def mixing_flops(self, tokens: int, decode: bool = False) -> float:
        """Three branches, the compression branch's logits twice since blocks are chosen by them, and its MLPs, which make an
        entry of l tokens for each key head every d tokens; a decoded token makes one whether or not it is kept."""
        config, (before, own) = self.config, divmod(tokens - 1, self.config.block)
        pooled = max(0, (tokens - config.pool_block) // config.pool_stride + 1)
        chosen = own + 1 + min(before, config.top_k - 1) * config.block
        attended = self.pair_flops() * (1.5 * pooled + chosen + min(tokens, config.near))
        in_common = 2.0 * self.num_kv_heads * pooled * (before + 1)  # from shares of entries to shares of blocks
        inner, outer = self.compress_key.inner.kernel, self.compress_key.outer.kernel
        made = 4.0 * self.num_kv_heads * (inner.size + outer.size) / (1 if decode else config.pool_stride)
        return attended + in_common + made

    def reads(self, tokens: int) -> dict[str, int]:
        size = self.config.block
        before = max(tokens - 1, 0) // size
        read = min(before, self.config.top_k - 1) * size + tokens - before * size
        return {"key": read, "value": read}


def split_groups(queries: jax.Array, groups: int) -> jax.Array:
    """[B, S, H, D] -> [B, S, K, H / K, D]."""
    return queries.reshape(*queries.shape[:2], groups, -1, queries.shape[3])


def in_common(entries: int, blocks: int, config: NativeSparseConfig) -> np.ndarray:
    """How many pieces of d tokens entry i, of l tokens from i d on, and block j of l' have in common: [entries, blocks]."""
    entry, block = np.arange(entries)[:, None], np.arange(blocks)
    long, wide = config.pool_block // config.pool_stride, config.block // config.pool_stride
    return np.maximum(0, np.minimum(entry + long, (block + 1) * wide) - np.maximum(entry, block * wide))
