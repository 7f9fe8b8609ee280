"""Multi-head (Vaswani 1706.03762), multi-query (Shazeer 1911.02150) and grouped-query attention (Ainslie 2305.13245).

One module: H query heads, K key-value heads, each shared by H / K neighbouring query heads. K = H is multi-head, K = 1 is
multi-query. Remembers k (after RoPE) and v: 2 K head_dim elements a token and layer.

    q_i = RoPE(x W_Q,i)    k_g = RoPE(x W_K,g)    v_g = x W_V,g    o_i = softmax(q_i k_g^T / sqrt(head_dim)) v_g
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
from flax import nnx

from mla.attention.contract import CacheFormula, MechanismConfig, SoftmaxMixer, Surroundings, require
from mla.attention.layers import Linear, RMSNorm, merge_heads, split_heads
from mla.ops.mask import Mask
from mla.ops.rope import rotate


class KeyValue(NamedTuple):
    """[B, T, K, head_dim] each; keys are rotated."""

    key: jax.Array
    value: jax.Array


@dataclasses.dataclass
class MHAConfig(MechanismConfig):
    """Multi-head attention."""

    num_heads: int = 0  # query heads; 0: the model's
    head_dim: int = 0  # channels a head; 0: d_model / num_heads
    rope_theta: float = 0.0  # base of the rotation; 0: the model's

    def kv_heads(self, around: Surroundings) -> int:
        return self.query_heads(around)

    def query_heads(self, around: Surroundings) -> int:
        return self.num_heads or around.num_heads

    def width(self, around: Surroundings) -> int:
        return self.head_dim or around.d_model // self.query_heads(around)

    def validate(self, around: Surroundings) -> None:
        heads, kv_heads = self.query_heads(around), self.kv_heads(around)
        require(kv_heads >= 1 and heads % kv_heads == 0, "num_kv_heads", f"{kv_heads} does not divide num_heads {heads}")
        divides = self.head_dim or around.d_model % heads == 0
        require(divides, "head_dim", f"set it: d_model {around.d_model} does not divide into {heads} heads")
        require(self.width(around) % 2 == 0, "head_dim", f"{self.width(around)} is odd; RoPE rotates pairs of channels")

    def cache_formula(self, around: Surroundings) -> CacheFormula:
        return CacheFormula(per_token=2 * self.kv_heads(around) * self.width(around))


@dataclasses.dataclass
class GQAConfig(MHAConfig):
    """Grouped-query attention."""

    num_kv_heads: int = 2  # key-value heads; must divide num_heads

    def kv_heads(self, around: Surroundings) -> int:
        return self.num_kv_heads


@dataclasses.dataclass
class MQAConfig(MHAConfig):
    """Multi-query attention."""

    def kv_heads(self, around: Surroundings) -> int:
        return 1


class GroupedQuery(SoftmaxMixer):
    """See the module's docstring."""

    def __init__(self, config: MHAConfig, around: Surroundings, *, rngs: nnx.Rngs):
        super().__init__(config, around, rngs=rngs)
        self.num_heads, self.num_kv_heads = config.query_heads(around), config.kv_heads(around)
        self.head_dim = config.width(around)
        self.rope_theta = config.rope_theta or around.rope_theta
        keys_width = self.num_kv_heads * self.head_dim
        make: dict[str, Any] = {"rngs": rngs, "dtype": around.dtype}
        self.query = Linear(around.d_model, self.num_heads * self.head_dim, **make)
        self.key = Linear(around.d_model, keys_width, **make)
        self.value = Linear(around.d_model, keys_width, **make)
        self.out = Linear(self.num_heads * self.head_dim, around.d_model, gain=around.residual_gain, **make)
        self.query_norm = RMSNorm(self.head_dim, eps=around.norm_eps) if around.qk_norm else None
        self.key_norm = RMSNorm(self.head_dim, eps=around.norm_eps) if around.qk_norm else None

    def queries(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        query = split_heads(self.query(x), self.num_heads)
        query = self.query_norm(query) if self.query_norm else query
        return rotate(query, positions, self.rope_theta)

    def entries(self, x: jax.Array, positions: jax.Array) -> KeyValue:
        key = split_heads(self.key(x), self.num_kv_heads)
        key = self.key_norm(key) if self.key_norm else key
        return KeyValue(rotate(key, positions, self.rope_theta), split_heads(self.value(x), self.num_kv_heads))

    def attend(self, queries: jax.Array, entries: KeyValue, mask: Mask) -> jax.Array:
        return merge_heads(self.softmax((queries,), (entries.key,), entries.value, mask, self.head_dim**-0.5))
