"""A cache that keeps a budget's worth of entries: what leaves, leaves the arrays.

A call looks at [stored, new]; then a policy (`mla.cache.eviction`) chooses, and the chosen ones are gathered along the token
axis, in the order of the text. That holds for any number of new tokens: a prompt in one piece, and one token after another.

Legend: B batch, S new tokens, C stored entries, K owners (groups of heads that choose for themselves; 1: the layer does).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mla.cache.codecs import Codec
from mla.cache.contract import ROWS, STREAM, replaced
from mla.cache.eviction.contract import FIRST, GONE, Evidence, Policy
from mla.cache.tokens import Seen, Streams, empty_streams, joined


@dataclasses.dataclass(frozen=True)
class Eviction:
    """What is to be kept of a cache. Static.

    Attributes:
      policy: the rule.
      budget: entries of a layer that stay, the mean over layers.
      when: prefill (each piece of a prompt is cut to the budget, what follows is appended), decode (a prompt stays whole
        until the first decoded token), both.
      place: of one layer's cache, where budgets depend on the length of a row's prompt (`Policy.by_prompt`).
    """

    policy: Policy
    budget: int
    when: str
    place: Place | None = None

    def slots(self, layers: int, prompt: int, capacity: int) -> list[tuple[int, int]]:
        """(slots, budget) of each evicting layer after a prompt of `prompt` tokens in a text of up to `capacity`."""
        budgets = self.policy.layer_budgets(self.budget, layers, prompt, capacity)
        if self.when == "decode":
            return [(max(prompt, min(capacity, budget)), budget) for budget in budgets]
        if self.when == "prefill":
            return [(min(prompt, budget) + capacity - prompt, budget) for budget in budgets]
        return [(min(capacity, budget), budget) for budget in budgets]

    def layers(self, number: int, prompts: Iterable[int], longest: int, capacity: int) -> list[tuple[int, Eviction]]:
        """(slots, the eviction of its cache) of each of so many evicting layers.

        Args:
          number: of layers.
          prompts: lengths of rows' prompts, in tokens; slots suffice for each of them.
          longest: to which shorter prompts are padded on the left.
          capacity: tokens of the longest text.
        """
        if not self.policy.by_prompt:
            return [(slots, replace(self, budget=own)) for slots, own in self.slots(number, longest, capacity)]
        each = [self.slots(number, prompt, capacity - longest + prompt) for prompt in prompts]
        slots = [max(size for size, _ in row) for row in zip(*each, strict=True)]
        return [(size, replace(self, place=Place(layer, number, longest))) for layer, size in enumerate(slots)]


class Place(NamedTuple):
    """A layer among those that entries leave: which of how many, for prompts of up to `longest` tokens."""

    layer: int
    number: int
    longest: int


@functools.lru_cache(maxsize=256)
def budgets_by_prompt(eviction: Eviction) -> np.ndarray:
    """A layer's budget after a prompt of 0, 1, .. `longest` tokens: int32 [longest + 1]."""
    assert eviction.place is not None
    layer, number, longest = eviction.place
    lengths = range(longest + 1)
    return np.asarray([eviction.policy.layer_budgets(eviction.budget, number, n, n)[layer] for n in lengths], np.int32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EvictedCache:
    """The entries of one layer that have stayed.

    Attributes:
      streams: the mechanism's entries, each an array [B, C, ...] or `Coded`.
      slots: int32 [B, C, K], where each entry stands in the text; -1: nothing there. Real entries come first, in order.
      scores: what the policy keeps for each entry, fp32 [B, C, K, ...].
      memo: for each owner, fp32 [B, K, ...].
      texts: uint32 [B], see `text_numbers`; None where the policy draws nothing.
      eviction: static; its budget, or with its place, is this layer's.
    """

    streams: Any
    slots: jax.Array
    scores: jax.Array
    memo: jax.Array
    texts: jax.Array | None
    eviction: Eviction = dataclasses.field(metadata={"static": True})

    @classmethod
    def empty(
        cls,
        like: Streams,
        batch: int,
        slots: int,
        dtype: Any,
        eviction: Eviction,
        owners: int,
        codecs: dict[str, Codec | None],
    ) -> EvictedCache:
        """An empty cache for entries shaped like `like`, see `TokenCache.empty`; `owners`: groups of heads."""
        assert not any(codec.held for codec in codecs.values() if codec), "tokens that are coded together cannot leave apart"
        streams = empty_streams(like, batch, slots, dtype, codecs)
        policy, owners = eviction.policy, owners if eviction.policy.per_head else 1
        scores = jnp.zeros((batch, slots, owners, policy.per_entry), jnp.float32)
        memo = jnp.zeros((batch, owners, policy.per_owner), jnp.float32)
        texts = jnp.zeros((batch,), jnp.uint32) if policy.draws else None
        return cls(streams, jnp.full((batch, slots, owners), -1, jnp.int32), scores, memo, texts, eviction)

    def extend(self, new: Streams, positions: jax.Array) -> tuple[Seen, EvictedCache]:
        """What new queries may look at, [stored, new], and a cache of all of it, to be cut by `keep`.

        Args:
          new: entries of the S new tokens, [B, S, ...] each.
          positions: int32 [B, S]; -1 is padding.
        """
        streams = joined(self.streams, new)
        fresh = jnp.broadcast_to(positions[..., None], (*positions.shape, self.slots.shape[2]))
        where = jnp.concatenate([self.slots, fresh], axis=1)
        scores = jnp.pad(self.scores, ((0, 0), (0, positions.shape[1]), (0, 0), (0, 0)))
        seen_at = where[..., 0] if where.shape[2] == 1 else where
        seen = Seen(streams, seen_at, moved=self._moved(seen_at, positions))
        return seen, replace(self, streams=streams, slots=where, scores=scores)

    def _moved(self, where: jax.Array, positions: jax.Array) -> jax.Array | None:
        """How many tokens later than where they stood entries are read: int32 like where, [B, C + S]."""
        if where.ndim == 3:
            return None
        first = jnp.min(jnp.where(positions >= 0, positions, jnp.iinfo(jnp.int32).max), axis=1, keepdims=True)
        stored = jnp.sum(self.slots[..., 0] >= 0, axis=1, keepdims=True, dtype=jnp.int32)
        moved = self.eviction.policy.moved(where, first - stored)
        return None if moved is None else jnp.where(where < first, moved, 0)  # new tokens stand where they stand

    def keep(self, seen: Evidence) -> EvictedCache:
        """The same cache without what leaves after a call: `seen` is what this call has shown of its candidates."""
        count, stored = self.slots.shape[1], self.slots.shape[1] - seen.query_positions.shape[1]
        when, budget, policy = self.eviction.when, self.eviction.budget, self.eviction.policy
        acts = when == "both" or (when == "decode") == seen.decoding
        slots = min(stored, budget) if acts and when != "prefill" else stored
        scores, memo, priority = self.scores, self.memo, jnp.full(seen.positions.shape, FIRST)
        # A row of which this call has nothing but padding stays as it is, unless all rows' arrays shrink.
        idle = (seen.newest[:, 0] < 0) & (slots == stored)
        if acts or (when == "decode" and policy.per_entry):
            choice = policy.choose(seen, min(budget, slots))
            scores = scores if choice.scores is None else jnp.swapaxes(choice.scores, 1, 2)
            memo = memo if choice.memo is None else jnp.where(idle[:, None, None], memo, choice.memo)
            priority = jnp.where(idle[:, None, None], FIRST, choice.priority) if acts else priority
        limit = jnp.where(idle, slots, self._budget(seen, slots)) if acts else slots
        index = kept(jnp.where(seen.there, priority, GONE), limit, slots)
        streams = self.streams
        if policy.merges and acts:
            stays = jax.vmap(jax.vmap(lambda i: jnp.zeros(count, bool).at[i].set(True, mode="drop")))(index)
            streams = policy.merge(seen, stays, streams)
        streams = jax.tree.map(lambda a: take(a, index), streams)
        there = jnp.swapaxes(index < count, 1, 2)
        where = jnp.where(there, take(self.slots, index), -1)
        return replace(self, streams=streams, slots=where, scores=take(scores, index), memo=memo, texts=seen.texts)

    def _budget(self, seen: Evidence, slots: int) -> int | jax.Array:
        """Entries that stay, of so many slots: of every row alike, or int32 [B] by the length of each row's text."""
        if self.eviction.place is None:
            return min(self.eviction.budget, slots)
        budgets = jnp.asarray(budgets_by_prompt(self.eviction))
        return jnp.minimum(budgets[jnp.clip(seen.newest[:, 0] + 1, 0, len(budgets) - 1)], slots)

    def unrotated(self) -> list[str]:
        return []

    def content(self) -> Any:
        """The arrays that count as content when bytes are measured: what the policy needs at hand is part of it."""
        return (self.streams, self.scores, self.memo)

    def bookkeeping(self) -> Any:
        return self.slots, self.texts

    def axes(self) -> Any:
        """What the axes of its arrays mean, in their place; see `Meaning`."""
        texts = None if self.texts is None else ROWS
        return replaced(self, streams=STREAM, slots=ROWS, scores=ROWS, memo=ROWS, texts=texts)


def kept(priority: jax.Array, budget: int | jax.Array, slots: int) -> jax.Array:
    """int32 [B, K, slots]: which candidates stay, in order; C for slots that stay empty.

    Args:
      priority: [B, K, C]; `GONE` leaves.
      budget: at most so many stay, of each row, int32 [B], or of all; highest priority first, ties to the lower index.
      slots: at least the budget.
    """
    count = priority.shape[-1]
    order = jnp.argsort(-priority, axis=-1, stable=True)[..., :slots]
    allowed = jnp.arange(order.shape[-1]) < jnp.asarray(budget)[..., None, None]
    chosen = jnp.where(allowed & (jnp.take_along_axis(priority, order, axis=-1) > GONE), order, count)
    chosen = jnp.sort(chosen, axis=-1).astype(jnp.int32)
    return jnp.pad(chosen, ((0, 0), (0, 0), (0, slots - chosen.shape[-1])), constant_values=count)


def take(array: jax.Array, index: jax.Array) -> jax.Array:
    """array [B, C, heads, ...] at index [B, K, n], each owner's share of the heads at its own: [B, n, heads, ...].

    Out of range it repeats the last.
    """
    batch, owners, count = index.shape
    if owners == 1:
        return jax.vmap(lambda a, i: jnp.take(a, i, axis=0, mode="clip"))(array, index[:, 0])
    shares = array.reshape(batch, array.shape[1], owners, -1)
    by_owner = jax.vmap(jax.vmap(lambda a, i: jnp.take(a, i, axis=0, mode="clip"), in_axes=(1, 0), out_axes=1))
    return by_owner(shares, index).reshape(batch, count, *array.shape[2:])


def formula_bytes(eviction: Eviction, owners: int, slots: int, entry_bytes: int) -> int:
    """Content bytes of a layer's `slots` when the streams take `entry_bytes` a token: fp32 scores and memos included."""
    policy, owners = eviction.policy, owners if eviction.policy.per_head else 1
    return slots * (entry_bytes + 4 * owners * policy.per_entry) + 4 * owners * policy.per_owner


__all__ = ["EvictedCache", "Eviction", "Place", "formula_bytes", "kept", "take"]
