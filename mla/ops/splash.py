"""Softmax attention over a text by splash attention, the fused kernel for TPUs that comes with jax: training and losses.

No logits are stored: tiles of queries and keys that the mask leaves nothing of are skipped, and the backward pass computes
the others again (FlashAttention, 2205.14135). A kernel is one device's: XLA cannot split it, so `spread` runs it on the
share of each.

Legend: B batch, T tokens, H query heads, K key heads, D width of keys, Dv width of values.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as library
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

LANES = 128  # of a TPU: texts are filled up to a multiple
LARGEST = 512  # queries and keys of a tile, at most
SAVED = "splash"  # name of outputs and sums of exponentials, for policies of `jax.checkpoint`
QUERIES = KEYS = ("batch", None, "head", None)


def attend(
    queries: tuple[jax.Array, ...],
    keys: tuple[jax.Array, ...],
    values: jax.Array,
    sink: jax.Array | None,
    *,
    window: int | None,
    chunk: int | None,
    scale: float,
    soft_cap: float | None,
    spread: Any = None,
    interpret: bool = False,
) -> jax.Array:
    """`mla.ops.attention.softmax_attention` of queries at positions 0 .. T-1 over themselves, [B, T, H, Dv].

    Args:
      queries, keys, values, sink, scale, soft_cap: as there; S = C = T.
      window, chunk: of the mask.
      spread: runs a function on each device, see `mla.sharding.Spread`; None: there is one device.
      interpret: run the kernel as jax operations, on any platform.
    """
    heads, length = queries[0].shape[2], queries[0].shape[1]
    served = max(x.shape[2] for x in (*keys, values))  # heads that keys and values are brought to: those of the finest part
    if spread is not None and served % spread.parts("head") and served > 1:
        served = heads
    query, key, value = side_by_side(queries, keys, values, served)
    short = -length % LANES  # entries behind the text are seen by no query of it
    query, key, value = (jnp.pad(x, ((0, 0), (0, short), (0, 0), (0, 0))) for x in (query * scale, key, value))
    run = functools.partial(_on_a_device, window=window, chunk=chunk, soft_cap=soft_cap, interpret=interpret)
    given = (query, key, value) if sink is None else (query, key, value, sink)
    if spread is None:
        output = run(*given)
    else:
        axes = (QUERIES, KEYS, KEYS, ("head",))[: len(given)]
        output = spread(run, axes, QUERIES, *given)
    return output[:, :length]


def training_flops(length: int, heads: int, keys: int, values: int) -> float:
    """FLOPs of the products of one causal text, forwards and backwards; `length` is a multiple of LANES.

    Of whole tiles, those on the diagonal too. Forwards logits and outputs; backwards logits and the gradients of weights
    once for queries and once for keys and values, and those three gradients: five products as wide as keys, four as wide as
    values, where a textbook counts three of each and only what is seen.
    """
    tile = _tile(length)
    return heads * length * (length + tile) * (5.0 * keys + 4.0 * values)


def _tile(length: int) -> int:
    """Queries and keys of a tile."""
    return next(size for size in range(min(LARGEST, length), 0, -LANES) if length % size == 0)


def _on_a_device(query, key, value, sink=None, *, window, chunk, soft_cap, interpret):
    """[B, T, H, D], [B, T, K, D], [B, T, K, Dv], [H] -> [B, T, H, Dv]."""
    length, heads = query.shape[1:3]
    tile = _tile(length)
    sizes: dict[str, Any] = dict.fromkeys(
        ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"), tile
    )
    kernel = library.make_splash_mha_single_device(
        library.MultiHeadMask([_mask(length, window, chunk)] * heads),
        block_sizes=library.BlockSizes(**sizes),
        attn_logits_soft_cap=soft_cap,
        residual_checkpoint_name=SAVED,
        interpret=interpret,
    )
    sinks = None if sink is None else sink.astype(jnp.float32)
    outputs = jax.vmap(lambda q, k, v: kernel(q, k, v, sinks=sinks))(*(x.swapaxes(1, 2) for x in (query, key, value)))
    return outputs.swapaxes(1, 2)


def _mask(length: int, window: int | None, chunk: int | None) -> masks.Mask:
    """Whom each of 0 .. length-1 sees, as the kernel computes it within a tile."""
    shape = length, length
    if chunk is not None:
        return masks.ChunkedCausalMask(shape, chunk)
    return masks.CausalMask(shape) if window is None else masks.LocalMask(shape, (window - 1, 0), 0)


def side_by_side(
    queries: tuple[jax.Array, ...], keys: tuple[jax.Array, ...], values: jax.Array, heads: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Parts as one: queries [B, S, H, D], and keys and values of as many heads, [B, C, heads, D] and [B, C, heads, Dv]."""
    key = jnp.concatenate([_repeated(k, heads) for k in keys], axis=-1)
    return jnp.concatenate(queries, axis=-1), key, _repeated(values, heads)


def _repeated(x: jax.Array, heads: int) -> jax.Array:
    """[B, T, K, D] -> [B, T, heads, D], each head as often as it is read."""
    return x if x.shape[2] == heads else jnp.repeat(x, heads // x.shape[2], axis=2)
