"""What a storage codec must provide."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax

from mla.errors import UserError

FIELD = "config.eval.cache.codec"


@dataclasses.dataclass(frozen=True)
class Codec:
    """Stores vectors [..., width] in fewer bytes. Static: equal codecs share compiled programs.

    Most code each token as it is written. With `unit` or `lag` tokens stay raw for a while: those with indices k unit to
    (k + 1) unit - 1 are coded together once token (k + 1) unit - 1 + lag has been written.

    Attributes:
      group: channels that share a scale; 0: the whole vector.
      strict: the group was asked for, and is refused where it does not divide the width. Otherwise the largest divisor is
        taken that both have in common.
      unit: tokens that are coded together.
      lag: tokens that must have been written after a unit before it is coded.
      unrotated: keys are stored before their rotation (RoPE), and rotated when they are read.
    """

    group: int = 0
    strict: bool = False
    unit: int = 1
    lag: int = 0
    unrotated: bool = False

    @property
    def held(self) -> int:
        """Slots for raw tokens: the ring that is allocated beside the codes. 0: tokens are coded as they are written."""
        return max(self.unit, self.lag) if self.unit > 1 or self.lag else 0

    def settled(self, tokens: Any) -> Any:
        """Units that are coded after so many tokens, a number or an array."""
        return (tokens - self.lag) // self.unit * (tokens >= self.lag)

    def encode(self, x: jax.Array) -> Any:
        """x [..., width] -> a pytree of arrays with its leading axes; with a unit, x [B, tokens, ...] -> [B, units, ...]."""
        raise NotImplementedError

    def decode(self, coded: Any, dtype: Any) -> jax.Array:
        """The other way round: [..., width] in `dtype`, finite wherever x was, and within a bound that the codec states."""
        raise NotImplementedError

    def vector_bytes(self, width: int) -> int:
        """Bytes that one vector takes, scales included: the published formula."""
        raise NotImplementedError

    def unit_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of `unit` tokens that are coded together, [..., width] each."""
        return math.prod(shape[:-1]) * self.vector_bytes(shape[-1])

    def token_bytes(self, shape: tuple[int, ...], itemsize: int, tokens: int) -> int:
        """Bytes of a stream's tokens that are there, coded or raw: the published formula."""
        units = self.settled(tokens)
        return units * self.unit_bytes(shape) + (tokens - units * self.unit) * math.prod(shape) * itemsize

    def allocated_bytes(self, shape: tuple[int, ...], itemsize: int, capacity: int) -> int:
        """Bytes of a stream's arrays. Those of `token_bytes`, and what a ring holds for raw tokens that are not there."""
        raw = min(capacity, self.held)
        return self.settled(capacity) * self.unit_bytes(shape) + raw * math.prod(shape) * itemsize

    def group_of(self, width: int) -> int:
        """Channels that share a scale in vectors of `width`.

        Raises:
          UserError: a group that was asked for does not divide the width.
        """
        if self.strict and width % self.group:
            raise UserError(f"{FIELD}: groups of {self.group} do not divide a stream of {width} channels")
        return math.gcd(self.group, width) if self.group else width
