"""What a layer's own queries say about its entries, for eviction policies: `mla.cache.eviction.contract.Evidence`.

Legend: B batch, S queries, C candidates, H query heads (times the maps a head draws), K owners.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from mla.attention.softmax.base import Expanded, Memory, SoftmaxMixer
from mla.cache.evicted import EvictedCache
from mla.cache.eviction.contract import Evidence, text_numbers
from mla.ops.attention import attention_columns
from mla.ops.mask import Mask


class Observed(Evidence):
    """Computed from the softmax that the layer itself computes; nothing that is not asked for.

    Args:
      mixer: the layer.
      x, positions: its normed inputs [B, S, D], int32 [B, S].
      memory: what its queries looked at.
      cache: of all candidates, before it is cut.
      tokens: int32 [B, S].
      layer: its index.
    """

    def __init__(
        self,
        mixer: SoftmaxMixer,
        x: jax.Array,
        positions: jax.Array,
        memory: Memory,
        cache: EvictedCache,
        tokens: jax.Array,
        layer: int,
    ):
        self._mixer, self._x, self._memory = mixer, x, memory
        self.positions, self.query_positions, self.tokens = jnp.swapaxes(cache.slots, 1, 2), positions, tokens
        self.scores, self.memo = jnp.swapaxes(cache.scores, 1, 2), cache.memo
        self.layer, self.decoding = layer, x.shape[1] == 1
        self.texts = None if cache.texts is None else text_numbers(cache.texts, tokens, positions)

    @functools.cached_property
    def _expanded(self) -> Expanded:
        return self._expanded_at(self.query_positions)

    def _expanded_at(self, positions: jax.Array) -> Expanded:
        """Queries that stand at int32 [B, S], with keys and values of every head; parts without channels are left out."""
        seen = self._mixer.expanded(self._mixer.queries(self._x, positions), self._memory.entries, self._mask)
        parts = [(q, k) for q, k in zip(seen.queries, seen.keys, strict=True) if q.shape[-1]]
        return seen._replace(queries=tuple(q for q, _ in parts), keys=tuple(k for _, k in parts))

    @functools.cached_property
    def _mask(self) -> Mask:
        mask, mixer = self._memory.mask(self.query_positions, self._mixer.window, self._mixer.chunk), self._mixer
        queries = mixer.queries(self._x, self.query_positions)
        chosen = mixer.choose(self._x, self.query_positions, queries, self._memory, mask)
        return mask if chosen is None else dataclasses.replace(mask, chosen=chosen)

    @property
    def _heads(self) -> int:
        return int(self._expanded.queries[0].shape[2])

    def columns(self, last: int | None = None) -> jax.Array:
        # Padding is on the left, so the last columns are the last queries; what is padding sees nothing.
        seen, recent = self._expanded, slice(None if last is None else -last, None)
        queries, where = tuple(q[:, recent] for q in seen.queries), self.query_positions[:, recent]
        chosen = None if self._mask.chosen is None else self._mask.chosen[:, recent]
        mask = dataclasses.replace(self._mask, query_positions=where, chosen=chosen)
        return attention_columns(queries, seen.keys, mask, scale=seen.scale, **self._mixer.modifiers())

    def keys(self) -> jax.Array:
        return jnp.concatenate([self._by_head(part) for part in self._expanded.keys], axis=-1)

    def values(self) -> jax.Array:
        return self._by_head(self._expanded.values)

    def scaled_queries(self, positions: jax.Array) -> jax.Array:
        seen = self._expanded_at(positions)
        return jnp.swapaxes(jnp.concatenate(seen.queries, axis=-1), 1, 2) * seen.scale

    def _by_head(self, array: jax.Array) -> jax.Array:
        """Keys or values [B, C, heads, D], repeated for the query heads that share them: [B, H, C, D]."""
        return jnp.repeat(jnp.swapaxes(array, 1, 2), self._heads // array.shape[2], axis=1)
