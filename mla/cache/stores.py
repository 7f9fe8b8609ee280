"""What a layer keeps between calls: declared by its mixer, made here, held by the layer's cache and the model's.

    Entries   streams with an entry for each beat of a clock: all tokens, a window of them, pooled ones
    State     arrays of constant size
    Tail      the newest tokens' inputs to something that looks back

Legend: B batch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mla.cache.clock import EVERY_TOKEN, Clock, Slots
from mla.cache.codecs import FIELD, Codec
from mla.cache.contract import STREAM, Store
from mla.cache.evicted import EvictedCache, Eviction
from mla.cache.merged import PairCache, PairHalf, Upper
from mla.cache.pages import Quest
from mla.cache.state import CodedArray, StateCache, TailCache
from mla.cache.tokens import TokenCache
from mla.errors import UserError


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """How one layer's entries and states are stored, and what leaves them.

    Attributes:
      codecs: of each stream and each state, by its name; None, or not there: as it is.
      eviction: what is to be kept; None: everything.
      read: what a decode step reads of it; None: what the layer itself chooses.
    """

    codecs: dict[str, Codec | None] = dataclasses.field(default_factory=dict)
    eviction: Eviction | None = None
    read: Quest | None = None


@dataclasses.dataclass(frozen=True)
class Entries:
    """Streams that have an entry for each beat of a clock.

    Attributes:
      like: a NamedTuple of shapes [1, 1, heads, ...], one entry's; None for a stream that is not there.
      clock: when entries come and go. Layers that declare equal clocks share their bookkeeping.
      dtype: of the arrays; None: the cache's.
      axes: what their leading axes mean.
    """

    like: Any
    clock: Clock = EVERY_TOKEN
    dtype: Any = None
    axes: tuple[str | None, ...] = STREAM.names

    def empty(
        self, batch: int, capacity: int, dtype: Any, plan: LayerPlan, name: str = "entries"
    ) -> TokenCache | EvictedCache:
        del name  # streams have names of their own
        dtype, eviction = self.dtype or dtype, plan.eviction
        if eviction is not None and not self.clock.refusal:
            return EvictedCache.empty(self.like, batch, capacity, dtype, eviction, self.owners(), plan.codecs)
        return TokenCache.empty(self.like, batch, capacity, dtype, self.clock, plan.codecs, self.axes)

    def streams(self) -> dict[str, tuple[int, ...]]:
        """What an entry leaves in each stream that has channels, [heads, ...]. (MLA's rotary key without RoPE has none.)"""
        named = zip(self.like._fields, self.like, strict=True)
        return {name: stream.shape[2:] for name, stream in named if stream is not None and stream.size}

    def owners(self) -> int:
        """Groups of heads that have entries of their own, so that each may keep other tokens; 1 where all share some."""
        heads = {stream.shape[2] for stream in jax.tree.leaves(self.like)}
        return heads.pop() if len(heads) == 1 else 1

    def check(self, codecs: dict[str, Codec | None], spec: str, stays: str = "") -> None:
        """Refuses codecs that code tokens later on where entries leave or change before.

        `stays` is `Mixer.stays`: where it says so, a token that is there in two forms meanwhile would not be found.

        Raises:
          UserError: naming `spec`, what they were asked for as.
        """
        rule, held = self.clock.refusal, [codec for codec in codecs.values() if codec and codec.held]
        if rule and held:
            window = f"on a sliding window of {self.clock.window} tokens" if self.clock.window else f"where a layer {rule}"
            raise UserError(
                f"{FIELD}: {spec!r} {window}: entries are gone before they are coded; use a codec that codes each entry as"
                " it is written, such as int4"
            )
        if stays and held:
            raise UserError(
                f"{FIELD}: {spec!r} where a layer {stays}: one that is coded later would be there in two forms; use a codec"
                " that codes each entry as it is written, such as int4"
            )


@dataclasses.dataclass(frozen=True)
class State:
    """Arrays of constant size, zero before the first token. A codec means them by the name of the store.

    Attributes:
      like: a pytree of shapes, without the batch, each with its dtype: fp32 for running sums (`wide_dtype`).
      axes: what the axes after the batch mean.
    """

    like: Any
    axes: tuple[str | None, ...] = ("head",)

    def empty(self, batch: int, capacity: int, dtype: Any, plan: LayerPlan, name: str = "state") -> StateCache:
        codec = plan.codecs.get(name)

        def zeros(like: Any) -> Any:
            whole = jax.ShapeDtypeStruct((batch, *like.shape), like.dtype)
            return CodedArray.zeros(whole, codec) if codec else jnp.zeros(whole.shape, whole.dtype)

        return StateCache(jax.tree.map(zeros, self.like), ("batch", *self.axes))

    def saved(self, codec: Codec) -> int:
        """Bytes that a codec takes less than the arrays as they are, for one sequence."""
        arrays = jax.tree.leaves(self.like)
        return sum(math.prod(a.shape) * a.dtype.itemsize - codec.unit_bytes(a.shape) for a in arrays)

    def check(self, codec: Codec | None, spec: str) -> None:
        """Refuses a codec that codes tokens later on.

        Raises:
          UserError: naming `spec`, what it was asked for as.
        """
        if codec is not None and codec.held:
            raise UserError(
                f"{FIELD}: {spec!r} on a state: it has no tokens that could be coded later; use a codec that codes each"
                " vector as it is written, such as int8"
            )


@dataclasses.dataclass(frozen=True)
class Tail:
    """Inputs of the newest tokens, zero before the first.

    Attributes:
      like: a pytree of shapes, what one token leaves.
      tokens: how many are kept: one fewer than what looks back spans, since the newest is there anyway.
      axes: what the axes of one token's arrays mean.
      dtype: of the arrays; None: the cache's.
    """

    like: Any
    tokens: int
    axes: tuple[str | None, ...] = ("head",)
    dtype: Any = None

    def empty(self, batch: int, capacity: int, dtype: Any, plan: LayerPlan, name: str = "tail") -> TailCache:
        del plan, name  # nothing is done to it
        kept = self.dtype or dtype
        zeros = jax.tree.map(lambda a: jnp.zeros((batch, self.tokens, *a.shape), kept), self.like)
        return TailCache(zeros, ("batch", "slot", *self.axes))


StoreSpec = Entries | State | Tail
PLAIN = LayerPlan()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """The stores of one layer, by their names.

    Attributes:
      stores: what is kept.
      names: static.
    """

    stores: tuple[Any, ...]
    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, **stores: Any) -> LayerCache:
        return cls(tuple(stores.values()), tuple(stores))

    def __getitem__(self, name: str) -> Any:
        return self.stores[self.names.index(name)]

    def replace(self, **changed: Any) -> LayerCache:
        """This cache with other stores under these of its names."""
        assert set(changed) <= set(self.names), (*changed, self.names)
        pairs = zip(self.names, self.stores, strict=True)
        return dataclasses.replace(self, stores=tuple(changed.get(name, store) for name, store in pairs))

    def mapped(self, function: Any) -> LayerCache:
        """This cache with function(store) in the place of each store."""
        return dataclasses.replace(self, stores=tuple(map(function, self.stores)))

    def content(self) -> Any:
        """The arrays that count as content when bytes are measured."""
        return [store.content() for store in self.stores]

    def bookkeeping(self) -> Any:
        """The arrays that only say where content stands, without those that a model keeps for several layers."""
        return [store.bookkeeping() for store in self.stores]

    def axes(self) -> LayerCache:
        """What the axes of its arrays mean, in their place; see `Meaning`."""
        return self.mapped(lambda store: store.axes())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelCache:
    """The caches of all layers, with the bookkeeping of each clock that layers have in common kept once.

    Attributes:
      layers: one cache a layer, None where it reads another's; stores without the slots of shared clocks.
      slots: one for each clock.
    """

    layers: tuple[LayerCache | None, ...]
    slots: tuple[Slots, ...]

    @classmethod
    def gather(cls, layers: Sequence[LayerCache | None]) -> ModelCache:
        """Takes the slots out of the stores of all layers: those of one clock store the same tokens."""
        slots: dict[Clock, Slots] = {}

        def bare(index: int, store: Any) -> Any:
            clock = _shared_clock(store)
            if clock is None:
                return store
            shared = slots.setdefault(clock, store.slots)
            assert shared.positions.shape == store.slots.positions.shape, "layers of one clock with room for other texts"
            if isinstance(store, PairHalf):
                return Upper() if store.half else store.join(layers[index + 1].stores[0])  # type: ignore[union-attr]
            return dataclasses.replace(store, slots=None)

        kept = [c and c.mapped(lambda store, index=index: bare(index, store)) for index, c in enumerate(layers)]
        return cls(tuple(kept), tuple(slots.values()))

    def layer(self, index: int) -> LayerCache | None:
        """The cache of one layer, complete."""
        slots, cache = {each.clock: each for each in self.slots}, self.layers[index]

        def whole(store: Any) -> Any:
            if isinstance(store, PairCache | Upper):
                half = int(isinstance(store, Upper))
                pair = self.layers[index - half]
                assert pair is not None
                return PairHalf(pair.stores[0], slots[EVERY_TOKEN], half)
            clock = _shared_clock(store)
            return store if clock is None else dataclasses.replace(store, slots=slots[clock])

        return cache and cache.mapped(whole)

    def content(self) -> Any:
        return [cache and cache.content() for cache in self.layers]

    def bookkeeping(self) -> Any:
        return [self.slots, [cache and cache.bookkeeping() for cache in self.layers]]

    def axes(self) -> ModelCache:
        """What the axes of its arrays mean, in their place; see `Meaning`."""
        return ModelCache(tuple(c and c.axes() for c in self.layers), tuple(each.axes() for each in self.slots))


def _shared_clock(store: Store) -> Clock | None:
    """The clock that a store has in common with those of other layers that declare it; None: its bookkeeping is its own."""
    clock: Clock | None = getattr(store, "clock", None)
    return None if clock is None or clock.heads else clock
