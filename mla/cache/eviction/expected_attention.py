"""Expected attention (2510.00636): what queries to come would look at, if they were drawn as the prompt's were.

    mu, Sigma     mean and covariance of the prompt's queries, the first `sinks` left out, turned to the mean of the next
                  `future` positions
    z[h, j]       = mu . k_j s + s^2 k_j^T Sigma k_j / 2        s the factor on the logits: log E exp(s q . k_j)
    score[h, j]   = softmax_j(z), mean over an owner's heads, times ||v_j||_2 (of an owner, the mean over its heads)

Sinks stay and are left out of the softmax. Once, at the end of the prompt. The query's turn to a later position is linear,
so the mean over positions is taken of each query before the moments are.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from mla.cache.eviction.contract import FIRST, GONE, Choice, Evidence, Policy, require
from mla.cache.finite import norm, saturate

FARTHEST = 100_000  # positions


@dataclasses.dataclass(frozen=True)
class ExpectedAttention(Policy):
    """What queries to come are expected to look at (2510.00636)."""

    when: ClassVar[str] = "prefill"
    elsewhere: ClassVar[bool] = False

    sinks: int = 4
    future: int = 512  # positions after the prompt that are averaged over

    def __post_init__(self) -> None:
        some = 1 <= self.future <= FARTHEST
        require(some, "expected_attention", f"future={self.future} is no number of positions from 1 to {FARTHEST}")

    def least(self) -> int:
        return self.sinks + 1

    def choose(self, seen: Evidence, budget: int) -> Choice:
        def add(total: jax.Array, step: jax.Array) -> tuple[jax.Array, None]:
            asked = jnp.broadcast_to(seen.newest + 1 + step, seen.query_positions.shape)
            return total + seen.scaled_queries(asked).astype(jnp.float32), None

        zero = jnp.zeros(jax.eval_shape(seen.scaled_queries, seen.query_positions).shape, jnp.float32)
        queries = jax.lax.scan(add, zero, jnp.arange(self.future))[0] / self.future
        counted = (seen.query_positions >= self.sinks).astype(jnp.float32)[:, None, :, None]
        total = jnp.maximum(counted.sum(2, keepdims=True), 1)
        mean = (queries * counted).sum(2, keepdims=True) / total
        centred = (queries - mean) * counted
        keys = seen.keys().astype(jnp.float32)
        half_covariance = jnp.einsum("bhsd,bhse->bhde", centred, centred / (2 * total))
        turned = mean + jnp.einsum("bhcd,bhde->bhce", keys, half_covariance)
        # Beyond fp32 it is as large as fp32 goes: the quadratic form is not negative, whatever its terms overflow to.
        largest = float(jnp.finfo(jnp.float32).max)
        expected = jnp.nan_to_num(jnp.einsum("bhce,bhce->bhc", turned, keys), nan=largest)
        ranked = seen.to_heads(seen.positions >= self.sinks, keys.shape[1])
        shares = seen.pool(jax.nn.softmax(jnp.where(ranked, expected, GONE), axis=-1))
        norms = saturate(seen.pool(norm(seen.values())))
        return Choice(jnp.where(seen.positions < self.sinks, FIRST, shares * norms))
