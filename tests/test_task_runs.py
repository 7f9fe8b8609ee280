"""Runs on synthetic tasks: batches, training, and answers through the cache. tests/test_tasks.py has the episodes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close
from programs import status

from mla import commands
from mla import config as configs
from mla import model as models
from mla.config import Config
from mla.data import tasks
from mla.data.prepared import prepare
from mla.data.tasks.batches import TaskBatches
from mla.errors import UserError
from mla.evaluation import task as answers
from mla.evaluation.evaluate import evaluate
from mla.sharding import make_mesh
from mla.training.checkpoint import load_model, steps_in
from mla.training.logs import read_metrics
from mla.training.loop import train

SMALL = "mqar:vocabulary=16,mixture=16x2+32x4*2"


def test_batches_come_short_first_and_resume() -> None:
    """Each level for its share of steps, filled up behind; no episode of a test among them, or twice."""
    mixture = tasks.parse(SMALL)
    one, other = (TaskBatches(mixture, 32, 4, seed=3) for _ in range(2))
    first = [next(one) for _ in range(6)]
    other.set_state({"taken": 2})
    for expected in first[2:]:
        jax.tree.map(np.testing.assert_array_equal, expected, next(other))
    assert one.get_state() == other.get_state() == {"taken": 6}
    assert [bool(np.any(batch.weights[:, 16:])) for batch in first] == [False, True, True, False, True, True]
    assert all(batch.tokens.shape == batch.targets.shape == (4, 32) for batch in first)
    of_task = mixture.tasks[1].draw(4, 3, start=4)
    np.testing.assert_array_equal(first[1].tokens, of_task.tokens)
    assert len({batch.tokens.tobytes() for batch in first}) == 6
    assert not np.array_equal(next(TaskBatches(mixture, 32, 4, seed=4)).tokens, first[0].tokens)


def tiny(variant: str, **fields: Any) -> Config:
    data = {"corpus": SMALL, "tokenizer": "ids:16"}
    model = {"d_model": 16, "num_layers": 2, "num_heads": 2}
    log, checkpoint = {"every_steps": 1}, {"every_steps": 2}
    wanted: dict[str, Any] = {"steps": 4, "batch_size": 8, "context": 32, "data": data, "model": model, "log": log}
    wanted |= {"checkpoint": checkpoint, "optimizer": {"warmup_steps": 1}, "eval": {"decode_tokens": 0}}
    return configs.create(variant, **wanted | fields)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    config, workdir = tiny("gqa", steps=2), tmp_path_factory.mktemp("runs") / "run"
    assert train(config, workdir) == 0
    return config, workdir


@pytest.mark.parametrize("variant", ["gqa", "short_convolution,mqa"])
def test_answers_through_the_cache_are_those_of_the_parallel_form(variant: str, float64: Any) -> None:
    """Nats and choices of a model that knows nothing, in float64, against logits that numpy judges."""
    config = tiny(variant, model={"d_model": 16, "num_layers": 2, "num_heads": 2, "dtype": "float64"})
    model, mesh = models.create(config, 16), make_mesh(configs.MeshConfig(data=1), jax.devices()[:1])
    (task, _) = tasks.parse(SMALL).tasks
    episodes = task.draw(5, 0, split="test")
    said = answers.answers(model, mesh, episodes, batch=3)
    logits = np.asarray(jax.jit(model.__call__)(jnp.asarray(episodes.tokens)), np.float64)
    logs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    nats = -np.take_along_axis(logs, episodes.targets[..., None].astype(int), axis=-1)[..., 0] * episodes.weights
    close(said.nats, nats, 1e-9, "parallel")
    close(said.nats_cached, nats, 1e-9, "through the cache")
    np.testing.assert_array_equal(said.said, logits.argmax(axis=-1))
    np.testing.assert_array_equal(said.said_cached, logits.argmax(axis=-1))
    figures = answers.summary(said, episodes, task, 7)
    right = (logits.argmax(axis=-1) == episodes.targets) * episodes.weights
    assert figures["accuracy"] == right.sum() / episodes.weights.sum() and figures["chance"] == 1 / 8
    assert figures["exact"] == (right.sum(axis=1) == 2).mean() and figures["bytes_held"] == 7
    close(figures["loss"], nats.sum() / episodes.weights.sum(), 1e-9)


def test_a_run_learns_what_is_asked_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough steps to leave chance behind, and longer training of a finished run; codecs are measured."""
    monkeypatch.setattr(answers, "EPISODES", 64)
    data = {"corpus": "mqar:vocabulary=8,length=8,pairs=1", "tokenizer": "ids:8"}
    fields: dict[str, Any] = {"data": data, "context": 8, "batch_size": 32, "log": {"every_steps": 20}}
    fields["eval"] = {"decode_tokens": 0, "task": "mqar:vocabulary=8,mixture=8x1+16x2"}
    fields |= {"optimizer": {"warmup_steps": 10, "learning_rate": 1e-2}, "checkpoint": {"every_steps": 40}}
    variant, workdir = "short_convolution,gqa", tmp_path / "run"
    assert train(tiny(variant, steps=40, **fields), workdir) == 0
    assert train(tiny(variant, steps=80, **fields), workdir) == 0
    config = configs.from_dict(json.loads((workdir / "config.json").read_text()))
    row = evaluate(workdir, config)
    assert set(row["task"]["by_level"]) == {"8x1", "16x2"} and row["task"]["by_level"]["8x1"]["accuracy"] > 0.9
    assert row["task"]["chance"] == 0.25 and row["eval_tokens"] == 64 * 3
    mean = np.mean([figures["accuracy"] for figures in row["task"]["by_level"].values()])
    close(row["task"]["accuracy"], mean, 1e-12)
    close(row["loss"], row["loss_cached"], 1e-5)
    held, cache = row["task"]["by_level"]["16x2"]["bytes_held"], row["cache"]
    assert held == 16 * cache["bytes_per_token"] + cache["constant_bytes"]
    assert "baseline" not in row and row["corpus"]["tokenizer"] == "ids:8" and "bits_per_byte" not in row
    coded = evaluate(workdir, commands.override(config, ["--config.eval.cache.codec=int2"], commands.EVALUATION))
    assert coded["loss"] != coded["loss_full_cache"] and "codec=int2" in coded["name"]


