"""Temporal latents beside their sequential rule in numpy, and what the cache of chunks holds."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import EXACT, close
from matrix import D_MODEL, HEADS, LATENT, Row

from mla.cache.meter import content_bytes
from mla.errors import UserError

B, T = 2, 13


def text(length: int = T, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(B, length, D_MODEL)))


def positions(start: int, stop: int) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(start, stop, dtype=jnp.int32), (B, stop - start))


def turned(x: np.ndarray, position: int) -> np.ndarray:
    """x [..., P] rotated in pairs (2k, 2k + 1)."""
    angle = position * 1e4 ** (-np.arange(0, x.shape[-1], 2) / x.shape[-1])
    even, odd, out = x[..., ::2], x[..., 1::2], np.empty_like(x)
    out[..., ::2], out[..., 1::2] = even * np.cos(angle) - odd * np.sin(angle), even * np.sin(angle) + odd * np.cos(angle)
    return out


def sequential(mixer: Any, x: np.ndarray, stride: int) -> np.ndarray:
    """Outputs [T, D] of one text, token by token over a list of chunks: append, or add and overwrite the rotated key."""

    def w(linear: Any) -> np.ndarray:
        return np.asarray(linear.kernel[...], np.float64)

    def b(linear: Any) -> np.ndarray:
        return np.asarray(linear.bias[...], np.float64)

    rank, rope, nope = mixer.rank, mixer.rope_dim, mixer.nope_dim
    up_key, up_value = (w(up).reshape(rank, HEADS, -1) for up in (mixer.key_up, mixer.value_up))
    latents: list[np.ndarray] = []
    keys: list[np.ndarray] = []
    outputs = []
    for t, token in enumerate(x):
        c, key = np.split(token @ w(mixer.kv_down), [rank])
        c = (c - c.mean()) / np.sqrt(c.var() + mixer.around.norm_eps)
        c = c * np.asarray(mixer.kv_norm.scale[...]) + np.asarray(mixer.kv_norm.bias[...])
        angles = (t // stride) * 1e4 ** (-(np.arange(rank) // 2 * 2) / rank)
        place = np.where(np.arange(rank) % 2 == 0, np.sin(angles), np.cos(angles))
        logit = (place @ w(mixer.gate_place) + b(mixer.gate_place)) @ (c @ w(mixer.gate_latent) + b(mixer.gate_latent))
        part, key = c / (1 + np.exp(-logit)), turned(key, t)
        if t % stride == 0:
            latents.append(part)
            keys.append(key)
        else:
            latents[-1], keys[-1] = latents[-1] + part, key
        query = (token @ w(mixer.query)).reshape(HEADS, nope + rope)
        held, rotated = np.stack(latents), np.stack(keys)
        logits = np.einsum("hn,cr,rhn->hc", query[:, :nope], held, up_key) + turned(query[:, nope:], t) @ rotated.T
        weights = np.exp(logits / np.sqrt(nope + rope))
        weights /= weights.sum(axis=-1, keepdims=True)
        outputs.append(np.einsum("hc,cr,rhv->hv", weights, held, up_value).reshape(-1) @ w(mixer.out))
    return np.stack(outputs)


@pytest.mark.parametrize("stride", [1, 3, 50])
def test_the_parallel_form_is_the_sequential_rule(stride: int, float64: Any) -> None:
    """A stride beyond the text leaves one entry. What comes after a token changes nothing at all in its row."""
    mixer: Any = Row("temporal_latent", LATENT | {"stride": stride}).mixer()
    x, run = text(), jax.jit(mixer.__call__)
    y = run(x)
    close(y, np.stack([sequential(mixer, np.asarray(row), stride) for row in x]), EXACT, unit=True)
    for known in (4, 5, 6):
        np.testing.assert_array_equal(run(x.at[:, known:].set(9.0))[:, :known], y[:, :known])


def test_with_a_stride_of_one_it_is_mla_over_gated_latents(float64: Any) -> None:
    mixer: Any = Row("temporal_latent", LATENT | {"stride": 1}).mixer()
    plain: Any = Row("mla", LATENT).mixer(seed=1)
    for name in ("query", "key_up", "value_up", "out"):
        setattr(plain, name, getattr(mixer, name))
    x = text()
    latents = mixer.entries(x, positions(0, T))
    memory, _ = mixer.remember(x)
    gate = memory.entries.c_kv / latents.c_kv
    close(gate, np.broadcast_to(gate.mean(axis=-1, keepdims=True), gate.shape), EXACT, "one gate a token")
    assert gate.min() > 0 and gate.max() < 1
    np.testing.assert_array_equal(memory.entries.k_rope, latents.k_rope)
    close(plain.read(x, None, memory), mixer(x), EXACT, unit=True)
    assert mixer.evictable, "an entry for every token, like any other"


def test_the_cache_holds_an_entry_for_each_chunk_begun() -> None:
    """Room for T tokens is ceil(T / s) entries at every T; the newest stands at the newest token, at every phase."""
    row = Row("temporal_latent", LATENT | {"stride": 4})
    mixer, (term,) = row.mixer(), row.config().cache_formula(row.around())
    for length in range(1, 10):
        cache = jax.eval_shape(lambda length=length: mixer.init_cache(B, length, jnp.float32))
        assert content_bytes(cache) == B * term.bytes_at(length, 4) == B * -(-length // 4) * 24 * 4
    assert term.growth(4) == 24
    extend, cache, x = jax.jit(mixer.extend), mixer.init_cache(B, 9, jnp.float32), text(9)
    for t in range(9):
        _, cache = extend(x[:, t : t + 1], positions(t, t + 1), cache)
        stands = [min(4 * j + 3, t) if 4 * j <= t else -1 for j in range(3)]
        np.testing.assert_array_equal(cache["entries"].slots.positions, [stands] * B)


def test_codes_do_not_depend_on_pieces(float64: Any) -> None:
    """A chunk is coded anew with every token, and the next one is added to what that left."""
    codec, mixer = "int8", Row("temporal_latent", LATENT | {"stride": 3}).mixer()
    x, extend = text(), jax.jit(mixer.extend)
    whole, full = extend(x, positions(0, T), mixer.init_cache(B, T, jnp.float64, mixer.plan(codec)))
    cache, outputs, start = mixer.init_cache(B, T, jnp.float64, mixer.plan(codec)), [], 0
    for size in (4, 4, 1, 1, 1, 1, 1):
        y, cache = extend(x[:, start : start + size], positions(start, start + size), cache)
        outputs.append(y)
        start += size
    close(jnp.concatenate(outputs, axis=1), whole, EXACT, unit=True)
    for a, b in zip(jax.tree.leaves(cache), jax.tree.leaves(full), strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.max(np.abs(whole - mixer(x))) > 1e-4, "nothing was coded"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stride": 0}, "mechanism.stride: 0 is not a positive number of tokens"),
        ({"gate_dim": -1}, "mechanism.gate_dim: -1 is below 0, which means kv_lora_rank / 4"),
        ({"window": 8}, "mechanism.window: summed entries do not leave token by token; set it to 0"),
    ],
)
def test_refused_settings(settings: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Row("temporal_latent", LATENT | settings).mixer()


def test_codecs_that_code_later_are_refused() -> None:
    with pytest.raises(UserError, match="a layer pools tokens already: entries are gone before they are coded"):
        Row("temporal_latent", LATENT).mixer().codecs("kivi2")
