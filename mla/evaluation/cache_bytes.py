"""Bytes of a model's cache: read off live arrays, off abstract ones, and off the papers' formulas, which must agree."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from mla import config as configs
from mla import model as models
from mla.attention.contract import Mixer, Term, constant, mechanism
from mla.cache import merged, meter, pages
from mla.cache.clock import Clock
from mla.cache.codecs import Codec
from mla.cache.evicted import Eviction, formula_bytes
from mla.cache.plan import WHOLE, CachePlan
from mla.cache.stores import ModelCache
from mla.errors import UserError
from mla.evaluation.contract import Column, Measure, MeasuredRow, Section, Subject, XPosition
from mla.evaluation.decoding import Decoder, batch_multiple, positions, round_up
from mla.model import Model
from mla.strict_json import Count

NOTE = """Hollow: a window or a state is held whatever the length, so bytes per token has no meaning; shown are the
bytes held at the evaluation context divided by the context. Longer contexts move these points left."""
LENGTHS = (1024, 8192, 131072)  # tokens at which every model's cache is sized
STEP = 64  # tokens between the two caches whose difference is the growth, times what codecs need; pooling strides divide it


def formulas(config: configs.Config) -> list[list[Term]]:
    """The papers' figures, one a layer; nothing for layers that read another's entries."""
    around = configs.around(config)
    layers = configs.layers(config.model)
    return [layer.config.cache_formula(around) if layer.source is None else [] for layer in layers]


class LayerBytes(Protocol):
    """Content bytes of one layer's cache for one sequence, by formulas.

    Attributes:
      unit, window: bytes grow by `growth` a token between multiples of `unit` tokens that are not below `window`.
    """

    @property
    def unit(self) -> int: ...

    @property
    def window(self) -> int: ...

    @property
    def growth(self) -> float: ...

    def at(self, length: int) -> int:
        """Bytes for a text of so many tokens."""


@dataclasses.dataclass(frozen=True)
class PlainBytes:
    """`LayerBytes` by the paper's terms, in a cache whose dtype takes `itemsize` bytes an element."""

    terms: tuple[Term, ...]
    itemsize: int

    @property
    def unit(self) -> int:
        return math.lcm(*(term.stride or 1 for term in self.terms))

    @property
    def window(self) -> int:
        return max((term.stride * (term.window or 0) for term in self.terms), default=0)

    @property
    def growth(self) -> float:
        return sum(term.growth(self.itemsize) for term in self.terms)

    def at(self, length: int) -> int:
        return sum(term.bytes_at(length, self.itemsize) for term in self.terms)


class CodedStream(NamedTuple):
    """What an entry of a clock leaves in a stream, [heads, ..., width], and how that is stored; None: as it is."""

    clock: Clock
    shape: tuple[int, ...]
    codec: Codec | None


def coded_streams(mixer: Mixer, spec: str) -> tuple[CodedStream, ...]:
    """The streams of all stores of a mixer, as a codec specification has them stored."""
    chosen = mixer.codecs(spec)
    stores = ((store.clock, store.streams()) for store in mixer.entry_stores())
    return tuple(CodedStream(clock, shape, chosen[name]) for clock, each in stores for name, shape in each.items())


def coded_states(mixer: Mixer, spec: str) -> tuple[Term, ...]:
    """What codecs change of the papers' figures for a mixer's states: bytes, below 0."""
    chosen = mixer.codecs(spec)
    coded = ((state, chosen[name]) for name, state in mixer.states().items())
    return tuple(constant(-state.saved(codec), itemsize=1) for state, codec in coded if codec)


@dataclasses.dataclass(frozen=True)
class CodedBytes:
    """`LayerBytes` where codecs say how many bytes entries take, and how many a state saves of the paper's constant terms.

    Attributes:
      constants: those terms, and `coded_states`.
      itemsize: bytes of an element that is not coded.
      streams: everything else.
    """

    constants: tuple[Term, ...]
    itemsize: int
    streams: tuple[CodedStream, ...]

    @property
    def unit(self) -> int:
        return math.lcm(*(clock.period * (codec.unit if codec else 1) for clock, _, codec in self.streams))

    @property
    def window(self) -> int:
        held = (clock.stride * max(clock.window or 0, codec.held if codec else 0) for clock, _, codec in self.streams)
        return max(held, default=0)

    @property
    def growth(self) -> float:
        return sum(
            (codec.unit_bytes(shape) / codec.unit if codec else math.prod(shape) * self.itemsize) * clock.growth
            for clock, shape, codec in self.streams
        )

    def at(self, length: int) -> int:
        total = sum(term.bytes_at(length, self.itemsize) for term in self.constants)
        for clock, shape, codec in self.streams:
            entries = clock.slots(length)
            plain = entries * math.prod(shape) * self.itemsize
            total += codec.allocated_bytes(shape, self.itemsize, entries) if codec else plain
        return total


