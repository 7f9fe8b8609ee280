"""The equation of the contract, for every mechanism: mixer(x) == extend(x, empty) == extend in any pieces.

Equality is judged in float64 at 1e-9 of the outputs' rms, where rounding blurs nothing. fp32 is held against the float64
outputs of the same parameters, and may be off by what rounding can do to this mixer (`rounding`). One program each for the
parallel form, a whole text, pieces of up to WIDTH tokens (shorter ones are left-padded) and single tokens serves all tests.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import EXACT, close, optimized, relative_norm, rounding
from hypothesis import given, settings
from hypothesis import strategies as st
from matrix import D_MODEL, ROWS, TOYS, Row, rows_of

from mla.attention.softmax.base import AbsorbingMixer
from mla.cache.clock import Clock, Slots
from mla.cache.meter import content_bytes
from mla.cache.tokens import TokenCache
from mla.ops.mask import Mask

BATCH, WIDTH = 3, 32
SHORT, LONG = 72, 270  # tokens: past every window of the matrix, and past two tiles of the attention op


class Compiled:
    """A mixer's two forms over BATCH rows and a cache for `length` tokens, compiled once for each width of a piece."""

    def __init__(self, row: Row, dtype):
        self.mixer, self.dtype, self.length = row.mixer(dtype), dtype, LONG if row.long else SHORT
        graph, self.state = nnx.split(self.mixer)
        jit = optimized if dtype == jnp.float32 else jax.jit  # what people run
        self._call = jit(lambda s, x, p: nnx.merge(graph, s)(x, p))
        self._extend = jit(lambda s, x, p, c: nnx.merge(graph, s).extend(x, p, c))

    def empty(self):
        return self.mixer.init_cache(BATCH, self.length, self.dtype)

    def __call__(self, x, positions=None, state=None):
        return np.asarray(self._call(self.state if state is None else state, jnp.asarray(x, self.dtype), positions))

    def extend(self, x, spans, cache, fill=7.0):
        """Tokens [start, stop) of each row, left-padded with `fill` to whole text, WIDTH or one; outputs without padding."""
        longest = max(stop - start for start, stop in spans)
        width = next(w for w in (1, WIDTH, self.length) if longest <= w)
        chunk, positions = np.full((BATCH, width, D_MODEL), fill), np.full((BATCH, width), -1, np.int32)
        for b, (start, stop) in enumerate(spans):
            chunk[b, width - (stop - start) :] = x[b, start:stop]
            positions[b, width - (stop - start) :] = np.arange(start, stop)
        y, cache = self._extend(self.state, jnp.asarray(chunk, self.dtype), jnp.asarray(positions), cache)
        y = np.asarray(y)
        assert not y[positions < 0].any(), "padding has an output"
        return [y[b, width - (stop - start) :] for b, (start, stop) in enumerate(spans)], cache

    def pieces(self, x, sizes):
        """Outputs [B, T, D] of all rows alike through the cache in pieces of these sizes, and the cache after them."""
        outputs, start, cache = [], 0, self.empty()
        for size in sizes:
            y, cache = self.extend(x, [(start, start + size)] * BATCH, cache)
            outputs.append(np.stack(y))
            start += size
        assert start == self.length
        return np.concatenate(outputs, axis=1), cache


@functools.lru_cache(maxsize=4)  # tests of one row follow one another
def compiled(row_id: str, dtype) -> Compiled:
    return Compiled(next(row for row in [*ROWS, *TOYS] if row.id == row_id), dtype)


@pytest.fixture
def exact(row):
    """The row's programs in float64, for as long as a test runs."""
    with jax.enable_x64(True):
        yield compiled(row.id, jnp.float64)


@pytest.fixture(scope="module", params=[*ROWS, *TOYS], ids=lambda row: row.id)
def row(request):
    """Module-scoped, so that pytest runs all tests of a row before the next row's."""
    return request.param


