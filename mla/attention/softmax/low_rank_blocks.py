"""Multi-head low-rank attention, MLRA-2 and MLRA-4 (2603.02188): MLA whose latent is cut into 4 blocks that all heads share.

    c_b = RMSNorm_b((x W_DKV)_b) sqrt(4 D / d_c)   for blocks b = 1 .. 4;   k_r = RoPE(x W_KR), one head
    o_i = A^-1/2 sum_b softmax((q_n,i (c_b W_UK,b,i)^T + q_r,i k_r^T) / sqrt(d_n + d_r)) c_b W_UV,b,i   over A blocks

Each head draws one attention map for each of its A branches, all from the same query, and adds their outputs. With A = 4
(MLRA-4) every head reads every block. With A = 2 (MLRA-2) the first half of the heads reads blocks 1 and 3, the second half
2 and 4, which halves the up-projections. So a head with A branches is A heads of `grouped_latent` with 4 latents that ask
the same. Remembers kv_lora_rank + qk_rope_head_dim elements a token; 4 devices need one block each.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from mla.attention.contract import Surroundings, mechanism, require
from mla.ops.mask import Mask

MLAConfig, MLA = mechanism("mla")
BLOCKS = 4


@dataclasses.dataclass
class LowRankBlocksConfig(MLAConfig):  # type: ignore[misc, valid-type]
    """Multi-head low-rank attention.

    Paper: 2603.02188
    Remembers: MLA's latent in 4 blocks that all heads share
    Elements: kv_lora_rank + d_r
    Use: MLA over 4 devices with every head whole; costs `branches` softmaxes a head
    """

    branches: int = 4  # attention maps a head: 4 (MLRA-4) or 2 (MLRA-2)
    latent_scale: str = "sqrt"  # factor on normed latents: none, or sqrt as in the released code
    rope_interleaved: bool = False  # pairs (k, k + P/2), as in the released code

    def pieces(self) -> tuple[int, int]:
        return BLOCKS, 1

    def validate(self, around: Surroundings) -> None:
        heads, rank, branches = self.heads(around), self.kv_lora_rank, self.branches
        require(branches in (2, 4), "branches", f"{branches} is neither 2 (MLRA-2) nor 4 (MLRA-4)")
        require(rank % BLOCKS == 0, "kv_lora_rank", f"{rank} does not divide into {BLOCKS} blocks")
        groups = BLOCKS // branches
        require(
            heads % groups == 0, "num_heads", f"{heads} does not divide into {groups} groups, as branches={branches} asks"
        )
        require(not self.sink, "sink", "one sink for several attention maps of a head is not defined; set it to false")
        super().validate(around)


class LowRankBlocks(MLA):  # type: ignore[misc, valid-type]
    """MLA whose heads draw `branches` attention maps each, over blocks of the latent, and add their outputs."""

    paged: ClassVar[bool] = False  # a head draws several maps, each with queries of its own

    def __init__(self, config: LowRankBlocksConfig, around: Surroundings, *, rngs: nnx.Rngs):
        self.readers = config.branches
        super().__init__(config, around, rngs=rngs)

    def queries(self, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, ...]:
        # Branch a of head h is head a H + h: it reads latent (a H + h) // (A H / 4), so heads of a group stay neighbours.
        queries = super().queries(x, positions)
        return type(queries)(*(jnp.tile(part, (1, 1, self.readers, 1)) for part in queries))

    def attend(self, queries: tuple[jax.Array, ...], entries: tuple[jax.Array, ...], mask: Mask) -> jax.Array:
        heads = super().attend(queries, entries, mask)
        return (heads.reshape(*heads.shape[:2], self.readers, -1) * self.readers**-0.5).sum(axis=2)
