"""What recurrent mechanisms remember: arrays whose size does not depend on the number of tokens."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StateCache:
    """The state of one layer: a pytree of arrays, batch first, in fp32 because a state is a running sum."""

    state: Any

    def content(self) -> Any:
        """The arrays that count as content when bytes are measured."""
        return self.state

    def bookkeeping(self) -> Any:
        return None
