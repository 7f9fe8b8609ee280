"""Kimi Delta Attention beside the reference of tokamax, which is JAX too: another hand's recurrence, gates and norms.

Releases of tokamax that have it need Python 3.12 and its jax (conftest.py leaves this file out elsewhere).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import EXACT, close
from matrix import D_MODEL, Row
from tokamax._src.ops.kda.reference import kimi_delta_attention

from mla.ops.recurrence import linear_recurrence

PLAIN: dict[str, Any] = {
    "a_log": None,
    "delta_time_bias": None,
    "use_qk_l2norm": False,
    "use_gate_in_kernel": False,
    "lower_bound": None,
    "segment_ids": None,
    "context_parallel_metadata": None,
    "max_num_segments": None,
    "output_final_state": True,
    "initial_state": None,
}


def by_head(x: jax.Array) -> jax.Array:
    """[B, T, H, ..] -> [H, B, T, ..]."""
    return jnp.moveaxis(x, 2, 0)


@pytest.mark.usefixtures("float64")
def test_the_recurrence_is_theirs() -> None:
    """After an initial state, lengths that are no multiple of the chunk, decays from none to exp(-60) a token."""
    draw = np.random.default_rng(0)
    batch, length, heads, keys, values = 2, 75, 3, 6, 10
    q, k = (jnp.asarray(draw.normal(size=(batch, length, heads, keys))) for _ in range(2))
    k /= jnp.linalg.norm(k, axis=-1, keepdims=True)
    v = jnp.asarray(draw.normal(size=(batch, length, heads, values)))
    g = -jnp.asarray(draw.choice([0, 1e-3, 0.3, 60.0], size=(batch, length, heads, keys)))
    beta = jnp.asarray(draw.uniform(size=(batch, length, heads)))
    state = jnp.asarray(draw.normal(size=(batch, heads, keys, values)))
    ours, after = linear_recurrence(q / 2, k, v * beta[..., None], state, g, k * beta[..., None], chunk=16)
    theirs, left = kimi_delta_attention(
        *map(by_head, (q, k, v, g, beta)), scale=0.5, **PLAIN | {"initial_state": state[:, None]}
    )
    close(by_head(ours), theirs, EXACT, unit=True)
    assert left is not None
    close(after, left[:, 0], EXACT, unit=True)


@pytest.mark.parametrize("bound", [0.0, 5.0])
def test_the_layer_is_theirs(bound: float) -> None:
    """Gates, norms of queries and keys and the recurrence from the same projections; their gates are in fp32."""
    mixer: Any = Row("kimi_delta", {"head_dim": 12, "v_head_dim": 10, "gate_bound": bound, "chunk": 16}).mixer()
    x: Any = jax.random.normal(jax.random.key(3), (2, 45, D_MODEL))
    ours = mixer(x)
    empty = mixer.init_cache(2, 45, jnp.float32)
    inputs, _ = mixer.convolution(mixer.inputs(x), None, empty["tail"])
    heads = mixer.num_heads

    def split(a: jax.Array) -> jax.Array:
        return by_head(a.reshape(*a.shape[:2], heads, -1))

    gates = {
        "a_log": mixer.rates.a_log[...],
        "delta_time_bias": mixer.rates.dt_bias[...].reshape(-1),
        "use_qk_l2norm": True,
        "use_gate_in_kernel": True,
        "lower_bound": -bound if bound else None,
    }
    read, _ = kimi_delta_attention(
        *(split(inputs[name]) for name in ("query", "key", "value")),
        split(mixer.decay_up(mixer.decay_down(x))),
        by_head(jax.nn.sigmoid(mixer.beta(x))),
        scale=mixer.key_dim**-0.5,
        **PLAIN | gates,
    )
    rows = jnp.moveaxis(read, 0, 2).reshape(-1, heads, read.shape[-1])
    flat = {name: a.reshape(-1, a.shape[-1]) for name, a in inputs.items()}
    theirs = mixer.finished(x.reshape(-1, D_MODEL), flat, rows).reshape(x.shape)
    close(ours, theirs, 3e-5, unit=True)
