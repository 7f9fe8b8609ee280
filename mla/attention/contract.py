"""What a mechanism must provide, what it inherits, and the registry.

A mechanism is one file: a config dataclass and a module. The module is a `Mixer`; the equation it must satisfy, tested
for every mechanism in every split, is

    mixer(x, positions) == mixer.extend(x, positions, empty cache) == any sequence of extends over pieces of x

Softmax mechanisms derive from `SoftmaxMixer` and differ in `queries`, `entries` and `attend`; caches, windows, rings and
byte accounting come with it. Recurrent mechanisms derive from `RecurrentMixer` and differ in `recur`.

Legend: B batch, T tokens of a training batch, S new tokens, C cached tokens, D model width, H query heads.
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mla.attention.layers import Linear
from mla.cache.state import StateCache
from mla.cache.tokens import TokenCache
from mla.errors import UserError
from mla.ops.attention import softmax_attention
from mla.ops.mask import Mask

# name -> where its config and its module stand. One line a mechanism.
REGISTRY = {
    "mha": "mla.attention.grouped_query:MHAConfig:GroupedQuery",
    "mqa": "mla.attention.grouped_query:MQAConfig:GroupedQuery",
    "gqa": "mla.attention.grouped_query:GQAConfig:GroupedQuery",
    "mla": "mla.attention.mla:MLAConfig:MLA",
    "sliding_window": "mla.attention.sliding_window:SlidingWindowConfig:SlidingWindow",
    "linear": "mla.attention.linear:LinearConfig:LinearAttention",
}


@dataclasses.dataclass(frozen=True)
class Surroundings:
    """What a mechanism is told about the model around it; everything else is in its own config.

    Attributes:
      d_model, num_heads, num_layers, context: sizes of the model; context in tokens.
      dtype: compute dtype; parameters are fp32.
      rope_theta, norm_eps, qk_norm: choices shared by all mechanisms of a comparison.
      backend: attention op, see `mla.ops.attention`.
    """

    d_model: int
    num_heads: int
    num_layers: int = 1
    context: int = 1024
    dtype: Any = jnp.float32
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    qk_norm: bool = False
    backend: str = "auto"

    @property
    def residual_gain(self) -> float:
        """Gain of projections that write into the residual stream: its variance stays of order one at any depth (GPT-2)."""
        return (2 * self.num_layers) ** -0.5


@dataclasses.dataclass(frozen=True)
class CacheFormula:
    """The published size of one layer's cache, in stored elements for one sequence.

    Attributes:
      per_token: elements a token, while the cache grows.
      window: tokens after which it stops growing, None if it never does.
      constant: elements held from the start, whatever the length.
      state_itemsize: bytes per element of the constant part (states are kept in fp32).
    """

    per_token: int = 0
    window: int | None = None
    constant: int = 0
    state_itemsize: int = 4

    def bytes_at(self, length: int, itemsize: int) -> int:
        """Bytes after `length` tokens when streams take `itemsize` bytes an element."""
        tokens = length if self.window is None else min(length, self.window)
        return self.per_token * tokens * itemsize + self.constant * self.state_itemsize

    @property
    def growth(self) -> int:
        """Elements a token in the long run."""
        return self.per_token if self.window is None else 0


@dataclasses.dataclass
class MechanismConfig:
    """Base of every mechanism's config. Sizes of 0 mean: derived, as the field's comment says."""

    def validate(self, around: Surroundings) -> None:
        """Raises UserError, naming the field, where the sizes cannot work."""

    def cache_formula(self, around: Surroundings) -> CacheFormula:
        """The paper's figure, written independently of the code that stores the entries."""
        raise NotImplementedError


def require(condition: object, field: str, message: str) -> None:
    """Refuses a mechanism's config with one line that names the field."""
    if not condition:
        raise UserError(f"config.model.mechanism.{field}: {message}")


def mechanism(name: str) -> tuple[type[MechanismConfig], type[Mixer]]:
    """The config class and the module class registered under `name`.

    Raises:
      UserError: unknown name; the message has the nearest match.
    """
    if name not in REGISTRY:
        from difflib import get_close_matches

        near = get_close_matches(name, REGISTRY, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(REGISTRY)}"
        raise UserError(f"unknown mechanism {name!r}: {hint}")
    module, config, mixer = REGISTRY[name].split(":")
    found = importlib.import_module(module)
    return getattr(found, config), getattr(found, mixer)


