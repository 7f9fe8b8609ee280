"""Compressive attention beside its algorithm in numpy, who learns from which loss, and when the cache compresses."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import EXACT, close
from matrix import D_MODEL, HEADS, Row

from mla.attention.contract import Step
from mla.cache.meter import content_bytes
from mla.errors import UserError
from mla.model import parameters

B, T, WIDTH = 2, 31, D_MODEL // HEADS
SIZES = {"segment": 6, "memory": 8, "compressed_memory": 3, "rate": 2}
STEP = Step(jnp.asarray(0.5), jnp.asarray(0.4), jax.random.key(0))


def text(seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(B, T, D_MODEL)))


def positions(start: int, stop: int) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(start, stop, dtype=jnp.int32), (B, stop - start))


def kernels(mixer: Any) -> list[np.ndarray]:
    return [np.asarray(getattr(mixer, name).kernel[...], np.float64) for name in ("query", "key", "value", "out")]


def turned(x: np.ndarray, at: Any) -> np.ndarray:
    """x [n, H, d] rotated as halves to positions [n]."""
    half = WIDTH // 2
    angle = np.asarray(at)[:, None, None] * 1e4 ** (-np.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    return np.concatenate(
        [first * np.cos(angle) - second * np.sin(angle), first * np.sin(angle) + second * np.cos(angle)], -1
    )


def heads_of(mixer: Any, queries: np.ndarray, at: Any, hidden: np.ndarray, stands: Any) -> np.ndarray:
    """Attention of tokens [n, D] to hidden states [m, D] without a mask: head outputs [n, H d]."""
    w_q, w_k, w_v, _ = kernels(mixer)
    q, k, v = (a.reshape(-1, HEADS, WIDTH) for a in (queries @ w_q, hidden @ w_k, hidden @ w_v))
    weights = np.exp(np.einsum("nhd,mhd->hnm", turned(q, at), turned(k, stands)) / np.sqrt(WIDTH))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("hnm,mhd->nhd", weights, v).reshape(len(queries), -1)


def compressed(mixer: Any, tokens: np.ndarray) -> np.ndarray:
    kernel, bias = (np.asarray(a[...], np.float64) for a in (mixer.compression.kernel, mixer.compression.bias))
    return tokens.reshape(-1, kernel.shape[0]) @ kernel + bias


def algorithm(mixer: Any, x: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """Algorithms 1 and 2 on one text [T, D], memories as lists of (position, hidden): outputs, and each segment's loss."""
    n, n_m, n_cm, rate = SIZES.values()
    memory: list[tuple[int, np.ndarray]] = []
    older: list[tuple[int, np.ndarray]] = []
    outputs, losses = [], []
    for start in range(0, T, n):
        segment = list(enumerate(x))[start : start + n]
        for t, token in segment:
            seen = older + memory + segment[: t - start + 1]
            stands, hidden = [p for p, _ in seen], np.stack([h for _, h in seen])
            outputs.append((heads_of(mixer, token[None], [t], hidden, stands) @ kernels(mixer)[3])[0])
        if len(segment) < n:
            break
        memory += segment
        leaving, memory = memory[: max(0, len(memory) - n_m)], memory[max(0, len(memory) - n_m) :]
        if leaving:
            old = np.stack([h for _, h in leaving])
            new = compressed(mixer, old)
            older = [*older, *zip([p for p, _ in leaving[::rate]], new, strict=True)][-n_cm:]
            zeros, h = np.zeros(n), np.stack([h for _, h in segment])
            both = [heads_of(mixer, h, zeros, a, np.zeros(len(a))) for a in (old, new)]
            losses.append(float(np.sqrt(np.mean((both[0] - both[1]) ** 2))))
    return np.stack(outputs), losses


def test_outputs_and_losses_are_those_of_the_algorithm(float64: Any) -> None:
    """The memory is no multiple of the segment: at first fewer tokens leave it than a segment has."""
    mixer: Any = Row("compressive", SIZES).mixer()
    x = text()
    outputs, losses = zip(*(algorithm(mixer, np.asarray(row)) for row in x), strict=True)
    plain, trained = jax.jit(lambda x: (mixer(x), mixer.forward(x, step=STEP)))(x)
    close(plain, np.stack(outputs), EXACT, unit=True)
    close(trained.y, np.stack(outputs), EXACT, unit=True)
    close(trained.losses["compression"], np.asarray(losses), EXACT, unit=True)
    assert trained.losses["compression"].shape == (B, 4) and float(jnp.min(trained.losses["compression"])) > 1e-2
    short = jax.eval_shape(lambda x: mixer.forward(x, step=STEP), x[:, :8])
    assert not short.losses and not short.metrics, "nothing leaves the memory of a short text"


