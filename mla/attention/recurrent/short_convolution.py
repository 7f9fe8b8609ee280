"""A gated short convolution: the layer that has neighbours meet, below layers that look things up.

Arora et al., "Zoology: Measuring and Improving Recall in Efficient Language Models", 2312.04927, section 4 (BaseConv, with a
short filter, as the first layer of its recall models):

    y_t = (sum_j w_j x_{t - R + j}) * (W x_t)          j = 0 .. R, channel by channel; the residual is the block's

It remembers the last R inputs and no state. Legend: B batch, S new tokens, D model width, R = taps - 1.
"""

from __future__ import annotations

import dataclasses

import jax
from flax import nnx

from mla.attention.contract import MechanismConfig, Surroundings, Term, constant, require
from mla.attention.recurrent.base import RecurrentMixer, only_real
from mla.cache.stores import LayerCache, StoreSpec, Tail
from mla.layers.basic import Linear
from mla.layers.convolution import ShortConvolution


@dataclasses.dataclass
class ShortConvolutionConfig(MechanismConfig):
    """A gated convolution over a few tokens, and nothing else.

    Paper: 2312.04927
    Remembers: the last taps - 1 inputs
    Elements: (taps - 1) d, constant
    Use: below other layers: neighbours meet, so that these can look things up; alone it looks at nothing else
    """

    taps: int = 3  # tokens that it spans, the newest included

    def validate(self, around: Surroundings) -> None:
        super().validate(around)
        require(self.taps >= 2, "taps", f"{self.taps} looks at no token before the newest; 2 is the least")

    def cache_formula(self, around: Surroundings) -> list[Term]:
        return [constant((self.taps - 1) * around.d_model, itemsize=0)]


class GatedShortConvolution(RecurrentMixer[ShortConvolutionConfig]):
    """The layer above over x [B, S, D]."""

    convolution: ShortConvolution

    def __init__(self, config: ShortConvolutionConfig, around: Surroundings, *, rngs: nnx.Rngs):
        super().__init__(config, around, rngs=rngs)
        self.convolution = ShortConvolution(
            {"input": around.d_model}, config.taps, rngs=rngs, dtype=around.dtype, silu=False
        )
        self.gate = Linear(around.d_model, around.d_model, ("model", "model"), rngs=rngs, dtype=around.dtype)

    def stores(self) -> dict[str, StoreSpec]:
        return {"tail": Tail(self.convolution.token(), self.convolution.taps - 1)}

    def recur(self, x: jax.Array, positions: jax.Array | None, before: LayerCache) -> tuple[jax.Array, LayerCache]:
        mixed, tail = self.convolution({"input": x}, positions, before["tail"])
        y = mixed["input"] * self.gate(x)
        return y if positions is None else only_real(y, positions), before.replace(tail=tail)

    def mixing_flops(self, tokens: int, decode: bool = False) -> float:
        return 0.0
