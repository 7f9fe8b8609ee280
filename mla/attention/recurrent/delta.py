"""DeltaNet (2406.06484; the rule: Schlag et al., 2102.11174): a key's old value is taken out before its new one is written.

    q, k = L2(SiLU(conv(x W_q))), L2(SiLU(conv(x W_k)))    v = SiLU(conv(x W_v))    beta = sigmoid(x W_beta), one a head
    S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T        o_t = S_t^T q_t / sqrt(d_k)        y = RMSNorm(o) W_O

conv is causal, over four tokens, each channel on its own; the norm is each head's. With `negative_eigenvalues` beta is
doubled (2411.12537): a key's value may change its sign. Followed is the later paper's form, which its code has too, not the
features of 2021 (elu + 1 or DPFP, whose sum is normed to 1).

Mechanisms that decay the state too derive from this one: they write `decay`, `strengths` or `gate`.

Legend: N tokens of a batch, H heads, F key heads (each serves H / F heads side by side), K key channels, V value channels.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from mla.attention.contract import Surroundings, require
from mla.attention.recurrent.base import Channels, RecurrentConfig, RecurrentMixer, Tokens
from mla.layers.basic import FROM_HEADS, TO_HEADS, Linear, RMSNorm, merge_heads, split_heads
from mla.layers.convolution import ShortConvolution


@dataclasses.dataclass
class DeltaConfig(RecurrentConfig):
    """The delta rule without decay.

    Paper: 2406.06484
    Remembers: one matrix a head, fp32, and the last three inputs of a convolution
    Elements: H d_k d_v + 3 H (2 d_k + d_v), constant
    Use: recall from a constant state, where nothing need be forgotten
    """

    head_dim: int = 0  # key channels a head; 0: d_model / num_heads
    v_head_dim: int = 0  # value channels a head; 0: head_dim
    num_key_heads: int = 0  # heads of queries and keys, each serving as many heads side by side; 0: num_heads
    conv_taps: int = 4  # tokens that the convolution spans, the newest included; 0: no convolution
    negative_eigenvalues: bool = False  # beta from 0 to 2 instead of from 0 to 1

    def key_heads(self, around: Surroundings) -> int:
        return self.num_key_heads or self.heads(around)

    def key_dim(self, around: Surroundings) -> int:
        return self.head_dim or self.default_head_dim(around, "head_dim")

    def value_dim(self, around: Surroundings) -> int:
        return self.v_head_dim or self.key_dim(around)

    def shape(self, around: Surroundings) -> tuple[int, int, int]:
        return self.heads(around), self.key_dim(around), self.value_dim(around)

    def convolved(self, around: Surroundings) -> tuple[int, int]:
        heads, keys, values = self.shape(around)
        return self.conv_taps, 2 * self.key_heads(around) * keys + heads * values

    def validate(self, around: Surroundings) -> None:
        super().validate(around)
        heads, shared = self.heads(around), self.key_heads(around)
        require(heads % shared == 0, "num_key_heads", f"{shared} does not divide {heads} heads")
        require(self.conv_taps != 1, "conv_taps", "1 looks at no token but the newest; 0 leaves the convolution out")


C = TypeVar("C", bound=DeltaConfig)


class DeltaRule(RecurrentMixer[C], Generic[C]):
    """The delta rule of H heads over a state [B, H, K, V] in fp32, see the equations above."""

    beta: Linear | None = None

    def __init__(self, config: C, around: Surroundings, *, rngs: nnx.Rngs):
        super().__init__(config, around, rngs=rngs)
        (self.num_heads, self.key_dim, value_dim), self.key_heads = config.shape(around), config.key_heads(around)
        keys, values = self.key_heads * self.key_dim, self.num_heads * value_dim
        make: dict[str, Any] = {"rngs": rngs, "dtype": around.dtype}
        self.query = Linear(around.d_model, keys, TO_HEADS, **make)
        self.key = Linear(around.d_model, keys, TO_HEADS, **make)
        self.value = Linear(around.d_model, values, TO_HEADS, **make)
        if config.conv_taps:
            self.convolution = ShortConvolution({"query": keys, "key": keys, "value": values}, config.conv_taps, **make)
        self.out_norm = RMSNorm(value_dim, eps=around.norm_eps)
        self.out = Linear(values, around.d_model, FROM_HEADS, gain=around.residual_gain, **make)
        self.make_gates(make)

    def make_gates(self, make: dict[str, Any]) -> None:
        """Makes what `strengths`, `decay` and `gate` need; `make` are the last arguments of every `Linear`."""
        self.beta = Linear(self.around.d_model, self.num_heads, TO_HEADS, **make)

    def strengths(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """How much is erased and how much is written, factors on keys [N, H, 1 or K] and on values [N, H, 1 or V]."""
        assert self.beta is not None
        beta = jax.nn.sigmoid(self.beta(x).astype(self.wide))[..., None] * self.largest
        return beta, beta

    @property
    def largest(self) -> float:
        """The largest strength."""
        return 2.0 if self.config.negative_eigenvalues else 1.0

    def decay(self, x: jax.Array) -> jax.Array | None:
        """Logarithms of the decays, [N, H, 1 or K]; None: nothing decays."""
        return None

    def gate(self, x: jax.Array) -> jax.Array | None:
        """Factors on normed heads, [N, H V]; None: none."""
        return None

    def inputs(self, x: jax.Array) -> Channels:
        return {"query": self.query(x), "key": self.key(x), "value": self.value(x)}

    def tokens(self, x: jax.Array, inputs: Channels, positions: jax.Array) -> Tokens:
        inputs = inputs or jax.tree.map(jax.nn.silu, self.inputs(x))
        query, key = (_unit(split_heads(inputs[name], self.key_heads).astype(self.wide)) for name in ("query", "key"))
        value = split_heads(inputs["value"], self.num_heads).astype(self.wide)
        erasing, writing = self.strengths(x)
        erase = jnp.repeat(key, self.num_heads // self.key_heads, axis=1) * erasing
        return Tokens(query * self.key_dim**-0.5, key, value * writing, self.decay(x), erase)

    def finished(self, x: jax.Array, inputs: Channels, heads: jax.Array) -> jax.Array:
        merged, gate = merge_heads(self.out_norm(heads.astype(self.around.dtype))), self.gate(x)
        return self.out(merged if gate is None else merged * gate)


class Delta(DeltaRule[DeltaConfig]):
    """The delta rule as it is."""


def _unit(x: jax.Array) -> jax.Array:
    """x / |x| over the last axis."""
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)
