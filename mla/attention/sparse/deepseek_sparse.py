"""DeepSeek sparse attention (DSA, DeepSeek-V3.2, 2512.02556): MLA over the entries that a lightning indexer chooses.

Beside MLA's latent and rotary key, each token leaves one index key; J small heads score all of them for every query, and the
query attends to the `top_k` best, the same for all its heads:

    k^I_s  = RoPE(LayerNorm(x_s W_k))                     one head; LayerNorm with bias, eps 1e-6
    q^I_tj = RoPE(c_Q,t W_q)    w_t = x_t W_w             c_Q the normed query latent, x_t without one
    I_ts   = sum_j w_tj ReLU(q^I_tj . k^I_s) (J d_I)^-1/2         over s <= t

RoPE turns the first `qk_rope_head_dim` channels of an index head, as halves, whatever pairing MLA's own has. The published
code also turns q^I and k^I by a Hadamard matrix, which changes no product and prepares them for fp8: here that is a codec,
k_index=hadamard+fp8, 132 bytes an index key of 128 channels. Of equal scores the earlier entry is taken. With as many
entries as `top_k` or fewer, this is MLA.

The indexer learns to predict attention, by a loss of its own at each token (`Output.losses`), on average over tokens,

    KL(p_t || softmax I_t)    p_t the mean over heads of what they attend to, not differentiated

in the first `dense_steps` of training over all entries, while attention is dense; after that over the chosen ones. Its
inputs are detached: the loss of the language model has no gradient in the indexer, nor has this loss one in anything else.
As published, with `freeze` and `config.init_from` a trained MLA model, nothing but the indexers learns in the dense steps;
otherwise both learn from the start. Gradients are clipped together. Training scores all pairs of tokens, and in its dense
part holds [T, T] scores of a layer; attention itself costs what is chosen.

Legend: B batch, S queries, T tokens, C entries, J index heads, d_I their width.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from mla.attention.contract import Output, Step, Surroundings, mechanism, require
from mla.attention.softmax.base import Memory
from mla.attention.softmax.mla import Latents, Queries
from mla.attention.sparse.base import SparseMixer
from mla.layers.basic import LayerNorm, Linear, split_heads
from mla.ops.attention import attention_shares
from mla.ops.indexer import best_by_index, chosen_scores, divergence, index_scores
from mla.ops.mask import Mask
from mla.ops.rope import rotate

MLAConfig, MLA = mechanism("mla")


class IndexedLatents(NamedTuple):
    """MLA's entries, c_kv [B, T, 1, R] and k_rope [B, T, 1, P], with index keys k_index [B, T, 1, d_I], rotated."""

    c_kv: jax.Array
    k_rope: jax.Array
    k_index: jax.Array


class Index(NamedTuple):
    """What index heads ask with: queries [B, S, J, d_I], rotated, and weights [B, S, J], scaled."""

    queries: jax.Array
    weights: jax.Array


@dataclasses.dataclass
class DeepseekSparseConfig(MLAConfig):  # type: ignore[misc, valid-type]
    """DeepSeek sparse attention.

    Paper: 2512.02556
    Remembers: MLA's latent and rotated key, and an index key
    Elements: kv_lora_rank + d_r + d_I
    Use: MLA that reads `top_k` latents a step, and all index keys
    """

    top_k: int = 128  # entries that a query attends to
    index_heads: int = 4  # J
    index_head_dim: int = 32  # d_I; the first qk_rope_head_dim of them are rotated
    dense_steps: float = 0.05  # of config.steps: attention is dense, and the indexer learns from all entries
    freeze: bool = False  # in the dense steps nothing of the model but indexers learns: for a start from a trained model
    train_index: bool = True  # False: the indexer stays as it was drawn, but for weight decay; to compare with

    def validate(self, around: Surroundings) -> None:
        super().validate(around)
        for name in ("top_k", "index_heads", "index_head_dim"):
            require(getattr(self, name) >= 1, name, f"{getattr(self, name)} is not a positive number")
        turned = self.qk_rope_head_dim <= self.index_head_dim
        require(turned, "index_head_dim", f"{self.index_head_dim} is below qk_rope_head_dim {self.qk_rope_head_dim}")
        require(0 <= self.dense_steps <= 1, "dense_steps", f"{self.dense_steps} is no share of the steps, from 0 to 1")
        require(self.dense_steps > 0 or not self.freeze, "freeze", "is of the dense steps, and dense_steps is 0")

    def elements(self, around: Surroundings) -> int:
        return int(super().elements(around)) + self.index_head_dim


