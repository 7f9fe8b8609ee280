"""Every backend of the softmax attention op against float64 numpy, and their gradients against each other."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import EXACT, close, contiguous_mask, relative_norm

from mla.ops import attention
from mla.ops.attention import softmax_attention
from mla.ops.mask import Mask

pytestmark = pytest.mark.usefixtures("float64")
ANY_MASK = ("reference", "blocked", "decode")


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of one call. `parts`: (key heads, width) of each part of the keys; `value`: of the values."""

    parts: tuple[tuple[int, int], ...] = ((4, 8),)
    value: tuple[int, int] = (4, 8)
    length: int = 40
    window: int | None = None
    chunk: int | None = None
    soft_cap: float | None = None
    sink: bool = False
    heads: int = 4
    batch: int = 2

    @property
    def scale(self) -> float:
        return sum(width for _, width in self.parts) ** -0.5


CASES = {
    "many windows": Case(length=103, window=5, sink=True),
    "many chunks": Case(((2, 8),), (2, 8), length=103, chunk=6, soft_cap=3.0),
    "mha": Case(),
    "gqa": Case(parts=((2, 8),), value=(2, 8)),
    "mqa": Case(parts=((1, 8),), value=(1, 8)),
    "mla-expanded": Case(parts=((4, 8), (1, 4)), value=(4, 6)),
    "mla-absorbed": Case(parts=((1, 16), (1, 4)), value=(1, 16)),
    "mla-without-rope": Case(parts=((1, 16), (1, 0)), value=(1, 16)),
    "grouped-parts": Case(parts=((2, 8), (3, 4)), value=(6, 5), heads=6),
    "window": Case(window=7),
    "chunk": Case(chunk=16),
    "soft-cap": Case(soft_cap=2.0),
    "sink": Case(sink=True),
    "everything": Case(((2, 8), (1, 4)), (2, 6), length=600, window=150, chunk=256, soft_cap=3.0, sink=True),
    **{f"length-{n}": Case(length=n) for n in (1, 255, 256, 257, 600)},
    "long-window": Case(length=300, window=1),
    "long-chunk": Case(length=300, chunk=130),
}


