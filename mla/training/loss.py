"""Cross-entropy that never holds all logits. Legend: B batch, T tokens, D model width, V vocabulary."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp


def _pieces(batch: int, length: int, chunk_tokens: int) -> int:
    """The fewest equal pieces of the token axis with at most `chunk_tokens` tokens each (of all rows together)."""
    return next(n for n in range(1, length + 1) if length % n == 0 and (batch * length // n <= chunk_tokens or n == length))


def _scan(hidden: jax.Array, kernel: jax.Array, targets: jax.Array, chunk_tokens: int, with_gradients: bool) -> Any:
    batch, length, width = hidden.shape
    pieces = _pieces(batch, length, chunk_tokens)
    weights = kernel.astype(hidden.dtype)

    def piece(carry: Any, parts: Any) -> Any:
        loss, d_kernel = carry
        x, target = parts[0].reshape(-1, width), parts[1].reshape(-1)
        logits = jnp.matmul(x, weights, preferred_element_type=jnp.float32)
        top = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
        exponentials = jnp.exp(logits - top)
        total = exponentials.sum(axis=-1, keepdims=True)
        chosen = jnp.take_along_axis(logits, target[:, None], axis=-1)
        loss += jnp.sum(jnp.log(total) + top - chosen)
        if not with_gradients:
            return (loss, d_kernel), None
        at_target = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1) == target[:, None]
        d_logits = ((exponentials / total - at_target) / (batch * length)).astype(hidden.dtype)
        d_kernel += jnp.matmul(x.T, d_logits, preferred_element_type=jnp.float32)
        return (loss, d_kernel), (d_logits @ weights.T).reshape(batch, -1, width)

    zero = (jnp.zeros((), jnp.float32), jnp.zeros(kernel.shape if with_gradients else (), jnp.float32))
    if pieces == 1:
        (loss, d_kernel), d_hidden = piece(zero, (hidden, targets))
    else:
        cut = hidden.reshape(batch, pieces, -1, width).swapaxes(0, 1), targets.reshape(batch, pieces, -1).swapaxes(0, 1)
        (loss, d_kernel), d_hidden = jax.lax.scan(piece, zero, cut)
        d_hidden = d_hidden.swapaxes(0, 1).reshape(hidden.shape) if with_gradients else None
    return loss / (batch * length), d_hidden, d_kernel


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def cross_entropy(hidden: jax.Array, kernel: jax.Array, targets: jax.Array, chunk_tokens: int) -> jax.Array:
    """Mean negative log-likelihood, in nats, of targets under softmax(hidden kernel).

    At most `chunk_tokens` tokens' logits exist at once. Under differentiation the gradients are computed in the same pass
    (the loss is a scalar, so the backward pass only scales them): three matrix products where recomputation takes four.

    Args:
      hidden: [B, T, D], normed; its dtype is the compute dtype.
      kernel: fp32 [D, V].
      targets: int32 [B, T].
      chunk_tokens: static.

    Returns:
      fp32 scalar.
    """
    return _scan(hidden, kernel, targets, chunk_tokens, False)[0]


def _forward(hidden: jax.Array, kernel: jax.Array, targets: jax.Array, chunk_tokens: int) -> Any:
    loss, d_hidden, d_kernel = _scan(hidden, kernel, targets, chunk_tokens, True)
    return loss, (d_hidden, d_kernel)


def _backward(chunk_tokens: int, saved: Any, cotangent: jax.Array) -> Any:
    d_hidden, d_kernel = saved
    return (d_hidden * cotangent.astype(d_hidden.dtype), d_kernel * cotangent, None)


cross_entropy.defvjp(_forward, _backward)
