"""What recurrent mechanisms remember: arrays whose size does not depend on the number of tokens."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StateCache:
    """A recurrent state of one layer: a pytree of arrays with the batch first, stored in fp32 because it is a running sum."""

    state: Any

    def content(self) -> Any:
        """The arrays that count as content when bytes are measured."""
        return self.state

    def bookkeeping(self) -> Any:
        return None
