"""Multi-head (Vaswani 1706.03762), multi-query (Shazeer 1911.02150) and grouped-query attention (Ainslie 2305.13245).

One module: H query heads, K key-value heads, each shared by H / K neighbouring query heads. K = H is multi-head, K = 1 is
multi-query. Remembers k (after RoPE) and v: 2 K head_dim elements a token and layer.

    q_i = RoPE(x W_Q,i)    k_g = RoPE(x W_K,g)    v_g = x W_V,g    o_i = softmax(q_i k_g^T / sqrt(head_dim)) v_g

RoPE turns the first `rope_fraction` of a head's channels and passes the rest; 0 is NoPE.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
from flax import nnx

from mla.attention.contract import Surroundings, require
from mla.attention.softmax.base import Expanded, Parts, SoftmaxConfig, SoftmaxMixer
from mla.layers.basic import TO_HEADS, Linear, LowRank, RMSNorm, split_heads, unit_rms
from mla.ops.mask import Mask
from mla.ops.rope import rotate


class KeyValue(NamedTuple):
    """[B, T, K, head_dim] each; keys are rotated."""

    key: jax.Array
    value: jax.Array


@dataclasses.dataclass
class MHAConfig(SoftmaxConfig):
    """Multi-head attention.

    Paper: 1706.03762
    Remembers: k and v of every head
    Elements: 2 H d_h
    Use: the baseline
    """

    takes_qk_norm: ClassVar[bool] = True

    head_dim: int = 0  # channels a head; 0: d_model / num_heads
    rope_fraction: float = 1.0  # of a head's channels, the first ones, that are rotated; 0: NoPE
    q_lora_rank: int = 0  # channels of a normed query latent; 0: queries straight from x
    scale: float = 0.0  # factor on the logits; 0: 1 / sqrt(head_dim)
    value_norm: bool = False  # RMSNorm without gain on v (Gemma 3n)

    def kv_heads(self, around: Surroundings) -> int:
        return self.heads(around)

    def width(self, around: Surroundings) -> int:
        return self.head_dim or self.default_head_dim(around, "head_dim")

    def query_rank(self, around: Surroundings) -> int:
        return self.q_lora_rank

    def validate(self, around: Surroundings) -> None:
        super().validate(around)
        heads, kv_heads, width = self.heads(around), self.kv_heads(around), self.width(around)
        require(kv_heads >= 1 and heads % kv_heads == 0, "num_kv_heads", f"{kv_heads} does not divide num_heads {heads}")
        turned = width * self.rope_fraction
        require(turned <= width, "rope_fraction", f"{self.rope_fraction} is above 1, all of a head's channels")
        all_turn = self.rope_fraction == 1
        require(not all_turn or width % 2 == 0, "head_dim", f"{width} is odd; RoPE rotates pairs of channels")
        pairs = f"{self.rope_fraction} of head_dim {width} is {turned:g} channels; RoPE rotates pairs of channels"
        require(turned % 2 == 0, "rope_fraction", pairs)

    def elements(self, around: Surroundings) -> int:
        return 2 * self.kv_heads(around) * self.width(around)


@dataclasses.dataclass
class GQAConfig(MHAConfig):
    """Grouped-query attention.

    Paper: 2305.13245
    Remembers: k and v of K heads
    Elements: 2 K d_h
    Use: the common compromise; splits over K devices
    """

    num_kv_heads: int = 2  # key-value heads; must divide num_heads

    def kv_heads(self, around: Surroundings) -> int:
        return self.num_kv_heads


@dataclasses.dataclass
class MQAConfig(MHAConfig):
    """Multi-query attention.

    Paper: 1911.02150
    Remembers: k and v of one head
    Elements: 2 d_h
    Use: smallest of the family; replicated on every device
    """

    def kv_heads(self, around: Surroundings) -> int:
        return 1


class GroupedQuery(SoftmaxMixer[MHAConfig, jax.Array, KeyValue]):
    """Attention of H query heads over K key-value heads; keys are cached rotated."""

    def __init__(self, config: MHAConfig, around: Surroundings, *, rngs: nnx.Rngs):
        super().__init__(config, around, rngs=rngs)
        self.num_kv_heads, self.head_dim = config.kv_heads(around), config.width(around)
        self.rope_theta, self.rope_dim = config.theta(around), int(self.head_dim * config.rope_fraction)
        self.scale = config.scale or self.head_dim**-0.5
        make: dict[str, Any] = {"rngs": rngs, "dtype": around.dtype}
        width, rank = self.num_heads * self.head_dim, config.query_rank(around)
        low_rank = LowRank(around.d_model, rank, width, eps=around.norm_eps, **make) if rank else None
        self.query = low_rank or Linear(around.d_model, width, TO_HEADS, **make)
        self.query_norm = self.make_norm()
        if around.remembers:
            self.make_entries(make)
        self.make_output(self.head_dim, rngs)

    def make_norm(self) -> RMSNorm | None:
        return RMSNorm(self.head_dim, eps=self.around.norm_eps) if self.around.qk_norm else None

    def make_entries(self, make: dict[str, Any]) -> None:
        """Makes the parameters of keys and values, which only a layer that remembers has."""
        keys_width = self.num_kv_heads * self.head_dim
        self.key = Linear(self.around.d_model, keys_width, TO_HEADS, **make)
        self.value = Linear(self.around.d_model, keys_width, TO_HEADS, **make)
        self.key_norm = self.make_norm()

    def place(self, x: jax.Array, norm: RMSNorm | None, positions: jax.Array) -> jax.Array:
        """Queries or keys [B, T, heads, head_dim], normed and rotated to where they stand."""
        return rotate(norm(x) if norm else x, positions, self.rope_theta, dim=self.rope_dim)

    def queries(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        return self.place(split_heads(self.query(x), self.num_heads), self.query_norm, positions)

    def entries(self, x: jax.Array, positions: jax.Array) -> KeyValue:
        key, value = (split_heads(project(x), self.num_kv_heads) for project in (self.key, self.value))
        value = unit_rms(value, self.around.norm_eps) if self.config.value_norm else value
        return KeyValue(self.place(key, self.key_norm, positions), value)

    def shift(self, entries: KeyValue, by: jax.Array) -> KeyValue:
        return entries._replace(key=rotate(entries.key, by, self.rope_theta, dim=self.rope_dim))

    paged: ClassVar[bool] = True

    def page_keys(self, entries: KeyValue) -> Parts:
        return (entries.key,)

    def page_queries(self, queries: jax.Array) -> Parts:
        return (queries,)

    def pair_flops(self) -> float:
        return 4.0 * self.num_heads * self.head_dim

    def expanded(self, queries: jax.Array, entries: KeyValue, mask: Mask) -> Expanded:
        return Expanded((queries,), (entries.key,), entries.value, self.scale)
