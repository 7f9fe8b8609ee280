"""Patterns: grouped-query attention whose queries read what stands at certain places, whatever is in it.

    strided         s in [t - l, t], or t - s a multiple of l                            Sparse Transformer (1904.10509)
    fixed_columns   floor(s / l) = floor(t / l), or s mod l in {l - c, .., l - 1}        Sparse Transformer (1904.10509)
    dilated         t - s in {0, d, 2 d, .., (W - 1) d}                                  Longformer (2004.05150)
    big_bird        s in the first g blocks, in the block of t and the w - 1 before it,  BigBird (2007.14062)
                    or in r blocks between them that are drawn once

all with s <= t. Of the Sparse Transformer's ways to combine its two patterns this is the merged one: every head reads both.
BigBird is an encoder: made causal, its global tokens are keys for all but do not read everything. Its blocks are drawn by a
hash of `pattern_seed`, the layer, the key head and the query's block, so that any split of a text reads the same ones.

What a pattern never reads again leaves the cache, where a clock can say so. `dilated` holds the (W - 1) d + 1 newest tokens,
in a ring. `fixed_columns` holds columns, c of every l tokens, and a ring for the others: l + c T / l tokens of T. With
`strided` a column depends on the query, and with `big_bird` any block may be drawn later: both hold everything, and read
little of it.

Legend: B batch, S queries, H query heads, K key heads, G groups of heads that read the same, N tokens that a query reads.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from mla.attention.contract import Surroundings, Term, mechanism, require
from mla.attention.softmax.base import Memory
from mla.attention.sparse.base import BY_PLACE, SparseMixer, slots_among, slots_at
from mla.cache.clock import Clock
from mla.cache.stores import Entries, StoreSpec
from mla.ops.mask import Mask

GQAConfig, GroupedQuery = mechanism("gqa")


@dataclasses.dataclass
class PatternConfig(GQAConfig):  # type: ignore[misc, valid-type]
    """A pattern: what `tokens` says."""

    def clock(self) -> Clock:
        """Which tokens are held: here all."""
        return Clock()

    def tokens(self, at: jax.Array, longest: int, around: Surroundings) -> jax.Array:
        """The tokens that queries read, each once.

        Args:
          at: int32 [B, S], positions of queries, -1 for padding.
          longest: tokens of a text, at most: none stands further back.

        Returns:
          int32 [B, S, G, N], positions; below 0: none. Those behind the query are not read either.
        """
        raise NotImplementedError

    def count(self, tokens: int, around: Surroundings) -> float:
        """How many of so many tokens the last of them reads, on average over query heads."""
        raise NotImplementedError

    def validate(self, around: Surroundings) -> None:
        super().validate(around)
        require(self.window == 0, "window", "the pattern says what is seen; set it to 0")

    def positive(self, *fields: str) -> None:
        for name in fields:
            require(getattr(self, name) >= 1, name, f"{getattr(self, name)} is not a positive number")


@dataclasses.dataclass
class StridedConfig(PatternConfig):
    """Strided attention: the newest tokens, and every l-th before them.

    Paper: 1904.10509
    Remembers: k and v of K heads
    Elements: 2 K d_h
    Use: texts with a period, such as rows of an image; reads about 2 sqrt(T) of T tokens with l = sqrt(T)
    """

    stride: int = 32  # l, tokens

    def validate(self, around: Surroundings) -> None:
        super().validate(around)
        self.positive("stride")

    def count(self, tokens: int, around: Surroundings) -> float:
        return min(tokens, self.stride + 1) + max(0, (tokens - 1) // self.stride - 1)

    def tokens(self, at: jax.Array, longest: int, around: Surroundings) -> jax.Array:
        columns = self.stride * np.arange(2, (longest - 1) // self.stride + 1)
        back = np.concatenate([np.arange(min(self.stride + 1, longest)), columns]).astype(np.int32)
        return at[..., None, None] - back


@dataclasses.dataclass
class FixedColumnsConfig(PatternConfig):
    """Fixed attention: the query's block, and the last tokens of every block before it.

    Paper: 1904.10509
    Remembers: k and v of c of every l tokens, and of the others of one block
    Elements: 2 K d_h c / l, and 2 K d_h for at most l - c tokens
    Use: blocks that a few tokens sum up; the others leave the cache
    """

    stride: int = 128  # l, tokens of a block
    columns: int = 16  # c, tokens of a block that later blocks read, its last ones

    def validate(self, around: Surroundings) -> None:
        super().validate(around)
        self.positive("stride", "columns")
        fits = self.columns <= self.stride
        require(fits, "columns", f"{self.columns} is above stride {self.stride}, tokens of a block")

    def clock(self) -> Clock:
        return Clock(window=self.stride, kept=self.columns)

    def cache_formula(self, around: Surroundings) -> list[Term]:
        """A block's columns have room from its first token on."""
        entry = self.elements(around)
        columns = Term(entry * self.columns, stride=self.stride, open=True)
        return [columns, Term(entry, window=self.stride - self.columns)] if self.columns < self.stride else [columns]

    def count(self, tokens: int, around: Surroundings) -> float:
        blocks, own = divmod(tokens - 1, self.stride)
        return own + 1 + blocks * self.columns

    def tokens(self, at: jax.Array, longest: int, around: Surroundings) -> jax.Array:
        blocks = self.stride * np.arange(1, -(-(longest - 1) // self.stride) + 1)
        columns = np.arange(self.stride - self.columns, self.stride) - blocks[:, None]
        own = np.concatenate([np.arange(self.stride), columns.reshape(-1)]).astype(np.int32)
        return jnp.where(at >= 0, at // self.stride * self.stride, -self.stride)[..., None, None] + own


@dataclasses.dataclass
class DilatedConfig(PatternConfig):
    """A dilated window: every d-th of the newest tokens.

    Paper: 2004.05150
    Remembers: k and v of the newest (W - 1) d + 1 tokens, in a ring
    Elements: 2 K d_h, at most (W - 1) d + 1 tokens
    Use: windows that look back further for the same reads, beside heads that look at everything near
    """

    tokens_read: int = 64  # W, tokens that a head reads, the query's own included
    dilation: int = 2  # d, from one to the next; 1: a window
    dilated_heads: int = 0  # query heads that are dilated, the last ones; the others read the W newest tokens; 0: all

    def validate(self, around: Surroundings) -> None:
        super().validate(around)
        self.positive("tokens_read", "dilation")
        heads = self.heads(around)
        require(self.dilated_heads <= heads, "dilated_heads", f"{self.dilated_heads} is above num_heads {heads}")

    def visible(self) -> int:
        return (self.tokens_read - 1) * self.dilation + 1

    def clock(self) -> Clock:
        return Clock(window=self.visible())

    def count(self, tokens: int, around: Surroundings) -> float:
        dilated = min(self.tokens_read, (tokens - 1) // self.dilation + 1)
        share = (self.dilated_heads or self.heads(around)) / self.heads(around)
        return share * dilated + (1 - share) * min(tokens, self.tokens_read)

    def tokens(self, at: jax.Array, longest: int, around: Surroundings) -> jax.Array:
        heads = self.heads(around) if self.dilated_heads else 1
        dilated = np.arange(heads) >= heads - (self.dilated_heads or heads)
        back = np.arange(min(self.tokens_read, longest)) * np.where(dilated, self.dilation, 1)[:, None]
        return at[..., None, None] - back.astype(np.int32)


@dataclasses.dataclass
class BigBirdConfig(PatternConfig):
    """The first blocks, the newest, and some drawn ones between.

    Paper: 2007.14062
    Remembers: k and v of K heads
    Elements: 2 K d_h
    Use: reads the same number of tokens at any length; which ones is drawn, not learned
    """

    block: int = 64  # tokens a block
    global_blocks: int = 2  # g, the first of the text
    window_blocks: int = 3  # w, the query's own and those before it
    random_blocks: int = 3  # r, between them
    pattern_seed: int = 0  # of the draw

    def validate(self, around: Surroundings) -> None:
        super().validate(around)
        self.positive("block", "window_blocks")

    def count(self, tokens: int, around: Surroundings) -> float:
        before, own = divmod(tokens - 1, self.block)
        return own + 1 + min(before, self.global_blocks + self.window_blocks - 1 + self.random_blocks) * self.block

    def tokens(self, at: jax.Array, longest: int, around: Surroundings) -> jax.Array:
        heads = self.kv_heads(around)
        own = jnp.where(at >= 0, at // self.block, -1)[..., None, None]
        first = own - self.window_blocks + 1  # of the window
        near = jnp.where(own >= 0, first + np.arange(self.window_blocks, dtype=np.int32), -1)
        start = jnp.arange(self.global_blocks, dtype=jnp.int32)
        start = jnp.where(start < first, start, -1)
        drawn = self.drawn(own[..., 0], jnp.arange(heads), first[..., 0] - self.global_blocks, around.layer)
        parts = [jnp.broadcast_to(part, (*at.shape, heads, part.shape[-1])) for part in (start, drawn, near)]
        blocks = jnp.concatenate(parts, axis=-1)[..., None]
        tokens = blocks * self.block + np.arange(self.block, dtype=np.int32)
        return jnp.where(blocks >= 0, tokens, -1).reshape(*at.shape, heads, -1)

    def drawn(self, block: jax.Array, head: jax.Array, count: jax.Array, layer: int) -> jax.Array:
        """Random blocks of queries in a block, for a key head, of as many as there are to draw from: int32 [..., r].

        The three broadcast, int32. Floyd's algorithm: no block is drawn twice, every set is as likely as another; -1 where
        there are fewer than r.
        """
        seed = _hash(jnp.asarray(self.pattern_seed + 1, jnp.uint32), layer, head, block)
        found: list[jax.Array] = []
        for number in range(self.random_blocks):
            last = count - self.random_blocks + number
            draw = _hash(seed, number) % jnp.maximum(last + 1, 1).astype(jnp.uint32)
            draw = draw.astype(jnp.int32)
            taken = jnp.any(jnp.stack([draw == other for other in found]), axis=0) if found else False
            found.append(jnp.where(last < 0, -1, jnp.where(taken, last, draw)))
        drawn = [jnp.where(each < 0, -1, each + self.global_blocks) for each in found]
        return jnp.stack(drawn, axis=-1) if drawn else jnp.zeros((*seed.shape, 0), jnp.int32)


def _hash(seed: jax.Array, *numbers: Any) -> jax.Array:
    """uint32 of a seed and of int32 numbers, which broadcast: MurmurHash3's last step, once for each."""
    for number in numbers:
        seed = seed * np.uint32(31) + jnp.asarray(number).astype(jnp.uint32)
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            seed = (seed ^ seed >> np.uint32(shift)) * np.uint32(factor)
        seed ^= seed >> np.uint32(16)
    return seed


class Pattern(SparseMixer, GroupedQuery):  # type: ignore[misc, valid-type, type-arg]
    """Grouped-query attention over the tokens that a pattern names."""

    stays: ClassVar[str] = BY_PLACE

    def stores(self) -> dict[str, StoreSpec]:
        return {"entries": Entries(self.streams(), self.config.clock())}

    def choose(self, x: jax.Array, positions: jax.Array, queries: Any, memory: Memory, mask: Mask) -> jax.Array:
        new, longest, clock = x.shape[1], memory.positions.shape[1], self.config.clock()
        ring = memory.seen is not None and clock.window is not None
        if ring and clock.kept:
            held = longest - (new if new > 1 else 0)  # several new tokens stand behind those that are stored
            longest = max(longest, clock.window * -(-held // clock.kept))
        wanted = self.config.tokens(mask.query_positions, longest, self.around)
        wanted = jnp.where(wanted <= mask.query_positions[..., None, None], wanted, -1)
        return (slots_among if ring else slots_at)(wanted, memory.positions)

    def mixing_flops(self, tokens: int, decode: bool = False) -> float:
        return float(self.pair_flops()) * self.config.count(tokens, self.around)

    def reads(self, tokens: int) -> dict[str, int]:
        """What its key heads read, on average. Where some tokens stay and others leave, it is all that is held, at most."""
        if self.config.clock().kept:
            return {}
        last = jnp.full((1, 1), tokens - 1, jnp.int32)
        wanted = np.asarray(self.config.tokens(last, tokens, self.around))[0, 0]
        sets = [set(row[(row >= 0) & (row < tokens)].tolist()) for row in wanted]
        of_query = [sets[head * len(sets) // self.num_heads] for head in range(self.num_heads)]
        groups = np.array_split(np.arange(self.num_heads), self.num_kv_heads)
        read = [len(set().union(*(of_query[head] for head in group))) for group in groups]
        return dict.fromkeys(("key", "value"), math.ceil(sum(read) / len(read)))
