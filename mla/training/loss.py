"""Cross-entropy that never holds all logits. Legend: B batch, T tokens, D model width, V vocabulary."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp


def _scan(
    hidden: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    chunk_tokens: int,
    weights: jax.Array | None,
    with_gradients: bool,
) -> Any:
    batch, length, width = hidden.shape
    pieces = min(length, -(-batch * length // chunk_tokens))
    size = -(-length // pieces)  # tokens of each row in a piece
    padding = ((0, 0), (0, pieces * size - length))
    matrix = kernel.astype(hidden.dtype)

    def piece(carry: Any, parts: Any) -> Any:
        loss, d_kernel = carry
        start, x, target = parts[0], parts[1].reshape(-1, width), parts[2].reshape(-1)
        real = jnp.broadcast_to(start + jnp.arange(size) < length, (batch, size)).reshape(-1, 1)
        counts = real if parts[3] is None else real * parts[3].reshape(-1, 1)
        logits = jnp.matmul(x, matrix, preferred_element_type=jnp.float32)
        top = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
        exponentials = jnp.exp(logits - top)
        total = exponentials.sum(axis=-1, keepdims=True)
        chosen = jnp.take_along_axis(logits, target[:, None], axis=-1)
        loss += jnp.sum(_weighted(jnp.log(total) + top - chosen, counts))
        if not with_gradients:
            return (loss, d_kernel), None
        at_target = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1) == target[:, None]
        d_logits = exponentials / total - at_target
        d_logits = (_weighted(d_logits, counts) / (batch * length)).astype(hidden.dtype)
        d_kernel += jnp.matmul(x.T, d_logits, preferred_element_type=jnp.float32)
        return (loss, d_kernel), (d_logits @ matrix.T).reshape(batch, -1, width)

    zero = (jnp.zeros((), jnp.float32), jnp.zeros(kernel.shape if with_gradients else (), jnp.float32))
    if pieces == 1:
        (loss, d_kernel), d_hidden = piece(zero, (jnp.zeros((), jnp.int32), hidden, targets, weights))
    else:  # along T, so that the batch stays split over the devices as it is
        cut = (
            jnp.arange(pieces) * size,
            jnp.pad(hidden, (*padding, (0, 0))).reshape(batch, pieces, size, width).swapaxes(0, 1),
            jnp.pad(targets, padding).reshape(batch, pieces, size).swapaxes(0, 1),
            None if weights is None else jnp.pad(weights, padding).reshape(batch, pieces, size).swapaxes(0, 1),
        )
        (loss, d_kernel), d_hidden = jax.lax.scan(piece, zero, cut)
        if with_gradients:
            d_hidden = d_hidden.swapaxes(0, 1).reshape(batch, pieces * size, width)[:, :length]
    return loss / (batch * length), d_hidden, d_kernel


def _weighted(values: jax.Array, counts: jax.Array) -> jax.Array:
    """values times what each counts: truth values, or weights."""
    return jnp.where(counts, values, 0) if counts.dtype == bool else values * counts


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def cross_entropy(
    hidden: jax.Array, kernel: jax.Array, targets: jax.Array, chunk_tokens: int, weights: jax.Array | None = None
) -> jax.Array:
    """Mean over all tokens of the negative log-likelihood, in nats, of targets under softmax(hidden kernel).

    About `chunk_tokens` tokens' logits exist at once (at least one token of each row). Under differentiation the
    gradients are computed in the same pass (the loss is a scalar, so the backward pass only scales them): three matrix
    products where recomputation takes four.

    Args:
      hidden: [B, T, D], normed; its dtype is the compute dtype.
      kernel: fp32 [D, V].
      targets: int32 [B, T].
      chunk_tokens: static.
      weights: fp32 [B, T], by which each token's figure is multiplied before the mean over all of them (so that it is the
        weighted mean where the weights' mean is 1); not differentiated. None: 1 everywhere.

    Returns:
      fp32 scalar.
    """
    return _scan(hidden, kernel, targets, chunk_tokens, weights, False)[0]


def _forward(
    hidden: jax.Array, kernel: jax.Array, targets: jax.Array, chunk_tokens: int, weights: jax.Array | None = None
) -> Any:
    loss, d_hidden, d_kernel = _scan(hidden, kernel, targets, chunk_tokens, weights, True)
    return loss, (d_hidden, d_kernel)


def _backward(chunk_tokens: int, saved: Any, cotangent: jax.Array) -> Any:
    d_hidden, d_kernel = saved
    return (d_hidden * cotangent.astype(d_hidden.dtype), d_kernel * cotangent, None, None)


cross_entropy.defvjp(_forward, _backward)
