"""The equation of the contract, for every mechanism: mixer(x) == extend(x, empty) == extend in any pieces.

Outputs are compared after scaling them to unit rms, so that 1e-5 means the same for all mechanisms.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from matrix import D_MODEL, ROWS, every_row

from mla.attention.contract import mechanism
from mla.attention.softmax import AbsorbingMixer
from mla.cache.meter import content_bytes
from mla.cache.tokens import Slots, TokenCache
from mla.ops.mask import Mask

LENGTH = 270  # past 256 and past every window of the matrix
SPLITS = {
    "whole": [270],
    "pieces": [128, 128, 7, 7],
    "mixed": [7, 1, 128, 1, *[7] * 18, *[1] * 7],
    "tokens": [1] * 270,
}


class Jitted:
    """A mixer's two forms, compiled once for each shape."""

    def __init__(self, mixer):
        graph, self.state = nnx.split(mixer)
        self.mixer = mixer
        self._call = jax.jit(lambda s, x, p: nnx.merge(graph, s)(x, p))
        self._extend = jax.jit(lambda s, x, p, c: nnx.merge(graph, s).extend(x, p, c))

    def __call__(self, x, positions=None):
        return self._call(self.state, x, positions)

    def extend(self, x, positions, cache):
        return self._extend(self.state, x, positions, cache)

    def run(self, x, positions, cache, sizes):
        outputs, start = [], 0
        for size in sizes:
            y, cache = self.extend(x[:, start : start + size], positions[:, start : start + size], cache)
            outputs.append(y)
            start += size
        assert start == x.shape[1]
        return jnp.concatenate(outputs, axis=1), cache


def inputs(batch=2, length=LENGTH, dtype=jnp.float32, seed=3):
    x = jax.random.normal(jax.random.key(seed), (batch, length, D_MODEL), jnp.float32).astype(dtype)
    return x, jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))


def unit(y):
    return np.asarray(y, np.float64) / np.sqrt(np.mean(np.asarray(y, np.float64) ** 2))


def relative_norm(y, reference):
    difference = np.asarray(y, np.float64) - np.asarray(reference, np.float64)
    return np.linalg.norm(difference) / np.linalg.norm(np.asarray(reference, np.float64))


@pytest.mark.parametrize("row", **every_row)
def test_any_split_equals_the_parallel_form(row):
    run = Jitted(row.mixer())
    x, positions = inputs()
    reference = run(x)
    assert np.isfinite(reference).all() and np.std(reference) > 1e-2
    for name, sizes in SPLITS.items():
        y, _ = run.run(x, positions, run.mixer.init_cache(2, LENGTH, jnp.float32), sizes)
        scale = np.sqrt(np.mean(np.asarray(reference) ** 2))
        assert np.max(np.abs(y - reference)) / scale < 1e-5, name


@pytest.mark.parametrize("row", **every_row)
def test_explicit_positions_equal_implicit_ones(row):
    run = Jitted(row.mixer())
    x, positions = inputs(length=70)
    np.testing.assert_allclose(unit(run(x, positions)), unit(run(x)), atol=1e-5)


ABSORBING = [row for row in ROWS if issubclass(mechanism(row.name)[1], AbsorbingMixer)]


@pytest.mark.parametrize("row", ABSORBING, ids=lambda row: row.id)
def test_both_forms_agree(row):
    """Expanded and absorbed attention over the same entries, as a batch and as two new tokens over a cache."""
    mixer = row.mixer()
    x, positions = inputs(length=70)
    for new in (70, 2):
        asked = mixer.queries(x[:, -new:], positions[:, -new:])
        mask = Mask(positions[:, -new:], positions, mixer.window, contiguous=new == 70)
        forms = []
        for form in ("expanded", "absorbed"):
            mixer.config = dataclasses.replace(mixer.config, attend=form)
            forms.append(mixer.attend(asked, mixer.entries(x, positions), mask))
        np.testing.assert_allclose(forms[1] / jnp.std(forms[0]), forms[0] / jnp.std(forms[0]), atol=1e-5)
        assert not np.array_equal(*forms), "one form twice"


