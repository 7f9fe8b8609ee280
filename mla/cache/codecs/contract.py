"""What a storage codec must provide."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax

from mla.errors import UserError


@dataclasses.dataclass(frozen=True)
class Codec:
    """Stores vectors [..., width] in fewer bytes. Static: equal codecs share compiled programs.

    Attributes:
      group: channels that share a scale; 0: the whole vector.
      strict: the group was asked for, and is refused where it does not divide the width. Otherwise the largest divisor is
        taken that both have in common.
    """

    group: int = 0
    strict: bool = False

    def encode(self, x: jax.Array) -> Any:
        """x [..., width] -> a pytree of arrays with the leading axes of x."""
        raise NotImplementedError

    def decode(self, coded: Any, dtype: Any) -> jax.Array:
        """The other way round: [..., width] in `dtype`."""
        raise NotImplementedError

    def vector_bytes(self, width: int) -> int:
        """Bytes that one vector takes, scales included: the published formula."""
        raise NotImplementedError

    def group_of(self, width: int) -> int:
        """Channels that share a scale in vectors of `width`.

        Raises:
          UserError: a group that was asked for does not divide the width.
        """
        if self.strict and width % self.group:
            raise UserError(f"config.eval.cache.codec: groups of {self.group} do not divide a stream of {width} channels")
        return math.gcd(self.group, width) if self.group else width