class DeepseekSparse(SparseMixer, MLA):  # type: ignore[misc, valid-type, type-arg]
    """Multi-head latent attention over the entries with the best index scores."""

    additions: ClassVar[tuple[str, ...]] = ("index_query", "index_weight", "index_key", "index_norm")

    def __init__(self, config: DeepseekSparseConfig, around: Surroundings, *, rngs: Any):
        super().__init__(config, around, rngs=rngs)
        make: dict[str, Any] = {"rngs": rngs, "dtype": around.dtype}
        width, heads, dim = around.d_model, config.index_heads, config.index_head_dim
        # All heads read what these choose, so every device of a tensor axis has all of them.
        asked = Linear(config.q_lora_rank or width, heads * dim, ("latent" if config.q_lora_rank else "model", None), **make)
        self.index_query, self.index_weight = asked, Linear(width, heads, ("model", None), **make)
        if around.remembers:
            self.index_key, self.index_norm = Linear(width, dim, ("model", None), **make), LayerNorm(dim, eps=1e-6)

    def turn(self, index: jax.Array, positions: jax.Array, scaled: bool = True) -> jax.Array:
        """Index queries or keys [B, T, heads, d_I], rotated to where they stand."""
        if not (self.config.rope and self.rope_dim):
            return index
        return rotate(index, positions, self.config.theta(self.around), yarn=self.yarn, dim=self.rope_dim, scaled=scaled)

    def entries(self, x: jax.Array, positions: jax.Array) -> IndexedLatents:
        key = self.index_norm(self.index_key(jax.lax.stop_gradient(x)))
        c_kv, k_rope = super().entries(x, positions)
        return IndexedLatents(c_kv, k_rope, self.turn(split_heads(key, 1), positions))

    def shift(self, entries: IndexedLatents, by: jax.Array) -> IndexedLatents:
        moved = super().shift(Latents(entries.c_kv, entries.k_rope), by)
        return IndexedLatents(moved.c_kv, moved.k_rope, self.turn(entries.k_index, by, scaled=False))

    def index(self, x: jax.Array, positions: jax.Array) -> Index:
        """What the indexer asks for x [B, S, D]."""
        x = jax.lax.stop_gradient(x)
        latent = jax.lax.stop_gradient(self.query.latent(x)[..., 0, :]) if self.config.q_lora_rank else x
        queries = self.turn(split_heads(self.index_query(latent), self.config.index_heads), positions)
        scale = (self.config.index_heads * self.config.index_head_dim) ** -0.5
        return Index(queries, self.index_weight(x) * scale)

    def choose(self, x: jax.Array, positions: jax.Array, queries: Queries, memory: Memory, mask: Mask) -> jax.Array | None:
        if self.config.top_k >= mask.entry_positions.shape[1]:
            return None
        keys = memory.entries.k_index[:, :, 0]
        return best_by_index(*self.index(x, positions), keys, mask, self.config.top_k)[:, :, None]

    def reads(self, tokens: int) -> dict[str, int]:
        return {"c_kv": self.config.top_k, "k_rope": self.config.top_k}

    def mixing_flops(self, tokens: int, decode: bool = False) -> float:
        """A score of every entry, and attention to those that are chosen; to all where there are no more. Where entries are
        chosen, no keys and values are built of them, see `attend`."""
        within = self.seen(tokens)
        if (within if decode else self.around.context) <= self.config.top_k:
            return float(super().mixing_flops(tokens, decode))
        expands = self.config.attend == "expanded"
        cost, scores = self.costs()[not expands], 2.0 * self.config.index_heads * self.config.index_head_dim * within
        return scores + cost.pair * min(within, self.config.top_k) + cost.query + cost.entry * (within if decode else 1)

    # ----------------------------------------------------------------------------------------------------------- training

    def dense(self, step: Step) -> jax.Array:
        """Whether attention is dense in a training step, a truth value."""
        return step.progress < self.config.dense_steps

    def additions_alone(self, step: Step) -> jax.Array | None:
        return self.dense(step) if self.config.freeze else None

    def forward(
        self, x: jax.Array, positions: jax.Array | None = None, memory: Any = None, step: Step | None = None
    ) -> Output:
        """At a step, which takes no positions but 0 .. T-1, also the indexer's loss of each token, [B, T], as `index`."""
        if step is None:
            return super().forward(x, positions, memory)  # type: ignore[no-any-return]
        where = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
        memory = self.remember(x)[0] if memory is None else memory
        mask = memory.mask(jnp.broadcast_to(where, x.shape[:2]), self.window, self.chunk)
        queries, entries = self.queries(x, where), memory.entries

        def dense(chosen: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
            seen = mask if chosen is None else dataclasses.replace(mask, chosen=chosen)
            return self.attend(queries, entries, seen), self.index_loss(self.index(x, where), queries, entries, seen)

        def sparse() -> tuple[jax.Array, jax.Array]:
            return dense(self.choose(x, where, queries, memory, mask))

        heads, loss = jax.lax.cond(self.dense(step), dense, sparse)
        losses = {"index": loss} if self.config.train_index else {}
        return Output(self.finish(x, heads), losses, {"index_divergence": jnp.mean(loss)})

    def index_loss(self, index: Index, queries: Queries, entries: IndexedLatents, mask: Mask) -> jax.Array:
        """KL(p || softmax I) of each query, [B, S], over what it sees, or over what it has chosen of that."""
        keys = entries.k_index[:, :, 0]
        parts, latents = jax.lax.stop_gradient(self.in_latents(queries, entries))
        shares = attention_shares(parts, latents, mask, scale=self.scale, **jax.lax.stop_gradient(self.modifiers()))
        if mask.chosen is None:
            return divergence(shares, index_scores(*index, keys), mask.visible())
        chosen = mask.chosen[:, :, 0]
        # Of positions 0 .. T-1, a chosen entry is one that is seen.
        return divergence(shares, chosen_scores(*index, keys, chosen), chosen >= 0)
