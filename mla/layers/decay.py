"""Decays that the text decides: exp(-exp(A_log) softplus(u + dt_bias)), as state space models have them.

Legend: .. axes of tokens, H heads, N decays a head (one, or one a key channel).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from mla.layers.basic import vector

RATES = (1.0, 16.0)  # exp(A_log) starts uniformly between them (Mamba-2's code, Kimi's)
STEPS = (1e-3, 1e-1)  # softplus(dt_bias) starts between them, its logarithm uniformly


class SoftplusDecay(nnx.Module):
    """A_log, one a head, and dt_bias, N a head: neither shrinks by weight decay, both are fp32 in any dtype (2405.21060).

    `bound` above 0 bounds the logarithm instead: g = -bound sigmoid(exp(A_log) (u + dt_bias)) (Kimi's later kernels).
    """

    def __init__(self, heads: int, each: int, *, rngs: nnx.Rngs, rates: tuple[float, float] = RATES, bound: float = 0.0):
        rate = jax.random.uniform(rngs.params(), (heads,), jnp.float32, *rates)
        lowest, highest = jnp.log(jnp.asarray(STEPS, jnp.float32))
        step = jnp.exp(jax.random.uniform(rngs.params(), (heads * each,), jnp.float32, lowest, highest))
        self.a_log = vector(jnp.log(jnp.maximum(rate, 1e-4)))
        self.dt_bias = vector(step + jnp.log(-jnp.expm1(-step)))  # the inverse of softplus
        self.heads, self.bound = heads, bound

    def step(self, u: jax.Array) -> jax.Array:
        """softplus(u + dt_bias) [.., H, N] of u [.., H N], in fp32 at least."""
        return jax.nn.softplus(self._biased(u))

    def __call__(self, u: jax.Array) -> jax.Array:
        """The logarithm of the decays, [.., H, N] <= 0 of u [.., H N], in fp32 at least."""
        if self.bound:
            return -self.bound * jax.nn.sigmoid(self._rate() * self._biased(u))
        return -self._rate() * self.step(u)

    def _rate(self) -> jax.Array:
        return jnp.exp(self.a_log[...])[:, None]

    def _biased(self, u: jax.Array) -> jax.Array:
        biased = u.astype(jnp.promote_types(u.dtype, jnp.float32)) + self.dt_bias[...]
        return biased.reshape(*u.shape[:-1], self.heads, -1)
