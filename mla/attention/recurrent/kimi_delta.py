"""Kimi Delta Attention (2510.26692): the delta rule over a state of which every key channel decays on its own.

    g_t = -exp(A_log) softplus(x W_F1 W_F2 + dt_bias)    A_log one a head, dt_bias and g one a key channel
    S_t = (I - beta_t k_t k_t^T) Diag(e^{g_t}) S_{t-1} + beta_t k_t v_t^T
    y = (RMSNorm(o) * sigmoid(x W_G1 W_G2)) W_O

q, k, v, beta and o as in `delta`; W_F1 and W_G1 project to as many channels as a head has. `gate_bound` bounds the decay
instead: g = -gate_bound sigmoid(exp(A_log) (x W_F1 W_F2 + dt_bias)), 5 in Kimi's later kernels. No biases in the gates, as
in transformers' layer; fla's has one in W_G2.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Generic, TypeVar

import jax

from mla.attention.contract import Surroundings, require
from mla.attention.recurrent.delta import DeltaConfig, DeltaRule
from mla.layers.basic import FROM_LATENT, TO_LATENT, Linear
from mla.layers.decay import SoftplusDecay


@dataclasses.dataclass
class KimiDeltaConfig(DeltaConfig):
    """The delta rule with one decay a key channel.

    Paper: 2510.26692
    Remembers: one matrix a head, fp32, and the last three inputs of a convolution
    Elements: H d_k d_v + 3 H (2 d_k + d_v), constant
    Use: hybrids with MLA at 3:1, as Kimi Linear
    """

    gate_bound: float = 0.0  # logarithms of decays stay above minus this, which a sigmoid approaches; 0: unbounded
    gate_rank: int = 0  # channels that decay and output gate are projected through; 0: head_dim

    def validate(self, around: Surroundings) -> None:
        super().validate(around)
        bound = self.gate_bound
        require(0 <= bound <= 80, "gate_bound", f"{bound} is not from 0 to 80; 0 leaves the decay unbounded")


K = TypeVar("K", bound=KimiDeltaConfig)


class ChannelDelta(DeltaRule[K], Generic[K]):
    """The delta rule of H heads over a state [B, H, K, V] in fp32 with a decay for each of the H K key channels."""

    gate_bias = False  # in W_G2

    def make_gates(self, make: dict[str, Any]) -> None:
        super().make_gates(make)
        d_model, keys, rank = self.around.d_model, self.num_heads * self.key_dim, self.config.gate_rank or self.key_dim
        self.decay_down = Linear(d_model, rank, TO_LATENT, **make)
        self.decay_up = Linear(rank, keys, FROM_LATENT, **make)
        self.rates = SoftplusDecay(self.num_heads, self.key_dim, rngs=make["rngs"], bound=self.config.gate_bound)
        self.gate_down = Linear(d_model, rank, TO_LATENT, **make)
        self.gate_up = Linear(rank, self.out.kernel.shape[0], FROM_LATENT, use_bias=self.gate_bias, **make)

    def decay(self, x: jax.Array) -> jax.Array:
        return self.rates(self.decay_up(self.decay_down(x)))

    def gate(self, x: jax.Array) -> jax.Array:
        return jax.nn.sigmoid(self.gate_up(self.gate_down(x)))


class KimiDelta(ChannelDelta[KimiDeltaConfig]):
    """Kimi Delta Attention, see the equations above."""
