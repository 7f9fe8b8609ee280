"""Grouped latent attention, GLA-h_c (Zadouri, Strauss, Dao 2505.21487): MLA whose latent is cut into h_c pieces.

    [c_1 | .. | c_hc | k_r] = x W_DKV,   c_j = RMSNorm_j(c_j),   k_r = RoPE(k_r), one head for all, not normed

Heads stand in h_c groups of neighbours; keys and values of group j come from c_j alone, k_n,i = c_j W_UK,i and
v_i = c_j W_UV,i. Everything else is MLA, and h_c = 1 is MLA. Remembers what MLA does, kv_lora_rank + qk_rope_head_dim
elements a token, but a tensor-parallel device that holds one group of heads needs one piece only. In the paper a piece has
2 head_dim channels.

GLA_q (`group_queries`) cuts the query latent as well: group j's queries come from piece j of c_Q, so W_UQ is block-diagonal.
"""

from __future__ import annotations

import dataclasses

from mla.attention.contract import Surroundings, mechanism, require

MLAConfig, MLA = mechanism("mla")


@dataclasses.dataclass
class GroupedLatentConfig(MLAConfig):  # type: ignore[misc, valid-type]
    """Grouped latent attention.

    Paper: 2505.21487
    Remembers: MLA's latent in h_c pieces, one for each group of heads
    Elements: kv_lora_rank + d_r
    Use: MLA over several devices: each needs its own piece only; GLA_q by `group_queries`
    """

    num_latents: int = 2  # h_c; must divide num_heads
    kv_lora_rank: int = 0  # channels of all latents together; 0: 2 qk_nope_head_dim for each
    group_queries: bool = False  # GLA_q: the query latent is cut as the key-value latent is; needs q_lora_rank
    rope_interleaved: bool = False  # pairs (k, k + P/2), as in the released code

    def rank(self, around: Surroundings) -> int:
        return self.kv_lora_rank or self.num_latents * 2 * self.nope(around)

    def pieces(self) -> tuple[int, int]:
        return self.num_latents, self.num_latents if self.group_queries else 1

    def validate(self, around: Surroundings) -> None:
        heads, rank, pieces = self.heads(around), self.rank(around), self.num_latents
        require(pieces >= 1 and heads % pieces == 0, "num_latents", f"{pieces} does not divide num_heads {heads}")
        require(rank % pieces == 0, "kv_lora_rank", f"{rank} does not divide into num_latents {pieces} pieces")
        if self.group_queries:
            whole = self.q_lora_rank and self.q_lora_rank % pieces == 0
            require(whole, "q_lora_rank", f"{self.q_lora_rank}: group_queries needs a multiple of num_latents {pieces}")
        super().validate(around)

    def elements(self, around: Surroundings) -> int:
        return self.rank(around) + self.qk_rope_head_dim


class GroupedLatent(MLA):  # type: ignore[misc, valid-type]
    """MLA of h_c latents, one for each group of neighbouring heads; all of it is the config's `pieces`."""
