"""The programs of a run on devices that need not exist: a training step, a prefill and a decode step, lowered from shapes.

Legend: B sequences, T tokens of each, S new tokens.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mla import flops
from mla import model as models
from mla.config import Config
from mla.data.batch import Batch
from mla.errors import UserError
from mla.evaluation.decoding import batch_multiple, in_compute_dtype
from mla.sharding import batch_sharding, cache_shardings, put, shardings
from mla.training.step import Trainer


def train(config: Config, vocab_size: int, mesh: Mesh) -> tuple[Any, tuple[Any, ...]]:
    """The training step of `config`, a compiled function with what it takes as shapes: state and batch."""
    trainer = Trainer(config, vocab_size, mesh)
    tokens = jax.ShapeDtypeStruct((config.batch_size, config.context), jnp.int32, sharding=batch_sharding(mesh))
    return trainer.step, (trainer.abstract_state, Batch(tokens, tokens))


def prefill(config: Config, vocab_size: int, mesh: Mesh) -> tuple[Any, tuple[Any, ...]]:
    """A prompt of the evaluated context through an empty cache, for the logits of its last token."""
    return _extend(config, vocab_size, mesh, config.evaluated_context)


def decode(config: Config, vocab_size: int, mesh: Mesh) -> tuple[Any, tuple[Any, ...]]:
    """One more token of each sequence after the evaluated context."""
    return _extend(config, vocab_size, mesh, 1)


def _extend(config: Config, vocab_size: int, mesh: Mesh, new: int) -> tuple[Any, tuple[Any, ...]]:
    """S new tokens of `eval.decode_batch` sequences through a cache with room for the evaluated context and one more."""
    batch, capacity = config.eval.decode_batch, config.evaluated_context + 1
    if batch % batch_multiple(mesh):
        raise UserError(
            f"config.eval.decode_batch: {batch} does not divide over mesh.data x mesh.fsdp = {batch_multiple(mesh)}"
        )
    model = nnx.eval_shape(lambda: models.create(config, vocab_size, mesh=mesh))
    graph, axes = nnx.graphdef(model), models.axes(model)

    def used(params: Any) -> Any:
        return models.parameters(in_compute_dtype(models.with_parameters(graph, params)))

    shapes = jax.eval_shape(used, models.parameters(model))
    params = put(shapes, shardings(shapes, axes, mesh))
    empty = jax.eval_shape(lambda: model.init_cache(batch, capacity))
    placed = cache_shardings(empty, mesh)
    tokens = jax.ShapeDtypeStruct((batch, new), jnp.int32, sharding=batch_sharding(mesh))

    def step(params: Any, tokens: jax.Array, positions: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        logits, cache = models.with_parameters(graph, params).extend(tokens, positions, cache, last_only=True)
        return jnp.argmax(logits[:, -1], axis=-1), cache

    everywhere = NamedSharding(mesh, PartitionSpec())
    program = jax.jit(step, donate_argnums=3, out_shardings=(everywhere, placed))
    return program, (params, tokens, tokens, put(empty, placed))


def formula(step: str, config: Config, vocab_size: int) -> float:
    """FLOPs of a program of `PROGRAMS` by `mla.flops`, of all devices together.

    Of a prefill as if every token went through every layer; the program has the last one alone go on where nobody looks at
    the others any more (`Model.extend`).
    """
    model = nnx.eval_shape(lambda: models.create(config, vocab_size))
    if step == "train":
        return flops.training(model, config.context) * config.batch_size * config.context
    batch, length, head = config.eval.decode_batch, config.evaluated_context, 2.0 * model.embedding.size
    if step == "prefill":  # logits of the last token
        return batch * (length * (flops.forward(model, length).total - head) + head)
    return batch * flops.forward(model, length + 1, decode=True).total


PROGRAMS = {"train": train, "prefill": prefill, "decode": decode}
