"""The recurrence of the constant-state mechanisms, token by token and in chunks.

One state S [K, V] a head is multiplied by a decay, corrected, written to and read:

    S_t = (I - k_t e_t^T) Diag(exp g_t) S_{t-1} + k_t v_t^T        o_t = S_t^T q_t

g <= 0 is the logarithm of the decay, none, one a head or one a key channel; e is the erase vector of the delta rule, none or
beta_t k_t (2406.06484) or b_t * k_t channel by channel (2605.22791). Values come multiplied by whatever weighs them (beta_t,
dt_t), queries by whatever scales them. A normaliser is one more value channel that is always 1. A token with k = v = e = 0
and g = 0 leaves no trace, which is how padding is passed.

In chunks of N tokens (2412.06464 appendix A; 2510.26692 equations 2 to 9), with G_r the sum of g up to token r of a chunk,

    A_kk[r, i] = sum_d e_rd k_id exp(G_rd - G_id)  for i < r        A_qk[r, i] = sum_d q_rd k_id exp(G_rd - G_id)  for i <= r
    U = (I + A_kk)^-1 V                                             W = (I + A_kk)^-1 (e * exp G)
    V' = U - W S                                                    o = (q * exp G) S + A_qk V'
    S <- Diag(exp G_N) S + (k * exp(G_N - G))^T V'

where only the last two lines go from chunk to chunk. No exponent is ever above 0: exp(-G) does not appear, and differences
are not taken of long sums either, since fp32 sums of -200 and 0 forget the zeros. A chunk is halved down to its tokens
instead: between the two halves of a block, exp(G_r - G_i) is a decay from the block's middle to r times one from i to the
middle, each the sum of few numbers.

Legend: B batch, T tokens, H heads, F heads of queries and keys (each serves H / F heads side by side), K key channels, V
value channels, N chunk length.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mla.ops.dispatch import Backend, dispatch


def linear_recurrence(
    queries: Float[Array, "B T F K"],
    keys: Float[Array, "B T F K"],
    values: Float[Array, "B T H V"],
    state: Float[Array, "B H K V"],
    decay: Float[Array, "B T H #K"] | None = None,
    erase: Float[Array, "B T H K"] | None = None,
    *,
    chunk: int = 64,
    backend: str = "auto",
    platform: str | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """The recurrence above over T tokens: parallel within chunks, sequential between them.

    Args:
      queries, keys: [B, T, F, K].
      values: [B, T, H, V].
      state: fp32 [B, H, K, V], what earlier tokens left.
      decay: logarithms g <= 0, [B, T, H, 1] or [B, T, H, K]; None: 0.
      erase: e, [B, T, H, K]; None: 0, nothing is erased.
      chunk: tokens handled at once; cost per token is O(chunk (K + V) + K V), flat in T.
      backend, platform: auto, or one of `BACKENDS`, and where it will run: `mla.ops.dispatch`.

    Returns:
      Outputs [B, T, H, V] and the new state, in the dtype of the state. Everything is computed in that dtype whatever the
      inputs' (the state is a sum over all tokens so far, and bf16 stops counting at 256); matrix products of bf16 inputs may
      round their operands as the platform does by default.
    """
    exact = queries.dtype == state.dtype
    given = tuple(None if a is None else a.astype(state.dtype) for a in (queries, keys, values, decay, erase))
    run = dispatch("recurrence", BACKENDS, backend, queries.shape[1], platform, chunk=chunk, exact=exact)
    outputs, state = run(*given, state)
    return outputs, state


def _step(queries, keys, values, decay, erase, state, chunk, exact):
    """One token after the other, as the equations say it."""
    del chunk
    product = functools.partial(jnp.einsum, precision=_precision(exact))
    shared = values.shape[2] // keys.shape[2]

    def token(state: jax.Array, parts: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
        q, k, v, g, e = parts
        q, k = (jnp.repeat(a, shared, axis=1) for a in (q, k))
        state = state if g is None else state * jnp.exp(g)[..., None]
        v = v if e is None else v - product("bhk,bhkv->bhv", e, state)
        state = state + k[..., None] * v[..., None, :]
        return state, product("bhk,bhkv->bhv", q, state)

    parts = (queries, keys, values, decay, erase)
    if queries.shape[1] == 1:
        state, output = token(state, jax.tree.map(lambda a: a[:, 0], parts))
        return output[:, None], state
    state, outputs = jax.lax.scan(token, state, jax.tree.map(lambda a: a.swapaxes(0, 1), parts))
    return outputs.swapaxes(0, 1), state


def _scan(queries, keys, values, decay, erase, state, chunk, exact):
    """A scan over chunks: any length, any device.

    What happens within chunks is computed for all of them at once, before the scan and after it, and what comes before again
    in the backward pass. From chunk to chunk go only states; without the delta rule what is added to them is known before.
    """
    batch, length, heads = values.shape[:3]
    chunk = min(chunk, length)
    size = 1 << (chunk - 1).bit_length()  # blocks are halved
    parts = jax.tree.map(lambda a: _in_chunks(a, chunk, size), (queries, keys, values, decay, erase))
    matmul = functools.partial(jnp.matmul, precision=_precision(exact))
    within = jax.checkpoint(functools.partial(_within, matmul=matmul))(*parts)
    served = within.keys.shape[-3]
    # Chunks lead, and a batch of 1 is left out: XLA sums slowly over arrays with such an axis in front on a CPU.
    lead = () if batch == 1 else (batch,)
    state = _beside(state, served)
    state = state.reshape(*lead, *state.shape[1:])

    def apart(a: jax.Array | None) -> jax.Array | None:
        return None if a is None else _chunks_first(a, lead)

    def together(a: jax.Array) -> jax.Array:
        return (a.swapaxes(0, 1) if lead else a).reshape(-1, *a.shape[1 + len(lead) :])

    def step(state: jax.Array, one: tuple[Any, ...]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        keys, written, erase, whole = one
        written = written if erase is None else written - matmul(erase, state)
        kept = state if whole is None else state * whole
        return kept + (written if erase is None else matmul(keys, written)), (state, written)

    across = within.keys.swapaxes(-1, -2)
    if within.erase is None:
        moved = (None, matmul(across, within.written), None, within.whole)
        state, (states, _) = jax.lax.scan(step, state, tuple(map(apart, moved)))
        values = within.values
    else:
        moved = (across, within.written, within.erase, within.whole)
        state, (states, values) = jax.lax.scan(step, state, tuple(map(apart, moved)))
        values = together(values)
    outputs = _apart(matmul(within.queries, together(states)), heads)
    outputs = (outputs if within.since is None else outputs * within.since) + matmul(within.scores, values)
    outputs = outputs[..., :chunk, :].swapaxes(1, 2)  # [B chunks, N, H, V]
    outputs = outputs.reshape(batch, -1, *outputs.shape[2:])[:, :length]
    return outputs, _apart(state.reshape(batch, *state.shape[len(lead) :]), heads)


def step_flops(heads: int, keys: int, values: int, delta: bool) -> float:
    """FLOPs of one token after another: of writing to the state, of reading it, and of what the delta rule reads before."""
    return 2.0 * (3 if delta else 2) * heads * keys * values


def chunk_flops(
    heads: int, served: int, keys: int, values: int, decays: int = 0, delta: bool = False, chunk: int = 64
) -> float:
    """FLOPs a token of the products in chunks, by the equations above; triangles are computed as squares.

    Args:
      heads, served: H, and F heads of queries and keys.
      keys, values: K, V.
      decays: channels of the decay: 0, 1 or K.
      delta: whether there are erase vectors.
      chunk: tokens of a chunk, which is filled up to a power of two.
    """
    size = 1 << (chunk - 1).bit_length()
    # With a decay a channel, products of the blocks below the diagonal alone: a chunk is halved down to its tokens.
    scores = size * keys if decays <= 1 else (size - 1) * keys / 2
    total = (heads if decays > 1 else served) * scores + heads * size * values  # A_qk, A_qk V'
    total += 2 * heads * keys * values  # (q exp G) S, k^T V'
    if decays == 1:
        total += heads * size * size  # sums of decays between any two tokens
    if delta:
        total += heads * (scores + size * (keys + values) + keys * values)  # A_kk, U and W, W S
        small = min(16, size)
        for half in _powers(size)[1:]:  # the inverse, by blocks that double: two products each
            rows, count = (small, size // small) if half < small else (half, size // (2 * half))
            total += 2 * heads * count * rows**3 / size
    return 2.0 * total * size / chunk


def _powers(size: int) -> list[int]:
    """1, 2, 4, .. below `size`."""
    return [1 << power for power in range(size.bit_length() - 1)]


# A call is its number of tokens.
BACKENDS: dict[str, Backend[int]] = {
    "step": Backend(_step, best=lambda length: length == 1),
    "scan": Backend(_scan),
}

Matmul = Callable[[jax.Array, jax.Array], jax.Array]
_exact: Matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
LOWEST = -1e4  # of a logarithm: its decay is 0 in any dtype, and so is it times 0


def _precision(exact: bool) -> jax.lax.Precision:
    """Of matrix products: as many bits as the operands have, or what the platform takes by default."""
    return jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT


def _in_chunks(a: jax.Array, chunk: int, size: int) -> jax.Array:
    """[B, T, heads, X] -> [B chunks, heads, size, X]: `chunk` tokens each, filled with zeros to `size`."""
    batch, length, heads, width = a.shape
    count = -(-length // chunk)
    a = jnp.pad(a, ((0, 0), (0, count * chunk - length), (0, 0), (0, 0)))
    a = a.reshape(batch * count, chunk, heads, width).swapaxes(1, 2)
    return jnp.pad(a, ((0, 0), (0, 0), (0, size - chunk), (0, 0)))


def _chunks_first(a: jax.Array, lead: tuple[int, ...]) -> jax.Array:
    """[B chunks, ...] -> [chunks, B, ...], or [chunks, ...] where `lead` is not (B,) but ()."""
    return a.reshape(*lead, -1, *a.shape[1:]).swapaxes(0, 1) if lead else a


def _beside(a: jax.Array, served: int) -> jax.Array:
    """[.., H, N, V] -> [.., F, N, H / F V], the heads that share keys side by side."""
    *lead, heads, rows, width = a.shape
    if served == heads:
        return a
    a = a.reshape(*lead, served, heads // served, rows, width).swapaxes(-3, -2)
    return a.reshape(*lead, served, rows, heads // served * width)


def _apart(a: jax.Array, heads: int) -> jax.Array:
    """The inverse of `_beside`."""
    *lead, served, rows, width = a.shape
    if served == heads:
        return a
    a = a.reshape(*lead, served, rows, heads // served, width * served // heads).swapaxes(-3, -2)
    return a.reshape(*lead, heads, rows, width * served // heads)


class _Within(NamedTuple):
    """What `_within` finds, [.., chunks' heads, N or K, channels].

    queries and keys meet the state: those of F heads or of H. values are V or U; written are they as keys write them, side
    by side where keys are shared; erase is W, None without the delta rule; scores are A_qk. since multiplies what queries
    read of the state, whole the state of a whole chunk: decays, None where queries have them or there is none.
    """

    queries: jax.Array
    keys: jax.Array
    values: jax.Array
    written: jax.Array
    erase: jax.Array | None
    scores: jax.Array
    since: jax.Array | None
    whole: jax.Array | None


def _within(queries, keys, values, decay, erase, matmul):
    """What happens within chunks [.., heads, N, channels], all of them at once."""
    heads, served = values.shape[-3], keys.shape[-3]
    if decay is not None and decay.shape[-1] > 1:
        queries, keys = (jnp.repeat(a, heads // served, axis=-3) for a in (queries, keys))
        return _within_by_channel(queries, keys, values, decay, erase, matmul)
    scores = matmul(queries, keys.swapaxes(-1, -2))
    among = jnp.tril(jnp.ones((keys.shape[-2],) * 2, keys.dtype))
    since = behind = whole = None
    if decay is not None:
        decay = jnp.maximum(decay, LOWEST)
        between = _between(decay)
        # -inf before exp, not 0 after it: what is above the diagonal has gradients otherwise.
        among = jnp.exp(jnp.where(among > 0, between, -jnp.inf))
        since = jnp.exp(between[..., :1] + decay[..., :1, :])
        behind, whole = jnp.exp(between[..., -1:, :]).swapaxes(-1, -2), since[..., -1:, :]
    scores = jnp.repeat(scores, heads // served, axis=-3) * among
    if erase is None:
        written = _beside(values if behind is None else values * behind, served)
        if whole is not None:
            whole = _beside(jnp.broadcast_to(whole, (*whole.shape[:-1], values.shape[-1])), served)
        return _Within(queries, keys, values, written, None, scores, since, whole)
    queries, keys = (jnp.repeat(a, heads // served, axis=-3) for a in (queries, keys))
    solved = _unit_lower_inverse(jnp.tril(matmul(erase, keys.swapaxes(-1, -2)) * among, -1))
    values, erase = matmul(solved, values), matmul(solved, erase if since is None else erase * since)
    keys = keys if behind is None else keys * behind
    return _Within(queries, keys, values, values, erase, scores, since, whole)


def _within_by_channel(queries, keys, values, decay, erase, matmul):
    """`_within` of as many heads of queries and keys as of values, with one decay a key channel."""
    sums = _Sums(decay)
    scores = sums.weighed(queries, keys, matmul)
    scores += jnp.eye(scores.shape[-1], dtype=scores.dtype) * jnp.sum(queries * keys, axis=-1, keepdims=True)
    since = jnp.exp(sums.before)
    if erase is not None:
        solved = _unit_lower_inverse(sums.weighed(erase, keys, matmul))
        values, erase = matmul(solved, values), matmul(solved, erase * since)
    keys, whole = keys * jnp.exp(sums.behind), since[..., -1:, :].swapaxes(-1, -2)
    return _Within(queries * since, keys, values, values, erase, scores, None, whole)


def _between(decay: jax.Array) -> jax.Array:
    """Of finite [.., N, 1] the sums from after token i up to and with token r, [.., N, N] in row r and column i < r.

    Each is a sum of what lies between, of zeros and of nothing else: never a difference of long sums.
    """
    upto = jnp.tril(jnp.ones((decay.shape[-2],) * 2, decay.dtype))
    one = jnp.broadcast_to(decay, (*decay.shape[:-1], decay.shape[-2]))
    return _exact(upto, jnp.tril(one, -1))


class _Sums:
    """Sums of log-decays [.., N, K] between any two tokens of a chunk, each of them of few numbers.

    Attributes:
      before: [.., N, K], from the chunk's start up to and with each token.
      behind: [.., N, K], from after each token to the chunk's end.
      halves: for blocks of 2, 4, .. N tokens, [.., blocks, half, K] each: sums from the middle of a block up to and with
        each token of its second half, and from after each token of its first half to the middle.
    """

    def __init__(self, decay: jax.Array):
        before, behind, half = decay, jnp.zeros_like(decay), 1
        self.halves: list[tuple[jax.Array, jax.Array]] = []
        while half < decay.shape[-2]:
            (first, second), (rest, last) = _halves(before, half), _halves(behind, half)
            self.halves.append((second, rest))
            before = _joined(first, second + first[..., -1:, :])
            behind = _joined(rest + second[..., -1:, :], last)
            half *= 2
        self.before, self.behind = before, behind

    def weighed(self, rows: jax.Array, columns: jax.Array, matmul: Matmul) -> jax.Array:
        """[.., N, N]: sum_d rows_rd columns_id exp(what is between i and r in channel d) for i < r, 0 elsewhere."""
        blocks = jnp.zeros((*rows.shape[:-2], rows.shape[-2], 1, 1), rows.dtype)
        for after, until in self.halves:
            half = after.shape[-2]
            lower, upper = _halves(rows, half)[1] * jnp.exp(after), _halves(columns, half)[0] * jnp.exp(until)
            blocks = _assembled(blocks, matmul(lower, upper.swapaxes(-1, -2)))
        return blocks[..., 0, :, :]


def _halves(a: jax.Array, half: int) -> tuple[jax.Array, jax.Array]:
    """[.., N, X] -> the first and the second halves of its blocks of 2 half tokens, [.., N / 2 half, half, X] each."""
    blocks = a.reshape(*a.shape[:-2], -1, 2, half, a.shape[-1])
    return blocks[..., 0, :, :], blocks[..., 1, :, :]


def _joined(first: jax.Array, second: jax.Array) -> jax.Array:
    """The inverse of `_halves`."""
    both = jnp.stack([first, second], axis=-3)
    return both.reshape(*both.shape[:-4], -1, both.shape[-1])


def _assembled(blocks: jax.Array, lower: jax.Array) -> jax.Array:
    """Diagonal blocks [.., 2 n, s, s] and the ones [.., n, s, s] under them: blocks [.., n, 2 s, 2 s], 0 above."""
    first, second = _pairs(blocks)
    top = jnp.concatenate([first, jnp.zeros_like(lower)], axis=-1)
    return jnp.concatenate([top, jnp.concatenate([lower, second], axis=-1)], axis=-2)


def _pairs(blocks: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[.., 2 n, s, s] -> those with even and those with odd numbers, [.., n, s, s] each."""
    pairs = blocks.reshape(*blocks.shape[:-3], -1, 2, *blocks.shape[-2:])
    return pairs[..., 0, :, :], pairs[..., 1, :, :]


@jax.custom_jvp
def _unit_lower_inverse(a: jax.Array) -> jax.Array:
    """(I + a)^-1 of strictly lower triangular a [.., N, N], N a power of two, in full precision, by blocks that double.

    The inverse of a block is known from those of its halves and what stands under the first: -second under first. Blocks of
    up to 16 are masked parts of one matrix, which is little work and a short program; larger ones are cut out.
    """
    size = a.shape[-1]
    half = min(16, size)
    on_diagonal = jnp.stack([a[..., i : i + half, i : i + half] for i in range(0, size, half)], axis=-3)
    blocks = _small_unit_lower_inverse(on_diagonal)
    while half < size:
        starts = range(0, size, 2 * half)
        under = jnp.stack([a[..., i + half : i + 2 * half, i : i + half] for i in starts], axis=-3)
        first, second = _pairs(blocks)
        blocks = _assembled(blocks, -_exact(_exact(second, under), first))
        half *= 2
    return blocks[..., 0, :, :]


def _small_unit_lower_inverse(a: jax.Array) -> jax.Array:
    """`_unit_lower_inverse` of few rows."""
    size, half = a.shape[-1], 1
    number = jnp.arange(size)
    inverse = jnp.eye(size, dtype=a.dtype)
    while half < size:
        block, second = number // (2 * half), number // half % 2 == 1
        under = jnp.where((block[:, None] == block) & second[:, None] & ~second, a, 0.0)
        inverse = inverse - (under if half == 1 else _exact(_exact(inverse, under), inverse))
        half *= 2
    return jnp.broadcast_to(inverse, a.shape)


@_unit_lower_inverse.defjvp
def _unit_lower_inverse_jvp(primals, tangents):
    """d (I + a)^-1 = -(I + a)^-1 da (I + a)^-1: two products instead of the way through all blocks."""
    inverse = _unit_lower_inverse(*primals)
    return inverse, -_exact(_exact(inverse, *tangents), inverse)
