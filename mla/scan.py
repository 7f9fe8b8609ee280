"""Layers of one kind as one scan: a program as long as one of them, however deep the model is.

Layers repeat in units: `mha` twelve times is a unit of one layer, `gated_delta*3,gqa` one of four. Parameters stay with
their layers and are stacked where the scan begins, in the dtype they are used in.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mla.layers.basic import cast


class Unit(NamedTuple):
    """Layers `start` to `start + period` as they follow one another `turns` times; 1: no scan."""

    start: int
    period: int
    turns: int


def units(kinds: Sequence[Hashable], sources: Sequence[int | None]) -> tuple[Unit, ...]:
    """How a model's layers repeat, bottom first: of what can begin at a layer, what spans most layers in the shortest unit.

    Layers that read others repeat where each reads the layer so many below it in its own unit, or all of them one layer
    below the first unit. A layer that is read from outside its unit is in no scan.

    Args:
      kinds: of each layer, equal where layers differ in their parameters alone.
      sources: of each layer, the layer whose memory it reads; None: its own.
    """
    total = len(kinds)
    last_reader = {source: index for index, source in enumerate(sources) if source is not None}

    def alike(start: int, period: int, index: int) -> bool:
        """Whether layer `index` is, in its unit, what the first unit has in its place."""
        first = start + (index - start) % period
        begins, source, of_first = index - (index - start) % period, sources[index], sources[first]
        if kinds[index] != kinds[first] or last_reader.get(index, index) >= begins + period:
            return False
        if source is None or of_first is None:
            return source is of_first
        return source == of_first < start or (source >= begins and index - source == first - of_first)

    found: list[Unit] = []
    at = 0
    while at < total:
        best = Unit(at, 1, 1)
        for period in range(1, (total - at) // 2 + 1):
            stop = at
            while stop < total and alike(at, period, stop):
                stop += 1
            turns = (stop - at) // period
            if turns > 1 and turns * period > best.turns * best.period:
                best = Unit(at, period, turns)
        found.append(best)
        at += best.period * best.turns
    return tuple(found)


def repeated(
    step: Callable[[Any, Sequence[Any], jax.Array], tuple[Any, Any]],
    carry: Any,
    modules: Sequence[Sequence[nnx.Module]],
    dtype: Any,
) -> tuple[Any, Any]:
    """`carry, output = step(carry, modules of a unit, its number)` for each unit, as one scan.

    Args:
      step: traced once.
      carry: what goes from unit to unit.
      modules: of each unit, as many and alike.
      dtype: parameters that are not declared exact are stacked in it, as they are used.

    Returns:
      the last carry, and the outputs of all units, stacked.
    """
    graphs = [nnx.graphdef(module) for module in modules[0]]
    states = [[cast(nnx.state(module), dtype) for module in unit] for unit in modules]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *states)

    def body(carry: Any, numbered: tuple[jax.Array, Any]) -> tuple[Any, Any]:
        number, parts = numbered
        made = [nnx.merge(graph, part) for graph, part in zip(graphs, parts, strict=True)]
        return step(carry, made, number)

    return jax.lax.scan(body, carry, (jnp.arange(len(modules), dtype=jnp.int32), stacked))
