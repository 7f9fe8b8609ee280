"""Bytes of a model's cache: read off live arrays, off abstract ones, and off the papers' formulas, which must agree."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from mla import config as configs
from mla import model as models
from mla.attention.contract import CacheFormula, mechanism
from mla.cache import meter
from mla.errors import UserError
from mla.evaluation.decoding import Decoder, batch_multiple, positions, round_up
from mla.model import Model, ModelCache

LENGTHS = (1024, 8192, 131072)  # tokens at which every model's cache is sized
STEP = 64  # tokens between the two caches whose difference is the growth; pooling strides divide it


def formulas(config: configs.Config) -> list[CacheFormula]:
    """The papers' figures, one a layer; nothing for layers that read another's entries."""
    around = configs.around(config)
    layers = configs.layers(config.model)
    return [layer.config.cache_formula(around) if layer.source is None else CacheFormula() for layer in layers]


def stored(config: configs.Config) -> list[tuple[CacheFormula, int]]:
    """`formulas` with the bytes of what they count: an element each, or one byte where a codec says how many there are."""
    itemsize, spec = jnp.dtype(config.model.dtype).itemsize, config.eval.cache.codec
    if spec == "none":
        return [(formula, itemsize) for formula in formulas(config)]
    found, around = [], configs.around(config)
    for formula, layer in zip(formulas(config), configs.layers(config.model), strict=True):
        if not formula.per_token:
            found.append((formula, itemsize))
            continue
        build = functools.partial(mechanism(layer.name)[1], layer.config, around)
        mixer: Any = nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0)))  # noqa: B023
        streams = mixer.streams()
        per_token = sum(
            math.prod(stream.shape[:-1]) * (codec.vector_bytes(stream.shape[-1]) if codec else itemsize * stream.shape[-1])
            for stream, codec in ((getattr(streams, name), codec) for name, codec in mixer.codecs(spec).items())
        )
        found.append((dataclasses.replace(formula, per_token=per_token), 1))
    return found


def formula_bytes_at(config: configs.Config, length: int) -> int:
    """Content bytes of one sequence of `length` tokens, all layers, by the formulas."""
    return _bytes_at(stored(config), length)


def formula_growth(config: configs.Config) -> int:
    """Content bytes that one more token adds in the long run, all layers, by the formulas."""
    return _growth(stored(config))


def _bytes_at(layers: list[tuple[CacheFormula, int]], length: int) -> int:
    return sum(formula.bytes_at(length, itemsize) for formula, itemsize in layers)


def _growth(layers: list[tuple[CacheFormula, int]]) -> int:
    return sum(formula.growth * itemsize for formula, itemsize in layers)


def abstract_model(config: configs.Config, vocab_size: int) -> Model:
    """A model of shapes: enough to size its caches, whatever its size."""
    return nnx.eval_shape(lambda: models.create(config, vocab_size))


def abstract_bytes_at(model: Model, length: int) -> int:
    """Content bytes of one sequence of `length` tokens, all layers, of a cache that is never allocated.

    `model` may be abstract too.
    """
    return meter.content_bytes_at(lambda length: model.init_cache(1, length), length)


def lengths_to_compare(config: configs.Config) -> tuple[int, int]:
    """Two lengths, in tokens, beyond every window: content grows at its long-run rate between them."""
    window = max(formula.window or 0 for formula in formulas(config))
    first = round_up(max(window, STEP), STEP)
    return first, first + STEP


def filled(model: Model, mesh: Mesh, length: int) -> ModelCache:
    """A live cache that `length` tokens went through, one sequence for every device that a batch is split over."""
    decoder = Decoder(model, batch_multiple(mesh), length, mesh)

    def fill(model: Model, cache: ModelCache, tokens: jax.Array, where: jax.Array) -> tuple[jax.Array, ModelCache]:
        return model.extend(tokens, where, cache, last_only=True)

    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (decoder.batch, length), dtype=np.int32)
    _, cache = decoder.compiled(fill)(decoder.empty(), tokens, positions(decoder.batch, 0, length))
    return jax.block_until_ready(cache)


def read_bytes_per_step(model: Model, length: int) -> int:
    """Content bytes that one decode step reads of one sequence of `length` tokens.

    All that is held, and what several layers share once for each of them: sharing saves memory, not bandwidth.
    """
    cache = jax.eval_shape(lambda: model.init_cache(1, length))
    held = [0 if layer is None else meter.content_bytes(layer) for layer in cache.layers]
    return sum(held[layer if source is None else source] for layer, source in enumerate(model.sources))


def measure(config: configs.Config, model: Model, mesh: Mesh, lengths: Iterable[int] = LENGTHS) -> dict[str, Any]:
    """The `cache` object of eval.json, in bytes of one sequence over all layers.

    bytes_per_token, constant_bytes, elements_per_token_per_layer and the per-device figure come from two live caches,
    bytes_at and read_bytes_per_step from abstract ones at `lengths` and at the model's context.

    Raises:
      UserError: the arrays and the formulas disagree.
    """
    layers = stored(config)
    short, long = lengths_to_compare(config)
    caches = [filled(model, mesh, length) for length in (short, long)]
    batch, step = batch_multiple(mesh), long - short

    def growth(measured: Any) -> float:
        """Of one sequence, a token."""
        low, high = (measured(cache) for cache in caches)
        return (high - low) / step / batch

    def require(what: str, found: float, length: int) -> None:
        expected = _bytes_at(layers, length)
        if found != expected:
            raise UserError(
                f"eval: the {what} of {configs.describe(config.model)} holds {found:,.10g} bytes a sequence,"
                f" its formula says {expected:,}"
            )

    for cache, length in zip(caches, (short, long), strict=True):
        require(f"live cache after {length} tokens", meter.content_bytes(cache) / batch, length)
    per_token = growth(meter.content_bytes)
    if per_token != _growth(layers):
        raise UserError(
            f"eval: the live cache of {configs.describe(config.model)} grows by {per_token:g} bytes a token,"
            f" its formula says {_growth(layers)}"
        )

    sizes = sorted({*lengths, config.context})
    bytes_at = {length: abstract_bytes_at(model, length) for length in sizes}
    for length, found in bytes_at.items():
        require(f"abstract cache for {length} tokens", found, length)
    return {
        "dtype": _dtype(*caches),
        "bytes_per_token": _plain(per_token),
        "bytes_per_token_formula": _growth(layers),
        "elements_per_token_per_layer": _plain(growth(_elements) / config.model.num_layers),
        "constant_bytes": _plain(meter.content_bytes(caches[0]) / batch - per_token * short),
        "bookkeeping_bytes_per_token": _plain(growth(meter.bookkeeping_bytes)),
        "bytes_at": {str(length): found for length, found in bytes_at.items()},
        "read_bytes_per_step": {str(length): read_bytes_per_step(model, length) for length in sizes},
        # The fullest device holds its rows of the batch: one sequence.
        "bytes_per_token_per_device": _plain(growth(meter.content_bytes_per_device) * batch),
    }


def _elements(cache: ModelCache) -> int:
    return sum(array.size for array in jax.tree.leaves(cache.content()))


def _dtype(short: ModelCache, long: ModelCache) -> str:
    """Of the arrays that grow; of all content where none does."""
    pairs = list(zip(jax.tree.leaves(short.content()), jax.tree.leaves(long.content()), strict=True))
    growing = [b for a, b in pairs if a.shape != b.shape] or [b for _, b in pairs]
    return "+".join(sorted({str(array.dtype) for array in growing}))


def _plain(number: float) -> int | float:
    """Whole numbers as int."""
    return int(number) if number == int(number) else number
