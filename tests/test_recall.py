"""Associative recall: the episodes are what they claim, and the score is right for models that know all and nothing."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from mla import config as configs
from mla import corpora, data
from mla import model as models
from mla.corpora import RECALL_BYTES, RECALL_FILLER, RECALL_KEYS, RECALL_PROMPT, RECALL_VALUES, recall_episodes
from mla.errors import UserError
from mla.evaluation import perplexity, recall, speed
from mla.evaluation.evaluate import evaluate_model
from mla.training.sharding import AXES

EPISODE = RECALL_BYTES + 1
SPEEDS = ("prefill_tokens_per_second", "tokens_per_second")


def definitions(episode: np.ndarray) -> dict[int, int]:
    """Value by key, each key defined once."""
    prompt = bytes(episode[:RECALL_PROMPT].astype(np.uint8))
    found = {prompt[i]: prompt[i + 1] for i in range(RECALL_PROMPT) if prompt[i] in RECALL_KEYS}
    assert sum(byte in RECALL_KEYS for byte in prompt) == len(found)
    assert set(prompt) - set(found) - set(found.values()) <= set(RECALL_FILLER)
    return found


def oracle(episodes: np.ndarray) -> np.ndarray:
    """What `predict` would return for a model that looks every key up."""
    known = [definitions(episode) for episode in episodes]
    rows = [[0, *(look.get(byte, 0) for byte in row[RECALL_PROMPT:-1])] for look, row in zip(known, episodes, strict=True)]
    return np.asarray(rows, np.int32)


@pytest.mark.parametrize("pairs", [1, 5, 16, 26])
def test_every_query_is_answered_by_its_definition(pairs: int) -> None:
    for episode in recall_episodes(pairs, 40, seed=3):
        known = definitions(episode)
        assert len(known) == pairs and set(known.values()) <= set(RECALL_VALUES)
        asked, answers = episode[RECALL_PROMPT::2].tolist(), episode[RECALL_PROMPT + 1 :: 2].tolist()
        assert len(asked) == len(answers) == (RECALL_BYTES - RECALL_PROMPT) // 2
        assert [known[key] for key in asked] == answers
        for start in range(0, len(asked) - pairs + 1, pairs):
            assert set(asked[start : start + pairs]) == set(known)  # every round asks for every key


def test_seeds() -> None:
    first = recall_episodes(16, 50, seed=1)
    assert np.array_equal(first, recall_episodes(16, 50, seed=1))
    assert not (first == recall_episodes(16, 50, seed=2)).all(axis=1).any()
    train, validation = (set(split()) for split in corpora.find("recall", "text").splits.values())
    assert len(train) > 60_000 and not train & validation


def test_definitions_stand_everywhere() -> None:
    episodes = recall_episodes(8, 4000, seed=0)
    is_key = np.isin(episodes[:, : RECALL_PROMPT - 1], np.frombuffer(RECALL_KEYS, np.uint8))
    assert np.allclose(is_key.mean(axis=0), 8 / (RECALL_PROMPT - 1), atol=0.04)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> data.TokenData:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpora, "_RECALL_EPISODES", {"train": 40, "validation": 24})
        return data.prepare(configs.DataConfig("recall:6", cache_dir=str(tmp_path_factory.mktemp("data"))))


def test_a_window_is_an_episode(prepared: data.TokenData) -> None:
    for seed, name in enumerate(("train", "validation")):
        split = prepared.split(name)
        expected = recall_episodes(6, split.documents, seed)
        windows = np.asarray(split.tokens).reshape(-1, EPISODE)
        assert np.array_equal(windows[:, :-1], expected)
        assert (windows[:, -1] == prepared.tokenizer.eos_id).all()
    (batch, *_) = data.evaluation_windows(split.tokens, EPISODE, 24)
    assert np.array_equal(batch.tokens[:, :RECALL_BYTES], expected)
    rows = next(data.train_loader(prepared.split("train").tokens, EPISODE, 4, seed=0))["tokens"]
    assert (rows[:, RECALL_BYTES] == prepared.tokenizer.eos_id).all()


def test_scores_of_a_lookup_and_of_a_guess() -> None:
    episodes = recall_episodes(16, 512, seed=5).astype(np.int32)
    found = recall.score(episodes, oracle(episodes))
    assert found["accuracy"] == 1 and set(found["by_depth"]) == {1.0}
    assert (found["episodes"], found["pairs"], found["prompt_tokens"]) == (512, 16, RECALL_PROMPT)
    draw = np.random.default_rng(0)
    guess = draw.choice(np.frombuffer(RECALL_VALUES, np.uint8), (512, RECALL_BYTES - RECALL_PROMPT))
    found = recall.score(episodes, guess.astype(np.int32))
    assert abs(found["accuracy"] - found["chance"]) < 0.01


def test_depths() -> None:
    """A model that remembers the second half of the prompt only."""
    episodes = recall_episodes(10, 300, seed=6).astype(np.int32)
    predicted = oracle(episodes)
    places = np.argmax(episodes[:, None, :RECALL_PROMPT] == episodes[:, RECALL_PROMPT::2, None], axis=-1)
    predicted[:, 1::2][places <= RECALL_PROMPT // 2] = 0
    found = recall.score(episodes, predicted)
    counts = found["queries_by_depth"]
    assert sum(counts) == 3000
    assert np.average(found["by_depth"], weights=counts) == pytest.approx(found["accuracy"])
    assert found["by_depth"][:5] == [0] * 5 and found["by_depth"][6:] == [1] * 4
    # The second round of queries counts for nothing, and neither do the queries themselves.
    spoiled = oracle(episodes)
    spoiled[:, 20:] = spoiled[:, 0:20:2] = -1
    assert recall.score(episodes, spoiled)["accuracy"] == 1


def test_predictions_are_those_of_the_parallel_form(prepared: data.TokenData, monkeypatch: pytest.MonkeyPatch) -> None:
    """An untrained model, more episodes than fit a batch, and a batch that the devices do not divide."""
    config = configs.create("mla", {"kv_lora_rank": 8, "qk_rope_head_dim": 4}, model={"d_model": 16, "num_layers": 1})
    config.model.num_heads, config.data.corpus, config.eval.batch_size = 2, "recall:6", 7
    model = models.create(config, prepared.vocab_size)
    mesh = Mesh(np.asarray(jax.devices()[:2]).reshape(2, 1, 1), AXES)
    episodes = recall_episodes(6, 24, seed=1).astype(np.int32)
    predicted = recall.predict(model, mesh, episodes, RECALL_PROMPT, batch=7)
    expected = np.argmax(model(episodes[:, :-1]), axis=-1)[:, RECALL_PROMPT - 1 :]
    assert predicted.shape == expected.shape and (predicted == expected).mean() > 0.99

    # The same is found in eval.json; what else is measured there is not needed here.
    monkeypatch.setattr(perplexity, "measure", lambda *_: perplexity.Perplexity(1.0, 1.0, 0.0, 1, 1))
    monkeypatch.setattr(recall, "predict", lambda *_: predicted)
    monkeypatch.setattr(speed, "measure", lambda *_: {**dict.fromkeys(SPEEDS, 1.0), "batch": 1, "context": 1})
    row = evaluate_model(config, model, mesh, prepared, 0, say=lambda _: None)["recall"]
    assert row == recall.score(episodes, predicted) and row["accuracy"] < 0.2


@pytest.mark.parametrize("name", ["recall:0", "recall:27", "recall:", "recall:many", "recall:²"])
def test_pairs_that_no_episode_holds(name: str) -> None:
    with pytest.raises(UserError, match=r"config.data.corpus.*1 to 26"):
        corpora.find(name, "text")


def test_other_tokens_than_bytes(prepared: data.TokenData) -> None:
    config = configs.create("mha", data={"corpus": "recall", "tokenizer": "bpe:300"})
    other = dataclasses.replace(prepared, tokenizer=None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"config.data.tokenizer: 'bpe:300'"):
        recall.measure(config, None, None, other)  # type: ignore[arg-type]
