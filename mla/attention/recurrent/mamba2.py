"""Mamba-2 (SSD, 2405.21060): a state space model whose transition is one number a head and token.

    u, B, C = SiLU(conv(x W_u, x W_B, x W_C) + b)    z = x W_z    dt = softplus(x W_dt + dt_bias), one a head
    S_t = e^{-dt exp(A_log)} S_{t-1} + B_t (dt u_t)^T        o_t = S_t^T C_t + D_h u_t        y = RMSNorm(o * SiLU(z)) W_O

conv is causal, over four tokens, each channel on its own. B stands where keys do and C where queries do; each of `n_groups`
of them serves num_heads / n_groups heads side by side, and RMSNorm is over as many groups of channels, after the gate. Inner
channels are `expand` d_model in heads of `head_dim`. What the paper leaves open is as in the authors' code: the bias of the
convolution, D beside its output, the gate before the norm. Its bounds on dt, by default none, are left out.

About 6 d_model^2 parameters. Where the authors have no MLPs, the models here keep theirs: fewer channels of them make up.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mla.attention.contract import Surroundings, require
from mla.attention.recurrent.base import Channels, RecurrentConfig, RecurrentMixer, Tokens
from mla.layers.basic import FROM_HEADS, TO_HEADS, Linear, RMSNorm, merge_heads, split_heads, vector
from mla.layers.convolution import ShortConvolution
from mla.layers.decay import SoftplusDecay

HEAD_DIM = 64  # of the paper's models


@dataclasses.dataclass
class Mamba2Config(RecurrentConfig):
    """A state space with one decay a head, and queries and keys that heads share.

    Paper: 2405.21060
    Remembers: one matrix a head, fp32, and the last three inputs of a convolution
    Elements: 2 d N + 3 (2 d + 2 N), constant
    Use: a large state with cheap queries and keys; most layers of a hybrid
    """

    # num_heads, 0: expand d_model / head_dim; where neither is set, heads of 64 channels if those divide, else the model's
    head_dim: int = 0  # inner channels a head; 0: expand d_model / num_heads
    expand: int = 2  # inner channels, in units of d_model
    state_size: int = 128  # channels of B and C
    n_groups: int = 1  # pairs of B and C, each serving as many heads side by side
    conv_taps: int = 4  # tokens that the convolution spans, the newest included

    def heads(self, around: Surroundings) -> int:
        inner = self.expand * around.d_model
        width = self.head_dim or (0 if self.num_heads or inner % HEAD_DIM else HEAD_DIM)
        if not width:
            return super().heads(around)
        said = f"{width} does not divide {inner} inner channels, expand {self.expand} times d_model {around.d_model}"
        require(inner % width == 0, "head_dim", said)
        heads = inner // width
        said = f"{self.num_heads} heads of head_dim {width} are not {inner} inner channels; set one"
        require(self.num_heads in (0, heads), "num_heads", said)
        return heads

    def shape(self, around: Surroundings) -> tuple[int, int, int]:
        inner, heads = self.expand * around.d_model, self.heads(around)
        said = f"set it: {inner} inner channels do not divide into {heads} heads"
        require(inner % heads == 0, "head_dim", said)
        return heads, self.state_size, inner // heads

    def convolved(self, around: Surroundings) -> tuple[int, int]:
        return self.conv_taps, self.expand * around.d_model + 2 * self.n_groups * self.state_size

    def validate(self, around: Surroundings) -> None:
        for name in ("expand", "state_size", "n_groups"):
            require(getattr(self, name) >= 1, name, f"{getattr(self, name)} is not a positive number")
        super().validate(around)
        heads = self.heads(around)
        require(heads % self.n_groups == 0, "n_groups", f"{self.n_groups} does not divide {heads} heads")
        require(self.conv_taps >= 2, "conv_taps", f"{self.conv_taps} looks at no token before the newest; 2 is the least")


class Mamba2(RecurrentMixer[Mamba2Config]):
    """The state space model above of H heads over a state [B, H, state_size, head_dim] in fp32."""

    convolution: ShortConvolution

    def __init__(self, config: Mamba2Config, around: Surroundings, *, rngs: nnx.Rngs):
        super().__init__(config, around, rngs=rngs)
        self.num_heads, states, width = config.shape(around)
        inner, shared, d_model = self.num_heads * width, config.n_groups * states, around.d_model
        make: dict[str, Any] = {"rngs": rngs, "dtype": around.dtype}
        self.gate = Linear(d_model, inner, TO_HEADS, **make)
        self.value = Linear(d_model, inner, TO_HEADS, **make)
        self.key = Linear(d_model, shared, TO_HEADS, **make)
        self.query = Linear(d_model, shared, TO_HEADS, **make)
        self.step_in = Linear(d_model, self.num_heads, TO_HEADS, **make)
        widths = {"value": inner, "key": shared, "query": shared}
        self.convolution = ShortConvolution(widths, config.conv_taps, use_bias=True, **make)
        self.rates = SoftplusDecay(self.num_heads, 1, rngs=rngs)
        self.skip = vector(jnp.ones((self.num_heads,), jnp.float32))
        self.out_norm = RMSNorm(inner, eps=around.norm_eps, blocks=config.n_groups)
        self.out = Linear(inner, d_model, FROM_HEADS, gain=around.residual_gain, **make)

    def inputs(self, x: jax.Array) -> Channels:
        return {"value": self.value(x), "key": self.key(x), "query": self.query(x)}

    def tokens(self, x: jax.Array, inputs: Channels, positions: jax.Array) -> Tokens:
        query, key = (split_heads(inputs[name], self.config.n_groups) for name in ("query", "key"))
        value, step = split_heads(inputs["value"], self.num_heads), self.step_in(x)
        return Tokens(query, key, value * self.rates.step(step), self.rates(step))

    def finished(self, x: jax.Array, inputs: Channels, heads: jax.Array) -> jax.Array:
        heads = heads + split_heads(inputs["value"], self.num_heads) * self.skip[...][:, None]
        gated = merge_heads(heads) * jax.nn.silu(self.gate(x).astype(heads.dtype))
        normed = merge_heads(self.out_norm(split_heads(gated, self.config.n_groups)))
        return self.out(normed.astype(self.around.dtype))