@dataclasses.dataclass(frozen=True)
class EvictedBytes:
    """`LayerBytes` of a layer that entries leave, after a prompt of so many tokens.

    Attributes:
      whole: the layer if they stayed.
      eviction: the model's.
      owners: groups of heads that choose for themselves.
      place: (index, number) among the layers that entries leave.
    """

    whole: PlainBytes | CodedBytes
    eviction: Eviction
    owners: int
    place: tuple[int, int]
    unit: ClassVar[int] = 1

    @property
    def window(self) -> int:
        # A pyramid's lowest layer has up to twice the mean.
        return 2 * self.eviction.budget

    @property
    def growth(self) -> float:
        return self.at(self.window + 1) - self.at(self.window)

    def at(self, length: int) -> int:
        index, number = self.place
        slots = self.eviction.slots(number, length, length)[index][0]
        return formula_bytes(self.eviction, self.owners, slots, self.whole.at(1))


@dataclasses.dataclass(frozen=True)
class PairBytes:
    """`LayerBytes` of two layers whose entries are merged, after a prompt of so many tokens.

    Attributes:
      merge: the model's.
      streams: of either layer.
      itemsize: bytes of an element that is not coded.
    """

    merge: merged.MiniCache
    streams: tuple[CodedStream, ...]
    itemsize: int

    @property
    def unit(self) -> int:
        return math.lcm(self.merge.unit, *(stream.codec.unit for stream in self.streams if stream.codec))

    @property
    def window(self) -> int:
        return max([0, *(stream.codec.held for stream in self.streams if stream.codec)])

    @property
    def growth(self) -> float:
        start = round_up(self.window, self.unit)
        return (self.at(start + self.unit) - self.at(start)) / self.unit

    def at(self, length: int) -> int:
        return merged.formula_bytes(self.merge, [stream[1:] for stream in self.streams], self.itemsize, length)


@dataclasses.dataclass(frozen=True)
class PagedBytes:
    """`LayerBytes` of a layer with bounds of its pages.

    Attributes:
      whole: the layer without them.
      quest: the model's.
      elements: of a token's keys.
      itemsize: bytes of one of them.
    """

    whole: PlainBytes | CodedBytes
    quest: pages.Quest
    elements: int
    itemsize: int

    @property
    def unit(self) -> int:
        return math.lcm(self.whole.unit, self.quest.page)

    @property
    def window(self) -> int:
        return self.whole.window

    @property
    def growth(self) -> float:
        return self.whole.growth + self.bounds(self.quest.page) / self.quest.page

    def bounds(self, length: int) -> int:
        """Bytes beside the layer's entries."""
        return pages.formula_bytes(self.quest, self.elements, self.itemsize, length)

    def at(self, length: int) -> int:
        return self.whole.at(length) + self.bounds(length)


