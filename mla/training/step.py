"""One training step over a mesh: plain `jax.jit` and `jax.value_and_grad` over split NNX state."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from mla import flops
from mla import model as models
from mla.attention.contract import Step
from mla.config import Config, OptimizerConfig
from mla.data.batch import Batch
from mla.errors import UserError
from mla.layers.basic import Axes
from mla.sharding import batch_sharding, partition, platform, put, require_whole_heads, shardings
from mla.training.loss import cross_entropy


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a checkpoint holds of a model: fp32 master parameters (a nested dict), optimizer state, steps taken."""

    params: Any
    opt_state: Any
    step: jax.Array


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up from 0 to the peak, then cosine to `final_fraction` of it at the last step.

    After each step of `restart.at` it starts again: linear from the rate that was reached to `restart.peak_fraction` of the
    peak, then cosine to `final_fraction` of that, at the next restart or the last step.
    """
    parts, reached, restart = [], 0.0, config.restart
    for start, end in itertools.pairwise((0, *restart.at, steps)):
        own, fraction = (restart.warmup_steps, restart.peak_fraction) if start else (0, 1.0)
        warmup, peak = own or config.warmup_steps, config.learning_rate * fraction
        if warmup >= end - start:
            field, of = ("restart.warmup_steps", f"steps {start} to {end}") if start else ("warmup_steps", f"steps={end}")
            raise UserError(f"config.optimizer.{field}: {warmup} leaves nothing of {of}; set it lower")
        final = peak * config.final_fraction
        parts.append(optax.warmup_cosine_decay_schedule(reached, peak, warmup, end - start, final))
        reached = final
    return optax.join_schedules(parts, restart.at) if restart.at else parts[0]


def make_optimizer(
    config: OptimizerConfig, steps: int, decays: Any, additions: Any = None
) -> optax.GradientTransformationExtraArgs:
    """AdamW after clipping.

    Args:
      config, steps: as `schedule` takes them.
      decays: which parameters decay, see `models.decays`.
      additions: truth values in the shape of the parameters; None: none ever waits. Otherwise `update` takes `alone`, a
        truth value: while it is true, the moments of all but the additions stay as they are, and that step does not count
        in the correction of their bias. What waits still gets an update, by the moments it has: leave it out.
    """
    adam = optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.eps)
    if additions is not None:
        labels = jax.tree.map(lambda added: "additions" if added else "others", additions)
        adam = optax.partition({"additions": adam, "others": _waiting(adam)}, labels)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        optax.chain(
            adam,
            optax.add_decayed_weights(config.weight_decay, decays),
            optax.scale_by_learning_rate(schedule(config, steps)),
        ),
    )


def _waiting(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`inner`, whose state stays as it is in the updates of `alone`."""

    def update(updates: Any, state: Any, params: Any = None, *, alone: jax.Array, **_: Any) -> tuple[Any, Any]:
        updates, after = inner.update(updates, state, params)
        return updates, jax.tree.map(functools.partial(jnp.where, alone), state, after)

    return optax.GradientTransformationExtraArgs(inner.init, update)


