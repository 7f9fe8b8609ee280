"""Codecs that store a token in another form later on (KIVI, KVQuant-style): what is seen when, bytes, and refusals."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import EXACT, close
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh
from matrix import D_MODEL, YARN, Row, rows_of

from mla import config as configs
from mla import model as models
from mla.attention.softmax.base import SoftmaxMixer
from mla.cache.codecs import codec, codecs
from mla.cache.plan import CachePlan
from mla.cache.tokens import TokenCache, _is_stored
from mla.errors import UserError
from mla.evaluation import cache_bytes
from mla.sharding import AXES

# ------------------------------------------------------------------------------------------------ entries that stand later

ROTATED = [
    *rows_of(SoftmaxMixer),
    Row("mla", {"kv_lora_rank": 20, "qk_rope_head_dim": 8, "yarn": YARN | {"mscale_all_dim": 0.0}}),  # magnitude 1.14
]


@pytest.mark.parametrize("row", ROTATED, ids=lambda row: row.id)
def test_shifted_entries_are_those_of_later_tokens(row: Row) -> None:
    mixer = row.mixer()
    assert isinstance(mixer, SoftmaxMixer)
    x = jax.random.normal(jax.random.key(0), (2, 7, D_MODEL))
    positions = jnp.asarray([[0, 1, 2, 3, 4, 5, 6], [3, 5, 8, 9, 20, 21, 40]], jnp.int32)
    by = jnp.asarray([[5, 0, 1, 60, 2, 2, 9], [-3, 7, -8, 1, 1, 30, -40]], jnp.int32)
    entries = mixer.entries
    both = jax.jit(lambda x, p, by: (mixer.shift(entries(x, p), by), entries(x, p + by)))
    shifted, expected = both(x, positions, by)
    assert type(shifted) is type(expected)
    for a, b in zip(jax.tree.leaves(shifted), jax.tree.leaves(expected), strict=True):
        close(a, b, 1e-5 * max(1.0, float(np.std(b))))


# -------------------------------------------------------------------------------------------- what is coded, and what is raw


class Pair(NamedTuple):
    key: jax.Array
    value: jax.Array


def quantised(x: np.ndarray, bits: int) -> np.ndarray:
    """The codec's grid over the last axis in float64: minima and scales in 16 bits, rounded so that nothing clips."""
    top, lowest = 2**bits - 1, x.min(-1, keepdims=True)
    minima = np.float64(np.float16(lowest - np.abs(lowest) * 2**-10))
    scales = np.float64(np.float16((x.max(-1, keepdims=True) - minima) / top * (1 + 2**-10)))
    return np.clip(np.round((x - minima) / scales), 0, top) * scales + minima


def in_groups(x: np.ndarray, group: int, bits: int) -> np.ndarray:
    """`quantised` in groups along the last axis."""
    return quantised(x.reshape(*x.shape[:-1], -1, group), bits).reshape(x.shape)


