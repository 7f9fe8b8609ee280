"""What softmax mechanisms inherit: caches, windows, chunks, sinks, soft caps, output gates, and reading another layer.

A mechanism writes three small functions: `queries` of the new tokens, `entries` (what is remembered, and the only thing that
is cached) and `expanded` (queries, keys and values as the heads see them). Because entries are all there is, everything here
is written once.

    remember  x -> Memory: the entries of the tokens seen so far and where each stands, with or without a cache
    read      x, Memory -> y: attention over a memory that may be this layer's own or another layer's

Legend: B batch, T tokens of a training batch, S new tokens, C entries, D model width, H query heads.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from mla.attention.contract import MechanismConfig, Mixer, Surroundings, Term, require
from mla.cache.clock import Clock, by_head, overwritten
from mla.cache.meter import content_bytes, tree_bytes
from mla.cache.pages import PageCache
from mla.cache.stores import PLAIN, Entries, LayerCache, LayerPlan, StoreSpec
from mla.cache.tokens import Seen, Streams
from mla.layers.basic import FROM_HEADS, TO_HEADS, Linear, merge_heads, vector
from mla.ops.attention import attention_weights, softmax_attention
from mla.ops.mask import Mask


@dataclasses.dataclass
class SoftmaxConfig(MechanismConfig):
    """Fields that every softmax mechanism has. A subclass writes `elements` and gets its cache formula."""

    rope_theta: float = 0.0  # base of the rotation; 0: the model's
    window: int = 0  # tokens a query sees, its own included; the cache becomes a ring of as many; 0: all before it
    sink: bool = False  # a learned logit a head that joins the softmax and has no value (gpt-oss, 2508.10925)
    soft_cap: float = 0.0  # logits become cap * tanh(logits / cap) (Gemma 2, 2408.00118); 0: off
    output_gate: bool = False  # heads are multiplied by sigmoid(x W_gate) before W_O (Qwen3-Next; 2505.06708)

    def theta(self, around: Surroundings) -> float:
        return self.rope_theta or around.rope_theta

    def elements(self, around: Surroundings) -> int:
        """Stored elements a token, by the paper's formula."""
        raise NotImplementedError

    def visible(self) -> int | None:
        """Tokens after which the cache stops growing."""
        return self.window or None

    def cache_formula(self, around: Surroundings) -> list[Term]:
        return [Term(self.elements(around), window=self.visible())]


C = TypeVar("C", bound=SoftmaxConfig)
Q = TypeVar("Q")  # what `queries` makes
E = TypeVar("E", bound=Streams)  # what `entries` makes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Memory(Generic[E]):
    """Entries that queries may look at, and where they stand.

    Attributes:
      entries: the mechanism's streams, [B, C, ...] each.
      positions: int32 [B, C] or [B, C, K], where each entry stands; -1: nothing there.
      contiguous: static; the entries are those of the queries' own tokens, at positions 0 .. C-1 (training).
      since, until: lifetimes of entries, see `Mask`.
      pages: of the cache, among which a decoded token's queries choose; None: they do not.
      beside: what is remembered beside entries, by which queries choose among them.
      seen: entries that come out of a cache, as they are stored there. A kernel that knows their codes reads them instead of
        `entries`, which is then not computed.
    """

    entries: E
    positions: jax.Array
    contiguous: bool = dataclasses.field(default=False, metadata={"static": True})
    since: jax.Array | None = None
    until: jax.Array | None = None
    pages: PageCache | None = None
    beside: Any = None
    seen: Seen | None = None

    def mask(self, query_positions: jax.Array, window: int | None = None, chunk: int | None = None) -> Mask:
        """Which of the entries queries at int32 [B, S] see; `window` and `chunk` in tokens."""
        return Mask(query_positions, self.positions, window, chunk, self.contiguous, self.since, self.until)


