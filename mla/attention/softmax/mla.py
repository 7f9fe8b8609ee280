"""Multi-head latent attention (DeepSeek-V2 2405.04434, equations 9 to 19; DeepSeek-V3 2412.19437).

Per token, all heads share one latent c_kv of `kv_lora_rank` channels and one rotated key k_rope of `qk_rope_head_dim`:

    c_Q    = RMSNorm(x W_DQ)                                    (12)   only with q_lora_rank > 0; otherwise c_Q = x
    q_nope = c_Q W_UQ,  q_rope = RoPE(c_Q W_QR)  per head       (13, 14)
    c_kv   = RMSNorm(x W_DKV),  k_rope = RoPE(x W_KR)           (9, 15)   k_rope: one head, not normed
    k_i    = [c_kv W_UK,i ; k_rope],  v_i = c_kv W_UV,i         (10, 11, 17)
    o_i    = softmax(q_i k_i^T / sqrt(d_nope + d_rope)) v_i     (18)
    y      = concat(o) W_O                                      (19)

The norms on the latents are in the paper's text (section 3.1.2) and in the released code, not in the equations. The cache
holds exactly c_kv (after its norm) and k_rope (after its rotation): kv_lora_rank + qk_rope_head_dim elements a token and
layer. They are read in one of two ways, equal in exact arithmetic:

  expanded   k_i and v_i are built from c_kv, then ordinary multi-head attention. 2 (d_nope + d_rope + d_v) FLOPs per head,
             query and entry, after 2 d_c (d_nope + d_v) per head and entry for the expansion.
  absorbed   W_UK moves to the query side and W_UV behind the softmax, so heads attend to the latents themselves:
             s_i = (q_nope,i W_UK,i^T) c_kv^T + q_rope,i k_rope^T,  o_i = (softmax(s_i) c_kv) W_UV,i.
             4 d_c + 2 d_rope FLOPs per head, query and entry; nothing is built. The scale stays 1 / sqrt(d_nope + d_rope).

Mechanisms that cut the latent into G pieces for G groups of heads (`grouped_latent`, `low_rank_blocks`) derive from this
one, where G = 1: the up-projections are then block-diagonal, and R below is one piece.

Legend: B batch, S queries, T tokens, C entries, H heads, N = qk_nope_head_dim, P = qk_rope_head_dim, V = v_head_dim,
G = 1 latent, R = kv_lora_rank / G.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mla.attention.contract import Surroundings, require
from mla.attention.softmax.base import AbsorbingConfig, AbsorbingMixer, Cost, Expanded, Parts
from mla.layers.basic import FROM_LATENT, TO_HEADS, TO_LATENT, Linear, LowRank, RMSNorm, merge_heads, split_heads
from mla.ops.mask import Mask
from mla.ops.rope import Yarn, rotate


class Latents(NamedTuple):
    """Entries of tokens: latents c_kv [B, T, G, R] and rotary keys k_rope [B, T, 1, P], one "head" for all heads."""

    c_kv: jax.Array
    k_rope: jax.Array


class Queries(NamedTuple):
    """Per head: nope [B, S, H, N] and rope [B, S, H, P]."""

    nope: jax.Array
    rope: jax.Array


@dataclasses.dataclass
class MLAConfig(AbsorbingConfig):
    """Multi-head latent attention.

    Paper: 2405.04434
    Remembers: one latent and one rotated key for all heads
    Elements: kv_lora_rank + d_r
    Use: many heads at GQA's bytes or fewer; replicated on every device
    """

    kv_lora_rank: int = 128  # channels of the latent c_kv that keys and values share
    q_lora_rank: int = 0  # channels of the query latent; 0: queries straight from x, as in DeepSeek-V2-Lite
    qk_nope_head_dim: int = 0  # query-key channels a head without position; 0: d_model / num_heads
    qk_rope_head_dim: int = 32  # query-key channels a head with position, the key's shared by all heads; 0: NoPE
    rope: bool = True  # false: the qk_rope_head_dim channels are there and cached, but not rotated (Kimi Linear, 2510.26692)
    v_head_dim: int = 0  # value channels a head; 0: qk_nope_head_dim
    latent_scale: str = "none"  # factor on normed latents: none (DeepSeek's code) or sqrt (sqrt(d_model / rank))
    latent_bias: bool = False  # biases on all projections to and from latents (2505.21487), not on W_O
    rope_interleaved: bool = True  # pairs (2k, 2k+1) as in DeepSeek's code; otherwise (k, k + P/2)
    yarn: Yarn = dataclasses.field(default_factory=Yarn)  # context extension; factor 1: off

    def nope(self, around: Surroundings) -> int:
        return self.qk_nope_head_dim or self.default_head_dim(around, "qk_nope_head_dim")

    def rank(self, around: Surroundings) -> int:
        """Channels of the latent, of all its pieces together."""
        return self.kv_lora_rank

    def pieces(self) -> tuple[int, int]:
        """Numbers of latents: of keys and values, and of queries."""
        return 1, 1

    def validate(self, around: Surroundings) -> None:
        super().validate(around)
        require(self.rank(around) >= 1, "kv_lora_rank", f"{self.kv_lora_rank} is not a positive number of channels")
        require(self.nope(around) >= 1, "qk_nope_head_dim", f"{self.nope(around)} is not a positive number of channels")
        even = self.qk_rope_head_dim % 2 == 0
        require(even, "qk_rope_head_dim", f"{self.qk_rope_head_dim} is not an even number; RoPE rotates pairs of channels")
        require(self.latent_scale in ("none", "sqrt"), "latent_scale", f"{self.latent_scale!r} is neither none nor sqrt")
        yarn = self.yarn
        require(yarn.factor >= 1, "yarn.factor", f"{yarn.factor} is below 1; 1 switches YaRN off")
        for name in ("original_context", "beta_fast", "beta_slow"):
            require(getattr(yarn, name) > 0, f"yarn.{name}", f"{getattr(yarn, name)} is not positive")

    def elements(self, around: Surroundings) -> int:
        return self.kv_lora_rank + self.qk_rope_head_dim


class MLA(AbsorbingMixer[MLAConfig, Queries, Latents]):
    """Attention of H heads over G latents [B, C, G, R] and one rotary key, expanded or absorbed."""

    readers = 1  # attention maps a head draws; more than one in low_rank_blocks
    query: Any

    def __init__(self, config: MLAConfig, around: Surroundings, *, rngs: nnx.Rngs):
        super().__init__(config, around, rngs=rngs)
        (self.latents, query_latents), rank = config.pieces(), config.rank(around)
        self.rank, self.rope_dim, self.nope_dim = rank // self.latents, config.qk_rope_head_dim, config.nope(around)
        self.v_dim = config.v_head_dim or self.nope_dim
        self.yarn = config.yarn if config.yarn.active(around.context) else None
        self.scale = (self.nope_dim + self.rope_dim) ** -0.5 * (self.yarn.score_scale() if self.yarn else 1.0)

        make: dict[str, Any] = {"rngs": rngs, "dtype": around.dtype, "use_bias": config.latent_bias}
        # The width-bottleneck factor of the V2 paper, whose value is not published: sqrt(D / rank).
        scaled, eps = config.latent_scale == "sqrt", around.norm_eps
        self.latent_factor = (around.d_model / self.rank) ** 0.5 if scaled else 1.0
        queries_width = self.num_heads * (self.nope_dim + self.rope_dim)
        if config.q_lora_rank:  # W_DQ, norm, [W_UQ | W_QR]
            latent: dict[str, Any] = {"eps": eps, "blocks": query_latents, "scaled": scaled}
            self.query = LowRank(around.d_model, config.q_lora_rank, queries_width, **latent, **make)
        else:
            self.query = Linear(around.d_model, queries_width, TO_HEADS, rngs=rngs, dtype=around.dtype)
        if around.remembers:
            self.kv_down = Linear(around.d_model, rank + self.rope_dim, TO_LATENT, **make)  # [W_DKV | W_KR]
            self.kv_norm = RMSNorm(rank, eps=eps, blocks=self.latents)
        self.key_up = Linear(self.rank, self.num_heads * self.readers * self.nope_dim, FROM_LATENT, **make)  # W_UK
        self.value_up = Linear(self.rank, self.num_heads * self.readers * self.v_dim, FROM_LATENT, **make)  # W_UV
        self.make_output(self.v_dim, rngs)

    def rotate(self, x: jax.Array, positions: jax.Array, scaled: bool = True) -> jax.Array:
        if not self.config.rope:
            return x
        theta, interleaved = self.config.theta(self.around), self.config.rope_interleaved
        return rotate(x, positions, theta, interleaved=interleaved, yarn=self.yarn, scaled=scaled)

    def queries(self, x: jax.Array, positions: jax.Array) -> Queries:
        nope, rope = jnp.split(split_heads(self.query(x), self.num_heads), [self.nope_dim], axis=-1)
        return Queries(nope, self.rotate(rope, positions))

    def entries(self, x: jax.Array, positions: jax.Array) -> Latents:
        c_kv, k_rope = jnp.split(self.kv_down(x), [self.rank * self.latents], axis=-1)
        c_kv = self.kv_norm(split_heads(c_kv, self.latents)) * self.latent_factor
        return Latents(c_kv, self.rotate(split_heads(k_rope, 1), positions))

    def shift(self, entries: Latents, by: jax.Array) -> Latents:
        return entries._replace(k_rope=self.rotate(entries.k_rope, by, scaled=False))

    sparing: ClassVar[tuple[str, ...]] = ("key_up", "value_up")  # as `costs` has them

    def costs(self) -> tuple[Cost, Cost]:
        maps = self.num_heads * self.readers
        up = 2 * maps * self.rank * (self.nope_dim + self.v_dim)  # W_UK and W_UV, for one token
        expanded = Cost(pair=2 * maps * (self.nope_dim + self.rope_dim + self.v_dim), entry=up)
        return expanded, Cost(pair=maps * (4 * self.rank + 2 * self.rope_dim), query=up)

    def expanded(self, queries: Queries, entries: Latents, mask: Mask) -> Expanded:
        key, value = (merge_heads(up.blocks(entries.c_kv)) for up in (self.key_up, self.value_up))
        key, value = (split_heads(a, self.num_heads * self.readers) for a in (key, value))
        return Expanded(queries, (key, entries.k_rope), value, self.scale)

    def attend_absorbed(self, queries: Queries, entries: Latents, mask: Mask) -> jax.Array:
        parts, keys = self.in_latents(queries, entries)
        mixed = self.softmax(parts, keys, keys[0], mask, self.scale)
        return merge_heads(jnp.einsum("bshr,rhv->bshv", mixed, self.value_up.heads(self.num_heads * self.readers)))

    paged: ClassVar[bool] = True

    def page_keys(self, entries: Latents) -> Parts:
        return entries.c_kv, entries.k_rope

    def page_queries(self, queries: Queries) -> Parts:
        # The bias of W_UK, its last row, adds one number to the logits of all keys.
        return self.in_latent(queries)[..., : self.rank], queries.rope

    def in_latent(self, queries: Queries) -> jax.Array:
        """Queries as they meet latents, [B, S, H, R], with a bias R + 1."""
        return jnp.einsum("bshn,rhn->bshr", queries.nope, self.key_up.heads(self.num_heads * self.readers))

    def in_latents(self, queries: Queries, entries: Latents) -> tuple[Parts, Parts]:
        """Queries as they meet latents, [B, S, H, R] and [B, S, H, P], and the entries as keys of one head."""
        c_kv = entries.c_kv
        if self.config.latent_bias:  # a bias is the weight of a channel that is always 1
            c_kv = jnp.concatenate([c_kv, jnp.ones_like(c_kv[..., :1])], axis=-1)
        # Two contractions at run time: a pre-multiplied W_UQ W_UK would be larger than its factors.
        return (self.in_latent(queries), queries.rope), (c_kv, entries.k_rope)