def test_uncompressed_it_is_the_memory_of_transformer_xl(float64: Any) -> None:
    """A rate of 1 and f_c the identity: each segment sees n_m + n_cm tokens before it. Nothing is lost, and f_c learns
    nothing: a loss of 0, with a finite gradient."""
    mixer: Any = Row("compressive", SIZES | {"rate": 1, "compressed_memory": 5}).mixer()
    mixer.compression.kernel[...], mixer.compression.bias[...] = jnp.eye(D_MODEL), jnp.zeros(D_MODEL)
    x, (*_, w_o) = text(), kernels(mixer)
    expected = np.zeros((B, T, D_MODEL))
    for row, tokens in enumerate(np.asarray(x)):
        for t in range(T):
            first = max(0, t // 6 * 6 - 8 - 5)
            seen = tokens[first : t + 1]
            expected[row, t] = (heads_of(mixer, tokens[t : t + 1], [t], seen, np.arange(first, t + 1)) @ w_o)[0]
    close(jax.jit(mixer.__call__)(x), expected, EXACT, unit=True)
    graph, state = nnx.split(mixer)

    @jax.jit
    @jax.value_and_grad
    def learned(state: Any) -> Any:
        return nnx.merge(graph, state).forward(x, step=STEP).losses["compression"].sum()

    loss, gradient = learned(state)
    assert float(loss) < 1e-100 and all(not a.any() for a in jax.tree.leaves(gradient))


def test_each_loss_teaches_what_it_should() -> None:
    """f_c learns from its own loss, which is exactly flat in all else, and nothing else does; memories carry no gradient."""
    mixer: Any = Row("compressive", SIZES).mixer()
    graph, state, x = nnx.graphdef(mixer), parameters(mixer), jnp.asarray(text(), jnp.float32)

    @jax.jit
    def gradients(state: Any, x: Any) -> Any:
        def own(state: Any, x: Any) -> Any:
            return nnx.merge(graph, state).forward(x, step=STEP).losses["compression"].sum()

        def last_segment(state: Any, x: Any) -> Any:
            return jnp.sum(nnx.merge(graph, state).forward(x, step=STEP).y[:, 24:30] ** 2)

        return [jax.grad(function, argnums=(0, 1))(state, x) for function in (own, last_segment)]

    own, language = gradients(state, x)
    for (learned, to_x), only in ((own, True), (language, False)):
        for path, a in jax.tree_util.tree_leaves_with_path(learned):
            learns = ("compression" in jax.tree_util.keystr(path)) == only
            assert bool(np.asarray(a).any()) == learns, jax.tree_util.keystr(path)
        touched = np.asarray(to_x).any(axis=(0, 2))
        np.testing.assert_array_equal(touched, np.zeros(T) if only else (np.arange(T) >= 24) & (np.arange(T) < 30))


def test_the_cache_compresses_when_a_segment_closes() -> None:
    """Bytes by the formula at every T; within a segment the compressed memory stays as it is."""
    row = Row("compressive", SIZES)
    mixer, terms = row.mixer(), row.config().cache_formula(row.around())
    for length in range(1, 20):
        cache = jax.eval_shape(lambda length=length: mixer.init_cache(B, length, jnp.float32))
        expected = B * (min(length, 14) + 3) * D_MODEL * 4
        assert content_bytes(cache) == expected == B * sum(term.bytes_at(length, 4) for term in terms)
    extend, cache, x = jax.jit(mixer.extend), mixer.init_cache(B, T, jnp.float32), text()
    changed = []
    for t in range(T):
        before = cache["compressed_memory"].state
        _, cache = extend(jnp.asarray(x[:, t : t + 1], jnp.float32), positions(t, t + 1), cache)
        if (cache["compressed_memory"].state != before).any():
            changed.append(t)
    assert changed == [11, 17, 23, 29]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"segment": 0}, "mechanism.segment: 0 is not a positive number"),
        ({"memory": 4}, "mechanism.memory: 4 is below segment 6: what leaves it must have been there"),
        ({"rate": 4}, "mechanism.segment: 6 is no multiple of rate 4, tokens that become one"),
        ({"memory": 9}, "mechanism.memory: 9 is no multiple of rate 2, tokens that become one"),
        ({"window": 8}, "mechanism.window: segment, memory and compressed_memory say what is seen; set it to 0"),
    ],
)
def test_refused_settings(settings: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Row("compressive", SIZES | settings).mixer()
