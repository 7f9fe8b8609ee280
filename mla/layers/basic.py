"""The few layers that mechanisms and the model are made of. Legend: D_in, D_out channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

Axes = tuple[str | None, ...]  # what each axis of an array means: `mla.sharding.MEANINGS`; None: never split
TO_HEADS: Axes = ("model", "head_channels")
FROM_HEADS: Axes = ("head_channels", "model")
TO_LATENT: Axes = ("model", "latent")
FROM_LATENT: Axes = ("latent", "head_channels")


def matrix(value: jax.Array, axes: Axes, *, exact: bool = False, multiplies: bool = True) -> nnx.Param:
    """A parameter that weight decay shrinks, used in the compute dtype.

    Args:
      value: fp32, of any shape.
      axes: the meaning of each of its axes, by which it is spread over devices.
      exact: evaluation keeps it in fp32 too, where otherwise it is cast to the compute dtype once and for all.
      multiplies: whether tokens are multiplied with all of it, each once: False for what is looked up, added or multiplied
        channel by channel.
    """
    return nnx.Param(value, decays=True, exact=exact, axes=axes, multiplies=multiplies)


def vector(value: jax.Array) -> nnx.Param:
    """A parameter that weight decay leaves alone, never cast and on every device: a norm's gain, a bias, a sink."""
    return nnx.Param(value, decays=False, exact=True, axes=(None,) * value.ndim, multiplies=False)


def declared(parameter: nnx.Variable, what: str) -> Any:
    """What a parameter's owner says of it: `decays`, `exact`, `axes` or `multiplies`.

    Raises:
      TypeError: its owner says nothing.
    """
    said = parameter.get_metadata()
    if what not in said:
        raise TypeError(
            f"a parameter of shape {parameter.shape} does not say {what!r}: make it with layers.matrix or vector"
        )
    return said[what]


def cast(state: Any, dtype: Any) -> Any:
    """An NNX state of parameters in the dtype they are used in; those that are declared exact stay as they are."""

    def one(parameter: nnx.Variable) -> nnx.Variable:
        return parameter if declared(parameter, "exact") else parameter.replace(parameter[...].astype(dtype))

    return jax.tree.map(one, state, is_leaf=lambda node: isinstance(node, nnx.Variable))


