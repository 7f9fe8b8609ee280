"""What an eviction policy must provide, and what it may know when it chooses.

Legend: B batch, S queries of this call, C candidates (what was stored, then what is new, in the order of the text), H query
heads, K owners: groups of heads that share their entries and so their choice.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from mla.errors import UserError

FIELD = "config.eval.cache.evict"
FIRST = jnp.inf  # priority of entries that stay
BOUND = {"bound": True}  # metadata of a policy's fields that no user sets
GONE = -jnp.inf  # of entries that leave even where there is room


class Evidence:
    """What is known of one layer when some of its entries have to go. Attention is computed only if a policy asks for it.

    Attributes:
      positions: int32 [B, K, C], where each candidate stands in the text; -1: nothing there.
      query_positions, tokens: int32 [B, S], of this call's tokens; -1 is padding.
      scores: what the policy kept for each entry, fp32 [B, K, C, per_entry], zero for new ones.
      memo: what it kept for each owner, fp32 [B, K, per_owner], zero at first.
      layer: which one.
      decoding: the prompt is over.
      texts: uint32 [B], see `text_numbers`; None where the policy draws nothing.
    """

    positions: jax.Array
    query_positions: jax.Array
    tokens: jax.Array
    scores: jax.Array
    memo: jax.Array
    layer: int
    decoding: bool
    texts: jax.Array | None

    def columns(self, last: int | None = None) -> jax.Array:
        """sum_i A[h, i, j] over this call's queries i, or the `last` of them: fp32 [B, H, C], A the causal softmax over all
        candidates."""
        raise NotImplementedError

    def keys(self) -> jax.Array:
        """As every head sees them, where they stand: [B, H, C, D]."""
        raise NotImplementedError

    def values(self) -> jax.Array:
        """As every head sees them: [B, H, C, Dv]."""
        raise NotImplementedError

    def scaled_queries(self, positions: jax.Array) -> jax.Array:
        """This call's queries as if they were asked at int32 [B, S], times the factor on the logits: [B, H, S, D]."""
        raise NotImplementedError

    def pool(self, by_head: jax.Array) -> jax.Array:
        """The mean over the heads of each owner: [B, H, C] -> [B, K, C]."""
        batch, heads, count = by_head.shape
        owners = self.positions.shape[1]
        return by_head.reshape(batch, owners, heads // owners, count).mean(2)

    def to_heads(self, by_owner: jax.Array, heads: int) -> jax.Array:
        """[B, K, C] -> [B, H, C]."""
        return jnp.repeat(by_owner, heads // by_owner.shape[1], axis=1)

    def of_new(self, values: jax.Array) -> jax.Array:
        """[B, S] of this call's tokens -> [B, K, C], zero for candidates from before."""
        count = self.positions.shape[2] - values.shape[1]
        return jnp.broadcast_to(jnp.pad(values, ((0, 0), (count, 0)))[:, None], self.positions.shape)

    @property
    def there(self) -> jax.Array:
        """bool [B, K, C]: candidates that are tokens."""
        return self.positions >= 0

    @property
    def rank(self) -> jax.Array:
        """int32 [B, K, C]: 0 for the newest candidate, 1 for the one before."""
        return jnp.cumsum(self.there[..., ::-1], axis=-1)[..., ::-1] - 1

    @property
    def newest(self) -> jax.Array:
        """int32 [B, 1]: position of the last query."""
        return jnp.max(self.query_positions, axis=1, keepdims=True)


class Choice(NamedTuple):
    """What a policy wants.

    Attributes:
      priority: fp32 [B, K, C]; as many as the budget allows stay, highest first, ties to the older; `FIRST`, `GONE`.
      scores, memo: as in `Evidence`, for the next call; None: as they were.
    """

    priority: jax.Array
    scores: jax.Array | None = None
    memo: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Policy:
    """A rule that chooses which entries stay. Static: equal policies share compiled programs. Fields are settings.

    Attributes:
      when: the calls after which it acts as published: prefill, decode or both.
      elsewhere: whether it can act at other times than those.
      per_head: every group of heads that has entries of its own chooses; otherwise a layer keeps one set.
      fills: nothing leaves while the budget has room.
      per_entry, per_owner: numbers that it keeps for each entry and for each owner.
      draws: it draws random numbers (`draw`), and a cache keeps a number of each row's text for it.
      by_prompt: `layer_budgets` depend on the length of the prompt.
      merges: streams that `merge` changes; a layer must have them, uncoded.
    """

    when: ClassVar[str] = "both"
    elsewhere: ClassVar[bool] = True
    per_head: ClassVar[bool] = True
    fills: ClassVar[bool] = True
    per_entry: ClassVar[int] = 0
    per_owner: ClassVar[int] = 0
    draws: ClassVar[bool] = False
    by_prompt: ClassVar[bool] = False
    merges: ClassVar[tuple[str, ...]] = ()

    def choose(self, seen: Evidence, budget: int) -> Choice:
        """Which candidates stay, if `budget` can."""
        raise NotImplementedError

    def merge(self, seen: Evidence, stays: jax.Array, streams: Any) -> Any:
        """The candidates' streams, [B, C, heads, ...] each, as those that stay, bool [B, K, C], are to be kept."""
        return streams

    def least(self) -> int:
        """Entries that the rule protects whatever happens, and one: smaller budgets are refused."""
        return 1

    def layer_budgets(self, budget: int, layers: int, prompt: int, capacity: int) -> list[int]:
        """Entries of each evicting layer, lowest first, after a prompt of `prompt` tokens in a text of `capacity`."""
        return [budget] * layers

    def moved(self, positions: jax.Array, gap: jax.Array) -> jax.Array | None:
        """int32 like positions [B, C]: how many tokens later than where they stood entries are read, or None: nowhere.

        gap: int32 [B, 1], tokens that have left.
        """
        return None

    def bind(self, tokenizer: Any) -> Policy:
        """The policy for a tokenizer's ids; `BOUND` fields are set here and not by users."""
        return self


def draw(seed: int, layer: int, texts: jax.Array, positions: jax.Array) -> jax.Array:
    """fp32 from 0 to 1 like positions int32 [B, K, n]: a number that belongs to a token for good, by its text, uint32 [B]
    (`text_numbers`), owner and position, whatever the batch and its padding."""

    def one(text: jax.Array, owner: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), layer)
        for part in (text, owner, position):
            key = jax.random.fold_in(key, part)
        return jax.random.uniform(key)

    texts, owners = texts[:, None, None], jnp.arange(positions.shape[1])[:, None]
    parts = (jnp.broadcast_to(part, positions.shape).ravel() for part in (texts, owners, positions))
    return jax.vmap(one)(*parts).reshape(positions.shape)


def text_numbers(before: jax.Array, tokens: jax.Array, positions: jax.Array) -> jax.Array:
    """What tells a text from others, uint32 [B]: a hash of the tokens of its first call (the prompt), and where they stand.

    Args:
      before: uint32 [B], of the call before; 0: there was none.
      tokens, positions: int32 [B, S]; position -1 is padding.
    """
    mixed = tokens.astype(jnp.uint32) * jnp.uint32(0x9E3779B1) + positions.astype(jnp.uint32) * jnp.uint32(0x85EBCA77)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):  # the finaliser of lowbias32: every bit on every other
        mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
    real = positions >= 0
    hashed = jnp.sum(jnp.where(real, mixed ^ (mixed >> 16), 0), axis=1, dtype=jnp.uint32) | 1
    return jnp.where((before == 0) & jnp.any(real, axis=1), hashed, before)


def require(condition: object, policy: str, message: str) -> None:
    """Refuses a setting with one line that names the field."""
    if not condition:
        raise UserError(f"{FIELD}: {policy}: {message}")
