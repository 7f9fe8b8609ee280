"""What a mechanism must provide, and the registry.

A mechanism is one file: a config dataclass and a module. The module is a `Mixer`; the equation it must satisfy, tested
for every mechanism in every split, is

    mixer(x, positions) == mixer.extend(x, positions, empty cache) == any sequence of extends over pieces of x

Two kinds inherit most of it: `mla.attention.softmax.base.SoftmaxMixer`, whose subclasses differ in `queries`, `entries` and
`expanded`, and `mla.attention.recurrent.base.RecurrentMixer`, whose subclasses declare `stores` and write `recur`.

Legend: B batch, T tokens of a training batch, S new tokens, D model width.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import ClassVar, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from mla import errors
from mla.cache.codecs import Codec, codecs
from mla.cache.evicted import Eviction
from mla.cache.meter import content_bytes
from mla.cache.pages import Quest
from mla.cache.stores import PLAIN, Entries, LayerCache, LayerPlan, State, StoreSpec
from mla.errors import UserError, nearest
from mla.layers.basic import declared
from mla.registry import load

# name -> where its config and its module stand. One line a mechanism.
REGISTRY = {
    "mha": "mla.attention.softmax.grouped_query:MHAConfig:GroupedQuery",
    "mqa": "mla.attention.softmax.grouped_query:MQAConfig:GroupedQuery",
    "gqa": "mla.attention.softmax.grouped_query:GQAConfig:GroupedQuery",
    "mla": "mla.attention.softmax.mla:MLAConfig:MLA",
    "grouped_latent": "mla.attention.softmax.grouped_latent:GroupedLatentConfig:GroupedLatent",
    "low_rank_blocks": "mla.attention.softmax.low_rank_blocks:LowRankBlocksConfig:LowRankBlocks",
    "temporal_latent": "mla.attention.softmax.temporal_latent:TemporalLatentConfig:TemporalLatent",
    "grouped_tied": "mla.attention.softmax.grouped_tied:GroupedTiedConfig:GroupedTied",
    "tensor_product": "mla.attention.softmax.tensor_product:TensorProductConfig:TensorProduct",
    "multi_matrix": "mla.attention.softmax.multi_matrix:MultiMatrixConfig:GroupedQuery",
    "multi_matrix_kr": "mla.attention.softmax.multi_matrix:KeyReuseConfig:KeyReuse",
    "dmc": "mla.attention.softmax.dmc:DMCConfig:DMC",
    "slim": "mla.attention.softmax.slim:SlimConfig:Slim",
    "sliding_window": "mla.attention.softmax.sliding_window:SlidingWindowConfig:GroupedQuery",
    "chunked": "mla.attention.softmax.chunked:ChunkedConfig:Chunked",
    "chunked_global": "mla.attention.softmax.chunked:ChunkedGlobalConfig:Chunked",
    "compressive": "mla.attention.softmax.compressive:CompressiveConfig:Compressive",
    "compressed": "mla.attention.softmax.compressed:CompressedConfig:HeavilyCompressed",
    "block_mixture": "mla.attention.sparse.block_mixture:BlockMixtureConfig:BlockMixture",
    "deepseek_sparse": "mla.attention.sparse.deepseek_sparse:DeepseekSparseConfig:DeepseekSparse",
    "native_sparse": "mla.attention.sparse.native_sparse:NativeSparseConfig:NativeSparse",
    "strided": "mla.attention.sparse.patterns:StridedConfig:Pattern",
    "fixed_columns": "mla.attention.sparse.patterns:FixedColumnsConfig:Pattern",
    "dilated": "mla.attention.sparse.patterns:DilatedConfig:Pattern",
    "big_bird": "mla.attention.sparse.patterns:BigBirdConfig:Pattern",
    "compressed_sparse": "mla.attention.sparse.compressed_sparse:CompressedSparseConfig:CompressedSparse",
    "linear": "mla.attention.recurrent.linear:LinearConfig:LinearAttention",
    "retention": "mla.attention.recurrent.retention:RetentionConfig:Retention",
    "lightning": "mla.attention.recurrent.lightning:LightningConfig:Lightning",
    "gated_linear": "mla.attention.recurrent.gated_linear:GatedLinearConfig:GatedLinear",
    "mamba2": "mla.attention.recurrent.mamba2:Mamba2Config:Mamba2",
    "delta": "mla.attention.recurrent.delta:DeltaConfig:Delta",
    "gated_delta": "mla.attention.recurrent.gated_delta:GatedDeltaConfig:GatedDelta",
    "kimi_delta": "mla.attention.recurrent.kimi_delta:KimiDeltaConfig:KimiDelta",
    "gated_delta_2": "mla.attention.recurrent.gated_delta_2:GatedDelta2Config:GatedDelta2",
    "short_convolution": "mla.attention.recurrent.short_convolution:ShortConvolutionConfig:GatedShortConvolution",
}
BASELINES = ("mha", "gqa")  # with which others are compared, unless somebody says with which
MATCHED = "mha"  # the model of this mechanism is the one whose number of parameters all others are given


@dataclasses.dataclass(frozen=True)
class Surroundings:
    """What a mechanism is told about the model around it; everything else is in its own config.

    Attributes:
      d_model, num_heads, num_layers, context: sizes of the model; context in tokens.
      dtype: compute dtype; parameters are fp32.
      rope_theta, norm_eps, qk_norm: choices shared by all mechanisms of a comparison.
      residual_init: see `residual_gain`.
      backend: attention op, see `mla.ops.attention`.
      recurrence_backend: that of `mla.ops.recurrence`.
      platform: of the devices that the model runs on, such as cpu; None: not known, ops choose in lowering.
      spread: has a kernel run on each of several devices, `mla.sharding.Spread`; None: there is one, or they are not known.
      layer: which of the model's layers it is, from 0; traced where layers run as a scan.
      remembers: False in a layer that reads what another layer remembers: it has no parameters that make entries.
    """

    d_model: int
    num_heads: int
    num_layers: int = 1
    context: int = 1024
    dtype: DTypeLike = jnp.float32
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    qk_norm: bool = False
    residual_init: str = "depth"
    backend: str = "auto"
    recurrence_backend: str = "auto"
    platform: str | None = None
    spread: Callable[..., jax.Array] | None = None
    layer: int = 0
    remembers: bool = True

    @property
    def residual_gain(self) -> float:
        """Gain of projections that write into the residual stream.

        depth: its variance stays of order one at any depth (GPT-2). zero: they start at 0, so that every block starts as
        the identity (TPA's and MLRA's code).
        """
        return 0.0 if self.residual_init == "zero" else (2 * self.num_layers) ** -0.5


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Step:
    """What a layer is told about the training step it takes part in.

    Attributes:
      progress: fp32 scalar, the share of the planned steps that were taken before this one: from 0; 1 in steps that were
        added to the plan.
      previous: that of the step before; below 0 in the first.
      key: random; every layer gets one of its own.
    """

    progress: jax.Array
    previous: jax.Array
    key: jax.Array

    def fold(self, number: int) -> Step:
        """This step with the key that `number` makes of this one."""
        return dataclasses.replace(self, key=jax.random.fold_in(self.key, number))


class Output(NamedTuple):
    """What a layer gives: y [B, T, D], and by name what it adds to the loss and what it has to report.

    Losses and metrics are arrays of any shape: how those of a model's layers combine, `Layer.total` and `Layer.logged` of
    their class say.
    """

    y: jax.Array
    losses: dict[str, jax.Array]
    metrics: dict[str, jax.Array]


class Layer(nnx.Module):
    """What mixers and MLPs have in common: how they take part in training.

    Attributes:
      additions: those of its attributes whose parameters a trained model may lack that goes on as a model with this layer
        (`config.init_from`): they start as they are drawn.
      sparing: those of its attributes whose matrices not every token is multiplied with once: fewer of them, or more often.
    """

    additions: ClassVar[tuple[str, ...]] = ()
    sparing: ClassVar[tuple[str, ...]] = ()

    def matrix_flops(self) -> float:
        """FLOPs of one token's products with its matrices, each once, but for those that are `sparing`."""
        state = nnx.to_flat_state(nnx.state(self, nnx.Param))
        used = [p for path, p in state if path[0] not in self.sparing and declared(p, "multiplies")]
        return 2.0 * sum(math.prod(parameter.shape) for parameter in used)

    def additions_alone(self, step: Step) -> jax.Array | None:
        """Whether nothing of the whole model but layers' `additions` learns in this step, a truth value.

        None, here: there is no such phase, whatever the step.
        """
        return None

    def before_step(self, step: Step) -> None:
        """Changes parameters in place before a training step, as a schedule of its own has it. Here: nothing."""

    @classmethod
    def total(cls, losses: Sequence[dict[str, jax.Array]]) -> jax.Array:
        """What is added to the training loss, a scalar: here the sum over layers of the means of all their losses.

        Args:
          losses: `Output.losses` of each layer of this class that has any.
        """
        return sum((jnp.mean(loss) for said in losses for loss in said.values()), jnp.zeros((), jnp.float32))

    @classmethod
    def logged(cls, metrics: Sequence[dict[str, jax.Array]]) -> dict[str, jax.Array]:
        """What metrics.jsonl says, scalars by name: here the means over layers and within them.

        Args:
          metrics: `Output.metrics` of each layer of this class that has any, averaged over micro-batches.
        """
        return {name: jnp.mean(jnp.stack([jnp.mean(said[name]) for said in metrics])) for name in metrics[0]}


