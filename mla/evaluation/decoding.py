"""`Model.extend` compiled for decoding: plain `jax.jit` over flat leaves, the cache donated, everything on a mesh.

Legend: B batch, S new tokens, C cache capacity in tokens.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mla import memory
from mla.cache.plan import WHOLE, CachePlan
from mla.cache.stores import ModelCache
from mla.errors import UserError
from mla.layers.basic import cast
from mla.model import Model
from mla.sharding import BATCH, cache_shardings, in_turn, put


def batch_multiple(mesh: Mesh) -> int:
    """Devices over which a batch is split: batches are multiples of it."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def round_up(size: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `size`."""
    return -(-size // multiple) * multiple


def positions(batch: int, start: int, stop: int) -> np.ndarray:
    """start .. stop-1 in every row: int32 [B, stop - start]."""
    return np.broadcast_to(np.arange(start, stop, dtype=np.int32), (batch, stop - start))


def compiled(model: Model, mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function(model, *arguments)` compiled, without the model among the arguments; results on every device."""
    graph, state = nnx.split(in_compute_dtype(model))
    # Flat leaves: to flatten an NNX state costs more than the dispatch of a small decode step.
    leaves, structure = jax.tree.flatten(state)

    def run(leaves: list[jax.Array], *arguments: Any) -> Any:
        return function(nnx.merge(graph, jax.tree.unflatten(structure, leaves)), *arguments)

    jitted = jax.jit(run, out_shardings=NamedSharding(mesh, PartitionSpec()))
    return in_turn(functools.partial(jitted, leaves), mesh)


def in_compute_dtype(model: Model) -> Model:
    """The model with parameters in the dtype they are used in, so that decode steps do not read and cast fp32 masters."""
    graph, state = nnx.split(model)
    return nnx.merge(graph, cast(state, model.dtype))


class Decoder:
    """A model with caches of one batch and capacity.

    Args:
      model: with its parameters.
      batch: sequences; a multiple of `batch_multiple(mesh)`.
      capacity: tokens a sequence can hold.
      mesh: where the parameters live, and over which the cache is split.
      plan: how the cache stores, drops and merges entries.
      prompt: how many of them are the prompt's, in every row, where it matters (`Model.init_cache`); None: all.
      fields: what a user would lower if the cache is too large.

    Attributes:
      empty: makes an empty `ModelCache`, placed on the mesh.

    Raises:
      UserError: more tokens than 32 bits can count, or a cache that no memory of these devices can hold.
    """

    def __init__(
        self,
        model: Model,
        batch: int,
        capacity: int,
        mesh: Mesh,
        plan: CachePlan = WHOLE,
        prompt: int | None = None,
        fields: str = "config.eval.batch_size",
    ):
        assert batch % batch_multiple(mesh) == 0, (batch, dict(mesh.shape))
        self.batch, self.capacity, self._mesh = batch, capacity, mesh
        self._graph, state = nnx.split(in_compute_dtype(model))
        self._leaves, self._structure = jax.tree.flatten(state)

        def empty() -> ModelCache:
            return model.init_cache(batch, capacity, prompt=None if prompt is None else [prompt], plan=plan)

        self._shrinks = plan.eviction is not None and plan.eviction.when == "decode"
        what = f"the cache of {batch:,} sequence(s) of {capacity:,} tokens"
        if capacity >= 2**31:
            raise UserError(f"{what} has positions beyond what 32 bits can count; lower {fields}")
        shapes = jax.eval_shape(empty)
        self._placed = cache_shardings(shapes, mesh)
        memory.require(put(shapes, self._placed), what, f"lower {fields}")
        self.empty: Callable[[], ModelCache] = in_turn(jax.jit(empty, out_shardings=self._placed), mesh)

    def compiled(self, step: Callable[..., tuple[Any, ModelCache]]) -> Callable[..., tuple[Any, ModelCache]]:
        """`step(model, cache, *arguments) -> (result, cache)` compiled, without the model among the arguments.

        The cache is donated: use the returned one only. Results are on every device.
        """

        def run(leaves: list[jax.Array], cache: ModelCache, *arguments: Any) -> tuple[Any, ModelCache]:
            return step(nnx.merge(self._graph, jax.tree.unflatten(self._structure, leaves)), cache, *arguments)

        everywhere = NamedSharding(self._mesh, PartitionSpec())

        def program(placed: Any, donate: tuple[int, ...] = (1,)) -> Any:
            return jax.jit(run, donate_argnums=donate, out_shardings=(everywhere, placed))

        if not self._shrinks:
            return in_turn(functools.partial(program(self._placed), self._leaves), self._mesh)
        programs: dict[Any, Any] = {}

        def by_size(leaves: list[jax.Array], cache: ModelCache, *arguments: Any) -> Any:
            sizes = tuple(leaf.shape for leaf in jax.tree.leaves((cache, arguments)))
            if sizes not in programs:
                placed = cache_shardings(jax.eval_shape(run, leaves, cache, *arguments)[1], self._mesh)
                programs[sizes] = program(placed, donate=())  # what shrinks cannot reuse its buffers
            return programs[sizes](leaves, cache, *arguments)

        return in_turn(functools.partial(by_size, self._leaves), self._mesh)
