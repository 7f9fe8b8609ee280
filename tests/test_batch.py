"""Weights of predictions: what counts not, is not there; in training, with micro-batches, in the loader, in evaluation."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close
from jax.sharding import Mesh

from mla import model as models
from mla.data.batch import Batch
from mla.data.prepared import Split, evaluation_windows, train_loader
from mla.errors import UserError
from mla.evaluation.perplexity import measure
from mla.sharding import AXES
from mla.training.step import Trainer

VOCAB, CONTEXT = 61, 16


def mesh() -> Mesh:
    return Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1, 1), AXES)


def windows(count: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCAB, (count, CONTEXT + 1), dtype=np.int32)


def uneven() -> np.ndarray:
    """Weights that differ in their sums from row to row; a row counts not at all."""
    weights = np.random.default_rng(1).integers(0, 2, (8, CONTEXT)).astype(np.float32)
    weights[2] = 0
    weights[5] = 1
    return weights


def test_what_weighs_nothing_is_not_there(tiny: Any) -> None:
    """Loss and gradients over the other positions alone, whatever the number of micro-batches."""
    weights = uneven()
    whole = Trainer(tiny("mla"), VOCAB, mesh())
    params = jax.device_get(whole.init().params)

    def expected(params: Any) -> jax.Array:
        logits = whole.model(params)(windows()[:, :-1])
        nats = -jnp.take_along_axis(jax.nn.log_softmax(logits), windows()[:, 1:, None], -1)[..., 0]
        return jnp.sum(jnp.where(weights > 0, nats, 0)) / np.count_nonzero(weights)

    loss, gradients = jax.jit(jax.value_and_grad(expected))(params)
    for count in (1, 4):
        trainer = Trainer(tiny("mla", optimizer={"accumulate_steps": count}), VOCAB, mesh())
        run = jax.jit(lambda p, b, trainer=trainer: trainer._gradients(p, b, trainer.now(jnp.int32(0))))
        for scale in (1.0, 7.0):  # weights are relative
            (found, _), found_gradients = run(params, Batch.of_windows(windows(), scale * weights))
            close(found, loss, 5 * np.spacing(np.float32(loss)), "loss")
            for a, b in zip(jax.tree.leaves(found_gradients), jax.tree.leaves(gradients), strict=True):
                close(a, b, 1e-6, "gradients")


def test_plain_text_spends_nothing_on_weights(tiny: Any) -> None:
    """Without weights none are made: the program has fewer inputs and fewer products than with ones."""
    trainer = Trainer(tiny("mla"), VOCAB, mesh())
    plain, ones = Batch.of_windows(windows()), Batch.of_windows(windows(), np.ones((8, CONTEXT), np.float32))
    programs = [jax.make_jaxpr(trainer._step)(trainer.abstract_state, batch) for batch in (plain, ones)]
    assert len(programs[1].jaxpr.invars) - len(programs[0].jaxpr.invars) == 1
    assert plain.balanced() is plain and len(str(programs[0])) < len(str(programs[1]))


def test_the_loader_cuts_weights_as_it_cuts_targets() -> None:
    tokens, weights = np.arange(1, 200, dtype=np.uint16), np.arange(1, 200) / 2
    for _, batch in zip(range(5), train_loader(tokens, CONTEXT, 4, 0, weights), strict=False):
        assert batch.weights.dtype == np.float32
        np.testing.assert_array_equal(batch.weights, batch.targets / 2)


def test_evaluation_counts_what_has_weight(tiny: Any) -> None:
    """Padding included: the stream ends within a window, and the last batch is not full."""
    config = tiny("mla", eval={"batch_size": 2, "decode_tokens": 0})
    model = models.create(config, VOCAB)
    length = 3 * CONTEXT + 6
    tokens = np.random.default_rng(2).integers(0, VOCAB, length, dtype=np.uint16)
    text = Split("validation", tokens, np.arange(length, dtype=np.uint32), 1, 0)
    nats = np.zeros(length)
    for start in range(0, length - 1, CONTEXT):
        part = tokens[start : start + CONTEXT + 1].astype(np.int32)
        logits = jax.nn.log_softmax(model(jnp.asarray(part[None, :-1])))[0]
        nats[start + 1 : start + len(part)] = -np.asarray(logits)[np.arange(len(part) - 1), part[1:]]
    one = mesh()
    plain = measure(config, model, one, text)
    assert (plain.tokens, plain.num_bytes) == (length - 1, np.arange(length).sum())
    close(plain.loss, nats[1:].mean(), 1e-5)
    some = np.random.default_rng(3).integers(0, 2, length).astype(np.float32)
    found = measure(config, model, one, dataclasses.replace(text, weights=some))
    counts = np.arange(length)[1:][some[1:] > 0]
    close(found.loss, nats[counts].mean(), 1e-5)
    close(found.loss_cached, nats[counts].mean(), 1e-5)
    assert (found.tokens, found.num_bytes) == (len(counts), counts.sum())
    assert 0 < found.decoded_tokens < found.tokens < plain.tokens and abs(found.loss - plain.loss) > 1e-3
    graded = measure(config, model, one, dataclasses.replace(text, weights=some / 4))
    assert (graded.tokens, graded.decoded_tokens) == (found.tokens, found.decoded_tokens)
    close(graded.loss, found.loss, 1e-6)
    close(graded.decoded, found.decoded, 1e-6)
    with pytest.raises(UserError, match=r"config\.eval\.split: none of the 53 tokens of split validation counts"):
        measure(config, model, one, dataclasses.replace(text, weights=0 * some))


def test_windows_carry_weights_to_where_their_targets_are() -> None:
    tokens = np.arange(1, 43)
    for window in evaluation_windows(tokens, CONTEXT, 2, weights=tokens / 2):
        np.testing.assert_array_equal(window.weights, window.tokens[:, 1:] / 2)
