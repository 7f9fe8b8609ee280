"""FLOPs of a model by formula, in training and in decoding, and what share of a device's they are.

What a mechanism's formula counts, `Mixer.mixing_flops` says. A training step is three times a forward pass, as everywhere
(a backward pass has two products for each of the forward pass; what is computed again is not counted).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from mla.model import Model

# FLOPs a second of dense bf16 products, by `jax.Device.device_kind`: cloud.google.com/tpu/docs, and the data sheets of
# NVIDIA's A100, H100 and H200 (SXM).
PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


@dataclasses.dataclass(frozen=True)
class FLOPs:
    """Of one token of a model, on average over a text or after one.

    Attributes:
      matrices: of products with matrices that every token goes through, the output matrix and MLPs included.
      mixing: of all layers' `Mixer.mixing_flops`.
    """

    matrices: float
    mixing: float

    @property
    def total(self) -> float:
        return self.matrices + self.mixing


def forward(model: Model, tokens: int, decode: bool = False) -> FLOPs:
    """FLOPs of one token: on average over a text of so many tokens; or, with `decode`, of the last of them by itself.

    The model may be abstract, of `nnx.eval_shape`.
    """

    @functools.cache
    def mixing(index: int) -> float:
        mixer = model.blocks[index].mixer
        ends = [tokens] if decode else range(1, tokens + 1)
        return sum(mixer.mixing_flops(end, decode) for end in ends) / len(ends)

    kinds: dict[tuple[Any, ...], int] = {}  # -> the first layer of that kind
    total, matrices = 0.0, 2.0 * model.embedding.size
    for index, block in enumerate(model.blocks):
        kind = (type(block.mixer), id(block.mixer.config), block.mixer.around.remembers)
        total += mixing(kinds.setdefault(kind, index))
        matrices += block.mixer.matrix_flops() + block.mlp.matrix_flops()
    return FLOPs(matrices, total)


def training(model: Model, context: int) -> float:
    """FLOPs of a training step for each of its tokens, of texts of `context` tokens."""
    return 3 * forward(model, context).total


def peak(device_kind: str) -> float | None:
    """FLOPs a second of dense bf16 products of a device; None: not known here."""
    return PEAKS.get(device_kind)