class Reference:
    """Random streams [2, tokens, 2, 8], and what a query sees of them after so many tokens."""

    def __init__(self, spec: str, tokens: int, bits: int, block: int, window: int = 0):
        draw = np.random.default_rng(0)
        self.key, self.value = draw.standard_normal((2, 2, tokens, 2, 8)).astype(np.float32)
        self.key[..., 3] *= 10
        self.chosen, self.tokens = codecs(spec, Pair._fields), tokens
        self.block, self.window = block, window or block  # R of keys and of values
        whole = tokens // block * block
        by_channel: Any = np.moveaxis(np.float64(self.key[:, :whole]).reshape(2, -1, block, 2, 8), 2, -1)
        by_channel = np.moveaxis(in_groups(by_channel, min(32, block), bits), -1, 2).reshape(2, whole, 2, 8)
        self.coded_key = np.concatenate([by_channel, np.full((2, tokens - whole, 2, 8), np.nan)], axis=1)
        self.coded_value = in_groups(np.float64(self.value), 8, bits)
        self.positions = np.broadcast_to(2 * np.arange(tokens, dtype=np.int32) + 5, (2, tokens))

    def after(self, row: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """The last (tokens mod R) keys are raw, and the last R values."""
        index = np.arange(tokens)[:, None, None]
        key = np.where(index < tokens // self.block * self.block, self.coded_key[row, :tokens], self.key[row, :tokens])
        value = np.where(index < tokens - self.window, self.coded_value[row, :tokens], self.value[row, :tokens])
        return key, value

    def empty(self) -> TokenCache:
        stream: Any = jax.ShapeDtypeStruct((1, 1, 2, 8), jnp.float32)
        like = Pair(stream, stream)
        return TokenCache.empty(like, 2, self.tokens, jnp.float32, codecs=self.chosen)

    def piece(self, start: list[int], stop: list[int], width: int) -> tuple[Pair, np.ndarray]:
        """Tokens start .. stop - 1 of each row in `width` columns, padding on the left."""
        where = np.full((2, width), -1, np.int32)
        new: Any = Pair(*np.full((2, 2, width, 2, 8), 77.0, np.float32))
        for row, (first, last) in enumerate(zip(start, stop, strict=True)):
            columns = slice(width - (last - first), width)
            where[row, columns] = self.positions[row, first:last]
            new.key[row, columns], new.value[row, columns] = self.key[row, first:last], self.value[row, first:last]
        return new, where

    def require(self, seen: Any, start: list[int], stop: list[int]) -> None:
        """Every query sees every token before it and itself once, in the form of its time."""
        seen = jax.tree.map(np.asarray, seen._replace(stored=seen.read(jnp.float32)))
        for row, (first, last) in enumerate(zip(start, stop, strict=True)):
            for count in range(first + 1, last + 1):
                at = self.positions[row, count - 1]
                visible = (seen.positions[row] >= 0) & (seen.positions[row] <= at)
                if seen.since is not None:
                    visible &= (seen.since[row] <= at) & (at < seen.until[row])
                np.testing.assert_array_equal(np.sort(seen.positions[row, visible]), self.positions[row, :count])
                order = np.flatnonzero(visible)[np.argsort(seen.positions[row, visible])]
                for found, expected in zip(seen.stored, self.after(row, count), strict=True):
                    close(found[row, order], expected, 2e-6 * 40)


extend = jax.jit(TokenCache.extend)  # programs are shared by all caches of one shape and codec

LONG = Reference("kivi2:64", 140, 2, 64)
SMALL = Reference("kivi4:6", 27, 4, 6)


@pytest.mark.parametrize("tokens", [1, 31, 32, 63, 64, 65, 96, 127, 128, 129, 133])
def test_what_is_coded_and_what_is_raw(tokens: int) -> None:
    """Around groups of 32, blocks and windows of 64: a piece, then one more token."""
    start, middle, stop = [0, 0], [tokens - 1, max(tokens - 40, 0)], [tokens, max(tokens - 40, 0) + 1]
    new, where = LONG.piece(start, middle, 140)
    seen, cache = extend(LONG.empty(), new, where)
    LONG.require(seen, [max(n - 1, 0) for n in middle], middle)
    seen, cache = extend(cache, *LONG.piece(middle, stop, 1))
    assert seen.since is None and seen.read(jnp.float32).key.shape[1] == 140
    LONG.require(seen, middle, stop)
    key, value = cache.streams
    # No other copy: codes of what can settle, and one ring; codes of what has not settled are zeros.
    assert key.payload.codes.shape == (2, 2, 2, 8, 16) and key.payload.scales.shape == (2, 2, 2, 8, 2)
    assert value.payload.codes.shape == (2, 76, 2, 2) and key.raw.shape == value.raw.shape == (2, 64, 2, 8)
    for row, count in enumerate(stop):
        assert not np.asarray(key.payload.scales)[row, count // 64 :].any()
        assert not np.asarray(value.payload.scales)[row, max(count - 64, 0) :].any()
        for stream, exact in ((key, LONG.key), (value, LONG.value)):
            newest = np.arange(max(count - 64, 0), count)
            np.testing.assert_array_equal(np.asarray(stream.raw)[row, newest % 64], exact[row, newest])


@given(data=st.data())
@settings(deadline=None, max_examples=40)
def test_any_split_shows_and_stores_the_same(data: Any) -> None:
    """Pieces of any lengths, rows of different lengths, padding on the left: across blocks of 6 and windows of 6."""
    cache, start = SMALL.empty(), [0, 0]
    for _ in range(data.draw(st.integers(1, 6), "pieces")):
        width = data.draw(st.sampled_from([1, 5, 14]), "width")
        stop = [data.draw(st.integers(n, min(n + width, 27)), "stop") for n in start]
        seen, cache = extend(cache, *SMALL.piece(start, stop, width))
        SMALL.require(seen, start, stop)
        start = stop
    _, whole = extend(SMALL.empty(), *SMALL.piece([0, 0], start, 27))
    for a, b in zip(jax.tree.leaves(cache), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("spec", "window", "forms"), [("", 27, 2), (",value=kivi4_token:2", 2, 3), (",value=kivi4_token:9", 9, 3)]
)
def test_streams_settle_each_at_its_own_time(spec: str, window: int, forms: int) -> None:
    """Values that stay raw, that are coded before their keys, and after them."""
    case = Reference("key=kivi4_channel:6" + spec, 27, 4, 6, window)
    seen, _ = extend(case.empty(), *case.piece([0, 0], [27, 20], 27))
    assert seen.positions.shape[1] == 27 * forms
    case.require(seen, [0, 0], [27, 20])


@pytest.mark.parametrize(
    "name", ["kivi4_channel", "kivi2_channel", "kivi2_channel:96", "kivi4_channel:16", "kvquant2_channel"]
)
def test_keys_round_to_nearest(name: str) -> None:
    """|x - x'| <= s / 2 with s of 32 tokens of one channel, and what 16-bit scales and minima add."""
    made: Any = codec(name)
    x = np.random.default_rng(0).standard_normal((2, 2 * made.unit, 3, 10)) * np.exp(np.arange(10) - 4)
    x[0, :40, 0] = 2.5  # all alike
    found = np.asarray(made.decode(made.encode(jnp.asarray(x, jnp.float32)), jnp.float32), np.float64)
    group, top = min(32, made.unit), 2**made.bits - 1
    groups, error = (a.reshape(2, -1, group, 3, 10) for a in (x, np.abs(found - x)))
    step = (groups.max(2) - groups.min(2)) / top
    slack = 2**-9 * step + 2**-9 * np.abs(groups).max(2) / top + 2**-14
    assert (error.max(2) <= step / 2 + slack).all() and error.max() > 0


def test_what_a_mixer_stores_is_within_half_a_step() -> None:
    mixer = Row("gqa", {"num_kv_heads": 2}).mixer()
    x, positions = inputs(40)
    cache = mixer.init_cache(2, 40, jnp.float32, mixer.plan("kivi4:16"))
    exact, (_, cache) = mixer.entries(x, positions), jax.jit(lambda c: mixer.remember(x, positions, c))(cache)
    store = cache["entries"]
    found = jax.tree.map(lambda s: s.read(jnp.float32, store.slots.lengths), store.streams, is_leaf=_is_stored)
    key, stored = (np.float64(a)[:, :32].reshape(2, 2, 16, 2, 8) for a in (exact.key, found.key))
    step = (key.max(2) - key.min(2)) / 15
    assert (np.abs(stored - key).max(2) <= step / 2 + 1e-3).all()
    value, stored = (np.float64(a)[:, :24] for a in (exact.value, found.value))
    assert (np.abs(stored - value).max(-1) <= (value.max(-1) - value.min(-1)) / 30 + 1e-3).all()
    for raw, whole, count in ((found.key, exact.key, 8), (found.value, exact.value, 16)):
        close(raw[:, -count:], whole[:, -count:], 1e-5, unit=True)


# ------------------------------------------------------------------------------------------------------------ whole mixers


def inputs(length: int, batch: int = 2) -> tuple[jax.Array, jax.Array]:
    x = jax.random.normal(jax.random.key(3), (batch, length, D_MODEL))
    return x, jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))


LOUD_YARN = {"kv_lora_rank": 20, "qk_rope_head_dim": 8, "yarn": YARN | {"mscale_all_dim": 0.0}}
SPLITS = [
    (Row("gqa", {"num_kv_heads": 2}), "hadamard+kvquant2:6"),
    (Row("mla", LOUD_YARN), "c_kv=kivi4:4,k_rope=kvquant4:9"),
    (Row("tensor_product", {"rank_q": 3, "factor_init": "unit"}), "kvquant2:8"),
    (Row("slim", {"head_dim": 12}), "hadamard+kivi4:8"),
]


@pytest.mark.parametrize(("row", "spec"), SPLITS, ids=lambda value: getattr(value, "id", value))
def test_no_split_of_a_text_changes_an_answer(row: Row, spec: str) -> None:
    """In float64: in fp32 a code may stand on the edge of its cell, and XLA round it otherwise for another shape."""
    with jax.enable_x64(True):
        _require_no_split_to_matter(row, spec)


def _require_no_split_to_matter(row: Row, spec: str) -> None:
    mixer = row.mixer()
    step, (x, positions) = jax.jit(mixer.extend), inputs(26)

    def run(*sizes: int) -> tuple[jax.Array, Any]:
        """Pieces of one token, and longer ones padded on the left to 30: two programs for all splits."""
        cache, start, outputs = mixer.init_cache(2, 30, jnp.float64, mixer.plan(spec)), 0, []
        for size in sizes:
            here, pad = slice(start, start + size), 0 if size == 1 else 30 - size
            padded = jnp.pad(x[:, here], ((0, 0), (pad, 0), (0, 0)), constant_values=7.0)
            where = jnp.pad(positions[:, here], ((0, 0), (pad, 0)), constant_values=-1)
            y, cache = step(padded, where, cache)
            outputs.append(y[:, pad:])
            start += size
        return jnp.concatenate(outputs, axis=1), cache

    whole, full = run(26)
    for sizes in ([11, 11, 1, 1, 1, 1], [1] * 26):
        y, cache = run(*sizes)
        close(y, whole, EXACT, unit=True)
        for a, b in zip(jax.tree.leaves(cache), jax.tree.leaves(full), strict=True):
            close(a, b, EXACT)
    error = float(jnp.linalg.norm(whole - mixer(x)) / jnp.linalg.norm(mixer(x)))
    assert 1e-3 < error < (0.15 if "4" in spec else 0.6)


def test_layers_that_read_others_see_the_same_forms() -> None:
    config = sized("gqa/2", {"num_kv_heads": 1}, "kivi4:6", layers=2)
    model = models.create(config, 29)
    graph, state = nnx.split(model)
    step = jax.jit(lambda tokens, positions, cache: nnx.merge(graph, state).extend(tokens, positions, cache))
    tokens, positions = jax.random.randint(jax.random.key(0), (2, 24), 0, 29), inputs(24)[1]
    empty = model.init_cache(2, 24, plan=CachePlan("kivi4:6"))
    whole, _ = step(tokens, positions, empty)
    cache, found = empty, []
    for t in range(24):
        logits, cache = step(tokens[:, t : t + 1], positions[:, t : t + 1], cache)
        found.append(logits)
    close(jnp.concatenate(found, axis=1), whole, 2e-5)
    assert float(jnp.abs(whole - model(tokens)).max()) > 1e-3


def test_kvquant_is_kivi_where_nothing_is_rotated() -> None:
    mixer = Row("gqa", {"num_kv_heads": 2, "rope_fraction": 0.0}).mixer()
    x, positions = inputs(26)
    remember = jax.jit(lambda cache: mixer.remember(x, positions, cache))
    results = [remember(mixer.init_cache(2, 26, jnp.float32, mixer.plan(spec))) for spec in ("kivi4:8", "kvquant4:8")]
    for a, b in zip(
        *(jax.tree.leaves((memory.entries, cache["entries"].streams)) for memory, cache in results), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    rotated = Row("gqa", {"num_kv_heads": 2}).mixer()
    cache = rotated.init_cache(2, 26, jnp.float32, rotated.plan("kvquant4:8"))
    (_, cache), plain = jax.jit(
        lambda c: (rotated.remember(x, positions, c), rotated.shift(rotated.entries(x, positions), -positions).key)
    )(cache)
    close(cache["entries"].streams.key.raw[:, :2], plain[:, 24:26], 1e-5)
    assert rotated.codecs("kvquant4")["value"] == rotated.codecs("kivi4")["value"]


def test_per_channel_is_best_where_one_channel_is_loud() -> None:
    """One of 64 channels 20 times as large: attention rows lose least per channel, and less rotated than per token."""
    draw = np.random.default_rng(0)
    keys, queries = draw.standard_normal((256, 64)), draw.standard_normal((256, 64))
    keys[:, 5] *= 20

    def rows(k: Any) -> Any:
        return jax.nn.softmax(jnp.asarray(queries) @ jnp.asarray(k).T / 8, axis=-1)

    def lost(name: str) -> float:
        made = codec(name)
        assert made is not None
        found = jax.jit(lambda k: made.decode(made.encode(k), jnp.float32)[0])(jnp.asarray(keys[None], jnp.float32))
        return float(jnp.abs(rows(found) - rows(keys)).sum(-1).mean())

    for bits in (4, 2):
        per_channel, rotated, plain = lost(f"kivi{bits}_channel"), lost(f"hadamard+int{bits}:64"), lost(f"int{bits}:64")
        assert per_channel < 0.7 * rotated and rotated < {4: 0.6, 2: 0.9}[bits] * plain


# ------------------------------------------------------------------------------------------------------------------- bytes


@pytest.mark.parametrize(("tokens", "expected"), [(128, 19_456), (129, 19_608), (300, 32_288), (4096, 209_920)])
def test_published_bytes_of_kivi(tokens: int, expected: int) -> None:
    """Of one key-value head, d = 64, 16 bits: only tokens that are there count, T mod R raw keys and min(T, R) raw values.

    The arrays are allocated once: their ring of raw keys has min(T, R) slots at any length.
    """
    chosen = codecs("kivi2", ["key", "value"])
    key, value = chosen["key"], chosen["value"]
    assert key is not None and value is not None
    assert key.token_bytes((64,), 2, tokens) + value.token_bytes((64,), 2, tokens) == expected
    allocated = key.allocated_bytes((64,), 2, tokens) + value.allocated_bytes((64,), 2, tokens)
    assert allocated == expected + (128 - tokens % 128) * 64 * 2


SIZED = [
    ("gqa", {"num_kv_heads": 1}, "kivi2:16"),
    ("gqa", {"num_kv_heads": 2}, "key=kvquant4:12,value=int8"),
    ("mla", {"kv_lora_rank": 20, "qk_rope_head_dim": 4}, "hadamard+kivi2"),
    ("mla", {"kv_lora_rank": 20, "qk_rope_head_dim": 0}, "c_kv=kivi4:32"),
    ("tensor_product", {"rank_k": 3}, "kivi2:64"),
    ("slim", {}, "kivi4"),
]


@pytest.mark.parametrize(("variant", "settings_", "spec"), SIZED)
def test_arrays_take_the_bytes_of_the_formula(variant: str, settings_: dict[str, Any], spec: str) -> None:
    config = sized(variant, settings_, spec)
    model = cache_bytes.abstract_model(config, 29)
    plan = CachePlan(spec)
    for length in (1, 11, 12, 13, 31, 64, 127, 128, 129, 192, 200, 300):
        assert cache_bytes.abstract_bytes_at(model, length, plan) == cache_bytes.formula_bytes_at(config, length), length
    short, long = cache_bytes.lengths_to_compare(config)
    found = [cache_bytes.abstract_bytes_at(model, length, plan) for length in (short, long)]
    close((found[1] - found[0]) / (long - short), cache_bytes.formula_growth(config), relative=1e-12)


def sized(variant: str, settings_: dict[str, Any], spec: str, layers: int = 1) -> configs.Config:
    model = {"d_model": 16, "num_layers": layers, "num_heads": 2, "match_parameters": False}
    config = configs.create(variant, settings_, model=model, context=24)
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, cache=configs.EvalCacheConfig(codec=spec)))
    configs.validate(config)
    return config


