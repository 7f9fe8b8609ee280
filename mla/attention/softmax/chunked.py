"""Chunked attention with NoPE global layers (Llama 4's iRoPE): `chunked*3,chunked_global`.

    chunked          RoPE; a query sees its own chunk only: s <= t and floor(s / C) = floor(t / C). After the rotation, q
                     and k are divided by their root mean square (no gain).
    chunked_global   no RoPE, no norm, full causal attention; q is multiplied by a temperature that grows with the position,
                     1 + a ln(1 + floor((t + 1) / F)), so that attention over long texts stays sharp.

Otherwise grouped-query attention. A chunked layer's cache is a ring of C tokens, 2 K head_dim min(T, C) elements (Llama 4
has C = F = 8,192 and a = 0.1); a global layer's grows, 2 K head_dim a token. Source: the Llama 4 modules of transformers.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from mla.attention.contract import Surroundings, mechanism, require
from mla.layers.basic import RMSNorm, unit_rms

GQAConfig, GroupedQuery = mechanism("gqa")


@dataclasses.dataclass
class ChunkedConfig(GQAConfig):  # type: ignore[misc, valid-type]
    """A local layer.

    Paper: Llama 4 (transformers' module)
    Remembers: k and v of at most one chunk, in a ring
    Elements: 2 K d_h, at most C tokens
    Use: local layers whose text falls into pieces
    """

    takes_qk_norm: ClassVar[bool] = False  # it has `unit_norm`

    chunk: int = 128  # tokens of a chunk; 0: all tokens are one
    unit_norm: bool = True  # q and k are divided by their root mean square after the rotation
    temperature_floor: int = 0  # F in tokens; 0: no temperature
    temperature_scale: float = 0.1  # a

    def visible(self) -> int | None:
        return min(filter(None, (self.window, self.chunk)), default=None)

    def validate(self, around: Surroundings) -> None:
        super().validate(around)
        one = not (self.window and self.chunk)
        require(one, "window", f"{self.window} beside chunk {self.chunk}: a layer has a window or chunks, set one to 0")


@dataclasses.dataclass
class ChunkedGlobalConfig(ChunkedConfig):
    """A global layer.

    Paper: Llama 4 (transformers' module)
    Remembers: k and v, without positions
    Elements: 2 K d_h
    Use: global layers between `chunked` ones: NoPE, and a temperature that grows with t
    """

    chunk: int = 0  # all tokens are one chunk
    rope_fraction: float = 0.0  # NoPE
    unit_norm: bool = False
    temperature_floor: int = 8192  # F in tokens


class Chunked(GroupedQuery):  # type: ignore[misc, valid-type]
    """Grouped-query attention within chunks, or over all tokens with a temperature that grows with the position."""

    def __init__(self, config: ChunkedConfig, around: Surroundings, *, rngs: nnx.Rngs):
        super().__init__(config, around, rngs=rngs)
        self.chunk = config.chunk or None

    def place(self, x: jax.Array, norm: RMSNorm | None, positions: jax.Array) -> jax.Array:
        placed = super().place(x, norm, positions)
        return unit_rms(placed, self.around.norm_eps) if self.config.unit_norm else placed

    def queries(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        queries, floor = super().queries(x, positions), self.config.temperature_floor
        if not floor:
            return queries
        grown = jnp.log1p(((positions + 1) // floor).astype(jnp.float32))
        return queries * (1 + self.config.temperature_scale * grown)[..., None, None].astype(queries.dtype)