class Trainer:
    """Initialises and steps a `TrainState` on a mesh.

    Attributes:
      sizes: parameter counts and the solved MLP width.
      platform: of the devices, see `mla.sharding.platform`.
      abstract_state: the `TrainState` as shapes with shardings: what a checkpoint is restored into.
      additions: which parameters a run may start without, see `models.additions`.
      token_flops: FLOPs of a step for each of its tokens, by formula (`mla.flops`).
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
        self.platform = platform(mesh)
        self._create = functools.partial(models.create, config, vocab_size, mesh=mesh)
        abstract = nnx.eval_shape(self._create)
        self.graph = nnx.graphdef(abstract)
        self.additions = models.additions(abstract)
        self.token_flops = flops.training(abstract, config.context)
        waits = jax.eval_shape(lambda: abstract.additions_alone(self.now(jnp.zeros((), jnp.int32)))) is not None
        decays, apart = models.decays(abstract), self.additions if waits else None
        self.optimizer = make_optimizer(config.optimizer, config.steps, decays, apart)

        shapes = jax.eval_shape(self._init)
        placed = self._placed(shapes, models.axes(abstract))
        self.abstract_state = put(shapes, placed)
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

    def _placed(self, shapes: TrainState, axes: Any) -> TrainState:
        """Where a state lives: each part of the optimizer's that stands for a parameter where that parameter does."""
        everywhere: Any = partition((), (), self.mesh)
        params = shardings(shapes.params, axes, self.mesh)

        def absent(part: Any) -> bool:  # of a parameter that this part of the state is not about
            return isinstance(part, optax.MaskedNode)

        def follow(part: Any, sharding: Any) -> Any:
            return part if absent(part) else sharding

        rules: dict[str, Any] = {"transform_non_params": lambda _: everywhere, "is_leaf": absent}
        opt_state = optax.tree_utils.tree_map_params(self.optimizer, follow, shapes.opt_state, params, **rules)
        return TrainState(params, opt_state, everywhere)

    def objective(
        self, params: Any, batch: Batch, step: Step | None = None
    ) -> tuple[jax.Array, tuple[jax.Array, list[dict[str, jax.Array]]]]:
        """What is minimised: mean nats per predicted token (`balanced` weights), and what layers add to it at a step.

        Returns:
          the sum, and (the nats, what each layer has to report, see `models.Said`).
        """
        model = models.with_parameters(self.graph, params)
        hidden, said = model.forward(batch.tokens, step=step, place=self._by_batch)
        # Whole along the model's channels: otherwise each device sums parts of all logits.
        kernel = self._constrained(model.head_kernel(), (None, "vocab"))
        loss = cross_entropy(hidden, kernel, batch.targets, self.config.loss_chunk_tokens, batch.weights)
        added = sum(owner.total(losses) for owner, losses in model.by_owner(said.losses).items())
        return loss + added, (loss, said.metrics)

    def _by_batch(self, x: jax.Array) -> jax.Array:
        """The residual stream [B, T, D], each sequence whole on its devices."""
        return self._constrained(x, ("batch", None, None))

    def _constrained(self, x: jax.Array, axes: Axes) -> jax.Array:
        """x where its axes say; on one device, as it is."""
        if self.mesh.size == 1:
            return x
        return jax.lax.with_sharding_constraint(x, partition(axes, x.shape, self.mesh))

    def _progress(self, step: jax.Array) -> jax.Array:
        """`Step.progress`: where the schedule restarts, the steps that were planned are through."""
        restarts = self.config.optimizer.restart.at
        if restarts:
            return jnp.minimum(step.astype(jnp.float32) / restarts[0], 1.0)
        return step.astype(jnp.float32) / self.config.steps

    def now(self, step: jax.Array) -> Step:
        """What layers are told after `step` steps; the key is a function of the seed and of that number."""
        key = jax.random.fold_in(jax.random.key(self.config.seed), step)
        return Step(self._progress(step), self._progress(step - 1), key)

    def _prepared(self, params: Any, now: Step) -> Any:
        """Parameters as the layers want them before this step."""
        model = models.with_parameters(self.graph, params)
        for block in model.blocks:
            block.mixer.before_step(now)
            block.mlp.before_step(now)
        return models.parameters(model)

    def _gradients(self, params: Any, batch: Batch, now: Step) -> tuple[tuple[jax.Array, list[dict[str, jax.Array]]], Any]:
        """((nats, what layers report), gradients of `objective`), means over the micro-batches."""
        batch, count = batch.balanced(), self.config.optimizer.accumulate_steps

        def gradients(part: Batch, number: Any) -> Any:
            made, reported = jax.grad(self.objective, has_aux=True)(params, part, now.fold(number))
            return reported, made

        if count == 1:
            return gradients(batch, 0)  # type: ignore[no-any-return]

        def add(total: Any, numbered: tuple[Batch, jax.Array]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, gradients(*numbered)), None

        micro = batch.split(count)
        shapes = jax.eval_shape(gradients, jax.tree.map(lambda a: a[0], micro), 0)
        zero = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
        total, _ = jax.lax.scan(add, zero, (micro, jnp.arange(count)))
        return jax.tree.map(lambda a: a / count, total)  # type: ignore[no-any-return]

    def _step(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        """Donates `state`. batch: [batch_size, context] tokens. Metrics are those before the update."""
        now = self.now(state.step)
        params = self._prepared(state.params, now)
        (loss, reported), gradients = self._gradients(params, batch, now)
        alone = self.model(params).additions_alone(now)
        learns = None if alone is None else jax.tree.map(lambda added: added | ~alone, self.additions)
        if learns is not None:  # what waits has no part in the norm that is clipped
            gradients = jax.tree.map(lambda learn, slope: jnp.where(learn, slope, 0), learns, gradients)
        told = {} if alone is None else {"alone": alone}
        updates, opt_state = self.optimizer.update(gradients, state.opt_state, params, **told)
        after = optax.apply_updates(params, updates)
        after = after if learns is None else jax.tree.map(jnp.where, learns, after, params)
        metrics = {
            "loss": loss,
            "grad_norm": optax.global_norm(gradients),
            "learning_rate": self.schedule(state.step),
        }
        owners: dict[str, type] = dict.fromkeys(metrics, Trainer)
        for owner, said in self.model(params).by_owner(reported).items():
            logged = owner.logged(said)
            for name in sorted(logged.keys() & owners.keys()):
                raise TypeError(f"both {owners[name].__name__} and {owner.__name__} log a metric {name!r}; rename one")
            metrics, owners = metrics | logged, owners | dict.fromkeys(logged, owner)
        return TrainState(after, opt_state, state.step + 1), metrics

    def model(self, params: Any) -> models.Model:
        """The module with these parameters in it."""
        return models.with_parameters(self.graph, params)