def test_measured_bytes_of_a_live_cache() -> None:
    """8 key channels in blocks of 16, 16 / 4 + 4 bytes each; values of 8 / 4 + 4 bytes a token; rings of 16 tokens."""
    config = sized("gqa", {"num_kv_heads": 1}, "kivi2:16")
    model = models.create(config, 29)
    mesh = Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1, 1), AXES)
    found = cache_bytes.measure(config, model, mesh, CachePlan("kivi2:16"), lengths=(100,))
    assert cache_bytes.lengths_to_compare(config) == (64, 128)
    assert found["bytes_per_token"] == found["bytes_per_token_formula"] == 8 * 8 / 16 + 6
    assert found["constant_bytes"] == 16 * 8 * 4 + 16 * (8 * 4 - 6)


def test_lengths_to_compare_are_whole_blocks_beyond_the_window() -> None:
    assert cache_bytes.lengths_to_compare(sized("gqa", {}, "kivi2")) == (128, 256)
    assert cache_bytes.lengths_to_compare(sized("gqa", {}, "kivi2:96")) == (192, 384)
    assert cache_bytes.lengths_to_compare(sized("gqa", {}, "int4")) == (64, 128)


# ---------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("kivi3", "'kivi3' is not known; did you mean 'kivi"),
        ("kivi2:48", "blocks of 48 tokens: channels are coded in groups of 32 tokens, which do not divide them"),
        ("kivi2:x", "'kivi2:x': 'x' is no number of tokens; write NAME or kivi2:TOKENS"),
        ("hadamard+kvquant2:0", "'0' is no number of tokens"),
        ("key=kivi2,values=kivi2", "no stream 'values' in this cache; did you mean 'value'?"),
    ],
)
def test_bad_specifications_are_refused_with_one_line(spec: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        codecs(spec, ["key", "value"])
    assert words in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).startswith("config.eval.cache.codec: ")