def text(length, seed=3):
    """Inputs [B, length, D] that fp32 holds exactly."""
    return np.random.default_rng(seed).normal(size=(BATCH, length, D_MODEL)).astype(np.float32).astype(np.float64)


def positions_of(length, offset=0):
    return jnp.broadcast_to(jnp.arange(offset, offset + length, dtype=jnp.int32), (BATCH, length))


def splits(length):
    """Sizes of pieces: whole, near WIDTH, all sorts, and tokens; they add up to the length."""
    mixed = [7, 1, WIDTH, 1, 1, 13]
    mixed += [WIDTH] * ((length - sum(mixed) - 9) // WIDTH)
    mixed += [1] * (length - sum(mixed))
    pieces = [WIDTH] * (length // WIDTH) + [length % WIDTH]
    return {"whole": [length], "pieces": pieces, "mixed": mixed, "tokens": [1] * length}


def test_any_split_equals_the_parallel_form(exact, row):
    """Outputs, and what the cache holds in the end."""
    x = text(exact.length)
    reference = exact(x)
    assert np.isfinite(reference).all() and np.std(reference) > 1e-2
    caches = []
    for name, sizes in splits(exact.length).items():
        y, cache = exact.pieces(x, sizes)
        close(y, reference, EXACT, name, unit=True)
        caches.append(jax.tree.leaves(cache))
    for other in caches[1:]:
        for a, b in zip(other, caches[0], strict=True):
            close(a, b, EXACT * max(1.0, float(np.max(np.abs(b), initial=0.0, where=np.isfinite(b)))), "cache")


def test_any_split_in_fp32_is_off_by_rounding(exact, row):
    x = text(exact.length)
    reference = exact(x)
    bound = rounding(lambda x, state: exact(x, state=state), x, exact.state)
    assert bound < 1e-3, "so blurred that a fault would pass"
    with jax.enable_x64(False):
        run = compiled(row.id, jnp.float32)
        close(run(x), reference, bound, "parallel form", unit=True)
        for name in ("pieces", "mixed"):
            close(run.pieces(x, splits(run.length)[name])[0], reference, bound, name, unit=True)


def test_explicit_positions_equal_implicit_ones(exact, row):
    """Also behind five tokens of padding: what stands there is seen by nobody."""
    x, pad = text(exact.length), 5
    plain = exact(x)
    close(exact(x, positions_of(exact.length)), plain, EXACT, unit=True)
    moved = np.concatenate([np.full((BATCH, pad, D_MODEL), 7.0), x[:, :-pad]], axis=1)
    padded = exact(moved, jnp.maximum(positions_of(exact.length, -pad), -1))
    scale = np.sqrt(np.mean(plain**2))
    close(padded[:, pad:] / scale, plain[:, :-pad] / scale, EXACT, "padded")
    assert not padded[:, :pad].any(), "padding has an output"


@pytest.mark.parametrize("row", rows_of(AbsorbingMixer), ids=lambda row: row.id, indirect=True)
def test_both_forms_agree(exact, row):
    """Expanded and absorbed attention over the same entries, as a batch and as two new tokens over a cache."""
    mixer, x, positions = exact.mixer, text(SHORT), positions_of(SHORT)
    forms = [dataclasses.replace(mixer.config, attend=form) for form in ("expanded", "absorbed")]
    graph = nnx.graphdef(mixer)

    @jax.jit
    def attended(state, x):
        outputs, mixer = [], nnx.merge(graph, state)
        for new in (SHORT, 2):
            queries = mixer.queries(x[:, -new:], positions[:, -new:])
            mask = Mask(positions[:, -new:], positions, mixer.window, contiguous=new == SHORT)
            for mixer.config in forms:
                outputs.append(mixer.attend(queries, mixer.entries(x, positions), mask))
        return outputs

    outputs = attended(exact.state, x)
    for expanded, absorbed in (outputs[:2], outputs[2:]):
        close(absorbed, expanded, EXACT, unit=True)
        assert not np.array_equal(absorbed, expanded), "one form twice"


def choices(mixer, x):
    """The entries that each token of x [B, T, D] chooses in the parallel form, int [B, T, G, N]."""
    graph, state = nnx.split(mixer)
    taken = []

    def choose(mixer, *arguments):
        taken.append(type(mixer).choose(mixer, *arguments))
        return taken[-1]

    @jax.jit
    def run(state, x):
        mixer = nnx.merge(graph, state)
        mixer.choose = functools.partial(choose, mixer)
        mixer(x)
        return taken.pop()

    return np.asarray(run(state, jnp.asarray(x, mixer.around.dtype)))


def with_choices(mixer, x, chosen):
    """Outputs of x [B, T, D] where each token reads what it is told to, int [B, T, G, N]."""
    graph, state = nnx.split(mixer)

    @jax.jit
    def run(state, x, chosen):
        mixer = nnx.merge(graph, state)
        mixer.choose = lambda *_: chosen
        return mixer(x)

    return np.asarray(run(state, jnp.asarray(x, mixer.around.dtype), chosen))


def test_bf16_stays_close(row):
    """Two bf16 ways, and bf16 against fp32 from the same weights, by relative norm."""
    half, full = compiled(row.id, jnp.bfloat16), compiled(row.id, jnp.float32)
    x = np.asarray(jnp.asarray(text(half.length), jnp.bfloat16), np.float64)
    parallel = half(x)
    pieces, _ = half.pieces(x, splits(half.length)["pieces"])
    assert parallel.dtype == pieces.dtype == jnp.bfloat16
    assert relative_norm(pieces, parallel) < 1.5e-2
    expected = full(x)
    if row.chooses:  # between entries that score nearly alike, rounding to bf16 decides: it is told what fp32 chose
        chosen = choices(full.mixer, x)
        same = np.all(np.sort(choices(half.mixer, x), axis=-1) == np.sort(chosen, axis=-1), axis=(2, 3))
        assert np.mean(same) > 0.5, "most tokens choose otherwise"
        parallel = with_choices(half.mixer, x, chosen)
    assert relative_norm(parallel, expected) < 3e-2


def test_causal_by_gradient(row):
    """The output at t depends on tokens s <= t within reach, and on nothing else."""
    graph, state = nnx.split(row.mixer())
    weights = np.arange(1.0, D_MODEL + 1, dtype=np.float32)
    chosen = choices(row.mixer(), text(64))[0] if row.chooses else None
    gradient = jax.jit(jax.grad(lambda x, state, query: jnp.sum(nnx.merge(graph, state)(x)[0, query] * weights)))
    for query in (57, 50, 49, 8, 0):
        influence = np.abs(np.asarray(gradient(jnp.asarray(text(64)[:1], jnp.float32), state, query)[0])).max(axis=-1)
        seen = np.zeros(64, bool)
        seen[query + 1 - row.reach(query) : query + 1] = True
        if row.reads:
            seen &= np.isin(np.arange(64), list(row.reads(query)))
        if row.chooses:
            tokens = chosen[query][..., None] * row.entry + np.arange(row.entry)
            read = np.union1d(tokens, [query])
            read = read[(read >= 0) & seen[read]]
            assert np.all(influence[read] > 0), f"what the query at {query} chose and does not read"
            seen = np.isin(np.arange(64), read) if row.chooses == "only" else seen & (influence > 0)
        np.testing.assert_array_equal(influence > 0, seen, f"what the query at {query} sees")


def test_unequal_prompts_decode_as_each_would_alone(exact, row):
    """Left-padded prompts of 3, 17 and 11 tokens, then decoding, then a second padded chunk in the middle of the text."""
    lengths = [3, 17, 11]
    stages = [
        [(0, n) for n in lengths],
        *[[(n + i, n + i + 1) for n in lengths] for i in range(3)],
        [(6, 8), (20, 20), (14, 23)],  # the second row says nothing this time
        [(8, 9), (20, 21), (23, 24)],
    ]
    x = text(exact.length, seed=5)
    alone, cache, together = exact(x), exact.empty(), [[] for _ in lengths]
    for spans in stages:
        pieces, cache = exact.extend(x, spans, cache)
        for b, piece in enumerate(pieces):
            together[b].append(piece)
    scale = np.sqrt(np.mean(alone**2))
    for b, pieces in enumerate(together):
        mine = np.concatenate(pieces)
        close(mine / scale, alone[b, : len(mine)] / scale, EXACT, f"row {b}")


def test_padding_leaves_no_trace_in_the_cache(exact, row):
    """Neither beside tokens, whatever stands in its place, nor where there is nothing else."""
    x, spans = text(exact.length), [(0, 12), (0, 20), (0, 0)]
    caches = [exact.extend(x, spans, exact.empty(), fill)[1] for fill in (7.0, -3.0)]
    for a, b, untouched in zip(*map(jax.tree.leaves, (*caches, exact.empty())), strict=True):
        np.testing.assert_array_equal(a, b)
        if a.shape[:1] == (BATCH,):
            np.testing.assert_array_equal(a[2], untouched[2])
    _, nothing = exact.extend(x, [(0, 0)] * BATCH, exact.empty())
    for a, b in zip(jax.tree.leaves(nothing), jax.tree.leaves(exact.empty()), strict=True):
        np.testing.assert_array_equal(a, b)


def test_positions_mean_what_the_row_says(exact, row):
    """A constant added to all changes nothing, but for a temperature that grows with them; distances twice as large change
    whatever looks at distances."""
    x, positions = text(exact.length), positions_of(exact.length)
    plain = exact(x)
    for other, same in ((positions + (row.shift or 41), row.shift is not None), (2 * positions, row.order_only)):
        placed = exact(x, other)
        if same:
            close(placed, plain, EXACT, unit=True)
        else:
            assert np.max(np.abs(placed - plain)) > 1e-2 * np.std(plain)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_live_bytes_equal_the_formula(row, dtype):
    mixer = row.mixer(dtype)
    terms = row.config().cache_formula(row.around())
    for batch, capacity in [(1, 5), (3, 64)]:
        cache = mixer.init_cache(batch, capacity, dtype)
        expected = batch * sum(term.bytes_at(capacity, jnp.dtype(dtype).itemsize) for term in terms)
        assert content_bytes(cache) == expected
        assert content_bytes(jax.eval_shape(lambda c=capacity, b=batch: mixer.init_cache(b, c, dtype))) == expected
        assert sum(a.nbytes for a in jax.tree.leaves(cache.content())) == expected


def test_every_registered_mechanism_has_a_row():
    from mla.attention.contract import REGISTRY

    assert {row.name for row in ROWS} == set(REGISTRY)


# ------------------------------------------------------------------------------------------------------- slots and rings


@jax.jit
def extended(cache, values, positions):
    ((entries,), where, *_), cache = cache.extend((values,), positions)
    return entries, where, cache


@settings(deadline=None, max_examples=40)
@given(
    window=st.integers(1, 9),
    chunks=st.lists(st.lists(st.integers(0, 4), min_size=2, max_size=2), min_size=1, max_size=8),
)
def test_a_ring_answers_with_the_window_before_each_token(window, chunks):
    """Any chunk sizes, different per row: each row's visible entries are exactly the tokens its queries may see."""
    batch, width = 2, 4
    ring = Clock(window=window)
    cache = TokenCache((jnp.zeros((batch, window)),), Slots.empty(batch, window, ring), ring)
    seen = [0, 0]
    for counts in chunks:
        positions = np.full((batch, width), -1, np.int32)
        for b, n in enumerate(counts):
            positions[b, width - n :] = np.arange(seen[b], seen[b] + n) if n else positions[b, width:]
        values = jnp.asarray(positions, jnp.float32) * 10
        entries, where, cache = extended(cache, values, jnp.asarray(positions))
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
