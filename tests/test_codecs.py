"""Storage codecs: error bounds, bytes, packing, and caches that hold nothing but the coded streams."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers import EXACT, close
from hypothesis import given, settings
from hypothesis import strategies as st
from matrix import D_MODEL, Row

from mla import config as configs
from mla.cache.codecs import REGISTRY, check, codec, codecs
from mla.cache.codecs.integers import _pack, _unpack
from mla.cache.codecs.rotated import hadamard
from mla.cache.meter import content_bytes, tree_bytes
from mla.cache.tokens import Coded
from mla.errors import UserError
from mla.evaluation.evaluate import evaluate

VECTORS = [name for name in REGISTRY if not name.endswith("_channel")]  # the others are in test_kivi.py
NAMES = [*VECTORS, "int4:8", "int2:16", "fp8:32", "hadamard+int4", "hadamard+fp8:64", "hadamard+int8"]


def vectors(width: int = 64, seed: int = 0, scale: float = 1.0) -> jax.Array:
    draw = np.random.default_rng(seed)
    x = draw.standard_normal((5, 7, 3, width)) * np.exp(draw.standard_normal((5, 7, 3, 1))) * scale
    x[0, 0] = 0.0
    x[0, 1] = 2.5  # all alike
    x[0, 2, :, 3] *= 300  # an outlier
    return jnp.asarray(x, jnp.float32)


# ------------------------------------------------------------------------------------------------ one vector at a time


@pytest.mark.parametrize("width", [64, 96, 512])
@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_the_formula(name: str, width: int) -> None:
    made = codec(name)
    assert made is not None
    x, grouped = vectors(width), getattr(made, "inner", made)
    if grouped.strict and width % grouped.group:
        with pytest.raises(UserError, match=f"groups of {grouped.group} do not divide a stream of {width} channels"):
            made.encode(x)
        return
    assert tree_bytes(made.encode(x)) == x.size // width * made.vector_bytes(width)


def test_published_bytes() -> None:
    """Of one vector: int8 d + 2; int4 in groups of 32 4.5 bits symmetric, 5 asymmetric; FlashMLA 512 + 16."""
    sizes = {name: codec(name).vector_bytes(128) for name in ("bf16", "int8", "int4", "int4:128", "int2", "fp8")}
    assert sizes == {"bf16": 256, "int8": 130, "int4": 80, "int4:128": 68, "int2": 48, "fp8": 132}
    assert codec("latent_fp8").vector_bytes(512) == 528
    assert codec("latent_fp8").vector_bytes(256) == 256 + 4 * 2


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("name", ["int8", "int4", "int2", "int4:8", "int2:64"])
def test_integers_round_to_nearest(name: str, scale: float) -> None:
    """|x - x'| <= s / 2 with s from each group's own range, and what 16-bit scales and minima add."""
    made, x = codec(name), np.asarray(vectors(scale=scale), np.float64)
    found = np.asarray(made.decode(made.encode(jnp.asarray(x, jnp.float32)), jnp.float32), np.float64)
    group = made.group_of(64)
    groups, error = x.reshape(-1, group), np.abs(found - x).reshape(-1, group)
    if made.symmetric:
        step = np.abs(groups).max(-1) / (2 ** (made.bits - 1) - 1)
    else:
        step = (groups.max(-1) - groups.min(-1)) / (2**made.bits - 1)
    slack = 2**-9 * step + 2**-9 * np.abs(groups).max(-1) / (2**made.bits - 1 if not made.symmetric else 1e9) + 2**-14
    assert (error.max(-1) <= step / 2 + slack).all()
    assert error.max() > 0, "nothing was rounded"


@pytest.mark.parametrize("name", ["fp8", "latent_fp8"])
def test_fp8_keeps_its_relative_error(name: str) -> None:
    """1/17 in the normal range; below it half a step of 2^-9, in units of the scale; zeros and outliers stay finite."""
    made, x = codec(name), vectors(scale=50.0)
    stored = made.encode(x)
    found = np.asarray(made.decode(stored, jnp.float32))
    scale = np.repeat(np.asarray(stored.scales), 64 // stored.scales.shape[-1], axis=-1)
    bound = np.maximum(np.abs(np.asarray(x)) / 17, scale * 2**-10)
    assert np.isfinite(found).all()
    assert (np.abs(found - np.asarray(x)) <= bound * 1.001).all()


def test_flashmla_scales_are_powers_of_two() -> None:
    made = codec("latent_fp8")
    x = vectors(512)
    stored = made.encode(x)
    assert stored.scales.shape[-1] == 4 and stored.values.dtype == jnp.float8_e4m3fn
    exponents = np.log2(np.asarray(stored.scales))
    np.testing.assert_array_equal(exponents, np.round(exponents))
    largest = np.abs(np.asarray(x)).reshape(*x.shape[:-1], 4, 128).max(-1)
    np.testing.assert_array_equal(exponents, np.ceil(np.log2(np.maximum(largest / 448, np.float32(1e-4)))))
    np.testing.assert_array_equal(made.decode(made.encode(jnp.zeros((1, 512))), jnp.float32), np.zeros((1, 512)))
    grid = jnp.asarray(np.arange(-448, 449, 32, dtype=np.float32)[:16].astype(ml_dtypes.float8_e4m3fn).astype(np.float32))
    exact = jnp.tile(grid * 2.0**-5, 32)[None]  # on the grid of e4m3, times a power of two
    np.testing.assert_array_equal(made.decode(made.encode(exact), jnp.float32), exact)


LARGEST = float(np.finfo(np.float32).max)
SIZES = [0.0, 1e-45, 1e-38, 1e-12, 1e-6, 1.0, 6.6e4, 7e4, 1e6, 9e6, 1e9, 1e19, 1e30, LARGEST / 2, LARGEST]


def extremes(width: int = 64) -> np.ndarray:
    """[cases, 64]: vectors all of one size, of both signs, and ones that are small but for one number."""
    cases = []
    for size in SIZES:
        signs = np.where(np.arange(width) % 3 == 0, -1.0, 1.0)
        lone = np.random.default_rng(0).standard_normal(width)
        for sign in (1, -1):
            lone[5] = sign * size
            cases += [
                np.full(width, sign * size),
                sign * size * signs,
                sign * size * np.linspace(0.5, 1, width),
                lone.copy(),
            ]
    return np.asarray(cases, np.float32)


def allowed(made: Any, x: np.ndarray) -> np.ndarray:
    """What the codec's docstring allows |x - x'| to be, and what fp32 rounds: float64 like x [..., width]."""
    size = np.abs(x)
    if not made.group and not hasattr(made, "bits"):
        return 2**-8 * size + np.maximum(size - float(ml_dtypes.finfo(ml_dtypes.bfloat16).max), 0) + 1e-37
    groups = x.reshape(-1, made.group_of(x.shape[-1]))
    if not hasattr(made, "bits"):
        scale = np.maximum(np.abs(groups).max(-1, keepdims=True) / 448, 1e-37) * (2 if made.power_of_two else 1)
        scale = np.maximum(scale, 2e-4) if made.power_of_two else scale
        return (np.maximum(np.abs(groups) / 17, scale / 1024) * 1.001 + 1e-35).reshape(x.shape)
    top, fp16 = 2 ** (made.bits - made.symmetric) - 1, 65504.0
    low = -top * fp16 if made.symmetric else np.clip(groups.min(-1, keepdims=True), -fp16, fp16)
    span = np.abs(groups).max(-1, keepdims=True) if made.symmetric else np.maximum(groups.max(-1, keepdims=True) - low, 0)
    span += 0 if made.symmetric else 2**-9 * np.abs(low)
    scale = np.minimum(span / top * (1 + 2**-9) + 2**-23, fp16)
    high = top * fp16 if made.symmetric else low + top * fp16
    beyond = np.maximum(np.maximum(low - groups, groups - high), 0) + 2.0**made.bits * 2**-24
    return (scale / 2 + beyond + 1e-6 * (np.abs(low) * (not made.symmetric) + top * scale)).reshape(x.shape)


@pytest.mark.parametrize("name", [*NAMES, "int4:64", "kivi4_channel:64", "kivi2_channel:64", "kvquant2_channel:32"])
def test_whatever_is_finite_is_read_as_a_finite_number_within_the_stated_bound(name: str) -> None:
    """Up to fp32's largest number, read in fp32 and in bf16."""
    made: Any = codec(name)
    x = extremes()
    rotated, per_channel = hasattr(made, "inner"), made.unit > 1
    stored = x.reshape(1, -1, 1, 64).swapaxes(1, 3) if per_channel else x  # 64 tokens of as many channels as cases

    @jax.jit
    def both(values: jax.Array) -> Any:
        coded = made.encode(values)
        return made.decode(coded, jnp.float32), made.decode(coded, jnp.bfloat16)

    found, narrow = (np.asarray(read, np.float64) for read in both(jnp.asarray(stored)))
    assert np.isfinite(found).all() and np.isfinite(narrow).all()
    found, exact = (found.swapaxes(1, 3) if per_channel else found).reshape(x.shape), x.astype(np.float64)
    if rotated:  # up to where the rotation itself saturates, and as a norm
        exact, found = (rows[np.abs(x).max(-1) <= LARGEST / 64**1.5] for rows in (exact, found))
        turned = exact @ np.asarray(hadamard(jnp.eye(64)), np.float64)
        bound = np.linalg.norm(allowed(made.inner, turned), axis=-1) + 1e-5 * np.linalg.norm(exact, axis=-1)
        assert (np.linalg.norm(found - exact, axis=-1) <= bound).all()
    elif per_channel:
        group = min(32, made.unit)
        bound = allowed(codec(f"int{made.bits}:{group}"), exact)
        assert (np.abs(found - exact) <= bound).all()
    else:
        assert (np.abs(found - exact) <= allowed(made, exact)).all()