def stored(config: configs.Config, eviction: Eviction | None = None) -> list[LayerBytes]:
    """The bytes of each layer by `formulas`, as `config.eval.cache` and `eviction` have them stored.

    Raises:
      UserError: a codec codes tokens together that may leave apart, or of which there are none.
    """
    itemsize, spec = jnp.dtype(config.model.dtype).itemsize, config.eval.cache.codec
    layers, around = configs.layers(config.model), configs.around(config)
    each: list[Any] = []
    evicted: list[tuple[int, int]] = []  # layer, owners
    for index, (terms, layer) in enumerate(zip(formulas(config), layers, strict=True)):
        plain = PlainBytes(tuple(terms), itemsize)
        if not terms or (spec == "none" and eviction is None):
            each.append(plain)
            continue
        mixer = _abstract_mixer(layer, around)
        streams, constants = coded_streams(mixer, spec), tuple(term for term in terms if not term.stride)
        constants += coded_states(mixer, spec)
        each.append(plain if spec == "none" else CodedBytes(constants, itemsize, streams))
        if eviction is not None and mixer.evictable:
            evicted.append((index, mixer.owners()))
            if any(stream.codec.held for stream in streams if stream.codec):
                raise UserError(
                    f"config.eval.cache.codec: {spec!r} codes tokens together and {config.eval.cache.evict} has some of them"
                    " leave; choose a codec that stores each token by itself, such as int4"
                )
    for number, (index, owners) in enumerate(evicted):
        assert eviction is not None
        each[index] = EvictedBytes(each[index], eviction, owners, (number, len(evicted)))
    read = pages.reading(config.eval.cache.read)
    for index, layer in enumerate(layers):
        if read is not None and layer.source is None and index >= read.start:
            mixer = _abstract_mixer(layer, around)
            if mixer.pageable:
                elements = sum(math.prod(key.shape) for key in mixer.page_shapes())
                each[index] = PagedBytes(each[index], read, elements, itemsize)
    merge = merged.merge(config.eval.cache.merge)
    if merge is not None:
        for lower in merge.pairs(len(each)):
            streams = coded_streams(_abstract_mixer(layers[lower], around), spec)
            each[lower : lower + 2] = PairBytes(merge, streams, itemsize), PlainBytes((), itemsize)
    return each


def _abstract_mixer(layer: configs.LayerSpec, around: Any) -> Mixer:
    """A layer's mixer without arrays, as shapes."""
    build = functools.partial(mechanism(layer.name)[1], layer.config, around)
    return nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0)))


def budget_tokens(config: configs.Config, eviction: Eviction, budget_bytes: int) -> int:
    """Entries a layer that so many bytes of one sequence hold, with their scores, in the layers that entries can leave."""
    return budget_bytes // sum(layer.at(1) for layer in stored(config, eviction) if isinstance(layer, EvictedBytes))


def formula_bytes_at(config: configs.Config, length: int, eviction: Eviction | None = None) -> int:
    """Content bytes of one sequence of `length` tokens, all layers, by the formulas."""
    return sum(layer.at(length) for layer in stored(config, eviction))


def formula_growth(config: configs.Config, eviction: Eviction | None = None) -> int | float:
    """Content bytes that one more token adds in the long run, all layers, by the formulas."""
    return _plain(sum(layer.growth for layer in stored(config, eviction)))


def abstract_model(config: configs.Config, vocab_size: int) -> Model:
    """A model of shapes: enough to size its caches, whatever its size."""
    return nnx.eval_shape(lambda: models.create(config, vocab_size))


def abstract_bytes_at(model: Model, length: int, plan: CachePlan = WHOLE) -> int:
    """Content bytes of one sequence of `length` tokens, all layers, of a cache that is never allocated.

    `model` may be abstract too.
    """
    return meter.content_bytes_at(lambda length: model.init_cache(1, length, plan=plan), length)


def lengths_to_compare(config: configs.Config, eviction: Eviction | None = None) -> tuple[int, int]:
    """Two lengths, in tokens, beyond every window: content grows at its long-run rate between them."""
    layers = stored(config, eviction)
    step = math.lcm(STEP, *(layer.unit for layer in layers))
    first = round_up(max(step, *(layer.window for layer in layers)), step)
    return first, first + step


def filled(model: Model, mesh: Mesh, length: int, plan: CachePlan = WHOLE) -> ModelCache:
    """A live cache that `length` tokens went through, one sequence for every device that a batch is split over."""
    decoder = Decoder(model, batch_multiple(mesh), length, mesh, plan)

    def fill(model: Model, cache: ModelCache, tokens: jax.Array, where: jax.Array) -> tuple[jax.Array, ModelCache]:
        return model.extend(tokens, where, cache, last_only=True)

    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (decoder.batch, length), dtype=np.int32)
    _, cache = decoder.compiled(fill)(decoder.empty(), tokens, positions(decoder.batch, 0, length))
    return jax.block_until_ready(cache)


