"""Chunked linear recurrence: the engine of the constant-state mechanisms.

Legend: B batch, T tokens, H heads, K key channels, V value channels, N chunk length.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mla.ops.dispatch import Backend, dispatch


def linear_recurrence(
    queries: Float[Array, "B T H K"],
    keys: Float[Array, "B T H K"],
    values: Float[Array, "B T H V"],
    state: Float[Array, "B H K V"],
    *,
    chunk: int = 64,
    backend: str = "auto",
    platform: str | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """S_t = S_{t-1} + k_t^T v_t and o_t = q_t S_t, parallel within chunks, sequential between them.

    A token with k = 0 leaves no trace, which is how padding is passed.

    Args:
      queries, keys: [B, T, H, K]. values: [B, T, H, V].
      state: fp32 [B, H, K, V], what earlier tokens left.
      chunk: tokens handled at once; cost per token is O(chunk (K + V) + K V), flat in T.
      backend, platform: auto, or one of `BACKENDS`, and where it will run: `mla.ops.dispatch`.

    Returns:
      fp32 outputs [B, T, H, V] and the new state. Sums run in fp32 whatever the input dtype: the state is a sum over all
      tokens so far, and bf16 stops counting at 256.
    """
    queries, keys, values = (a.astype(state.dtype) for a in (queries, keys, values))
    run = dispatch("recurrence", BACKENDS, backend, queries.shape[1], platform, chunk=chunk)
    outputs, state = run(queries, keys, values, state)
    return outputs, state


def _step(queries, keys, values, state, chunk):
    """One token: the state as it is updated, no chunk around it."""
    del chunk
    state = state + jnp.einsum("bthk,bthv->bhkv", keys, values)
    return jnp.einsum("bthk,bhkv->bthv", queries, state), state


def _scan(queries, keys, values, state, chunk):
    """A scan over chunks, each a few matmuls: any length, any device."""
    batch, length, heads, _ = queries.shape
    chunk = min(chunk, length)
    count = -(-length // chunk)

    def in_chunks(a: jax.Array) -> jax.Array:
        padded = jnp.pad(a, ((0, 0), (0, count * chunk - length), (0, 0), (0, 0)))
        return padded.reshape(batch, count, chunk, heads, a.shape[-1]).transpose(1, 0, 3, 2, 4)  # [count, B, H, N, .]

    causal = jnp.tril(jnp.ones((chunk, chunk), state.dtype))

    def step(carried: jax.Array, parts: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        q, k, v = parts
        within = (q @ k.swapaxes(-1, -2) * causal) @ v
        return carried + k.swapaxes(-1, -2) @ v, within + q @ carried

    state, outputs = jax.lax.scan(step, state, tuple(map(in_chunks, (queries, keys, values))))
    outputs = outputs.transpose(1, 0, 3, 2, 4).reshape(batch, count * chunk, heads, -1)
    return outputs[:, :length], state


# A call is its number of tokens.
BACKENDS: dict[str, Backend[int]] = {
    "step": Backend(_step, lambda length: "" if length == 1 else "a call of one token"),
    "scan": Backend(_scan),
}
