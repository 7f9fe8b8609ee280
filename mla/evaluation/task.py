"""Answers to a synthetic task, by the parallel form and through the cache, at each size that the task is tested at.

What stands before the first question goes into the cache in one piece; all else is decoded token by token, as a policy that
lets entries leave after a prompt wants it. Answers are not fed back: an episode says what is read.

Legend: N episodes, B of them at once, T tokens of each, P of them before the first question.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mla.cache.plan import WHOLE, CachePlan
from mla.cache.stores import ModelCache
from mla.config import Config, need
from mla.data.tasks.batches import episodes_of_test
from mla.data.tasks.contract import Episodes, Size, Task
from mla.evaluation import perplexity
from mla.evaluation.cache_bytes import abstract_bytes_at
from mla.evaluation.contract import Axis, Column, Measure, MeasuredRow, Subject
from mla.evaluation.decoding import Decoder, batch_multiple, compiled, positions, round_up
from mla.model import Model
from mla.strict_json import Count, Number

EPISODES = 512  # of each size


@dataclasses.dataclass(frozen=True)
class Answered:
    """What a model says of episodes of one size, where it is asked: float64 [N, T], 0 elsewhere.

    Attributes:
      nats, nats_cached: of the answer, by the parallel form and through the cache.
      right, right_cached: 1 where it is the likeliest token.
      asked: 1 where something is asked.
    """

    nats: np.ndarray
    nats_cached: np.ndarray
    right: np.ndarray
    right_cached: np.ndarray
    asked: np.ndarray


def answers(model: Model, mesh: Mesh, episodes: Episodes, batch: int, plan: CachePlan = WHOLE) -> Answered:
    """Reads episodes both ways.

    Args:
      model, mesh: the model with its parameters, and where they live.
      episodes: of one size.
      batch: B at most; rounded up to the devices a batch is split over.
      plan: what the cache does beside storing entries.
    """
    count, length = episodes.tokens.shape
    batch = round_up(min(batch, count), batch_multiple(mesh))
    prompt = int(np.argmax(episodes.weights.any(axis=0)))  # what stands before the first question of any episode
    decoder = Decoder(model, batch, length, mesh, plan, prompt=max(prompt, 1))

    def judged(logits: jax.Array, targets: jax.Array) -> jax.Array:
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jnp.stack([jax.nn.logsumexp(logits, axis=-1) - chosen, jnp.argmax(logits, axis=-1) == targets])

    def whole(model: Model, tokens: jax.Array, targets: jax.Array) -> jax.Array:
        return judged(model(tokens), targets)

    def step(model: Model, cache: ModelCache, new: jax.Array, where: jax.Array, targets: jax.Array) -> Any:
        logits, cache = model.extend(new, where, cache)
        return judged(logits, targets), cache

    parallel, extend = compiled(model, mesh, whole), decoder.compiled(step)
    parts = [(0, prompt)] * bool(prompt) + [(t, t + 1) for t in range(prompt, length)]
    judgements = []
    for first in range(0, count, batch):
        tokens, targets = (_filled(part[first : first + batch], batch) for part in (episodes.tokens, episodes.targets))
        cache, columns = decoder.empty(), []
        for start, stop in parts:
            said, cache = extend(cache, tokens[:, start:stop], positions(batch, start, stop), targets[:, start:stop])
            columns.append(said)
        cached = np.concatenate([np.asarray(column) for column in columns], axis=-1)
        judgements.append(np.concatenate([np.asarray(parallel(tokens, targets)), cached]))
    nats, right, nats_cached, right_cached = np.concatenate(judgements, axis=1)[:, :count].astype(np.float64)
    asked = (episodes.weights > 0).astype(np.float64)
    return Answered(nats * asked, nats_cached * asked, right * asked, right_cached * asked, asked)


def _filled(rows: np.ndarray, batch: int) -> np.ndarray:
    """Rows, the last one again until there are B."""
    return np.concatenate([rows, np.repeat(rows[-1:], batch - len(rows), axis=0)])


def summary(answered: Answered, task: Task, size: Size, bytes_held: int) -> dict[str, Any]:
    """The figures of a size in eval.json.

    accuracy: share of answers that are the likeliest token through the cache; exact: of episodes whose answers all are;
    loss: nats of an answer through the cache; episodes; chance, floor_bytes: see `Task`; bytes_held: content bytes of one
    sequence of T tokens.
    """
    total = answered.asked.sum()
    return {
        "accuracy": float(answered.right_cached.sum() / total),
        "exact": float((answered.right_cached.sum(axis=1) == answered.asked.sum(axis=1)).mean()),
        "loss": float(answered.nats_cached.sum() / total),
        "episodes": len(answered.asked),
        "chance": task.chance(size),
        "floor_bytes": task.floor_bytes(size),
        "bytes_held": bytes_held,
    }


def measure(
    config: Config, model: Model, mesh: Mesh, task: Task, plan: CachePlan = WHOLE
) -> tuple[perplexity.Perplexity, dict[str, Any]]:
    """Nats of all answers, and the `task` object of eval.json: name; accuracy, chance: means over the sizes; and by_size.

    Raises:
      UserError: a cache that does not say what the parallel form says.
    """
    by_size, sums, differences = {}, np.zeros(3), 0.0
    with contextlib.ExitStack() as stack:
        if config.model.dtype == "float32":
            stack.enter_context(jax.default_matmul_precision("highest"))
        for size in task.test:
            episodes = episodes_of_test(task, size, EPISODES)
            answered = answers(model, mesh, episodes, config.eval.batch_size, plan)
            by_size[str(size)] = summary(answered, task, size, abstract_bytes_at(model, size.tokens, plan))
            sums += [answered.nats.sum(), answered.nats_cached.sum(), answered.asked.sum()]
            differences += np.abs(answered.nats - answered.nats_cached).sum()
    loss, cached = sums[:2] / sums[2]
    quality = perplexity.Perplexity(loss, cached, differences / sums[2], int(sums[2]), 0)
    perplexity.require_working(quality.loss, "the parameters of this checkpoint are no working model")
    if plan.exact(max(size.tokens for size in task.test)):
        perplexity.require_agreement(quality, perplexity.tolerance(config), config)

    def mean(key: str) -> float:
        return float(np.mean([figures[key] for figures in by_size.values()]))

    return quality, {"name": task.name, "accuracy": mean("accuracy"), "chance": mean("chance"), "by_size": by_size}


@dataclasses.dataclass(frozen=True)
class SizeFigures:
    """Figures of a size; see `summary`."""

    accuracy: Number
    bytes_held: Count | None = None


@dataclasses.dataclass(frozen=True)
class Figures:
    """A task in an eval.json; see `measure`."""

    accuracy: Number | None = None
    by_size: Mapping[str, SizeFigures] = dataclasses.field(default_factory=dict)


def of_row(row: MeasuredRow) -> Figures:
    """The figures of a row; empty where it answered no task."""
    return row.figures(Figures) or Figures()


class Answers(Measure):
    """Accuracy of answers to a synthetic task, through the cache, where the corpus of the run is one."""

    schema: ClassVar[Mapping[str, type]] = {"task": Figures}
    columns: ClassVar = (Column("accuracy", lambda row: of_row(row).accuracy, ".4f", spread=True, always=False),)
    trick_columns: ClassVar = (Column("accuracy", lambda row: of_row(row).accuracy, ".4f", always=False),)
    axes: ClassVar = (Axis("accuracy", lambda row: of_row(row).accuracy),)
    trick_axes: ClassVar = (Axis("accuracy", lambda row: of_row(row).accuracy),)

    def applies(self, subject: Subject) -> bool:
        return not subject.is_text

    def require(self, subject: Subject) -> None:
        evaluation, own = subject.config.eval, "which is tested by episodes of its own; leave it out"
        for field, value, only in (("split", evaluation.split, "validation"), ("mode", evaluation.mode, "windows")):
            need(value == only, f"eval.{field}", f"{value} means nothing to a task, {own}")
        need(not evaluation.tokens, "eval.tokens", f"{evaluation.tokens} means nothing to a task, {own}")

    def measure(self, subject: Subject) -> dict[str, Any]:
        assert subject.data.task is not None
        quality, figures = measure(subject.config, subject.model, subject.mesh, subject.data.task, subject.plan)
        return perplexity.summary(quality, altered=subject.plan.alters) | {"task": figures}

    def said(self, figures: dict[str, Any], config: Config) -> str:
        task = figures["task"]
        sizes = "; ".join(f"{size} {each['accuracy']:.4f}" for size, each in task["by_size"].items())
        return f"{task['name']}: accuracy {task['accuracy']:.4f} (chance {task['chance']:.4f}), through the cache: {sizes}"
