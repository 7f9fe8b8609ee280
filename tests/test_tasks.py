"""Synthetic tasks: their episodes against rules written anew, training on them, and answers through the cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import status

from mla import commands
from mla import config as configs
from mla import model as models
from mla.config import Config
from mla.data import tasks
from mla.data.prepared import prepare
from mla.data.tasks.batches import TaskBatches, episodes_of_test, seed_of
from mla.data.tasks.contract import Size
from mla.data.tasks.mqar import BASED_TEST, MQAR
from mla.errors import UserError
from mla.evaluation import task as answers
from mla.evaluation.evaluate import evaluate
from mla.sharding import make_mesh
from mla.training.loop import train

BASED = MQAR(vocabulary=8192, test=BASED_TEST)
SMALL = "mqar:vocabulary=16,train=16x2+32x4,test=16x2+32x4"


@given(st.integers(1, 16), st.integers(0, 20), st.integers(0, 2**32 - 1), st.sampled_from([0.01, 0.5, 1.0]))
@settings(deadline=None, max_examples=40)
def episodes_of_test_of_mqar(pairs: int, spare: int, seed: int, power: float) -> None:
    """A reader that goes token by token answers everything; no answer stands where it is asked for."""
    size = Size(4 * pairs + 2 * spare, pairs)
    task = MQAR(vocabulary=40, train=(size,), test=(size,), power=power)
    drawn = task.draw(size, 3, seed)
    assert all(part.shape == (3, size.tokens) for part in drawn)
    for tokens, targets, weights, distances in zip(*drawn, strict=True):
        context = tokens[: 2 * pairs].reshape(pairs, 2)
        known = dict(context.tolist())
        assert len(known) == pairs and len(set(known.values())) == pairs
        assert all(1 <= key < 20 <= value < 40 for key, value in known.items())
        asked = np.flatnonzero(weights)
        assert sorted(tokens[asked].tolist()) == sorted(known)
        assert (asked >= 2 * pairs).all() and (asked % 2 == 0).all()
        assert [known[key] for key in tokens[asked].tolist()] == targets[asked].tolist()
        for place in asked:
            assert tokens[place - distances[place]] == targets[place]
        rest = np.delete(tokens[2 * pairs :], asked - 2 * pairs)
        assert not rest.any() and not targets[weights == 0].any() and not distances[weights == 0].any()
    again = task.draw(size, 3, seed)
    assert all(np.array_equal(a, b) for a, b in zip(drawn, again, strict=True))
    assert not np.array_equal(drawn.tokens, task.draw(size, 3, (seed + 1) % 2**32).tokens) or pairs == 1


def test_gaps_follow_their_law() -> None:
    """The place of one key among 20 gaps, of 40,000 episodes, against (g + 1)^(a - 1): each within five standard errors."""
    size, count = Size(42, 1), 40_000
    asked = np.argmax(MQAR(vocabulary=8, test=(size,)).draw(size, count, 0).weights, axis=1)
    shares = np.bincount((asked - 2) // 2, minlength=20) / count
    law = (np.arange(20) + 1.0) ** -0.99
    law /= law.sum()
    assert (np.abs(shares - law) < 5 * np.sqrt(law * (1 - law) / count)).all()


def test_what_a_window_can_reach_is_the_published_row() -> None:
    """Mean over the seven tests of Based of answers at most W back: the closed form that published windows stand on."""
    distances = [(drawn := BASED.draw(size, 400, 1)).distances[drawn.weights > 0] for size in BASED_TEST]
    reached = [
        float(np.mean([(each <= width).mean() for each in distances])) for width in (8, 16, 32, 64, 128, 256, 512, 1024)
    ]
    close(reached, [0.060, 0.143, 0.313, 0.514, 0.655, 0.797, 0.936, 1.0], 0.01, "reach")
    assert BASED.floor_bytes(BASED_TEST[-1]) == 384


def test_training_and_tests_share_no_seed_and_batches_resume() -> None:
    task = tasks.parse(SMALL)
    one, other = (TaskBatches(task, 32, 4, seed=3) for _ in range(2))
    first = [next(one) for _ in range(4)]
    other.set_state({"taken": 2})
    for expected, resumed in zip(first[2:], [next(other), next(other)], strict=True):
        jax.tree.map(np.testing.assert_array_equal, expected, resumed)
    assert one.get_state() == other.get_state() == {"taken": 4}
    assert [int(np.flatnonzero(batch.weights[0]).max()) < 16 for batch in first] == [True, False, True, False]
    assert all(batch.tokens.shape == batch.targets.shape == (4, 32) for batch in first)
    assert max(seed_of(3, step) for step in range(200)) < 2**31 <= min(seed_of(3, step, test=True) for step in range(200))
    assert not np.array_equal(next(TaskBatches(task, 32, 4, seed=4)).tokens, first[0].tokens)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "mqar:pairs=3",
            "config.data.corpus: mqar: 'pairs=3' is no FIELD=VALUE of this task; known: train, test, vocabulary, power",
        ),
        ("mqar:vocabulary", "config.data.corpus: mqar: 'vocabulary' is no FIELD=VALUE"),
        ("mqar:vocabulary=x", "config.data.corpus: mqar: vocabulary: 'x' is not of the kind of 512"),
        ("mqar:vocabulary=7", "config.data.corpus: mqar: vocabulary=7 has no two halves"),
        ("mqar:power=0", "config.data.corpus: mqar: power=0 is not above 0 and at most 1"),
        ("mqar:train=64", "config.data.corpus: mqar: train: '64': write TOKENSxITEMS+.., such as 64x4+64x8"),
        ("mqar:train=64x17", "config.data.corpus: mqar: 64x17: 17 pairs and as many queries take an even 68 tokens or more"),
        ("mqar:train=65x4", "config.data.corpus: mqar: 65x4: 4 pairs and as many queries take an even 16 tokens or more"),
        ("mqar:vocabulary=16,train=64x8", "config.data.corpus: mqar: 64x8: vocabulary=16 has 7 keys; raise it"),
    ],
)
def test_sizes_that_cannot_be_are_one_line(spec: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        tasks.parse(spec)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_a_specification_says_every_field() -> None:
    task = tasks.parse(SMALL)
    assert tasks.told(task) == "mqar:train=16x2+32x4,test=16x2+32x4,vocabulary=16,power=0.01"
    assert tasks.parse(tasks.told(task)) == task and not tasks.is_task("mqa") and tasks.is_task("mqar")


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


@pytest.mark.parametrize("variant", ["gqa", "short_convolution,mqa", "sliding_window"])
def test_answers_through_the_cache_are_those_of_the_parallel_form(variant: str, float64: Any) -> None:
    """Nats and choices of a model that knows nothing, in float64, against logits that numpy judges."""
    config = tiny(variant, model={"d_model": 16, "num_layers": 2, "num_heads": 2, "dtype": "float64"})
    model, mesh = models.create(config, 16), make_mesh(configs.MeshConfig(data=1), jax.devices()[:1])
    episodes = episodes_of_test(tasks.parse(SMALL), Size(16, 2), 5)
    said = answers.answers(model, mesh, episodes, batch=3)
    logits = np.asarray(jax.jit(model.__call__)(jnp.asarray(episodes.tokens)), np.float64)
    logs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    nats = -np.take_along_axis(logs, episodes.targets[..., None].astype(int), axis=-1)[..., 0] * episodes.weights
    close(said.nats, nats, 1e-9, "parallel")
    close(said.nats_cached, nats, 1e-9, "through the cache")
    right = (logits.argmax(axis=-1) == episodes.targets) * episodes.weights
    np.testing.assert_array_equal(said.right, right)
    np.testing.assert_array_equal(said.right_cached, right)
    figures = answers.summary(said, tasks.parse(SMALL), Size(16, 2), 7)
    assert figures["accuracy"] == right.sum() / episodes.weights.sum() and figures["chance"] == 1 / 8
    close(figures["loss"], nats.sum() / episodes.weights.sum(), 1e-9)


def test_a_run_learns_what_is_asked_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough steps to leave chance behind, and longer training of a finished run; codecs are measured."""
    monkeypatch.setattr(answers, "EPISODES", 64)
    data = {"corpus": "mqar:vocabulary=8,train=8x1,test=8x1+16x2", "tokenizer": "ids:8"}
    fields: dict[str, Any] = {"data": data, "context": 8, "batch_size": 32, "log": {"every_steps": 20}}
    fields |= {"optimizer": {"warmup_steps": 10, "learning_rate": 1e-2}, "checkpoint": {"every_steps": 40}}
    variant, workdir = "short_convolution,gqa", tmp_path / "run"
    assert train(tiny(variant, steps=40, **fields), workdir) == 0
    assert train(tiny(variant, steps=80, **fields), workdir) == 0
    config = configs.from_dict(json.loads((workdir / "config.json").read_text()))
    row = evaluate(workdir, config)
    assert set(row["task"]["by_size"]) == {"8x1", "16x2"} and row["task"]["by_size"]["8x1"]["accuracy"] > 0.9
    assert row["task"]["chance"] == 0.25 and row["eval_tokens"] == 64 * 3
    mean = np.mean([figures["accuracy"] for figures in row["task"]["by_size"].values()])
    close(row["task"]["accuracy"], mean, 1e-12)
    close(row["loss"], row["loss_cached"], 1e-5)
    assert (
        row["task"]["by_size"]["16x2"]["bytes_held"] == 16 * row["cache"]["bytes_per_token"] + row["cache"]["constant_bytes"]
    )
    assert "baseline" not in row and row["corpus"]["tokenizer"] == "ids:8" and "bits_per_byte" not in row
    coded = evaluate(workdir, commands.override(config, ["--config.eval.cache.codec=int2"], commands.EVALUATION))
    assert coded["loss"] != coded["loss_full_cache"] and "codec=int2" in coded["name"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["eval.split=train"], "config.eval.split: train means nothing to a task"),
        (["eval.mode=stream"], "config.eval.mode: stream means nothing to a task"),
        (["eval.tokens=7"], "config.eval.tokens: 7 means nothing to a task"),
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
    with pytest.raises(UserError, match=r"config\.context: 16 is less than the 32 tokens of mqar; set it to 32"):
        train(tiny("gqa", context=16), tmp_path / "run")
    for variant, said in (("mqr+mla", "did you mean 'mqar'"), ("mqar", "write TASK+MECHANISM")):
        assert status("train", f"--config=configs/tasks.py:{variant}", f"--workdir={tmp_path / 'run'}") == 1
        assert said in capfd.readouterr().err
    assert not (tmp_path / "run").exists()
