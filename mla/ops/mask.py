"""Who may look at what: a description of visibility, never a T x T array.

Legend: B batch, S queries, C entries, H query heads, K key heads.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    """Causal visibility over positions, optionally within a window or a chunk.

    A query at position t sees an entry at position s iff `0 <= s <= t`, and `t - s < window` when a window is set
    (a window of W counts the query's own token), and `t // chunk == s // chunk` when a chunk is set. Position -1 marks
    padding (as a query: sees nothing, its output is zero) or an empty slot (as an entry: seen by nobody).

    Attributes:
      query_positions: int32 [B, S].
      entry_positions: int32 [B, C], in any order: a ring or an evicted cache is as good as a full one. [B, C, K] where
        key heads have kept different entries; query head h then looks at those of key head h // (H // K).
      window, chunk: static sizes in tokens, or None.
      contiguous: static promise that S == C and both positions are 0, 1, .., S-1 in every row, so that an op may skip
        tiles above the diagonal (and outside the window) without looking at the arrays.
      since, until: an entry's lifetime, int32 shaped as entry_positions or None: queries at `since <= t < until` see it.
        A token that is stored anew has one entry for each form, and every query sees the form of its time.
      chosen: int32 [B, S, G, N], the entries that each query has chosen for each of G groups of heads, -1 for none; it reads
        no others (`mla.ops.attention.selected_attention`). None: it reads all that it sees.
    """

    query_positions: Int[Array, "B S"]
    entry_positions: Int[Array, "B C *K"]
    window: int | None = dataclasses.field(default=None, metadata={"static": True})
    chunk: int | None = dataclasses.field(default=None, metadata={"static": True})
    contiguous: bool = dataclasses.field(default=False, metadata={"static": True})
    since: Int[Array, "B C *K"] | None = None
    until: Int[Array, "B C *K"] | None = None
    chosen: Int[Array, "B S _ _"] | None = None

    def visible(self) -> Bool[Array, "B S C *K"]:
        """The mask as bool [B, S, C] or [B, S, C, K]. Ops call it on descriptions of tiles, small inputs whole."""
        entry = self.entry_positions[:, None]
        query = self.query_positions.reshape(*self.query_positions.shape, *(1,) * (entry.ndim - 2))
        since, until = (None if a is None else a[:, None] for a in (self.since, self.until))
        return self.sees(query, entry, since, until)

    def sees(self, query: jax.Array, entry: jax.Array, since: jax.Array | None, until: jax.Array | None) -> jax.Array:
        """Whether queries at these positions see entries at these, with these lifetimes: int32 that broadcast -> bool."""
        seen = (entry >= 0) & (entry <= query)
        if self.window is not None:
            seen &= query - entry < self.window
        if self.chunk is not None:
            seen &= query // self.chunk == entry // self.chunk
        if since is not None:
            seen &= query >= since
        if until is not None:
            seen &= query < until
        return seen

    def by_head(self, heads: int) -> Bool[Array, "B _ S C"]:
        """`visible` for H heads: bool [B, H, S, C], or [B, 1, S, C] where all heads see the same."""
        seen = self.visible()
        if seen.ndim == 3:
            return seen[:, None]
        return jnp.repeat(jnp.moveaxis(seen, 3, 1), heads // seen.shape[3], axis=1)

    def at(self, query_positions: Int[Array, "B S"], entries: slice = slice(None)) -> Mask:
        """The mask of other queries over some of the entries; it is no longer contiguous."""
        since, until = (None if a is None else a[:, entries] for a in (self.since, self.until))
        return Mask(query_positions, self.entry_positions[:, entries], self.window, self.chunk, False, since, until)