class Mixer(nnx.Module):
    """Mixes information between tokens; one per layer. `config` and `around` say how it was built."""

    def __init__(self, config: Any, around: Surroundings, *, rngs: nnx.Rngs):
        del rngs  # subclasses draw their parameters from it
        self.config = config
        self.around = around

    def __call__(self, x: jax.Array, positions: jax.Array | None = None) -> jax.Array:
        """Training: [B, T, D] -> [B, T, D], causal, parallel over T, no cache. No positions means 0 .. T-1 in every row."""
        raise NotImplementedError

    def init_cache(self, batch: int, capacity: int, dtype: Any) -> Any:
        """An empty cache for `capacity` tokens with streams of `dtype`; allocates nothing under `jax.eval_shape`."""
        raise NotImplementedError

    def extend(self, x: jax.Array, positions: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        """S >= 1 new tokens [B, S, D] at int32 positions [B, S] (-1: padding): their outputs, and the cache after them."""
        raise NotImplementedError


class SoftmaxMixer(Mixer):
    """Attention by softmax over remembered entries. Subclasses write three small functions and own `self.out`.

    `window` and `chunk` (static, tokens or None) describe visibility; a window also makes the cache a ring.
    """

    window: int | None = None
    chunk: int | None = None
    out: Linear

    def queries(self, x: jax.Array, positions: jax.Array) -> Any:
        """What asks."""
        raise NotImplementedError

    def entries(self, x: jax.Array, positions: jax.Array) -> Any:
        """What is remembered: a NamedTuple of per-token streams [B, T, ...], and the only thing that is cached."""
        raise NotImplementedError

    def attend(self, queries: Any, entries: Any, mask: Mask) -> jax.Array:
        """How they meet: head outputs [B, S, H * v_head_dim], before the output projection."""
        raise NotImplementedError

    def read(self, x: jax.Array, positions: jax.Array, entries: Any, mask: Mask) -> jax.Array:
        """Attention of x [B, S, D] over entries from anywhere: this layer's, a cache's, another layer's."""
        return self.out(self.attend(self.queries(x, positions), entries, mask))

    def __call__(self, x: jax.Array, positions: jax.Array | None = None) -> jax.Array:
        contiguous = positions is None
        if positions is None:
            positions = jnp.arange(x.shape[1], dtype=jnp.int32)[None]  # one row: rotations broadcast over the batch
        where = jnp.broadcast_to(positions, x.shape[:2])
        mask = Mask(where, where, self.window, self.chunk, contiguous)
        return self.read(x, positions, self.entries(x, positions), mask)

    def init_cache(self, batch: int, capacity: int, dtype: Any) -> TokenCache:
        graph, state = nnx.split(self)
        token = jax.ShapeDtypeStruct((batch, 1, self.around.d_model), self.around.dtype)
        position = jax.ShapeDtypeStruct((batch, 1), jnp.int32)
        like = jax.eval_shape(lambda s, x, p: nnx.merge(graph, s).entries(x, p), state, token, position)
        return TokenCache.empty(like, batch, capacity, dtype, self.window or self.chunk)

    def extend(self, x: jax.Array, positions: jax.Array, cache: TokenCache) -> tuple[jax.Array, TokenCache]:
        entries, entry_positions, cache = cache.extend(self.entries(x, positions), positions)
        entries = jax.tree.map(lambda a: a.astype(self.around.dtype), entries)
        mask = Mask(positions, entry_positions, self.window, self.chunk)
        return self.read(x, positions, entries, mask), cache

    def softmax(self, queries: Any, keys: Any, values: jax.Array, mask: Mask, scale: float) -> jax.Array:
        """The shared softmax op, with this model's backend: [B, S, H, Dv]. Arguments as `softmax_attention`."""
        # cuDNN's kernel trains; a cache's positions are not contiguous.
        training_only = self.around.backend == "cudnn" and not mask.contiguous
        backend = "auto" if training_only else self.around.backend
        return softmax_attention(queries, keys, values, mask, scale=scale, backend=backend)


class RecurrentMixer(Mixer):
    """A mechanism that remembers a state of constant size. Subclasses write `empty_state` and `recur`."""

    def empty_state(self, batch: int) -> Any:
        """The state before the first token: a pytree of fp32 arrays [B, ...]."""
        raise NotImplementedError

    def recur(self, x: jax.Array, real: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        """x [B, S, D] of which `real` bool [B, S] are no padding, and a state -> outputs [B, S, D] and the new state."""
        raise NotImplementedError

    def __call__(self, x: jax.Array, positions: jax.Array | None = None) -> jax.Array:
        real = jnp.ones(x.shape[:2], bool) if positions is None else jnp.broadcast_to(positions >= 0, x.shape[:2])
        return self.recur(x, real, self.empty_state(x.shape[0]))[0]

    def init_cache(self, batch: int, capacity: int, dtype: Any) -> StateCache:
        return StateCache(self.empty_state(batch))

    def extend(self, x: jax.Array, positions: jax.Array, cache: StateCache) -> tuple[jax.Array, StateCache]:
        y, state = self.recur(x, positions >= 0, cache.state)
        return y, StateCache(state)
