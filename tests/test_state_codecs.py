"""States under codecs: what is held between calls, what padding leaves alone, what it costs, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import EXACT, close
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from matrix import D_MODEL, TOYS, Row

from mla import config as configs
from mla.cache.codecs import codec
from mla.cache.meter import content_bytes
from mla.cache.plan import CachePlan
from mla.cache.state import CodedArray
from mla.data.batch import Batch
from mla.data.prepared import prepare
from mla.errors import UserError
from mla.evaluation import cache_bytes, perplexity
from mla.evaluation.perplexity import pieces
from mla.evaluation.plan import cache_plan
from mla.sharding import AXES, cache_shardings, make_mesh
from mla.training.step import Trainer

B = 3
DELTA = Row("delta", {"head_dim": 6, "v_head_dim": 16, "chunk": 8})
NAMES = ["bf16", "fp8", "int8", "int4", "int2", "hadamard+int8", "int4:8"]
HYBRID = "kimi_delta*2,mla"


def text(length: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(B, length, D_MODEL)))


def where(*starts: int, length: int) -> jax.Array:
    """Positions of `length` tokens in each row from a start on; nothing but padding where that is below 0."""
    rows = [np.arange(start, start + length) if start >= 0 else np.full(length, -1) for start in starts]
    return jnp.asarray(np.stack(rows), jnp.int32)


# ----------------------------------------------------------------------------------------------------------------- bytes


@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_those_of_every_key_channels_vector(name: str) -> None:
    mixer, made = DELTA.mixer(jnp.bfloat16), codec(name)
    assert made is not None
    cache = jax.eval_shape(lambda: mixer.init_cache(B, 64, jnp.bfloat16, mixer.plan(f"state={name}")))
    tail = 3 * 4 * (6 + 6 + 16) * 2  # bf16, as it is
    assert content_bytes(cache) == B * (4 * 6 * made.vector_bytes(16) + tail)


def test_published_bytes_of_a_kimi_layer() -> None:
    """32 heads of 128 x 128 (2510.26692): 2 MiB in fp32; per vector of 128 channels int8 keeps 130 bytes, int4 80."""
    mixer = Row("kimi_delta", {"num_heads": 32, "head_dim": 128}).mixer(jnp.bfloat16)
    tail = 3 * 3 * 32 * 128 * 2
    sizes = {"none": 128 * 4, "bf16": 128 * 2, "int8": 130, "int4": 80, "fp8": 132}
    for name, vector in sizes.items():
        cache = jax.eval_shape(lambda n=name: mixer.init_cache(1, 9, jnp.bfloat16, mixer.plan(f"state={n}")))
        assert content_bytes(cache) == 32 * 128 * vector + tail, name


@pytest.mark.parametrize("spec", ["state=int8", "state=bf16,c_kv=int4", "int4", "c_kv=kivi2,state=hadamard+int8"])
def test_the_formula_counts_states_and_streams_of_a_hybrid(tiny: Any, spec: str) -> None:
    """A codec without a name means entries alone; a stream that one layer has is nothing to the others."""
    config = tiny(HYBRID, model={"num_layers": 3, "dtype": "bfloat16"})
    plain = cache_bytes.formula_bytes_at(config, 64)
    config.eval.cache.codec = spec
    model = cache_bytes.abstract_model(config, 257)
    for length in (1, 64, 130):
        held = cache_bytes.abstract_bytes_at(model, length, CachePlan(spec))
        assert held == cache_bytes.formula_bytes_at(config, length), length
    layers = jax.eval_shape(lambda: model.init_cache(2, 64, plan=CachePlan(spec))).layers
    named = "state=" in spec
    assert [isinstance(layer["state"].stored, CodedArray) for layer in layers[:2]] == [named, named]
    saved = 2 * (2 * 8 * (8 * 4 - codec("int8").vector_bytes(8)))  # two layers of 2 heads of 8 x 8
    if spec == "state=int8":
        assert plain - cache_bytes.formula_bytes_at(config, 64) == saved
    assert model.codes_states(spec) == named


def test_a_coded_state_is_cut_over_devices_as_the_state_is(tiny: Any) -> None:
    mesh = make_mesh(configs.MeshConfig(data=2, fsdp=2, tensor=2))
    model = cache_bytes.abstract_model(tiny("delta"), 257)
    shapes = jax.eval_shape(lambda: model.init_cache(4, 8, plan=CachePlan("state=int4:4")))
    grid = cache_shardings(shapes, mesh).layers[0]["state"].stored.payload
    assert grid.codes.spec == grid.scales.spec == P(("data", "fsdp"), "tensor", None, None)


# --------------------------------------------------------------------------------------------------- what is held, and when


@pytest.mark.parametrize("row", [DELTA, TOYS[0]], ids=lambda row: row.id)
def test_a_state_is_coded_between_calls_and_exact_within_one(row: Row, float64: None) -> None:
    """Against the mixer as it is, given between its calls what the codec makes of the state."""
    mixer, made = row.mixer(), codec("int4")
    assert made is not None
    extend = jax.jit(mixer.extend)
    x, spans = text(13), [(0, 11), (11, 12), (12, 13)]
    coded, plain = mixer.init_cache(B, 13, x.dtype, mixer.plan("state=int4")), mixer.init_cache(B, 13, x.dtype)
    errors = []
    for start, stop in spans:
        positions = where(start, start, start, length=stop - start)
        y, coded = extend(x[:, start:stop], positions, coded)
        expected, plain = extend(x[:, start:stop], positions, plain)
        close(y, expected, EXACT, f"{start} to {stop}", unit=True)
        exact = plain["state"].state
        plain = plain.replace(state=plain["state"].holding(made.decode(made.encode(exact), exact.dtype)))
        close(coded["state"].state, plain["state"].state, EXACT * float(jnp.max(jnp.abs(exact))), "state")
        errors.append(float(jnp.max(jnp.abs(coded["state"].state - exact))))
    assert min(errors) > 1e-3, "nothing was rounded"
    assert {a.dtype for a in jax.tree.leaves(coded["state"])} == {jnp.dtype("uint8"), jnp.dtype("float16")}


@pytest.mark.parametrize("name", ["int4", "fp8", "hadamard+int8"])
def test_rows_of_padding_keep_their_codes(name: str) -> None:
    """Bit for bit, in a call of one token and of several; coding what was decoded would change some."""
    mixer, made = DELTA.mixer(), codec(name)
    assert made is not None
    extend = jax.jit(mixer.extend)
    cache = mixer.init_cache(B, 40, jnp.float32, mixer.plan(f"state={name}"))
    x = text(20).astype(jnp.float32)
    _, cache = extend(x[:, :8], where(0, 0, -1, length=8), cache)
    assert not any(np.asarray(a[2]).any() for a in jax.tree.leaves(cache)), "a row that has seen nothing"
    for start, stop in ((8, 16), (16, 17)):
        _, after = extend(x[:, start:stop], where(start, -1, -1, length=stop - start), cache)
        for old, new in zip(jax.tree.leaves(cache), jax.tree.leaves(after), strict=True):
            np.testing.assert_array_equal(old[1:], new[1:])
            assert (np.asarray(old[0]) != np.asarray(new[0])).any()
        cache = after
    again = made.encode(cache["state"].state)
    payload = cache["state"].stored.payload
    changes = [(np.asarray(a) != np.asarray(b)).any() for a, b in zip(*map(jax.tree.leaves, (again, payload)), strict=True)]
    assert any(changes) or name != "int4", "coded again it would be the same: this tests nothing"


def test_finer_codecs_are_closer() -> None:
    """Single tokens, the state coded after each."""
    mixer = DELTA.mixer()
    x, extend = text(24).astype(jnp.float32), jax.jit(mixer.extend)

    def outputs(name: str) -> jax.Array:
        cache, found = mixer.init_cache(B, 24, jnp.float32, mixer.plan(f"state={name}")), []
        for t in range(24):
            y, cache = extend(x[:, t : t + 1], where(t, t, t, length=1), cache)
            found.append(y)
        return jnp.concatenate(found, axis=1)

    exact = outputs("none")
    errors = [float(jnp.linalg.norm(outputs(name) - exact) / jnp.linalg.norm(exact)) for name in ("bf16", "int8", "int4")]
    assert 0 < errors[0] < 2e-2 and errors[0] < errors[2] and errors[1] < errors[2] / 4 and errors[2] < 0.7


# --------------------------------------------------------------------------------------------------------- the evaluation


def with_codec(config: Any, spec: str) -> Any:
    changed = copy.deepcopy(config)
    changed.eval.cache.codec = spec
    configs.validate(changed)
    return changed


def test_a_trained_hybrid_under_state_codecs(tiny: Any) -> None:
    """Loss and bytes as an evaluation has them: bf16 changes little, four bits more, other streams beside them."""
    few: Any = {"optimizer": {"learning_rate": 2e-2}, "eval": {"tokens": 256, "batch_size": 16}}
    config = tiny("delta,mla", steps=12, model={"num_layers": 2}, **few)
    mesh, data = Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1, 1), AXES), prepare(config.data)
    trainer = Trainer(config, data.vocab_size, mesh)
    state, split = trainer.init(), data.split("validation")
    for step in range(12):
        windows = np.asarray(data.split("train").tokens[step * 8 * 17 :][: 8 * 17], np.int32).reshape(8, 17)
        state, _ = trainer.step(state, Batch.of_windows(windows))
    model, found = trainer.model(state.params), {}
    for spec in ("none", "state=bf16", "state=int4:8,c_kv=int8"):
        changed = with_codec(config, spec)
        quality = perplexity.measure(changed, model, mesh, split, cache_plan(changed, model, data.tokenizer))
        found[spec] = quality.loss_cached - quality.loss, quality.held["bytes_after_window"]
    (plain, whole), (half, halved), (coarse, coded) = found.values()
    assert abs(plain) < 1e-5 and 1e-6 < abs(half) < 1e-3 and 4 * abs(half) < abs(coarse) < 0.1, found
    # A state of 2 heads of 8 x 8 and a tail of 3 x 48 channels, uncoded; 16 entries of c_kv of 8 and k_rope of 4 channels.
    tail = 3 * 48 * 4
    assert (whole, halved) == (16 * 8 * 4 + tail + 16 * 12 * 4, 16 * 8 * 2 + tail + 16 * 12 * 4)
    assert coded == 16 * (4 + 4) + tail + 16 * (8 + 2 + 4 * 4)


def test_a_window_goes_token_by_token_where_states_are_coded() -> None:
    assert pieces(16, chunked=False, prompt=False) == [(t, t + 1) for t in range(16)]
    assert pieces(16)[0] == (0, 8) and pieces(1, chunked=False, prompt=False) == pieces(1) == [(0, 1)]


@pytest.mark.parametrize(
    ("variant", "spec", "words"),
    [
        (
            "delta",
            "int8",
            "'int8': this model keeps a state and no entries of tokens; name it, state=int8, or set it to none",
        ),
        ("delta", "state=kivi2", "'state=kivi2' on a state: it has no tokens that could be coded later"),
        ("delta", "state=kvquant4:32", "on a state"),
        ("delta", "stat=int8", "'stat=int8': no stream 'stat' in this cache; did you mean 'state'?"),
        ("delta", "tail=int8", "no stream 'tail' in this cache"),
        ("delta,mla", "state=int8,key=int8", "no stream 'key' in this cache; known: c_kv, k_rope, state"),
        ("mla", "state=int8", "no stream 'state' in this cache"),
        ("delta", "state=int4:3", "groups of 3 do not divide a stream of 8 channels"),
    ],
)
def test_what_means_nothing_is_refused_in_one_line(tiny: Any, variant: str, spec: str, words: str) -> None:
    config = tiny(variant, model={"num_layers": 2})
    config.eval.cache.codec = spec
    model: Any = cache_bytes.abstract_model(config, 257)
    for refuses in (
        lambda: cache_plan(config, model, None),  # type: ignore[arg-type, return-value]
        lambda: jax.eval_shape(lambda: model.init_cache(1, 8, plan=CachePlan(spec))),
    ):
        with pytest.raises(UserError) as error:
            refuses()
        assert words in str(error.value) and "\n" not in str(error.value)
        assert str(error.value).startswith("config.eval.cache.codec: ")
