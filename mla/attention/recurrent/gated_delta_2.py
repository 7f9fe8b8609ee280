"""Gated DeltaNet-2 (2605.22791): what is erased and what is written are decided apart, channel by channel.

    b_t = sigmoid(x W_b), one a key channel    w_t = sigmoid(x W_w), one a value channel
    S_t = (I - k_t (b_t * k_t)^T) Diag(e^{g_t}) S_{t-1} + k_t (w_t * v_t)^T
    y = (RMSNorm(o) * SiLU(x W_G1 W_G2 + b_G)) W_O

q, k, v and o as in `delta`, g as in `kimi_delta`, which this is where b_t and w_t are one beta_t; with one decay a head
besides it is `gated_delta`. With `negative_eigenvalues` b is doubled.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from mla.attention.recurrent.kimi_delta import ChannelDelta, KimiDeltaConfig
from mla.layers.basic import TO_HEADS, Linear, split_heads


@dataclasses.dataclass
class GatedDelta2Config(KimiDeltaConfig):
    """The delta rule with decay, erasing and writing by channel.

    Paper: 2605.22791
    Remembers: one matrix a head, fp32, and the last three inputs of a convolution
    Elements: H d_k d_v + 3 H (2 d_k + d_v), constant
    Use: as Kimi's, for 2 d_model^2 more parameters
    """


class GatedDelta2(ChannelDelta[GatedDelta2Config]):
    """The rule above for H heads over a state [B, H, K, V] in fp32."""

    gate_bias = True

    def make_gates(self, make: dict[str, Any]) -> None:
        super().make_gates(make)
        del self.beta
        d_model = self.around.d_model
        self.erase_in = Linear(d_model, self.num_heads * self.key_dim, TO_HEADS, **make)
        self.write_in = Linear(d_model, self.out.kernel.shape[0], TO_HEADS, **make)

    def strengths(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        gates = (
            jax.nn.sigmoid(split_heads(part(x), self.num_heads).astype(self.wide)) for part in (self.erase_in, self.write_in)
        )
        erase, write = gates
        return erase * self.largest, write

    def gate(self, x: jax.Array) -> jax.Array:
        return jax.nn.silu(self.gate_up(self.gate_down(x)))
