"""Rotary position embedding (RoFormer, 2104.09864), both channel pairings, with YaRN (2309.00071) as DeepSeek-V2 uses it.

Legend: B batch, T tokens, R rotated channels (even).
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int


@dataclasses.dataclass
class Yarn:
    """Context extension by frequency interpolation. `factor` 1 switches it off.

    Attributes:
      factor: how many times longer than `original_context` positions may be.
      original_context: tokens the frequencies were trained for; YaRN acts only if the model's context is longer.
      beta_fast, beta_slow: rotations within `original_context` above which a channel pair keeps its frequency, and below
        which it is slowed by `factor`; linear in between.
      mscale, mscale_all_dim: temperature; see `magnitude` and `score_scale`.
    """

    factor: float = 1.0
    original_context: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0

    def active(self, context: int) -> bool:
        return self.factor > 1.0 and context > self.original_context

    def _temperature(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1.0 if mscale else 1.0

    def magnitude(self) -> float:
        """The factor on cos and sin: 1 whenever `mscale == mscale_all_dim`; without mscale_all_dim, 0.1 ln(factor) + 1."""
        if not self.mscale_all_dim:
            return self._temperature(1.0)
        return self._temperature(self.mscale) / self._temperature(self.mscale_all_dim)

    def score_scale(self) -> float:
        """The factor on the softmax scale, m^2 (DeepSeek-V3's inference code)."""
        return self._temperature(self.mscale_all_dim) ** 2


def frequencies(dim: int, theta: float, yarn: Yarn | None = None) -> Float64[np.ndarray, " _"]:
    """Angular frequency of each channel pair, radians per token: float64 [R / 2]."""
    pair = np.arange(0, dim, 2, dtype=np.float64) / dim
    plain = theta**-pair
    if yarn is None:
        return plain

    def pair_index(rotations: float) -> float:
        return dim * math.log(yarn.original_context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_index(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_index(yarn.beta_slow)), dim - 1)
    slowed = np.clip((np.arange(dim // 2) - low) / max(high - low, 1e-3), 0.0, 1.0)
    return plain * (1 - slowed) + plain / yarn.factor * slowed


def rotate(
    x: Float[Array, "B T heads R"],
    positions: Int[Array, "#B T"],
    theta: float | Float64[np.ndarray, " _"],
    *,
    interleaved: bool = False,
    yarn: Yarn | None = None,
    dim: int | None = None,
    scaled: bool = True,
) -> Float[Array, "B T heads R"]:
    """Rotates the R channels of every head by its token's position.

    Args:
      x: [B, T, heads, R].
      positions: int32 [B, T] or [1, T]; a padding position (-1) is rotated like any other, nobody reads it.
      theta: base of the frequencies; or those of all pairs themselves, float64 [R / 2], radians per token.
      interleaved: pairs are channels (2k, 2k+1), as in DeepSeek's and Llama's own code; otherwise (k, k + R/2). The two
        are one permutation of channels apart, so a checkpoint must be read with the pairing it was trained with.
      yarn: active context extension, or None.
      dim: rotate the first `dim` channels and pass the rest; None: all.
      scaled: with YaRN's magnitude. What has been rotated already has it; turning it further is a rotation alone.

    Returns:
      An array like x. Angles are computed in fp32 whatever the dtype of x.
    """
    if dim is not None and dim < x.shape[-1]:
        rotated = rotate(x[..., :dim], positions, theta, interleaved=interleaved, yarn=yarn, scaled=scaled)
        return jnp.concatenate([rotated, x[..., dim:]], axis=-1)
    if x.shape[-1] == 0:
        return x
    # Wide angles from int32 positions: bf16 positions collapse past 256.
    wide = jnp.promote_types(x.dtype, jnp.float32)
    rates = theta if isinstance(theta, np.ndarray) else frequencies(x.shape[-1], theta, yarn)
    angles = positions[..., None].astype(wide) * jnp.asarray(rates, wide)
    magnitude = yarn.magnitude() if yarn and scaled else 1.0
    cos = (jnp.cos(angles) * magnitude)[:, :, None, :].astype(x.dtype)
    sin = (jnp.sin(angles) * magnitude)[:, :, None, :].astype(x.dtype)
    if interleaved:
        pairs = x.reshape(*x.shape[:-1], -1, 2)
        first, second = pairs[..., 0], pairs[..., 1]
    else:
        first, second = jnp.split(x, 2, axis=-1)
    turned = first * cos - second * sin, second * cos + first * sin
    return jnp.stack(turned, axis=-1).reshape(x.shape) if interleaved else jnp.concatenate(turned, axis=-1)
