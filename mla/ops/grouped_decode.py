"""One token's attention over a cache as a TPU kernel: every entry is read once, for all heads that share it.

A block of entries meets all query heads of its key head at once, so that MLA's latent, which is key and value of every head,
comes from memory a single time a step. Entries are split over parts that know nothing of one another and are joined behind
the kernel by their largest logits and sums (Flash-Decoding; the arithmetic of 2205.14135, section 3.1). A kernel is one
device's: `spread` runs it on the share of each.

Legend: B batch, C entries, H query heads, K key heads, D_i width of part i of the keys, Dv width of the values, J parts that
entries are split over.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128  # of a TPU
TILE = 512  # entries of a block
PARTS = 8  # at most
MASKED = -1e30
QUERIES = ENTRIES = ("batch", None, "head", None)


def attend(
    queries: tuple[jax.Array, ...],
    keys: tuple[jax.Array, ...],
    values: jax.Array | None,
    visible: jax.Array,
    sink: jax.Array | None,
    *,
    scale: float,
    soft_cap: float | None,
    spread: Any = None,
    interpret: bool = False,
) -> jax.Array:
    """`mla.ops.attention.softmax_attention` of one query of each sequence, [B, 1, H, Dv].

    Args:
      queries: parts [B, 1, H, D_i].
      keys: parts [B, C, K_i, D_i].
      values: [B, C, K_v, Dv]; None: they are the first part of the keys, which is then read once for both.
      visible: bool [B, C] or [B, C, K], which entries the query of each sequence (and of each key head) sees.
      sink: [H].
      scale, soft_cap: as there.
      spread: runs a function on each device, see `mla.sharding.Spread`; None: there is one device.
      interpret: run the kernel as jax operations, on any platform.
    """
    seen = visible.astype(jnp.int32).reshape(*visible.shape[:2], -1, 1)
    given = (*queries, *keys, *(() if values is None else (values,)), seen, *(() if sink is None else (sink,)))
    sizes: dict[str, Any] = {"parts": len(keys), "apart": values is not None, "sinks": sink is not None}
    run = functools.partial(_on_a_device, **sizes, scale=scale, soft_cap=soft_cap, interpret=interpret)
    if spread is None:
        return run(*given)
    axes = (*(QUERIES for _ in queries), *(ENTRIES for _ in keys), *(() if values is None else (ENTRIES,)))
    axes = (*axes, ENTRIES, *(() if sink is None else (("head",),)))
    output: jax.Array = spread(run, axes, QUERIES, *given)
    return output


def _on_a_device(*given, parts, apart, sinks, scale, soft_cap, interpret):
    queries, keys, rest = given[:parts], given[parts : 2 * parts], list(given[2 * parts :])
    values = rest.pop(0) if apart else keys[0]
    seen, sink = rest[0], rest[1] if sinks else None
    (batch, _, heads, _), count = queries[0].shape, values.shape[1]
    groups, width = max(x.shape[2] for x in (*keys, values, seen)), values.shape[-1]
    tile = min(TILE, -(-count // LANES) * LANES)
    blocks = -(-count // tile)
    split = next(n for n in range(min(PARTS, blocks), 0, -1) if blocks % n == 0)

    def of_group(x: jax.Array) -> tuple[jax.Array, pl.BlockSpec]:
        """[B, C, K_i, D] as [B, C, K_i D], and the block of a group's own head."""
        own, channels = x.shape[2], x.shape[3]
        place = lambda b, g, j, i: (b, j * (blocks // split) + i, g * own // groups)  # noqa: E731
        return x.reshape(*x.shape[:2], own * channels), pl.BlockSpec((None, tile, channels), place)

    by_group = [q.reshape(batch, groups, heads // groups, -1) for q in queries]
    arrays = [(q, pl.BlockSpec((None, None, *q.shape[2:]), lambda b, g, j, i: (b, g, 0, 0))) for q in by_group]
    arrays += [of_group(x) for x in ((*keys, values) if apart else keys)]
    rows = seen[..., 0].swapaxes(1, 2)[:, :, None]  # [B, K or 1, 1, C]
    owners = rows.shape[1]
    place = lambda b, g, j, i: (b, g * owners // groups, 0, j * (blocks // split) + i)  # noqa: E731
    arrays.append((rows, pl.BlockSpec((None, None, 1, tile), place)))

    def out(channels: int) -> tuple[jax.ShapeDtypeStruct, pl.BlockSpec]:
        shape = batch, groups, split, heads // groups, channels
        return jax.ShapeDtypeStruct(shape, jnp.float32), pl.BlockSpec(
            (None, None, None, *shape[3:]), lambda b, g, j, i: (b, g, j, 0, 0)
        )

    outputs = [out(width), out(LANES), out(LANES)]
    work = batch * heads * count * (sum(k.shape[-1] for k in keys) + width)
    read = sum(x.size * x.dtype.itemsize for x, _ in arrays)
    mixed, largest, total = pl.pallas_call(
        functools.partial(_block, parts=parts, apart=apart, count=count, tile=tile, scale=scale, soft_cap=soft_cap),
        grid=(batch, groups, split, blocks // split),
        in_specs=[spec for _, spec in arrays],
        out_specs=[spec for _, spec in outputs],
        out_shape=[shape for shape, _ in outputs],
        cost_estimate=pl.CostEstimate(flops=2 * work, bytes_accessed=read, transcendentals=batch * heads * count),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="grouped_decode",
    )(*(x for x, _ in arrays))
    largest, total = largest[..., :1], total[..., :1]
    highest = largest.max(axis=2, keepdims=True)
    sinks_of = None if sink is None else sink.astype(jnp.float32).reshape(1, groups, 1, -1, 1)
    highest = highest if sinks_of is None else jnp.maximum(highest, sinks_of)
    share = jnp.where(total > 0, jnp.exp(largest - highest), 0)
    below = (total * share).sum(axis=2) + (0 if sinks_of is None else jnp.exp(sinks_of - highest)[:, :, 0])
    output = (mixed * share).sum(axis=2) / jnp.where(below == 0, 1, below)
    return output.reshape(batch, 1, heads, width).astype(values.dtype)


def _block(*refs, parts, apart, count, tile, scale, soft_cap):
    """A block of entries: it changes, of its part of them, the mixed values, the largest logit and the sum of weights."""
    queries, keys = refs[:parts], refs[parts : 2 * parts]
    value_ref = refs[2 * parts] if apart else keys[0]
    seen_ref, mixed_ref, largest_ref, total_ref = refs[2 * parts + apart :]
    number = pl.program_id(3)

    @pl.when(number == 0)
    def start():
        mixed_ref[...] = jnp.zeros_like(mixed_ref)
        largest_ref[...] = jnp.full_like(largest_ref, MASKED)
        total_ref[...] = jnp.zeros_like(total_ref)

    first = (pl.program_id(2) * pl.num_programs(3) + number) * tile
    logits = sum(_product(q[...], k[...], (((1,), (1,)), ((), ()))) for q, k in zip(queries, keys, strict=True)) * scale
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    # What stands behind the last entry, in the last block, is anything.
    there = first + jax.lax.broadcasted_iota(jnp.int32, (1, tile), 1) < count
    seen = (seen_ref[...] > 0) & there
    logits = jnp.where(seen, logits, MASKED)
    before = largest_ref[...][:, :1]
    largest = jnp.maximum(before, logits.max(axis=1, keepdims=True))
    weights = jnp.where(seen, jnp.exp(logits - largest), 0)
    kept = jnp.exp(before - largest)
    inside = first + jax.lax.broadcasted_iota(jnp.int32, (tile, 1), 0) < count
    value = jnp.where(inside, value_ref[...], jnp.zeros((), value_ref.dtype))
    mixed_ref[...] = mixed_ref[...] * kept + _product(weights.astype(value.dtype), value, (((1,), (0,)), ((), ())))
    total_ref[...] = total_ref[...] * kept + weights.sum(axis=1, keepdims=True)
    largest_ref[...] = jnp.broadcast_to(largest, largest_ref.shape)


def _product(a, b, axes):
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, axes, precision=precision, preferred_element_type=jnp.float32)
