"""A short causal convolution over the tokens of a text, each channel on its own, with the newest inputs as its tail.

Legend: B batch, S new tokens, R = taps - 1 tokens of the tail.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mla.cache.state import TailCache
from mla.layers.basic import matrix, vector


class ShortConvolution(nnx.Module):
    """y_t = SiLU(sum_j w_j u_{t - R + j} + b), j = 0 .. R, for several inputs u [B, S, channels] at once, each by its name.

    Tokens before the first are 0. W ~ N(0, 1 / taps), as `Linear` has it; no bias unless `use_bias`, no SiLU unless `silu`.
    """

    def __init__(
        self,
        widths: Mapping[str, int],
        taps: int,
        *,
        rngs: nnx.Rngs,
        dtype: Any,
        use_bias: bool = False,
        silu: bool = True,
    ):
        def drawn(width: int) -> nnx.Param:
            kernel = jax.random.normal(rngs.params(), (taps, width), jnp.float32) * taps**-0.5
            return matrix(kernel, (None, "head_channels"), multiplies=False)

        self.kernels = nnx.Dict({name: drawn(width) for name, width in widths.items()})
        biases = {name: vector(jnp.zeros((width,), jnp.float32)) for name, width in widths.items()}
        self.biases = nnx.Dict(biases) if use_bias else None
        self.widths, self.taps, self.dtype, self.silu = tuple(widths.items()), taps, dtype, silu

    def token(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes of what one token leaves in the tail."""
        return {name: jax.ShapeDtypeStruct((width,), self.dtype) for name, width in self.widths}

    def __call__(
        self, inputs: dict[str, jax.Array], positions: jax.Array | None, tail: TailCache
    ) -> tuple[dict[str, jax.Array], TailCache]:
        """Outputs of inputs [B, S, channels] after a tail, and the tail after them.

        positions: int32 [B, S], -1 padding, which is looked at by none; None: all are tokens.
        """
        if positions is not None:
            inputs = jax.tree.map(lambda a: jnp.where(positions[..., None] >= 0, a, jnp.zeros((), a.dtype)), inputs)
        line = tail.line(inputs, positions)
        outputs = {name: self._convolved(name, line[name], u.shape[1]) for name, u in inputs.items()}
        return outputs, tail.after(line, positions)

    def _convolved(self, name: str, line: jax.Array, count: int) -> jax.Array:
        kernel = self.kernels[name][...].astype(line.dtype)
        shape = (line.shape[0], count, line.shape[2])
        # Said to one axis after the other, as `*` does for a batch of 1, the sum of the kernel's gradient is slow on a CPU.
        taps = [jax.lax.broadcast_in_dim(kernel[tap], shape, (2,)) for tap in range(self.taps)]
        y: jax.Array = sum(line[:, tap : tap + count] * one for tap, one in enumerate(taps))  # type: ignore[assignment]
        y = y if self.biases is None else y + self.biases[name][...].astype(line.dtype)
        return jax.nn.silu(y) if self.silu else y