@pytest.mark.parametrize(("name", "expected"), [("int8", 0.0074), ("int4", 0.078), ("int4:64", 0.089), ("int2", 0.393)])
def test_error_on_normal_numbers(name: str, expected: float) -> None:
    """Relative root mean square error on N(0, 1), 5 %: int8 over 512 channels, groups of 32 and 64."""
    x = jax.random.normal(jax.random.key(0), (2000, 512))
    found = codec(name).decode(codec(name).encode(x), jnp.float32)
    assert float(jnp.sqrt(jnp.mean((found - x) ** 2))) == pytest.approx(expected, rel=0.05)


@given(bits=st.sampled_from([2, 4, 8]), width=st.integers(1, 40), signed=st.booleans(), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_packing_is_lossless(bits: int, width: int, signed: bool, seed: int) -> None:
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if signed else (0, 2**bits)
    codes = np.random.default_rng(seed).integers(low, high, (3, width)).astype(np.int8 if signed else np.uint8)
    packed = _pack(jnp.asarray(codes), bits)
    assert packed.nbytes == 3 * -(-width * bits // 8)
    np.testing.assert_array_equal(_unpack(packed, bits, signed)[:, :width], codes)


def test_the_first_channel_has_the_lowest_bits() -> None:
    assert _pack(jnp.asarray([[1, 2]], jnp.uint8), 4).tolist() == [[0x21]]
    assert _pack(jnp.asarray([[-1, 3]], jnp.int8), 4).tolist() == [[0x3F]]
    assert _pack(jnp.asarray([[1, 2, 3, 0]], jnp.uint8), 2).tolist() == [[0b00111001]]


@pytest.mark.parametrize("width", [1, 2, 64, 96, 40])
def test_hadamard_is_orthonormal_and_its_own_inverse(width: int) -> None:
    matrix = np.asarray(hadamard(jnp.eye(width)), np.float64)
    close(matrix @ matrix, np.eye(width), 1e-6)
    close(matrix, matrix.T, 1e-7)
    blocks = width & -width
    close(np.abs(matrix[:blocks, :blocks]), np.full((blocks, blocks), blocks**-0.5), 1e-6)
    q, k = vectors(64)[..., :64], vectors(64, seed=1)
    close((hadamard(q) * hadamard(k)).sum(-1), (q * k).sum(-1), 1e-3, relative=1e-4)


# -------------------------------------------------------------------------------------------------------------- caches

ROWS = [
    (Row("gqa", {"num_kv_heads": 2}), {"key", "value"}),
    (Row("mla", {"kv_lora_rank": 20, "qk_rope_head_dim": 4}), {"c_kv", "k_rope"}),
    (Row("sliding_window", {"window": 9, "num_kv_heads": 2}), {"key", "value"}),
    (Row("tensor_product", {"contextual_a": False, "factor_init": "unit"}), {"b_key", "b_value"}),
]
every_row = pytest.mark.parametrize(("row", "streams"), ROWS, ids=lambda value: getattr(value, "id", ""))


def inputs(length: int, batch: int = 2) -> tuple[jax.Array, jax.Array]:
    x = jax.random.normal(jax.random.key(3), (batch, length, D_MODEL))
    return x, jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))


