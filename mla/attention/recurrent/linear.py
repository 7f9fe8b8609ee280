"""Linear attention (Katharopoulos et al., 2006.16236): softmax replaced by a feature map, so the past fits in one matrix.

    phi(u) = elu(u) + 1
    S_t = S_{t-1} + phi(k_t)^T v_t      z_t = z_{t-1} + phi(k_t)      o_t = phi(q_t) S_t / (phi(q_t) . z_t)

Remembers S and z in fp32: H d_k (d_v + 1) elements a layer, whatever the number of tokens. z is kept as one more value
channel that is always 1. Order comes from causality alone, no rotation: a rotated feature could make the normaliser zero.
Later libraries leave the normaliser out and norm each head's output instead, `normalise=rmsnorm`; H d_k d_v elements then.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from mla.attention.contract import Surroundings, require
from mla.attention.recurrent.base import Channels, RecurrentConfig, RecurrentMixer, Tokens
from mla.layers.basic import FROM_HEADS, TO_HEADS, Linear, RMSNorm, merge_heads, split_heads

NORMALISERS = ("denominator", "rmsnorm")


@dataclasses.dataclass
class LinearConfig(RecurrentConfig):
    """Linear attention with elu + 1 features.

    Paper: 2006.16236
    Remembers: one matrix and a normaliser a head, fp32
    Elements: H d_h (d_h + 1), constant
    Use: very long texts; weak recall
    """

    takes_qk_norm: ClassVar[bool] = True

    head_dim: int = 0  # key and value channels a head; 0: d_model / num_heads
    normalise: str = "denominator"  # what is read is divided by phi(q) . z, or normed a head: rmsnorm

    def width(self, around: Surroundings) -> int:
        return self.head_dim or self.default_head_dim(around, "head_dim")

    def shape(self, around: Surroundings) -> tuple[int, int, int]:
        width = self.width(around)
        return self.heads(around), width, width + (self.normalise == "denominator")

    def validate(self, around: Surroundings) -> None:
        super().validate(around)
        known = f"{self.normalise!r} is none of {', '.join(NORMALISERS)}"
        require(self.normalise in NORMALISERS, "normalise", known)


class LinearAttention(RecurrentMixer[LinearConfig]):
    """Linear attention of H heads over a state S, z: [B, H, head_dim, head_dim + 1] in fp32, see the equations above."""

    def __init__(self, config: LinearConfig, around: Surroundings, *, rngs: nnx.Rngs):
        super().__init__(config, around, rngs=rngs)
        self.num_heads, head_dim = config.heads(around), config.width(around)
        width = self.num_heads * head_dim
        make: dict[str, Any] = {"rngs": rngs, "dtype": around.dtype}
        self.query = Linear(around.d_model, width, TO_HEADS, **make)
        self.key = Linear(around.d_model, width, TO_HEADS, **make)
        self.value = Linear(around.d_model, width, TO_HEADS, **make)
        self.out = Linear(width, around.d_model, FROM_HEADS, gain=around.residual_gain, **make)
        self.query_norm = RMSNorm(head_dim, eps=around.norm_eps) if around.qk_norm else None
        self.key_norm = RMSNorm(head_dim, eps=around.norm_eps) if around.qk_norm else None
        self.out_norm = RMSNorm(head_dim, eps=around.norm_eps) if config.normalise == "rmsnorm" else None

    def features(self, x: jax.Array, norm: RMSNorm | None) -> jax.Array:
        heads = split_heads(x, self.num_heads)
        return jax.nn.elu((norm(heads) if norm else heads).astype(self.wide)) + 1

    def tokens(self, x: jax.Array, inputs: Channels, positions: jax.Array) -> Tokens:
        query = self.features(self.query(x), self.query_norm)
        key = self.features(self.key(x), self.key_norm)
        value = split_heads(self.value(x), self.num_heads).astype(self.wide)
        if self.out_norm is None:
            value = jnp.concatenate([value, jnp.ones_like(value[..., :1])], axis=-1)
        return Tokens(query, key, value)

    def finished(self, x: jax.Array, inputs: Channels, heads: jax.Array) -> jax.Array:
        if self.out_norm is not None:
            heads = self.out_norm(heads)
        else:
            # A padding query that has seen nothing has a zero normaliser, and nobody reads its output.
            heads = heads[..., :-1] / jnp.where(heads[..., -1:] > 0, heads[..., -1:], 1.0)
        return self.out(merge_heads(heads.astype(self.around.dtype)))