@pytest.mark.parametrize("spec", ["kivi2", "value=kivi4_token", "hadamard+kvquant4:8"])
def test_rings_are_refused_with_one_line(spec: str) -> None:
    windowed = Row("sliding_window", {"window": 9, "num_kv_heads": 2}).mixer()
    with pytest.raises(UserError) as error:
        windowed.init_cache(2, 26, jnp.float32, windowed.plan(spec))
    assert f"config.eval.cache.codec: {spec!r} on a sliding window of 9 tokens" in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="on a sliding window of 6 tokens"):
        cache_bytes.stored(sized("sliding_window,gqa", {"sliding_window": {"window": 6}}, spec, layers=2))


def test_forms_are_chosen_by_stream() -> None:
    chosen = codecs("kivi2", ["key", "value", "c_kv", "k_rope", "u", "a_key", "b_key", "a_value", "b_value"])
    tokens = {name for name, made in chosen.items() if made == codec("kivi2_token")}
    assert tokens == {"value", "a_value", "b_value"}
    assert all(made == codec("kivi2_channel") for name, made in chosen.items() if name not in tokens)
    pair = codecs("key=kivi2_token:7,value=kivi4_channel:96", ["key", "value"])
    assert pair == {"key": codec("kivi2_token:7"), "value": codec("kivi4_channel:96")}