@dataclasses.dataclass(frozen=True)
class Term:
    """A part of the published size of one layer's cache, for one sequence: entries of so many elements.

    Attributes:
      elements: of an entry.
      stride: tokens an entry; 0: a single entry is held from the start, whatever the length.
      window: entries that are held at most; None: all.
      itemsize: bytes of an element; 0: those of the dtype that the cache is made in.
      open: an entry is held from the first of its tokens on; otherwise from the last.
    """

    elements: int
    stride: int = 1
    window: int | None = None
    itemsize: int = 0
    open: bool = False

    def bytes_at(self, length: int, itemsize: int) -> int:
        """Bytes after `length` tokens in a cache whose dtype takes `itemsize` bytes."""
        entries = (length + (self.stride - 1) * self.open) // self.stride if self.stride else 1
        entries = entries if self.window is None else min(entries, self.window)
        return self.elements * entries * (self.itemsize or itemsize)

    def growth(self, itemsize: int) -> float:
        """Bytes a token in the long run."""
        return self.elements * (self.itemsize or itemsize) / self.stride if self.stride and self.window is None else 0


def constant(elements: int, itemsize: int = 4) -> Term:
    """What is held from the start: by default of fp32 elements, as states are."""
    return Term(elements, stride=0, itemsize=itemsize)


