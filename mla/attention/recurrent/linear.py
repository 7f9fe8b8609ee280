"""Linear attention (Katharopoulos et al., 2006.16236): softmax replaced by a feature map, so the past fits in one matrix.

    phi(u) = elu(u) + 1
    S_t = S_{t-1} + phi(k_t)^T v_t      z_t = z_{t-1} + phi(k_t)      o_t = phi(q_t) S_t / (phi(q_t) . z_t)

Remembers S and z in fp32: H d_k (d_v + 1) elements a layer, whatever the number of tokens. z is kept as one more value
channel that is always 1. Order comes from causality alone, no rotation: a rotated feature could make the normaliser zero.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from mla.attention.contract import MechanismConfig, Surroundings, Term, constant, require
from mla.attention.recurrent.base import RecurrentMixer
from mla.cache.stores import LayerCache, State, StoreSpec
from mla.layers.basic import FROM_HEADS, TO_HEADS, Linear, RMSNorm, merge_heads, split_heads, wide_dtype
from mla.ops.recurrence import linear_recurrence


@dataclasses.dataclass
class LinearConfig(MechanismConfig):
    """Linear attention with elu + 1 features.

    Paper: 2006.16236
    Remembers: one matrix and a normaliser a head, fp32
    Elements: H d_h (d_h + 1), constant
    Use: very long texts; weak recall
    """

    takes_qk_norm: ClassVar[bool] = True

    head_dim: int = 0  # key and value channels a head; 0: d_model / num_heads
    chunk: int = 64  # tokens handled at once in training and prefill; changes speed, not results

    def width(self, around: Surroundings) -> int:
        return self.head_dim or self.default_head_dim(around, "head_dim")

    def validate(self, around: Surroundings) -> None:
        super().validate(around)
        self.width(around)
        require(self.chunk >= 1, "chunk", f"{self.chunk} is not a positive number of tokens")

    def cache_formula(self, around: Surroundings) -> list[Term]:
        return [constant(self.heads(around) * self.width(around) * (self.width(around) + 1))]


class LinearAttention(RecurrentMixer[LinearConfig]):
    """Linear attention of H heads over a state S, z: [B, H, head_dim, head_dim + 1] in fp32, see the equations above."""

    def __init__(self, config: LinearConfig, around: Surroundings, *, rngs: nnx.Rngs):
        super().__init__(config, around, rngs=rngs)
        self.num_heads, self.head_dim, self.chunk = config.heads(around), config.width(around), config.chunk
        self.wide, width = wide_dtype(around.dtype), self.num_heads * self.head_dim
        make: dict[str, Any] = {"rngs": rngs, "dtype": around.dtype}
        self.query = Linear(around.d_model, width, TO_HEADS, **make)
        self.key = Linear(around.d_model, width, TO_HEADS, **make)
        self.value = Linear(around.d_model, width, TO_HEADS, **make)
        self.out = Linear(width, around.d_model, FROM_HEADS, gain=around.residual_gain, **make)
        self.query_norm = RMSNorm(self.head_dim, eps=around.norm_eps) if around.qk_norm else None
        self.key_norm = RMSNorm(self.head_dim, eps=around.norm_eps) if around.qk_norm else None

    def features(self, x: jax.Array, norm: RMSNorm | None) -> jax.Array:
        heads = split_heads(x, self.num_heads)
        return jax.nn.elu((norm(heads) if norm else heads).astype(self.wide)) + 1

    def stores(self) -> dict[str, StoreSpec]:
        return {"state": State(jax.ShapeDtypeStruct((self.num_heads, self.head_dim, self.head_dim + 1), self.wide))}

    def recur(self, x: jax.Array, positions: jax.Array, before: LayerCache) -> tuple[jax.Array, LayerCache]:
        real = positions >= 0
        query = self.features(self.query(x), self.query_norm)
        key = self.features(self.key(x), self.key_norm) * real[:, :, None, None]
        value = split_heads(self.value(x), self.num_heads).astype(self.wide)
        value = jnp.concatenate([value, jnp.ones_like(value[..., :1])], axis=-1)
        where: dict[str, Any] = {"backend": self.around.recurrence_backend, "platform": self.around.platform}
        both, state = linear_recurrence(query, key, value, before["state"].state, chunk=self.chunk, **where)
        # A padding query that has seen nothing has a zero normaliser, and nobody reads its output.
        normaliser = jnp.where(both[..., -1:] > 0, both[..., -1:], 1.0)
        heads = jnp.where(real[:, :, None, None], both[..., :-1] / normaliser, 0.0)
        return self.out(merge_heads(heads.astype(self.around.dtype))), before.replace(state=before["state"].holding(state))
