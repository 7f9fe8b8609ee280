"""What every store answers: which of its arrays hold content, which only say where content stands, and what axes mean."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax


@dataclasses.dataclass(frozen=True)
class Meaning:
    """What the leading axes of one or more arrays mean, by name; axes without a name, and further ones, mean nothing.

    Names: "batch", "slot" (an entry, a token), "head" (heads, or channels that are cut as heads are). `mla.sharding` says
    over which devices each is split.
    """

    names: tuple[str | None, ...]


STREAM = Meaning(("batch", "slot", "head"))  # of entries
ROWS = Meaning(("batch",))  # of bookkeeping


class Cache(Protocol):
    """Anything whose bytes can be measured."""

    def content(self) -> Any:
        """A pytree of the arrays that count as content: what the formulas of the papers are about."""

    def bookkeeping(self) -> Any:
        """A pytree of the arrays that only say where content stands."""


class Store(Cache, Protocol):
    """A part of what a layer keeps between calls: a registered dataclass, so a pytree of arrays."""

    def axes(self) -> Any:
        """The store with `Meaning` in the place of arrays, or of whole subtrees: a prefix of it."""


def replaced(store: Any, **axes: Any) -> Any:
    """A store with `Meaning` in the place of some of its fields."""
    return dataclasses.replace(store, **axes)


def by_axes(function: Any, stores: Any) -> Any:
    """A pytree like `stores` of function(names of axes, array) for each of its arrays. `stores` answers `axes`."""

    def one(axes: Meaning, part: Any) -> Any:
        return jax.tree.map(lambda array: function(axes.names, array), part)

    return jax.tree.map(one, stores.axes(), stores, is_leaf=lambda node: isinstance(node, Meaning))