def inputs(case: Case, queries: int, entries: int, seed: int = 0):
    """Order-one queries, keys, values and the sink (or None)."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape))

    q = tuple(draw(case.batch, queries, case.heads, width) for _, width in case.parts)
    k = tuple(draw(case.batch, entries, key_heads, width) for key_heads, width in case.parts)
    v = draw(case.batch, entries, *case.value)
    return q, k, v, draw(case.heads) if case.sink else None


def expected(queries, keys, values, mask, scale, soft_cap=None, sink=None):
    """float64, one query and head at a time, over the entries that it sees and no others."""
    queries, keys = ([np.asarray(x, np.float64) for x in part] for part in (queries, keys))
    values = np.asarray(values, np.float64)
    batch, length, heads, _ = queries[0].shape
    out = np.zeros((batch, length, heads, values.shape[-1]))
    entry_at = np.asarray(mask.entry_positions)
    for b, s in np.ndindex(batch, length):
        at = int(mask.query_positions[b, s])
        seen = (entry_at[b] >= 0) & (entry_at[b] <= at)
        if mask.window is not None:
            seen &= entry_at[b] > at - mask.window
        if mask.chunk is not None:
            seen &= entry_at[b] // mask.chunk == at // mask.chunk
        if not seen.any():
            continue
        for h in range(heads):
            logits = np.zeros(seen.sum())
            for q, k in zip(queries, keys, strict=True):
                logits += scale * k[b, seen, h * k.shape[2] // heads] @ q[b, s, h]
            if soft_cap is not None:
                logits = soft_cap * np.tanh(logits / soft_cap)
            top = max(logits.max(), -np.inf if sink is None else float(sink[h]))
            weights = np.exp(logits - top)
            total = weights.sum() + (0 if sink is None else np.exp(float(sink[h]) - top))
            out[b, s, h] = weights / total @ values[b, seen, h * values.shape[2] // heads]
    return out


def run(case, q, k, v, mask, sink, backend):
    """The output, and gradients in (q, k, v, sink) of half the square distance to a fixed target."""
    target = jnp.asarray(np.random.default_rng(9).standard_normal((*q[0].shape[:3], v.shape[-1])))

    def loss(q, k, v, sink):
        options = {"scale": case.scale, "soft_cap": case.soft_cap, "sink": sink, "backend": backend}
        output = softmax_attention(q, k, v, mask, **options)
        return 0.5 * jnp.sum((output - target) ** 2), output

    argnums = (0, 1, 2) if sink is None else (0, 1, 2, 3)
    (_, output), grads = jax.jit(jax.value_and_grad(loss, argnums, has_aux=True))(q, k, v, sink)
    return output, grads


def assert_close(got, want):
    close(got, want, EXACT * max(1.0, float(np.max(np.abs(want), initial=0.0))))


def jumbled(case: Case, queries: int, entries: int, seed: int = 1):
    """Padded queries, entries in any order among empty slots that hold garbage, and a row that sees nothing at all."""
    rng = np.random.default_rng(seed)
    at = np.full((case.batch, entries), -1)
    asked = np.full((case.batch, queries), -1)
    for b in range(case.batch):
        live = int(entries * rng.uniform(0.5, 0.9))
        at[b, rng.permutation(entries)[:live]] = np.arange(live)
        padding = min(b, queries - 1)
        new = queries - padding
        asked[b, padding:] = np.arange(live - new, live) if new <= live else np.arange(new)
    at[-1] = np.where(at[-1] < entries // 4, -1, at[-1])  # the first quarter evicted
    asked[-1, -1] = 0  # asks for what was evicted
    q, k, v, sink = inputs(case, queries, entries)
    empty = (jnp.asarray(at) < 0)[..., None, None]
    k, v = tuple(jnp.where(empty, 1e30, x) for x in k), jnp.where(empty, -1e30, v)
    mask = Mask(jnp.asarray(asked, jnp.int32), jnp.asarray(at, jnp.int32), case.window, case.chunk)
    return q, k, v, mask, sink


@pytest.mark.parametrize("name", CASES)
def test_contiguous(name):
    case = CASES[name]
    q, k, v, sink = inputs(case, case.length, case.length)
    mask = contiguous_mask(case.batch, case.length, case.window, case.chunk)
    want = expected(q, k, v, mask, case.scale, case.soft_cap, sink)
    output, want_grads = run(case, q, k, v, mask, sink, "reference")
    assert_close(output, want)
    for backend in ("blocked", "cpu"):
        output, grads = run(case, q, k, v, mask, sink, backend)
        assert_close(output, want)
        jax.tree.map(assert_close, grads, want_grads)


@pytest.mark.parametrize(
    "name,queries,entries",
    [
        *((name, 30, 50) for name in ("mha", "gqa", "window", "chunk", "soft-cap", "sink")),
        ("mha", 1, 50),
        ("mla-expanded", 1, 50),
        ("mla-absorbed", 3, 50),
        ("grouped-parts", 3, 50),
        ("mla-expanded", 300, 400),
    ],
)
def test_any_mask(name, queries, entries):
    case = CASES[name]
    q, k, v, mask, sink = jumbled(case, queries, entries)
    want = expected(q, k, v, mask, case.scale, case.soft_cap, sink)
    _, want_grads = run(case, q, k, v, mask, sink, "reference")
    seen = mask.visible()
    blind, unseen = np.asarray(~seen.any(2)), np.asarray(~seen.any(1))
    assert blind.any() and unseen.any()
    for backend in ANY_MASK:
        output, grads = run(case, q, k, v, mask, sink, backend)
        assert_close(output, want)
        jax.tree.map(assert_close, grads, want_grads)
        assert not np.asarray(output)[blind].any()
        assert not any(np.asarray(g)[blind].any() for g in grads[0])
        assert not any(np.asarray(g)[unseen].any() for g in (*grads[1], grads[2]))


@pytest.mark.parametrize("backend", ANY_MASK)
@pytest.mark.parametrize("name", ["mla-expanded", "sink"])
def test_nothing_is_seen(name, backend):
    case = CASES[name]
    q, k, v, sink = inputs(case, 4, 6)
    mask = Mask(jnp.full((2, 4), -1), jnp.full((2, 6), -1))
    for x in jax.tree.leaves(run(case, q, k, v, mask, sink, backend)):
        assert not np.asarray(x).any()


def test_blocked_scans_within_segments(monkeypatch):
    monkeypatch.setattr(attention, "_ROWS", 16)
    monkeypatch.setattr(attention, "_SEGMENTS", 3)
    case = dataclasses.replace(CASES["everything"], length=300)
    q, k, v, sink = inputs(case, case.length, case.length)
    mask = contiguous_mask(2, case.length, case.window, case.chunk)
    got, want = (run(case, q, k, v, mask, sink, b) for b in ("blocked", "reference"))
    jax.tree.map(assert_close, got, want)


def test_bf16():
    case = Case(((2, 8), (1, 4)), (2, 6), length=140)
    q, k, v, sink = inputs(case, case.length, case.length)
    mask = contiguous_mask(2, case.length, case.window, case.chunk)
    want = expected(q, k, v, mask, case.scale, case.soft_cap, sink)
    _, want_grads = run(case, q, k, v, mask, sink, "reference")

    q, k, v = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (q, k, v))
    for backend in (*ANY_MASK, "cpu"):
        output, grads = run(case, q, k, v, mask, sink, backend)
        assert output.dtype == jnp.bfloat16
        assert relative_norm(output, want) < 1e-2, backend
        assert max(jax.tree.leaves(jax.tree.map(relative_norm, grads, want_grads))) < 1e-2, backend


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from mla.ops.attention import softmax_attention
from mla.ops.mask import Mask
assert len(jax.devices()) == 2, jax.devices()
rng = np.random.default_rng(0)
q, k, r, v = (jnp.asarray(rng.standard_normal((4, 160, h, 8)), jnp.float32) for h in (4, 2, 1, 2))
def loss(backend, q, k, r, v):
    at = jnp.broadcast_to(jnp.arange(160), (4, 160))
    mask = Mask(at, at, contiguous=True)
    return jnp.sum(softmax_attention((q, q), (k, r), v, mask, scale=0.3, backend=backend) ** 2)
want = jax.jit(jax.grad(lambda *a: loss("reference", *a), (0, 1, 2, 3)))(q, k, r, v)
mesh = Mesh(np.array(jax.devices()), ("x",))
for spec in (P("x"), P(None, None, "x")):
    place = lambda a: jax.device_put(a, NamedSharding(mesh, spec if a.shape[2] > 1 or spec == P("x") else P()))
    args = jax.tree.map(place, (q, k, r, v))
    for backend in ("cpu", "blocked", "decode"):
        compiled = jax.jit(jax.grad(lambda *a: loss(backend, *a), (0, 1, 2, 3))).lower(*args).compile()
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5, rtol=2e-5), compiled(*args), want)
        if spec == P("x"):
            text = compiled.as_text()
            for op in ("all-gather", "all-to-all", "collective-permute", "all-reduce"):
                assert op not in text, (backend, op)
"""


