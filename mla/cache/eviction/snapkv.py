"""SnapKV (2404.14469) and PyramidKV (2406.02069): what the end of the prompt looks at, and its neighbours.

    vote[h, j] = sum over the last `window` queries of A[h, i, j], pooled over `kernel` neighbours j, mean of an owner's
                 heads

The window itself stays. Once, at the end of the prompt; tokens that follow are appended. Average pooling counts the zeros
beyond the edges. PyramidKV gives low layers more: B = budget - window, min = B / beta, max = 2 B - min, linear in the
layer (max is at most T - window, min then 2 B - max; below T = 2 B every layer has B), rounded by largest remainder so that
the sum is exact; T is the length of each row's own prompt, without padding. Heads that share an entry have one set (the
released SnapKV would multiply the entries).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from mla.cache.eviction.contract import FIRST, Choice, Evidence, Policy, require

WIDEST = 1000  # neighbours


@dataclasses.dataclass(frozen=True)
class SnapKV(Policy):
    """What the prompt's end looks at, and its neighbours (SnapKV, 2404.14469); settings of its LongBench runs."""

    when: ClassVar[str] = "prefill"
    elsewhere: ClassVar[bool] = False

    window: int = 32  # queries at the end of the prompt that vote, and whose entries stay
    kernel: int = 7  # neighbours whose votes are pooled
    pool: str = "max"  # max or average

    def __post_init__(self) -> None:
        require(self.pool in ("max", "average"), "snapkv", f"pool={self.pool!r} is neither max nor average")
        odd = self.kernel % 2 == 1 and self.kernel < WIDEST
        require(odd, "snapkv", f"kernel={self.kernel} is no odd number below {WIDEST}")
        require(self.window >= 1, "snapkv", f"window={self.window} leaves no query to vote")

    def least(self) -> int:
        return self.window + 1

    def choose(self, seen: Evidence, budget: int) -> Choice:
        in_window = (seen.rank < self.window) & seen.there
        votes = seen.columns(last=self.window)
        votes = jnp.where(seen.to_heads(in_window, votes.shape[1]), 0, votes)
        there = seen.to_heads(seen.there, votes.shape[1])
        # Neighbours are tokens: between what was stored and what is new there may be empty slots and padding.
        order = jnp.argsort(~there, axis=-1, stable=True)
        pooled = neighbours(jnp.take_along_axis(votes, order, axis=-1), self.kernel, self.pool)
        votes = jnp.take_along_axis(pooled, jnp.argsort(order, axis=-1), axis=-1)
        return Choice(jnp.where(in_window, FIRST, seen.pool(votes)))


@dataclasses.dataclass(frozen=True)
class Pyramid(SnapKV):
    """As `snapkv`, more of the budget in low layers (PyramidKV, 2406.02069)."""

    by_prompt: ClassVar[bool] = True

    beta: float = 20.0  # how much thinner than the mean the last layer is

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.beta >= 1, "pyramid", f"beta={self.beta} is below 1")

    def layer_budgets(self, budget: int, layers: int, prompt: int, capacity: int) -> list[int]:
        mean = budget - self.window
        if layers == 1 or prompt < 2 * mean:
            return [budget] * layers
        low = mean / self.beta
        high = 2 * mean - low
        if high >= prompt - self.window:
            high = prompt - self.window
            low = 2 * mean - high
        exact = [high - layer * (high - low) / (layers - 1) for layer in range(layers)]
        whole = [int(share) for share in exact]
        by_remainder = sorted(range(layers), key=lambda layer: (whole[layer] - exact[layer], layer))
        for layer in by_remainder[: mean * layers - sum(whole)]:
            whole[layer] += 1
        return [share + self.window for share in whole]


def neighbours(votes: jax.Array, kernel: int, pool: str) -> jax.Array:
    """[B, H, C] pooled along C, zeros beyond the edges."""
    padded = jnp.pad(votes, ((0, 0), (0, 0), (kernel // 2, kernel // 2)))
    shifted = jnp.stack([padded[..., i : i + votes.shape[-1]] for i in range(kernel)])
    return shifted.max(0) if pool == "max" else shifted.mean(0)