class Linear(nnx.Module):
    """x W (+ b) over the last axis.

    One initialisation rule for every mechanism of a comparison: W ~ N(0, gain^2 / D_in), so that a projection keeps the
    variance of its input whatever the rank it goes through; biases 0. `axes` are the meanings of D_in and D_out.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        axes: Axes,
        *,
        rngs: nnx.Rngs,
        dtype: Any,
        gain: float = 1.0,
        use_bias: bool = False,
    ):
        self.kernel = matrix(jax.random.normal(rngs.params(), (d_in, d_out), jnp.float32) * (gain / d_in**0.5), axes)
        self.bias = vector(jnp.zeros((d_out,), jnp.float32)) if use_bias else None
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        # Two-dimensional operands: XLA contracts [B, T, D] x [D, F] along slow layouts on a CPU, 2x slower.
        y = x.astype(self.dtype).reshape(-1, x.shape[-1]) @ self.kernel[...].astype(self.dtype)
        if self.bias is not None:
            y += self.bias[...].astype(self.dtype)
        return y.reshape(*x.shape[:-1], -1)

    def heads(self, num_heads: int) -> jax.Array:
        """W in the compute dtype as [D_in, heads, D_out / heads], for contractions that fold it into something else.

        A bias is one more row of it, [D_in + 1, ...]: the weights of an input channel that is always 1.
        """
        kernel = self.kernel[...] if self.bias is None else jnp.vstack([self.kernel[...], self.bias[...]])
        return kernel.astype(self.dtype).reshape(kernel.shape[0], num_heads, -1)

    def blocks(self, x: jax.Array) -> jax.Array:
        """Block-diagonal over G blocks: [..., G, D_in] -> [..., G, D_out / G], block g of the output from block g of x."""
        count = x.shape[-2]
        if count == 1:
            return self(x)
        y = jnp.einsum(
            "...gr,rgn->...gn", x.astype(self.dtype), self.kernel[...].astype(self.dtype).reshape(x.shape[-1], count, -1)
        )
        return y if self.bias is None else y + self.bias[...].astype(self.dtype).reshape(count, -1)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, statistics in fp32 (1910.07467).

    With `blocks` G, x is [..., G, D / G] and each block has statistics of its own; the D gains are kept in one vector.
    """

    def __init__(self, dim: int, *, eps: float, blocks: int = 1):
        self.scale = vector(jnp.ones((dim,), jnp.float32))
        self.eps, self.blocks = eps, blocks

    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.scale[...] if self.blocks == 1 else self.scale[...].reshape(self.blocks, -1)
        return (unit_rms(x, self.eps, keep_wide=True) * scale).astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(variance + eps) * scale + bias over the last axis, statistics in fp32 (1607.06450)."""

    def __init__(self, dim: int, *, eps: float):
        self.scale, self.bias = vector(jnp.ones((dim,), jnp.float32)), vector(jnp.zeros((dim,), jnp.float32))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(wide_dtype(x.dtype))
        wide = unit_rms(wide - jnp.mean(wide, axis=-1, keepdims=True), self.eps)
        return (wide * self.scale[...] + self.bias[...]).astype(x.dtype)


NORMS: dict[str, Callable[..., RMSNorm | LayerNorm]] = {"rmsnorm": RMSNorm, "layernorm": LayerNorm}


class LowRank(nnx.Module):
    """factor * RMSNorm(x W_down) W_up: a projection of the model's channels to heads through `rank` channels, normed.

    With `blocks` G the rank channels are cut into G pieces, each with its own norm, and piece g alone feeds the g-th part
    of the output. `scaled` sets factor = sqrt(D_in / channels of a piece), otherwise 1.
    """

    def __init__(self, d_in: int, rank: int, d_out: int, *, eps: float, blocks: int = 1, scaled: bool = False, **make: Any):
        self.down = Linear(d_in, rank, TO_LATENT, **make)
        self.norm = RMSNorm(rank, eps=eps, blocks=blocks)
        self.up = Linear(rank // blocks, d_out, FROM_LATENT, **make)
        self.blocks, self.factor = blocks, (d_in * blocks / rank) ** 0.5 if scaled else 1.0

    def latent(self, x: jax.Array) -> jax.Array:
        """[..., D_in] -> factor * RMSNorm(x W_down), [..., blocks, rank / blocks]."""
        return self.norm(split_heads(self.down(x), self.blocks)) * self.factor

    def __call__(self, x: jax.Array) -> jax.Array:
        return merge_heads(self.up.blocks(self.latent(x)))


class GroupedLowRank(nnx.Module):
    """Concat_g(x_g W_g) W_up: heads side by side, cut into G groups, each through `rank` channels of its own, then mixed."""

    def __init__(self, d_in: int, groups: int, rank: int, d_out: int, *, rngs: nnx.Rngs, dtype: Any, gain: float = 1.0):
        drawn = jax.random.normal(rngs.params(), (groups, d_in // groups, rank), jnp.float32)
        self.down = matrix(drawn * (groups / d_in) ** 0.5, ("head_channels", None, "latent"))
        self.up = Linear(groups * rank, d_out, FROM_HEADS, rngs=rngs, dtype=dtype, gain=gain)
        self.groups, self.dtype = groups, dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., d_in] -> [..., d_out]."""
        parts = x.astype(self.dtype).reshape(-1, self.groups, x.shape[-1] // self.groups)
        y = jnp.einsum("ngc,gcr->ngr", parts, self.down[...].astype(self.dtype))
        return self.up(y.reshape(*x.shape[:-1], -1))


def wide_dtype(dtype: Any) -> Any:
    """The dtype of statistics and running sums: fp32, or fp64 where everything is (finite differences)."""
    return jnp.promote_types(dtype, jnp.float32)


def unit_rms(x: jax.Array, eps: float, keep_wide: bool = False) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) over the last axis, computed in fp32 at least; kept so, or cast back to the dtype of x."""
    wide = x.astype(wide_dtype(x.dtype))
    wide *= jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return wide if keep_wide else wide.astype(x.dtype)


def split_heads(x: jax.Array, num_heads: int) -> jax.Array:
    """[B, T, heads * d] -> [B, T, heads, d]."""
    return x.reshape(*x.shape[:-1], num_heads, -1)


def merge_heads(x: jax.Array) -> jax.Array:
    """[B, T, heads, d] -> [B, T, heads * d]."""
    return x.reshape(*x.shape[:-2], -1)
