"""What layers keep between calls: clocks and their bookkeeping, tails, states, and what is read off what they declare."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import EXACT, close
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P
from matrix import D_MODEL, TOYS, Row

from mla import config as configs
from mla import model as models
from mla.attention import contract
from mla.attention.softmax.grouped_query import KeyValue
from mla.cache.clock import Clock
from mla.cache.evicted import Eviction
from mla.cache.eviction import policy
from mla.cache.merged import MiniCache
from mla.cache.meter import bookkeeping_bytes, content_bytes
from mla.cache.plan import CachePlan
from mla.cache.state import TailCache
from mla.cache.stores import Entries, LayerCache, ModelCache, State, Tail
from mla.cache.tokens import TokenCache
from mla.errors import UserError
from mla.evaluation import cache_bytes
from mla.evaluation.plan import cache_plan
from mla.sharding import cache_shardings, make_mesh

B, WIDTH = 2, 5
PIECES = st.lists(st.tuples(st.tuples(st.integers(0, WIDTH), st.integers(0, WIDTH)), st.booleans()), min_size=1, max_size=6)


def pieces(counts: list[Any]) -> Any:
    """Positions [B, WIDTH] of each call: so many tokens a row, padding ahead of them or behind."""
    written = [0] * B
    for numbers, ahead in counts:
        where = np.full((B, WIDTH), -1, np.int32)
        for row, number in enumerate(numbers):
            start = WIDTH - number if ahead else 0
            where[row, start : start + number] = np.arange(written[row], written[row] + number)
            written[row] += number
        yield where, list(written)


@jax.jit
def advance(tail: TailCache, new: jax.Array, where: jax.Array) -> Any:
    line = tail.line(new, where)
    return line, tail.where(where), tail.after(line, where)


@settings(deadline=None, max_examples=40)
@given(kept=st.sampled_from([1, 3, 7]), counts=PIECES)
def test_a_tail_shows_each_token_those_before_it(kept: int, counts: list[Any]) -> None:
    """Whatever the pieces and their padding: token t at row R + i, behind it t - 1, t - 2, .., zeros before the text."""
    spec = Tail(jax.ShapeDtypeStruct((), jnp.float32), kept)
    tail: Any = spec.empty(B, 0, jnp.float32, None)  # type: ignore[arg-type]
    for where, written in pieces(counts):
        line, stands, tail = advance(tail, jnp.where(where >= 0, where + 1.0, -99.0), where)
        for row in range(B):
            for i in np.flatnonzero(where[row] >= 0):
                expected = np.arange(where[row, i] - kept, where[row, i] + 1)
                np.testing.assert_array_equal(line[row, i : i + kept + 1], np.maximum(expected + 1, 0))
                np.testing.assert_array_equal(stands[row, i : i + kept + 1], np.maximum(expected, -1))
            held = np.arange(written[row] - kept, written[row])
            np.testing.assert_array_equal(tail.state[row], np.maximum(held + 1, 0))


@settings(deadline=None, max_examples=40)
@given(stride=st.integers(1, 6), counts=PIECES)
def test_an_entry_comes_with_the_last_token_of_each_stride(stride: int, counts: list[Any]) -> None:
    clock, ends = Clock(stride), [[], []]  # type: ignore[var-annotated]
    for where, written in pieces(counts):
        index, stands = clock.beats(jnp.asarray(where))
        assert index.shape == (B, -(-WIDTH // stride))
        for row in range(B):
            real = np.asarray(stands[row]) >= 0
            np.testing.assert_array_equal(where[row, np.asarray(index[row])[real]], stands[row][real])
            ends[row] += np.asarray(stands[row])[real].tolist()
            assert ends[row] == list(range(stride - 1, written[row], stride))


def test_bookkeeping_is_shared_by_clock_and_not_by_shape() -> None:
    """Three layers whose arrays all have eight slots: two of one stride, one of another."""
    like = KeyValue(*[jax.ShapeDtypeStruct((1, 1, 2, 4), jnp.float32)] * 2)
    clocks = [Clock(2, window=8), Clock(4, window=8), Clock(2, window=8)]
    layers = [LayerCache.of(entries=TokenCache.empty(like, B, 32, jnp.float32, clock)) for clock in clocks]
    cache = ModelCache.gather(layers)
    assert [slots.clock for slots in cache.slots] == clocks[:2]
    assert bookkeeping_bytes(cache) == 2 * 4 * B * (8 + 1)
    whole = [cache.layer(index) for index in range(3)]
    assert [layer["entries"].slots.clock for layer in whole if layer] == clocks
    private = LayerCache.of(entries=TokenCache.empty(like, B, 32, jnp.float32, Clock(heads=2)))
    assert ModelCache.gather([private, private]).slots == ()


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model of two layers of a toy mechanism, and its config."""

    def build(row: Row, d_model: int = D_MODEL, **values: Any) -> Any:
        config_class, mixer = row.of
        registered = f"toys:{config_class.__name__}:{mixer.__name__}"
        monkeypatch.setitem(contract.REGISTRY, row.name, registered)
        model = {"d_model": d_model, "num_layers": 2, "num_heads": 4, "match_parameters": False}
        return configs.create(row.name, row.settings | values, model=model, context=24)

    return build


