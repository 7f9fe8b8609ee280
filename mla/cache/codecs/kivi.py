"""Keys per channel (KIVI 2402.02750): a channel keeps its size over tokens, so a group is 32 tokens of one channel.

    k[t, c] in blocks of R tokens; in each group of G = 32 tokens of a block, asymmetric as in `integers`:
    s[c] = (max_t k[t, c] - min_t k[t, c]) / (2^b - 1),    k'[t, c] = round((k[t, c] - min) / s) s + min

A block is coded when its last token is written; the T mod R tokens after the last block are raw. Values are coded per token
(`integers`, groups of 32 channels) except the last min(T, R), which are raw: `lag` = R there. R = 128 by default.

kivi       what a cache stores, so keys after their rotation
kvquant    keys before it, rotated when they are read (KVQuant 2401.18079 in style: a range of each channel and group
           instead of calibrated thresholds, uniform codes, no outliers apart)

The released code attends to a prompt as it came and codes what it stores; here a query reads every token as it was stored
when the query's own token had been, so that no split of a text changes an answer.

A latent that keys and values share (c_kv, u) goes per channel, as the key that it is.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from mla.cache.codecs.contract import FIELD
from mla.cache.codecs.integers import Grid, Integers
from mla.errors import UserError


@dataclasses.dataclass(frozen=True)
class PerChannel(Integers):
    """Keys per channel over 32 tokens, values per token; the newest 128 (`kivi2:32`: 32) raw (KIVI, 2402.02750).
    `kvquant4` and `kvquant2` code keys before their rotation, uncalibrated, in the style of KVQuant (2401.18079).

    `unit` is R of the module's docstring, and `group` counts tokens.
    """

    def __post_init__(self) -> None:
        if self.unit % self.group_of(self.unit):
            raise UserError(
                f"{FIELD}: blocks of {self.unit} tokens: channels are coded in groups of {self.group} tokens, which do not"
                f" divide them; write a multiple of {self.group}, or fewer for one group a block"
            )

    def group_of(self, width: int) -> int:
        """Tokens that share a scale in blocks of `width` tokens."""
        return min(self.group, width)

    def encode(self, x: jax.Array) -> Grid:
        """[B, tokens, ..., width] -> codes [B, tokens / R, ..., width, R * bits / 8], scales and minima [.., R / G]."""
        blocks = x.reshape(x.shape[0], x.shape[1] // self.unit, self.unit, *x.shape[2:])
        return super().encode(jnp.moveaxis(blocks, 2, -1))

    def decode(self, coded: Grid, dtype: Any) -> jax.Array:
        blocks = jnp.moveaxis(super().decode(coded, dtype), -1, 2)
        return blocks.reshape(blocks.shape[0], -1, *blocks.shape[3:])

    def unit_bytes(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape) * self.vector_bytes(self.unit)
