"""Hybrids of constant states and caches: what they hold, by the papers' formulas, and MLA without rotation."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import EXACT, close
from matrix import D_MODEL, INDEX, LATENT, V4, Row

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


@pytest.mark.usefixtures("float64")
def test_a_layer_reads_what_another_one_compressed() -> None:
    """It makes queries and index queries alone, and decoding gives what the parallel form does."""
    row = Row("compressed_sparse", V4 | INDEX | {"stride": 3, "top_k": 4})
    owner = row.mixer()
    reader = row.of[1](row.config(), row.around(remembers=False), rngs=nnx.Rngs(1))
    assert not hasattr(reader, "compressor") and not hasattr(reader, "kv") and not hasattr(reader, "index_compressor")
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 17, D_MODEL)))
    graph, state = nnx.split((owner, reader))

    @jax.jit
    def read(state: Any, x: Any, where: Any = None, cache: Any = None) -> Any:
        owner, reader = nnx.merge(graph, state)
        memory, cache = owner.remember(x, where, cache)
        return reader.read(x, where, memory), cache

    whole, cache, pieces = read(state, x)[0], owner.init_cache(2, 17, jnp.float64), []
    for start, stop in ((0, 8), (8, 9), (9, 17)):
        where = jnp.broadcast_to(jnp.arange(start, stop, dtype=jnp.int32), (2, stop - start))
        y, cache = read(state, x[:, start:stop], where, cache)
        pieces.append(y)
    close(jnp.concatenate(pieces, axis=1), whole, EXACT, unit=True)


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
