"""The few layers that mechanisms and the model are made of. Legend: D_in, D_out channels."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


class Linear(nnx.Module):
    """x W (+ b) over the last axis.

    One initialisation rule for every mechanism of a comparison: W ~ N(0, gain^2 / D_in), so that a projection keeps the
    variance of its input whatever the rank it goes through; biases 0.
    """

    def __init__(self, d_in: int, d_out: int, *, rngs: nnx.Rngs, dtype: Any, gain: float = 1.0, use_bias: bool = False):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (d_in, d_out), jnp.float32) * (gain / d_in**0.5))
        self.bias = nnx.Param(jnp.zeros((d_out,), jnp.float32)) if use_bias else None
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        # Two-dimensional operands: XLA contracts [B, T, D] x [D, F] along slow layouts on a CPU, 2x slower.
        y = x.astype(self.dtype).reshape(-1, x.shape[-1]) @ self.kernel[...].astype(self.dtype)
        if self.bias is not None:
            y += self.bias[...].astype(self.dtype)
        return y.reshape(*x.shape[:-1], -1)

    def heads(self, num_heads: int) -> jax.Array:
        """W in the compute dtype as [D_in, heads, D_out / heads], for contractions that fold it into something else."""
        kernel = self.kernel[...].astype(self.dtype)
        return kernel.reshape(kernel.shape[0], num_heads, -1)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, statistics in fp32 (1910.07467)."""

    def __init__(self, dim: int, *, eps: float):
        self.scale = nnx.Param(jnp.ones((dim,), jnp.float32))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        wide *= jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (wide * self.scale[...]).astype(x.dtype)


def split_heads(x: jax.Array, num_heads: int) -> jax.Array:
    """[B, T, heads * d] -> [B, T, heads, d]."""
    return x.reshape(*x.shape[:-1], num_heads, -1)


def merge_heads(x: jax.Array) -> jax.Array:
    """[B, T, heads, d] -> [B, T, heads * d]."""
    return x.reshape(*x.shape[:-2], -1)