class NewEntries(NamedTuple, Generic[E]):
    """What S tokens leave in a layer.

    Attributes:
      entries: streams [B, S, ...].
      cache: with the traces of these tokens in all stores but that of entries; None without a cache.
      joins: bool [B, S] or, where key heads differ, [B, S, K]: whether an entry takes the place of the one before it; None:
        none does.
      beside: see `Memory`.
    """

    entries: E
    cache: LayerCache | None
    joins: jax.Array | None = None
    beside: Any = None


Parts = tuple[jax.Array, ...]


class Expanded(NamedTuple):
    """Queries, keys and values as the heads see them, and the factor on their logits: arguments of `softmax_attention`.

    Queries are parts [B, S, H, D_i], keys parts [B, C, K_i, D_i], values [B, C, K_v, Dv].
    """

    queries: Parts
    keys: Parts
    values: jax.Array
    scale: float


class SoftmaxMixer(Mixer[C, Memory[E]], Generic[C, Q, E]):
    """Attention by softmax over remembered entries. Subclasses write three small functions and call `make_output`.

    Type parameters: C, its config; Q, what `queries` makes; E, the NamedTuple of streams that `entries` makes.
    `window` and `chunk` (static, tokens or None) describe visibility; both make the cache a ring.
    """

    private: ClassVar[str] = ""
    chunk: int | None = None
    out: Any  # heads side by side -> the model's channels

    def __init__(self, config: C, around: Surroundings, *, rngs: nnx.Rngs):
        super().__init__(config, around, rngs=rngs)
        self.num_heads, self.window = config.heads(around), config.window or None

    def make_output(self, v_head_dim: int, rngs: nnx.Rngs, out: nnx.Module | None = None) -> None:
        """Makes W_O for H heads of `v_head_dim` channels, unless `out` is in its place, and the gate and the sinks that the
        config switches on."""
        width = self.num_heads * v_head_dim
        make: dict[str, Any] = {"rngs": rngs, "dtype": self.around.dtype}
        self.out = out or Linear(width, self.around.d_model, FROM_HEADS, gain=self.around.residual_gain, **make)
        self.gate = Linear(self.around.d_model, width, TO_HEADS, **make) if self.config.output_gate else None
        self.sink = vector(0.02 * jax.random.normal(rngs.params(), (self.num_heads,))) if self.config.sink else None

    def queries(self, x: jax.Array, positions: jax.Array) -> Q:
        """Queries of new tokens x [B, S, D] at int32 positions [B, S] or [1, S], in whatever form `expanded` takes them."""
        raise NotImplementedError

    def entries(self, x: jax.Array, positions: jax.Array) -> E:
        """Entries of tokens x [B, S, D] at int32 positions [B, S] or [1, S]: streams [B, S, ...], all that is cached."""
        raise NotImplementedError

    def shift(self, entries: E, by: jax.Array) -> E:
        """Entries [B, C, ...] as if each stood `by` tokens later, int32 [B, C]: rotated further. Here nothing is rotated."""
        del by
        return entries

    def expanded(self, queries: Q, entries: E, mask: Mask) -> Expanded:
        """Keys and values of every head, built from the entries, which stand at `mask.entry_positions`."""
        raise NotImplementedError

    def attend(self, queries: Q, entries: E, mask: Mask) -> jax.Array:
        """How queries and entries meet: head outputs [B, S, H * v_head_dim], before the output projection."""
        seen = self.expanded(queries, entries, mask)
        return merge_heads(self.softmax(seen.queries, seen.keys, seen.values, mask, seen.scale))

    def new_entries(self, x: jax.Array, positions: jax.Array, cache: LayerCache | None) -> NewEntries[E]:
        """What tokens x [B, S, D] at int32 [B, S] or [1, S] leave; and the cache with its other stores, if any, after them.

        A mechanism whose entries depend on earlier tokens, or take one another's place, overrides it.
        """
        return NewEntries(self.entries(x, positions), cache)

    def remember(
        self, x: jax.Array, positions: jax.Array | None = None, cache: LayerCache | None = None
    ) -> tuple[Memory[E], LayerCache | None]:
        """The entries of x [B, S, D], and those from before in a cache. No positions means 0 .. S-1 in every row."""
        where = _positions(x, positions)
        new, cache, joins, beside = self.new_entries(x, where, cache)
        where = jnp.broadcast_to(where, x.shape[:2])
        if cache is None:
            if joins is None:
                return Memory(new, where, positions is None, beside=beside), None
            until = overwritten(joins, where)
            return Memory(new, by_head(where, until), positions is None and until.ndim == 2, until=until), None
        store, pages = cache["entries"], None
        if "pages" in cache.names:
            pages = cache["pages"].extend(self.page_keys(new), where, store.slots)
            cache = cache.replace(pages=pages)
            pages = pages if x.shape[1] == 1 else None  # prompts look at everything
        replacing = () if joins is None else (joins,)
        seen, store = store.extend(self._turned(store.unrotated(), new, -where), where, *replacing)
        entries = self._turned(store.unrotated(), seen.read(self.around.dtype), seen.positions)
        where = seen.positions
        if seen.moved is not None:
            entries, where = self.shift(entries, seen.moved), where + seen.moved
        lives = {"since": seen.since, "until": seen.until}
        return Memory(entries, where, **lives, pages=pages, beside=beside, seen=seen), cache.replace(entries=store)

    def _turned(self, names: list[str], entries: E, by: jax.Array) -> E:
        """Streams of these names, which are stored before their rotation, as if they stood `by` tokens later."""
        if not names:
            return entries
        turned = self.shift(entries, by)
        return entries._replace(**{name: getattr(turned, name) for name in names})

    def read(self, x: jax.Array, positions: jax.Array | None, memory: Memory[E]) -> jax.Array:
        """Attention of x [B, S, D] over a memory: this layer's or another layer's."""
        where = _positions(x, positions)
        mask, queries = memory.mask(jnp.broadcast_to(where, x.shape[:2]), self.window, self.chunk), self.queries(x, where)
        chosen = self.choose(x, where, queries, memory, mask)
        mask = mask if chosen is None else dataclasses.replace(mask, chosen=chosen)
        return self.finish(x, self.attend(queries, memory.entries, mask))

    def finish(self, x: jax.Array, heads: jax.Array) -> jax.Array:
        """Outputs of x [B, S, D] from what its heads gave, [B, S, H * v_head_dim]."""
        return self.out(heads * jax.nn.sigmoid(self.gate(x)) if self.gate else heads)

    def choose(self, x: jax.Array, positions: jax.Array, queries: Q, memory: Memory[E], mask: Mask) -> jax.Array | None:
        """Which entries of a memory queries read: int32 [B, S, G, N] as `Mask.chosen`. None, here: all that they see.

        Args:
          x: [B, S, D] at int32 positions [B, S] or [1, S], of which `queries` are the queries.
          mask: what they see.
        """
        if memory.pages is None or memory.seen is None or memory.seen.lengths is None:
            return None
        return memory.pages.choose(self.page_queries(queries), memory.seen.lengths, memory.positions.shape[1])

    # ------------------------------------------------------------------------------------- what a decode step reads

    paged: ClassVar[bool] = False  # whether `page_keys` and `page_queries` are written

    def page_keys(self, entries: E) -> Parts:
        """Keys as queries meet them where they are cached, parts [B, C, K_i, D_i]."""
        raise NotImplementedError

    def page_queries(self, queries: Q) -> Parts:
        """Queries as they meet `page_keys`, parts [B, S, H, D_i]: logits are their products, up to what all keys share."""
        raise NotImplementedError

    @property
    def pageable(self) -> bool:
        return self.paged and self.evictable

    def page_shapes(self) -> Parts:
        return jax.eval_shape(self.page_keys, self.streams())

    def init_cache(self, batch: int, capacity: int, dtype: DTypeLike, plan: LayerPlan = PLAIN) -> LayerCache:
        cache = super().init_cache(batch, capacity, dtype, plan)
        if plan.read is None:
            return cache
        pages = PageCache.empty(self.page_shapes(), batch, capacity, dtype, plan.read)
        return LayerCache((*cache.stores, pages), (*cache.names, "pages"))

    def reads(self, tokens: int) -> dict[str, int]:
        """Entries that one decode step gathers of a cache of so many tokens, by the names of streams, for one sequence.

        A stream that is not named is read whole, as one that is scanned in order to choose is. Where heads that share an
        entry choose apart, it is read once: what they choose together is counted as if no two chose alike.
        """
        return {}

    def read_bytes(self, cache: LayerCache) -> int:
        """Content bytes that one decode step touches of a cache, live or abstract: what is scanned, and what is chosen."""
        total = 0
        for name, store in zip(cache.names, cache.stores, strict=True):
            streams = getattr(store, "streams", None)
            if streams is None:
                total += content_bytes(store)
                continue
            positions = getattr(store.slots, "positions", store.slots)
            held = positions.shape[1]
            chosen = self.reads(held)
            if "pages" in cache.names and name == "entries":
                heads = self.num_heads // min(key.shape[2] for key in self.page_shapes())
                chosen = dict.fromkeys(streams._fields, cache["pages"].quest.tokens(held, heads))
            for field, stream in zip(streams._fields, streams, strict=True):
                share = min(chosen.get(field, held), held)
                total += math.ceil(tree_bytes(stream) * share / held) if held else 0
        return total

    # ------------------------------------------------------------------------------------------------------------- FLOPs

    def pair_flops(self) -> float:
        """FLOPs of one query and one entry, over all heads: a logit each, and a share of a value."""
        raise NotImplementedError

    def seen(self, tokens: int) -> int:
        """Entries that the last of so many tokens attends to."""
        within = (tokens - 1) % self.chunk + 1 if self.chunk else tokens
        return min(within, self.window or within)

    def mixing_flops(self, tokens: int, decode: bool = False) -> float:
        return self.pair_flops() * self.seen(tokens)

    def __call__(self, x: jax.Array, positions: jax.Array | None = None) -> jax.Array:
        return self.read(x, positions, self.remember(x, positions)[0])

    def streams(self) -> E:
        """The shapes [1, 1, ...] of one token's entries."""
        graph, state = nnx.split(self)
        token = jax.ShapeDtypeStruct((1, 1, self.around.d_model), self.around.dtype)
        position = jax.ShapeDtypeStruct((1, 1), jnp.int32)
        return jax.eval_shape(lambda s, x, p: nnx.merge(graph, s).entries(x, p), state, token, position)

    def stores(self) -> dict[str, StoreSpec]:
        return {"entries": Entries(self.streams(), Clock(window=self.window or self.chunk))}

    def extend(self, x: jax.Array, positions: jax.Array, cache: LayerCache) -> tuple[jax.Array, LayerCache]:
        memory, after = self.remember(x, positions, cache)
        assert after is not None
        return self.read(x, positions, memory), after

    def softmax(self, queries: Parts, keys: Parts, values: jax.Array, mask: Mask, scale: float) -> jax.Array:
        """The shared softmax op, with this layer's cap and sinks: [B, S, H, Dv]. Arguments as `softmax_attention`."""
        around = self.around
        where: dict[str, Any] = {"backend": around.backend, "platform": around.platform, "spread": around.spread}
        return softmax_attention(queries, keys, values, mask, scale=scale, **where, **self.modifiers())

    def weights(self, logits: jax.Array, mask: Mask) -> jax.Array:
        """Scaled logits [B, S, H, C] -> what each head gives each entry, with cap and sinks as in `softmax`."""
        return attention_weights(logits, mask, **self.modifiers())

    def modifiers(self) -> dict[str, Any]:
        """This layer's cap and sinks, as the ops of `mla.ops.attention` take them."""
        return {"soft_cap": self.config.soft_cap or None, "sink": None if self.sink is None else self.sink[...]}


