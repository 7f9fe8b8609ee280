"""The fused kernel for TPUs beside the op's reference: run as jax operations here, on one device and over a mesh."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close, contiguous_mask, relative_norm
from jax.sharding import Mesh

from mla.errors import UserError
from mla.ops import splash
from mla.ops.attention import softmax_attention
from mla.ops.dispatch import watched
from mla.sharding import AXES, Spread

HEADS = 4
Given = dict[str, Any]
# Parts of keys as (heads, width), heads and width of values, tokens, and what shapes the weights.
CASES: dict[str, Given] = {
    "heads of their own": {"parts": [(4, 16)], "values": (4, 16), "tokens": 256},
    "grouped, wider values, no whole tiles": {"parts": [(2, 16)], "values": (2, 24), "tokens": 200},
    "two parts, one of them shared": {"parts": [(4, 12), (1, 8)], "values": (4, 20), "tokens": 129},
    "one head, a window shorter than a tile": {"parts": [(1, 16)], "values": (1, 16), "tokens": 300, "window": 127},
    "a window of a tile": {"parts": [(2, 16)], "values": (2, 16), "tokens": 300, "window": 128},
    "a window past a tile, sinks": {"parts": [(2, 16)], "values": (2, 16), "tokens": 300, "window": 129, "sink": True},
    "chunks, a cap": {"parts": [(2, 16)], "values": (2, 16), "tokens": 280, "chunk": 70, "soft_cap": 3.0},
    "latents of all heads": {"parts": [(1, 20), (1, 6)], "values": (1, 20), "tokens": 140, "sink": True},
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))


def drawn(case: Given, dtype: Any = jnp.float32, batch: int = 2) -> tuple[Any, ...]:
    """Queries and keys by parts, values, and sinks or None."""
    draw, tokens = np.random.default_rng(0), case["tokens"]

    def make(*shape: int) -> jax.Array:
        return jnp.asarray(draw.normal(size=shape), dtype)

    queries = tuple(make(batch, tokens, HEADS, width) for _, width in case["parts"])
    keys = tuple(make(batch, tokens, heads, width) for heads, width in case["parts"])
    heads, width = case["values"]
    return queries, keys, make(batch, tokens, heads, width), make(HEADS) if case.get("sink") else None


def shape_of(case: Given) -> Given:
    return {name: case.get(name) for name in ("window", "chunk", "soft_cap")} | {"scale": 0.3}


def kernel(case: Given, *given: Any, spread: Any = None) -> jax.Array:
    return splash.attend(*given, **shape_of(case), spread=spread, interpret=True)


def reference(case: Given, queries: Any, keys: Any, values: Any, sink: Any) -> jax.Array:
    batch, tokens = values.shape[:2]
    mask = contiguous_mask(batch, tokens, case.get("window"), case.get("chunk"))
    modifiers = {"scale": 0.3, "soft_cap": case.get("soft_cap"), "sink": sink}
    return softmax_attention(queries, keys, values, mask, backend="reference", **modifiers)


@every_case
def test_outputs_and_gradients_are_those_of_the_reference(case: Given) -> None:
    given = drawn(case)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=reference(case, *given).shape), jnp.float32)

    def both(function: Any) -> Any:
        def weighed(*given: Any) -> Any:
            output = function(case, *given)
            return jnp.sum(output * weights), output

        (_, output), gradients = jax.value_and_grad(weighed, argnums=(0, 1, 2, 3), has_aux=True)(*given)
        return output, gradients

    for ours, theirs in zip(jax.tree.leaves(both(kernel)), jax.tree.leaves(both(reference)), strict=True):
        close(ours, theirs, 1e-5 * max(1.0, float(jnp.abs(theirs).max())))


def test_in_bfloat16() -> None:
    """Nearer to the outputs in fp32 than twice what the reference in bf16 is."""
    case = CASES["two parts, one of them shared"]
    exact, rounded = reference(case, *drawn(case)), drawn(case, jnp.bfloat16)
    assert kernel(case, *rounded).dtype == jnp.bfloat16
    assert relative_norm(kernel(case, *rounded), exact) < 2 * relative_norm(reference(case, *rounded), exact)


@pytest.mark.parametrize("mesh", [(1, 8, 1), (2, 2, 2), (1, 2, 4)], ids=str)
@pytest.mark.parametrize("name", ["two parts, one of them shared", "a window past a tile, sinks"])
def test_over_a_mesh(name: str, mesh: tuple[int, int, int]) -> None:
    """Sequences and heads of each device; key heads that cannot be split as query heads are copied for each of those."""
    case, devices = CASES[name], Mesh(np.asarray(jax.devices()[:8]).reshape(mesh), AXES)
    given = drawn(case, batch=8)
    spread = jax.jit(lambda *given: kernel(case, *given, spread=Spread(devices)))(*given)
    close(spread, kernel(case, *given), 1e-5)


def chosen(tokens: int, platform: str | None = "tpu", backend: str = "auto", dtype: Any = jnp.float32, **mask: Any) -> str:
    """The backend that a call takes, by its shapes alone."""
    x = jax.ShapeDtypeStruct((1, tokens, HEADS, 8), dtype)

    def call(q: Any, k: Any, v: Any) -> Any:
        where = contiguous_mask(1, tokens, **mask)
        return softmax_attention((q,), (k,), v, where, scale=1.0, platform=platform, backend=backend)

    with watched() as ops:
        jax.make_jaxpr(call)(x, x, x)
    (taken,) = ops["attention"]
    return taken


def test_what_takes_it() -> None:
    assert chosen(128) == chosen(1000, window=100) == chosen(300, dtype=jnp.bfloat16, chunk=128) == "splash"
    assert chosen(127) == chosen(300, window=100, chunk=100) == "blocked"
    assert chosen(300, platform="cpu") == "cpu" and chosen(300, platform=None) != "splash"
    for platform, mask, said in (
        ("cpu", {}, "a tpu device"),
        ("tpu", {"window": 8, "chunk": 8}, "a window or a chunk, not both"),
    ):
        with pytest.raises(UserError, match=f"attention backend 'splash' cannot serve this call, it needs {said}"):
            chosen(300, platform, backend="splash", **mask)
