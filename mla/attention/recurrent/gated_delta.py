"""Gated DeltaNet (2412.06464): the delta rule over a state that decays, head by head, as the text has it.

    g_t = -exp(A_log) softplus(x W_a + dt_bias), one a head
    S_t = (I - beta_t k_t k_t^T) e^{g_t} S_{t-1} + beta_t k_t v_t^T        y = (RMSNorm(o) * SiLU(x W_G)) W_O

q, k, v, beta and o as in `delta`. Sizes are the paper's: queries and keys of 3/4 d_model channels, values of twice as many,
so 6 d_model^2 parameters. Qwen3-Next has fewer heads of keys than of values, `num_key_heads`. Its projection of beta has no
bias, as in the two libraries that run it; the authors' code has one.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from mla.attention.contract import Surroundings, require
from mla.attention.recurrent.delta import DeltaConfig, DeltaRule
from mla.layers.basic import TO_HEADS, Linear
from mla.layers.decay import SoftplusDecay


@dataclasses.dataclass
class GatedDeltaConfig(DeltaConfig):
    """The delta rule with one decay a head.

    Paper: 2412.06464
    Remembers: one matrix a head, fp32, and the last three inputs of a convolution
    Elements: H d_k d_v + 3 H (2 d_k + d_v), constant
    Use: the strongest recurrence with one decay a head; hybrids at 3:1
    """

    head_dim: int = 0  # key channels a head; 0: 3/4 of d_model / num_heads
    v_head_dim: int = 0  # value channels a head; 0: 2 head_dim

    def key_dim(self, around: Surroundings) -> int:
        if self.head_dim:
            return self.head_dim
        width, rest = divmod(3 * around.d_model, 4 * self.heads(around))
        said = f"set it: 3/4 of d_model {around.d_model} does not divide into {self.heads(around)} heads"
        require(not rest, "head_dim", said)
        return width

    def value_dim(self, around: Surroundings) -> int:
        return self.v_head_dim or 2 * self.key_dim(around)


class GatedDelta(DeltaRule[GatedDeltaConfig]):
    """The gated delta rule of H heads over a state [B, H, K, V] in fp32, see the equations above."""

    def make_gates(self, make: dict[str, Any]) -> None:
        super().make_gates(make)
        d_model = self.around.d_model
        self.decay_in = Linear(d_model, self.num_heads, TO_HEADS, **make)
        self.rates = SoftplusDecay(self.num_heads, 1, rngs=make["rngs"], rates=(0.0, 16.0))
        self.gate_in = Linear(d_model, self.out.kernel.shape[0], TO_HEADS, **make)

    def decay(self, x: jax.Array) -> jax.Array:
        return self.rates(self.decay_in(x))

    def gate(self, x: jax.Array) -> jax.Array:
        return jax.nn.silu(self.gate_in(x))
