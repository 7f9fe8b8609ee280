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

Legend: B batch, S queries, T tokens, C entries, H heads, N = qk_nope_head_dim, P = qk_rope_head_dim, V = v_head_dim,
R = kv_lora_rank.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mla.attention.contract import CacheFormula, MechanismConfig, SoftmaxMixer, Surroundings, require
from mla.attention.layers import Linear, RMSNorm, merge_heads, split_heads
from mla.ops.mask import Mask
from mla.ops.rope import Yarn, rotate


class Latents(NamedTuple):
    """What a token leaves behind: c_kv [B, T, 1, R] and k_rope [B, T, 1, P], one "head" for all heads."""

    c_kv: jax.Array
    k_rope: jax.Array


class Queries(NamedTuple):
    """Per head: nope [B, S, H, N] and rope [B, S, H, P]."""

    nope: jax.Array
    rope: jax.Array


@dataclasses.dataclass
class MLAConfig(MechanismConfig):
    """Multi-head latent attention."""

    num_heads: int = 0  # 0: the model's
    kv_lora_rank: int = 128  # channels of the latent c_kv that keys and values share
    q_lora_rank: int = 0  # channels of the query latent; 0: queries straight from x, as in DeepSeek-V2-Lite
    qk_nope_head_dim: int = 0  # query-key channels a head without position; 0: d_model / num_heads
    qk_rope_head_dim: int = 32  # query-key channels a head with position, the key's shared by all heads; 0: NoPE
    v_head_dim: int = 0  # value channels a head; 0: qk_nope_head_dim
    latent_scale: str = "none"  # factor on normed latents: none (DeepSeek's code) or sqrt (sqrt(d_model / rank))
    attend: str = "auto"  # auto: whichever form costs fewer FLOPs for this many new tokens; expanded; absorbed
    rope_theta: float = 0.0  # base of the rotation; 0: the model's
    rope_interleaved: bool = True  # pairs (2k, 2k+1) as in DeepSeek's code; otherwise (k, k + P/2)
    yarn: Yarn = dataclasses.field(default_factory=Yarn)  # context extension; factor 1: off

    def heads(self, around: Surroundings) -> int:
        return self.num_heads or around.num_heads

    def nope(self, around: Surroundings) -> int:
        return self.qk_nope_head_dim or around.d_model // self.heads(around)

    def validate(self, around: Surroundings) -> None:
        require(self.heads(around) >= 1, "num_heads", f"{self.num_heads} is not a positive number of heads")
        divides = self.qk_nope_head_dim or around.d_model % self.heads(around) == 0
        require(
            divides,
            "qk_nope_head_dim",
            f"set it: d_model {around.d_model} does not divide into {self.heads(around)} heads",
        )
        require(self.kv_lora_rank >= 1, "kv_lora_rank", f"{self.kv_lora_rank} is not a positive number of channels")
        require(self.q_lora_rank >= 0, "q_lora_rank", f"{self.q_lora_rank} is negative; 0 switches query compression off")
        even = self.qk_rope_head_dim >= 0 and self.qk_rope_head_dim % 2 == 0
        require(even, "qk_rope_head_dim", f"{self.qk_rope_head_dim} is not an even number; RoPE rotates pairs of channels")
        require(self.latent_scale in ("none", "sqrt"), "latent_scale", f"{self.latent_scale!r} is neither none nor sqrt")
        forms = ("auto", "expanded", "absorbed")
        require(self.attend in forms, "attend", f"{self.attend!r} is none of {', '.join(forms)}")
        yarn = self.yarn
        require(yarn.factor >= 1, "yarn.factor", f"{yarn.factor} is below 1; 1 switches YaRN off")
        for name in ("original_context", "beta_fast", "beta_slow"):
            require(getattr(yarn, name) > 0, f"yarn.{name}", f"{getattr(yarn, name)} is not positive")
        # A norm on each head's expanded key depends on token and head, and cannot move to the query side.
        require(
            not around.qk_norm,
            "kv_lora_rank",
            "MLA norms its latents instead of q and k; set config.model.qk_norm=false",
        )

    def cache_formula(self, around: Surroundings) -> CacheFormula:
        return CacheFormula(per_token=self.kv_lora_rank + self.qk_rope_head_dim)


