"""The chunked recurrence against the sequential one: over thousands of tokens, at every extreme, with gradients."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import EXACT, close

from mla.ops.recurrence import linear_recurrence

LENGTH, HEADS, KEYS, VALUES = 4096, 2, 8, 6
PER_HEAD, PER_CHANNEL = 1, KEYS
# name -> log-decays, and strengths of the delta rule (None: without it)
DECAYS = {
    "none": lambda draw, shape: np.zeros(shape),
    "near 1": lambda draw, shape: np.full(shape, -1e-6),
    "learned": lambda draw, shape: -np.logaddexp(draw.normal(size=shape) - 2, 0),
    "fast": lambda draw, shape: np.full(shape, -200.0),
    "mixed": lambda draw, shape: np.where(draw.random(shape) < 0.05, -200.0, np.where(draw.random(shape) < 0.5, 0.0, -1e-3)),
}
STRENGTHS = {
    "kept": lambda draw, shape: np.zeros(shape),
    "replaced": lambda draw, shape: np.ones(shape),
    "decided": lambda draw, shape: 1 / (1 + np.exp(-draw.normal(size=shape))),
}


def sequential(q: Any, k: Any, v: Any, state: Any, g: Any, e: Any) -> tuple[np.ndarray, np.ndarray]:
    """S_t = (I - k e^T) Diag(exp g) S + k v^T and o = S^T q in float64 numpy, a token at a time."""
    outputs = np.zeros(v.shape)
    state = np.array(state)
    for t in range(q.shape[1]):
        state = state * np.exp(g[:, t])[..., None]
        v_t = v[:, t] - np.einsum("bhk,bhkv->bhv", e[:, t], state)
        state = state + k[:, t, :, :, None] * v_t[:, :, None]
        outputs[:, t] = np.einsum("bhk,bhkv->bhv", q[:, t], state)
    return outputs, state


def case(decay: str, channels: int, strength: str, length: int) -> list[np.ndarray]:
    """Arguments of `sequential` in fp32 numbers: unit queries and keys, a state that is not 0."""
    draw = np.random.default_rng(0)
    shape = (1, length, HEADS)
    q, k = (u / np.linalg.norm(u, axis=-1, keepdims=True) for u in draw.normal(size=(2, *shape, KEYS)))
    g = DECAYS[decay](draw, (*shape, channels))
    beta = STRENGTHS[strength](draw, (*shape, 1))
    v = draw.normal(size=(*shape, VALUES)) * (1 if strength == "kept" else beta)
    state = draw.normal(size=(1, HEADS, KEYS, VALUES))
    return [a.astype(np.float32).astype(np.float64) for a in (q, k, v, state, g, beta * k)]


@functools.cache
def compiled(chunk: int, dtype: Any) -> Any:
    return jax.jit(lambda q, k, v, s, g, e: linear_recurrence(q, k, v, s, g, e, chunk=chunk, backend="scan"))


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("channels", [PER_HEAD, PER_CHANNEL])
@pytest.mark.parametrize("decay", DECAYS)
def test_chunks_are_the_recurrence_over_thousands_of_tokens(decay: str, channels: int, strength: str) -> None:
    """fp32 within 1e-5 of unit rms of float64, at a length that no chunk divides; what does not decay is a long sum."""
    given = case(decay, channels, strength, LENGTH - 13)
    outputs, state = sequential(*given)
    found = compiled(64, jnp.float32)(*(jnp.asarray(a, jnp.float32) for a in given))
    for name, one, other in zip(("outputs", "state"), found, (outputs, state), strict=True):
        close(one, other, 1e-5, name, unit=True)


@functools.cache
def gradients(backend: str) -> Any:
    """Of a weighted sum of outputs and the last state, with respect to all six arguments."""

    def weighed(given: list[jax.Array]) -> jax.Array:
        q, k, v, s, g, e = given
        outputs, state = linear_recurrence(q, k, v, s, g, e, chunk=32, backend=backend)
        return jnp.sum(outputs * jnp.cos(jnp.arange(outputs.size, dtype=v.dtype)).reshape(outputs.shape)) + jnp.sum(state**2)

    return jax.jit(jax.grad(weighed))


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("channels", [PER_HEAD, PER_CHANNEL])
@pytest.mark.parametrize("decay", DECAYS)
def test_gradients_are_those_of_the_recurrence(decay: str, channels: int, strength: str) -> None:
    """In float64 to the last digits, and finite in fp32."""
    given = case(decay, channels, strength, 75)
    with jax.enable_x64(True):
        one, other = (gradients(backend)([jnp.asarray(a) for a in given]) for backend in ("scan", "step"))
        for name, a, b in zip(("q", "k", "v", "state", "decay", "erase"), one, other, strict=True):
            close(a, b, EXACT * max(1.0, float(jnp.max(jnp.abs(b)))), name)
    for a in gradients("scan")([jnp.asarray(a, jnp.float32) for a in given]):
        assert np.isfinite(a).all()


@pytest.mark.usefixtures("float64")
def test_a_decay_of_minus_infinity_starts_anew() -> None:
    """What was before the token leaves no trace, in values and in gradients."""
    q, k, v, state, g, e = (jnp.asarray(a) for a in case("learned", PER_CHANNEL, "decided", 40))
    run = jax.jit(functools.partial(linear_recurrence, chunk=16))
    outputs, last = run(q, k, v, state, g.at[:, 20].set(-jnp.inf), e)
    empty = [jnp.zeros_like(a[:, :20]) for a in (q, k, v, g, e)]
    q_, k_, v_, g_, e_ = (jnp.concatenate([a, b[:, 20:]], axis=1) for a, b in zip(empty, (q, k, v, g, e), strict=True))
    later, end = run(q_, k_, v_, jnp.zeros_like(state), g_, e_)
    close(outputs[:, 20:], later[:, 20:], EXACT, unit=True)
    close(last, end, EXACT, unit=True)
    slope = jax.jit(jax.grad(lambda v, g: jnp.sum(run(q, k, v, state, g, e)[0][:, 20:] ** 2), argnums=(0, 1)))
    of_values, of_decays = slope(v, g.at[:, 20].set(-jnp.inf))
    assert not of_values[:, :20].any() and of_values[:, 20:].any() and np.isfinite(of_decays).all()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("channels", [PER_HEAD, PER_CHANNEL])
def test_a_text_in_pieces_with_padding_around_is_the_text(channels: int) -> None:
    """From any state, whatever queries stand where no token is, in chunks that are no power of two."""
    q, k, v, state, g, e = (jnp.asarray(a) for a in case("learned", channels, "decided", 50))
    run = jax.jit(functools.partial(linear_recurrence, chunk=12))
    outputs, last = run(q, k, v, state, g, e)
    pieces = []
    for start, stop in ((0, 23), (23, 24), (24, 50)):
        ahead = (50 - stop + start) // 2
        pad = ((0, 0), (ahead, 50 - ahead - stop + start), (0, 0), (0, 0))
        k_, v_, g_, e_ = (jnp.pad(a[:, start:stop], pad) for a in (k, v, g, e))
        y, state = run(jnp.pad(q[:, start:stop], pad, constant_values=3.0), k_, v_, state, g_, e_)
        pieces.append(y[:, ahead : ahead + stop - start])
    close(jnp.concatenate(pieces, axis=1), outputs, EXACT, unit=True)
    close(state, last, EXACT, unit=True)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("backend", ["scan", "step"])
@pytest.mark.parametrize("channels", [0, PER_HEAD, PER_CHANNEL])
def test_keys_may_serve_several_heads_side_by_side(channels: int, backend: str) -> None:
    draw = np.random.default_rng(1)
    q, k = (jnp.asarray(draw.normal(size=(2, 20, 2, KEYS))) for _ in range(2))
    v, e = jnp.asarray(draw.normal(size=(2, 20, 6, VALUES))), 0.1 * jnp.asarray(draw.normal(size=(2, 20, 6, KEYS)))
    g = -jnp.asarray(draw.random((2, 20, 6, channels))) if channels else None
    state = jnp.zeros((2, 6, KEYS, VALUES))
    run = jax.jit(lambda q, k: linear_recurrence(q, k, v, state, g, e, backend=backend, chunk=8))
    for one, other in zip(run(q, k), run(*(jnp.repeat(a, 3, axis=2) for a in (q, k))), strict=True):
        close(one, other, EXACT, unit=True)
