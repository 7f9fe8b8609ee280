"""Grouped-tied attention, GTA (Zadouri, Strauss, Dao 2505.21487): keys and values are one tensor, position comes apart.

    u_g = x W_KV,g                      K heads of head_dim channels: all of it the value
    k_g = [u_g[: d_h - d_r] ; k_r],     k_r = RoPE(x W_KR), one head of d_r channels for all
    q_i = [q_n,i ; RoPE(q_r,i)] = x W_Q,i,    o_i = softmax(q_i k_g^T / sqrt(d_h)) u_g

The tied half of the key is never rotated, so u is loaded once for both uses. Remembers u and k_r (after its rotation):
K d_h + d_r elements a token, with d_r = d_h / 2 about half of GQA's.

Legend: B batch, T tokens, H query heads, K key-value heads, d_h = head_dim, d_r = qk_rope_head_dim.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mla.attention.contract import Surroundings, require
from mla.attention.softmax.base import Expanded, SoftmaxConfig, SoftmaxMixer
from mla.layers.basic import TO_HEADS, TO_LATENT, Linear, split_heads
from mla.ops.mask import Mask
from mla.ops.rope import rotate


class Tied(NamedTuple):
    """u [B, T, K, d_h] as projected, and k_rope [B, T, 1, d_r]."""

    u: jax.Array
    k_rope: jax.Array


@dataclasses.dataclass
class GroupedTiedConfig(SoftmaxConfig):
    """Grouped-tied attention.

    Paper: 2505.21487
    Remembers: one tensor for k and v of K heads, one rotated key
    Elements: K d_h + d_h / 2
    Use: half of GQA's bytes, splits as GQA does
    """

    num_kv_heads: int = 2  # tied heads; must divide num_heads
    head_dim: int = 0  # channels a head; 0: d_model / num_heads
    qk_rope_head_dim: int = 0  # of them, the last ones of q, that are rotated; 0: half

    def width(self, around: Surroundings) -> int:
        return self.head_dim or self.default_head_dim(around, "head_dim")

    def rope(self, around: Surroundings) -> int:
        return self.qk_rope_head_dim or self.width(around) // 2

    def validate(self, around: Surroundings) -> None:
        super().validate(around)
        heads, tied, width, rope = self.heads(around), self.num_kv_heads, self.width(around), self.rope(around)
        require(tied >= 1 and heads % tied == 0, "num_kv_heads", f"{tied} does not divide num_heads {heads}")
        fits = 2 <= rope <= width and rope % 2 == 0
        require(fits, "qk_rope_head_dim", f"{rope} is no even number of channels up to head_dim {width}")

    def elements(self, around: Surroundings) -> int:
        return self.num_kv_heads * self.width(around) + self.rope(around)


class GroupedTied(SoftmaxMixer[GroupedTiedConfig, tuple[jax.Array, jax.Array], Tied]):
    """Attention of H heads over K tied heads u, which are values and the first part of keys, and one rotary key."""

    def __init__(self, config: GroupedTiedConfig, around: Surroundings, *, rngs: nnx.Rngs):
        super().__init__(config, around, rngs=rngs)
        self.num_kv_heads, self.head_dim = config.num_kv_heads, config.width(around)
        self.nope_dim, self.rope_theta = self.head_dim - config.rope(around), config.theta(around)
        make: dict[str, Any] = {"rngs": rngs, "dtype": around.dtype}
        self.query = Linear(around.d_model, self.num_heads * self.head_dim, TO_HEADS, **make)
        if around.remembers:
            self.tied = Linear(around.d_model, self.num_kv_heads * self.head_dim, TO_HEADS, **make)
            self.rope_down = Linear(around.d_model, config.rope(around), TO_LATENT, **make)  # W_KR: one for all heads
        self.make_output(self.head_dim, rngs)

    def queries(self, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        nope, rope = jnp.split(split_heads(self.query(x), self.num_heads), [self.nope_dim], axis=-1)
        return nope, rotate(rope, positions, self.rope_theta)

    def entries(self, x: jax.Array, positions: jax.Array) -> Tied:
        rope = rotate(split_heads(self.rope_down(x), 1), positions, self.rope_theta)
        return Tied(split_heads(self.tied(x), self.num_kv_heads), rope)

    def shift(self, entries: Tied, by: jax.Array) -> Tied:
        return entries._replace(k_rope=rotate(entries.k_rope, by, self.rope_theta))

    def pair_flops(self) -> float:
        return 2.0 * self.num_heads * (self.head_dim + self.head_dim)  # q and k: nope_dim and as many as are left, rotated

    def expanded(self, queries: tuple[jax.Array, jax.Array], entries: Tied, mask: Mask) -> Expanded:
        keys = entries.u[..., : self.nope_dim], entries.k_rope
        return Expanded(queries, keys, entries.u, self.head_dim**-0.5)
