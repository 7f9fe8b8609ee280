"""Hybrids of constant states and caches: what they hold, by the papers' formulas, and MLA without rotation."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import EXACT, close
from matrix import D_MODEL, LATENT, Row

from mla import config as configs
from mla import model as models
from mla.commands import load_config
from mla.errors import UserError
from mla.evaluation import cache_bytes
from mla.model import parameters, with_parameters

FILE = "configs/hybrids.py"
NAMES = ("kimi_linear", "kimi_k3", "qwen3_next", "minimax_01")


def held(name: str, length: int, dtype: str = "bfloat16") -> int:
    """Bytes of one sequence, of abstract caches."""
    config = load_config(f"{FILE}:{name}")
    config.model.dtype = dtype
    configs.validate(config)
    return cache_bytes.abstract_bytes_at(cache_bytes.abstract_model(config, 257), length)


@pytest.mark.parametrize("size", ["", "+small"])
@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_an_affine_function_of_the_length(name: str, size: str) -> None:
    """States and tails of three layers in four (seven in eight), fp32 and bf16; caches of the others."""
    small = bool(size)
    layers, heads = (12, 6) if small else (4, 4)
    full, width = layers // 4, 128 if small else 32
    if name.startswith("kimi"):  # bytes_at(T) = b [L_full (d_c + d_r) T] + 4 L_kda H d_h^2 + b L_kda 9 H d_h
        token, state, channels = (288 if small else 80), heads * width**2, 9 * heads * width
    elif name == "qwen3_next":
        keys = 96 if small else 24
        token, state, channels = 2 * (4 * 64 if small else 2 * 32), heads * keys * 2 * keys, 3 * 3 * heads * keys
    else:
        layers, heads, width = (16, 12, 64) if small else (4, 4, 32)
        full = layers // 8 if small else 1
        token, state, channels = 2 * (4 * 64 if small else 2 * 32), heads * width**2, 0
    for length in (1, 1000):
        recurrent = layers - full
        assert held(name + size, length) == 2 * full * token * length + recurrent * (4 * state + 2 * channels), length


@pytest.mark.parametrize("size", ["", "+small"])
def test_bytes_of_the_layers_of_v4(size: str) -> None:
    """Windows in all layers; in every second one after the first two entries of 4 tokens with index keys, or of 16."""
    layers, width, index = (12, 128, 32) if size else (4, 32, 16)
    pairs = (layers - 2) // 2
    for length in (1, 1000):
        vectors = layers * min(length, 64) + pairs * (length // 4 + length // 16)
        pools = pairs * 4 * (6 * (width + index) + 3 * width)
        assert held(f"deepseek_v4{size}", length) == 2 * (width * vectors + pairs * index * (length // 4)) + pools


@pytest.mark.parametrize("size", ["", "+small"])
def test_bytes_of_perceiver_ar(size: str) -> None:
    """2 d T once and 2 d min(T, M) in each of the other layers, M latents."""
    layers, width, latents = (12, 768, 256) if size else (4, 128, 64)
    for length in (1, latents - 1, latents, latents + 1, 1000):
        elements = 2 * width * (length + (layers - 1) * min(length, latents))
        assert held(f"perceiver_ar{size}", length) == 2 * elements


@pytest.mark.usefixtures("float64")
def test_perceiver_ar_is_that_of_the_last_positions() -> None:
    """The last M positions read the whole text once and then one another, by the model's own blocks. As many latents as
    tokens are an ordinary Transformer."""
    config: Any = load_config(f"{FILE}:perceiver_ar")
    config.model.dtype, latents, length = "float64", 8, 24
    config.model.d_model, config.model.num_layers, config.model.pattern = 32, 3, ("mha", "chunked", "chunked")
    config.model.mechanism["chunked"].chunk = latents
    model = models.create(config, 50)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 50, (2, length)), jnp.int32)
    first, *others = model.blocks
    read = first(model.embed(tokens), None)
    for stop in (latents, 2 * latents, length):  # the text as it is after each block
        z = read[:, stop - latents : stop]
        for block in others:
            z = block(z, None)  # a text of its own: M tokens, positions counted from its start
        close(model.hidden(tokens)[:, stop - latents : stop], model.final_norm(z), EXACT, unit=True)
    config.model.mechanism["chunked"].chunk = length
    whole = models.create(config, 50)
    config.model.pattern, config.model.mechanism = ("mha",), {"mha": config.model.mechanism["mha"]}
    plain = with_parameters(nnx.graphdef(models.create(config, 50)), parameters(whole))
    close(whole.hidden(tokens), plain.hidden(tokens), EXACT, unit=True)


def perceiver_ar(weights: Any, tokens: np.ndarray, heads: int, eps: float) -> np.ndarray:
    """Perceiver AR in numpy for one text: outputs [M, D] of its last M positions.

    Latents are made of the last M tokens, look at the whole text once and then at one another, by layers of pre-norm
    attention and squared ReLUs. A quarter of a head's channels is rotated by the position: in the text, then among latents.
    """
    width = weights["embedding"].shape[1] // heads
    turned = width // 4

    def norm(x: np.ndarray, gains: Any) -> np.ndarray:
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * gains["scale"] + gains["bias"]

    def rotated(x: np.ndarray, at: np.ndarray) -> np.ndarray:
        pairs = turned // 2
        angles = at[:, None, None] * 1e4 ** (-np.arange(pairs) / pairs)
        first, second, rest = x[..., :pairs], x[..., pairs:turned], x[..., turned:]
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)

    def attention(w: Any, asking: np.ndarray, asked: np.ndarray) -> np.ndarray:
        """The last positions of `asked`, as many as `asking`, look at all that stand before them and at themselves."""
        places = np.arange(len(asked))
        own = places[-len(asking) :]
        q = rotated((asking @ w["query"]["kernel"]).reshape(len(asking), heads, width), own)
        k = rotated((asked @ w["key"]["kernel"]).reshape(len(asked), heads, width), places)
        v = (asked @ w["value"]["kernel"]).reshape(len(asked), heads, width)
        logits = np.einsum("mhd,thd->hmt", q, k) / width**0.5
        shares = np.exp(np.where(places[None] <= own[:, None], logits, -np.inf))
        shares /= shares.sum(-1, keepdims=True)
        return np.einsum("hmt,thd->mhd", shares, v).reshape(len(asking), -1) @ w["out"]["kernel"]

    layers = [weights["blocks"][str(i)] for i in range(len(weights["blocks"]))]
    z = text = weights["embedding"][tokens]
    for number, w in enumerate(layers):
        if number == 0:
            z = text[-LATENTS:] + attention(w["mixer"], norm(text[-LATENTS:], w["mixer_norm"]), norm(text, w["mixer_norm"]))
        else:
            z = z + attention(w["mixer"], norm(z, w["mixer_norm"]), norm(z, w["mixer_norm"]))
        inner = np.maximum(norm(z, w["mlp_norm"]) @ w["mlp"]["up"]["kernel"], 0) ** 2
        z = z + inner @ w["mlp"]["down"]["kernel"]
    return norm(z, weights["final_norm"])


LATENTS = 8


@pytest.mark.usefixtures("float64")
def test_perceiver_ar_is_that_of_the_paper() -> None:
    """In numpy, a text that ends where a block does; other gains and biases of norms than 1 and 0."""
    config: Any = load_config(f"{FILE}:perceiver_ar")
    config.model.dtype, draw = "float64", np.random.default_rng(0)
    config.model.d_model, config.model.num_layers, config.model.pattern = 32, 3, ("mha", "chunked", "chunked")
    config.model.mechanism["chunked"].chunk = LATENTS
    model, tokens = models.create(config, 50), draw.integers(0, 50, 3 * LATENTS)
    loud = jax.tree.map(lambda w: jnp.asarray(w + draw.normal(size=w.shape) * 0.3), parameters(model))
    ours = with_parameters(nnx.graphdef(model), loud).hidden(jnp.asarray(tokens, jnp.int32)[None])[0, -LATENTS:]
    exact = jax.tree.map(lambda w: np.asarray(w, np.float64), loud)
    close(ours, perceiver_ar(exact, tokens, config.model.num_heads, config.model.norm_eps), EXACT, unit=True)


def test_an_unknown_variant_is_one_line() -> None:
    with pytest.raises(UserError, match=r"no variant 'kimi_liner': did you mean 'kimi_linear'\?"):
        load_config(f"{FILE}:kimi_liner")


@pytest.mark.usefixtures("float64")
def test_unrotated_keys_are_those_of_position_zero() -> None:
    """Without rotation every token stands where the rotation is 0; channels, scale and bytes stay."""
    plain, turned = (Row("mla", LATENT | {"rope": rope}).mixer() for rope in (False, True))
    x: Any = jax.random.normal(jax.random.key(1), (2, 5, D_MODEL))
    nowhere = jnp.zeros((2, 5), jnp.int32)
    for one, other in zip(plain.entries(x, nowhere + 7), turned.entries(x, nowhere), strict=True):
        close(one, other, EXACT)
    assert np.abs(np.asarray(turned.entries(x, nowhere + 7).k_rope - plain.entries(x, nowhere).k_rope)).max() > 1e-2
    assert plain.streams() == turned.streams() and plain.scale == turned.scale
