"""The lightning indexer of DeepSeek-V3.2 (2512.02556): small heads that score entries, so that the best can be chosen.

Legend: B batch, S queries, C entries, N chosen entries, J index heads, D width of an index head.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from mla.ops.mask import Mask

_SCORES = 2**21  # of a block of queries that exist at once, for each head


def index_scores(
    queries: Float[Array, "B S J D"], weights: Float[Array, "B S J"], keys: Float[Array, "B C D"]
) -> Float[Array, "B S C"]:
    """sum_j weights_j ReLU(queries_j . keys), in fp32 at least. One head after the other, again in the backward pass."""
    wide = jnp.promote_types(queries.dtype, jnp.float32)

    @jax.checkpoint
    def head(query, weight, keys):
        products = jnp.einsum("bsd,bcd->bsc", query, keys, preferred_element_type=wide)
        return weight.astype(wide)[..., None] * jax.nn.relu(products)

    return sum(head(queries[:, :, j], weights[:, :, j], keys) for j in range(queries.shape[2]))  # type: ignore[return-value]


def best(scores: Float[Array, "*rows C"], visible: Bool[Array, "*_"], count: int) -> Int[Array, "*rows N"]:
    """The entries with the highest scores, best first, of equal ones the earliest: int32 [..., min(count, C)].

    Args:
      scores: [..., C].
      visible: bool, broadcasts against scores; what is not visible is never chosen: -1 in its place.
      count: static.
    """
    scores = jnp.where(visible, lax.stop_gradient(scores), -jnp.inf)
    found, index = lax.top_k(scores, min(count, scores.shape[-1]))
    return jnp.where(found > -jnp.inf, index, -1).astype(jnp.int32)


def best_by_index(
    queries: Float[Array, "B S J D"], weights: Float[Array, "B S J"], keys: Float[Array, "B C D"], mask: Mask, count: int
) -> Int[Array, "B S N"]:
    """The `best` entries that each query sees, by `index_scores`. In blocks of queries; nothing is differentiated.

    Of equal scores, such as the 0 of entries that no head asks for, the earlier position is taken, wherever it is stored.
    """
    queries, weights, keys = (lax.stop_gradient(a) for a in (queries, weights, keys))
    if not mask.contiguous and mask.entry_positions.ndim == 2 and (mask.window or mask.chunk or mask.since is not None):
        # Rings, and entries that are there in several forms, are not in the order of the text.
        order = jnp.argsort(mask.entry_positions, axis=1)
        arrays = (mask.entry_positions, mask.since, mask.until)
        at, since, until = (None if a is None else jnp.take_along_axis(a, order, axis=1) for a in arrays)
        assert at is not None
        mask = dataclasses.replace(mask, entry_positions=at, since=since, until=until)
        keys = jnp.take_along_axis(keys, order[..., None], axis=1)
        chosen = _best_by_index(queries, weights, keys, mask, count)
        return jnp.where(chosen < 0, -1, jax.vmap(lambda row, index: row[index])(order, chosen)).astype(jnp.int32)
    return _best_by_index(queries, weights, keys, mask, count)


def _best_by_index(queries, weights, keys, mask, count):
    (batch, length, *_), rows = queries.shape, max(1, _SCORES // max(1, keys.shape[1]))

    def block(inputs):
        positions, queries, weights = inputs
        visible = mask.at(positions).visible()
        visible = visible if visible.ndim == 3 else visible.any(-1)
        return best(index_scores(queries, weights, keys), visible, count)

    if length <= rows:
        return block((mask.query_positions, queries, weights))

    def cut(x, fill=0):
        """[B, S, ..] -> [blocks, B, rows, ..]"""
        x = jnp.pad(x, [(0, 0), (0, -length % rows), *[(0, 0)] * (x.ndim - 2)], constant_values=fill)
        return jnp.moveaxis(x.reshape(batch, -1, rows, *x.shape[2:]), 1, 0)

    chosen = lax.map(block, (cut(mask.query_positions, -1), cut(queries), cut(weights)))
    return jnp.moveaxis(chosen, 0, 1).reshape(batch, -1, chosen.shape[-1])[:, :length]


def chosen_scores(
    queries: Float[Array, "B S J D"],
    weights: Float[Array, "B S J"],
    keys: Float[Array, "B C D"],
    chosen: Int[Array, "B S N"],
) -> Float[Array, "B S N"]:
    """`index_scores` of chosen entries alone, which are gathered; -1 chooses none, and has the score of some entry."""
    picked = jax.vmap(lambda keys, index: keys[index])(keys, chosen)
    wide = jnp.promote_types(queries.dtype, jnp.float32)
    products = jnp.einsum("bsjd,bsnd->bsjn", queries, picked, preferred_element_type=wide)
    return jnp.einsum("bsj,bsjn->bsn", weights.astype(wide), jax.nn.relu(products))


def divergence(
    shares: Float[Array, "B S N"], scores: Float[Array, "B S N"], seen: Bool[Array, "B S N"]
) -> Float[Array, "B S"]:
    """KL(p || softmax(scores)) over the entries that are seen, p the shares divided by their sum; 0 where nothing is seen.

    The shares are not differentiated.
    """
    shares = jnp.where(seen, lax.stop_gradient(shares), 0)
    total = shares.sum(-1, keepdims=True)
    p = shares / jnp.where(total == 0, 1, total)
    log_q = jax.nn.log_softmax(jnp.where(seen, scores, -1e30), axis=-1)
    return jnp.sum(jnp.where(p > 0, p * (jnp.log(jnp.where(p > 0, p, 1)) - log_q), 0), axis=-1)