@every_row
@pytest.mark.parametrize("name", ["int8", "int4", "latent_fp8", "hadamard+int2"])
def test_a_coded_cache_holds_nothing_else(row: Row, streams: set[str], name: str) -> None:
    name = "fp8" if name == "latent_fp8" and "c_kv" not in streams else name
    mixer = row.mixer()
    cache = mixer.init_cache(2, 24, jnp.float32, mixer.plan(name))
    chosen = mixer.codecs(name)
    assert set(chosen) == streams
    x, positions = inputs(24)
    _, cache = jax.jit(mixer.extend)(x, positions, cache)
    like, slots, store = mixer.streams(), min(24, mixer.window or 24), cache["entries"]
    expected = 0
    for stream, made in chosen.items():
        held, shape = getattr(store.streams, stream), getattr(like, stream).shape[2:]
        assert isinstance(held, Coded) and held.codec == made
        expected += 2 * slots * int(np.prod(shape[:-1])) * made.vector_bytes(shape[-1])
    assert content_bytes(cache) == expected == sum(a.nbytes for a in jax.tree.leaves(cache.content()))


@every_row
@pytest.mark.parametrize("name", ["int8", "int4", "fp8", "bf16", "hadamard+int4"])
def test_no_split_of_a_text_changes_an_answer(row: Row, streams: set[str], name: str) -> None:
    """Prefill, pieces and single tokens read the same coded entries, also in a ring and with left padding.

    In float64: in fp32 XLA may round x W by another bit for another shape, and a code on the edge of its cell with it.
    """
    with jax.enable_x64(True):
        mixer, dtype = row.mixer(), jnp.float64
        extend = jax.jit(mixer.extend)
        x, positions = inputs(26)
        whole, full = extend(x, positions, mixer.init_cache(2, 26, dtype, mixer.plan(name)))
        cache, start, outputs = mixer.init_cache(2, 26, dtype, mixer.plan(name)), 0, []
        for size in [11, 11, 1, 1, 1, 1]:
            y, cache = extend(x[:, start : start + size], positions[:, start : start + size], cache)
            outputs.append(y)
            start += size
        close(jnp.concatenate(outputs, axis=1), whole, EXACT, unit=True)
        for a, b in zip(jax.tree.leaves(cache), jax.tree.leaves(full), strict=True):
            np.testing.assert_array_equal(a, b)
        padded = jnp.pad(x, ((0, 0), (4, 0), (0, 0)), constant_values=7.0)
        where = jnp.pad(positions, ((0, 0), (4, 0)), constant_values=-1)
        y, _ = extend(padded, where, mixer.init_cache(2, 30, dtype, mixer.plan(name)))
        close(y[:, 4:], whole, EXACT, unit=True)


