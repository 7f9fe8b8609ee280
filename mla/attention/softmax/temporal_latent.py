"""Multi-head temporal latent attention (MTLA, Deng and Woodland 2505.13544; the authors' code where the two differ).

MLA whose latents of `stride` neighbouring tokens are summed into one, each weighed by a gate that looks at the latent and at
where its chunk stands in the text:

    c_i = LayerNorm(x_i W_DKV)    w_i = sigmoid((pe_j W_p + b_p) . (c_i W_c + b_c))    j = floor(i / stride)
    C_i = sum of w_n c_n from the first token of chunk j to i        k_rope of a chunk: that of its newest token

LayerNorm has a bias; pe_j is the sinusoid of kv_lora_rank channels at position j (1706.03762: sines on even channels). A
finished chunk is seen as its last token left it, the open one as the query's own token leaves it. So there is one entry
(C, k_rope) for each chunk, which every further token overwrites in place: ceil(T / stride) (kv_lora_rank + d_r) elements
after T tokens, the open chunk included. In training all C_i are keys for as long as they are the newest of their chunk;
[T, T] scores are computed, of which T / stride + 1 in a row count. What heads do with entries is MLA's.

pe_j is absolute: a text that starts elsewhere in a chunk, or in another chunk, is another text. With a stride of 1 this is
MLA with a gate on each latent. Under a codec, each token is added to the sum as it was coded, so that a text that is read
in pieces is what it is in one.

Legend: B batch, S new tokens, R = kv_lora_rank.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from mla.attention.contract import Surroundings, Term, mechanism, require
from mla.attention.softmax.base import NewEntries
from mla.attention.softmax.mla import Latents
from mla.cache.clock import Clock
from mla.cache.stores import Entries, LayerCache, StoreSpec
from mla.layers.basic import LayerNorm, Linear, wide_dtype

MLAConfig, MLA = mechanism("mla")


@dataclasses.dataclass
class TemporalLatentConfig(MLAConfig):  # type: ignore[misc, valid-type]
    """Multi-head temporal latent attention.

    Paper: 2505.13544
    Remembers: one latent and one rotated key for every s tokens
    Elements: (kv_lora_rank + d_r) / s
    Use: MLA's bytes divided by s; neighbouring tokens are blended, the newest too
    """

    stride: int = 2  # s, tokens of a chunk
    gate_dim: int = 0  # channels in which a latent and its chunk's position meet; 0: kv_lora_rank / 4

    def gate_width(self) -> int:
        return self.gate_dim or max(1, self.kv_lora_rank // 4)

    def validate(self, around: Surroundings) -> None:
        super().validate(around)
        require(self.stride >= 1, "stride", f"{self.stride} is not a positive number of tokens")
        require(self.gate_dim >= 0, "gate_dim", f"{self.gate_dim} is below 0, which means kv_lora_rank / 4")
        require(self.window == 0, "window", "summed entries do not leave token by token; set it to 0")

    def cache_formula(self, around: Surroundings) -> list[Term]:
        return [Term(self.elements(around), stride=self.stride, open=True)]


class TemporalLatent(MLA):  # type: ignore[misc, valid-type]
    """Multi-head latent attention over running sums of gated latents."""

    paged: ClassVar[bool] = False  # a chunk's latent changes while tokens join it

    def __init__(self, config: TemporalLatentConfig, around: Surroundings, *, rngs: Any):
        super().__init__(config, around, rngs=rngs)
        if around.remembers:
            self.kv_norm, width = LayerNorm(self.rank, eps=around.norm_eps), config.gate_width()
            make: dict[str, Any] = {"rngs": rngs, "dtype": around.dtype, "use_bias": True}
            self.gate_latent, self.gate_place = (Linear(self.rank, width, ("latent", None), **make) for _ in range(2))

    def seen(self, tokens: int) -> int:
        return -(-tokens // self.config.stride)

    def stores(self) -> dict[str, StoreSpec]:
        """An entry for each chunk. With a stride of 1 nothing is summed, and entries are those of any token."""
        stride = self.config.stride
        return {"entries": Entries(self.streams(), Clock(stride, open=stride > 1))}

    def gated(self, c_kv: jax.Array, positions: jax.Array) -> jax.Array:
        """w c of latents [B, S, 1, R] at int32 positions [B, S] or [1, S], in fp32 at least."""
        wide = wide_dtype(c_kv.dtype)
        place = self.gate_place(sinusoid(positions // self.config.stride, self.rank, wide))[:, :, None]
        logits = jnp.sum(self.gate_latent(c_kv).astype(wide) * place.astype(wide), axis=-1, keepdims=True)
        return jax.nn.sigmoid(logits) * c_kv.astype(wide)

    def new_entries(self, x: jax.Array, positions: jax.Array, cache: LayerCache | None) -> NewEntries:
        """The chunk of each token as that token leaves it."""
        (c_kv, k_rope), stride = self.entries(x, positions), self.config.stride
        gated = self.gated(c_kv, positions)
        if stride == 1:
            return NewEntries(Latents(gated.astype(c_kv.dtype), k_rope), cache)
        where, clock = jnp.broadcast_to(positions, x.shape[:2]), Clock(stride, open=True)
        if cache is None:
            joins = follows = clock.joins(where, jnp.full(x.shape[:1], -1))
            codec = None
        else:
            store = cache["entries"]
            stored, newest = store.newest(gated.dtype)
            joins, codec = clock.joins(where, newest), getattr(store.streams.c_kv, "codec", None)
            follows = joins & jnp.pad(where[:, :-1] >= 0, ((0, 0), (1, 0)))
            gated += jnp.where((joins & ~follows)[..., None, None], stored.c_kv, 0)  # the first token's, if any
        if codec is None:
            sums = running_sums(gated, follows, stride).astype(c_kv.dtype)
        else:
            sums = coded_sums(gated, follows, stride, codec, c_kv.dtype)
        return NewEntries(Latents(sums, k_rope), cache, joins)


def sinusoid(positions: jax.Array, channels: int, dtype: Any) -> jax.Array:
    """[..., channels] of int32 [...]: sines on even channels, cosines on odd ones, at frequencies 1e4^(-2k / channels)."""
    index = jnp.arange(channels)
    angles = positions[..., None].astype(dtype) * 1e4 ** (-(index // 2 * 2).astype(dtype) / channels)
    return jnp.where(index % 2 == 0, jnp.sin(angles), jnp.cos(angles))


def running_sums(parts: jax.Array, follows: jax.Array, span: int) -> jax.Array:
    """Sums within runs of tokens, up to and with each token: parts [B, S, 1, R] -> [B, S, 1, R], in log2(span) passes.

    follows: bool [B, S], whether a token is in the run of the one before it; runs are of at most `span` tokens.
    """
    joined, by = follows[..., None, None], 1
    while by < min(span, parts.shape[1]):
        parts = parts + jnp.where(joined, _back(parts, by), 0)
        joined, by = joined & _back(joined, by), 2 * by
    return parts


def coded_sums(parts: jax.Array, follows: jax.Array, span: int, codec: Any, dtype: Any) -> jax.Array:
    """`running_sums` where every token is added to what a codec has made of the sum before it; in `dtype`, not yet coded."""

    def added(_: Any, sums: jax.Array) -> jax.Array:
        coded = codec.decode(codec.encode(sums.astype(dtype)), parts.dtype)
        return parts + jnp.where(follows[..., None, None], _back(coded, 1), 0)

    return jax.lax.fori_loop(1, min(span, parts.shape[1]), added, parts).astype(dtype)


def _back(a: jax.Array, by: int) -> jax.Array:
    """What stands `by` tokens before each of a [B, S, ...]; zeros before the first."""
    return jnp.pad(a, ((0, 0), (by, 0), *((0, 0),) * (a.ndim - 2)))[:, : a.shape[1]]
