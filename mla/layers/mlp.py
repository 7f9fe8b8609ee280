"""What a block does to each token by itself: the registry of MLPs, and the dense ones. Legend: D model width, F MLP width.

An MLP is a config dataclass, which counts its parameters, and a module: `mlp(x)` is [.., D] -> [.., D], and `mlp.forward(x,
step)` gives losses and metrics beside. `config.model.mlp` names it, `config.model.mlp_fields` are the fields of its config.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mla import errors
from mla.attention.contract import Layer, Output, Step, Surroundings
from mla.errors import UserError, nearest
from mla.layers.basic import Linear
from mla.registry import load

# name -> where its config and its module stand. One line an MLP.
REGISTRY = {
    "swiglu": "mla.layers.mlp:SwiGLUConfig:Dense",
    "geglu": "mla.layers.mlp:GeGLUConfig:Dense",
    "gelu": "mla.layers.mlp:GELUConfig:Dense",
    "relu2": "mla.layers.mlp:ReLU2Config:Dense",
    "moe": "mla.layers.moe:MoEConfig:MixtureOfExperts",
}
MATCHED = "swiglu"  # of the model whose number of parameters all others are given


class ParameterCount(NamedTuple):
    """How many parameters an MLP has, and how many of them one token is multiplied with."""

    total: int
    active: int


@dataclasses.dataclass
class MLPConfig:
    """Base of every MLP's config."""

    def validate(self, around: Surroundings) -> None:
        """Raises UserError, naming the field, where the numbers cannot work."""

    def parameters(self, d_model: int, width: int) -> ParameterCount:
        """Counted from sizes, independently of the code that makes the arrays. `total` must be linear in `width`."""
        raise NotImplementedError


class MLP(Layer):
    """Base of every MLP: built from its config, what is around it, and the width that the model's sizes leave it."""

    def __init__(self, config: Any, around: Surroundings, width: int, *, rngs: nnx.Rngs):
        raise NotImplementedError

    def __call__(self, x: jax.Array) -> jax.Array:
        """[.., D] -> [.., D]; no token sees another."""
        raise NotImplementedError

    def forward(self, x: jax.Array, step: Step | None = None) -> Output:
        """`__call__`, with losses and metrics where it has some. step: of training; None in evaluation."""
        return Output(self(x), {}, {})


def mlp(name: str) -> tuple[type[MLPConfig], type[MLP]]:
    """The config class and the module class registered under `name`.

    Raises:
      UserError: unknown name; the message has the nearest match.
    """
    if name not in REGISTRY:
        raise UserError(f"config.model.mlp: {name!r}: {nearest(name, REGISTRY)}")
    config, module = load(REGISTRY[name])
    return config, module


# require(condition, field, message): refuses an MLP's config with one line that names the field.
require = functools.partial(errors.require, "config.model.mlp_fields.")


@dataclasses.dataclass
class DenseConfig(MLPConfig):
    """Of an MLP of matrices D x F around an activation, which with `gated` multiplies a second D x F projection."""

    activation: ClassVar[Any]  # [..] -> [..], elementwise
    gated: ClassVar[bool] = False

    use_bias: bool = False  # added after each matrix

    def parameters(self, d_model: int, width: int) -> ParameterCount:
        inward = 2 if self.gated else 1
        total = (inward + 1) * d_model * width + self.use_bias * (inward * width + d_model)
        return ParameterCount(total, total)


class SwiGLUConfig(DenseConfig):
    """(silu(x W_gate) * x W_up) W_down (2002.05202): Llama, Mistral, Qwen, DeepSeek."""

    activation = staticmethod(jax.nn.silu)
    gated = True


class GeGLUConfig(DenseConfig):
    """(gelu(x W_gate) * x W_up) W_down (2002.05202), gelu by its tanh formula: Gemma."""

    activation = staticmethod(jax.nn.gelu)
    gated = True


class GELUConfig(DenseConfig):
    """gelu(x W_up) W_down (1606.08415), gelu by its tanh formula: GPT-2, StarCoder2."""

    activation = staticmethod(jax.nn.gelu)


class ReLU2Config(DenseConfig):
    """max(x W_up, 0)^2 W_down (2109.08668): Primer, Nemotron."""

    activation = staticmethod(lambda x: jnp.square(jax.nn.relu(x)))


class Dense(MLP):
    """One MLP for all tokens."""

    def __init__(self, config: DenseConfig, around: Surroundings, width: int, *, rngs: nnx.Rngs):
        make: dict[str, Any] = {"rngs": rngs, "dtype": around.dtype, "use_bias": config.use_bias}
        self.config = config
        self.gate = Linear(around.d_model, width, ("model", "ff"), **make) if config.gated else None
        self.up = Linear(around.d_model, width, ("model", "ff"), **make)
        self.down = Linear(width, around.d_model, ("ff", "model"), gain=around.residual_gain, **make)

    def __call__(self, x: jax.Array) -> jax.Array:
        activation = self.config.activation
        return self.down(activation(self.up(x)) if self.gate is None else activation(self.gate(x)) * self.up(x))