@every_row
def test_finer_codecs_are_closer(row: Row, streams: set[str]) -> None:
    mixer = row.mixer()
    x, positions = inputs(40)
    exact = mixer(x)

    def error(name: str) -> float:
        y, _ = jax.jit(mixer.extend)(x, positions, mixer.init_cache(2, 40, jnp.float32, mixer.plan(name)))
        return float(jnp.linalg.norm(y - exact) / jnp.linalg.norm(exact))

    errors = [error(name) for name in ("none", "int8", "int4", "int2")]
    close(errors[0], 0.0, 1e-5)
    assert errors == sorted(errors) and errors[1] < 2e-2


def test_streams_are_chosen_by_name() -> None:
    mixer = Row("mla", {"kv_lora_rank": 20, "qk_rope_head_dim": 4}).mixer()
    cache = mixer.init_cache(1, 8, jnp.float32, mixer.plan("c_kv=int4:20"))
    assert isinstance(cache["entries"].streams.c_kv, Coded) and cache["entries"].streams.k_rope.dtype == jnp.float32
    assert content_bytes(cache) == 8 * (20 // 2 + 4 + 4 * 4)
    layout = mixer.codecs("latent_fp8")
    assert layout["k_rope"] == codec("bf16") and layout["c_kv"] == codec("latent_fp8")


def test_flashmla_at_deepseek_v2s_shape_is_656_bytes() -> None:
    row = Row("mla", {"kv_lora_rank": 512, "qk_rope_head_dim": 64})
    mixer = row.mixer()
    assert content_bytes(mixer.init_cache(1, 3, jnp.bfloat16, mixer.plan("latent_fp8"))) == 3 * 656


# ---------------------------------------------------------------------------------------------------- the command, refusals


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("int5", "'int5' is not known; did you mean 'int"),
        ("hadamrd+int4", "'hadamrd' is not known; did you mean 'hadamard'?"),
        ("int4:x", "'int4:x': 'x' is no number of channels"),
        ("int4:0", "'int4:0': '0' is no number of channels"),
        ("int8:4", "'int8:4': int8 has no groups; write NAME or, for fp8, latent_fp8, int4, int2, NAME:CHANNELS"),
        ("key=int4,valeu=int8", "'valeu=int8': no stream 'valeu' in this cache; did you mean 'value'?"),
        ("key=int4,int8", "'int8': no stream 'int8' in this cache"),
        ("key=int4,key=int8", "'key=int4,key=int8': key is given twice; leave one of them out"),
        ("key=int4, value=none, key=int4", "key is given twice"),
        ("int4:²", "'int4:²': '²' is no number of channels"),
        ("int4:99999999999", "'99999999999' is no number of channels"),
    ],
)
def test_bad_specifications_are_refused_with_one_line(spec: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        codecs(spec, ["key", "value"])
    assert words in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).startswith("config.eval.cache.codec: ")


