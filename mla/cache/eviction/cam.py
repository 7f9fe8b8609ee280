"""CaM (Zhang et al., ICML 2024): the start of the text and the most recent entries stay, and a value that leaves is merged.

    p = clip(A_e / mean of A_j over the recent entries, 0, 1)      m ~ Bernoulli(p)
    v_j += m v_e / M    for the next M recent entries j after e

e is the entry that leaves, A the attention of the current step, mean over an owner's heads (NaN counts as 0). Its key is
dropped. That is the code of its question answering, with the start of the text for H2O's heavy hitters; M is the number of
real neighbours where there are fewer. It evicts one entry a step: where several leave at once, as at the end of a prompt,
they are dropped without merging.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from mla.cache.eviction.contract import FIRST, Choice, Evidence, Policy, draw, require
from mla.cache.finite import saturate


@dataclasses.dataclass(frozen=True)
class CaM(Policy):
    """First and newest; what leaves is averaged into values that stay (CaM, ICML 2024)."""

    merges: ClassVar[tuple[str, ...]] = ("value",)
    draws: ClassVar[bool] = True

    start: float = 0.5  # of the budget, the start of the text; the rest is recent
    neighbours: int = 32  # M
    sample: bool = True  # false: p in place of m
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.start < 1, "cam", f"start={self.start} leaves no recent entries to merge into")
        require(self.neighbours >= 1, "cam", "neighbours=0 leaves no entries to merge into")

    def choose(self, seen: Evidence, budget: int) -> Choice:
        return Choice(jnp.where(seen.positions < int(self.start * budget), FIRST, seen.positions.astype(jnp.float32)))

    def merge(self, seen: Evidence, stays: jax.Array, streams: Any) -> Any:
        if not seen.decoding:
            return streams
        leaves = seen.there & ~stays
        leaves &= leaves.sum(-1, keepdims=True) == 1
        # What stays after e is the recent part: the start stands before it.
        recent = stays & (jnp.cumsum(leaves, axis=-1) == 1)
        window = recent & (jnp.cumsum(recent, axis=-1) <= self.neighbours)

        attention = seen.pool(seen.columns(last=1))
        own, others = (jnp.where(where, attention, 0).sum(-1) for where in (leaves, recent))
        p = jnp.clip(jnp.nan_to_num(own * recent.sum(-1) / others, nan=0.0, posinf=1.0), 0, 1)
        if self.sample:
            assert seen.texts is not None, "the cache keeps no number of its texts"
            evicted = jnp.where(leaves, seen.positions, 0).sum(-1)
            p = (draw(self.seed, seen.layer, seen.texts, evicted[..., None])[..., 0] < p).astype(jnp.float32)

        def to_heads(by_owner: jax.Array) -> jax.Array:
            """[B, K, C] -> [B, C, heads, 1]."""
            return jnp.swapaxes(seen.to_heads(by_owner, streams.value.shape[2]), 1, 2)[..., None]

        values = streams.value.astype(jnp.float32)
        given = (values * to_heads(leaves)).sum(1, keepdims=True)
        share = window * (p / jnp.maximum(window.sum(-1), 1))[..., None]
        return streams._replace(value=saturate(values + to_heads(share) * given, streams.value.dtype))
