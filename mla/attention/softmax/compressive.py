"""Compressive attention (Compressive Transformer, Rae et al. 1911.05507): a memory of segments, the older part compressed.

The text is read in segments of n_s tokens, counted from position 0, where every text begins. A query sees its own segment up
to itself, the n_m tokens before the segment, and n_cm entries of c tokens each before those; what is older is forgotten:

    keys, values from [compressed ; memory ; segment], all of hidden activations, by one W_K and W_V
    compressed entry = f_c(h_1 .. h_c), a convolution with kernel and stride c, from d to d channels, with bias

When a segment is over, its tokens enter the memory, the n_s oldest leave it, and these are compressed. Empty places are not
attended to (Algorithm 1 has zeros there). Positions are by RoPE where the paper has Transformer-XL's: a compressed entry
stands where the first of its tokens does, and keys are rotated as they are read. Hidden activations are what the layer is
given, behind the norm of its block.

Training (`forward` at a step): memories carry no gradient, so that what a segment learns ends at its first token, and the
loss of the language model does not reach f_c. That learns from a loss of its own (`Output.losses`), with no other parameter:

    || attend(h, old) - attend(h, f_c(old)) ||_2 / sqrt(n_s H d_h)    h a segment, old the n_s tokens that leave after it

attend is this layer's attention without positions, its scale included; h, old and its weights are detached. The paper has
the norm as it is. Under Adam f_c learns the same from both; but where gradients are clipped by their global norm, that of
f_c would be most of it, and the others would shrink with it. A text of one batch is all there is: memories are empty where
it begins. All segments are computed at once, each against its own memory.

Remembers d elements a token of n_m + n_s, in a ring, and d for each of n_cm compressed entries: constant. Keys and values of
all of them are projected anew at each decode step.

Legend: B batch, T tokens, S new tokens, J segments, D = d model width, M groups of c tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mla.attention.contract import Output, Step, Surroundings, Term, constant, mechanism, require
from mla.attention.softmax.base import Expanded, Memory
from mla.cache.clock import Clock
from mla.cache.stores import Entries, LayerCache, State, StoreSpec
from mla.cache.tokens import TokenCache
from mla.layers.basic import Linear
from mla.ops.mask import Mask

MHAConfig, GroupedQuery = mechanism("mha")


class Hidden(NamedTuple):
    """What the layer was given, or what that was compressed to: [B, C, 1, D]."""

    hidden: jax.Array


@dataclasses.dataclass
class CompressiveConfig(MHAConfig):  # type: ignore[misc, valid-type]
    """Compressive attention.

    Paper: 1911.05507
    Remembers: hidden states of a memory and the open segment, and compressed ones before them
    Elements: d (n_m + n_s + n_cm), constant
    Use: a window with a longer, coarser one behind it; each step projects all of it anew
    """

    segment: int = 256  # n_s, tokens
    memory: int = 256  # n_m, tokens before the segment
    compressed_memory: int = 128  # n_cm, entries before the memory
    rate: int = 4  # c, tokens of a compressed entry

    def validate(self, around: Surroundings) -> None:
        super().validate(around)
        for name in ("segment", "compressed_memory", "rate"):
            require(getattr(self, name) >= 1, name, f"{getattr(self, name)} is not a positive number")
        enough = self.memory >= self.segment
        require(enough, "memory", f"{self.memory} is below segment {self.segment}: what leaves it must have been there")
        for name in ("segment", "memory"):
            whole = getattr(self, name) % self.rate == 0
            require(whole, name, f"{getattr(self, name)} is no multiple of rate {self.rate}, tokens that become one")
        require(self.window == 0, "window", "segment, memory and compressed_memory say what is seen; set it to 0")

    def cache_formula(self, around: Surroundings) -> list[Term]:
        """The compressed memory is there from the start."""
        kept = Term(around.d_model, window=self.memory + self.segment)
        return [kept, constant(around.d_model * self.compressed_memory, itemsize=0)]


class Compressive(GroupedQuery):  # type: ignore[misc, valid-type]
    """Multi-head attention over segments, a memory and a compressed memory of hidden activations."""

    paged: ClassVar[bool] = False  # keys are made on read
    private: ClassVar[str] = "a memory that its own convolution compresses"

    def __init__(self, config: CompressiveConfig, around: Surroundings, *, rngs: Any):
        super().__init__(config, around, rngs=rngs)
        width, make = around.d_model, {"rngs": rngs, "dtype": around.dtype}
        self.compression = Linear(config.rate * width, width, ("model", None), use_bias=True, **make)

    def entries(self, x: jax.Array, positions: jax.Array) -> Hidden:
        return Hidden(x[:, :, None])

    def shift(self, entries: Hidden, by: jax.Array) -> Hidden:
        return entries  # keys are rotated on read

    def expanded(self, queries: jax.Array, entries: Hidden, mask: Mask) -> Expanded:
        seen = super().entries(entries.hidden[:, :, 0], mask.entry_positions)
        return super().expanded(queries, seen, mask)  # type: ignore[no-any-return]

    def compress(self, x: jax.Array) -> jax.Array:
        """f_c of tokens [B, T, D], those behind the last whole group left out: [B, T // c, D]."""
        batch, length, width = x.shape
        count, rate = length // self.config.rate, self.config.rate
        return self.compression(x[:, : count * rate].reshape(batch, count, rate * width))

    # ------------------------------------------------------------------------------------------------------------- FLOPs

    sparing: ClassVar[tuple[str, ...]] = ("key", "value", "compression")

    def seen(self, tokens: int) -> int:
        config, at = self.config, tokens - 1
        own, before = at % config.segment + 1, at // config.segment * config.segment
        compressed = max(0, before - config.memory) // config.rate
        return int(own + min(before, config.memory) + min(compressed, config.compressed_memory))

    def mixing_flops(self, tokens: int, decode: bool = False) -> float:
        """Keys and values are made anew of all that is seen: by each decoded token, or by each segment. Every token is
        compressed once."""
        config, (width, channels) = self.config, self.key.kernel.shape
        segment_end = -(-tokens // config.segment) * config.segment
        made = self.seen(tokens) if decode else self.seen(segment_end) / config.segment
        return float(super().mixing_flops(tokens, decode)) + 4.0 * width * channels * made + 2.0 * width * width

    # ------------------------------------------------------------------------------------------------- all tokens at once

    def __call__(self, x: jax.Array, positions: jax.Array | None = None) -> jax.Array:
        if positions is None:
            return self.segments(x, x, self.compress(x))
        empty = self.init_cache(x.shape[0], x.shape[1], self.around.dtype)
        return self.extend(x, jnp.broadcast_to(positions, x.shape[:2]), empty)[0]

    def segments(self, x: jax.Array, old: jax.Array, compressed: jax.Array) -> jax.Array:
        """Outputs [B, T, D] of tokens 0 .. T-1.

        Args:
          x: [B, T, D]; `old`: the same numbers as a memory has them.
          compressed: [B, T // c, D].
        """
        (batch, length, width), config = x.shape, self.config
        starts = jnp.arange(0, length, config.segment, dtype=jnp.int32)[:, None]
        own = jnp.pad(x, ((0, 0), (0, -length % config.segment), (0, 0)))
        own = own.reshape(batch, -1, config.segment, width)
        tokens = starts + jnp.arange(-config.memory, config.segment)
        groups = (starts - config.memory) // config.rate + jnp.arange(-config.compressed_memory, 0)
        kept = [_rows(compressed, groups), _rows(old, tokens[:, : config.memory]), own]
        stands = jnp.concatenate([jnp.maximum(groups * config.rate, -1), jnp.maximum(tokens, -1)], axis=1)

        def together(a: jax.Array) -> jax.Array:
            return a.reshape(-1, *a.shape[2:])

        where = jnp.broadcast_to(tokens[:, config.memory :], own.shape[:3])
        memory = Memory(
            self.entries(together(jnp.concatenate(kept, axis=2)), where),
            together(jnp.broadcast_to(stands, (batch, *stands.shape))),
        )
        return self.read(together(own), together(where), memory).reshape(batch, -1, width)[:, :length]

    def forward(
        self, x: jax.Array, positions: jax.Array | None = None, memory: Any = None, step: Step | None = None
    ) -> Output:
        """At a step, which takes no positions but 0 .. T-1, memories without gradient, and the loss of f_c for each segment
        that has tokens leave, [B, segments]; none where the text is too short."""
        if step is None:
            return super().forward(x, positions, memory)  # type: ignore[no-any-return]
        old = jax.lax.stop_gradient(x)
        compressed = self.compress(old)
        y = self.segments(x, old, jax.lax.stop_gradient(compressed))
        segment, first = self.config.segment, -(-(self.config.memory - self.config.segment + 1) // self.config.segment)
        starts = range(first * segment, x.shape[1] - segment + 1, segment)
        if not starts:
            return Output(y, {}, {})
        loss = self.compression_loss(old, compressed, jnp.asarray(starts, jnp.int32)[:, None])
        return Output(y, {"compression": loss}, {"compression_loss": jnp.mean(loss)})

    def compression_loss(self, x: jax.Array, compressed: jax.Array, starts: jax.Array) -> jax.Array:
        """Root mean square of attend(h, old) - attend(h, f_c(old)) for segments at int32 [J, 1]: [B, J] in fp32 at least.

        x: [B, T, D], detached; `compressed` [B, T // c, D] has the gradient of f_c.
        """
        (batch, _, width), config = x.shape, self.config
        graph, state = nnx.split(self)
        frozen = nnx.merge(graph, jax.lax.stop_gradient(state))
        within, leaves = jnp.arange(config.segment), starts - config.memory
        here = jnp.zeros((1, config.segment), jnp.int32)
        queries = frozen.queries(_rows(x, starts + within).reshape(-1, config.segment, width), here)

        def attended(hidden: jax.Array, index: jax.Array) -> jax.Array:
            there = jnp.broadcast_to(jnp.where(index >= 0, 0, -1).astype(jnp.int32), (batch, *index.shape))
            mask = Mask(jnp.zeros(queries.shape[:2], jnp.int32), there.reshape(-1, index.shape[1]))
            heads = frozen.attend(queries, Hidden(_rows(hidden, index).reshape(-1, index.shape[1], 1, width)), mask)
            return heads.reshape(batch, -1, *heads.shape[1:]).astype(jnp.promote_types(heads.dtype, jnp.float32))

        groups = leaves // config.rate + jnp.arange(config.segment // config.rate)
        difference = attended(x, leaves + within) - attended(compressed, groups)
        square = jnp.mean(difference**2, axis=(2, 3))
        return jnp.sqrt(jnp.maximum(square, jnp.finfo(square.dtype).tiny))  # no difference has no gradient

    # ------------------------------------------------------------------------------------------------------------ decoding

    def stores(self) -> dict[str, StoreSpec]:
        """A ring of the memory and the open segment, and the compressed memory, the newest last."""
        config, width = self.config, self.around.d_model
        like = jax.ShapeDtypeStruct((config.compressed_memory, width), self.around.dtype)
        ring = Entries(self.streams(), Clock(window=config.memory + config.segment))
        return {"entries": ring, "compressed_memory": State(like, ("slot",))}

    def groups(self, tokens: jax.Array) -> jax.Array:
        """How many groups have been compressed after int32 tokens: of those that left the memory with whole segments."""
        config = self.config
        return jnp.maximum(tokens // config.segment * config.segment - config.memory, 0) // config.rate

    def closes(self, tokens: jax.Array) -> jax.Array:
        """Where the first segment begins before which so many tokens, int32, have left the memory."""
        return -(-(tokens + self.config.memory) // self.config.segment) * self.config.segment

    def extend(self, x: jax.Array, positions: jax.Array, cache: LayerCache) -> tuple[jax.Array, LayerCache]:
        before, kept, config = cache["entries"], cache["compressed_memory"], self.config
        count = self._ring(before)[1] + 1
        had, has = self.groups(count), self.groups(jnp.maximum(count, positions.max(axis=1) + 1))
        has = jnp.minimum(has, had + self._closing(x.shape[1]))
        seen, ring = before.extend(self.entries(x, positions), positions)
        hidden = seen.read(x.dtype).hidden
        new = self.compress_leaving(hidden[:, :, 0], positions, before, had, has)
        line = jnp.concatenate([kept.state.astype(new.dtype), new], axis=1)
        index = had[:, None] + jnp.arange(-config.compressed_memory, new.shape[1], dtype=jnp.int32)
        index = jnp.where((index >= 0) & (index < has[:, None]), index, -1)
        memory = Memory(
            Hidden(jnp.concatenate([hidden, line[:, :, None]], axis=1)),
            jnp.concatenate([seen.positions, jnp.maximum(index * config.rate, -1)], axis=1),
            since=jnp.concatenate([jnp.zeros_like(seen.positions), self.closes((index + 1) * config.rate)], axis=1),
            until=jnp.concatenate(
                [self.closes(seen.positions + 1), self.closes((index + 1 + config.compressed_memory) * config.rate)], axis=1
            ),
        )
        newest = (has - had)[:, None] + jnp.arange(config.compressed_memory)
        held = kept.holding(jnp.take_along_axis(line, newest[..., None], axis=1).astype(self.around.dtype), positions)
        return self.read(x, positions, memory), cache.replace(entries=ring, compressed_memory=held)

    def compress_leaving(
        self, hidden: jax.Array, positions: jax.Array, before: TokenCache, had: jax.Array, has: jax.Array
    ) -> jax.Array:
        """f_c of the tokens that leave as segments close among S new ones: [B, N, D], of which the first `has - had` count.

        Nothing is computed where no row has a segment close.

        Args:
          hidden: [B, E, D], what the new tokens see of the ring: as it was before them, with them behind; one new token sees
            the ring after it.
          before: the ring before them.
          had, has: groups compressed before and after, int32 [B].
        """
        (batch, length), (slots, newest), rate = positions.shape, self._ring(before), self.config.rate
        count = self._closing(length)

        def computed() -> jax.Array:
            tokens = had[:, None] * rate + jnp.arange(count * rate)
            first = jnp.argmax(positions >= 0, axis=1)[:, None]
            fresh = slots + first + tokens - jnp.take_along_axis(positions, first, axis=1)
            stored = (tokens <= newest[:, None]) | (hidden.shape[1] == slots)
            index = jnp.clip(jnp.where(stored, tokens % slots, fresh), 0, hidden.shape[1] - 1)
            return self.compress(jnp.take_along_axis(hidden, index[..., None], axis=1))

        nothing = jnp.zeros((batch, count, hidden.shape[2]), hidden.dtype)
        return jax.lax.cond((has > had).any(), computed, lambda: nothing)

    def _ring(self, ring: TokenCache) -> tuple[int, jax.Array]:
        """Slots of the ring, and where the newest token of each row stands, int32 [B], -1 before the first."""
        assert ring.slots is not None
        return ring.slots.positions.shape[1], ring.slots.newest()[1]

    def _closing(self, length: int) -> int:
        """Groups that so many new tokens can have compressed at most."""
        return -(-length // self.config.segment) * self.config.segment // self.config.rate


def _rows(a: jax.Array, index: jax.Array) -> jax.Array:
    """a [B, T, D] at index [J, n]: [B, J, n, D]; some row where there is none."""
    if not a.shape[1]:
        return jnp.zeros((a.shape[0], *index.shape, a.shape[2]), a.dtype)
    return a[:, jnp.clip(index, 0, a.shape[1] - 1)]
