"""Mechanisms whose queries choose what they read: against the published rule in numpy, and where they are full attention."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import EXACT, close
from matrix import D_MODEL, Row

from mla.attention.sparse.base import best, slots_at
from mla.cache.meter import content_bytes
from mla.errors import UserError
from mla.model import parameters, with_parameters

pytestmark = pytest.mark.usefixtures("float64")

LENGTH = 37  # no whole number of blocks


def text(length: int = LENGTH, seed: int = 3) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(2, length, D_MODEL)))


def outputs(mixer: Any, x: jax.Array) -> np.ndarray:
    graph, state = nnx.split(mixer)
    return np.asarray(jax.jit(lambda state, x: nnx.merge(graph, state)(x))(state, x))


def with_config(mixer: Any, **changes: Any) -> Any:
    """A mixer with the same parameters and other settings that make none."""
    config = dataclasses.replace(mixer.config, **changes)
    return with_parameters(
        nnx.graphdef(nnx.eval_shape(lambda: type(mixer)(config, mixer.around, rngs=nnx.Rngs(0)))), parameters(mixer)
    )


def as_other(mixer: Any, name: str, settings: dict[str, Any]) -> Any:
    """Another mechanism with the parameters of this one, as many as it has."""
    other = nnx.eval_shape(Row(name, settings).mixer)
    given, wanted = parameters(mixer), parameters(other)
    return with_parameters(nnx.graphdef(other), {key: given[key] for key in wanted})


# ------------------------------------------------------------------------------------------------------------------- base


def test_the_best_are_chosen_first_and_of_equal_ones_the_earliest() -> None:
    scores = jnp.asarray([1.0, 3.0, 3.0, -2.0, 3.0, 9.0])
    visible = jnp.asarray([True] * 5 + [False])
    np.testing.assert_array_equal(best(scores, visible, 2), [1, 2])
    np.testing.assert_array_equal(best(scores, visible, 9), [1, 2, 4, 0, 3, -1])
    assert best(scores[:0], visible[:0], 3).shape == (0,)


def test_entries_are_found_by_where_they_stand() -> None:
    positions = jnp.asarray([[-1, -1, 4, 5, 6], [0, 1, 2, -1, -1], [-1] * 5], jnp.int32)
    wanted = jnp.asarray([[3, 4, 6, 7], [0, 2, -1, -5], [-1, -1, -1, -1]], jnp.int32)
    np.testing.assert_array_equal(slots_at(wanted, positions), [[1, 2, 4, -1], [0, 2, -1, -1], [-1] * 4])


# --------------------------------------------------------------------------------------------------------- block_mixture

MOBA = {"block": 8, "top_k": 3}


def moba(q: np.ndarray, k: np.ndarray, v: np.ndarray, size: int, top_k: int) -> np.ndarray:
    """The published rule, one head and query at a time: q [T, H, D], k and v [T, K, D]."""
    out, (length, heads, width) = np.zeros_like(q), q.shape
    for t, h in np.ndindex(length, heads):
        group = h * k.shape[1] // heads
        blocks = range(t // size + 1)
        gate = {i: q[t, h] @ k[i * size : (i + 1) * size, group].mean(axis=0) for i in blocks}
        gate[t // size] = np.inf
        chosen = sorted(blocks, key=lambda i: (-gate[i], i))[:top_k]
        tokens = [s for i in chosen for s in range(i * size, min((i + 1) * size, t + 1))]
        logits = k[tokens, group] @ q[t, h] / width**0.5
        weights = np.exp(logits - logits.max())
        out[t, h] = weights / weights.sum() @ v[tokens, group]
    return out


def test_block_mixture_is_the_published_rule() -> None:
    mixer: Any = Row("block_mixture", MOBA).mixer()
    x, positions = text(), jnp.arange(LENGTH, dtype=jnp.int32)[None]
    q, (k, v) = mixer.queries(x, positions), mixer.entries(x, positions)
    rows = zip(*map(np.asarray, (q, k, v)), strict=True)
    heads = np.stack([moba(*row, size=8, top_k=3) for row in rows])
    close(outputs(mixer, x), mixer.out(jnp.asarray(heads.reshape(2, LENGTH, -1))), EXACT, unit=True)
    full = outputs(as_other(mixer, "gqa", {"num_kv_heads": 2}), x)
    assert np.max(np.abs(outputs(mixer, x) - full)) > 0.1 * np.std(full), "nothing was left out"


@pytest.mark.parametrize(
    "settings,other",
    [
        ({"block": 8, "top_k": 5}, ("gqa", {})),  # as many blocks as there are
        ({"block": 50, "top_k": 1}, ("gqa", {})),  # one block for all
        ({"block": 8, "top_k": 1}, ("chunked", {"chunk": 8, "unit_norm": False})),
    ],
)
def test_block_mixture_reduces(settings: dict[str, Any], other: tuple[str, dict[str, Any]]) -> None:
    """To full attention, and with the own block alone to attention within blocks."""
    mixer = Row("block_mixture", settings).mixer()
    close(outputs(mixer, text()), outputs(as_other(mixer, *other), text()), EXACT, unit=True)


def test_of_blocks_with_equal_means_the_earliest_is_read() -> None:
    """A text of one token repeated, without rotation: all blocks score alike."""
    mixer: Any = Row("block_mixture", MOBA | {"rope_fraction": 0.0}).mixer()
    x, positions = jnp.broadcast_to(text(1), (2, 40, D_MODEL)), jnp.arange(40, dtype=jnp.int32)[None]
    memory, queries = mixer.remember(x, positions)[0], mixer.queries(x, positions)
    memory = dataclasses.replace(memory, beside=memory.beside._replace(means=jnp.ones_like(memory.beside.means)))
    chosen = mixer.choose(x, positions, queries, memory, memory.mask(jnp.broadcast_to(positions, (2, 40))))
    np.testing.assert_array_equal(chosen[0, 39, 0], [*range(32, 40), *range(16)])


@pytest.mark.parametrize("kv_heads,length", [(4, 3), (4, 36), (4, 40), (2, 37)])
def test_block_mixture_reads_what_it_says(kv_heads: int, length: int) -> None:
    """Counted from the choices of the last token: exactly, and for shared key heads as if no two heads chose alike."""
    mixer: Any = Row("block_mixture", MOBA | {"num_kv_heads": kv_heads}).mixer()
    x, positions = text(length), jnp.arange(length, dtype=jnp.int32)[None]
    cache = mixer.init_cache(2, length, jnp.float64)
    memory, after = mixer.remember(x, jnp.broadcast_to(positions, (2, length)), cache)
    mask = memory.mask(jnp.full((2, 1), length - 1, jnp.int32))
    chosen = np.asarray(mixer.choose(x[:, -1:], None, mixer.queries(x[:, -1:], positions[:, -1:]), memory, mask))[:, 0]
    pairs = [len({int(i) for i in row if 0 <= i < length}) for row in chosen.reshape(2 * kv_heads, -1)]
    said = mixer.reads(length)["key"]
    assert max(pairs) <= said and (kv_heads < 4 or set(pairs) == {said})
    token, blocks = 2 * 8 * 8, length // 8 * 8 * 8
    assert mixer.read_bytes(after) == 2 * kv_heads * (said * token + blocks + 8 * 8)
    assert mixer.read_bytes(after) <= content_bytes(after)
    abstract = jax.eval_shape(functools.partial(mixer.init_cache, 2, length, jnp.float64))
    assert mixer.read_bytes(abstract) == mixer.read_bytes(after)


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"block": 0}, "mechanism.block: 0 is not a positive number of tokens"),
        ({"top_k": 0}, "mechanism.top_k: 0 is below 1, the block that a query stands in"),
        ({"window": 9}, "mechanism.window: blocks are chosen from the whole text"),
    ],
)
def test_refused_sizes_of_block_mixture(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Row("block_mixture", settings).mixer()


def test_block_mixture_takes_codecs_of_single_tokens_only() -> None:
    mixer = Row("block_mixture", MOBA).mixer()
    assert mixer.codecs("int8")["mean"] is not None
    with pytest.raises(UserError, match="where a layer pools tokens already"):
        mixer.codecs("kivi4")
