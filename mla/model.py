"""Embedding, blocks, head: a pre-norm decoder that knows the contract and no mechanism by name.

Legend: B batch, T tokens, S new tokens, D model width, F MLP width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from mla import config as configs
from mla import scan, sharding
from mla.attention.contract import MATCHED, Layer, Mixer, Output, Step, mechanism
from mla.attention.softmax.evidence import Observed
from mla.cache.codecs import Codec, codecs
from mla.cache.evicted import EvictedCache
from mla.cache.merged import PairHalf
from mla.cache.plan import WHOLE, CachePlan
from mla.cache.stores import LayerCache, ModelCache
from mla.errors import UserError
from mla.layers.basic import NORMS, Linear, declared, matrix, wide_dtype
from mla.layers.mlp import MATCHED as MATCHED_MLP
from mla.layers.mlp import MLP, mlp
from mla.ops import splash


class Said(NamedTuple):
    """Losses and metrics of layers, see `Output`: one dict each of every mixer and MLP, bottom first."""

    losses: list[dict[str, jax.Array]]
    metrics: list[dict[str, jax.Array]]


class Block(nnx.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)). A block that others read (`shared`) norms what it remembers apart.

    With `post_norms` of the config, x + norm(mixer(norm(x))), and the same of the MLP.
    """

    def __init__(self, mixer: Mixer, mlp: MLP, model: configs.ModelConfig, shared: bool = False):
        norm = functools.partial(NORMS[model.norm], model.d_model, eps=model.norm_eps)
        self.mixer_norm, self.entries_norm, self.mixer = norm(), norm() if shared else None, mixer
        self.mlp_norm, self.mlp = norm(), mlp
        self.mixer_post_norm = norm() if model.post_norms else None
        self.mlp_post_norm = norm() if model.post_norms else None

    def __call__(self, x: jax.Array, positions: jax.Array | None, memory: Any = None) -> jax.Array:
        """Attention over `memory`, from here or from another block; None: the mixer's own, all in one."""
        return self.forward(x, positions, memory)[0]

    def forward(
        self, x: jax.Array, positions: jax.Array | None, memory: Any = None, step: Step | None = None
    ) -> tuple[jax.Array, Said]:
        """`__call__`, and what the mixer and the MLP say beside, see `Mixer.forward`."""
        mixed = self.mixer.forward(self.mixer_norm(x), positions, memory, step)
        x, made = self._finished(x, mixed.y, step and step.fold(1))
        return x, Said([mixed.losses, made.losses], [mixed.metrics, made.metrics])

    def _finished(self, x: jax.Array, mixed: jax.Array, step: Step | None = None) -> tuple[jax.Array, Output]:
        """The residual stream after what the mixer gave and the MLP, and the latter's own output."""
        x = x + (mixed if self.mixer_post_norm is None else self.mixer_post_norm(mixed))
        made = self.mlp.forward(self.mlp_norm(x), step)
        return x + (made.y if self.mlp_post_norm is None else self.mlp_post_norm(made.y)), made

    def remember(
        self, x: jax.Array, positions: jax.Array | None, cache: LayerCache | None = None
    ) -> tuple[Any, LayerCache | None]:
        """What this block and its readers look at, see `Mixer.remember`."""
        return self.mixer.remember(self._norm_of_entries(x), positions, cache)

    def forget(
        self, cache: LayerCache, x: jax.Array, positions: jax.Array, memory: Any, tokens: jax.Array, layer: int
    ) -> LayerCache:
        """The cache that `remember` returns without what leaves it, now that x [B, S, D] has looked at the memory."""
        mixer: Any = self.mixer

        def keep(store: Any) -> Any:
            if not isinstance(store, EvictedCache):
                return store
            return store.keep(Observed(mixer, self.mixer_norm(x), positions, memory, store, tokens, layer))

        return cache.mapped(keep)

    def _norm_of_entries(self, x: jax.Array) -> jax.Array:
        return self.mixer_norm(x) if self.entries_norm is None else self.entries_norm(x)

    def extend(self, x: jax.Array, positions: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        y, cache = self.mixer.extend(self.mixer_norm(x), positions, cache)
        return self._finished(x, y)[0], cache


class Model(nnx.Module):
    """A language model over token ids."""

    def __init__(self, config: configs.Config, vocab_size: int, *, mlp_width: int, rngs: nnx.Rngs, mesh: Mesh | None = None):
        platform = None if mesh is None else sharding.platform(mesh)
        spread = None if mesh is None or mesh.size == 1 else sharding.Spread(mesh)
        model, around = config.model, dataclasses.replace(configs.around(config), platform=platform, spread=spread)
        self.dtype, self.remat, self.vocab_size = around.dtype, model.remat, vocab_size
        embedding = jax.random.normal(rngs.params(), (vocab_size, model.d_model), jnp.float32) * model.d_model**-0.5
        self.embedding = matrix(embedding, ("vocab", "model"))
        layers, blocks = configs.layers(model), []
        self.sources = tuple(layer.source for layer in layers)  # whose entries each block reads; None: its own
        self.units = self._units(model, layers, platform)
        for index, layer in enumerate(layers):
            surroundings = dataclasses.replace(around, layer=index, remembers=layer.source is None)
            mixer = mechanism(layer.name)[1](layer.config, surroundings, rngs=rngs)
            made = mlp(model.mlp)[1](model.mlp_fields, around, mlp_width, rngs=rngs)
            blocks.append(Block(mixer, made, model, shared=index in self.sources))
        self.blocks = nnx.List(blocks)
        self.final_norm = NORMS[model.norm](model.d_model, eps=model.norm_eps)
        make: dict[str, Any] = {"rngs": rngs, "dtype": around.dtype}
        self.head = None if model.tie_embeddings else Linear(model.d_model, vocab_size, ("model", "vocab"), **make)

    def embed(self, tokens: jax.Array) -> jax.Array:
        return self.embedding[...].astype(self.dtype)[tokens]

    def head_kernel(self) -> jax.Array:
        """The output matrix [D, V] in fp32: logits are its product with `hidden`."""
        return self.embedding[...].T if self.head is None else self.head.kernel[...]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [..., D] -> [..., V], in fp32 at least."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        wide = wide_dtype(self.dtype)
        product = jnp.matmul(flat, self.head_kernel().astype(self.dtype), preferred_element_type=wide)
        return product.reshape(*hidden.shape[:-1], self.vocab_size)

    def hidden(self, tokens: jax.Array, positions: jax.Array | None = None) -> jax.Array:
        """Parallel form up to the final norm: tokens int32 [B, T] -> [B, T, D]. No positions means 0 .. T-1 in every row."""
        return self.forward(tokens, positions)[0]

    def forward(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        step: Step | None = None,
        place: Callable[[jax.Array], jax.Array] = lambda x: x,
    ) -> tuple[jax.Array, Said]:
        """`hidden`, as it is trained where a step is given, and what the layers say beside.

        `place` has the residual stream [B, T, D] stay on its devices: it is called on what each block gives.
        """
        x, memories = place(self.embed(tokens)), dict[int, Any]()
        said: list[Said] = []
        for start, period, turns in self.units:
            indices = range(start, start + period)
            if turns == 1:
                blocks = [self.blocks[index] for index in indices]
                x, more = self._through(x, blocks, start, start, positions, memories, step, place)
                said.append(more)
                continue

            def unit(x: jax.Array, blocks: Sequence[Any], number: jax.Array, start=start, period=period) -> Any:
                here = start + number * period
                for place_in_unit, block in enumerate(blocks):
                    block.mixer.around = dataclasses.replace(block.mixer.around, layer=here + place_in_unit)
                return self._through(x, blocks, start, here, positions, dict(memories), step, place)

            repeats = [[self.blocks[index + turn * period] for index in indices] for turn in range(turns)]
            x, stacked = scan.repeated(unit, x, repeats, self.dtype)
            said += [jax.tree.map(lambda a, turn=turn: a[turn], stacked) for turn in range(turns)]
        losses = [words for part in said for words in part.losses]
        return self.final_norm(x), Said(losses, [words for part in said for words in part.metrics])

    def _through(
        self,
        x: jax.Array,
        blocks: Sequence[Any],
        start: int,
        here: Any,
        positions: jax.Array | None,
        memories: dict[int, Any],
        step: Step | None,
        place: Callable[[jax.Array], jax.Array],
    ) -> tuple[jax.Array, Said]:
        """Through blocks that stand where those from `start` on do; they are the layers from `here` on, which may be traced.

        memories: of layers that are read, by their index; those of `blocks` are added.
        """
        said, scanned = Said([], []), not isinstance(here, int)
        for number, block in enumerate(blocks):
            index, source = start + number, self.sources[start + number]
            if index in self.sources:
                memories[index] = self._rematerialised(block.remember, scanned)(x, positions)[0]
            memory = memories.get(index if source is None else source)
            x, more = self._rematerialised(block.forward, scanned)(x, positions, memory, step and step.fold(here + number))
            x = place(x)
            said = Said(said.losses + more.losses, said.metrics + more.metrics)
        return x, said

    @staticmethod
    def _units(
        model: configs.ModelConfig, layers: Sequence[configs.LayerSpec], platform: str | None
    ) -> tuple[scan.Unit, ...]:
        """What runs as a scan: layers of one configuration that read, and are read, alike."""
        sources = [layer.source for layer in layers]
        if model.scan_layers == "off" or (model.scan_layers == "auto" and platform in (None, "cpu")):
            return tuple(scan.Unit(index, 1, 1) for index in range(len(layers)))
        kinds = [(layer.name, id(layer.config), layer.source is None, i in sources) for i, layer in enumerate(layers)]
        return scan.units(kinds, sources)

    def by_owner(self, said: Sequence[dict[str, jax.Array]]) -> dict[type[Layer], list[dict[str, jax.Array]]]:
        """Losses or metrics of all layers, as `Said` has them, by the class that says how they combine."""
        layers: list[Layer] = [layer for block in self.blocks for layer in (block.mixer, block.mlp)]
        found: dict[type[Layer], list[dict[str, jax.Array]]] = {}
        for layer, words in zip(layers, said, strict=True):
            if words:
                found.setdefault(type(layer), []).append(words)
        return found

    def additions_alone(self, step: Step) -> jax.Array | None:
        """Whether some layer has everything but `additions` wait in this step; None: none ever has, see `Layer`."""
        layers: list[Layer] = [layer for block in self.blocks for layer in (block.mixer, block.mlp)]
        said = [alone for layer in layers if (alone := layer.additions_alone(step)) is not None]
        return functools.reduce(jnp.logical_or, said) if said else None

    def _rematerialised(self, function: Any, scanned: bool = False) -> Any:
        """In a scan, nothing outside of it can be merged with what is computed again, and need not be kept from it."""
        if self.remat == "none":
            return function
        policies = jax.checkpoint_policies
        matmuls = policies.save_from_both_policies(  # what a kernel saves of its products, too
            policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(splash.SAVED)
        )
        policy = matmuls if self.remat == "all_but_matmuls" else None
        return jax.checkpoint(function, policy=policy, prevent_cse=not scanned)

    def __call__(self, tokens: jax.Array, positions: jax.Array | None = None) -> jax.Array:
        """Logits fp32 [B, T, V] of the token after each."""
        return self.logits(self.hidden(tokens, positions))

    def evicting(self) -> list[int]:
        """The layers that entries can leave: those that store every token of the text."""
        remembering = (i for i, source in enumerate(self.sources) if source is None)
        return [i for i in remembering if self.blocks[i].mixer.evictable]

    def codecs(self, spec: str) -> dict[str, Codec | None]:
        """The codec of each stream and state that some layer has, by a specification of `mla.cache.codecs`.

        Raises:
          UserError: what means nothing in this model.
        """
        mixers = self._remembering()
        streams = dict.fromkeys(name for mixer in mixers for store in mixer.entry_stores() for name in store.streams())
        return codecs(spec, streams, dict.fromkeys(name for mixer in mixers for name in mixer.states()))

    def codes_states(self, spec: str) -> bool:
        """Whether a codec specification means a state of some layer."""
        chosen = self.codecs(spec)
        return any(chosen[name] is not None for mixer in self._remembering() for name in mixer.states())

    def _remembering(self) -> list[Mixer]:
        """The mixers of layers that keep something: the others read what these keep."""
        return [block.mixer for block, source in zip(self.blocks, self.sources, strict=True) if source is None]

    def init_cache(
        self,
        batch: int,
        capacity: int,
        dtype: Any = None,
        prompt: int | Sequence[int] | None = None,
        plan: CachePlan = WHOLE,
    ) -> ModelCache:
        """An empty cache for `capacity` tokens a sequence; streams in `dtype`, by default the compute dtype.

        Where `plan` has entries leave or be merged, `prompt` says how many of the tokens are the prompt's: so
        many or fewer, padded on the left, in every row; a sequence: rows have one of these lengths, padded to the longest,
        which may need fewer slots; None: all of them are.

        Raises:
          UserError: a codec that means nothing in this model.
        """
        if plan.codec != "none":
            self.codecs(plan.codec)
        prompts = [capacity] if prompt is None else range(prompt + 1) if isinstance(prompt, int) else prompt
        plans: dict[int, Any] = {i: (capacity, None) for i, source in enumerate(self.sources) if source is None}
        if plan.eviction is not None:
            evicting = self.evicting()
            plans |= zip(evicting, plan.eviction.layers(len(evicting), prompts, max(prompts), capacity), strict=True)
        dtype, layers = dtype or self.dtype, cast(list[LayerCache | None], [None] * len(self.blocks))
        for index, (slots, eviction) in plans.items():
            mixer = self.blocks[index].mixer
            read = plan.read if plan.read and index >= plan.read.start else None
            layers[index] = mixer.init_cache(batch, slots, dtype, mixer.plan(plan.codec, eviction, read))
        if (merge := plan.merge) is not None:
            for lower in merge.pairs(len(layers)):
                mixer = self.blocks[lower].mixer
                like, codecs = mixer.stores()["entries"].like, mixer.codecs(plan.codec)
                halves = PairHalf.empty(like, batch, capacity, dtype, merge, max(prompts), codecs)
                layers[lower : lower + 2] = [LayerCache.of(entries=half) for half in halves]
        return ModelCache.gather(layers)

    def extend_hidden(
        self, tokens: jax.Array, positions: jax.Array, cache: ModelCache, last_only: bool = False
    ) -> tuple[jax.Array, ModelCache]:
        """`extend` up to the final norm, [B, S or 1, D]: for pieces so long that their logits would not fit."""
        x, caches, memories = self.embed(tokens), [], {}
        top = max(index for index, source in enumerate(self.sources) if source is None)
        for index, (block, source) in enumerate(zip(self.blocks, self.sources, strict=True)):
            stored, before, where = cache.layer(index), x, positions
            if source is None and not block.mixer.private:
                memories[index], stored = block.remember(x, positions, stored)
            elif source is None:
                x, stored = block.extend(x, positions, stored)
            if index == top and last_only:
                # Nobody looks at the other tokens any more: layers from here on mix tokens through memories alone.
                x, positions = x[:, -1:], positions[:, -1:]
            memory = memories.get(index if source is None else source)
            x = x if memory is None else block(x, positions, memory)
            if stored is not None and source is None:
                stored = block.forget(stored, before, where, memory, tokens, index)
            caches.append(stored)
        return self.final_norm(x), ModelCache.gather(caches)

    def extend(
        self, tokens: jax.Array, positions: jax.Array, cache: ModelCache, last_only: bool = False
    ) -> tuple[jax.Array, ModelCache]:
        """S >= 1 new tokens through the cache: prefill, chunked prefill and decode.

        Args:
          tokens, positions: int32 [B, S]; position -1 is padding (prompts are left-padded). Each row's real positions
            go on where the row's cache stands, and must stay below its capacity: beyond it a growing cache stores no
            more, and a ring shorter than its window forgets what the window still sees.
          cache: from `init_cache` or an earlier call.
          last_only: logits of the last position only; layers that remember nothing are computed for it alone.

        Returns:
          fp32 logits [B, S or 1, V] and the new cache.
        """
        hidden, cache = self.extend_hidden(tokens, positions, cache, last_only)
        return self.logits(hidden), cache


# ---------------------------------------------------------------------------------------------------------- parameters


def parameters(model: nnx.Module) -> dict[str, Any]:
    """All parameters as a nested dict of arrays with string keys: what is trained, stored and sharded by path."""

    return _plain(nnx.to_pure_dict(nnx.state(model, nnx.Param)))


def decays(model: nnx.Module) -> dict[str, Any]:
    """Which parameters weight decay shrinks, as their owners declare: truth values in the shape of `parameters`."""
    return _declared(model, "decays")


def axes(model: nnx.Module) -> dict[str, Any]:
    """The meaning of every parameter's axes, as their owners declare: `layers.Axes` in the shape of `parameters`."""
    return _declared(model, "axes")


def additions(model: Model) -> dict[str, Any]:
    """Which parameters are a layer's `additions`: truth values in the shape of `parameters`."""

    def added(path: Any, _: Any) -> bool:
        where = [key.key for key in path]  # blocks, 0, mixer, attribute, ..
        layer = getattr(model.blocks[int(where[1])], where[2]) if where[0] == "blocks" else None
        return isinstance(layer, Layer) and where[3] in layer.additions

    return jax.tree.map_with_path(added, parameters(model))  # type: ignore[no-any-return]


def _declared(model: nnx.Module, what: str) -> dict[str, Any]:
    """Raises TypeError, with its path, for a parameter whose owner says nothing."""
    state = nnx.to_flat_state(nnx.state(model, nnx.Param))
    said = {}
    for path, parameter in state:
        try:
            said[path] = declared(parameter, what)
        except TypeError as error:
            raise TypeError(f"{'/'.join(map(str, path))}: {error}") from None
    return _plain(nnx.to_pure_dict(nnx.from_flat_state(said)))


def _plain(tree: Any) -> Any:
    return {str(k): _plain(v) for k, v in tree.items()} if isinstance(tree, dict) else tree


def with_parameters(graph: Any, params: dict[str, Any]) -> Any:
    """The module of a graph definition (`nnx.graphdef`) with parameters from `parameters`."""
    return nnx.merge(graph, nnx.restore_int_paths(params))


def count(tree: Any) -> int:
    """Elements of a pytree of arrays or shapes."""
    return sum(math.prod(a.shape) for a in jax.tree.leaves(tree))


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Parameter counts, and how the MLP width was chosen.

    Attributes:
      total, embedding, attention, mlp: parameters; norms of the blocks count in neither attention nor mlp.
      active: those that one token is multiplied with; fewer than the total where an MLP has experts.
      mlp_width: this model's MLP width F, of each expert where it has some.
      mha_total: parameters of the MHA model it is matched to.
    """

    total: int
    active: int
    embedding: int
    attention: int
    mlp: int
    mlp_width: int
    mha_total: int

    @property
    def mismatch(self) -> float:
        """(total - mha_total) / mha_total."""
        return self.total / self.mha_total - 1


def sizes(config: configs.Config, vocab_size: int) -> Sizes:
    """Solves the MLP width and counts parameters, from abstract modules: nothing is allocated.

    With `match_parameters`, F is such that attention and MLP have as many parameters as the MHA model with a SwiGLU of
    width `mlp_width`, rounded to `mlp_multiple`; otherwise it is that width. `solved_mlp_width` says F for a converted run.
    """
    model, around = config.model, configs.around(config)

    def attention(layers: list[configs.LayerSpec]) -> int:
        @functools.cache
        def of(index: int, remembers: bool) -> int:
            layer, surroundings = layers[index], dataclasses.replace(around, remembers=remembers)
            build = functools.partial(mechanism(layer.name)[1], layer.config, surroundings)
            return count(parameters(nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0)))))

        first = {id(layer.config): index for index, layer in reversed(list(enumerate(layers)))}
        return sum(of(first[id(layer.config)], layer.source is None) for layer in layers)

    layers, mha = configs.layers(model), mechanism(MATCHED)[0]()
    mha_attention = attention([configs.LayerSpec(MATCHED, mha)] * model.num_layers)
    own_attention = attention(layers)
    count_of = functools.partial(model.mlp_fields.parameters, model.d_model)
    width = model.mlp_width or max(8, round(model.d_model / 3) * 8)
    mha_mlp = model.num_layers * mlp(MATCHED_MLP)[0]().parameters(model.d_model, width).total
    if model.solved_mlp_width:
        width = model.solved_mlp_width
    elif model.match_parameters:
        fixed, per_width = count_of(0).total, count_of(1).total - count_of(0).total
        left = mha_attention + mha_mlp - own_attention - model.num_layers * fixed
        width = max(1, round(left / (model.num_layers * per_width) / model.mlp_multiple)) * model.mlp_multiple
        if left <= 0:
            raise UserError(
                f"config.model.match_parameters: {configs.describe(model)} has {own_attention:,} attention parameters, more"
                " than all layers of the MHA model; shrink it or set match_parameters=false"
            )
    own_mlp = count_of(width)
    embedding = vocab_size * model.d_model * (1 if model.tie_embeddings else 2)
    norm = count(parameters(nnx.eval_shape(lambda: NORMS[model.norm](model.d_model, eps=model.norm_eps))))
    norms = norm * ((4 if model.post_norms else 2) * model.num_layers + 1)
    entries_norms = norm * len({layer.source for layer in layers} - {None})
    total = embedding + norms + entries_norms + own_attention + model.num_layers * own_mlp.total
    return Sizes(
        total=total,
        active=total - model.num_layers * (own_mlp.total - own_mlp.active),
        embedding=embedding,
        attention=own_attention,
        mlp=model.num_layers * own_mlp.total,
        mlp_width=width,
        mha_total=embedding + norms + mha_attention + mha_mlp,
    )


def create(config: configs.Config, vocab_size: int, rngs: nnx.Rngs | None = None, mesh: Mesh | None = None) -> Model:
    """The model of a config, with its MLP width solved. Works under `nnx.eval_shape` and `jax.jit`.

    `mesh` is of the devices it will run on; without one, ops choose their implementations in lowering.
    """
    width = sizes(config, vocab_size).mlp_width
    return Model(config, vocab_size, mlp_width=width, rngs=rngs or nnx.Rngs(config.seed), mesh=mesh)
