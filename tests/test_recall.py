"""Associative recall: the episodes are what they claim, and the score is right for models that know all and nothing."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from mla import config as configs
from mla import model as models
from mla.cache import eviction
from mla.cache.evicted import Eviction
from mla.cache.plan import CachePlan
from mla.data import corpora
from mla.data import prepared as data
from mla.data.corpora import RECALL_FILLER, RECALL_KEYS, RECALL_VALUES, recall_episodes, recall_prompt
from mla.errors import UserError
from mla.evaluation import cache_bytes, perplexity, recall, speed
from mla.evaluation.evaluate import evaluate_model
from mla.sharding import AXES

BYTES = ("bytes_per_token", "bytes_per_token_formula", "constant_bytes")
SPEEDS = ("prefill_tokens_per_second", "tokens_per_second")


def definitions(episode: np.ndarray, pairs: int) -> dict[int, int]:
    """Value by key, each key defined once."""
    prompt = bytes(episode[: recall_prompt(pairs)].astype(np.uint8))
    keys, values = prompt[: 2 * pairs : 2], prompt[1 : 2 * pairs : 2]
    assert sorted(keys) == sorted(RECALL_KEYS[:pairs]) and set(values) <= set(RECALL_VALUES[:pairs])
    assert prompt[2 * pairs :] == RECALL_FILLER
    return dict(zip(keys, values, strict=True))


def oracle(episodes: np.ndarray, pairs: int) -> np.ndarray:
    """What `predict` would return for a model that looks every key up."""
    queries = episodes[:, recall_prompt(pairs) : -1]
    rows = [[0, *map(definitions(whole, pairs).get, row)] for whole, row in zip(episodes, queries.tolist(), strict=True)]
    return np.asarray([[value or 0 for value in row] for row in rows], np.int32)


@pytest.mark.parametrize("pairs", [2, 5, 8, 26])
def test_every_query_is_answered_by_its_definition(pairs: int) -> None:
    for episode in recall_episodes(pairs, 40, seed=3):
        known = definitions(episode, pairs)
        queries = episode[recall_prompt(pairs) :]
        asked, answers = queries[::2].tolist(), queries[1::2].tolist()
        assert len(episode) == 6 * pairs - 1 and len(asked) == len(answers) == 2 * pairs - 2
        assert [known[key] for key in asked] == answers
        assert set(asked[:pairs]) == set(known)  # the first round asks for every key
        assert len(set(asked[pairs:])) == pairs - 2


def test_seeds() -> None:
    first = recall_episodes(8, 50, seed=1)
    assert np.array_equal(first, recall_episodes(8, 50, seed=1))
    assert not (first == recall_episodes(8, 50, seed=2)).all(axis=1).any()
    train, validation = (set(split()) for split in corpora.find("recall", "text").splits.values())
    assert len(train) > 60_000 and not train & validation


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> data.TokenData:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpora, "_RECALL_EPISODES", {"train": 40, "validation": 24})
        return data.prepare(configs.DataConfig("recall:6", cache_dir=str(tmp_path_factory.mktemp("data"))))


def test_a_window_is_an_episode(prepared: data.TokenData) -> None:
    for seed, name in enumerate(("train", "validation")):
        split = prepared.split(name)
        expected = recall_episodes(6, split.documents, seed)
        windows = np.asarray(split.tokens).reshape(-1, 36)
        assert np.array_equal(windows[:, :-1], expected)
        assert (windows[:, -1] == prepared.tokenizer.eos_id).all()
    (batch, *_) = data.evaluation_windows(split.tokens, 36, 24)
    assert np.array_equal(batch.tokens[:, :35], expected)
    rows = next(data.train_loader(prepared.split("train").tokens, 36, 4, seed=0)).tokens
    assert (rows[:, 35] == prepared.tokenizer.eos_id).all()


def test_scores_of_a_lookup_and_of_a_guess() -> None:
    episodes = recall_episodes(8, 1000, seed=5).astype(np.int32)
    found = recall.score(episodes, oracle(episodes, 8), 8)
    assert found["accuracy"] == 1 and set(found["by_depth"]) <= {1.0, None}
    assert (found["episodes"], found["pairs"], found["prompt_tokens"]) == (1000, 8, 19)
    draw = np.random.default_rng(0)
    guess = draw.choice(np.frombuffer(RECALL_VALUES[:8], np.uint8), (1000, 28)).astype(np.int32)
    found = recall.score(episodes, guess, 8)
    assert found["chance"] == 1 / 8 and abs(found["accuracy"] - found["chance"]) < 0.015


def test_depths() -> None:
    """A model that remembers the second half of the prompt only."""
    episodes = recall_episodes(20, 300, seed=6).astype(np.int32)
    prompt, predicted = recall_prompt(20), oracle(episodes, 20)
    places = np.argmax(episodes[:, None, :prompt] == episodes[:, prompt::2, None], axis=-1)
    predicted[:, 1::2][places <= prompt // 2] = 0
    found = recall.score(episodes, predicted, 20)
    counts = found["queries_by_depth"]
    assert sum(counts) == 6000
    known = [(depth, count) for depth, count in zip(found["by_depth"], counts, strict=True) if count]
    assert sum(depth * count for depth, count in known) / 6000 == pytest.approx(found["accuracy"])
    assert found["by_depth"][:5] == [0] * 5 and found["by_depth"][6:9] == [1] * 3
    # The second round of queries counts for nothing, and neither do the queries themselves.
    spoiled = oracle(episodes, 20)
    spoiled[:, 41:] = spoiled[:, 0:40:2] = -1
    assert recall.score(episodes, spoiled, 20)["accuracy"] == 1


def test_predictions_are_those_of_the_parallel_form(prepared: data.TokenData, monkeypatch: pytest.MonkeyPatch) -> None:
    """An untrained model, more episodes than fit a batch, and a batch that the devices do not divide."""
    config = configs.create("mla", {"kv_lora_rank": 8, "qk_rope_head_dim": 4}, model={"d_model": 16, "num_layers": 1})
    config.model.num_heads, config.data.corpus, config.eval.batch_size = 2, "recall:6", 7
    model = models.create(config, prepared.vocab_size)
    mesh = Mesh(np.asarray(jax.devices()[:2]).reshape(2, 1, 1), AXES)
    episodes = recall_episodes(6, 24, seed=1).astype(np.int32)
    predicted = recall.predict(model, mesh, episodes, recall_prompt(6), batch=7)
    expected = np.argmax(model(jnp.asarray(episodes[:, :-1])), axis=-1)[:, recall_prompt(6) - 1 :]
    assert predicted.shape == expected.shape and (predicted == expected).mean() > 0.99

    # The same is found in eval.json; what else is measured there is not needed here.
    monkeypatch.setattr(perplexity, "measure", lambda *_: perplexity.Perplexity(1.0, 1.0, 0.0, 1, 1))
    monkeypatch.setattr(recall, "predict", lambda *_: predicted)
    monkeypatch.setattr(cache_bytes, "measure", lambda *_: dict.fromkeys(BYTES, 1) | {"dtype": "float32"})
    monkeypatch.setattr(speed, "measure", lambda *_: {**dict.fromkeys(SPEEDS, 1.0), "batch": 1, "context": 1})
    row = evaluate_model(config, model, mesh, prepared, 0, say=lambda _: None)["recall"]
    assert row == recall.score(episodes, predicted, 6) and row["accuracy"] < 0.5


@pytest.mark.parametrize("name", ["recall:0", "recall:1", "recall:27", "recall:", "recall:many", "recall:²"])
def test_pairs_that_no_episode_holds(name: str) -> None:
    with pytest.raises(UserError, match=r"config.data.corpus.*2 to 26"):
        corpora.find(name, "text")


def test_other_tokens_than_bytes(prepared: data.TokenData) -> None:
    config = configs.create("mha", data={"corpus": "recall", "tokenizer": "bpe:300"})
    other = dataclasses.replace(prepared, tokenizer=None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"config.data.tokenizer: 'bpe:300'"):
        recall.measure(config, None, None, other)  # type: ignore[arg-type]


def test_the_pass_through_the_cache_is_that_of_the_tricks() -> None:
    """A budget for the whole episode changes no prediction; one of five entries changes some."""
    config = configs.create("gqa", {"num_kv_heads": 1}, model={"d_model": 16, "num_layers": 1, "num_heads": 2})
    model = models.create(config, 257)
    mesh = Mesh(np.asarray(jax.devices()[:2]).reshape(2, 1, 1), AXES)
    episodes = np.stack([np.asarray(episode, np.int32) for episode in recall_episodes(4, 6, seed=0)])
    policy = eviction.policy("streaming")
    assert policy is not None
    found = []
    for budget in (0, 30, 5):
        plan = CachePlan(eviction=Eviction(policy, budget, "both") if budget else None)
        found.append(recall.predict(model, mesh, episodes, recall_prompt(4), 6, plan))
    np.testing.assert_array_equal(found[0], found[1])
    assert (found[0] != found[2]).any()
