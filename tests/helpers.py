"""What several test files need: comparisons that keep a record of how near they came to their bounds, a mask."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flags import DEFAULTS

from mla.ops.mask import Mask

EXACT = 1e-9  # bound of equalities in float64, in units of the reference's rms

FREEDOM = 30  # roundings that may add up in one output, each as large as one of an input or a weight

# (name of the comparison, error / bound) of every comparison of the running test; conftest.py collects and prints them.
MARGINS: list[tuple[str, float]] = []


def close(
    actual: Any, reference: Any, bound: float = 0.0, what: str = "", *, relative: float = 0.0, unit: bool = False
) -> None:
    """Asserts |actual - reference| < bound + relative |reference| for each element, and records the largest error / bound.

    Args:
      actual, reference: arrays of one shape, or numbers; compared in float64. NaN is refused, infinities must be equal.
      bound, relative: what rounding can do, with room: a ratio that passes 1/3 on one machine may fail on another.
      what: names the comparison in messages and in the record.
      unit: divides both by the root mean square of `reference` first, so that a bound means the same at any scale.
    """
    a, b = np.asarray(actual, np.float64), np.asarray(reference, np.float64)
    assert b.shape in (a.shape, ()), f"{what}: shapes {a.shape} and {b.shape}"
    assert not np.isnan(a).any() and not np.isnan(b).any(), f"{what}: NaN"
    scale = float(np.sqrt(np.mean(b**2))) if unit else 1.0
    assert scale > 0, f"{what}: the reference is 0 everywhere"
    error = np.abs(np.subtract(a, b, out=np.zeros(a.shape), where=a != b)) / scale
    allowed = np.maximum(bound + relative * np.abs(b) / scale, np.finfo(np.float64).tiny)
    ratio = float(np.max(np.where(error == 0, 0.0, error / allowed), initial=0.0))
    MARGINS.append((what, ratio))  # plain numbers: reports travel between processes
    assert ratio < 1, f"{what}: differs by up to {np.max(error):.3g}, {ratio:.3g} times the bound"


def rounding(function: Any, *arguments: Any) -> float:
    """What computing function(*arguments) in fp32 can do to its outputs at worst, in units of their rms.

    The largest response of an output to a rounding of every number in the arguments, times FREEDOM for the roundings on the
    way: it grows with whatever makes a function sensitive, as large logits do. Measured with changes a thousand times larger
    than roundings, so that the function itself may run in fp32.
    """
    draw, step = np.random.default_rng(1), 1e3 * np.finfo(np.float32).eps / 2

    def moved(a: Any) -> Any:
        return (np.asarray(a) * (1 + step * draw.uniform(-1, 1, a.shape))).astype(a.dtype)

    reference = np.asarray(function(*arguments), np.float64)
    response = np.asarray(function(*jax.tree.map(moved, arguments)), np.float64) - reference
    return FREEDOM * float(np.max(np.abs(response)) / np.sqrt(np.mean(reference**2))) / 1e3


def relative_norm(actual: Any, reference: Any) -> float:
    """|actual - reference| / |reference| in float64, over all elements: how bf16 is judged."""
    a, b = np.asarray(actual, np.float64), np.asarray(reference, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def optimized(function: Any, **options: Any) -> Any:
    """`jax.jit` with XLA's default optimisation and fusions, which flags.py changes for the suite."""
    return jax.jit(function, compiler_options=DEFAULTS, **options)


GOLDEN = Path(__file__).with_name("golden.json")


def golden(name: str, values: list[float]) -> None:
    """Holds losses to those that were there before: a refactoring that changes numbers is seen, whatever else agrees.

    They are kept in golden.json. Where a change of numbers is meant, GOLDEN=write in the environment replaces them (without
    xdist: `pytest -p no:xdist tests/test_training.py`).
    """
    kept = json.loads(GOLDEN.read_text())
    if os.environ.get("GOLDEN") == "write":
        kept[name] = [round(value, 7) for value in values]
        GOLDEN.write_text(json.dumps(dict(sorted(kept.items())), indent=1) + "\n")
    assert name in kept, f"golden.json has no losses of {name}; write them with GOLDEN=write"
    close(values, kept[name], 1e-4, f"golden losses of {name}")


def contiguous_mask(batch: int, length: int, window: int | None = None, chunk: int | None = None) -> Mask:
    """The mask of a training batch: every row holds positions 0 .. length-1."""
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    return Mask(positions, positions, window, chunk, contiguous=True)
