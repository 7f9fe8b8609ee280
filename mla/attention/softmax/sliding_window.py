"""Sliding-window attention (Longformer 2004.05150, Mistral 2310.06825): grouped-query attention over the last tokens.

A window of W counts the query's own token: s in (t - W, t]. The cache is a ring that never holds more than W tokens:
2 K head_dim min(T, W) elements a layer, constant in the long run. Every softmax mechanism takes a `window`; this is the
name for local layers of local:global patterns, where each kind has a RoPE base of its own (Gemma 2 2408.00118, Gemma 3
2503.19786): `sliding_window*5,gqa` with config.model.mechanism.gqa.rope_theta=1e6.
"""

from __future__ import annotations

import dataclasses

from mla.attention.contract import Surroundings, mechanism, require

GQAConfig, GroupedQuery = mechanism("gqa")


@dataclasses.dataclass
class SlidingWindowConfig(GQAConfig):  # type: ignore[misc, valid-type]
    """Grouped-query attention within a window.

    Paper: 2004.05150
    Remembers: k and v of the last W tokens, in a ring
    Elements: 2 K d_h, at most W tokens
    Use: local layers, mixed with global ones
    """

    num_kv_heads: int = 0  # key-value heads; 0: as many as query heads
    window: int = 128  # tokens seen, the query's own included

    def kv_heads(self, around: Surroundings) -> int:
        return self.num_kv_heads or self.heads(around)

    def validate(self, around: Surroundings) -> None:
        super().validate(around)
        require(self.window >= 1, "window", f"{self.window} is not a positive number of tokens")
