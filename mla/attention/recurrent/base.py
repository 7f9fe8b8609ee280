"""What recurrent mechanisms inherit: state, convolution tail, padding, chunks; subclasses write what goes in and comes out.

    inputs    x -> what passes through a short causal convolution first, by name; nothing for mechanisms without one
    tokens    x and the convolved inputs -> queries, keys, values, decay and erase vectors of `mla.ops.recurrence`
    finished  what was read of the state -> outputs

Legend: B batch, S new tokens, N = B S of them, D model width, H heads, F heads of queries and keys (a divisor of H), K key
channels, V value channels.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from mla.attention.contract import MechanismConfig, Mixer, Surroundings, Term, constant, require
from mla.cache.stores import LayerCache, State, StoreSpec, Tail
from mla.layers.basic import wide_dtype
from mla.layers.convolution import ShortConvolution
from mla.ops.recurrence import chunk_flops, linear_recurrence, step_flops


@dataclasses.dataclass
class RecurrentConfig(MechanismConfig):
    """Fields that every mechanism with a chunked recurrence has. A subclass writes `shape` and `convolved`."""

    chunk: int = 64  # tokens handled at once in training and prefill; changes speed, not results

    def shape(self, around: Surroundings) -> tuple[int, int, int]:
        """Of the state: heads H, key channels K, value channels V."""
        raise NotImplementedError

    def convolved(self, around: Surroundings) -> tuple[int, int]:
        """Taps of the convolution and channels that pass through it; 0 taps: there is none."""
        return 0, 0

    def validate(self, around: Surroundings) -> None:
        super().validate(around)
        require(self.chunk >= 1, "chunk", f"{self.chunk} is not a positive number of tokens")
        self.shape(around)

    def cache_formula(self, around: Surroundings) -> list[Term]:
        (heads, keys, values), (taps, channels) = self.shape(around), self.convolved(around)
        tail = [constant((taps - 1) * channels, itemsize=0)] if taps else []
        return [constant(heads * keys * values), *tail]


class Tokens(NamedTuple):
    """What tokens give to the recurrence, see `mla.ops.recurrence`.

    queries and keys [N, F, K], values [N, H, V], decay [N, H, 1 or K] or None, erase [N, H, K] or None.
    """

    queries: jax.Array
    keys: jax.Array
    values: jax.Array
    decay: jax.Array | None = None
    erase: jax.Array | None = None


C = TypeVar("C", bound=MechanismConfig)
Channels = dict[str, jax.Array]  # [N or B, S, channels] each


class RecurrentMixer(Mixer[C, None], Generic[C]):
    """A mechanism that remembers a state of constant size.

    One on the chunked recurrence has a `RecurrentConfig` and writes `tokens`, `finished` and, with a convolution, `inputs`;
    another one declares `stores` and writes `recur`.
    """

    private: ClassVar[str] = "a state and no entries"
    convolution: ShortConvolution | None = None

    def inputs(self, x: jax.Array) -> Channels:
        """What of x [B, S, D] passes through the convolution: the inputs of `self.convolution`."""
        raise NotImplementedError

    def tokens(self, x: jax.Array, inputs: Channels, positions: jax.Array) -> Tokens:
        """What x [N, D] gives to the recurrence; `inputs` have passed the convolution; int32 positions [N], -1 padding."""
        raise NotImplementedError

    def finished(self, x: jax.Array, inputs: Channels, heads: jax.Array) -> jax.Array:
        """Outputs [N, D] of what was read of the state, [N, H, V] in the dtype of the state."""
        raise NotImplementedError

    @property
    def wide(self) -> Any:
        """The dtype of the state."""
        return wide_dtype(self.around.dtype)

    def stores(self) -> dict[str, StoreSpec]:
        config: Any = self.config
        stores: dict[str, StoreSpec] = {"state": State(jax.ShapeDtypeStruct(config.shape(self.around), self.wide))}
        if self.convolution is not None:
            stores["tail"] = Tail(self.convolution.token(), self.convolution.taps - 1)
        return stores

    def recur(self, x: jax.Array, positions: jax.Array | None, before: LayerCache) -> tuple[jax.Array, LayerCache]:
        """Outputs [B, S, D] of new tokens x [B, S, D] after what is remembered, and what is remembered after them.

        positions: int32 [B, S]; -1 is padding, which must leave no trace: no decay of a state, nothing added to it, and the
        tail of a convolution as it was (`TailCache.line` sees to that); its outputs are 0. None: all are tokens of a text,
        at positions 0 .. S-1.
        """
        config: Any = self.config
        inputs: Channels = {}
        if self.convolution is not None:
            inputs, tail = self.convolution(self.inputs(x), positions, before["tail"])
            before = before.replace(tail=tail)
        rows, inputs = _rows(x), jax.tree.map(_rows, inputs)
        stand = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2]) if positions is None else positions
        tokens = self.tokens(rows, inputs, stand.reshape(-1))
        if positions is not None:
            tokens = Tokens(*jax.tree.map(lambda a: only_real(a, positions.reshape(-1)), tuple(tokens)))
        tokens = Tokens(*jax.tree.map(lambda a: a.reshape(*x.shape[:2], *a.shape[1:]), tuple(tokens)))
        where: dict[str, Any] = {"backend": self.around.recurrence_backend, "platform": self.around.platform}
        heads, state = linear_recurrence(*tokens[:3], before["state"].state, *tokens[3:], chunk=config.chunk, **where)
        y = self.finished(rows, inputs, _rows(heads)).reshape(x.shape)
        y = y if positions is None else only_real(y, positions)
        return y, before.replace(state=before["state"].holding(state, positions))

    def mixing_flops(self, tokens: int, decode: bool = False) -> float:
        """Those of the recurrence: they do not depend on `tokens`."""
        config: Any = self.config
        graph, state = nnx.split(self)

        def given(state: Any, x: jax.Array) -> Tokens:
            mixer = nnx.merge(graph, state)
            inputs = {} if mixer.convolution is None else mixer.inputs(x)
            return mixer.tokens(x, inputs, jnp.zeros((1,), jnp.int32))

        shapes = jax.eval_shape(given, state, jax.ShapeDtypeStruct((1, self.around.d_model), self.around.dtype))
        (heads, values), (served, keys) = shapes.values.shape[1:], shapes.keys.shape[1:]
        sizes: dict[str, int] = {"heads": heads, "served": served, "keys": keys, "values": values}
        delta = shapes.erase is not None
        if decode:
            return step_flops(heads, keys, values, delta)
        channels = 0 if shapes.decay is None else shapes.decay.shape[-1]
        return chunk_flops(**sizes, decays=channels, delta=delta, chunk=config.chunk)

    def text_flops(self, tokens: int) -> float:
        return self.mixing_flops(tokens)

    def __call__(self, x: jax.Array, positions: jax.Array | None = None) -> jax.Array:
        empty = self.init_cache(x.shape[0], x.shape[1], self.around.dtype)
        where = None if positions is None else jnp.broadcast_to(positions, x.shape[:2])
        return self.recur(x, where, empty)[0]

    def extend(self, x: jax.Array, positions: jax.Array, cache: LayerCache) -> tuple[jax.Array, LayerCache]:
        return self.recur(x, positions, cache)


def only_real(a: jax.Array, positions: jax.Array) -> jax.Array:
    """a [B, S, ...] or [N, ...], 0 where int32 positions [B, S] or [N] say padding."""
    lead = positions.ndim
    return jnp.where((positions >= 0).reshape(*positions.shape, *(1,) * (a.ndim - lead)), a, jnp.zeros((), a.dtype))


def _rows(a: jax.Array) -> jax.Array:
    """[B, S, ...] -> [N, ...]: XLA sums over an axis of an array that begins with a batch of 1 ten times slower on a CPU."""
    return a.reshape(-1, *a.shape[2:])
