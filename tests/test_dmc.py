"""Dynamic memory compression: the paper's recurrence in float64, what the cache holds, and a retrofit that compresses."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import close
from jax.sharding import Mesh
from matrix import D_MODEL, HEADS, Row

from mla import config as configs
from mla import model as models
from mla.attention.contract import Step
from mla.attention.softmax.dmc import DMC, running_sums
from mla.attention.softmax.grouped_query import KeyValue
from mla.cache.clock import NEVER, Clock, overwritten
from mla.cache.stores import LayerCache
from mla.cache.tokens import TokenCache
from mla.data.batch import Batch
from mla.data.prepared import prepare
from mla.errors import UserError
from mla.evaluation import compression
from mla.evaluation.decoding import Decoder, compiled, positions
from mla.model import parameters, with_parameters
from mla.sharding import AXES
from mla.training.checkpoint import load_model
from mla.training.loop import train
from mla.training.step import Trainer

KV, LENGTH = 2, 70


def dmc(**settings: Any) -> DMC:
    made = Row("dmc", {"offset": 0.0} | settings).mixer()
    assert isinstance(made, DMC)
    return made


def inputs(length: int = LENGTH, batch: int = 2) -> tuple[jax.Array, jax.Array]:
    x = jax.random.normal(jax.random.key(3), (batch, length, D_MODEL))
    return x, jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))


def at(progress: float) -> Step:
    """A training step at some share of the planned ones."""
    return Step(jnp.asarray(progress), jnp.asarray(progress), jax.random.key(0))


def decoded(mixer: DMC, x: jax.Array, positions: jax.Array) -> tuple[np.ndarray, LayerCache]:
    """Token by token."""
    step = jax.jit(mixer.extend)
    cache, outputs = mixer.init_cache(x.shape[0], x.shape[1], jnp.float32), []
    for t in range(x.shape[1]):
        y, cache = step(x[:, t : t + 1], positions[:, t : t + 1], cache)
        outputs.append(y)
    return np.concatenate(outputs, axis=1), cache


def turn(x: np.ndarray, position: int, theta: float = 10_000.0) -> np.ndarray:
    """RoPE of one head, pairs (k, k + d / 2)."""
    half = len(x) // 2
    angle = position * theta ** (-np.arange(half) / half)
    a, b = x[:half], x[half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)])


def by_the_paper(mixer: DMC, x: np.ndarray) -> tuple[np.ndarray, list[list[int]]]:
    """One sequence in float64, a loop over tokens with a growing list of slots: outputs, and tokens merged in each slot."""
    weights: Any = jax.tree.map(lambda a: np.asarray(a, np.float64), parameters(mixer))
    settings, width = mixer.config, mixer.head_dim
    q, k, v = (
        (x @ weights[name]["kernel"]).reshape(len(x), heads, width)
        for name, heads in (("query", HEADS), ("key", KV), ("value", KV))
    )
    out, sizes = np.zeros_like(q), []
    for head in range(KV):
        group = slice(head * HEADS // KV, (head + 1) * HEADS // KV)
        slots: list[tuple[np.ndarray, np.ndarray]] = []
        segments: list[list[int]] = []
        for t in range(len(x)):
            if t == 0 or k[t, head, -1] - settings.offset <= 0:
                segments.append([])
                slots.append((np.zeros(width), np.zeros(width)))
            segments[-1].append(t)
            newest = segments[-1][-settings.segment :]
            omega = np.array([1 / (1 + np.exp(-q[s, group, -1].mean() - settings.offset)) for s in newest])
            key, value = (omega @ a[newest, head] / omega.sum() for a in (k, v))
            key[-1] = 0
            slots[-1] = turn(key, t), value
            for i in range(group.start, group.stop):
                asked = q[t, i].copy()
                asked[-1] = 0
                logits = np.array([turn(asked, t) @ slot[0] for slot in slots]) / width**0.5
                shares = np.exp(logits - logits.max())
                out[t, i] = shares @ np.array([slot[1] for slot in slots]) / shares.sum()
        sizes.append([len(segment) for segment in segments])
    return out.reshape(len(x), -1) @ weights["out"]["kernel"], sizes


# ------------------------------------------------------------------------------------------------------- the recurrence


def test_the_worked_example() -> None:
    """x = 1, 3, 5, 7 with alpha = 0, 1, 0, 1 and omega = 1, 3, 1, 1."""
    x, omega = jnp.asarray([1.0, 3.0, 5.0, 7.0]), jnp.asarray([1.0, 3.0, 1.0, 1.0])
    made = jnp.stack([omega * x, omega], axis=-1)[None, :, None]
    joins, positions = jnp.asarray([0, 1, 0, 1], bool)[None, :, None], jnp.arange(4)[None]
    sums = jax.jit(running_sums, static_argnums=2)(made, joins.astype(jnp.float32), 12)[0, :, 0]
    until = overwritten(joins, positions)[0, :, 0]
    np.testing.assert_allclose(sums[:, 0] / sums[:, 1], [1, 2.5, 5, 6])
    np.testing.assert_array_equal(until, [1, NEVER, 3, NEVER])
    seen = [[j + 1 for j in range(i + 1) if i < until[j]] for i in range(4)]
    assert seen == [[1], [2], [2, 3], [2, 4]]

    averages = KeyValue(*[(sums[:, :1] / sums[:, 1:])[None, :, None]] * 2)
    cache = TokenCache.empty(averages, 1, 4, jnp.float32, Clock(heads=1))
    seen, cache = jax.jit(cache.extend)(averages, positions, joins)
    np.testing.assert_array_equal(seen.until[0, 4:, 0], until)
    np.testing.assert_allclose(cache.streams.key[0, :, 0, 0], [2.5, 6, 0, 0])
    assert cache.slots is not None
    np.testing.assert_array_equal(cache.slots.positions[0, :, 0], [1, 3, -1, -1])
    assert 4 / int(cache.slots.lengths[0, 0]) == 2


@pytest.mark.parametrize("segment", [1, 3, 12])
def test_the_parallel_form_and_decoding_are_the_paper_in_float64(segment: int) -> None:
    mixer = dmc(segment=segment, offset=-0.5)
    x, positions = inputs()
    parallel = np.asarray(jax.jit(mixer.__call__)(x))
    stepped, cache = decoded(mixer, x, positions)
    for row in range(2):
        expected, sizes = by_the_paper(mixer, np.asarray(x[row], np.float64))
        scale = expected.std()
        close(parallel[row] / scale, expected / scale, 1e-5)
        close(stepped[row] / scale, expected / scale, 1e-5)
        np.testing.assert_array_equal(cache["entries"].slots.lengths[row], [len(s) for s in sizes])
        assert max(map(max, sizes)) > 3 and len({len(s) for s in sizes}) == 2, "short segments, or heads alike"


def test_appending_everything_is_grouped_query_attention_without_two_channels() -> None:
    mixer = dmc(offset=1e4)
    x, _ = inputs()
    plain = Row("gqa").mixer()
    weights = parameters(mixer)
    for name, heads in (("query", HEADS), ("key", KV)):
        kernel = weights[name]["kernel"]
        weights[name]["kernel"] = kernel.reshape(D_MODEL, heads, -1).at[..., -1].set(0).reshape(kernel.shape)
    plain = with_parameters(nnx.graphdef(plain), weights)
    close(jax.jit(mixer.__call__)(x), jax.jit(plain.__call__)(x), 1e-5)
    # So is the training form while nothing is merged; and at first both channels are whole.
    train = jax.jit(lambda x, progress: mixer.forward(x, step=at(progress)))
    y, losses, metrics = train(x, 0.099)
    close(y, jax.jit(plain.__call__)(x), 1e-5)
    assert float(jnp.max(metrics["share"])) == 0 == float(jnp.max(jnp.abs(losses["missing"])))
    whole = train(x, 0.0).y
    original = with_parameters(nnx.graphdef(plain), parameters(mixer))
    close(whole, jax.jit(original.__call__)(x), 1e-5)


def test_rounding_of_the_weights_turns_no_decision_in_evaluation() -> None:
    """Two channels that are equal decide by weights that are equal in bf16 and not in fp32."""
    config = configs.create(
        "dmc", {"offset": 0.0}, model={"d_model": 16, "num_layers": 1, "num_heads": 4, "dtype": "bfloat16"}
    )
    model = models.create(config, 32)
    mixer: Any = model.blocks[0].mixer
    column = jnp.zeros((16,)).at[:2].set(jnp.asarray([1 + 2.0**-10, -1.0]))
    kernel = mixer.key.kernel[...].reshape(16, KV, -1)
    mixer.key.kernel[...] = kernel.at[..., -1].set(column[:, None]).reshape(16, -1)
    model.embedding[...] = model.embedding[...].at[:, 1].set(model.embedding[:, 0])

    tokens = jax.random.randint(jax.random.key(0), (2, 24), 0, 32)

    def decide(model: Any, tokens: jax.Array) -> jax.Array:
        return model.blocks[0].mixer.decision(model.blocks[0].mixer_norm(model.embed(tokens)))

    trained = np.asarray(nnx.jit(decide)(model, tokens))
    merges = trained > 0
    merges[:, 0] = False
    assert 0.2 < merges.mean() < 0.8 and np.abs(trained).max() < 2.0**-7  # in bf16 all of them would be 0

    mesh = single_device()
    decoder = Decoder(model, 2, 24, mesh)
    step = decoder.compiled(lambda model, cache, new, where: model.extend(new, where, cache))
    cache = decoder.empty()
    for t in range(24):
        _, cache = step(cache, tokens[:, t : t + 1], positions(2, t, t + 1))
        np.testing.assert_array_equal(cache.layers[0]["entries"].slots.lengths, (~merges[:, : t + 1]).sum(axis=1))
    np.testing.assert_array_equal(compiled(model, mesh, decide)(tokens), trained)


def test_the_training_form_with_sure_decisions_is_the_form_of_inference() -> None:
    """At a low temperature the relaxed decisions are 0 or 1; the noise is logistic and moves those near the threshold."""
    mixer = dmc(temperature=1e-6)
    x, _ = inputs()
    quiet = jax.random.key(0)
    noise = jax.random.logistic(quiet, (2, LENGTH, KV))
    decision = mixer.decision
    mixer.decision = lambda x: decision(x) - noise  # type: ignore[method-assign]
    y, losses, metrics = jax.jit(lambda x: mixer.forward(x, step=at(1.0)))(x)
    mixer.decision = decision  # type: ignore[method-assign]
    close(y, jax.jit(mixer.__call__)(x), 1e-4)
    expected = np.array(decision(x) > 0)
    expected[:, 0] = False
    close(metrics["share"], expected.mean(axis=1), 1e-6)
    close(losses["missing"], 0.5 - expected.mean(axis=1), 1e-6)


# ----------------------------------------------------------------------------------------------------------- the trainer


def retrofit_config(tiny: Any, **fields: Any) -> Any:
    config = tiny("dmc", **fields)
    config.model.mechanism["dmc"].num_kv_heads = 1
    return config


def single_device() -> Mesh:
    return Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1, 1), AXES)


def test_only_what_is_missing_costs(tiny: Any) -> None:
    """The second part of the loss is max(0, 1 - 1 / ratio - share), and 0 where enough is merged."""
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 200, (8, 17), dtype=np.int32))
    for offset, missing in ((50.0, 0.5), (-50.0, 0.0)):
        config = retrofit_config(tiny)
        config.model.mechanism["dmc"].offset = offset
        trainer = Trainer(config, 257, single_device())
        total, (loss, said) = jax.jit(trainer.objective)(trainer.init().params, Batch.of_windows(tokens), at(1.0))
        close(said[0]["share"], 0.0 if missing else 15 / 16, 1e-6)
        close(float(total - loss), missing, 1e-6)


def test_schedule_and_restart(tiny: Any) -> None:
    mixer = dmc(target_ratio=4.0, fade=0.2, ramp=0.5)
    required = [float(mixer.required(jnp.asarray(p))) for p in (0.0, 0.2, 0.45, 0.7, 1.0)]
    close(required, [0, 0, 1 - 1 / 2.5, 0.75, 0.75], 1e-6)
    config = retrofit_config(tiny, steps=10)
    trainer = Trainer(config, 257, single_device())
    before = jax.device_get(trainer.init().params)
    for step, restarts in ((0, False), (1, True), (2, False)):
        after = jax.jit(lambda p, step: trainer._prepared(p, trainer.now(step)))(before, jnp.asarray(step))
        changed = np.asarray(after["blocks"]["0"]["mixer"]["query"]["kernel"])
        kept = before["blocks"]["0"]["mixer"]["query"]["kernel"].copy()
        if restarts:
            kept.reshape(16, 2, 8)[..., -1] = 0
        np.testing.assert_array_equal(changed, kept)


def test_a_retrofit_compresses_and_resumes_exactly(tiny: Any, tmp_path: Path) -> None:
    """From a trained gqa run; stopped half-way, it ends where the uninterrupted one does, noise included."""
    rates = {"optimizer": {"learning_rate": 3e-2, "warmup_steps": 2}, "checkpoint": {"every_steps": 20}}
    plain = tiny("gqa", steps=20, **rates)
    assert train(plain, tmp_path / "gqa") == 0

    def config(steps: int = 40) -> configs.Config:
        made = retrofit_config(tiny, steps=steps, init_from=str(tmp_path / "gqa"), **rates)
        own = dataclasses.replace(made.model.mechanism["dmc"], offset=1.0, fade=0.05, ramp=0.4, target_ratio=3.0)
        made.model.mechanism["dmc"] = own
        return made

    assert train(config(), tmp_path / "whole") == 0
    # The same run without its last checkpoint: as if it had been killed after step 20.
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / "40")
    assert train(config(), tmp_path / "killed") == 0
    whole, resumed = (load_model(tmp_path / name) for name in ("whole", "killed"))
    for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(resumed.params), strict=True):
        np.testing.assert_array_equal(a, b)
    split = prepare(config().data).split("train")
    measured = compression.measure(config(), whole.model, single_device(), split)
    assert measured["tokens"] == 16 and measured["sequences"] == compression.SEQUENCES
    assert measured["slots_mean"] == measured["slots_longest"] < 16 / 1.5  # one head, one sequence at a time
    state = 11 * (2 * 8 + 1)
    assert measured["ratio"] == pytest.approx(16 * 16 / (16 * measured["slots_mean"] + state))
    assert measured["ratio_mean"] == pytest.approx(measured["ratio"])
    # Three windows, two at a time: all count, the last one once.
    few, pairs = dataclasses.replace(split, tokens=split.tokens[: 3 * 16 + 1]), config()
    pairs.eval.decode_batch = 2
    each, both = (compression.measure(one, whole.model, single_device(), few) for one in (config(), pairs))
    assert each["sequences"] == both["sequences"] == 3
    assert each["slots_mean"] == pytest.approx(both["slots_mean"])


# -------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"window": 8}, "window"),
        ({"soft_cap": 2.0}, "soft_cap"),
        ({"target_ratio": 0.5}, "target_ratio"),
        ({"segment": 0}, "segment"),
        ({"temperature": 0.0}, "temperature"),
        ({"fade": 0.6, "ramp": 0.6}, "ramp"),
    ],
)
def test_refuses_settings_that_cannot_work(settings: dict[str, Any], field: str) -> None:
    with pytest.raises(UserError, match=rf"config\.model\.mechanism\.{field}: "):
        configs.validate(configs.create("dmc", settings))


def test_refuses_late_codecs_norms_readers_and_long_pieces() -> None:
    mixer = dmc()
    with pytest.raises(UserError, match=r"config\.eval\.cache\.codec: 'kivi4' where a layer merges or drops entries"):
        mixer.plan("kivi4")
    with pytest.raises(UserError, match=r"config\.model\.qk_norm: DMC "):
        configs.validate(configs.create("dmc", model={"qk_norm": True}))
    with pytest.raises(
        UserError, match=r"config\.model\.pattern: layer 1 reads dmc, which remembers slots that only its own"
    ):
        configs.validate(configs.create("dmc/2"))
    x, positions = inputs(9, 1)
    with pytest.raises(ValueError, match="9 new tokens for a cache of 8"):
        jax.eval_shape(mixer.extend, x, positions, mixer.init_cache(1, 8, jnp.float32))
