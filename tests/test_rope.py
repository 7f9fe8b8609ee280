"""Rotary embedding on its own against complex multiplication in float64 and against transformers' YaRN."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import EXACT, close
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding

from mla.ops.rope import Yarn, frequencies, rotate

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("start", [0, 250, 4000])
def test_rotation_is_complex_multiplication(interleaved, start):
    x = np.random.default_rng(0).standard_normal((2, 20, 3, 8))
    positions = np.arange(start, start + 20)
    pairs = x[..., 0::2] + 1j * x[..., 1::2] if interleaved else x[..., :4] + 1j * x[..., 4:]
    turned = pairs * np.exp(1j * positions[:, None] * 10_000.0 ** (-np.arange(4) / 4))[None, :, None, :]
    expected = np.zeros_like(x)
    if interleaved:
        expected[..., 0::2], expected[..., 1::2] = turned.real, turned.imag
    else:
        expected[..., :4], expected[..., 4:] = turned.real, turned.imag
    positions = jnp.asarray(positions, jnp.int32)[None]
    close(rotate(jnp.asarray(x), positions, 1e4, interleaved=interleaved), expected, EXACT)
    # An fp32 angle of a radians is off by a roundings, and so is what it turns: channels of up to 4 here.
    narrow = rotate(jnp.asarray(x, jnp.float32), positions, 1e4, interleaved=interleaved)
    close(narrow, expected, 8 * np.finfo(np.float32).eps * (1 + start + 20))


def test_positions_past_256_stay_apart_in_bf16():
    x = jnp.ones((1, 2, 1, 4), jnp.bfloat16)
    a, b = rotate(x, jnp.asarray([[256, 257]], jnp.int32), 1e4)[0]
    assert not np.array_equal(a, b)


def test_pairings_are_one_permutation_apart():
    x = jax.random.normal(jax.random.key(0), (1, 5, 2, 8))
    positions = jnp.arange(5, dtype=jnp.int32)[None]
    order = np.array([0, 2, 4, 6, 1, 3, 5, 7])
    split = rotate(x[..., order], positions, 1e4)
    close(split, rotate(x, positions, 1e4, interleaved=True)[..., order], EXACT)
    assert np.abs(np.asarray(rotate(x, positions, 1e4) - rotate(x, positions, 1e4, interleaved=True))).max() > 0.1


@pytest.mark.parametrize("factor", [4.0, 40.0])
@pytest.mark.parametrize("dim", [8, 64])
def test_yarn_frequencies_equal_transformers(factor, dim):
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": factor, "beta_fast": 32.0, "beta_slow": 1.0}
    rope |= {"original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 1.0}
    config = DeepseekV3Config(qk_rope_head_dim=dim, head_dim=dim, max_position_embeddings=4096 * 40, rope_parameters=rope)
    theirs = DeepseekV3RotaryEmbedding(config)
    yarn = Yarn(factor=factor, original_context=4096)
    close(frequencies(dim, 1e4, yarn) / theirs.inv_freq.numpy(), np.ones(dim // 2), 1e-5)
    assert yarn.magnitude() == theirs.attention_scaling == 1.0


def test_yarn_acts_only_beyond_the_original_context():
    yarn = Yarn(factor=4.0, original_context=64)
    assert yarn.active(65) and not yarn.active(64) and not Yarn().active(10**6)
    assert yarn.score_scale() == pytest.approx((0.1 * np.log(4.0) + 1) ** 2)
