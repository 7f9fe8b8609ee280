"""The softmax attention of the project: one signature, several backends (`BACKENDS`), chosen by `mla.ops.dispatch`.

Logits are a sum over parts, `scale * sum_i q_i . k_i`, and each part has its own number of key heads: query head h
reads key head h // (H // K_i). So MLA expanded is ((q_nope, q_rope), (k_nope, k_rope)) with one rotary key for all
heads, MLA absorbed is ((q_latent, q_rope), (c, k_rope)) with values c, and MHA, GQA and MQA are one part.

`selected_attention` is the same over entries that each query has chosen, and over no others: they are gathered.

Legend: B batch, S queries, C entries, T both where they are the same tokens, H query heads, K_i key heads of part i
(K_v of the values), D_i width of part i (D of all parts together), Dv width of the values; G groups of heads that choose
together, N entries chosen by a query.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from mla.ops import grouped_decode, splash
from mla.ops.dispatch import Backend, dispatch
from mla.ops.mask import Mask

# Finite, so that a row which sees nothing gives exp(0) times a zero mask and never inf - inf.
_MASKED = -1e30
# Rows of a tile of `cpu`: [128, T] scores stay in cache; 64 gains nothing, 256 loses a tenth.
_CPU_ROWS = 128
# Tiles are unrolled, at about 0.2 s of compiling each and layer.
_CPU_TILES = 16
# `blocked`: at most so many rows a block, so many scores a head and block, and so many lengths of keys.
_ROWS, _SCORES, _SEGMENTS = 256, 2**21, 8
# Of blocks of a window or a chunk: so many scores exist at once.
_BLOCK_SCORES = 2**25
# `gather`: so many chosen entries of each sequence and group exist at once.
_GATHERED = 2**14


def softmax_attention(
    queries: tuple[Float[Array, "B S H _"], ...],
    keys: tuple[Float[Array, "B C _ _"], ...],
    values: Float[Array, "B C _ Dv"],
    mask: Mask,
    *,
    scale: float,
    soft_cap: float | None = None,
    sink: Float[Array, " H"] | None = None,
    backend: str = "auto",
    platform: str | None = None,
    spread: Callable[..., Any] | None = None,
) -> Float[Array, "B S H Dv"]:
    """softmax(cap(scale * sum_i q_i . k_i)) @ values over the entries that `mask` lets each query see.

    The softmax is in fp32 whatever the inputs are (fp64 for fp64). A query that sees nothing gives zeros and zero
    gradients. What stands in entries that nobody sees never matters, as long as it is finite. Under a mask that says which
    entries have been chosen it is `selected_attention`.

    Args:
      queries: parts [B, S, H, D_i], fp32 or bf16.
      keys: parts [B, C, K_i, D_i]; K_i divides H.
      values: [B, C, K_v, Dv]; K_v divides H.
      mask: who sees whom, over S queries and C entries.
      scale: multiplies the logits.
      soft_cap: logits become `soft_cap * tanh(logits / soft_cap)` before the mask (Gemma 2, arXiv:2408.00118).
      sink: [H], a learned logit that joins each head's denominator and has no value (gpt-oss, arXiv:2508.10925).
      backend: auto, or one of `BACKENDS`, or several in order of preference: `mla.ops.dispatch`.
      platform: of the devices that this will run on, such as cpu; None: not known here, decided in lowering.
      spread: has a kernel run on each of several devices, `mla.sharding.Spread`; None: there is one.

    Returns:
      [B, S, H, Dv] in the dtype of `values`.

    Raises:
      UserError: the backend is unknown or cannot serve this call.
    """
    call = _Call(queries, keys, values, mask, soft_cap, sink, mask.chosen, spread)
    return _attend(call, scale, backend, platform)


def selected_attention(
    queries: tuple[Float[Array, "B S H _"], ...],
    keys: tuple[Float[Array, "B C _ _"], ...],
    values: Float[Array, "B C _ Dv"],
    indices: Int[Array, "B S G N"],
    mask: Mask,
    *,
    scale: float,
    soft_cap: float | None = None,
    sink: Float[Array, " H"] | None = None,
    backend: str = "auto",
    platform: str | None = None,
) -> Float[Array, "B S H Dv"]:
    """softmax(cap(scale * sum_i q_i . k_i)) @ values over those chosen entries that `mask` lets each query see.

    Chosen entries are gathered, in blocks of queries and again in the backward pass: cost goes with how many are chosen,
    and [block, N] of them exist at once. What is not chosen has no part in the softmax: a query that chose nothing, or
    nothing that it sees, gives zeros and zero gradients. An entry that a query chose twice counts twice.

    Args:
      queries: parts [B, S, H, D_i], fp32 or bf16.
      keys: parts [B, C, K_i, D_i]; K_i divides H.
      values: [B, C, K_v, Dv]; K_v divides H.
      indices: int32 [B, S, G, N] in 0 .. C-1, in any order; -1: none. G divides H, query head h reads what group
        h // (H // G) chose; G is 1 where all heads choose together.
      mask: who sees whom, over S queries and all C entries.
      scale: multiplies the logits.
      soft_cap: logits become `soft_cap * tanh(logits / soft_cap)` before the mask.
      sink: [H], a learned logit that joins each head's denominator and has no value.
      backend: auto, or one of `BACKENDS` that can read a selection, or several in order of preference.
      platform: of the devices that this will run on, such as cpu; None: not known here, decided in lowering.

    Returns:
      [B, S, H, Dv] in the dtype of `values`.

    Raises:
      UserError: the backend is unknown or cannot serve this call, such as one that reads all entries.
    """
    return _attend(_Call(queries, keys, values, mask, soft_cap, sink, indices), scale, backend, platform)


def attention_weights(
    logits: Float[Array, "B S H C"],
    mask: Mask,
    *,
    soft_cap: float | None = None,
    sink: Float[Array, " H"] | None = None,
) -> Float[Array, "B S H C"]:
    """The softmax alone, for mechanisms whose logits are no dot products: scaled logits [B, S, H, C] -> weights like it.

    Cap, sink and mask as in `softmax_attention`; all logits exist at once, so this is for few queries.
    """
    assert mask.chosen is None, "chosen entries are read by gathers, not by logits of all"
    return softmax_weights(logits, mask.by_head(logits.shape[2]).swapaxes(1, 2), soft_cap=soft_cap, sink=sink)


def softmax_weights(
    logits: Float[Array, "B S H C"],
    visible: Bool[Array, "B S #H C"],
    *,
    soft_cap: float | None = None,
    sink: Float[Array, " H"] | None = None,
) -> Float[Array, "B S H C"]:
    """The softmax of scaled logits [B, S, H, C] over what `visible` says; cap and sink as in `softmax_attention`."""
    sink = None if sink is None else sink.astype(logits.dtype)[:, None]
    weights, total = _softmax(_cap(logits, soft_cap), visible, sink)
    return weights / total


def attention_columns(
    queries: tuple[Float[Array, "B S H _"], ...],
    keys: tuple[Float[Array, "B C _ _"], ...],
    mask: Mask,
    *,
    scale: float,
    soft_cap: float | None = None,
    sink: Float[Array, " H"] | None = None,
) -> Float[Array, "B H C"]:
    """sum_i weight(i, c): how much attention each entry gets from each head, [B, H, C] in fp32.

    Blocks of queries are added up: S x C weights never exist at once. What `mask.chosen` leaves out gets nothing. Arguments
    as `softmax_attention`.
    """
    keys = tuple(k.transpose(0, 2, 1, 3) for k in keys)
    queries = tuple(q.transpose(0, 2, 1, 3) for q in queries)
    (batch, heads, length, _), count = queries[0].shape, keys[0].shape[2]
    sink = None if sink is None else sink.astype(_wide(queries[0]))[:, None, None]
    block = min(length, _ROWS, max(1, _SCORES // count))
    short = -length % block

    def cut(x, axis, fill=0):
        """[.., S, ..] -> [blocks, .., block, ..]"""
        x = jnp.pad(x, [(0, short if i == axis else 0) for i in range(x.ndim)], constant_values=fill)
        return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, block, *x.shape[axis + 1 :]), axis, 0)

    def add(total, inputs):
        positions, chosen, *parts = inputs
        logits = scale * sum(map(_grouped_logits, parts, keys))
        seen = mask.at(positions).by_head(heads)
        seen = seen if chosen is None else seen & _among(chosen, count, heads)
        weights, denominator = _softmax(_cap(logits, soft_cap), seen, sink)
        return total + (weights / denominator).sum(2), None

    picked = None if mask.chosen is None else cut(mask.chosen, 1, -1)
    inputs = (cut(mask.query_positions, 1, -1), picked, *(cut(q, 2) for q in queries))
    zero = jnp.zeros((batch, heads, count), _wide(queries[0]))
    if length <= block:
        return add(zero, jax.tree.map(lambda a: a[0], inputs))[0]
    return lax.scan(add, zero, inputs)[0]


def _among(chosen, count, heads):
    """int32 [B, S, G, N] -> bool [B, H, S, C], whether each of C entries is among those that were chosen."""

    def one(index):
        return jnp.zeros((count,), bool).at[jnp.where(index < 0, count, index)].set(True, mode="drop")

    found = jax.vmap(jax.vmap(jax.vmap(one)))(chosen)
    return jnp.repeat(found.swapaxes(1, 2), heads // chosen.shape[2], axis=1)


def attention_shares(
    queries: tuple[Float[Array, "B S H _"], ...],
    keys: tuple[Float[Array, "B C _ _"], ...],
    mask: Mask,
    *,
    scale: float,
    soft_cap: float | None = None,
    sink: Float[Array, " H"] | None = None,
) -> Float[Array, "B S _"]:
    """What each query gives each entry, on average over heads: fp32 [B, S, C].

    Where all heads have chosen together, [B, S, N] of the entries in `mask.chosen` [B, S, 1, N]. The weights of all heads
    exist for one block of queries at a time. Arguments as `softmax_attention`.
    """
    parts = [(q, k) for q, k in zip(queries, keys, strict=True) if q.shape[-1]]
    rows_of, keys = [q.transpose(0, 2, 1, 3) for q, _ in parts], tuple(k for _, k in parts)
    sink = None if sink is None else sink.astype(_wide(queries[0]))[:, None, None]

    def chosen(positions, indices, *queries):
        weights, total = _chosen_weights(positions, indices, queries, keys, mask, sink, scale, soft_cap)
        return (weights / total).mean(1, keepdims=True)

    def dense(positions, *queries):
        logits = scale * sum(_grouped_logits(q, k.transpose(0, 2, 1, 3)) for q, k in zip(queries, keys, strict=True))
        weights, total = _softmax(_cap(logits, soft_cap), mask.at(positions).by_head(logits.shape[1]), sink)
        return (weights / total).mean(1, keepdims=True)

    if mask.chosen is None:
        rows = min(_ROWS, max(16, _SCORES // mask.entry_positions.shape[1]))
        return _scan_rows(dense, mask.query_positions, rows_of, rows)[:, 0]
    picked = mask.chosen.transpose(0, 2, 1, 3)
    return _scan_rows(chosen, mask.query_positions, [picked, *rows_of], _gathered_rows(mask.chosen))[:, 0]


def _attend(call: _Call, scale: float, backend: str, platform: str | None) -> jax.Array:
    """Parts without channels are left out, sums are wide, and what can serve the rest runs."""
    parts = [(q, k) for q, k in zip(call.queries, call.keys, strict=True) if q.shape[-1]]
    queries, keys = tuple(q for q, _ in parts), tuple(k for _, k in parts)
    sink = None if call.sink is None else call.sink.astype(_wide(call.values))
    call = call._replace(queries=queries, keys=keys, sink=sink)
    attend = dispatch("attention", BACKENDS, backend, call, platform, call.spread, scale=scale, soft_cap=call.soft_cap)
    chosen = () if call.indices is None else (call.indices,)
    return attend(queries, keys, call.values, call.mask, sink, *chosen).astype(call.values.dtype)


class _Shape(NamedTuple):
    """What shapes the weights of contiguous positions; static."""

    window: int | None
    chunk: int | None
    soft_cap: float | None = None

    def entries(self, rows: slice) -> slice:
        """The entries that some query of `rows` sees."""
        first = 0 if self.window is None else max(0, rows.start - self.window + 1)
        return slice(first if self.chunk is None else max(first, rows.start // self.chunk * self.chunk), rows.stop)

    def rows(self, entries: slice, length: int) -> slice:
        """The queries below `length` that see some entry of `entries`."""
        last, stop = entries.stop - 1, length
        if self.window is not None:
            stop = min(stop, last + self.window)
        return slice(entries.start, stop if self.chunk is None else min(stop, (last // self.chunk + 1) * self.chunk))

    def visible(self, rows: slice, entries: slice) -> jax.Array:
        """bool [rows, entries]."""
        row, entry = (jnp.arange(s.start, s.stop, dtype=jnp.int32)[None] for s in (rows, entries))
        return Mask(row, entry, self.window, self.chunk).visible()[0]


def _wide(x):
    """The dtype of sums over x: fp32, or fp64 where x is (finite differences)."""
    return jnp.promote_types(x.dtype, jnp.float32)


def _cap(logits, soft_cap):
    return logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)


def _softmax(logits, visible, sink=None):
    """fp32 logits [..., C] -> unnormalised weights [..., C], their sum [..., 1]. The rest broadcasts against logits."""
    logits = jnp.where(visible, logits, _MASKED)
    highest = logits.max(-1, keepdims=True)
    highest = lax.stop_gradient(highest if sink is None else jnp.maximum(highest, sink))
    weights = jnp.where(visible, jnp.exp(logits - highest), 0)
    total = weights.sum(-1, keepdims=True) + (0 if sink is None else jnp.exp(sink - highest))
    return weights, jnp.where(total == 0, 1, total)


# ---- short reaches: blocks of queries, each over its own entries and those of the block before


def _in_blocks(attend: Any, tiles: int) -> Any:
    """A backend that cuts a text into `tiles` tiles at most, which for windows and chunks of a few tokens is still work
    that goes with the square of the text: such are cut into blocks as long as what a query sees."""

    def attend_blocks(queries, keys, values, mask, sink, scale, soft_cap):
        given, length = (queries, keys, values), queries[0].shape[1]
        reach = min(mask.window or length, mask.chunk or length)
        if not mask.contiguous or (mask.window and mask.chunk) or length <= tiles * reach:
            return attend(*given, mask, sink, scale, soft_cap)
        (batch, _, heads, _), count = queries[0].shape, -(-length // reach)

        def cut(x):
            """[B, T, ..] -> [blocks, B, reach, ..]"""
            x = jnp.pad(x, [(0, 0), (0, count * reach - length), *[(0, 0)] * (x.ndim - 2)])
            return jnp.moveaxis(x.reshape(batch, count, reach, *x.shape[2:]), 1, 0)

        queries, keys, values = jax.tree.map(cut, given)
        if mask.window:
            before = jax.tree.map(lambda x: jnp.pad(x[:-1], [(1, 0), *[(0, 0)] * (x.ndim - 1)]), (keys, values))
            keys, values = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=2), before, (keys, values))
        places = jnp.arange(keys[0].shape[2], dtype=jnp.int32)
        own = places[-reach:]

        def block(inputs):
            number, queries, keys, values = inputs
            there = jnp.where(number * reach + places >= own[0], places, -1)
            own_rows, there = (jnp.broadcast_to(a, (batch, a.shape[0])) for a in (own, there))
            return _blocked(queries, keys, values, Mask(own_rows, there, mask.window), sink, scale, soft_cap)

        several = max(1, _BLOCK_SCORES // (batch * heads * reach * places.shape[0]))
        numbers = jnp.arange(count, dtype=jnp.int32)
        outputs = lax.map(block, (numbers, queries, keys, values), batch_size=min(several, count))
        return jnp.moveaxis(outputs, 0, 1).reshape(batch, count * reach, *outputs.shape[3:])[:, :length]

    return attend_blocks


# ---- reference: the oracle of the others


def _reference(queries, keys, values, mask, sink, scale, soft_cap):
    """All scores at once, in fp32, with every key and value repeated for its heads."""
    heads = queries[0].shape[2]
    *keys, values = (jnp.repeat(x.astype(_wide(x)), heads // x.shape[2], axis=2) for x in (*keys, values))
    pairs = zip(queries, keys, strict=True)
    logits = scale * sum(jnp.einsum("bshd,bchd->bhsc", q.astype(_wide(q)), k) for q, k in pairs)
    sink = None if sink is None else sink[:, None, None]
    weights, total = _softmax(_cap(logits, soft_cap), mask.by_head(heads), sink)
    return jnp.einsum("bhsc,bchd->bshd", weights / total, values)


# ---- blocked: any mask, any device; memory for one block of rows


def _blocked(queries, keys, values, mask, sink, scale, soft_cap):
    """Blocks of query rows, each recomputed in the backward pass.

    Under a contiguous mask, a few segments of rows are unrolled, each against only the entries that it can see, and the
    blocks of a segment are scanned. Under any other mask all rows are one segment.
    """
    *keys, values = (x.transpose(0, 2, 1, 3) for x in (*keys, values))
    queries = [q.transpose(0, 2, 1, 3) for q in queries]
    length, count = queries[0].shape[2], values.shape[2]
    rows = min(_ROWS, max(16, _SCORES // count))
    segment = rows * -(-length // (rows * _SEGMENTS)) if mask.contiguous else length
    sink = None if sink is None else sink[:, None, None]

    outputs = []
    for start in range(0, length, segment):
        here = slice(start, min(start + segment, length))
        seen = _Shape(mask.window, mask.chunk).entries(here) if mask.contiguous else slice(0, count)
        cut = [x[:, :, seen] for x in (*keys, values)]

        def block(positions, *queries, cut=cut, seen=seen):
            logits = scale * sum(map(_grouped_logits, queries, cut[:-1]))
            visible = mask.at(positions, seen).by_head(logits.shape[1])
            weights, total = _softmax(_cap(logits, soft_cap), visible, sink)
            return _grouped_mix(weights, cut[-1]) / total

        outputs.append(_scan_rows(block, mask.query_positions[:, here], [q[:, :, here] for q in queries], rows))
    return jnp.concatenate(outputs, axis=2).transpose(0, 2, 1, 3)


def _scan_rows(block, positions, queries, rows):
    """block(positions [B, rows], *queries [B, H, rows, D_i]) -> [B, H, rows, Dv], over S rows in turn."""
    length = positions.shape[1]
    if length <= rows:
        return jax.checkpoint(block)(positions, *queries)
    short = -length % rows
    positions = jnp.pad(positions, ((0, 0), (0, short)), constant_values=-1)
    queries = [jnp.pad(q, ((0, 0), (0, 0), (0, short), (0, 0))) for q in queries]
    blocks = (
        jnp.moveaxis(positions.reshape(positions.shape[0], -1, rows), 1, 0),
        *(jnp.moveaxis(q.reshape(*q.shape[:2], -1, rows, q.shape[3]), 2, 0) for q in queries),
    )
    block = jax.checkpoint(block, prevent_cse=False)
    _, output = lax.scan(lambda _, inputs: (None, block(*inputs)), None, blocks)
    output = jnp.moveaxis(output, 0, 2)
    return output.reshape(*output.shape[:2], -1, output.shape[4])[:, :, :length]


def _grouped_logits(query, key):
    """[B, H, S, D], [B, K, C, D] -> fp32 [B, H, S, C]."""
    (batch, heads, rows, width), groups = query.shape, key.shape[1]
    query = query.reshape(batch, groups, heads // groups * rows, width)
    logits = jnp.einsum("bknd,bkcd->bknc", query, key, preferred_element_type=_wide(query))
    return logits.reshape(batch, heads, rows, -1)


def _grouped_mix(weights, values):
    """fp32 [B, H, S, C], [B, K, C, Dv] -> fp32 [B, H, S, Dv]."""
    (batch, heads, rows, count), groups = weights.shape, values.shape[1]
    weights = weights.astype(values.dtype).reshape(batch, groups, heads // groups * rows, count)
    mixed = jnp.einsum("bknc,bkcd->bknd", weights, values, preferred_element_type=_wide(values))
    return mixed.reshape(batch, heads, rows, -1)


# ---- gather: chosen entries


def _gather(queries, keys, values, mask, sink, indices, scale, soft_cap):
    """Blocks of query rows, each against copies of what it chose."""
    sink = None if sink is None else sink[:, None, None]

    def block(positions, indices, *queries):
        weights, total = _chosen_weights(positions, indices, queries, keys, mask, sink, scale, soft_cap)
        shape, value = weights.shape, _take(values, indices)
        weights = weights.astype(value.dtype).reshape(shape[0], value.shape[1], value.shape[4], -1, *shape[2:])
        mixed = jnp.einsum("bmjhrn,bmrnjd->bmjhrd", weights, value, preferred_element_type=_wide(value))
        return mixed.reshape(*shape[:3], -1) / total

    rest = [a.transpose(0, 2, 1, 3) for a in (indices, *queries)]
    return _scan_rows(block, mask.query_positions, rest, _gathered_rows(indices)).transpose(0, 2, 1, 3)


def _gathered_rows(indices):
    """Queries of a block, for choices [B, S, G, N]."""
    return max(1, _GATHERED // max(1, indices.shape[3]))


def _chosen_weights(positions, indices, queries, keys, mask, sink, scale, soft_cap):
    """A block's unnormalised weights of what it chose, fp32 [B, H, rows, N], and their sums [B, H, rows, 1].

    positions [B, rows], indices [B, G, rows, N], queries [B, H, rows, D_i]; keys [B, C, K_i, D_i].
    """

    def by_entry(x):
        """int32 [B, C] or [B, C, K] -> [B, M, rows, N, J]"""
        return None if x is None else _take(x.reshape(*x.shape[:2], -1, 1), indices)[..., 0]

    at = by_entry(mask.entry_positions)
    seen = mask.sees(positions[:, None, :, None, None], at, by_entry(mask.since), by_entry(mask.until))
    seen &= jnp.repeat(indices, at.shape[1] // indices.shape[1], axis=1)[..., None] >= 0
    seen = jnp.moveaxis(seen, 4, 2).reshape(at.shape[0], -1, *at.shape[2:4])  # [B, M J, rows, N]
    seen = jnp.repeat(seen, queries[0].shape[1] // seen.shape[1], axis=1)
    logits: Any = 0.0
    for query, key in zip(queries, keys, strict=True):
        key = _take(key, indices)
        query = query.reshape(query.shape[0], key.shape[1], key.shape[4], -1, *query.shape[2:])
        part = jnp.einsum("bmjhrd,bmrnjd->bmjhrn", query, key, preferred_element_type=_wide(query))
        logits += part.reshape(seen.shape)
    return _softmax(_cap(scale * logits, soft_cap), seen, sink)


def _take(x, indices):
    """What G groups chose from K heads, [B, C, K, D] at int32 [B, G, S, N] -> [B, M, S, N, J, D].

    M J is the least common multiple of G and K, in the order of query heads. Where a group has J > 1 heads of its own they
    lie side by side and are read as one row.
    """
    (batch, count, heads, width), groups = x.shape, indices.shape[1]
    rows = groups if heads % groups == 0 else heads
    both = math.lcm(rows, groups)
    x = x.reshape(batch, count, rows, -1)
    own = (jnp.arange(both) * rows // both)[:, None, None]
    indices = jnp.repeat(indices, both // groups, axis=1)
    taken = jax.vmap(lambda x, i: x.at[i, own].get(mode="clip"))(x, indices)
    return taken.reshape(*taken.shape[:4], heads // rows, width)


# ---- decode: a CPU, few queries, a long cache


def _decode(queries, keys, values, mask, sink, scale, soft_cap):
    """One matmul for each sequence over its cache as it lies, [C, K * D].

    To multiply key heads apart, XLA would first copy the whole cache from [C, K, D] to [K, C, D]. Here each query
    stands in the columns of its key head among zeros: more multiplications, and two to five times faster.
    """
    (batch, rows, heads, _), count = queries[0].shape, values.shape[1]
    logits: Any = 0.0
    for query, key in zip(queries, keys, strict=True):
        packed, cache = _pack(query, key.shape[2]), key.reshape(batch, count, -1)
        logits += jnp.einsum("bcx,bnx->bcn", cache, packed, preferred_element_type=_wide(query))
    # Without the barrier XLA folds the transpose into the matmul, which takes twice as long that way round.
    logits = lax.optimization_barrier(scale * logits).transpose(0, 2, 1).reshape(batch, rows, heads, count)
    sink = None if sink is None else sink[:, None]
    weights, total = _softmax(_cap(logits, soft_cap), mask.by_head(heads).swapaxes(1, 2), sink)
    weights, cache = weights.astype(values.dtype).reshape(batch, -1, count), values.reshape(batch, count, -1)
    mixed = jnp.einsum("bnc,bcx->bnx", weights, cache, preferred_element_type=_wide(values))
    return _unpack(mixed.reshape(batch, rows, heads, -1), values.shape[2]) / total


def _pack(x, groups):
    """[B, S, H, D] -> [B, S * H, K * D]: each head in the columns of its key head, among zeros."""
    batch, rows, heads, width = x.shape
    own = jnp.eye(groups, dtype=x.dtype)[:, None, :, None]
    return (x.reshape(batch, rows, groups, -1, 1, width) * own).reshape(batch, rows * heads, groups * width)


def _unpack(x, groups):
    """[B, S, H, K * D] -> [B, S, H, D]: from each head the columns of its key head."""
    batch, rows, heads, width = x.shape
    own = jnp.eye(groups, dtype=bool)[:, None, :, None]
    x = x.reshape(batch, rows, groups, heads // groups, groups, width // groups)
    return jnp.where(own, x, 0).sum(4).reshape(batch, rows, heads, -1)


# ---- cpu: training on a CPU, in tiles that stay in cache


def _cpu(queries, keys, values, mask, sink, scale, soft_cap):
    """A scan over heads with a backward pass of its own. Not over sequences: those may be sharded over devices."""
    *keys, values = (x.astype(_wide(x)).transpose(2, 0, 1, 3) for x in (*keys, values))
    query = jnp.concatenate([q.astype(_wide(q)).transpose(2, 0, 1, 3) * scale for q in queries], axis=-1)
    output, lse = _scan_heads(query, (*keys, values), _Shape(mask.window, mask.chunk, soft_cap))
    if sink is not None:
        output *= jax.nn.sigmoid(lse - sink[:, None, None])[..., None]
    return output.transpose(1, 2, 0, 3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _scan_heads(query, entries, shape: _Shape):
    """query [H, B, T, D], entries (keys [K_i, B, T, D_i] .., values [K_v, B, T, Dv]) -> [H, B, T, Dv], lse [H, B, T].

    lse is the logarithm of the softmax's denominator.
    """
    return _scan_heads_forward(query, entries, shape)[0]


def _scan_heads_forward(query, entries, shape):
    def body(_, inputs):
        head, q = inputs
        key, value = _read(entries, head, query.shape[0])
        return None, _head_forward(q, key, value, shape)

    _, (output, lse) = lax.scan(body, None, (jnp.arange(query.shape[0]), query))
    return (output, lse), (query, entries, output, lse)


def _scan_heads_backward(shape, saved, gradients):
    query, entries, output, lse = saved
    d_output, d_lse = gradients
    heads = query.shape[0]
    cuts = [sum(k.shape[-1] for k in entries[:i]) for i in range(1, len(entries) - 1)]

    def body(sums, inputs):
        head, q, own_lse, d_own, own_delta = inputs
        key, value = _read(entries, head, heads)
        dq, dk, dv = _head_backward(q, key, value, own_lse, d_own, own_delta, shape)
        return _add(sums, (*jnp.split(dk, cuts, axis=-1), dv), head, heads), dq

    # FlashAttention-2 (arXiv:2307.08691, algorithm 2); the gradient of lse enters where delta does.
    delta = (d_output * output).sum(-1) - d_lse
    zeros = jax.tree.map(jnp.zeros_like, entries)
    d_entries, d_query = lax.scan(body, zeros, (jnp.arange(heads), query, lse, d_output, delta))
    return d_query, d_entries


_scan_heads.defvjp(_scan_heads_forward, _scan_heads_backward)


def _read(entries, head, heads):
    """What query head `head` reads: keys [B, T, D], values [B, T, Dv]."""
    own = [lax.dynamic_index_in_dim(x, head // (heads // x.shape[0]), 0, keepdims=False) for x in entries]
    return jnp.concatenate(own[:-1], axis=-1), own[-1]


def _add(sums, own, head, heads):
    """Adds gradients in what query head `head` read to those of all heads."""
    shares = [heads // x.shape[0] for x in sums]
    return tuple(
        x.at[head].set(y) if share == 1 else x.at[head // share].add(y)
        for x, y, share in zip(sums, own, shares, strict=True)
    )


def _tiles(length):
    rows = max(_CPU_ROWS, -(-length // _CPU_TILES))
    return [slice(start, min(start + rows, length)) for start in range(0, length, rows)]


def _head_forward(q, k, v, shape):
    """One head: q [B, T, D], k [B, T, D], v [B, T, Dv] -> [B, T, Dv], lse [B, T]."""
    outputs, lses = [], []
    for rows in _tiles(q.shape[1]):
        seen = shape.entries(rows)
        logits = _cap(jnp.einsum("btd,bcd->btc", q[:, rows], k[:, seen]), shape.soft_cap)
        logits = jnp.where(shape.visible(rows, seen), logits, _MASKED)
        highest = logits.max(-1, keepdims=True)
        weights = jnp.exp(logits - highest)
        total = weights.sum(-1, keepdims=True)
        outputs.append(jnp.einsum("btc,bcd->btd", weights, v[:, seen]) / total)
        lses.append((highest + jnp.log(total))[..., 0])
    return jnp.concatenate(outputs, axis=1), jnp.concatenate(lses, axis=1)


def _head_backward(q, k, v, lse, d_output, delta, shape):
    """Gradients of one head in q, k, v, all [B, T, ..]. Tiles are [entries, queries], so that two of the three products
    that read them are plain matmuls; as [queries, entries] it would be one."""
    dq, dks, dvs = jnp.zeros_like(q), [], []
    for own in _tiles(q.shape[1]):
        rows = shape.rows(own, q.shape[1])
        logits = _cap(jnp.einsum("bcd,btd->bct", k[:, own], q[:, rows]), shape.soft_cap)
        weights = jnp.exp(jnp.where(shape.visible(rows, own).T, logits - lse[:, None, rows], _MASKED))
        d_logits = weights * (jnp.einsum("bcd,btd->bct", v[:, own], d_output[:, rows]) - delta[:, None, rows])
        if shape.soft_cap is not None:
            d_logits *= 1 - (logits / shape.soft_cap) ** 2
        dvs.append(jnp.einsum("bct,btd->bcd", weights, d_output[:, rows]))
        dks.append(jnp.einsum("bct,btd->bcd", d_logits, q[:, rows]))
        dq = dq.at[:, rows].add(jnp.einsum("bct,bcd->btd", d_logits, k[:, own]))
    return dq, jnp.concatenate(dks, axis=1), jnp.concatenate(dvs, axis=1)


# ---- cudnn: NVIDIA's fused kernel, several times faster than `blocked` (results/h200)


def _cudnn(queries, keys, values, mask, sink, scale, soft_cap):
    """`_Call.unmet_by_cudnn` has refused what the kernel cannot do. It has one width: narrower values are filled up."""
    del soft_cap, sink
    window, width = None if mask.window is None else (mask.window - 1, 0), values.shape[-1]
    query, key, value = splash.side_by_side(queries, keys, values, max(x.shape[2] for x in (*keys, values)))
    value = jnp.pad(value, [(0, 0)] * 3 + [(0, key.shape[-1] - width)])
    options: dict[str, Any] = {"scale": scale, "is_causal": True, "local_window_size": window, "implementation": "cudnn"}
    return jax.nn.dot_product_attention(query, key, value, **options)[..., :width]


# ---- splash: a fused kernel for TPUs


def _splash(queries, keys, values, mask, sink, scale, soft_cap, spread):
    """`_Call.unmet_by_splash` has refused what the kernel cannot do."""
    shape: dict[str, Any] = {"window": mask.window, "chunk": mask.chunk, "scale": scale, "soft_cap": soft_cap}
    return splash.attend(queries, keys, values, sink, **shape, spread=spread)


# ---- grouped_decode: a kernel for TPUs, one token over a cache


def _grouped_decode(queries, keys, values, mask, sink, scale, soft_cap, spread):
    """`_Call.unmet_by_grouped_decode` has refused what the kernel cannot do."""
    apart = None if values is keys[0] else values
    where: dict[str, Any] = {"scale": scale, "soft_cap": soft_cap, "spread": spread}
    return grouped_decode.attend(queries, keys, apart, mask.visible()[:, 0], sink, **where)


# ---- which serves what


class _Call(NamedTuple):
    """One call of `softmax_attention` or `selected_attention`, and what the narrower backends miss in it."""

    queries: tuple[jax.Array, ...]
    keys: tuple[jax.Array, ...]
    values: jax.Array
    mask: Mask
    soft_cap: float | None
    sink: jax.Array | None
    indices: jax.Array | None = None
    spread: Any = None

    def unmet_by_gather(self) -> str:
        return _unmet({"a selection of entries": self.indices is not None})

    def unmet_by_dense(self) -> str:
        return _unmet({"a call without a selection": self.indices is None})

    def unmet_by_cpu(self) -> str:
        """What `cpu`, `cudnn` and `splash` know of a mask: positions in order, a window, a chunk."""
        needs = {
            "a contiguous mask (training; not a cache)": self.mask.contiguous,
            "entries without lifetimes": self.mask.since is None and self.mask.until is None,
            "entries that all key heads share": self.mask.entry_positions.ndim == 2,
        }
        return _unmet(needs, self.unmet_by_dense())

    def unmet_by_cudnn(self) -> str:
        width = sum(key.shape[-1] for key in self.keys)
        needs = {
            "a mask without chunks": self.mask.chunk is None,
            "bf16 or fp16": self.values.dtype in (jnp.bfloat16, jnp.float16),
            "values no wider than keys": self.values.shape[-1] <= width,
            "a head width that is a multiple of 8 and at most 128": width % 8 == 0 and width <= 128,
            "no soft_cap": self.soft_cap is None,
            "no sink": self.sink is None,
        }
        return _unmet(needs, self.unmet_by_cpu())

    def unmet_by_splash(self) -> str:
        heads, mask = self.queries[0].shape[2], self.mask
        needs = {
            "a window or a chunk, not both": mask.window is None or mask.chunk is None,
            "bf16 or fp32": self.values.dtype in (jnp.bfloat16, jnp.float32),
            "heads that the mesh splits evenly": self.spread is None or heads % self.spread.parts("head") == 0,
        }
        return _unmet(needs, self.unmet_by_cpu())

    def unmet_by_grouped_decode(self) -> str:
        heads = [x.shape[2] for x in (*self.keys, self.values)] + list(self.mask.entry_positions.shape[2:])
        wide = all(x.shape[2] == 1 or x.shape[3] % grouped_decode.LANES == 0 for x in (*self.keys, self.values))
        split = 1 if self.spread is None else self.spread.parts("head")
        needs = {
            "one query of each sequence": self.queries[0].shape[1] == 1,
            "bf16 or fp32": self.values.dtype in (jnp.bfloat16, jnp.float32),
            f"key heads of a multiple of {grouped_decode.LANES} channels, or a single one": wide,
            "key heads that share query heads evenly": all(max(heads) % count == 0 for count in heads),
            "heads that the mesh splits evenly": all(n % split == 0 for n in (self.queries[0].shape[2], *heads) if n > 1),
        }
        return _unmet(needs, self.unmet_by_dense())

    def fills_tiles(self) -> bool:
        """Shorter texts are mostly what a tile is filled up with."""
        return self.queries[0].shape[1] >= splash.LANES

    def equal_heads(self) -> bool:
        """cuDNN's partitioning refuses key heads that a mesh cannot split as it splits the query heads."""
        return self.queries[0].shape[2] == max(x.shape[2] for x in (*self.keys, self.values))

    def few_queries(self) -> bool:
        """`decode` multiplies by zeros to leave the cache where it lies: from four queries on, moving it is cheaper."""
        return self.queries[0].shape[1] <= 2


