"""Multi-matrix factorisation attention, MFA and MFA-KR (2412.19255; the released Step-3 code where the two differ).

One key-value head of a *large* width C, and many query heads that are cheap because they come from one normed latent:

    c = RMSNorm(x S_q)    q_i = RoPE(c Q_i)    k = RoPE(x S_k)    v = x S_v    o_i = softmax(q_i k^T / sqrt(C)) v

That is multi-query attention with wide heads and a query latent. Remembers k (after RoPE) and v: 2 C elements a token.

MFA-KR (key reuse) has no S_v; the value is a gated map of the key before its rotation, v = k + alpha * (N k) per channel,
alpha starting at 0. Remembers k before RoPE, C elements a token, and rotates on read, as `slim` does. In row form
v = k M with M = I + N^T diag(alpha).
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from mla.attention.contract import Surroundings, mechanism, require
from mla.attention.softmax.base import AbsorbingConfig
from mla.layers.basic import FROM_LATENT, Linear, vector

MQAConfig, GroupedQuery = mechanism("mqa")
_, Slim = mechanism("slim")


@dataclasses.dataclass
class MultiMatrixConfig(MQAConfig):  # type: ignore[misc, valid-type]
    """MFA.

    Paper: 2412.19255
    Remembers: k and v of one wide head, C channels
    Elements: 2 C
    Use: many cheap query heads over one rich key
    """

    takes_qk_norm: ClassVar[bool] = False  # only the query latent is normed

    head_dim: int = 0  # C, channels of every head; 0: 2 d_model / num_heads
    q_lora_rank: int = 0  # C_q, channels of the query latent; 0: 2/3 of d_model

    def width(self, around: Surroundings) -> int:
        return self.head_dim or 2 * self.default_head_dim(around, "head_dim")

    def query_rank(self, around: Surroundings) -> int:
        return self.q_lora_rank or 2 * around.d_model // 3


@dataclasses.dataclass
class KeyReuseConfig(AbsorbingConfig, MultiMatrixConfig):
    """MFA-KR.

    Paper: 2412.19255
    Remembers: the key alone, before its rotation
    Elements: C
    Use: half of `multi_matrix` again
    """

    def validate(self, around: Surroundings) -> None:
        super().validate(around)
        require(not self.value_norm, "value_norm", "with a norm, values are no matrix times the keys; set it to false")

    def elements(self, around: Surroundings) -> int:
        return self.width(around)


class KeyReuse(Slim):  # type: ignore[misc, valid-type]
    """Attention of H heads over one key head of C channels, whose values are a linear map of the keys, see above."""

    sparing: ClassVar[tuple[str, ...]] = ("value_mix",)

    def make_values(self, make: dict[str, Any]) -> None:
        self.key_norm = None
        self.value_mix = Linear(self.head_dim, self.head_dim, FROM_LATENT, **make)  # N^T
        self.value_gate = vector(jnp.zeros((self.head_dim,), jnp.float32))  # alpha

    def value_map(self) -> jax.Array:
        alpha = self.value_gate[...].astype(self.around.dtype)
        mix = jnp.eye(self.head_dim, dtype=self.around.dtype) + self.value_mix.heads(1)[:, 0] * alpha
        return mix[:, None]
