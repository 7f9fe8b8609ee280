"""FLOPs of a program, counted in its jaxpr: every product of matrices, as often as it runs.

XLA's own count takes the body of a loop once; this one takes it as often as a scan runs it. Elementwise work is left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def matmul_flops(jaxpr: Any, live: Sequence[bool] | None = None) -> float:
    """2 times the multiplications of all products in a (closed) jaxpr, of all devices together.

    Of branches the most expensive one counts; a loop whose number of turns is not known counts once; what nothing depends
    on, which no compiler keeps, does not. `live` says which outputs are used; None: all.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    used = {
        v for v, is_live in zip(jaxpr.outvars, live or [True] * len(jaxpr.outvars), strict=True) if is_live and _named(v)
    }
    total = 0.0
    for equation in reversed(jaxpr.eqns):
        name, params, outputs = equation.primitive.name, equation.params, [v in used for v in equation.outvars]
        if not any(outputs) and not equation.effects:
            continue
        used.update(v for v in equation.invars if _named(v))
        if name in ("dot_general", "ragged_dot_general", "ragged_dot"):
            total += _product(equation)
        elif name == "conv_general_dilated":
            total += _convolution(equation)
        elif name == "scan":
            total += params["length"] * matmul_flops(params["jaxpr"])
        elif name == "cond":
            total += max(matmul_flops(branch, outputs) for branch in params["branches"])
        elif name == "shard_map":  # its body is one device's
            total += params["mesh"].size * matmul_flops(params["jaxpr"], outputs)
        elif name == "pallas_call":
            estimate = params.get("cost_estimate")
            total += estimate.flops if estimate is not None else _kernel(params)
        else:
            total += sum(matmul_flops(inner, _same(inner, outputs)) for inner in inner_jaxprs(params))
    return total


def _named(variable: Any) -> bool:
    """Whether it is a variable, and no number."""
    return not hasattr(variable, "val")


def _same(inner: Any, outputs: list[bool]) -> list[bool] | None:
    """Which outputs of an inner jaxpr are used, where they are those of the equation; None: not known, all."""
    return outputs if len(getattr(inner, "jaxpr", inner).outvars) == len(outputs) else None


def _kernel(params: dict[str, Any]) -> float:
    """Of a Pallas kernel that does not say: those of its body at each point of its grid.

    Where the last axis of the grid is as long as the one before it or the one before that, they are taken for tiles of a
    text that looks back at itself: of those above the diagonal a kernel has nothing to do. (Heads stand between the two in a
    kernel that goes over queries for each tile of keys.)
    """
    grid: tuple[int, ...] = (1, 1, 1, *params["grid_mapping"].grid)
    tiles = grid[-1]
    visits = (tiles + 1) / 2 if tiles in grid[-3:-1] else tiles
    return math.prod(grid[:-1]) * visits * matmul_flops(params["jaxpr"])


def inner_jaxprs(params: dict[str, Any]) -> list[Any]:
    """The jaxprs that an equation runs, once each."""
    values = [value for name, value in params.items() if name not in ("jvp_jaxpr_fun", "fwd_jaxpr_thunk", "bwd")]
    flat = [item for value in values for item in (value if isinstance(value, tuple | list) else (value,))]
    return [item for item in flat if hasattr(getattr(item, "jaxpr", item), "eqns")]


def _product(equation: Any) -> float:
    left, right = (variable.aval.shape for variable in equation.invars[:2])
    if equation.primitive.name != "dot_general":  # each row of the left goes through one group's matrix
        return 2.0 * math.prod(left) * right[-1]
    (contracted, _), _ = equation.params["dimension_numbers"]
    out = equation.outvars[0].aval.shape
    return 2.0 * math.prod(out) * math.prod(left[axis] for axis in contracted)


def _convolution(equation: Any) -> float:
    kernel = equation.invars[1].aval.shape
    out_axis = equation.params["dimension_numbers"].rhs_spec[0]
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) / kernel[out_axis]
