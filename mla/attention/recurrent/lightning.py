"""Lightning attention (MiniMax-01, 2501.08313): fixed decays that are slower in deeper layers.

    q, k, v = SiLU(x W_Q), SiLU(x W_K), SiLU(x W_V)
    s_h = 2^(-8 (h + 1) / H) (1 - l / (L - 1 + 1e-5) + 1e-5) in layer l of L, h = 0 .. H - 1
    S_t = e^{-s_h} S_{t-1} + k_t v_t^T        o_t = S_t^T q_t        y = (sigmoid(x W_G) * RMSNorm(o)) W_O

No rotation, no convolution and no scale: RMSNorm, over all heads' channels at once, sets it. l counts all layers of a model,
those of other mechanisms too; the last one's states hardly decay. Slopes are those of MiniMax's model in transformers, for
any H; fla's layer of this name has others, linear in h. The model has one softmax layer in eight: lightning*7,gqa.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mla.attention.contract import Surroundings
from mla.attention.recurrent.base import Channels, RecurrentConfig, RecurrentMixer, Tokens
from mla.layers.basic import FROM_HEADS, TO_HEADS, Linear, RMSNorm, merge_heads, split_heads


@dataclasses.dataclass
class LightningConfig(RecurrentConfig):
    """SiLU features and one fixed decay a head and layer.

    Paper: 2501.08313
    Remembers: one matrix a head, fp32
    Elements: H d_h^2, constant
    Use: most layers of a hybrid, as MiniMax-01 at 7:1
    """

    head_dim: int = 0  # key and value channels a head; 0: d_model / num_heads

    def shape(self, around: Surroundings) -> tuple[int, int, int]:
        width = self.head_dim or self.default_head_dim(around, "head_dim")
        return self.heads(around), width, width


class Lightning(RecurrentMixer[LightningConfig]):
    """Lightning attention of H heads over a state [B, H, d_h, d_h] in fp32, see the equations above."""

    def __init__(self, config: LightningConfig, around: Surroundings, *, rngs: nnx.Rngs):
        super().__init__(config, around, rngs=rngs)
        self.num_heads, head_dim, _ = config.shape(around)
        width = self.num_heads * head_dim
        make: dict[str, Any] = {"rngs": rngs, "dtype": around.dtype}
        self.query = Linear(around.d_model, width, TO_HEADS, **make)
        self.key = Linear(around.d_model, width, TO_HEADS, **make)
        self.value = Linear(around.d_model, width, TO_HEADS, **make)
        self.gate = Linear(around.d_model, width, TO_HEADS, **make)
        self.out_norm = RMSNorm(width, eps=around.norm_eps)
        self.out = Linear(width, around.d_model, FROM_HEADS, gain=around.residual_gain, **make)

    def slopes(self) -> np.ndarray:
        """s_h, float64 [H]."""
        factor = 1 - self.around.layer / (self.around.num_layers - 1 + 1e-5) + 1e-5
        return 2.0 ** (-8 * np.arange(1, self.num_heads + 1) / self.num_heads) * factor

    def tokens(self, x: jax.Array, inputs: Channels, positions: jax.Array) -> Tokens:
        query, key, value = (
            split_heads(jax.nn.silu(project(x)), self.num_heads) for project in (self.query, self.key, self.value)
        )
        decay = jnp.asarray(-self.slopes(), self.wide)[:, None]
        return Tokens(query, key, value, jnp.broadcast_to(decay, (len(x), self.num_heads, 1)))

    def finished(self, x: jax.Array, inputs: Channels, heads: jax.Array) -> jax.Array:
        normed = self.out_norm(merge_heads(heads)).astype(self.around.dtype)
        return self.out(jax.nn.sigmoid(self.gate(x)) * normed)