def test_a_stream_that_is_named_twice_is_refused_before_there_is_a_model() -> None:
    with pytest.raises(UserError, match="'c_kv=int4,c_kv=int8': c_kv is given twice"):
        check("c_kv=int4,c_kv=int8")
    check("c_kv=int4,k_rope=int8")


def test_a_trained_model_under_a_codec(trained: Any) -> None:
    config, workdir = trained("mla/2", model={"num_layers": 2})
    plain = evaluate(workdir, config)
    assert "loss_full_cache" not in plain
    coded = dataclasses.replace(config, eval=dataclasses.replace(config.eval, cache=configs.EvalCacheConfig(codec="int4:4")))
    configs.validate(coded)
    row = evaluate(workdir, coded)
    close(row["loss_full_cache"], plain["loss"], 1e-6)
    assert row["loss"] == row["loss_cached"] != row["loss_full_cache"]
    close(row["loss"], plain["loss"], 0.05)
    # c_kv of 8 channels and k_rope of 4, a group of 4 each: 4 bits a channel, 4 bytes a group; one of two layers stores.
    assert row["cache"]["bytes_per_token"] == row["cache"]["bytes_per_token_formula"] == (4 + 2 * 4) + (2 + 4)
    assert plain["cache"]["bytes_per_token"] == 12 * 4
    assert row["cache"]["read_bytes_per_step"]["1024"] == 2 * 1024 * row["cache"]["bytes_per_token"]
    (named,) = workdir.glob("eval-cache.codec=int4_4-*.json")
    assert json.loads(named.read_text())["loss"] == row["loss"]
    assert json.loads((workdir / "eval.json").read_text())["loss"] == plain["loss"]


def test_a_state_is_coded_by_name_alone(trained: Any) -> None:
    config, workdir = trained("linear")
    config.eval.cache.codec = "int8"
    with pytest.raises(UserError, match="keeps a state and no entries of tokens; name it, state=int8, or set it to none"):
        evaluate(workdir, config)
    config.eval.cache.codec = "state=int8"
    row = evaluate(workdir, config)
    assert row["loss"] == row["loss_cached"] != row["loss_full_cache"]
    # 2 heads of 8 key channels, a vector of 8 value channels and the normaliser each: 9 codes and a scale of 16 bits.
    assert row["cache"]["constant_bytes"] == row["cache"]["bytes_at"]["8192"] == 2 * 8 * (9 + 2)
    assert row["cache"]["dtype"] == "float16+int8" and row["cache"]["bytes_per_token"] == 0
