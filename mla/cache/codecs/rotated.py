"""A Hadamard rotation before another codec (QuaRot 2404.00456): spreads outlying channels over all of them.

    H = Walsh-Hadamard / sqrt(n), symmetric and orthonormal; stored is codec(x H), read is decode(..) H

A vector whose width is no power of two is rotated in blocks of the largest power of two that divides it. The error of a
vector is the other codec's error of x H, as a norm. Numbers beyond 1 / n of fp32's largest saturate there.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from mla.cache.codecs.contract import Codec
from mla.cache.finite import saturate


def hadamard(x: jax.Array) -> jax.Array:
    """x [..., width] H, in fp32, by the fast transform. Its own inverse; finite for finite x."""
    width = x.shape[-1]
    size = width & -width  # the largest power of two that divides it
    largest = float(jnp.finfo(jnp.float32).max) / size  # sums of so many stay finite
    bounded = jnp.clip(x.astype(jnp.float32), -largest, largest)
    blocks, half = bounded.reshape(*x.shape[:-1], width // size, size), 1
    while half < size:
        pairs = blocks.reshape(*x.shape[:-1], width // size, -1, 2, half)
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        blocks, half = jnp.stack([first + second, first - second], axis=-2), 2 * half
    return (blocks * size**-0.5).reshape(x.shape)


@dataclasses.dataclass(frozen=True)
class Rotated(Codec):
    """See the module's docstring."""

    inner: Codec = dataclasses.field(default_factory=Codec)

    @classmethod
    def before(cls, inner: Codec) -> Rotated:
        return cls(inner=inner, unit=inner.unit, lag=inner.lag, unrotated=inner.unrotated)

    def encode(self, x: jax.Array) -> Any:
        return self.inner.encode(hadamard(x))

    def decode(self, coded: Any, dtype: Any) -> jax.Array:
        return saturate(hadamard(self.inner.decode(coded, jnp.float32)), dtype)

    def vector_bytes(self, width: int) -> int:
        return self.inner.vector_bytes(width)

    def unit_bytes(self, shape: tuple[int, ...]) -> int:
        return self.inner.unit_bytes(shape)