def read_bytes_per_step(model: Model, length: int, plan: CachePlan = WHOLE) -> int:
    """Content bytes that one decode step reads of one sequence of `length` tokens.

    What several layers share counts once for each of them: sharing saves memory, not bandwidth.
    """
    cache = jax.eval_shape(lambda: model.init_cache(1, length, plan=plan))
    layers = [cache.layer(index) for index in range(len(model.blocks))]
    read = [0 if layer is None else b.mixer.read_bytes(layer) for b, layer in zip(model.blocks, layers, strict=True)]
    return sum(read[layer if source is None else source] for layer, source in enumerate(model.sources))


def measure(
    config: configs.Config, model: Model, mesh: Mesh, plan: CachePlan = WHOLE, lengths: Iterable[int] = LENGTHS
) -> dict[str, Any]:
    """The `cache` object of eval.json, in bytes of one sequence over all layers.

    bytes_per_token, constant_bytes, elements_per_token_per_layer and the per-device figure come from two live caches,
    bytes_at and read_bytes_per_step from abstract ones at `lengths` and at the context of the evaluation.

    Raises:
      UserError: the arrays and the formulas disagree.
    """
    growth_formula = formula_growth(config, plan.eviction)
    short, long = lengths_to_compare(config, plan.eviction)
    caches = [filled(model, mesh, length, plan) for length in (short, long)]
    batch, step = batch_multiple(mesh), long - short

    def growth(measured: Any) -> float:
        """Bytes that a token adds to the cache of one sequence in the long run."""
        low, high = (measured(cache) for cache in caches)
        return (high - low) / step / batch

    def require(what: str, found: float, length: int) -> None:
        expected = formula_bytes_at(config, length, plan.eviction)
        if found != expected:
            raise UserError(
                f"eval: the {what} of {configs.describe(config.model)} holds {found:,.10g} bytes a sequence,"
                f" its formula says {expected:,}"
            )

    for cache, length in zip(caches, (short, long), strict=True):
        require(f"live cache after {length} tokens", meter.content_bytes(cache) / batch, length)
    per_token = growth(meter.content_bytes)
    if not math.isclose(per_token, growth_formula, rel_tol=1e-9):
        raise UserError(
            f"eval: the live cache of {configs.describe(config.model)} grows by {per_token:g} bytes a token,"
            f" its formula says {growth_formula:g}"
        )

    sizes = sorted({*lengths, config.evaluated_context})
    bytes_at = {length: abstract_bytes_at(model, length, plan) for length in sizes}
    for length, found in bytes_at.items():
        require(f"abstract cache for {length} tokens", found, length)
    return {
        "dtype": _dtype(*caches),
        "bytes_per_token": _plain(per_token),
        "bytes_per_token_formula": growth_formula,
        "elements_per_token_per_layer": _plain(growth(_elements) / config.model.num_layers),
        "constant_bytes": _plain(meter.content_bytes(caches[0]) / batch - per_token * short),
        "bookkeeping_bytes_per_token": _plain(growth(meter.bookkeeping_bytes)),
        "bytes_at": {str(length): found for length, found in bytes_at.items()},
        "read_bytes_per_step": {str(length): read_bytes_per_step(model, length, plan) for length in sizes},
        # The fullest device holds its rows of the batch: one sequence.
        "bytes_per_token_per_device": _plain(growth(meter.content_bytes_per_device) * batch),
    }


def _elements(cache: ModelCache) -> int:
    return sum(array.size for array in jax.tree.leaves(cache.content()))


def _dtype(short: ModelCache, long: ModelCache) -> str:
    """Name of the dtype of the arrays that grow with the text, or of all content where none does."""
    pairs = list(zip(jax.tree.leaves(short.content()), jax.tree.leaves(long.content()), strict=True))
    growing = [b for a, b in pairs if a.shape != b.shape] or [b for _, b in pairs]
    return "+".join(sorted({str(array.dtype) for array in growing}))


def _plain(number: float) -> int | float:
    """A number as int where it is whole, otherwise as float."""
    return int(number) if number == int(number) else number


@dataclasses.dataclass(frozen=True)
class Figures:
    """Bytes in an eval.json; see `measure`, and `perplexity.Perplexity.held` for those after a window."""

    bytes_per_token: Count
    constant_bytes: Count
    dtype: str = ""
    bytes_per_token_formula: Count | None = None
    bytes_at: Mapping[str, Count] = dataclasses.field(default_factory=dict)
    read_bytes_per_step: Mapping[str, Count] = dataclasses.field(default_factory=dict)
    bytes_after_window: Count | None = None
    bookkeeping_after_window: Count | None = None


