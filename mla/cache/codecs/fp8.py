"""fp8 (e4m3) with a scale for 128 channels; FlashMLA's layout rounds the scales up to powers of two.

    s = max |x| / 448    x' = fp8(x / s) s        relative error at most 1/17 in the normal range, 448 the largest number

With `power_of_two`, s = 2^ceil(log2(max(max |x| / 448, 1e-4))), as FlashMLA's reference quantiser has it: on a latent of 512
channels and a rotary key of 64 in bf16 that is 512 + 4 x 4 + 64 x 2 = 656 bytes a token.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mla.cache.codecs.contract import Codec

LARGEST = 448.0


class Scaled(NamedTuple):
    """values float8_e4m3fn [..., width], scales fp32 [..., width / group]."""

    values: jax.Array
    scales: jax.Array


@dataclasses.dataclass(frozen=True)
class Fp8(Codec):
    """See the module's docstring."""

    power_of_two: bool = False

    def encode(self, x: jax.Array) -> Scaled:
        groups = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, self.group_of(x.shape[-1]))
        scales = jnp.max(jnp.abs(groups), axis=-1) / LARGEST
        if self.power_of_two:
            # By the bits: XLA's log2 and exp2 are an ulp off at powers of two.
            fraction, exponent = jnp.frexp(jnp.maximum(scales, 1e-4))
            scales = jnp.ldexp(jnp.ones_like(scales), exponent - (fraction == 0.5))
        scales = jnp.where(scales > 0, scales, 1.0)
        # The type does not saturate: above 464 a cast gives NaN.
        values = jnp.clip(groups / scales[..., None], -LARGEST, LARGEST).reshape(x.shape)
        return Scaled(values.astype(jnp.float8_e4m3fn), scales)

    def decode(self, coded: Scaled, dtype: Any) -> jax.Array:
        values = coded.values.astype(jnp.float32)
        groups = values.reshape(*coded.scales.shape, -1) * coded.scales[..., None]
        return groups.reshape(values.shape).astype(dtype)

    def vector_bytes(self, width: int) -> int:
        return width + 4 * (width // self.group_of(width))
