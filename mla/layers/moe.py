"""Mixture of experts: many small MLPs, of which each token goes through a few (2101.03961; shared ones: 2401.06066).

    s = softmax(x W_r) or sigmoid(x W_r) of E experts    the k largest are chosen, g = s / (sum of the chosen s) * scale
    y = sum over chosen e of g_e expert_e(x)  +  shared(x)

No token is dropped: on an accelerator tokens are sorted by expert, and each expert multiplies the rows it has got
(`jax.lax.ragged_dot`). Beside the loss, E sum_e f_e P_e keeps loads even: f_e is the share of choices that fall on e, P_e
the mean over tokens of e's part of the sum of all s. Legend: N tokens, E experts, k chosen, D model width, F of an expert.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from mla.attention.contract import Output, Step, Surroundings
from mla.errors import nearest
from mla.layers.basic import Axes, Linear, matrix, wide_dtype
from mla.layers.mlp import MLP, Dense, MLPConfig, ParameterCount, SwiGLUConfig, require
from mla.ops.dispatch import Backend, dispatch

ROUTERS = {"softmax": jax.nn.softmax, "sigmoid": jax.nn.sigmoid}


@dataclasses.dataclass
class MoEConfig(MLPConfig):
    """Token-choice routing to SwiGLU experts of the solved width, beside shared ones that every token goes through."""

    num_experts: int = 8
    experts_per_token: int = 2
    shared_experts: int = 1  # that all tokens go through, side by side; 0: none
    router: str = "softmax"  # softmax over experts (Mixtral, Qwen3) | sigmoid of each (DeepSeek-V3)
    normalise: bool = True  # weights of the chosen experts sum to `scale`; false: each is its score times `scale`
    scale: float = 1.0
    balance_loss: float = 0.01  # coefficient of the load-balance loss; 0: none

    def validate(self, around: Surroundings) -> None:
        require(self.num_experts >= 1, "num_experts", f"{self.num_experts} is not a number of experts")
        chosen = self.experts_per_token
        said = f"{chosen} is not from 1 to num_experts, {self.num_experts}"
        require(1 <= chosen <= self.num_experts, "experts_per_token", said)
        require(self.router in ROUTERS, "router", f"{self.router!r}: {nearest(self.router, ROUTERS)}")
        require(self.scale > 0, "scale", f"{self.scale} is not a positive number")

    def parameters(self, d_model: int, width: int) -> ParameterCount:
        expert, router = 3 * d_model * width, d_model * self.num_experts
        used = self.experts_per_token + self.shared_experts
        return ParameterCount(router + (self.num_experts + self.shared_experts) * expert, router + used * expert)


class Experts(nnx.Module):
    """E MLPs like SwiGLU, their matrices side by side in three arrays."""

    def __init__(self, count: int, around: Surroundings, width: int, *, rngs: nnx.Rngs):
        def made(d_in: int, d_out: int, axes: Axes, gain: float = 1.0) -> nnx.Param:
            drawn = jax.random.normal(rngs.params(), (count, d_in, d_out), jnp.float32)
            return matrix(drawn * (gain / d_in**0.5), ("expert", *axes))

        self.gate = made(around.d_model, width, ("model", "ff"))
        self.up = made(around.d_model, width, ("model", "ff"))
        self.down = made(width, around.d_model, ("ff", "model"), around.residual_gain)
        self.dtype, self.platform = around.dtype, around.platform

    def __call__(self, x: jax.Array, chosen: jax.Array, weights: jax.Array) -> jax.Array:
        """x [N, D], the experts int32 [N, k] of each token and their weights [N, k] -> the weighted sum [N, D]."""
        kernels = tuple(kernel[...].astype(self.dtype) for kernel in (self.gate, self.up, self.down))
        run = dispatch("experts", BACKENDS, "auto", None, self.platform)
        y: jax.Array = run(kernels, x.astype(self.dtype), chosen, weights.astype(self.dtype))
        return y


def _by_choice(kernels, x, chosen, weights):
    """Each token times the experts it has chosen, as rows sorted by expert."""
    (gate, up, down), order = kernels, jnp.argsort(chosen.reshape(-1))
    rows, loads = x[order // chosen.shape[1]], jnp.bincount(chosen.reshape(-1), length=gate.shape[0])
    product = functools.partial(jax.lax.ragged_dot, group_sizes=loads.astype(jnp.int32))
    made = product(jax.nn.silu(product(rows, gate)) * product(rows, up), down)
    return jnp.einsum("nkd,nk->nd", made[jnp.argsort(order)].reshape(*chosen.shape, -1), weights)


def _by_all(kernels, x, chosen, weights):
    """Each token times all experts: what a CPU makes of `ragged_dot` are k times as many products."""
    gate, up, down = kernels
    rows = jnp.arange(len(x))[:, None]
    shares = jnp.zeros((len(x), len(gate)), x.dtype).at[rows, chosen].set(weights)
    inner = jax.nn.silu(jnp.einsum("nd,edf->nef", x, gate)) * jnp.einsum("nd,edf->nef", x, up)
    return jnp.einsum("nef,efd->nd", inner * shares[..., None], down)


BACKENDS: dict[str, Backend[None]] = {"by_all": Backend(_by_all, best_on=("cpu",)), "by_choice": Backend(_by_choice)}


class MixtureOfExperts(MLP):
    """E expert MLPs, of which a router gives each token k."""

    def __init__(self, config: MoEConfig, around: Surroundings, width: int, *, rngs: nnx.Rngs):
        self.config, make = config, {"rngs": rngs, "dtype": wide_dtype(around.dtype)}
        self.router = Linear(around.d_model, config.num_experts, ("model", None), **make)
        self.router.kernel = matrix(self.router.kernel[...], ("model", None), exact=True)  # rounding must not turn a choice
        self.experts = Experts(config.num_experts, around, width, rngs=rngs)
        shared = config.shared_experts
        self.shared = Dense(SwiGLUConfig(), around, shared * width, rngs=rngs) if shared else None

    sparing: ClassVar[tuple[str, ...]] = ("experts",)

    def matrix_flops(self) -> float:
        kernels = (self.experts.gate, self.experts.up, self.experts.down)
        share = self.config.experts_per_token / self.config.num_experts
        return super().matrix_flops() + 2.0 * share * sum(kernel.size for kernel in kernels)

    def route(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [N, D] -> scores [N, E] in fp32 at least, the experts int32 [N, k] of each token, and their weights [N, k]."""
        with jax.default_matmul_precision("highest"):
            scores = ROUTERS[self.config.router](self.router(x))
        weights, chosen = jax.lax.top_k(scores, self.config.experts_per_token)
        if self.config.normalise:
            weights /= jnp.sum(weights, axis=-1, keepdims=True)
        return scores, chosen, weights * self.config.scale

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.forward(x).y

    def forward(self, x: jax.Array, step: Step | None = None) -> Output:
        """At a step: the balance loss, and as `expert_load` how many times the average load the fullest expert has."""
        tokens, count = x.reshape(-1, x.shape[-1]), self.config.num_experts
        scores, chosen, weights = self.route(tokens)
        y = self.experts(tokens, chosen, weights).reshape(x.shape)
        y = y if self.shared is None else y + self.shared(x)
        if step is None:
            return Output(y, {}, {})
        share = jnp.bincount(chosen.reshape(-1), length=count) / chosen.size
        balance = count * jnp.sum(share * jnp.mean(scores / jnp.sum(scores, axis=-1, keepdims=True), axis=0))
        losses = {"balance": self.config.balance_loss * balance} if self.config.balance_loss else {}
        return Output(y, losses, {"expert_load": count * jnp.max(share)})
