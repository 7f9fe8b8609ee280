"""The attention backends that can train on a GPU, beside one another: time and error, forward and with gradients.

    python benchmarks/attention_backends.py [--out=FILE] [--quick]

Shape of a layer of configs/small.py:mha: bf16, 16 sequences of 1,024 tokens, 12 heads of 64; with and without a window of
256. Errors are relative norms of the output and of the gradients by q, k and v against the reference backend. A backend
that cannot serve here is left out, with its reason. A minute on an H200; --quick: a tiny shape.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from sides import out_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mla.config import MeshConfig
from mla.errors import UserError
from mla.ops.attention import softmax_attention
from mla.ops.mask import Mask
from mla.sharding import make_mesh, platform
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


def compare(shape: tuple[int, int, int, int], window: int | None) -> list[dict[str, Any]]:
    """One row a backend. shape: sequences, tokens, heads, channels of a head."""
    batch, tokens, _, width = shape
    inputs = [jax.random.normal(jax.random.key(number), shape, jnp.bfloat16) for number in range(3)]
    positions = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32), (batch, tokens))
    mask, rows, reference = Mask(positions, positions, window, contiguous=True), [], None
    here = platform(make_mesh(MeshConfig()))
    for backend in ("reference", "blocked", "cudnn"):

        def attend(q: jax.Array, k: jax.Array, v: jax.Array, backend: str = backend) -> jax.Array:
            return softmax_attention((q,), (k,), v, mask, scale=width**-0.5, backend=backend, platform=here)

        def objective(*parts: jax.Array) -> jax.Array:
            return jnp.sum(attend(*parts).astype(jnp.float32) ** 2)

        forward, backward = jax.jit(attend), jax.jit(jax.grad(objective, (0, 1, 2)))
        try:
            found = [forward(*inputs), *backward(*inputs)]
        except UserError as error:
            print(f"left out: {error}")
            continue
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
    parser.add_argument("--out", type=out_file)
    parser.add_argument("--quick", action="store_true")
    asked = parser.parse_args()
    shape = (2, 64, 2, 16) if asked.quick else (BATCH, TOKENS, HEADS, WIDTH)
    rows = [row for window in (None, shape[1] // 4) for row in compare(shape, window)]
    if asked.out:
        asked.out.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
