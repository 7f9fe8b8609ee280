"""Tensor product attention, TPA (2501.06425): queries, keys and values as sums of outer products of small factors.

    a_K = x W_aK -> [H, R_K],  b_K = RoPE(x W_bK) -> [R_K, d_h]      k_i = 1/R_K sum_r a_K[i, r] b_K[r]
    a_V = x W_aV -> [H, R_V],  b_V = x W_bV       -> [R_V, d_h]      v_i = 1/R_V sum_r a_V[i, r] b_V[r]
    q alike with R_Q, or (K/V-only, rank_q = 0) q_i = RoPE(x W_Q,i);  o_i = softmax(q_i k_i^T / sqrt(d_h)) v_i

RoPE acts on the b factors only and so commutes with the sums (theorem 3.1). Remembers the factors: (R_K + R_V)(H + d_h)
elements a token. With `contextual_a` off the a factors are learned constants and only b is stored, (R_K + R_V) d_h; with
`contextual_b` off it is the other way round, (R_K + R_V) H: MHA and MQA are special cases of the first.

  expanded   k_i and v_i are built from their factors: 2 H d_h (R_K + R_V) FLOPs an entry, then 4 H d_h a pair.
  absorbed   neither is built: logits are a_K-weighted sums of q_i . b_K[r], values a_V-weighted sums of b_V[r].

Legend: B batch, S queries, T tokens, C entries, H heads, R rank (q, k, v), d = head_dim.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mla.attention.contract import Surroundings, require
from mla.attention.softmax.base import AbsorbingConfig, AbsorbingMixer, Cost, Expanded
from mla.layers.basic import TO_HEADS, TO_LATENT, Axes, Linear, matrix, merge_heads, split_heads, wide_dtype
from mla.ops.mask import Mask
from mla.ops.rope import rotate

FEW = 16  # new tokens of a decoding step, or of a short piece


class Factors(NamedTuple):
    """Factors of keys and values: a [B, C, H, R], and b [B, C, R, d], stored as [B, C, 1, R d] since no head owns a row.
    One that is the same for all tokens is not stored: None."""

    a_key: jax.Array | None
    b_key: jax.Array | None
    a_value: jax.Array | None
    b_value: jax.Array | None


@dataclasses.dataclass
class TensorProductConfig(AbsorbingConfig):
    """Tensor product attention.

    Paper: 2501.06425
    Remembers: factors of k and v
    Elements: (R_K + R_V)(H + d_h)
    Use: bytes that hardly grow with heads; `rank_q=0` is the K/V-only variant
    """

    head_dim: int = 0  # d_h; 0: d_model / num_heads
    rank_q: int = 6  # R_Q; 0: ordinary queries (K/V-only)
    rank_k: int = 2  # R_K
    rank_v: int = 2  # R_V
    contextual_a: bool = True  # a factors come from x; otherwise they are learned constants
    contextual_b: bool = True  # b factors alike
    factor_init: str = "code"  # spread of the factors: code or paper (Xavier, two readings of it), unit (as all projections)

    def width(self, around: Surroundings) -> int:
        return self.head_dim or self.default_head_dim(around, "head_dim")

    def validate(self, around: Surroundings) -> None:
        super().validate(around)
        for name in ("rank_k", "rank_v"):
            require(getattr(self, name) >= 1, name, f"{getattr(self, name)} is not a positive number of outer products")
        even = self.width(around) % 2 == 0
        require(even, "head_dim", f"{self.width(around)} is odd; RoPE rotates pairs of channels")
        known = ("code", "paper", "unit")
        require(self.factor_init in known, "factor_init", f"{self.factor_init!r} is none of {', '.join(known)}")
        require(
            self.contextual_a or self.contextual_b, "contextual_a", "a and b factors are both constants; set one to true"
        )

    def elements(self, around: Surroundings) -> int:
        each = self.contextual_a * self.heads(around) + self.contextual_b * self.width(around)
        return (self.rank_k + self.rank_v) * each


class Factor(nnx.Module):
    """x [B, T, D] -> [B, T, rows, columns]; one that is not contextual gives the same constants for every token."""

    def __init__(
        self, around: Surroundings, rows: int, columns: int, axes: Axes, *, contextual: bool, init: str, rngs: nnx.Rngs
    ):
        d, self.rows, self.dtype, self.contextual = around.d_model, rows, around.dtype, contextual
        # Xavier of the kernel seen as [D, rows, columns], as the released code has it, or as a matrix, as the paper says.
        spreads = {"code": (2 / ((d + rows) * columns)) ** 0.5, "paper": (2 / (d + rows * columns)) ** 0.5, "unit": d**-0.5}
        if contextual:
            self.project = Linear(d, rows * columns, axes, rngs=rngs, dtype=around.dtype, gain=spreads[init] * d**0.5)
        else:
            drawn = jax.random.normal(rngs.params(), (rows, columns), jnp.float32)
            self.constant = matrix(drawn, (None, None), multiplies=False)

    def __call__(self, x: jax.Array) -> jax.Array:
        return split_heads(self.project(x), self.rows) if self.contextual else self.constants(*x.shape[:2])

    def constants(self, batch: int, tokens: int) -> jax.Array:
        return jnp.broadcast_to(self.constant[...].astype(self.dtype), (batch, tokens, *self.constant[...].shape))


class TensorProduct(AbsorbingMixer[TensorProductConfig, tuple[jax.Array, ...], Factors]):
    """Attention of H heads whose queries, keys and values are sums of outer products a x b; the factors are the entries."""

    a_query: Factor
    b_query: Factor
    a_key: Factor
    b_key: Factor
    a_value: Factor
    b_value: Factor

    def __init__(self, config: TensorProductConfig, around: Surroundings, *, rngs: nnx.Rngs):
        super().__init__(config, around, rngs=rngs)
        self.head_dim, self.rope_theta = config.width(around), config.theta(around)
        self.ranks = config.rank_q, config.rank_k, config.rank_v
        for name, rank in zip(("query", "key", "value"), self.ranks, strict=True):
            kinds: dict[str, Any] = {
                "a": (self.num_heads, rank, TO_HEADS, config.contextual_a),
                "b": (rank, self.head_dim, TO_LATENT, config.contextual_b),
            }
            for kind, (*shape, contextual) in kinds.items():
                # A layer that reads another one's factors still has constants of its own.
                if rank and (name == "query" or around.remembers or not contextual):
                    made = Factor(around, *shape, contextual=contextual, init=config.factor_init, rngs=rngs)
                    setattr(self, f"{kind}_{name}", made)
        if not config.rank_q:
            self.query = Linear(around.d_model, self.num_heads * self.head_dim, TO_HEADS, rngs=rngs, dtype=around.dtype)
        self.make_output(self.head_dim, rngs)

    def queries(self, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, ...]:
        """(a_Q [B, S, H, R_Q], b_Q [B, S, R_Q, d]), or (q [B, S, H, d],) in the K/V-only variant."""
        if not self.ranks[0]:
            return (rotate(split_heads(self.query(x), self.num_heads), positions, self.rope_theta),)
        return self.a_query(x), rotate(self.b_query(x), positions, self.rope_theta)

    def entries(self, x: jax.Array, positions: jax.Array) -> Factors:
        a_key, b_key, a_value, b_value = None, None, None, None
        if self.config.contextual_a:
            a_key, a_value = self.a_key(x), self.a_value(x)
        if self.config.contextual_b:
            rows = rotate(self.b_key(x), positions, self.rope_theta), self.b_value(x)
            b_key, b_value = (split_heads(merge_heads(b), 1) for b in rows)
        return Factors(a_key, b_key, a_value, b_value)

    def shift(self, entries: Factors, by: jax.Array) -> Factors:
        if entries.b_key is None:  # constants are rotated on read
            return entries
        rows = rotate(split_heads(merge_heads(entries.b_key), self.ranks[1]), by, self.rope_theta)
        return entries._replace(b_key=split_heads(merge_heads(rows), 1))

    def factors(self, entries: Factors, mask: Mask) -> tuple[jax.Array, ...]:
        """All four, a [B, C, H, R] and b [B, C, R, d], constants included."""
        (batch, count), (_, rank_k, rank_v) = mask.entry_positions.shape, self.ranks
        if entries.a_key is None or entries.a_value is None:
            a_key, a_value = self.a_key.constants(batch, count), self.a_value.constants(batch, count)
        else:
            a_key, a_value = entries.a_key, entries.a_value
        if entries.b_key is None or entries.b_value is None:
            b_key = rotate(self.b_key.constants(batch, count), mask.entry_positions, self.rope_theta)
            b_value = self.b_value.constants(batch, count)
        else:
            b_key, b_value = (
                entries.b_key.reshape(batch, count, rank_k, -1),
                entries.b_value.reshape(batch, count, rank_v, -1),
            )
        return a_key, b_key, a_value, b_value

    def owners(self) -> int:
        # Constant factors b are rotated on read, to where a whole token stands.
        return super().owners() if self.config.contextual_b else 1

    def costs(self) -> tuple[Cost, Cost]:
        (rank_q, rank_k, rank_v), heads, width = self.ranks, self.num_heads, self.head_dim
        built = 2 * heads * width * (rank_k + rank_v)
        expanded = Cost(pair=4 * heads * width, entry=built, query=2 * heads * width * rank_q)
        folded = 2 * rank_q * rank_k * (width + heads) if rank_q else 2 * heads * rank_k * width
        return expanded, Cost(pair=folded + 2 * heads * rank_k + heads * rank_v * (2 * width + 1))

    def absorbs(self, new: int, entries: int) -> bool:
        """Whether to absorb: where that costs fewer FLOPs and queries are FEW, since all logits exist at once."""
        return super().absorbs(new, entries) and (new <= FEW or self.config.attend == "absorbed")

    def expanded(self, queries: tuple[jax.Array, ...], entries: Factors, mask: Mask) -> Expanded:
        a_key, b_key, a_value, b_value = self.factors(entries, mask)
        query = _product(*queries) if self.ranks[0] else queries[0]
        key, value = _product(a_key, b_key), _product(a_value, b_value)
        return Expanded((query,), (key,), value, self.head_dim**-0.5)

    def attend_absorbed(self, queries: tuple[jax.Array, ...], entries: Factors, mask: Mask) -> jax.Array:
        (rank_q, rank_k, rank_v), wide = self.ranks, wide_dtype(self.around.dtype)
        a_key, b_key, a_value, b_value = self.factors(entries, mask)
        scale = self.head_dim**-0.5 / rank_k / (rank_q or 1)
        inner = jnp.einsum("bsqd,bckd->bsqck", queries[-1] * scale, b_key, preferred_element_type=wide)
        if rank_q:  # the products b_Q . b_K are the same for all heads
            inner = jnp.einsum("bshq,bsqck->bshck", queries[0].astype(wide), inner)
        a_key, a_value = (a.astype(wide).swapaxes(1, 2)[:, None] for a in (a_key, a_value))  # [B, 1, H, C, R]
        # Term by term: XLA's CPU compiler (jax 0.10.2) gets jnp.sum(a_key * inner, -1) wrong where a factor follows (a cap).
        logits = functools.reduce(jnp.add, (a_key[..., r] * inner[..., r] for r in range(rank_k)))
        shares = self.weights(logits, mask)[..., None] * (a_value / rank_v)
        return merge_heads(jnp.einsum("bshcv,bcvd->bshd", shares.astype(self.around.dtype), b_value))


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    """1/R sum_r a[.., r] b[r, ..]: [B, T, H, R], [B, T, R, d] -> [B, T, H, d]."""
    return jnp.einsum("bthr,btrd->bthd", a, b) / b.shape[2]
