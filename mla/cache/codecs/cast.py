"""bf16: half of fp32, eight bits of precision: |x - x'| <= 2^-8 |x|, up to bf16's largest number, at which x' saturates."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from mla.cache.codecs.contract import Codec
from mla.cache.finite import saturate


@dataclasses.dataclass(frozen=True)
class Cast(Codec):
    """16 bits, without scales."""

    def encode(self, x: jax.Array) -> jax.Array:
        return saturate(x, jnp.bfloat16)

    def decode(self, coded: jax.Array, dtype: Any) -> jax.Array:
        return saturate(coded, dtype)

    def vector_bytes(self, width: int) -> int:
        return 2 * width