class MLA(SoftmaxMixer):
    """See the module's docstring."""

    def __init__(self, config: MLAConfig, around: Surroundings, *, rngs: nnx.Rngs):
        super().__init__(config, around, rngs=rngs)
        self.num_heads, self.rank, self.rope_dim = config.heads(around), config.kv_lora_rank, config.qk_rope_head_dim
        self.nope_dim = config.nope(around)
        self.v_dim = config.v_head_dim or self.nope_dim
        self.yarn = config.yarn if config.yarn.active(around.context) else None
        self.scale = (self.nope_dim + self.rope_dim) ** -0.5 * (self.yarn.score_scale() if self.yarn else 1.0)

        make: dict[str, Any] = {"rngs": rngs, "dtype": around.dtype}
        queries_width = self.num_heads * (self.nope_dim + self.rope_dim)
        if config.q_lora_rank:
            self.query_down = Linear(around.d_model, config.q_lora_rank, **make)
            self.query_latent_norm = RMSNorm(config.q_lora_rank, eps=around.norm_eps)
            self.query_up = Linear(config.q_lora_rank, queries_width, **make)
        else:
            self.query = Linear(around.d_model, queries_width, **make)
        self.kv_down = Linear(around.d_model, self.rank + self.rope_dim, **make)  # [W_DKV | W_KR]
        self.kv_norm = RMSNorm(self.rank, eps=around.norm_eps)
        self.key_up = Linear(self.rank, self.num_heads * self.nope_dim, **make)  # W_UK
        self.value_up = Linear(self.rank, self.num_heads * self.v_dim, **make)  # W_UV
        self.out = Linear(self.num_heads * self.v_dim, around.d_model, gain=around.residual_gain, **make)

    def rotate(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        theta = self.config.rope_theta or self.around.rope_theta
        return rotate(x, positions, theta, interleaved=self.config.rope_interleaved, yarn=self.yarn)

    def latent(self, normed: jax.Array) -> jax.Array:
        """A normed latent with the width-bottleneck factor of the V2 paper, whose value is not published: sqrt(D / rank)."""
        scaled = self.config.latent_scale == "sqrt"
        return normed * (self.around.d_model / normed.shape[-1]) ** 0.5 if scaled else normed

    def queries(self, x: jax.Array, positions: jax.Array) -> Queries:
        if self.config.q_lora_rank:
            flat = self.query_up(self.latent(self.query_latent_norm(self.query_down(x))))
        else:
            flat = self.query(x)
        nope, rope = jnp.split(split_heads(flat, self.num_heads), [self.nope_dim], axis=-1)
        return Queries(nope, self.rotate(rope, positions))

    def entries(self, x: jax.Array, positions: jax.Array) -> Latents:
        c_kv, k_rope = jnp.split(split_heads(self.kv_down(x), 1), [self.rank], axis=-1)
        return Latents(self.latent(self.kv_norm(c_kv)), self.rotate(k_rope, positions))

    def attend(self, queries: Queries, entries: Latents, mask: Mask) -> jax.Array:
        absorbed = self.absorbs(queries.nope.shape[1], entries.c_kv.shape[1])
        return (self.attend_absorbed if absorbed else self.attend_expanded)(queries, entries, mask)

    def absorbs(self, new: int, entries: int) -> bool:
        """Whether the absorbed form costs fewer FLOPs for `new` queries over `entries` (or the config says so)."""
        if self.config.attend != "auto":
            return self.config.attend == "absorbed"
        up = 2 * self.rank * (self.nope_dim + self.v_dim)  # W_UK and W_UV, for one token and head
        expanded = entries * up + new * entries * 2 * (self.nope_dim + self.rope_dim + self.v_dim)
        absorbed = new * up + new * entries * (4 * self.rank + 2 * self.rope_dim)
        return absorbed < expanded

    def attend_expanded(self, queries: Queries, entries: Latents, mask: Mask) -> jax.Array:
        c_kv = merge_heads(entries.c_kv)
        keys = split_heads(self.key_up(c_kv), self.num_heads), entries.k_rope
        values = split_heads(self.value_up(c_kv), self.num_heads)
        return merge_heads(self.softmax(queries, keys, values, mask, self.scale))

    def attend_absorbed(self, queries: Queries, entries: Latents, mask: Mask) -> jax.Array:
        # Two contractions at run time: a pre-multiplied W_UQ W_UK would be larger than its factors.
        in_latent = jnp.einsum("bshn,rhn->bshr", queries.nope, self.key_up.heads(self.num_heads))
        mixed = self.softmax((in_latent, queries.rope), entries, entries.c_kv, mask, self.scale)
        return merge_heads(jnp.einsum("bshr,rhv->bshv", mixed, self.value_up.heads(self.num_heads)))
