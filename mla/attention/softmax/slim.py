"""Slim attention (2503.05840): multi-head attention that remembers keys only.

Where W_K is square and invertible (H head_dim = D), values are a linear map of the keys of all heads:

    V = x W_V = (x W_K) M,   M = W_K^-1 W_V        (H head_dim > D: M = W_K^T (W_K W_K^T)^-1 W_V)

so k alone, before its rotation, is enough: H head_dim elements a token, half of MHA's, and all of it on every device, since
a head's value needs every head's key. Keys are rotated when they are read. `from_mha` turns the weights of a trained MHA
into this module's; trained from the start, M is a parameter. The two forms:

  expanded   values are built from the keys, then ordinary multi-head attention; 2 (H head_dim)^2 FLOPs an entry.
  absorbed   o_i = (p_i K) M_i: heads mix the keys of all heads, M acts once a query. (H + 1) / 2 times the FLOPs of MHA.

Legend: B batch, S queries, C entries, H query heads, K key-value heads, d = head_dim, E = K d.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mla.attention.contract import Surroundings, mechanism, require
from mla.attention.softmax.base import AbsorbingConfig, AbsorbingMixer, Cost, Expanded
from mla.layers.basic import FROM_LATENT, TO_HEADS, Linear, merge_heads, split_heads
from mla.ops.mask import Mask

MHAConfig, GroupedQuery = mechanism("mha")


class Keys(NamedTuple):
    """[B, T, 1, E]: the keys of all heads, before norm and rotation."""

    key: jax.Array


@dataclasses.dataclass
class SlimConfig(AbsorbingConfig, MHAConfig):  # type: ignore[misc, valid-type]
    """Multi-head attention that remembers keys only.

    Paper: 2503.05840
    Remembers: keys of every head, before their rotation
    Elements: H d_h
    Use: a *trained* MHA at half the bytes, exactly: `eval.py --as_mechanism=slim`
    """

    def validate(self, around: Surroundings) -> None:
        super().validate(around)
        width = self.heads(around) * self.width(around)
        enough = width >= around.d_model
        require(
            enough, "head_dim", f"heads have {width} key channels, fewer than d_model {around.d_model}: keys lose values"
        )
        require(not self.value_norm, "value_norm", "with a norm, values are no matrix times the keys; set it to false")

    def elements(self, around: Surroundings) -> int:
        return self.heads(around) * self.width(around)


class Slim(AbsorbingMixer, GroupedQuery):  # type: ignore[misc, valid-type]
    """Multi-head attention whose values are built from the keys of all heads, by M [E, K, d], as they are read."""

    paged: ClassVar[bool] = False  # keys are cached before their rotation

    def __init__(self, config: SlimConfig, around: Surroundings, *, rngs: nnx.Rngs):
        super().__init__(config, around, rngs=rngs)
        self.make_values({"rngs": rngs, "dtype": around.dtype})

    def make_entries(self, make: dict[str, Any]) -> None:
        self.key = Linear(self.around.d_model, self.num_kv_heads * self.head_dim, TO_HEADS, **make)

    def make_values(self, make: dict[str, Any]) -> None:
        """The parameters behind `value_map`, and the norm of keys: both act on read, in layers that read another's too."""
        self.key_norm = self.make_norm()
        width = self.num_kv_heads * self.head_dim
        self.value_from_key = Linear(width, width, FROM_LATENT, **make)  # keys are the latent of values

    def value_map(self) -> jax.Array:
        """M [E, K, d], from the keys of all heads to each head's values."""
        return self.value_from_key.heads(self.num_kv_heads)

    def entries(self, x: jax.Array, positions: jax.Array) -> Keys:
        return Keys(split_heads(self.key(x), 1))

    def shift(self, entries: Keys, by: jax.Array) -> Keys:
        return entries  # they are rotated on read

    sparing: ClassVar[tuple[str, ...]] = ("value_from_key",)  # as `costs` has it

    def costs(self) -> tuple[Cost, Cost]:
        heads, width, all_keys = self.num_heads, self.head_dim, self.num_kv_heads * self.head_dim
        expanded = Cost(pair=4 * heads * width, entry=2 * all_keys**2)
        return expanded, Cost(pair=2 * heads * (width + all_keys), query=2 * heads * width * all_keys)

    def keys(self, entries: Keys, mask: Mask) -> jax.Array:
        """[B, C, K, d], rotated to where each entry stands."""
        return self.place(split_heads(merge_heads(entries.key), self.num_kv_heads), self.key_norm, mask.entry_positions)

    def expanded(self, queries: jax.Array, entries: Keys, mask: Mask) -> Expanded:
        values = jnp.einsum("bcoe,ekd->bckd", entries.key, self.value_map())
        return Expanded((queries,), (self.keys(entries, mask),), values, self.scale)

    def attend_absorbed(self, queries: jax.Array, entries: Keys, mask: Mask) -> jax.Array:
        mixed = self.softmax((queries,), (self.keys(entries, mask),), entries.key, mask, self.scale)
        mixed = mixed.reshape(*mixed.shape[:2], self.num_kv_heads, -1, mixed.shape[-1])  # [B, S, K, H / K, E]
        values = jnp.einsum("bskge,ekd->bskgd", mixed, self.value_map())
        return values.reshape(*values.shape[:2], -1)


def from_mha(parameters: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """The parameters of `mha` (one layer, nested dict) as those of `slim`, solved in float64.

    Returns:
      The parameters, and the condition number of W_K: about so many fp32 roundings (6e-8) of error in the values.

    Raises:
      ValueError: keys are narrower than x, or were projected by a matrix without an inverse.
    """
    key, value = (np.asarray(parameters[name]["kernel"], np.float64) for name in ("key", "value"))
    if key.shape[1] < key.shape[0] or value.shape != key.shape:
        raise ValueError(
            f"W_K is {key.shape}, W_V is {value.shape}: slim needs as many key channels as x has, and MHA's values"
        )
    condition = float(np.linalg.cond(key))
    if not condition < 1e12:
        raise ValueError(f"W_K has condition number {condition:.1e}: values cannot be recovered from its keys")
    solved = np.linalg.lstsq(key, value, rcond=None)[0]  # the solution of least norm: the right inverse
    solved = solved.astype(parameters["key"]["kernel"].dtype)
    kept = {name: part for name, part in parameters.items() if name != "value"}
    return kept | {"value_from_key": {"kernel": solved}}, condition


def to_mha(parameters: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """The parameters of `slim` (one layer, nested dict) as those of `mha`: W_V = W_K M, multiplied in float64.

    Returns:
      The parameters, and 1: nothing is solved.
    """
    key, mapped = (np.asarray(parameters[name]["kernel"], np.float64) for name in ("key", "value_from_key"))
    value = (key @ mapped).astype(parameters["key"]["kernel"].dtype)
    kept = {name: part for name, part in parameters.items() if name != "value_from_key"}
    return kept | {"value": {"kernel": value}}, 1.0