def test_training_ends_at_the_accuracy_that_was_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = {"corpus": "mqar:vocabulary=8,length=8,pairs=1", "tokenizer": "ids:8"}
    fields: dict[str, Any] = {"data": data, "context": 8, "batch_size": 32, "log": {"every_steps": 20}, "steps": 200}
    fields |= {"optimizer": {"warmup_steps": 10, "learning_rate": 1e-2}, "checkpoint": {"every_steps": 1000}}
    config = tiny("short_convolution,gqa", target_accuracy=0.95, **fields)
    assert train(config, tmp_path) == 0
    logged = read_metrics(tmp_path)
    last = logged[-1]["step"]
    assert last < 200 and last % 20 == 0 and logged[-1]["accuracy"] >= 0.95
    assert all(line["accuracy"] < 0.95 for line in logged[:-1]), "and not before"
    said = f"config.target_accuracy is reached after {last} steps: {logged[-1]['accuracy']:.4f}"
    assert f"done, {said}" in capsys.readouterr().out and steps_in(tmp_path) == [last]
    assert train(config, tmp_path) == 0
    assert f"finished, {said}" in capsys.readouterr().out and read_metrics(tmp_path) == logged
    # What the parallel form says of the same episodes.
    loaded = load_model(tmp_path, make_mesh(config.mesh))
    (task,) = tasks.parse(data["corpus"]).tasks
    episodes = task.draw(32, config.seed, start=last * 32, split="validation")
    best = np.asarray(loaded.model(jnp.asarray(episodes.tokens))).argmax(-1)
    right = ((best == episodes.targets) * episodes.weights).sum() / episodes.weights.sum()
    close(logged[-1]["accuracy"], right, 1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_accuracy": 1.5}, "config.target_accuracy: 1.5 is no share of answers"),
        ({"target_accuracy": 0.9}, "config.target_accuracy: 0.9 has no effect while config.data.corpus is text"),
    ],
)
def test_targets_that_mean_nothing_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        configs.validate(configs.create("mla", **fields))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["eval.split=train"], "config.eval.split: train means nothing to a task"),
        (["eval.mode=stream"], "config.eval.mode: stream means nothing to a task"),
        (["eval.tokens=7"], "config.eval.tokens: 7 means nothing to a task"),
        (["eval.task=mqr"], "config.eval.task: 'mqr' is not known; did you mean 'mqar'"),
        (["eval.task=mqar:pairs=4"], "config.eval.task: 'mqar:pairs=4' has 512 ids, and the model knows 16"),
        (["eval.task=mqar:vocabulary=16,length=8,pairs=3"], "config.eval.task: mqar: pairs=3 need"),
    ],
)
def test_what_means_nothing_to_a_task_is_refused(overrides: list[str], message: str, run: tuple[Config, Path]) -> None:
    config, workdir = run
    with pytest.raises(UserError) as error:
        evaluate(workdir, commands.override(config, [f"--config.{o}" for o in overrides], commands.EVALUATION))
    assert message in str(error.value)


def test_ids_and_text_do_not_mix(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"config\.data\.tokenizer: 'bytes': mqar is made of ids; set it to ids:512"):
        prepare(configs.DataConfig(corpus="mqar"))
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match=r"config\.data\.tokenizer: ids:512 is for tasks, and config\.data\.corpus is text"):
        prepare(configs.DataConfig(corpus=str(tmp_path / "a.txt"), tokenizer="ids:512", cache_dir=str(tmp_path / "cache")))
    with pytest.raises(UserError, match=r"config\.data\.tokenizer: 'ids:x': write ids:SIZE"):
        prepare(configs.DataConfig(tokenizer="ids:x"))
    with pytest.raises(UserError, match=r"config\.eval\.task: 'mqar' has no effect while config\.data\.corpus is text"):
        configs.validate(configs.create("mla", eval={"task": "mqar"}))
    with pytest.raises(UserError, match=r"config\.context: 16 is less than the 32 tokens of config\.data\.corpus; set it"):
        train(tiny("gqa", context=16), tmp_path / "run")
    for variant, said in (("mqr+mla", "did you mean 'mqar'"), ("mqar", "write TASK+MECHANISM")):
        assert status("train", f"--config=configs/tasks.py:{variant}", f"--workdir={tmp_path / 'run'}") == 1
        assert said in capfd.readouterr().err
    assert not (tmp_path / "run").exists()