def _positions(x: jax.Array, positions: jax.Array | None) -> jax.Array:
    """int32 [B, T], or [1, T] by default: rotations broadcast over the batch."""
    return jnp.arange(x.shape[1], dtype=jnp.int32)[None] if positions is None else positions


# ---------------------------------------------------------------------- mechanisms that have two exact ways to attend

FORMS = ("auto", "expanded", "absorbed")


@dataclasses.dataclass
class AbsorbingConfig(SoftmaxConfig):
    """The config of a mechanism whose keys or values are linear in its entries."""

    attend: str = "auto"  # auto: whichever form costs fewer FLOPs for this many new tokens; expanded; absorbed

    def validate(self, around: Surroundings) -> None:
        super().validate(around)
        require(self.attend in FORMS, "attend", f"{self.attend!r} is none of {', '.join(FORMS)}")


@dataclasses.dataclass(frozen=True)
class Cost:
    """FLOPs of one way to attend, over all heads.

    Attributes:
      entry: once for each entry: what is built from it.
      query: once for each query: what is folded into it.
      pair: for each query and entry.
    """

    pair: float
    entry: float = 0.0
    query: float = 0.0

    def total(self, queries: int, entries: int) -> float:
        return queries * entries * self.pair + entries * self.entry + queries * self.query