@pytest.mark.parametrize("row", **every_row)
def test_bf16_stays_close(row):
    """Two bf16 ways, and bf16 against fp32 from the same weights, by relative norm."""
    x, positions = inputs(dtype=jnp.bfloat16)
    run = Jitted(row.mixer(jnp.bfloat16))
    parallel = run(x)
    pieces, _ = run.run(x, positions, run.mixer.init_cache(2, LENGTH, jnp.bfloat16), [128, 128, 7, 7])
    assert parallel.dtype == pieces.dtype == jnp.bfloat16
    assert relative_norm(pieces, parallel) < 1.5e-2
    assert relative_norm(parallel, Jitted(row.mixer())(x.astype(jnp.float32))) < 3e-2


@pytest.mark.parametrize("row", **every_row)
def test_causal_by_gradient(row):
    """The output at t depends on tokens s <= t within reach, and on nothing else."""
    mixer = row.mixer()
    x, _ = inputs(batch=1, length=64)
    query = 57
    gradient = jax.grad(lambda x: jnp.sum(mixer(x)[0, query] * jnp.arange(1.0, D_MODEL + 1)))(x)
    influence = np.abs(np.asarray(gradient[0])).max(axis=-1)
    first = 0 if row.reach is None else query - row.reach + 1
    assert (influence[query + 1 :] == 0).all()
    assert (influence[:first] == 0).all()
    assert (influence[first : query + 1] > 0).all()


@pytest.mark.parametrize("row", **every_row)
def test_unequal_prompts_decode_as_each_would_alone(row):
    """Left-padded prompts of 3, 17 and 11 tokens, then decoding, then a second padded chunk in the middle of the text."""
    run = Jitted(row.mixer())
    lengths, total = [3, 17, 11], 40
    x, _ = inputs(batch=3, length=total, seed=5)

    def padded(rows, width):
        """Rows of (start, stop) into each text, left-padded to `width`."""
        chunk, positions = np.full((3, width, D_MODEL), 7.0, np.float32), np.full((3, width), -1, np.int32)
        for b, (start, stop) in enumerate(rows):
            if stop > start:
                chunk[b, width - (stop - start) :] = x[b, start:stop]
                positions[b, width - (stop - start) :] = np.arange(start, stop)
        return jnp.asarray(chunk), jnp.asarray(positions)

    stages = [
        [(0, n) for n in lengths],
        *[[(n + i, n + i + 1) for n in lengths] for i in range(3)],
        [(6, 8), (20, 20), (14, 23)],  # the second row says nothing this time
        [(8, 9), (20, 21), (23, 24)],
    ]
    cache = run.mixer.init_cache(3, total, jnp.float32)
    together = [[] for _ in lengths]
    for rows in stages:
        chunk, positions = padded(rows, 17 if rows[0][1] - rows[0][0] != 1 else 1)
        y, cache = run.extend(chunk, positions, cache)
        assert not np.isnan(np.asarray(y)).any()
        for b, (start, stop) in enumerate(rows):
            together[b].append(np.asarray(y[b, y.shape[1] - (stop - start) :]))
    alone = run(x[:, :24])
    scale = float(jnp.sqrt(jnp.mean(alone**2)))
    for b, pieces in enumerate(together):
        mine = np.concatenate(pieces)
        assert np.max(np.abs(mine - np.asarray(alone[b, : len(mine)]))) / scale < 1e-5, f"row {b}"