@dataclasses.dataclass
class MechanismConfig:
    """Base of every mechanism's config. Sizes of 0 mean: derived, as the field's comment says."""

    takes_qk_norm: ClassVar[bool] = False  # whether config.model.qk_norm means something here

    num_heads: int = 0  # query heads; 0: the model's

    def heads(self, around: Surroundings) -> int:
        return self.num_heads or around.num_heads

    def default_head_dim(self, around: Surroundings, field: str) -> int:
        """d_model / num_heads, the default width of a head.

        Raises:
          UserError: it is not whole, naming `field` as the one to set.
        """
        width, rest = divmod(around.d_model, self.heads(around))
        require(not rest, field, f"set it: d_model {around.d_model} does not divide into {self.heads(around)} heads")
        return width

    def validate(self, around: Surroundings) -> None:
        """Raises UserError, naming the field, where the sizes cannot work."""
        if around.qk_norm and not self.takes_qk_norm:
            raise UserError(
                f"config.model.qk_norm: {type(self).__name__.removesuffix('Config')} has no per-head q and k to norm; set"
                " config.model.qk_norm=false"
            )

    def cache_formula(self, around: Surroundings) -> list[Term]:
        """The paper's figure as a sum, written independently of the code that stores the entries."""
        raise NotImplementedError


# require(condition, field, message): refuses a mechanism's config with one line that names the field.
require = functools.partial(errors.require, "config.model.mechanism.")


def mechanism(name: str) -> tuple[type[MechanismConfig], type[Mixer]]:
    """The config class and the module class registered under `name`.

    Raises:
      UserError: unknown name; the message has the nearest match.
    """
    if name not in REGISTRY:
        raise UserError(f"unknown mechanism {name!r}: {nearest(name, REGISTRY)}")
    config, mixer = load(REGISTRY[name])
    return config, mixer


C = TypeVar("C", bound=MechanismConfig)
M = TypeVar("M")


