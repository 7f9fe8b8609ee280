"""The decode kernel beside the op's reference, run as jax operations, on one device and over a mesh; compiled for a TPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close, relative_norm
from jax.sharding import Mesh
from programs import status

from mla.errors import UserError
from mla.ops import grouped_decode
from mla.ops.attention import softmax_attention
from mla.ops.mask import Mask
from mla.sharding import AXES, Spread

HEADS = 8
Case = dict[str, Any]
# Entries, parts of keys as (heads, width), heads and width of values (None: the first part), and what shapes the weights.
CASES: dict[str, Case] = {
    "latents, several blocks and a rest": {"entries": 1300, "parts": [(1, 20), (1, 6)], "sink": True},
    "latents of two groups": {"entries": 129, "parts": [(2, 12), (1, 4)]},
    "grouped heads, a window, a cap": {"entries": 600, "parts": [(2, 16)], "values": (2, 24), "window": 40, "soft_cap": 3.0},
    "one entry": {"entries": 1, "parts": [(1, 16)], "values": (1, 16)},
    "heads that kept different entries": {"entries": 200, "parts": [(4, 8)], "values": (4, 8), "apart": 4},
    "eight parts of blocks": {"entries": 4096, "parts": [(1, 8)], "values": (1, 8)},
}


def drawn(case: Case, batch: int, dtype: Any = jnp.float32) -> tuple[Any, ...]:
    """Queries, keys, values (the first part of the keys itself where they are it), a mask, and sinks or None.

    Entries lie in any order; some slots are empty, some entries stand behind the query, and one row sees nothing.
    """
    draw, count = np.random.default_rng(0), case["entries"]

    def make(*shape: int) -> jax.Array:
        return jnp.asarray(draw.normal(size=shape), dtype)

    queries = tuple(make(batch, 1, HEADS, width) for _, width in case["parts"])
    keys = tuple(make(batch, count, heads, width) for heads, width in case["parts"])
    values = make(batch, count, *case["values"]) if "values" in case else keys[0]
    stands = np.maximum(draw.permuted(np.tile(np.arange(count) - count // 9, (batch, 1)), axis=1), -1)
    if "apart" in case:
        stands = np.stack([np.roll(stands, 7 * head, axis=1) for head in range(case["apart"])], axis=-1)
    at = np.full((batch, 1), max(0, count - count // 4), np.int32)
    at[0] = -1
    mask = Mask(jnp.asarray(at), jnp.asarray(stands, jnp.int32), case.get("window"))
    return queries, keys, values, mask, make(HEADS) if case.get("sink") else None


def kernel(case: Case, queries: Any, keys: Any, values: Any, mask: Mask, sink: Any, spread: Any = None) -> jax.Array:
    apart = None if values is keys[0] else values
    options = {"scale": 0.3, "soft_cap": case.get("soft_cap"), "spread": spread, "interpret": True}
    return grouped_decode.attend(queries, keys, apart, mask.visible()[:, 0], sink, **options)


def reference(case: Case, *given: Any) -> jax.Array:
    return softmax_attention(*given[:4], scale=0.3, soft_cap=case.get("soft_cap"), sink=given[4], backend="reference")


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_outputs_are_those_of_the_reference(case: Case) -> None:
    given = drawn(case, 3)
    close(kernel(case, *given), reference(case, *given), 1e-5)
    assert not np.asarray(kernel(case, *given))[0].any()  # the row that sees nothing
    rounded = drawn(case, 3, jnp.bfloat16)
    off = relative_norm(reference(case, *rounded), reference(case, *given))
    assert relative_norm(kernel(case, *rounded), reference(case, *given)) < 2 * off


@pytest.mark.parametrize("mesh", [(1, 8, 1), (1, 4, 2)], ids=str)
@pytest.mark.parametrize("name", ["latents, several blocks and a rest", "latents of two groups"])
def test_over_a_mesh(name: str, mesh: tuple[int, int, int]) -> None:
    case, devices = CASES[name], Mesh(np.asarray(jax.devices()[:8]).reshape(mesh), AXES)
    given = drawn(case, 8)
    close(jax.jit(lambda: kernel(case, *given, spread=Spread(devices)))(), reference(case, *given), 1e-5)


def test_what_it_cannot_serve_is_said() -> None:
    def refused(rows: int, heads: int, width: int, dtype: Any = jnp.float32) -> str:
        q, k = jnp.ones((1, rows, HEADS, width), dtype), jnp.ones((1, 130, heads, width), dtype)
        mask = Mask(jnp.zeros((1, rows), jnp.int32), jnp.zeros((1, 130), jnp.int32))
        with pytest.raises(UserError) as error:
            softmax_attention((q,), (k,), k, mask, scale=1.0, backend="grouped_decode", platform="tpu")
        return str(error.value)

    said = "attention backend 'grouped_decode' cannot serve this call, it needs "
    assert refused(2, 1, 16) == f"{said}one query of each sequence: choose 'auto'"
    assert refused(1, 2, 64) == f"{said}key heads of a multiple of 128 channels, or a single one: choose 'auto'"
    assert refused(1, 1, 16, jnp.float16) == f"{said}bf16 or fp32: choose 'auto'"


@pytest.mark.parametrize("tensor", [1, 2])
def test_a_decode_step_with_it_compiles_for_a_tpu(tensor: int, config_file: Path, tmp_path: Path) -> None:
    """Named, beside what serves the rest; the latent is read by it, with ranks that are no powers of two."""
    out = tmp_path / "plan.json"
    fields = {"model.attention_backend": "grouped_decode,auto", "mesh.host_devices": 0, "eval.context": 140}
    fields |= {"mesh.tensor": tensor, "mesh.fsdp": 4 // tensor, "eval.decode_batch": 4, "model.mechanism.kv_lora_rank": 12}
    flags = [f"--config.{field}={value}" for field, value in fields.items()]
    command = [f"--config={config_file}:mla", "--steps=decode", "--level=O0", f"--out={out}", *flags]
    assert status("compile", *command) == 0
    (step,) = json.loads(out.read_text())["steps"]
    assert step["kernels"] == ["grouped_decode"]
    assert step["flops"] == pytest.approx(step["flops_formula"], rel=1e-9)
