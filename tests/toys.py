"""Toy mechanisms that keep what no mechanism here does yet: a tail beside a state, pooled entries, three stores in a layer.

They show that the contract carries such stores: tests of every mechanism run over them too.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mla.attention.contract import MechanismConfig, Surroundings, Term, constant
from mla.attention.recurrent.base import RecurrentMixer
from mla.attention.softmax.base import Expanded, Memory, SoftmaxConfig, SoftmaxMixer
from mla.attention.softmax.grouped_query import KeyValue
from mla.cache.clock import NEVER, Clock
from mla.cache.stores import Entries, LayerCache, State, StoreSpec, Tail
from mla.layers.basic import TO_HEADS, Linear, matrix, split_heads, wide_dtype

TAPS = 4


@dataclasses.dataclass
class ConvolvedConfig(MechanismConfig):
    def cache_formula(self, around: Surroundings) -> list[Term]:
        width = around.d_model
        return [constant(width * width), constant((TAPS - 1) * width, itemsize=0)]


class Convolved(RecurrentMixer):
    """u = a causal convolution of x over four tokens; S_t = 0.95 S_{t-1} + u_t^T u_t in fp32; y_t = x_t S_t / D."""

    def __init__(self, config: Any, around: Surroundings, *, rngs: nnx.Rngs):
        super().__init__(config, around, rngs=rngs)
        self.taps = matrix(jax.random.normal(rngs.params(), (TAPS, around.d_model)), (None, "head_channels"))

    def stores(self) -> dict[str, StoreSpec]:
        width, wide = self.around.d_model, wide_dtype(self.around.dtype)
        state = State(jax.ShapeDtypeStruct((width, width), wide))
        return {"state": state, "tail": Tail(jax.ShapeDtypeStruct((width,), wide), TAPS - 1)}

    def recur(self, x: jax.Array, positions: jax.Array | None, before: LayerCache) -> tuple[jax.Array, LayerCache]:
        positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2]) if positions is None else positions
        real, count, wide = positions >= 0, x.shape[1], before["state"].state.dtype
        line = before["tail"].line(jnp.where(real[..., None], x, 0), positions)
        taps = self.taps[...].astype(x.dtype)
        mixed = sum(line[:, tap : tap + count] * taps[tap] for tap in range(TAPS)).astype(wide) * real[..., None]

        def step(state: jax.Array, token: Any) -> tuple[jax.Array, jax.Array]:
            query, key, decay = token
            state = decay[:, None, None] * state + key[:, :, None] * key[:, None]
            return state, jnp.einsum("bd,bde->be", query, state)

        tokens = (x.astype(wide), mixed, jnp.where(real, 0.95, 1.0).astype(wide))
        state, y = jax.lax.scan(step, before["state"].state, jax.tree.map(lambda a: a.swapaxes(0, 1), tokens))
        y = jnp.where(real[..., None], y.swapaxes(0, 1), 0).astype(x.dtype) / x.shape[-1]
        return y, before.replace(state=before["state"].holding(state, positions), tail=before["tail"].after(line, positions))


@dataclasses.dataclass
class PooledConfig(SoftmaxConfig):
    stride: int = 4  # tokens whose mean is one entry
    held: int = 0  # entries that are held at most; 0: all
    near: int = 0  # newest tokens that are looked at singly too, besides the entries; 0: those of the open window

    def cache_formula(self, around: Surroundings) -> list[Term]:
        token = 2 * around.d_model
        terms = [Term(token, stride=self.stride, window=self.held or None), constant((self.stride - 1) * token, itemsize=0)]
        return [*terms, Term(token, window=self.near)] if self.near else terms


class Pooled(SoftmaxMixer):
    """Entries that are means of `stride` tokens' keys and values, and single tokens: of the window that is still open, or
    the `near` newest ones. No rotation."""

    private = "pooled entries and tokens"

    def __init__(self, config: Any, around: Surroundings, *, rngs: nnx.Rngs):
        super().__init__(config, around, rngs=rngs)
        width, make = around.d_model, {"rngs": rngs, "dtype": around.dtype}
        self.query, self.key, self.value = (Linear(width, width, TO_HEADS, **make) for _ in range(3))
        self.make_output(width // self.num_heads, rngs)

    def queries(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        return split_heads(self.query(x), self.num_heads)

    def entries(self, x: jax.Array, positions: jax.Array) -> KeyValue:
        return KeyValue(split_heads(self.key(x), self.num_heads), split_heads(self.value(x), self.num_heads))

    def expanded(self, queries: Any, entries: Any, mask: Any) -> Expanded:
        return Expanded((queries,), (entries.key,), entries.value, queries.shape[-1] ** -0.5)

    def stores(self) -> dict[str, StoreSpec]:
        like, stride, near = self.streams(), self.config.stride, self.config.near
        token = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[2:], a.dtype), like)
        pooled: dict[str, StoreSpec] = {
            "pooled": Entries(like, Clock(stride, self.config.held or None)),
            "open": Tail(token, stride - 1),
        }
        return pooled | ({"near": Entries(like, Clock(window=near))} if near else {})

    def remember(self, x: Any, positions: Any = None, cache: LayerCache | None = None) -> tuple[Memory, LayerCache]:
        where = jnp.broadcast_to(jnp.arange(x.shape[1]) if positions is None else positions, x.shape[:2])
        before = cache or self.init_cache(x.shape[0], x.shape[1], self.around.dtype)
        new, clock, tail = self.entries(x, where), before["pooled"].clock, before["open"]
        line, stands = tail.line(new, where), tail.where(where)
        index, ends = clock.beats(where)
        mean = jax.tree.map(lambda a: jax.vmap(lambda rows, i: _window(rows, i, clock.stride))(a, index), line)
        seen, pooled = before["pooled"].extend(mean, ends)
        after = before.replace(pooled=pooled, open=tail.after(line, where))
        single, until = line, (stands // clock.stride + 1) * clock.stride - 1
        if self.config.near:
            newest, near = before["near"].extend(new, where)
            single, stands, after = newest.read(x.dtype), newest.positions, after.replace(near=near)
            until = stands + self.config.near
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), seen.read(x.dtype), single)
        of_pooled = jnp.full_like(seen.positions, NEVER) if seen.until is None else seen.until
        lives = jnp.concatenate([of_pooled, until], axis=1)
        return Memory(both, jnp.concatenate([seen.positions, stands], axis=1), until=lives), after


def _window(rows: jax.Array, index: jax.Array, stride: int) -> jax.Array:
    """Means of `stride` rows from each index on."""
    return rows[index[:, None] + jnp.arange(stride)].mean(axis=1)