def test_sharded_batch_needs_no_communication_and_sharded_heads_are_exact():
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    done = subprocess.run([sys.executable, "-c", SHARDED], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("backend", ["reference", "blocked", "decode"])
def test_key_heads_that_keep_other_entries_with_lifetimes(backend: str) -> None:
    """Positions, since and until of each key head apart, against a softmax over each query's own set in float64."""
    draw = np.random.default_rng(0)
    batch, rows, count, heads, groups, width = 2, 3, 9, 4, 2, 5
    q, k, v = (draw.standard_normal((batch, n, h, width)) for n, h in ((rows, heads), (count, groups), (count, groups)))
    asked = np.asarray([[6, 7, 8], [-1, 3, 4]], np.int32)
    at = draw.integers(-1, 9, (batch, count, groups)).astype(np.int32)
    since = draw.integers(0, 6, (batch, count, groups)).astype(np.int32)
    until = draw.integers(4, 10, (batch, count, groups)).astype(np.int32)
    mask = Mask(*(jnp.asarray(a) for a in (asked, at)), since=jnp.asarray(since), until=jnp.asarray(until))
    arrays = [jnp.asarray(a) for a in (q, k, v)]
    found = attention.softmax_attention((arrays[0],), (arrays[1],), arrays[2], mask, scale=0.7, backend=backend)
    columns = attention.attention_columns((arrays[0],), (arrays[1],), mask, scale=0.7)
    expected, sums = np.zeros((batch, rows, heads, width)), np.zeros((batch, heads, count))
    for b, s, h in np.ndindex(batch, rows, heads):
        g, t = h // (heads // groups), asked[b, s]
        seen = [c for c in range(count) if 0 <= at[b, c, g] <= t and since[b, c, g] <= t < until[b, c, g]]
        if t >= 0 and seen:
            weights = np.exp(0.7 * k[b, seen, g] @ q[b, s, h])
            expected[b, s, h] = weights / weights.sum() @ v[b, seen, g]
            sums[b, h, seen] += weights / weights.sum()
    close(found, expected, EXACT)
    close(columns, sums, EXACT)