@pytest.mark.parametrize("row", **every_row)
def test_padding_leaves_no_trace_in_the_cache(row):
    run = Jitted(row.mixer())
    x, positions = inputs(batch=1, length=20)
    _, clean = run.extend(x[:, 8:], positions[:, :12], run.mixer.init_cache(1, 24, jnp.float32))
    pad = jnp.where(jnp.arange(20) < 8, -1, jnp.arange(20) - 8)[None].astype(jnp.int32)
    y, padded = run.extend(x, pad, run.mixer.init_cache(1, 24, jnp.float32))
    for a, b in zip(jax.tree.leaves(padded), jax.tree.leaves(clean), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    only, untouched = run.extend(x, jnp.full((1, 20), -1, jnp.int32), run.mixer.init_cache(1, 24, jnp.float32))
    for a, b in zip(jax.tree.leaves(untouched), jax.tree.leaves(run.mixer.init_cache(1, 24, jnp.float32)), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(y[:, :8], jnp.zeros_like(y[:, :8]))
    np.testing.assert_array_equal(only, jnp.zeros_like(only))


@pytest.mark.parametrize("row", **every_row)
def test_only_relative_positions_matter(row):
    """Adding a constant to all positions changes nothing, but for a temperature that grows with them."""
    run = Jitted(row.mixer())
    x, positions = inputs(length=70)
    plain, moved = unit(run(x)), unit(run(x, positions + (row.shift or 41)))
    if row.shift is None:
        assert np.max(np.abs(moved - plain)) > 1e-2
    else:
        np.testing.assert_allclose(moved, plain, atol=5e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("row", **every_row)
def test_live_bytes_equal_the_formula(row, dtype):
    mixer = row.mixer(dtype)
    formula = row.config().cache_formula(row.around())
    for batch, capacity in [(1, 5), (3, 64)]:
        cache = mixer.init_cache(batch, capacity, dtype)
        expected = batch * formula.bytes_at(capacity, jnp.dtype(dtype).itemsize)
        assert content_bytes(cache) == expected
        assert content_bytes(jax.eval_shape(lambda c=capacity, b=batch: mixer.init_cache(b, c, dtype))) == expected
        assert sum(a.nbytes for a in jax.tree.leaves(cache.content())) == expected


def test_every_registered_mechanism_has_a_row():
    from mla.attention.contract import REGISTRY

    assert {row.name for row in ROWS} == set(REGISTRY)


# ------------------------------------------------------------------------------------------------------- slots and rings


@settings(deadline=None, max_examples=40)
@given(
    window=st.integers(1, 9),
    chunks=st.lists(st.lists(st.integers(0, 4), min_size=2, max_size=2), min_size=1, max_size=8),
)
def test_a_ring_answers_with_the_window_before_each_token(window, chunks):
    """Any chunk sizes, different per row: each row's visible entries are exactly the tokens its queries may see."""
    batch, width = 2, 4
    cache = TokenCache((jnp.zeros((batch, window)),), Slots.empty(batch, window, ring=True))
    seen = [0, 0]
    for counts in chunks:
        positions = np.full((batch, width), -1, np.int32)
        for b, n in enumerate(counts):
            positions[b, width - n :] = np.arange(seen[b], seen[b] + n) if n else positions[b, width:]
        values = jnp.asarray(positions, jnp.float32) * 10
        ((entries,), where, *_), cache = cache.extend((values,), jnp.asarray(positions))
        for b, n in enumerate(counts):
            for t in range(seen[b], seen[b] + n):
                visible = [(p, float(e)) for p, e in zip(np.asarray(where[b]), entries[b], strict=True) if 0 <= p <= t]
                visible = sorted(pair for pair in visible if t - pair[0] < window)
                assert visible == [(s, s * 10.0) for s in range(max(0, t - window + 1), t + 1)]
            seen[b] += n
    assert cache.streams[0].shape == (batch, window)
    held = [sorted(p for p in np.asarray(cache.slots.positions[b]) if p >= 0) for b in range(batch)]
    assert held == [list(range(max(0, n - window), n)) for n in seen]


def test_a_full_cache_stores_rows_of_different_lengths_compactly():
    cache = TokenCache((jnp.zeros((2, 6)),), Slots.empty(2, 6))
    chunk = jnp.asarray([[-1, -1, 0], [0, 1, 2]], jnp.int32)
    _, cache = cache.extend((chunk * 10.0,), chunk)
    ((entries,), where, *_), cache = cache.extend((jnp.asarray([[10.0], [30.0]]),), jnp.asarray([[1], [3]], jnp.int32))
    np.testing.assert_array_equal(where, [[0, 1, -1, -1, -1, -1], [0, 1, 2, 3, -1, -1]])
    np.testing.assert_array_equal(entries, [[0, 10, 0, 0, 0, 0], [0, 10, 20, 30, 0, 0]])
    np.testing.assert_array_equal(cache.slots.lengths, [2, 4])
