"""The attention backends that can train on a GPU, beside one another: time and error, forward and with gradients.

    python benchmarks/attention_backends.py [--out=results/h200/attention_backends.json]

Shape of a layer of configs/small.py:mha: bf16, 16 sequences of 1,024 tokens, 12 heads of 64; with and without a window of
256. Errors are relative norms of the output and of the gradients by q, k and v against the reference backend. A minute on
an H200.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import jax
import jax.numpy as jnp

from mla.ops.attention import softmax_attention
from mla.ops.mask import Mask
from mla.workdir import environment

BATCH, TOKENS, HEADS, WIDTH, REPEATS = 16, 1024, 12, 64, 20


def milliseconds(function: Any, *arguments: jax.Array) -> float:
    """The mean time of a call, after one that is not counted."""
    jax.block_until_ready(function(*arguments))
    start = time.perf_counter()
    results = [function(*arguments) for _ in range(REPEATS)]
    jax.block_until_ready(results)
    return (time.perf_counter() - start) / REPEATS * 1e3


def relative_norm(actual: jax.Array, reference: jax.Array) -> float:
    difference = (actual - reference).astype(jnp.float32)
    return float(jnp.linalg.norm(difference) / jnp.linalg.norm(reference.astype(jnp.float32)))


def compare(window: int | None) -> list[dict[str, Any]]:
    """One row a backend."""
    shape = (BATCH, TOKENS, HEADS, WIDTH)
    inputs = [jax.random.normal(jax.random.key(number), shape, jnp.bfloat16) for number in range(3)]
    positions = jnp.broadcast_to(jnp.arange(TOKENS, dtype=jnp.int32), (BATCH, TOKENS))
    mask, rows, reference = Mask(positions, positions, window, contiguous=True), [], None
    platform = {"gpu": "cuda"}.get(jax.devices()[0].platform, jax.devices()[0].platform)
    for backend in ("reference", "blocked", "cudnn"):

        def attend(q: jax.Array, k: jax.Array, v: jax.Array, backend: str = backend) -> jax.Array:
            return softmax_attention((q,), (k,), v, mask, scale=WIDTH**-0.5, backend=backend, platform=platform)

        def objective(*parts: jax.Array) -> jax.Array:
            return jnp.sum(attend(*parts).astype(jnp.float32) ** 2)

        forward, backward = jax.jit(attend), jax.jit(jax.grad(objective, (0, 1, 2)))
        found = [forward(*inputs), *backward(*inputs)]
        reference = reference or found
        rows.append(
            {
                "backend": backend,
                "window": window,
                "forward_ms": milliseconds(forward, *inputs),
                "forward_and_backward_ms": milliseconds(backward, *inputs),
                "relative_norms": [relative_norm(a, b) for a, b in zip(found, reference, strict=True)],
            }
        )
        print(rows[-1])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="")
    out = parser.parse_args().out
    found = {"environment": environment(), "rows": [row for window in (None, 256) for row in compare(window)]}
    if out:
        with open(out, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=2)


if __name__ == "__main__":
    main()
