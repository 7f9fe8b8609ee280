"""Arithmetic that keeps finite numbers finite where a dtype's range ends. Within the range it changes no bit."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def saturate(x: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    """x in a float `dtype`; numbers beyond its range, infinities too, become its largest or lowest one. NaN stays."""
    limits = jnp.finfo(dtype)
    return jnp.clip(x, float(limits.min), float(limits.max)).astype(dtype)


def norm(x: jax.Array) -> jax.Array:
    """|x| of vectors [..., width], fp32 [...]: squares neither overflow nor vanish. Saturates at fp32's largest number."""
    x = x.astype(jnp.float32)
    # A power of two near the largest component: dividing by it and multiplying again is exact.
    exponent = jnp.clip(jnp.frexp(jnp.max(jnp.abs(x), axis=-1))[1], -120, 120)
    scaled = x * _power_of_two(-exponent)[..., None]
    return saturate(jnp.sqrt(jnp.sum(jnp.square(scaled), axis=-1)) * _power_of_two(exponent))


def _power_of_two(exponent: jax.Array) -> jax.Array:
    """2^exponent in fp32, int32 from -126 to 127, by its bits."""
    return jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)