def _unmet(needs: dict[str, bool], others: str = "") -> str:
    return ", ".join(filter(None, (others, *(need for need, met in needs.items() if not met))))


BACKENDS: dict[str, Backend[_Call]] = {
    "cpu": Backend(_in_blocks(_cpu, _CPU_TILES), _Call.unmet_by_cpu, best_on=("cpu",)),
    "decode": Backend(_decode, _Call.unmet_by_dense, best=_Call.few_queries, best_on=("cpu",)),
    "cudnn": Backend(_cudnn, _Call.unmet_by_cudnn, best=_Call.equal_heads, best_on=("cuda",), only_on=("cuda",)),
    "splash": Backend(
        _splash, _Call.unmet_by_splash, best=_Call.fills_tiles, best_on=("tpu",), only_on=("tpu",), whole=True
    ),
    # No TPU has run it yet: `auto` does not take it.
    "grouped_decode": Backend(
        _grouped_decode, _Call.unmet_by_grouped_decode, best=lambda call: False, only_on=("tpu",), whole=True
    ),
    "blocked": Backend(_in_blocks(_blocked, _SEGMENTS), _Call.unmet_by_dense),
    "gather": Backend(_gather, _Call.unmet_by_gather),
    "reference": Backend(_reference, _Call.unmet_by_dense),
}
