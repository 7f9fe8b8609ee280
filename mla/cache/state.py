"""Stores whose size does not depend on the number of tokens: running states, and tails of the newest tokens.

Legend: B batch, S new tokens, R tokens of a tail.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp

from mla.cache.codecs import Codec
from mla.cache.contract import Meaning, replaced


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CodedArray:
    """An array as a codec stores it, vectors along its last axis: there is no other copy of it.

    Attributes:
      payload: what `codec.encode` returns, a pytree of arrays with the leading axes of the array.
      codec, dtype: static; dtype is that of the array.
    """

    payload: Any
    codec: Codec = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})

    @classmethod
    def zeros(cls, like: jax.ShapeDtypeStruct, codec: Codec) -> CodedArray:
        """Zeros: every codec decodes an empty payload to them."""
        payload = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(codec.encode, like))
        return cls(payload, codec, like.dtype)

    def read(self) -> jax.Array:
        return self.codec.decode(self.payload, self.dtype)

    def holding(self, new: jax.Array, changed: jax.Array | None) -> CodedArray:
        """new [B, ...] instead, coded, in the rows that `changed`, bool [B], says (None: all). Others keep their codes."""
        payload = self.codec.encode(new)
        if changed is not None:
            payload = jax.tree.map(lambda old, fresh: _choose(changed, fresh, old), self.payload, payload)
        return dataclasses.replace(self, payload=payload)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StateCache:
    """A state: a pytree of arrays, batch first, each in its declared dtype (fp32 where it is a running sum).

    Attributes:
      stored: the arrays, or `CodedArray` in the place of each: a state is coded between calls, and exact within one.
      names: static, what their axes mean.
    """

    stored: Any
    names: tuple[str | None, ...] = dataclasses.field(default=("batch", "head"), metadata={"static": True})

    @property
    def state(self) -> Any:
        """The arrays, decoded."""
        return jax.tree.map(lambda part: part.read() if _is_coded(part) else part, self.stored, is_leaf=_is_coded)

    def holding(self, state: Any, positions: jax.Array | None = None) -> Self:
        """This store with another state, stored as this one is.

        Args:
          state: a pytree of arrays.
          positions: int32 [B, S], of the tokens between the two states; -1 is padding, and a row of nothing else keeps its
            codes as they are. None: there is none.
        """
        changed = None if positions is None else (positions >= 0).any(axis=1)

        def one(old: Any, new: jax.Array) -> Any:
            return old.holding(new, changed) if _is_coded(old) else new

        return dataclasses.replace(self, stored=jax.tree.map(one, self.stored, state, is_leaf=_is_coded))

    def content(self) -> Any:
        """The arrays that count as content when bytes are measured."""
        return self.stored

    def bookkeeping(self) -> Any:
        return None

    def axes(self) -> Any:
        """What the axes of its arrays mean, in their place; see `Meaning`."""
        return replaced(self, stored=Meaning(self.names))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TailCache(StateCache):
    """The newest R tokens' inputs to something that looks back so far: a convolution, a pooling window.

    `state` holds arrays [B, R, ...], the newest token last, zeros where there has been none. They are never coded.
    """

    names: tuple[str | None, ...] = dataclasses.field(default=("batch", "slot", "head"), metadata={"static": True})

    def line(self, new: Any, positions: jax.Array | None) -> Any:
        """The tail and S new tokens behind one another.

        Args:
          new: a pytree like the state, [B, S, ...] each.
          positions: int32 [B, S]; -1 is padding, before or behind a row's tokens. None: there is none.

        Returns:
          Arrays [B, R + S, ...] in the dtypes of `new`. Row R + i is new token i and, unless that is padding, the R rows
          before it are the R tokens before it.
        """
        if positions is None:
            return jax.tree.map(lambda old, fresh: jnp.concatenate([old.astype(fresh.dtype), fresh], 1), self.state, new)
        ahead, kept = _padding(positions)[0], jax.tree.leaves(self.state)[0].shape[1]
        rows = jnp.arange(kept + positions.shape[1])
        index = jnp.where(rows < kept + ahead, jnp.maximum(rows - ahead, 0), rows)  # the tail moves up to the first token

        def join(old: jax.Array, fresh: jax.Array) -> jax.Array:
            return _take(jnp.concatenate([old.astype(fresh.dtype), fresh], axis=1), index)

        return jax.tree.map(join, self.state, new)

    def where(self, positions: jax.Array) -> jax.Array:
        """int32 [B, R + S]: where the rows of `line` stand in the text, -1 for those that are no token of it."""
        (ahead, behind), kept = _padding(positions), jax.tree.leaves(self.state)[0].shape[1]
        rows, count = jnp.arange(kept + positions.shape[1], dtype=jnp.int32), positions.shape[1]
        first = jnp.take_along_axis(positions, jnp.minimum(ahead, count - 1), axis=1)
        stands = first + rows - kept - ahead
        return jnp.where((first >= 0) & (rows >= ahead) & (rows < kept + count - behind), jnp.maximum(stands, -1), -1)

    def after(self, line: Any, positions: jax.Array | None) -> TailCache:
        """The tail once these tokens have been seen: `line` and `positions` as in the method of that name."""
        if positions is None:
            newest = jax.tree.map(lambda old, whole: whole[:, -old.shape[1] :].astype(old.dtype), self.state, line)
            return self.holding(newest)
        behind = _padding(positions)[1]

        def last(old: jax.Array, whole: jax.Array) -> jax.Array:
            start = positions.shape[1] - behind
            return _take(whole, start + jnp.arange(old.shape[1])).astype(old.dtype)

        return self.holding(jax.tree.map(last, self.state, line))


def _is_coded(part: Any) -> bool:
    return isinstance(part, CodedArray)


def _choose(rows: jax.Array, yes: jax.Array, no: jax.Array) -> jax.Array:
    """[B, ...] by bool [B]."""
    return jnp.where(rows.reshape(-1, *(1,) * (yes.ndim - 1)), yes, no)


def _padding(positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """int32 [B, 1] each: how much padding is ahead of a row's tokens and behind them. A row of nothing else has it ahead."""
    real = positions >= 0
    ahead = jnp.where(real.any(axis=1), jnp.argmax(real, axis=1), positions.shape[1])
    return ahead[:, None].astype(jnp.int32), jnp.argmax(real[:, ::-1], axis=1)[:, None].astype(jnp.int32)


def _take(array: jax.Array, index: jax.Array) -> jax.Array:
    """array [B, n, ...] at index [B, m]: [B, m, ...]."""
    return jax.vmap(lambda a, i: a[i])(array, index)