def of_row(row: MeasuredRow) -> Figures:
    """The figures of a row: every one has them."""
    figures = row.figures(Figures)
    assert figures is not None
    return figures


def live(row: MeasuredRow) -> float | None:
    """Content bytes a token of the window that live arrays hold when its last token is through, of one sequence."""
    return _per_token(of_row(row).bytes_after_window, row)


def live_positions(row: MeasuredRow) -> float | None:
    """Bytes a token of the window of what says where entries stand, when its last token is through, of one sequence."""
    return _per_token(of_row(row).bookkeeping_after_window, row)


def step_reads(row: MeasuredRow) -> float | None:
    """Content bytes that a decode step after a whole window reads, a token of the window, of one sequence."""
    return _per_token(of_row(row).read_bytes_per_step.get(_context(row)), row)


def reads_less(row: MeasuredRow) -> bool:
    """Whether a decode step leaves some of what is held unread, after a whole window or a longer text."""
    held, read = of_row(row).bytes_at, of_row(row).read_bytes_per_step
    return any(read[length] < held[length] for length in held.keys() & read.keys())


def _sparse(length: str, read: bool) -> Callable[[MeasuredRow], float | None]:
    """Bytes held, or read by a decode step, after a text of so many tokens ('': the window), of rows that read less."""

    def value(row: MeasuredRow) -> float | None:
        figures = of_row(row).read_bytes_per_step if read else of_row(row).bytes_at
        return figures.get(length or _context(row)) if reads_less(row) else None

    return value


def _context(row: MeasuredRow) -> str:
    """The window of the evaluation as a key of `Figures.bytes_at`; '' where it is not known."""
    return f"{row.context:g}" if row.context else ""


def _per_token(held: float | None, row: MeasuredRow) -> float | None:
    return held / row.context if held is not None and row.context else None


class CacheBytes(Measure):
    """Bytes of the cache, read off live arrays and held against the papers' formulas."""

    schema: ClassVar = {"cache": Figures}
    always: ClassVar = ("cache",)
    always_of_tricks: ClassVar = ("cache.bytes_after_window",)
    columns: ClassVar = (
        Column("B/token", lambda row: of_row(row).bytes_per_token, ",.10g"),
        Column("formula", lambda row: of_row(row).bytes_per_token_formula, ",.10g"),
        Column("constant B", lambda row: of_row(row).constant_bytes, ",.10g"),
        Column("B at 8,192", lambda row: of_row(row).bytes_at.get("8192"), ",.10g"),
    )
    trick_columns: ClassVar = (
        Column("live B/token", live, ",.1f"),
        Column("positions", live_positions, ",.1f", always=False),
    )
    section: ClassVar = Section(
        "## Bytes held and bytes read\n\nOf points whose decode step reads some of what it holds: content bytes of one"
        " sequence, after a window of the evaluation and after 8,192 tokens.",
        tuple(
            Column(title, _sparse(length, read), ",.10g")
            for title, length, read in (
                ("held", "", False),
                ("read", "", True),
                ("held at 8,192", "8192", False),
                ("read at 8,192", "8192", True),
            )
        ),
    )

    def measure(self, subject: Subject) -> dict[str, Any]:
        return {"cache": measure(subject.config, subject.model, subject.mesh, subject.plan)}

    def said(self, figures: dict[str, Any], config: configs.Config) -> str:
        cache = figures["cache"]
        return (
            f"cache {cache['bytes_per_token']:,} bytes a token (formula {cache['bytes_per_token_formula']:,}), and"
            f" {cache['constant_bytes']:,} whatever the length; {cache['dtype']}"
        )

    def place(self, row: MeasuredRow) -> XPosition | None:
        """Bytes that a token adds; of a window, a state or a trick what is held, over the tokens of the context."""
        cache = of_row(row)
        if not row.trained and not cache.constant_bytes:
            return XPosition(cache.bytes_per_token)
        held = live(row) if row.trained else _per_token(cache.bytes_at.get(_context(row)), row)
        return None if held is None else XPosition(held, NOTE)
