"""int8, int4, int2: rounded to a grid per token, whole vector or groups of channels, scales in 16 bits.

    symmetric     s = max |x| / (2^(b-1) - 1),      x' = round(x / s) s                      int8
    asymmetric    s = (max - min) / (2^b - 1),      x' = round((x - min) / s) s + min        int4, int2

Rounding to nearest: |x - x'| <= s / 2. Stored scales are rounded up and minima down, so that nothing is clipped where fp16
is normal. Beyond its range s and min saturate at L = 65504, and x' is the nearest end of the grid:

    |x - x'| <= s / 2 + d,      d = distance of x to [-(2^(b-1) - 1) L, (2^(b-1) - 1) L] or [min, min + (2^b - 1) L]

with min clipped to [-L, L]; where fp16 is subnormal, s below 2^-14, d is at most 2^b 2^-24. What is read of finite numbers
is finite. Two int4 (four int2) share a byte, the first channel in the lowest bits; symmetric ones in two's complement.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from mla.cache.codecs.contract import Codec
from mla.cache.finite import saturate

UP = 1 + 2**-10  # makes rounding to fp16 never fall below


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Grid:
    """codes uint8 or int8 [..., width * bits / 8], scales fp16 [..., width / group], minima alike or None; static width."""

    codes: jax.Array
    scales: jax.Array
    minima: jax.Array | None
    width: int = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class Integers(Codec):
    """Per token, with 16-bit scales (and minima); int4 and int2 in groups of 32 channels, or `int4:64`."""

    bits: int = 8
    symmetric: bool = False

    def encode(self, x: jax.Array) -> Grid:
        width = x.shape[-1]
        group = self.group_of(width)
        groups = x.astype(jnp.float32).reshape(*x.shape[:-1], width // group, group)
        if self.symmetric:
            top, minima = 2 ** (self.bits - 1) - 1, None
            scales = _scale(jnp.max(jnp.abs(groups), axis=-1) / top)
            codes = jnp.round(groups / scales.astype(jnp.float32)[..., None])
            codes = jnp.clip(codes, -top, top).astype(jnp.int8)
        else:
            top, lowest = 2**self.bits - 1, jnp.min(groups, axis=-1)
            minima = saturate(lowest - jnp.abs(lowest) * (UP - 1), jnp.float16)
            low = minima.astype(jnp.float32)
            scales = _scale((jnp.max(groups, axis=-1) - low) / top)
            codes = jnp.round((groups - low[..., None]) / scales.astype(jnp.float32)[..., None])
            codes = jnp.clip(codes, 0, top).astype(jnp.uint8)
        return Grid(_pack(codes.reshape(x.shape), self.bits), scales, minima, width)

    def decode(self, coded: Grid, dtype: Any) -> jax.Array:
        codes = _unpack(coded.codes, self.bits, self.symmetric)[..., : coded.width].astype(jnp.float32)
        groups = codes.reshape(*coded.scales.shape, self.group_of(coded.width)) * coded.scales.astype(jnp.float32)[..., None]
        if coded.minima is not None:
            groups += coded.minima.astype(jnp.float32)[..., None]
        return groups.reshape(codes.shape).astype(dtype)

    def vector_bytes(self, width: int) -> int:
        return -(-width * self.bits // 8) + (2 if self.symmetric else 4) * (width // self.group_of(width))


def _scale(exact: jax.Array) -> jax.Array:
    """fp16, below `exact` only where fp16 is subnormal or ends; 1 where all numbers are alike."""
    return saturate(jnp.where(exact > 0, jnp.maximum(exact * UP, 2**-24), 1.0), jnp.float16)


def _pack(codes: jax.Array, bits: int) -> jax.Array:
    """int8 or uint8 [..., width] -> [..., width * bits / 8]; a last byte that is not full is padded with zeros."""
    if bits == 8:
        return codes
    each = 8 // bits
    codes = jnp.pad(codes.astype(jnp.uint8), [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % each)])
    parts = (codes & (2**bits - 1)).reshape(*codes.shape[:-1], -1, each) << (jnp.arange(each, dtype=jnp.uint8) * bits)
    return jnp.sum(parts, axis=-1, dtype=jnp.uint8)


def _unpack(packed: jax.Array, bits: int, signed: bool) -> jax.Array:
    """The other way round, padding included; two's complement where `signed`."""
    if bits == 8:
        return packed
    each = 8 // bits
    parts = (packed[..., None] >> (jnp.arange(each, dtype=jnp.uint8) * bits)) & (2**bits - 1)
    codes = parts.reshape(*packed.shape[:-1], -1)
    if not signed:
        return codes
    half = 2 ** (bits - 1)
    return (codes.astype(jnp.int8) ^ half) - half
