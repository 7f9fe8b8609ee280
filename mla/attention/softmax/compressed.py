"""Heavily compressed attention (HCA) of DeepSeek-V4: one key-value vector for all heads, a window of them, and one for every
m tokens before.

    q_t  = RoPE(RMS(RMSNorm(x_t W_QA) W_QB))      H heads of c channels, normed head by head without a gain
    kv_t = RoPE(RMSNorm(x_t W_KV))                one head, key and value at once
    e_i  = RoPE(RMSNorm(sum_j softmax_j(x_j W_Z + B_j) * (x_j W_C)))     j over the m tokens of window i, channel by channel

RoPE turns the last `qk_rope_head_dim` channels, in pairs (2k, 2k+1); e_i stands where its window starts. A query at t sees
kv_s of the last `window` tokens, and e_i of all windows that are finished, the one that it finishes itself included: one
softmax over both and a learned logit of each head (`sink`), scale c^-1/2. Values carry the rotation of keys, so what a head
read is turned back by t. Heads leave through g groups, each with a matrix of its own, which are then mixed.

With `stride` 0 there is the window alone: the published models begin with such layers.

Remembers `window` vectors, one for every m tokens, and of the open window three running fp32 vectors, from which decoding at
any position continues exactly; the published code keeps its tokens. Training costs window + T / m entries a query.

Definition: the technical report of DeepSeek-V4, sections 2.3 and 4.2, and `transformers`' DeepseekV4Attention, which the
tests hold it to.

Legend: B batch, S queries, C entries, M compressed entries, H heads, R = c channels.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from mla.attention.contract import Surroundings, Term, constant, require
from mla.attention.softmax.base import Memory, NewEntries, SoftmaxConfig, SoftmaxMixer
from mla.cache.clock import Clock
from mla.cache.stores import Entries, LayerCache, State, StoreSpec
from mla.layers.basic import GroupedLowRank, Linear, LowRank, RMSNorm, merge_heads, split_heads, unit_rms, wide_dtype
from mla.layers.compressor import Compressor, Pooled
from mla.ops.attention import softmax_weights
from mla.ops.mask import Mask
from mla.ops.rope import rotate

LOGITS = 2**23  # that exist at once


class Vectors(NamedTuple):
    """Entries of tokens: kv [B, T, 1, R], key and value of all heads, rotated."""

    kv: jax.Array


class Entry(NamedTuple):
    """Entries of windows: pooled [B, M, 1, R], rotated."""

    pooled: jax.Array


class Windows(NamedTuple):
    """What is remembered of finished windows: their entries, a NamedTuple of [B, M, 1, ...], and where they end, int32
    [B, M]; -1: no window."""

    entries: Any
    ends: jax.Array


class Read(NamedTuple):
    """What was read: head outputs [B, S, H, R]; and where that is asked for, what each query gives the windows it reads, on
    average over heads: [B, S, M], or [B, S, N] of those it chose."""

    heads: jax.Array
    shares: jax.Array | None


@dataclasses.dataclass
class CompressedConfig(SoftmaxConfig):
    """Heavily compressed attention.

    Paper: DeepSeek-V4
    Remembers: one vector for the window's tokens and one for every m tokens
    Elements: c / m, c window and 3 c in fp32
    Use: a cache that hardly grows, every entry of it read
    """

    sink: bool = True
    window: int = 64  # tokens whose own vectors a query sees, its own included
    stride: int = 16  # m, tokens of a compressed entry; 0: there is none, only the window
    head_dim: int = 0  # c; 0: twice d_model / num_heads
    q_lora_rank: int = 0  # channels of the query latent; 0: d_model / 2
    qk_rope_head_dim: int = 32  # channels of a head that are rotated, its last
    out_groups: int = 4  # g, groups of heads with an output matrix of their own
    out_rank: int = 0  # channels that each group leaves through; 0: d_model / g

    def width(self, around: Surroundings) -> int:
        return self.head_dim or 2 * self.default_head_dim(around, "head_dim")

    def query_rank(self, around: Surroundings) -> int:
        return self.q_lora_rank or around.d_model // 2

    def group_rank(self, around: Surroundings) -> int:
        return self.out_rank or around.d_model // self.out_groups

    def validate(self, around: Surroundings) -> None:
        super().validate(around)
        require(self.window >= 1, "window", f"{self.window} is not a positive number of tokens")
        require(self.stride >= 0, "stride", f"{self.stride} is below 0, which means no compressed entries")
        turned = self.qk_rope_head_dim % 2 == 0 and 0 <= self.qk_rope_head_dim <= self.width(around)
        least = f"from 0 to head_dim {self.width(around)}"
        require(turned, "qk_rope_head_dim", f"{self.qk_rope_head_dim} is not an even number of channels {least}")
        require(self.out_groups >= 1, "out_groups", f"{self.out_groups} is not a positive number of groups")
        divided, heads = self.heads(around) % self.out_groups == 0, self.heads(around)
        require(divided, "out_groups", f"{self.out_groups} does not divide the {heads} heads")
        require(not self.soft_cap, "soft_cap", "logits are not capped here; set it to 0")

    def cache_formula(self, around: Surroundings) -> list[Term]:
        width = self.width(around)
        kept = [Term(width, window=self.window)]
        return [*kept, Term(width, stride=self.stride), constant(3 * width)] if self.stride else kept


class HeavilyCompressed(SoftmaxMixer[CompressedConfig, jax.Array, Vectors]):
    """Attention of H heads over one vector a token of a window, and one for every finished window of m tokens."""

    paged: ClassVar[bool] = False  # a window and pooled entries: not pages of tokens
    overlap: ClassVar[bool] = False  # whether an entry also pools the tokens of the window before its own

    def __init__(self, config: CompressedConfig, around: Surroundings, *, rngs: Any):
        super().__init__(config, around, rngs=rngs)
        self.width, self.rope_dim = config.width(around), config.qk_rope_head_dim
        make: dict[str, Any] = {"rngs": rngs, "dtype": around.dtype}
        eps, heads = around.norm_eps, self.num_heads * self.width
        self.query = LowRank(around.d_model, config.query_rank(around), heads, eps=eps, **make)
        if around.remembers:
            self.kv, self.kv_norm = Linear(around.d_model, self.width, ("model", None), **make), RMSNorm(self.width, eps=eps)
            if config.stride:
                self.compressor = Compressor(
                    around.d_model, self.width, config.stride, overlap=self.overlap, eps=eps, **make
                )
        groups, rank = config.out_groups, config.group_rank(around)
        out = GroupedLowRank(heads, groups, rank, around.d_model, gain=around.residual_gain, **make)
        self.make_output(self.width, rngs, out)

    def turn(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """x [B, T, heads, R or other channels], its last `qk_rope_head_dim` channels rotated to int32 positions."""
        if not self.rope_dim or not x.size:
            return x
        theta = self.config.theta(self.around)
        rest, last = jnp.split(x, [x.shape[-1] - self.rope_dim], axis=-1)
        return jnp.concatenate([rest, rotate(last, positions, theta, interleaved=True)], axis=-1)

    def queries(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """[B, S, H, R], normed and rotated."""
        return self.turn(unit_rms(split_heads(self.query(x), self.num_heads), self.around.norm_eps), positions)

    def entries(self, x: jax.Array, positions: jax.Array) -> Vectors:
        return Vectors(self.turn(self.kv_norm(self.kv(x))[:, :, None], positions))

    def shift(self, entries: Vectors, by: jax.Array) -> Vectors:
        return Vectors(self.turn(entries.kv, by))

    def pair_flops(self) -> float:
        return 4.0 * self.num_heads * self.width

    def windows(self, tokens: int) -> int:
        """Finished windows of m tokens among so many."""
        return tokens // self.config.stride if self.config.stride else 0

    def seen(self, tokens: int) -> int:
        return min(tokens, self.config.window) + self.windows(tokens)

    # --------------------------------------------------------------------------------------------------------- what it keeps

    def window_streams(self) -> Any:
        """The shapes [1, 1, 1, ...] of one window's entries."""
        return Entry(jax.ShapeDtypeStruct((1, 1, 1, self.width), self.around.dtype))  # type: ignore[arg-type]

    def compressors(self) -> dict[str, Compressor]:
        """What pools tokens, by the names of the streams that its entries go to."""
        return {"pooled": self.compressor} if self.config.stride else {}

    def stores(self) -> dict[str, StoreSpec]:
        stores = super().stores()
        if self.config.stride:
            stores["windows"] = Entries(self.window_streams(), Clock(self.config.stride))
        opened = {name: State(part.opened(self.around.dtype), (None,)) for name, part in self.compressors().items()}
        return stores | {f"open_{name}": state for name, state in opened.items()}

    def new_entries(self, x: jax.Array, positions: jax.Array, cache: LayerCache | None) -> NewEntries:
        """The vectors of tokens; beside them, the windows that are finished after these tokens."""
        new, where = self.entries(x, positions), jnp.broadcast_to(positions, x.shape[:2])
        if not self.config.stride:
            return NewEntries(new, cache)
        streams: dict[str, jax.Array] = {}
        for name, part in self.compressors().items():
            opened = None if cache is None else cache[f"open_{name}"].state
            done: Pooled = part(self.compressible(name, x), where, opened)
            streams[name] = self.turn(done.entries[:, :, None], done.ends - self.config.stride + 1)
            if cache is not None:
                cache = cache.replace(**{f"open_{name}": cache[f"open_{name}"].holding(done.open, where)})
        windows, ends = type(self.window_streams())(**streams), done.ends
        if cache is not None:
            seen, store = cache["windows"].extend(windows, ends)
            windows, ends = seen.read(self.around.dtype), seen.positions
            cache = cache.replace(windows=store)
        return NewEntries(new, cache, beside=Windows(windows, ends))

    def compressible(self, name: str, x: jax.Array) -> jax.Array:
        """What of x [B, S, D] a compressor of this name pools."""
        del name
        return x

    # --------------------------------------------------------------------------------------------------------------- reading

    def read(self, x: jax.Array, positions: jax.Array | None, memory: Memory[Vectors]) -> jax.Array:
        where = jnp.arange(x.shape[1], dtype=jnp.int32)[None] if positions is None else positions
        queries = self.queries(x, where)
        where = jnp.broadcast_to(where, x.shape[:2])
        chosen = self.choose(x, where, queries, memory, self.windows_mask(where, memory))
        return self.finish(x, self.turned_back(self.look(queries, where, memory, chosen).heads, where))

    def turned_back(self, heads: jax.Array, positions: jax.Array) -> jax.Array:
        """Head outputs [B, S, H, R] -> [B, S, H R], without the rotation of the queries' own positions."""
        return merge_heads(self.turn(heads, -positions))

    def windows_mask(self, positions: jax.Array, memory: Memory[Vectors]) -> Mask:
        """Which windows queries at int32 [B, S] see."""
        ends = jnp.zeros((positions.shape[0], 0), jnp.int32) if memory.beside is None else memory.beside.ends
        return Mask(positions, ends)

    def look(
        self,
        queries: jax.Array,
        positions: jax.Array,
        memory: Memory[Vectors],
        chosen: jax.Array | None = None,
        shares: bool = False,
    ) -> Read:
        """One softmax over the window and the compressed entries.

        Args:
          queries: [B, S, H, R] at int32 positions [B, S].
          chosen: int32 [B, S, 1, N], the compressed entries that each query reads, -1 for none; None: all that it sees.
          shares: whether to say what they got.
        """
        vectors, (batch, length, heads, _) = memory.entries.kv[:, :, 0], queries.shape
        windows = None if memory.beside is None else memory.beside.entries.pooled[:, :, 0]
        ends = self.windows_mask(positions, memory).entry_positions
        chosen = None if chosen is None else chosen[:, :, 0]
        look = functools.partial(self._look, windows=windows, ends=ends, shares=shares)
        if length == 1:
            return look(queries, positions, chosen, vectors, memory.positions)
        size = self.config.window if memory.contiguous else max(1, LOGITS // (batch * heads * max(1, vectors.shape[1])))
        size = min(size, length)

        def cut(a: jax.Array | None, fill: int = 0) -> jax.Array | None:
            """[B, S, ..] -> [blocks, B, size, ..]"""
            if a is None:
                return None
            a = jnp.pad(a, [(0, 0), (0, -length % size), *[(0, 0)] * (a.ndim - 2)], constant_values=fill)
            return jnp.moveaxis(a.reshape(batch, -1, size, *a.shape[2:]), 1, 0)

        def joined(a: jax.Array) -> jax.Array:
            return jnp.moveaxis(a, 0, 1).reshape(batch, a.shape[0] * size, *a.shape[3:])[:, :length]

        parts: Any = (cut(queries), cut(positions, -1), cut(chosen, -1))
        if memory.contiguous:  # a block of as many queries as the window sees the block before and its own
            before = self.config.window
            parts += tuple(_with_before(cut(a, fill), before, fill) for a, fill in ((vectors, 0), (memory.positions, -1)))
        else:
            look = functools.partial(look, vectors=vectors, stands=memory.positions)
        seen = 2 * size if memory.contiguous else vectors.shape[1]
        seen += ends.shape[1] if chosen is None else chosen.shape[-1]
        several = max(1, LOGITS // (batch * size * heads * seen))

        @jax.checkpoint
        def block(part: Any) -> Read:
            return look(*part)

        return jax.tree.map(joined, jax.lax.map(block, parts, batch_size=min(several, parts[0].shape[0])))  # type: ignore[no-any-return]

    def _look(
        self,
        queries: jax.Array,
        positions: jax.Array,
        chosen: jax.Array | None,
        vectors: jax.Array,
        stands: jax.Array,
        windows: jax.Array | None,
        ends: jax.Array,
        shares: bool,
    ) -> Read:
        """`look` for one block of queries over vectors [B, C, R] that stand at int32 [B, C], and windows [B, M, R]."""
        wide, scale = wide_dtype(queries.dtype), self.width**-0.5
        distance = positions[:, :, None] - stands[:, None]
        seen = (stands[:, None] >= 0) & (distance >= 0) & (distance < self.config.window)
        logits = [jnp.einsum("bshr,bcr->bshc", queries, vectors, preferred_element_type=wide)]
        picked, sees = windows, "bmr"
        if windows is not None:
            if chosen is None:
                there = (ends[:, None] >= 0) & (ends[:, None] <= positions[:, :, None])
            else:
                picked, sees, there = jax.vmap(lambda rows, index: rows[index])(windows, chosen), "bsmr", chosen >= 0
            logits += [jnp.einsum(f"bshr,{sees}->bshm", queries, picked, preferred_element_type=wide)]
            seen = jnp.concatenate([seen, there], axis=-1)
        sink = None if self.sink is None else self.sink[...]
        weights = softmax_weights(scale * jnp.concatenate(logits, axis=-1), seen[:, :, None], sink=sink)
        given = jnp.mean(weights[..., vectors.shape[1] :], axis=2) if shares else None
        weights = weights.astype(vectors.dtype)
        heads = jnp.einsum("bshc,bcr->bshr", weights[..., : vectors.shape[1]], vectors)
        if windows is not None:
            heads += jnp.einsum(f"bshm,{sees}->bshr", weights[..., vectors.shape[1] :], picked)
        return Read(heads, given)


def _with_before(blocks: Any, count: int, fill: int) -> jax.Array:
    """Blocks [blocks, B, size, ...] -> each behind the last `count` of what stands before it; `fill` before the first."""
    before = jnp.concatenate([jnp.full_like(blocks[:1], fill), blocks[:-1]])
    if count > blocks.shape[2]:  # a single block, shorter than the window
        assert blocks.shape[0] == 1
        return blocks
    return jnp.concatenate([before, blocks], axis=2)