ENTRY = 2 * 2 * 8 * 4  # bytes of key and value of 8 channels in two layers


@pytest.mark.parametrize(
    ("row", "settings_", "growth", "held"),
    [
        (TOYS[0], {}, 0, 2 * (8 * 8 + 3 * 8) * 4),
        (TOYS[1], {"stride": 128}, ENTRY / 128, 127 * ENTRY),
        (TOYS[2], {}, 0, (3 + 3) * ENTRY),
        (TOYS[3], {}, ENTRY / 3, (33 + 2 + 9) * ENTRY),
    ],
    ids=lambda value: getattr(value, "id", ""),
)
def test_bytes_of_every_store_are_those_of_the_formula(
    row: Row, settings_: dict[str, int], growth: float, held: int, toy: Any
) -> None:
    """Live and abstract, through the measure of evaluation; a stride of 128 is seen by it too. `held` after 100 tokens."""
    config = toy(row, d_model=8, **settings_)
    model = models.create(config, 29)
    found = cache_bytes.measure(config, model, make_mesh(configs.MeshConfig()), lengths=(100, 1000))
    assert found["bytes_per_token"] == pytest.approx(growth) and found["bytes_at"]["100"] == held


def test_what_is_stored_can_be_read_as_codes() -> None:
    """A memory carries the codes of its entries, for kernels that decode as they read."""
    mixer = Row("gqa").mixer()
    x, where = jnp.ones((1, 3, D_MODEL)), jnp.arange(3, dtype=jnp.int32)[None]
    memory, _ = mixer.remember(x, where, mixer.init_cache(1, 3, jnp.float32, mixer.plan("int8")))
    key = memory.seen.stored.key
    assert {a.dtype for a in jax.tree.leaves(key.payload)} == {jnp.dtype(jnp.int8), jnp.dtype(jnp.float16)}
    np.testing.assert_array_equal(key.codec.decode(key.payload, jnp.float32), memory.entries.key)


def test_a_layer_that_keeps_more_than_entries_is_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """What leaves the entries would have to leave a tail beside them too."""
    config = configs.create("gqa", {}, model={"d_model": 32, "num_layers": 1, "num_heads": 4})
    config.eval.cache.evict, config.eval.cache.budget_tokens = "tova", 8
    model = models.create(config, 29)
    assert cache_plan(config, model, None).eviction is not None
    mixer, stores = type(model.blocks[0].mixer), model.blocks[0].mixer.stores()
    tail = Tail(jax.ShapeDtypeStruct((), jnp.float32), 1)
    monkeypatch.setattr(mixer, "stores", lambda self: stores | {"tail": tail})
    with pytest.raises(UserError, match="gqa keeps more than entries of tokens; set it to none"):
        cache_plan(config, model, None)
    with pytest.raises(UserError, match="layers of a pair cannot keep other tokens each"):
        CachePlan(eviction=Eviction(policy("tova"), 4, "both"), merge=MiniCache())


@pytest.mark.parametrize("row", TOYS, ids=lambda row: row.id)
def test_models_of_such_layers_decode_as_they_train(row: Row, toy: Any) -> None:
    """Unequal prompts, then single tokens, over a mesh of all devices."""
    config = toy(row)
    with jax.enable_x64(True):
        model = models.create(dataclasses.replace(config), 29)
        tokens = jax.random.randint(jax.random.key(0), (2, 20), 0, 29)
        where = jnp.stack([jnp.arange(20), jnp.maximum(jnp.arange(20) - 3, -1)]).astype(jnp.int32)
        whole, step = jax.jit(model)(tokens, where), jax.jit(model.extend)
        logits, cache = step(tokens[:, :14], where[:, :14], model.init_cache(2, 20))
        outputs = [logits]
        for t in range(14, 20):
            logits, cache = step(tokens[:, t : t + 1], where[:, t : t + 1], cache)
            outputs.append(logits)
        real = where[..., None] >= 0
        close(jnp.concatenate(outputs, axis=1) * real, whole * real, 2e-5)  # parameters are fp32


