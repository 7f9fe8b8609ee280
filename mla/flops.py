"""FLOPs of a model by formula, in training and in decoding, and what share of a device's they are.

What a mechanism's formula counts, `Mixer.mixing_flops` says. A training step is three times a forward pass, as everywhere
(a backward pass has two products for each of the forward pass; what is computed again is not counted).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from mla.compilation import targets
from mla.model import Model

# `jax.Device.device_kind` -> the chip whose published FLOPs it has.
KINDS = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "NVIDIA A100-SXM4-40GB": "a100",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
}
PEAKS = {kind: targets.chip(name).flops for kind, name in KINDS.items()}
PEAKS["TPU v4"] = 275e12  # cloud.google.com/tpu/docs/v4; no target, since its chips are two devices to the compiler


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
        return mixer.mixing_flops(tokens, decode) if decode else mixer.text_flops(tokens)

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
