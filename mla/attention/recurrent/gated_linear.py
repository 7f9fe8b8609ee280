"""Gated linear attention (GLA, 2312.06635): the text decides, one key channel at a time, what a state forgets.

    q = x W_Q / sqrt(d_k)    k = x W_K    v = x W_V    g_t = logsigmoid(x W_1 W_2 + b) / 16, one a key channel
    S_t = Diag(e^{g_t}) S_{t-1} + k_t v_t^T        o_t = S_t^T q_t        y = (RMSNorm(o) * SiLU(x W_G)) W_O

No features, no rotation, no convolution; W_1 projects to 16 channels, and with b = 0 decays start near 0.96. The norm is
each head's, RMSNorm with a gain as in the authors' code, where the paper writes LayerNorm. Keys have d_model / 2 channels in
all and values d_model, so about 4 d_model^2 parameters. The paper has four heads of any size of model; here H is the model's
number of heads unless it is set.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import nnx

from mla.attention.contract import Surroundings, require
from mla.attention.recurrent.base import Channels, RecurrentConfig, RecurrentMixer, Tokens
from mla.layers.basic import FROM_HEADS, FROM_LATENT, TO_HEADS, TO_LATENT, Linear, RMSNorm, merge_heads, split_heads


@dataclasses.dataclass
class GatedLinearConfig(RecurrentConfig):
    """One decay a key channel, and nothing erased.

    Paper: 2312.06635
    Remembers: one matrix a head, fp32
    Elements: H d_k d_v, constant
    Use: forgetting by the text at the price of linear attention
    """

    head_dim: int = 0  # key channels a head; 0: half of d_model / num_heads
    v_head_dim: int = 0  # value channels a head; 0: d_model / num_heads
    gate_rank: int = 16  # channels that the decay is projected through
    gate_divisor: float = 16.0  # divides the logarithm of the decay: larger ones remember longer

    def shape(self, around: Surroundings) -> tuple[int, int, int]:
        heads, keys = self.heads(around), self.head_dim
        if not keys:
            keys, rest = divmod(around.d_model, 2 * heads)
            said = f"set it: half of d_model {around.d_model} does not divide into {heads} heads"
            require(not rest, "head_dim", said)
        return heads, keys, self.v_head_dim or self.default_head_dim(around, "v_head_dim")

    def validate(self, around: Surroundings) -> None:
        super().validate(around)
        require(self.gate_rank >= 1, "gate_rank", f"{self.gate_rank} is not a positive number of channels")
        require(self.gate_divisor > 0, "gate_divisor", f"{self.gate_divisor} is not a positive number")


class GatedLinear(RecurrentMixer[GatedLinearConfig]):
    """Gated linear attention of H heads over a state [B, H, d_k, d_v] in fp32, see the equations above."""

    def __init__(self, config: GatedLinearConfig, around: Surroundings, *, rngs: nnx.Rngs):
        super().__init__(config, around, rngs=rngs)
        self.num_heads, self.key_dim, value_dim = config.shape(around)
        keys, values = self.num_heads * self.key_dim, self.num_heads * value_dim
        make: dict[str, Any] = {"rngs": rngs, "dtype": around.dtype}
        self.query = Linear(around.d_model, keys, TO_HEADS, **make)
        self.key = Linear(around.d_model, keys, TO_HEADS, **make)
        self.value = Linear(around.d_model, values, TO_HEADS, **make)
        self.decay_down = Linear(around.d_model, config.gate_rank, TO_LATENT, **make)
        self.decay_up = Linear(config.gate_rank, keys, FROM_LATENT, use_bias=True, **make)
        self.gate = Linear(around.d_model, values, TO_HEADS, **make)
        self.out_norm = RMSNorm(value_dim, eps=around.norm_eps)
        self.out = Linear(values, around.d_model, FROM_HEADS, gain=around.residual_gain, **make)

    def tokens(self, x: jax.Array, inputs: Channels, positions: jax.Array) -> Tokens:
        query, key, value, kept = (
            split_heads(a, self.num_heads)
            for a in (self.query(x), self.key(x), self.value(x), self.decay_up(self.decay_down(x)))
        )
        decay = jax.nn.log_sigmoid(kept.astype(self.wide)) / self.config.gate_divisor
        return Tokens(query * self.key_dim**-0.5, key, value, decay)

    def finished(self, x: jax.Array, inputs: Channels, heads: jax.Array) -> jax.Array:
        normed = self.out_norm(heads).astype(self.around.dtype)
        return self.out(merge_heads(normed) * jax.nn.silu(self.gate(x)))