def test_caches_are_cut_over_devices_by_what_their_axes_mean(toy: Any) -> None:
    """A tail's taps stay together and its channels are cut as heads are, though both stand where a state has heads."""
    mesh = make_mesh(configs.MeshConfig(data=2, fsdp=1, tensor=4))
    model = models.create(toy(TOYS[0]), 29)
    shapes = jax.eval_shape(lambda: model.init_cache(2, 64))
    layer: Any = cache_shardings(shapes, mesh).layers[0]
    assert layer["state"].state.spec == P(("data", "fsdp"), "tensor", None)
    assert layer["tail"].state.spec == P(("data", "fsdp"), None, "tensor")
    pooled = cache_shardings(jax.eval_shape(lambda: models.create(toy(TOYS[1]), 29).init_cache(2, 64)), mesh)
    assert pooled.layers[0]["pooled"].streams.key.spec == P(("data", "fsdp"), None, "tensor", None)
    assert pooled.slots[0].positions.spec == P(("data", "fsdp"), None)


def test_parts_of_a_cache_have_their_own_dtypes() -> None:
    """A tail in the dtype of the cache beside a state in fp32."""
    cache = TOYS[0].mixer(jnp.bfloat16).init_cache(B, 64, jnp.bfloat16)
    assert cache["state"].state.dtype == jnp.float32 and cache["tail"].state.dtype == jnp.bfloat16
    assert content_bytes(cache) == B * (D_MODEL**2 * 4 + 3 * D_MODEL * 2)
    spec = State(jax.ShapeDtypeStruct((2,), jnp.int8))
    assert spec.empty(B, 0, jnp.bfloat16, contract.PLAIN).state.dtype == jnp.int8
    like = KeyValue(*[jax.ShapeDtypeStruct((1, 1, 2, 4), jnp.float32)] * 2)
    exact = Entries(like, dtype=jnp.float32).empty(B, 8, jnp.bfloat16, contract.PLAIN)
    assert exact.streams.key.dtype == jnp.float32


@pytest.mark.parametrize("codec", ["int8", "key=int4"])
def test_slots_that_are_written_again_are_coded_again(codec: str) -> None:
    """Dynamic memory compression under codecs: no split of a text changes an answer, and the bytes are the formula's."""
    with jax.enable_x64(True):
        mixer = Row("dmc", {"offset": 0.0}).mixer()
        x = jax.random.normal(jax.random.key(3), (2, 22, D_MODEL))
        where, extend = jnp.broadcast_to(jnp.arange(22, dtype=jnp.int32), (2, 22)), jax.jit(mixer.extend)
        whole, full = extend(x, where, mixer.init_cache(2, 22, jnp.float64, mixer.plan(codec)))
        cache, outputs = mixer.init_cache(2, 22, jnp.float64, mixer.plan(codec)), []
        for start, stop in ((0, 11), *((t, t + 1) for t in range(11, 22))):
            y, cache = extend(x[:, start:stop], where[:, start:stop], cache)
            outputs.append(y)
        close(jnp.concatenate(outputs, axis=1), whole, EXACT, unit=True)
        for a, b in zip(jax.tree.leaves(cache["entries"]), jax.tree.leaves(full["entries"]), strict=True):
            np.testing.assert_array_equal(a, b)
        exact = mixer(x)
        assert 1e-4 < float(jnp.linalg.norm(whole - exact) / jnp.linalg.norm(exact)) < 0.2
        assert int(cache["entries"].slots.lengths.max()) < 22, "nothing was merged"
    config = configs.create("dmc", {}, model={"d_model": 32, "num_layers": 1, "num_heads": 4})
    config.eval.cache.codec = codec
    model = cache_bytes.abstract_model(config, 29)
    for length in (1, 13, 64):
        held = cache_bytes.abstract_bytes_at(model, length, CachePlan(codec))
        assert held == cache_bytes.formula_bytes_at(config, length)