class Mixer(Layer, Generic[C, M]):
    """Mixes information between tokens; one per layer. `config` and `around` say how it was built.

    Type parameters: C, its config; M, the memory that `read` takes.

    Attributes:
      stays: why none of its entries may leave or change its form later, though its clock lets them, for error lines; "":
        they may.
      private: what it remembers that other layers cannot read, for error lines; "": they can, and `remember` and `read` are
        there.
    """

    private: ClassVar[str] = "what only it can use"
    stays: ClassVar[str] = ""

    def __init__(self, config: C, around: Surroundings, *, rngs: nnx.Rngs):
        del rngs  # subclasses draw their parameters from it
        self.config = config
        self.around = around

    def __call__(self, x: jax.Array, positions: jax.Array | None = None) -> jax.Array:
        """Training: [B, T, D] -> [B, T, D], causal, parallel over T, no cache. No positions means 0 .. T-1 in every row."""
        raise NotImplementedError

    def forward(
        self, x: jax.Array, positions: jax.Array | None = None, memory: M | None = None, step: Step | None = None
    ) -> Output:
        """All tokens of a batch at once: outputs with losses and metrics, for a mechanism that has some.

        Args:
          x, positions: as `__call__` takes them.
          memory: what `read` takes, where layers of the model read one another; None: this layer's own of x.
          step: of training; None in evaluation, where there is nothing to learn and to log.
        """
        return Output(self(x, positions) if memory is None else self.read(x, positions, memory), {}, {})

    def stores(self) -> dict[str, StoreSpec]:
        """What is kept between calls, by name: see `mla.cache.stores`."""
        raise NotImplementedError

    def entry_stores(self) -> list[Entries]:
        """Those of its stores that hold entries."""
        return [spec for spec in self.stores().values() if isinstance(spec, Entries)]

    def states(self) -> dict[str, State]:
        """Those of its stores that hold a state, by name."""
        return {name: spec for name, spec in self.stores().items() if isinstance(spec, State)}

    def init_cache(self, batch: int, capacity: int, dtype: DTypeLike, plan: LayerPlan = PLAIN) -> LayerCache:
        """Empty stores for `capacity` tokens of `dtype`, but where a store has its own or `plan` says how it is stored.

        Allocates nothing under `jax.eval_shape`.
        """
        stores = self.stores().items()
        return LayerCache.of(**{name: spec.empty(batch, capacity, dtype, plan, name) for name, spec in stores})

    def extend(self, x: jax.Array, positions: jax.Array, cache: LayerCache) -> tuple[jax.Array, LayerCache]:
        """S >= 1 new tokens [B, S, D] at int32 positions [B, S] (-1: padding): their outputs, and the cache after them."""
        raise NotImplementedError

    def remember(
        self, x: jax.Array, positions: jax.Array | None = None, cache: LayerCache | None = None
    ) -> tuple[M, LayerCache | None]:
        """What may be looked at of x [B, S, D], a pytree that `read` takes; and the cache after it.

        Without a cache, x is a whole batch of texts [B, T, D]; with one, what was remembered before comes along.
        """
        raise NotImplementedError

    def read(self, x: jax.Array, positions: jax.Array | None, memory: M) -> jax.Array:
        """Outputs of x [B, S, D] over a memory, this layer's or another layer's of the same mechanism."""
        raise NotImplementedError

    def codecs(self, spec: str) -> dict[str, Codec | None]:
        """The codec of each stream and state of all its stores that `spec` means (`mla.cache.codecs`).

        What other layers alone have may be named too: `Model.codecs` refuses what none has.

        Raises:
          UserError: an unknown codec, or one that codes tokens after they have left, or on a state.
        """
        kept, states = self.entry_stores(), self.states()
        chosen = codecs(spec, [name for store in kept for name in store.streams()], states, elsewhere=True)
        for store in kept:
            store.check({name: chosen[name] for name in store.streams()}, spec, self.stays)
        for name, state in states.items():
            state.check(chosen[name], spec)
        return chosen

    def plan(self, codec: str = "none", eviction: Eviction | None = None, read: Quest | None = None) -> LayerPlan:
        """How `init_cache` has its entries stored, by a codec specification, what leaves them and what is read of them.

        Raises:
          UserError: what `codecs` refuses.
        """
        return LayerPlan(self.codecs(codec), eviction, read if self.pageable else None)

    @property
    def evictable(self) -> bool:
        """Whether it keeps an entry for every token of the text, that could as well leave, and nothing beside them."""
        if self.stays:
            return False
        specs = list(self.stores().values())
        return len(specs) == 1 and isinstance(specs[0], Entries) and not specs[0].clock.refusal

    @property
    def pageable(self) -> bool:
        """Whether a decode step can read some pages of its entries, chosen by the keys in them (`mla.cache.pages`)."""
        return False

    def page_shapes(self) -> tuple[jax.Array, ...]:
        """Shapes [1, 1, K_i, D_i] of the parts of one token's key, where it is pageable."""
        raise NotImplementedError

    @property
    def compresses(self) -> bool:
        """Whether its key heads decide by the text when an entry begins, so that only text tells how many bytes it takes."""
        return any(spec.clock.heads > 0 for spec in self.entry_stores())

    def owners(self) -> int:
        """Groups of heads that have entries of their own, so that each may keep other tokens."""
        return self.entry_stores()[0].owners()

    def mixing_flops(self, tokens: int, decode: bool = False) -> float:
        """FLOPs of the products by which the last of so many tokens meets others, and of those with `sparing` matrices.

        A multiplication and an addition are two FLOPs. What is masked away is not counted, nor are elementwise operations,
        losses of a layer's own, and backward passes.

        Args:
          tokens: of the text so far, this one included.
          decode: whether it comes alone, after a cache; otherwise all tokens of a text come at once, as in training.
        """
        raise NotImplementedError

    def text_flops(self, tokens: int) -> float:
        """`mixing_flops` of a token on average over a text of so many that come at once."""
        return sum(self.mixing_flops(end) for end in range(1, tokens + 1)) / tokens

    def read_bytes(self, cache: LayerCache) -> int:
        """Content bytes that one decode step touches of a cache, live or abstract: here all that is held."""
        return content_bytes(cache)
