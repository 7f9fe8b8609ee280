"""FastGen (2310.01801): every head profiles the prompt and takes the cheapest rule that recovers its attention.

    0 special    1 + punctuation    2 + frequent    3 + frequent + local    4 full

Special are document separators and the first `sinks` tokens, punctuation the tokens of only .,:;?!, frequent the share
`frequent` of the text with most attention among the others, local its last share `local`. A rule recovers enough if the mean
over the prompt's queries of the attention on what it keeps is at least `recovery`. The rule then stays, for tokens to come
too. The budget is a ceiling: what a rule wants beyond it leaves, and where it wants less its slots stay empty (heads of a
layer are padded to the budget).
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp

from mla.cache.eviction.contract import BOUND, FIRST, GONE, Choice, Evidence, Policy, require

PUNCTUATION = ".,:;?!"


@dataclasses.dataclass(frozen=True)
class FastGen(Policy):
    """Each head by the cheapest rule that recovers its attention (FastGen, 2310.01801).

    `scores`: attention so far, kind of token (2 special, 1 punctuation); `memo`: the rule.
    """

    per_entry: ClassVar[int] = 2
    per_owner: ClassVar[int] = 1
    fills: ClassVar[bool] = False

    recovery: float = 0.95
    frequent: float = 0.3
    local: float = 0.3
    sinks: int = 4
    special: tuple[int, ...] = dataclasses.field(default=(), metadata=BOUND)  # ids
    punctuation: tuple[int, ...] = dataclasses.field(default=(), metadata=BOUND)

    def __post_init__(self) -> None:
        for name in ("recovery", "frequent", "local"):
            require(getattr(self, name) <= 1, "fastgen", f"{name}={getattr(self, name)} is above 1, all of it")

    def least(self) -> int:
        return self.sinks + 1

    def bind(self, tokenizer: Any) -> Policy:
        texts = {i: tokenizer.decode([i]) for i in range(tokenizer.vocab_size) if i != tokenizer.eos_id}
        marks = tuple(i for i, text in texts.items() if text and set(text) <= set(PUNCTUATION))
        return dataclasses.replace(self, special=(tokenizer.eos_id,), punctuation=marks)

    def choose(self, seen: Evidence, budget: int) -> Choice:
        attention = seen.scores[..., 0] + seen.pool(seen.columns())
        first = (seen.query_positions >= 0) & (seen.query_positions < self.sinks)
        special = jnp.isin(seen.tokens, jnp.asarray(self.special, jnp.int32)) | first
        punctuation = jnp.isin(seen.tokens, jnp.asarray(self.punctuation, jnp.int32))
        kind = seen.scores[..., 1] + seen.of_new(jnp.where(special, 2.0, jnp.where(punctuation, 1.0, 0.0)))

        length = (seen.newest + 1)[:, None]  # of the text, [B, 1, 1]
        local = seen.rank < (self.local * length).astype(jnp.int32)
        others = seen.there & (kind < 1)
        order = jnp.argsort(jnp.argsort(jnp.where(others, -attention, jnp.inf), axis=-1), axis=-1)
        frequent = others & (order < (self.frequent * length).astype(jnp.int32))
        rules = [kind == 2, kind >= 1, (kind >= 1) | frequent, (kind >= 1) | frequent | local, seen.there]
        sets = jnp.stack([rule & seen.there for rule in rules])  # [5, B, K, C]

        recovered = jnp.where(sets, attention, 0).sum(-1) / jnp.maximum(length[..., 0], 1)
        # Of 4 the recovery is 1 but for rounding.
        profile = jnp.argmax(recovered.at[-1].set(jnp.inf) >= self.recovery, axis=0).astype(jnp.int32)
        # A prompt may be a single token.
        prompt = jnp.any(seen.query_positions == 0, axis=1, keepdims=True) | (not seen.decoding)
        rule = jnp.where(prompt, profile, seen.memo[..., 0].astype(jnp.int32))
        wanted = jnp.take_along_axis(sets, rule[None, ..., None], axis=0)[0]
        # Where the budget cuts: punctuation before local before frequent; of what is local the newest stay.
        recent = jnp.where(local & (rule >= 3)[..., None], 1e6 - seen.rank, attention)
        priority = jnp.where(kind == 2, FIRST, jnp.where(kind == 1, 2e6, recent))
        scores = jnp.stack([attention, kind], axis=-1)
        return Choice(jnp.where(wanted, priority, GONE), scores, rule[..., None].astype(jnp.float32))
