"""Answers to a synthetic task, by the parallel form and through the cache, at each level that it is tested at.

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
from mla.data import tasks
from mla.data.tasks import Episodes, Mixture, Task
from mla.evaluation import perplexity
from mla.evaluation.cache_bytes import abstract_bytes_at
from mla.evaluation.contract import Axis, Column, Measure, MeasuredRow, Subject
from mla.evaluation.decoding import Decoder, batch_multiple, compiled, positions, round_up
from mla.model import Model
from mla.strict_json import Count, Number

EPISODES = 512  # of each level


@dataclasses.dataclass(frozen=True)
class Answered:
    """What a model says of episodes of one level, where it is asked: float64 [N, T], 0 elsewhere.

    Attributes:
      nats, nats_cached: of the answer, by the parallel form and through the cache.
      said, said_cached: int32 [N, T], the likeliest token everywhere.
    """

    nats: np.ndarray
    nats_cached: np.ndarray
    said: np.ndarray
    said_cached: np.ndarray


def answers(model: Model, mesh: Mesh, episodes: Episodes, batch: int, plan: CachePlan = WHOLE) -> Answered:
    """Reads episodes both ways.

    Args:
      model, mesh: the model with its parameters, and where they live.
      episodes: of one level.
      batch: B at most; rounded up to the devices a batch is split over.
      plan: what the cache does beside storing entries.
    """
    count, length = episodes.tokens.shape
    batch = round_up(min(batch, count), batch_multiple(mesh))
    prompt = int(np.argmax(episodes.weights.any(axis=0)))  # what stands before the first question of any episode
    decoder = Decoder(model, batch, length, mesh, plan, prompt=max(prompt, 1))

    def judged(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - chosen, jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def whole(model: Model, tokens: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        return judged(model(tokens), targets)

    def step(model: Model, cache: ModelCache, new: jax.Array, where: jax.Array, targets: jax.Array) -> Any:
        logits, cache = model.extend(new, where, cache)
        return judged(logits, targets), cache

    parallel, extend = compiled(model, mesh, whole), decoder.compiled(step)
    parts = [(0, prompt)] * bool(prompt) + [(t, t + 1) for t in range(prompt, length)]
    judgements: list[list[np.ndarray]] = []
    for first in range(0, count, batch):
        read, targets = (_filled(part[first : first + batch], batch) for part in (episodes.tokens, episodes.targets))
        cache, columns = decoder.empty(), []
        for start, stop in parts:
            judgement, cache = extend(cache, read[:, start:stop], positions(batch, start, stop), targets[:, start:stop])
            columns.append(judgement)
        cached = [np.concatenate([np.asarray(column) for column in kind], axis=-1) for kind in zip(*columns, strict=True)]
        judgements.append([*map(np.asarray, parallel(read, targets)), *cached])
    nats, said, nats_cached, said_cached = (np.concatenate(kind)[:count] for kind in zip(*judgements, strict=True))
    asked = episodes.weights > 0
    nats, nats_cached = (np.where(asked, each, 0).astype(np.float64) for each in (nats, nats_cached))
    return Answered(nats, nats_cached, said, said_cached)


def _filled(rows: np.ndarray, batch: int) -> np.ndarray:
    """Rows, the last one again until there are B."""
    return np.concatenate([rows, np.repeat(rows[-1:], batch - len(rows), axis=0)])


def level_of(task: Task) -> str:
    """What a level is called: the sizes that a mixture sets, `64x4`."""
    return "x".join(str(getattr(task, axis)) for axis in task.axes)


def summary(answered: Answered, episodes: Episodes, task: Task, bytes_held: int) -> dict[str, Any]:
    """The figures of a level in eval.json.

    Those of `mla.data.tasks.score` of what is said through the cache; loss: nats of an answer through the cache; chance,
    floor_bytes: see `Task`; tokens: T; bytes_held: content bytes of one sequence of T tokens.
    """
    scored = tasks.score(episodes, answered.said_cached)
    return dict(scored) | {
        "loss": float(answered.nats_cached.sum()) / scored["answers"],
        "chance": task.chance,
        "floor_bytes": task.floor_bytes(),
        "tokens": task.length,
        "bytes_held": bytes_held,
    }


def measure(
    config: Config, model: Model, mesh: Mesh, mixture: Mixture, plan: CachePlan = WHOLE
) -> tuple[perplexity.Perplexity, dict[str, Any]]:
    """Nats of all answers, and the `task` object of eval.json: name; accuracy, chance: means over the levels; by_level.

    Raises:
      UserError: a cache that does not say what the parallel form says.
    """
    by_level: dict[str, dict[str, Any]] = {}
    sums, differences, count = np.zeros(2), 0.0, 0
    with contextlib.ExitStack() as stack:
        if config.model.dtype == "float32":
            stack.enter_context(jax.default_matmul_precision("highest"))
        for task in mixture.tasks:
            episodes = task.draw(EPISODES, 0, split="test")
            answered = answers(model, mesh, episodes, config.eval.batch_size, plan)
            figures = summary(answered, episodes, task, abstract_bytes_at(model, task.length, plan))
            by_level[level_of(task)] = figures
            sums += [answered.nats.sum(), answered.nats_cached.sum()]
            differences += np.abs(answered.nats - answered.nats_cached).sum()
            count += figures["answers"]
    loss, cached = sums / count
    quality = perplexity.Perplexity(float(loss), float(cached), differences / count, count, 0)
    perplexity.require_working(quality.loss, "the parameters of this checkpoint are no working model")
    if plan.exact(mixture.length):
        perplexity.require_agreement(quality, perplexity.tolerance(config), config)

    def mean(key: str) -> float:
        return float(np.mean([figures[key] for figures in by_level.values()]))

    name = mixture.tasks[0].name
    return quality, {"name": name, "accuracy": mean("accuracy"), "chance": mean("chance"), "by_level": by_level}


def asked(subject: Subject) -> Mixture:
    """What is asked: `config.eval.task`, or what the model was trained on.

    Raises:
      UserError: no such task, or one with more ids than the model knows.
    """
    spec, trained = subject.config.eval.task, subject.data.task
    assert trained is not None
    if not spec:
        return trained
    mixture = tasks.parse(spec, "config.eval.task")
    known = trained.vocab_size
    need(mixture.vocab_size <= known, "eval.task", f"{spec!r} has {mixture.vocab_size} ids, and the model knows {known}")
    return mixture


@dataclasses.dataclass(frozen=True)
class LevelFigures:
    """Figures of a level; see `summary`."""

    accuracy: Number
    bytes_held: Count | None = None


@dataclasses.dataclass(frozen=True)
class Figures:
    """A task in an eval.json; see `measure`."""

    accuracy: Number | None = None
    by_level: Mapping[str, LevelFigures] = dataclasses.field(default_factory=dict)


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
        asked(subject)
        need(not evaluation.tokens, "eval.tokens", f"{evaluation.tokens} means nothing to a task, {own}")

    def measure(self, subject: Subject) -> dict[str, Any]:
        quality, figures = measure(subject.config, subject.model, subject.mesh, asked(subject), subject.plan)
        return perplexity.summary(quality, altered=subject.plan.alters) | {"task": figures}

    def said(self, figures: dict[str, Any], config: Config) -> str:
        task = figures["task"]
        levels = "; ".join(f"{level} {each['accuracy']:.4f}" for level, each in task["by_level"].items())
        return f"{task['name']}: accuracy {task['accuracy']:.4f} (chance {task['chance']:.4f}), through the cache: {levels}"
