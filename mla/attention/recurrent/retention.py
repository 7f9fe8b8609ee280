"""Retention (RetNet, 2307.08621): each head forgets at a rate of its own that nothing changes.

    q, k = rotate(x W_Q), rotate(x W_K) / sqrt(d_k)    v = x W_V    gamma_h = 1 - 2^(-5 - h), h = 0 .. H - 1
    S_t = gamma_h S_{t-1} + k_t v_t^T        o_t = S_t^T q_t        y = (SiLU(x W_G) * unit_rms(o)) W_O

unit_rms is each head's, without a gain. Token t turns channels (2j, 2j + 1) by t theta_j, where the exponents of
theta_j = 10000^(-j / (d_k/2 - 1)) run from 0 to 1 inclusive, unlike those of rotary embeddings. The paper writes xPos, whose
channels change their size with the distance too; its code does not do that, and is followed: gamma is all that fades. Both
divide o by the square root of sum_s gamma^(t-s) and by max(1, |sum of the scores|) besides; these are one number a token and
head, which unit_rms takes out again up to its eps, and are left out here. gamma counts tokens, whatever their positions.

The paper has d_k = 256 and d_v = 2 d_k, so 8 d_model^2 parameters. Here H is the model's number of heads unless it is set.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mla.attention.contract import Surroundings, require
from mla.attention.recurrent.base import Channels, RecurrentConfig, RecurrentMixer, Tokens
from mla.layers.basic import FROM_HEADS, TO_HEADS, Linear, merge_heads, split_heads, unit_rms
from mla.ops.rope import rotate

THETA = 10_000.0


@dataclasses.dataclass
class RetentionConfig(RecurrentConfig):
    """Rotated queries and keys, and one fixed decay a head.

    Paper: 2307.08621
    Remembers: one matrix a head, fp32
    Elements: H d_k d_v, constant
    Use: the simplest state that forgets; a baseline of decays that the text decides
    """

    head_dim: int = 0  # key channels a head, an even number; 0: d_model / num_heads
    v_head_dim: int = 0  # value channels a head; 0: 2 head_dim

    def shape(self, around: Surroundings) -> tuple[int, int, int]:
        width = self.head_dim or self.default_head_dim(around, "head_dim")
        return self.heads(around), width, self.v_head_dim or 2 * width

    def validate(self, around: Surroundings) -> None:
        super().validate(around)
        width = self.shape(around)[1]
        require(width % 2 == 0, "head_dim", f"{width} is odd; channels are rotated in pairs")


class Retention(RecurrentMixer[RetentionConfig]):
    """Retention of H heads over a state [B, H, d_k, d_v] in fp32, see the equations above."""

    def __init__(self, config: RetentionConfig, around: Surroundings, *, rngs: nnx.Rngs):
        super().__init__(config, around, rngs=rngs)
        self.num_heads, self.key_dim, value_dim = config.shape(around)
        keys, values = self.num_heads * self.key_dim, self.num_heads * value_dim
        make: dict[str, Any] = {"rngs": rngs, "dtype": around.dtype}
        self.query = Linear(around.d_model, keys, TO_HEADS, **make)
        self.key = Linear(around.d_model, keys, TO_HEADS, **make)
        self.value = Linear(around.d_model, values, TO_HEADS, **make)
        self.gate = Linear(around.d_model, values, TO_HEADS, **make)
        self.out = Linear(values, around.d_model, FROM_HEADS, gain=around.residual_gain, **make)

    def tokens(self, x: jax.Array, inputs: Channels, positions: jax.Array) -> Tokens:
        rates = THETA ** -np.linspace(0, 1, self.key_dim // 2)
        query, key = (
            rotate(split_heads(project(x), self.num_heads)[None], positions[None], rates, interleaved=True)[0]
            for project in (self.query, self.key)
        )
        decay = jnp.asarray(np.log1p(-(2.0 ** (-5 - np.arange(self.num_heads)))), self.wide)
        every = jnp.broadcast_to(decay[:, None], (len(x), self.num_heads, 1))
        return Tokens(query, key * self.key_dim**-0.5, split_heads(self.value(x), self.num_heads), every)

    def finished(self, x: jax.Array, inputs: Channels, heads: jax.Array) -> jax.Array:
        normed = unit_rms(heads, self.around.norm_eps).astype(self.around.dtype)
        return self.out(jax.nn.silu(self.gate(x)) * merge_heads(normed))
