"""One training step over a mesh: plain `jax.jit` and `jax.value_and_grad` over split NNX state."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from mla import model as models
from mla.config import Config, OptimizerConfig
from mla.errors import UserError
from mla.training.loss import cross_entropy
from mla.training.sharding import batch_sharding, require_whole_heads, shardings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a checkpoint holds of a model: fp32 master parameters (a nested dict), optimizer state, steps taken."""

    params: Any
    opt_state: Any
    step: jax.Array


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up from 0 to the peak, then cosine to `final_fraction` of it at the last step."""
    if config.warmup_steps >= steps:
        raise UserError(
            f"config.optimizer.warmup_steps: {config.warmup_steps} leaves nothing of steps={steps}; set it lower"
        )
    peak = config.learning_rate
    return optax.warmup_cosine_decay_schedule(0.0, peak, config.warmup_steps, steps, peak * config.final_fraction)


def decays(params: Any) -> Any:
    """Which parameters decay: matrices do, norm gains and biases do not."""
    return jax.tree.map(lambda p: p.ndim >= 2, params)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    adamw = optax.adamw(
        schedule(config, steps),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decays,
    )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(), adamw)


class Trainer:
    """Initialises and steps a `TrainState` on a mesh.

    Attributes:
      sizes: parameter counts and the solved MLP width.
      abstract_state: the `TrainState` as shapes with shardings: what a checkpoint is restored into.
    """

    def __init__(self, config: Config, vocab_size: int, mesh: Mesh):
        self.config, self.mesh = config, mesh
        require_whole_heads(config, mesh)
        split = mesh.shape["data"] * mesh.shape["fsdp"]
        micro_batch = config.batch_size // config.optimizer.accumulate_steps
        if micro_batch % split:
            raise UserError(
                f"config.batch_size: {config.batch_size} in {config.optimizer.accumulate_steps} micro-batch(es) does not"
                f" divide over mesh.data x mesh.fsdp = {split}"
            )
        self.sizes = models.sizes(config, vocab_size)
        self.schedule = schedule(config.optimizer, config.steps)
        self.optimizer = make_optimizer(config.optimizer, config.steps)
        abstract = nnx.eval_shape(lambda: models.create(config, vocab_size))
        self.graph = nnx.graphdef(abstract)
        self._create = functools.partial(models.create, config, vocab_size)

        shapes = jax.eval_shape(self._init)
        placed = shardings(shapes, mesh)
        self.abstract_state = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, placed)
        self.init = jax.jit(self._init, out_shardings=placed)
        self.step = jax.jit(
            self._step,
            in_shardings=(placed, batch_sharding(mesh)),
            out_shardings=(placed, None),
            donate_argnums=0,
        )

    def _init(self) -> TrainState:
        params = models.parameters(self._create())
        return TrainState(params, self.optimizer.init(params), jnp.zeros((), jnp.int32))

    def loss(self, params: Any, tokens: jax.Array) -> jax.Array:
        """Mean nats per predicted token of windows int32 [B, context + 1]."""
        model = models.with_parameters(self.graph, params)
        hidden = model.hidden(tokens[:, :-1])
        return cross_entropy(hidden, model.head_kernel(), tokens[:, 1:], self.config.loss_chunk_tokens)

    def _gradients(self, params: Any, tokens: jax.Array) -> tuple[jax.Array, Any]:
        count = self.config.optimizer.accumulate_steps
        if count == 1:
            return jax.value_and_grad(self.loss)(params, tokens)
        # Micro-batches take every count-th row, so that each stays split over the devices as the batch is.
        micro = tokens.reshape(-1, count, tokens.shape[1]).swapaxes(0, 1)

        def add(total: Any, rows: jax.Array) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, jax.value_and_grad(self.loss)(params, rows)), None

        zero = jax.tree.map(jnp.zeros_like, (jnp.zeros((), jnp.float32), params))
        total, _ = jax.lax.scan(add, zero, micro)
        return jax.tree.map(lambda a: a / count, total)

    def _step(self, state: TrainState, tokens: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        """Donates `state`. tokens: int32 [batch_size, context + 1]. Metrics are those before the update."""
        loss, gradients = self._gradients(state.params, tokens)
        updates, opt_state = self.optimizer.update(gradients, state.opt_state, state.params)
        metrics = {
            "loss": loss,
            "grad_norm": optax.global_norm(gradients),
            "learning_rate": self.schedule(state.step),
        }
        return TrainState(optax.apply_updates(state.params, updates), opt_state, state.step + 1), metrics

    def model(self, params: Any) -> models.Model:
        """The module with these parameters in it."""
        return models.with_parameters(self.graph, params)
