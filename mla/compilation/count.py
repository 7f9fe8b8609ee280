"""FLOPs of a program, counted in its jaxpr: every product of matrices, as often as it runs.

XLA's own count takes the body of a loop once; this one takes it as often as a scan runs it. Elementwise work is left out.
"""

from __future__ import annotations

import math
from typing import Any


def matmul_flops(jaxpr: Any) -> float:
    """2 times the multiplications of all products in a (closed) jaxpr, of all devices together.

    Of branches the most expensive one counts; a loop whose number of turns is not known counts once.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name in ("dot_general", "ragged_dot_general", "ragged_dot"):
            total += _product(equation)
        elif name == "conv_general_dilated":
            total += _convolution(equation)
        elif name == "scan":
            total += params["length"] * matmul_flops(params["jaxpr"])
        elif name == "cond":
            total += max(matmul_flops(branch) for branch in params["branches"])
        elif name == "pallas_call":
            estimate = params.get("cost_estimate")
            total += estimate.flops if estimate is not None else 0.0
        else:
            total += sum(matmul_flops(inner) for inner in inner_jaxprs(params))
    return total


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
