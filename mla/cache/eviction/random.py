"""The control: in every layer and owner each token draws a number, and the highest stay.

A number belongs to its token for good, so that what is kept after any number of steps is a fair sample of all that came. It
is drawn by the text and the position (`draw`): a text keeps the same tokens in every batch.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from mla.cache.eviction.contract import FIRST, Choice, Evidence, Policy, draw


@dataclasses.dataclass(frozen=True)
class Random(Policy):
    """The control; `random:sinks=4,recent=8` is the fairer one: without protected tokens it loses by the sinks alone."""

    draws: ClassVar[bool] = True

    sinks: int = 0  # tokens at the start that stay
    recent: int = 0  # newest entries that stay
    seed: int = 0

    def least(self) -> int:
        return self.sinks + self.recent + 1

    def choose(self, seen: Evidence, budget: int) -> Choice:
        assert seen.texts is not None, "the cache keeps no number of its texts"
        numbers = draw(self.seed, seen.layer, seen.texts, seen.positions)
        protected = (seen.positions < self.sinks) | (seen.rank < self.recent)
        return Choice(jnp.where(protected, FIRST, numbers))