A = TypeVar("A", bound=AbsorbingConfig)


class AbsorbingMixer(SoftmaxMixer[A, Q, E], Generic[A, Q, E]):
    """Attention with two exact ways to attend: *expanded* builds keys and values from the entries, as training wants it;
    *absorbed* moves the up-projections to the query and behind the softmax, so that decoding looks at the entries as they
    are stored."""

    def costs(self) -> tuple[Cost, Cost]:
        """The FLOPs of the expanded and of the absorbed form."""
        raise NotImplementedError

    def pair_flops(self) -> float:
        return self.cost(decode=False).pair

    def cost(self, decode: bool, entries: int = 0) -> Cost:
        """Of the form that runs: for one token after so many entries, or for all of a text of the model's context."""
        new, entries = (1, entries) if decode else (self.around.context, self.around.context)
        return self.costs()[self.absorbs(new, entries)]

    def mixing_flops(self, tokens: int, decode: bool = False) -> float:
        """In training every token is an entry, once; a decoded one has what is built from entries built for all of them."""
        seen = self.seen(tokens)
        cost = self.cost(decode, seen)
        return cost.pair * seen + cost.query + cost.entry * (seen if decode else 1)

    attend_expanded = SoftmaxMixer.attend

    def attend_absorbed(self, queries: Q, entries: E, mask: Mask) -> jax.Array:
        """Head outputs [B, S, H * v_head_dim] as `attend` gives them, without building keys and values of every head."""
        raise NotImplementedError

    def attend(self, queries: Q, entries: E, mask: Mask) -> jax.Array:
        if mask.chosen is None:
            absorbed = self.absorbs(mask.query_positions.shape[1], mask.entry_positions.shape[1])
        else:  # no two queries need have chosen alike: keys and values of every head would be copied for each
            absorbed = self.config.attend != "expanded"
        return (self.attend_absorbed if absorbed else self.attend_expanded)(queries, entries, mask)

    def absorbs(self, new: int, entries: int) -> bool:
        """Whether the absorbed form costs fewer FLOPs for `new` queries over `entries` (or the config says so)."""
        if self.config.attend != "auto":
            return bool(self.config.attend == "absorbed")
        expanded, absorbed = self.costs()
        return absorbed.total(new, entries) < expanded.total(new, entries)
