"""fp8 (e4m3) with a scale for 128 channels; FlashMLA's layout rounds the scales up to powers of two.

    s = max |x| / 448    x' = fp8(x / s) s        448 the largest number

    |x - x'| <= max(|x| / 17, s / 1024)           finite for finite x: x' saturates at the largest number of its dtype

With `power_of_two`, s = 2^ceil(log2(max(max |x| / 448, 1e-4))), as FlashMLA's reference quantiser has it: on a latent of 512
channels and a rotary key of 64 in bf16 that is 512 + 4 x 4 + 64 x 2 = 656 bytes a token.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mla.cache.codecs.contract import Codec
from mla.cache.finite import saturate

LARGEST = 448.0


class Scaled(NamedTuple):
    """bits uint8 [..., width], scales fp32 [..., width / group]."""

    bits: jax.Array  # not as fp8: to write one token XLA would turn a whole buffer into f16 and back on a CPU
    scales: jax.Array

    @property
    def values(self) -> jax.Array:
        """The stored bits as float8_e4m3fn numbers."""
        return jax.lax.bitcast_convert_type(self.bits, jnp.float8_e4m3fn)


@dataclasses.dataclass(frozen=True)
class Fp8(Codec):
    """e4m3, an fp32 scale for 128 channels; `latent_fp8` is FlashMLA's layout: 656 bytes a token at DeepSeek-V2's shape."""

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
        return Scaled(jax.lax.bitcast_convert_type(values.astype(jnp.float8_e4m3fn), jnp.uint8), scales)

    def decode(self, coded: Scaled, dtype: Any) -> jax.Array:
        values = _float32(coded.bits)
        groups = values.reshape(*coded.scales.shape, -1) * coded.scales[..., None]
        return saturate(groups.reshape(values.shape), dtype)  # the largest number of a group may have been rounded up

    def vector_bytes(self, width: int) -> int:
        return width + 4 * (width // self.group_of(width))


def _float32(bits: jax.Array) -> jax.Array:
    """uint8 bits of float8_e4m3fn -> fp32, exactly, without the type: XLA converts it element by element on a CPU."""
    bits = bits.astype(jnp.uint32)
    rest = bits & 0x7F  # 4 bits of exponent, biased by 7, and 3 of mantissa
    normal = jax.lax.bitcast_convert_type((rest << 20) + ((127 - 7) << 23), jnp.float32)
    magnitude = jnp.where(rest < 8, rest.astype(jnp.float32) * 2**-9, normal)
    magnitude = jnp.where(rest == 0x7F, jnp.nan, magnitude)
    return jnp.where(bits > 0x7F, -magnitude, magnitude)
