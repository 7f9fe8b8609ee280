"""What a block does to each token by itself. Legend: D model width, F width of the MLP."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from mla.attention.contract import Layer, Output, Step
from mla.layers.basic import Linear


class SwiGLU(Layer):
    """(silu(x W_gate) * x W_up) W_down (Shazeer, 2002.05202): [.., D] -> [.., D] through F channels."""

    def __init__(self, d_model: int, width: int, *, rngs: nnx.Rngs, dtype: Any, gain: float):
        self.gate = Linear(d_model, width, ("model", "ff"), rngs=rngs, dtype=dtype)
        self.up = Linear(d_model, width, ("model", "ff"), rngs=rngs, dtype=dtype)
        self.down = Linear(width, d_model, ("ff", "model"), rngs=rngs, dtype=dtype, gain=gain)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))

    def forward(self, x: jax.Array, step: Step | None = None) -> Output:
        """Outputs with losses and metrics, of which there are none here."""
        return Output(self(x), {}, {})
