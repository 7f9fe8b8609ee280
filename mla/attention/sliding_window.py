"""Sliding-window attention (Longformer 2004.05150, Mistral 2310.06825): grouped-query attention over the last tokens.

A window of W counts the query's own token: s in (t - W, t]. The cache is a ring that never holds more than W tokens:
2 K head_dim min(T, W) elements a layer, constant in the long run.
"""

from __future__ import annotations

import dataclasses

from flax import nnx

from mla.attention.contract import CacheFormula, Surroundings, mechanism, require

GQAConfig, GroupedQuery = mechanism("gqa")


@dataclasses.dataclass
class SlidingWindowConfig(GQAConfig):  # type: ignore[misc, valid-type]
    """Grouped-query attention within a window."""

    num_kv_heads: int = 0  # key-value heads; 0: as many as query heads
    window: int = 128  # tokens seen, the query's own included

    def kv_heads(self, around: Surroundings) -> int:
        return self.num_kv_heads or self.query_heads(around)

    def validate(self, around: Surroundings) -> None:
        super().validate(around)
        require(self.window >= 1, "window", f"{self.window} is not a positive number of tokens")

    def cache_formula(self, around: Surroundings) -> CacheFormula:
        return dataclasses.replace(super().cache_formula(around), window=self.window)


class SlidingWindow(GroupedQuery):  # type: ignore[misc, valid-type]
    """See the module's docstring."""

    def __init__(self, config: SlidingWindowConfig, around: Surroundings, *, rngs: nnx.Rngs):
        super().__init__(config, around, rngs=rngs)
        self.window = config.window
