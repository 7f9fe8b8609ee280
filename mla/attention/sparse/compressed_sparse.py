"""Compressed sparse attention (CSA) of DeepSeek-V4: short windows of the text, compressed; an indexer chooses a few of them.

What `compressed` is with m of a few tokens, but for two things. Entries overlap: entry i pools the tokens of window i and,
through channels of W_C, W_Z and B of their own, those of window i - 1. And a query reads, beside the window of the newest
tokens, only the `top_k` entries with the best scores of a lightning indexer, the same for all its heads:

    k^I_i  = RoPE(entry i of a compressor of its own, d_I channels wide)
    q^I_tj = RoPE(RMSNorm(x_t W_QA) W_I)      w_t = x_t W_w
    I_ti   = sum_j w_tj ReLU(q^I_tj . k^I_i) (J d_I)^-1/2      over the windows i that are finished at t

RoPE turns the last `qk_rope_head_dim` channels. Of equal scores the earlier entry is taken. With as many entries as `top_k`
or fewer, all are read.

No gradient goes through the choice. How the published indexer is trained its report does not say; here it learns as that of
DeepSeek-V3.2: a loss of its own at each token, on average over tokens, over all windows in the first `dense_steps` of
training, while all are read, and over the chosen ones after that,

    KL(p_t || softmax I_t)    p_t the mean over heads of what they give the windows, not differentiated

Its inputs are detached: the loss of the language model has no gradient in the indexer, nor has this loss one in anything
else.

Remembers `window` vectors, a vector and an index key for every m tokens, and six running fp32 vectors of either width. A
decode step scans the index keys, and reads the window and what it chose.

Definition: the technical report of DeepSeek-V4, sections 2.3 and 4.2, and `transformers`' DeepseekV4Attention.

Legend: B batch, S queries, M compressed entries, J index heads, d_I their width, N entries chosen.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from mla.attention.contract import Output, Step, Surroundings, Term, constant, mechanism, require
from mla.attention.softmax.base import Memory
from mla.attention.sparse.base import SparseMixer
from mla.layers.basic import Linear, split_heads
from mla.layers.compressor import Compressor
from mla.ops.indexer import best_by_index, chosen_scores, divergence, index_scores
from mla.ops.mask import Mask

CompressedConfig, HeavilyCompressed = mechanism("compressed")


class Indexed(NamedTuple):
    """Entries of windows: pooled [B, M, 1, R] and index keys k_index [B, M, 1, d_I], rotated."""

    pooled: jax.Array
    k_index: jax.Array


class Index(NamedTuple):
    """What index heads ask with: queries [B, S, J, d_I], rotated, and weights [B, S, J], scaled."""

    queries: jax.Array
    weights: jax.Array


@dataclasses.dataclass
class CompressedSparseConfig(CompressedConfig):  # type: ignore[misc, valid-type]
    """Compressed sparse attention.

    Paper: DeepSeek-V4
    Remembers: a vector and an index key for every m tokens, and the window's tokens
    Elements: (c + d_I) / m, c window and 6 (c + d_I) in fp32
    Use: reads its window and `top_k` entries of m tokens a step, and all index keys
    """

    stride: int = 4  # m, tokens between two entries, each of which pools twice as many
    top_k: int = 32  # entries that a query reads
    index_heads: int = 4  # J
    index_head_dim: int = 32  # d_I; the last qk_rope_head_dim of them are rotated
    dense_steps: float = 0.05  # of config.steps: every entry is read, and the indexer learns from all

    def validate(self, around: Surroundings) -> None:
        super().validate(around)
        require(self.stride >= 1, "stride", f"{self.stride} is not a positive number of tokens")
        for name in ("top_k", "index_heads", "index_head_dim"):
            require(getattr(self, name) >= 1, name, f"{getattr(self, name)} is not a positive number")
        turned = self.qk_rope_head_dim <= self.index_head_dim
        require(turned, "index_head_dim", f"{self.index_head_dim} is below qk_rope_head_dim {self.qk_rope_head_dim}")
        require(0 <= self.dense_steps <= 1, "dense_steps", f"{self.dense_steps} is no share of the steps, from 0 to 1")

    def cache_formula(self, around: Surroundings) -> list[Term]:
        width, index = self.width(around), self.index_head_dim
        return [Term(width, window=self.window), Term(width + index, stride=self.stride), constant(6 * (width + index))]


class CompressedSparse(SparseMixer, HeavilyCompressed):  # type: ignore[misc, valid-type, type-arg]
    """Attention over a window and the compressed entries with the best index scores."""

    overlap: ClassVar[bool] = True

    def __init__(self, config: CompressedSparseConfig, around: Surroundings, *, rngs: Any):
        super().__init__(config, around, rngs=rngs)
        heads, dim = config.index_heads, config.index_head_dim
        make: dict[str, Any] = {"rngs": rngs, "dtype": around.dtype}
        # All heads read what these choose, so every device of a tensor axis has all of them.
        self.index_query = Linear(config.query_rank(around), heads * dim, ("latent", None), **make)
        self.index_weight = Linear(around.d_model, heads, ("model", None), **make)
        if around.remembers:
            self.index_compressor = Compressor(around.d_model, dim, config.stride, overlap=True, eps=around.norm_eps, **make)

    def seen(self, tokens: int) -> int:
        return min(tokens, self.config.window) + min(self.windows(tokens), self.config.top_k)

    def mixing_flops(self, tokens: int, decode: bool = False) -> float:
        """A score of every entry, where there are more than are chosen, and attention to those that are."""
        longest = self.windows(tokens if decode else self.around.context)
        scored = self.windows(tokens) if longest > self.config.top_k else 0
        scores = 2.0 * self.config.index_heads * self.config.index_head_dim * scored
        return scores + float(super().mixing_flops(tokens, decode))

    def window_streams(self) -> Any:
        shapes = ((1, 1, 1, width) for width in (self.width, self.config.index_head_dim))
        return Indexed(*(jax.ShapeDtypeStruct(shape, self.around.dtype) for shape in shapes))  # type: ignore[arg-type]

    def compressors(self) -> dict[str, Compressor]:
        return {"pooled": self.compressor, "k_index": self.index_compressor}

    def compressible(self, name: str, x: jax.Array) -> jax.Array:
        return jax.lax.stop_gradient(x) if name == "k_index" else x

    def index(self, x: jax.Array, positions: jax.Array) -> Index:
        """What the indexer asks for x [B, S, D] at int32 [B, S] or [1, S]."""
        x = jax.lax.stop_gradient(x)
        latent = jax.lax.stop_gradient(self.query.latent(x)[..., 0, :])
        queries = self.turn(split_heads(self.index_query(latent), self.config.index_heads), positions)
        return Index(queries, self.index_weight(x) * (self.config.index_heads * self.config.index_head_dim) ** -0.5)

    def choose(self, x: jax.Array, positions: jax.Array, queries: Any, memory: Memory, mask: Mask) -> jax.Array | None:
        if self.config.top_k >= mask.entry_positions.shape[1]:
            return None
        keys = memory.beside.entries.k_index[:, :, 0]
        return best_by_index(*self.index(x, positions), keys, mask, self.config.top_k)[:, :, None]

    def reads(self, tokens: int) -> dict[str, int]:
        return {"pooled": self.config.top_k}

    def forward(
        self, x: jax.Array, positions: jax.Array | None = None, memory: Any = None, step: Step | None = None
    ) -> Output:
        """At a step, which takes no positions but 0 .. T-1, also the indexer's loss of each token, [B, T], as `index`."""
        if step is None:
            return super().forward(x, positions, memory)  # type: ignore[no-any-return]
        where = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
        memory = self.remember(x)[0] if memory is None else memory
        queries, mask = self.queries(x, where), self.windows_mask(where, memory)
        keys, index = memory.beside.entries.k_index[:, :, 0], self.index(x, where)

        def dense(chosen: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
            read = self.look(queries, where, memory, chosen, shares=True)
            if chosen is None:
                return read.heads, divergence(read.shares, index_scores(*index, keys), mask.visible())
            chosen = chosen[:, :, 0]
            return read.heads, divergence(read.shares, chosen_scores(*index, keys, chosen), chosen >= 0)

        def sparse() -> tuple[jax.Array, jax.Array]:
            return dense(self.choose(x, where, queries, memory, mask))

        heads, loss = jax.lax.cond(step.progress < self.config.dense_steps, dense, sparse)
        return Output(self.finish(x, self.turned_back(heads, where)), {"index": loss}, {"index_divergence": jnp.mean(loss)})
