"""What a training step takes. Legend: B sequences, T tokens of each."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Sequences, and what is to be predicted at each of their tokens. Arrays of numpy or of jax.

    Attributes:
      tokens: int32 [B, T].
      targets: int32 [B, T], the token after each.
      weights: fp32 [B, T] from 0 up, how much each prediction counts; None: all alike, and nothing is spent on them.
    """

    tokens: Any
    targets: Any
    weights: Any = None

    @classmethod
    def of_windows(cls, windows: Any, weights: Any = None) -> Batch:
        """Windows int32 [B, T + 1], or one [T + 1], whose tokens but the first are predicted with weights [B, T] or [T]."""
        return cls(windows[..., :-1], windows[..., 1:], weights)

    def balanced(self) -> Batch:
        """Weights of mean 1: the mean of weighted losses is then the weighted mean, of micro-batches together too."""
        if self.weights is None:
            return self
        weights = self.weights.astype(jnp.float32)
        return dataclasses.replace(self, weights=weights / jnp.maximum(jnp.mean(weights), jnp.finfo(jnp.float32).tiny))

    def split(self, count: int) -> Batch:
        """Micro-batches, [count, B / count, T] each: every count-th row, so that each stays split over devices as it is."""
        return jax.tree.map(lambda a: a.reshape(-1, count, *a.shape[1:]).swapaxes(0, 1), self)
