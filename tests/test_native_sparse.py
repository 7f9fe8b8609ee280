"""Native sparse attention: the layer token by token in numpy, its parts beside fla's, and each branch by itself."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from fla_naive import naive
from helpers import EXACT, close
from matrix import D_MODEL, HEADS, NATIVE, Row
from test_sparse import as_other, outputs, text

from mla.attention.sparse.native_sparse import in_common
from mla.cache.meter import content_bytes
from mla.errors import UserError
from mla.model import parameters

pytestmark = pytest.mark.usefixtures("float64")

LENGTH, WIDTH, GROUPS = 59, D_MODEL // HEADS, 2  # of the text, of a head; key heads
ROW = Row("native_sparse", NATIVE | {"top_k": 4})


def rotated(x: np.ndarray, at: int) -> np.ndarray:
    """x [heads, d] rotated as halves to a position."""
    half = WIDTH // 2
    angle = at * 1e4 ** (-np.arange(half) / half)
    first, second = x[:, :half], x[:, half:]
    return np.concatenate(
        [first * np.cos(angle) - second * np.sin(angle), first * np.sin(angle) + second * np.cos(angle)], axis=1
    )


def compressed(weights: Any, tokens: list[np.ndarray]) -> np.ndarray:
    """[K, d] of l tokens [K, d] each."""
    placed = np.stack(tokens, axis=1) + np.asarray(weights["place"])
    inner = placed.reshape(GROUPS, -1) @ np.asarray(weights["inner"]["kernel"])
    return inner / (1 + np.exp(-inner)) @ np.asarray(weights["outer"]["kernel"])


def sequential(mixer: Any, x: np.ndarray, branches: tuple[int, ...] = (0, 1, 2)) -> np.ndarray:
    """The rule of the paper on one text [T, D], token by token over lists of what is there; only some of its branches."""
    w, sizes = parameters(mixer), mixer.config
    stride, long, size = sizes.pool_stride, sizes.pool_block, sizes.block
    pieces_of_entry, pieces_of_block = long // stride, size // stride
    slc: list[Any] = []
    win: list[Any] = []
    raw: list[Any] = []
    cmp: list[Any] = []
    out = np.zeros_like(x)

    def heads(name: str, token: np.ndarray) -> np.ndarray:
        return (token @ np.asarray(w[name]["kernel"])).reshape(-1, WIDTH)

    def softmax(asked: np.ndarray, keys: Any) -> np.ndarray:
        weights = np.exp(np.stack(list(keys)) @ asked / WIDTH**0.5)
        return weights / weights.sum()

    for t, token in enumerate(x):
        slc.append((rotated(heads("key", token), t), heads("value", token)))
        win = [*win, (rotated(heads("near_key", token), t), heads("near_value", token))][-sizes.near :]
        raw.append((heads("pool_key", token), heads("pool_value", token)))
        if t + 1 >= long and (t + 1 - long) % stride == 0:
            newest = zip(*raw[-long:], strict=True)
            names = ("compress_key", "compress_value")
            cmp.append([compressed(w[name], list(part)) for name, part in zip(names, newest, strict=True)])
        assert len(cmp) == max(0, (t + 1 - long) // stride + 1)
        plain = heads("query", token)
        query, gates = rotated(plain, t), 1 / (1 + np.exp(-(token @ np.asarray(w["branch_gate"]["kernel"]))))
        gates, y = gates.reshape(HEADS, 3), np.zeros((HEADS, WIDTH))
        for group in range(GROUPS):
            members = range(group * HEADS // GROUPS, (group + 1) * HEADS // GROUPS)
            p = {h: softmax(plain[h], (k[group] for k, _ in cmp)) if cmp else np.zeros(0) for h in members}
            score = np.zeros(t // size + 1)
            for j in range(len(score)):
                for m in range(pieces_of_block):
                    for n in range(pieces_of_entry):
                        i = pieces_of_block * (j + 1) - 1 - m - n
                        score[j] += sum(p[h][i] for h in members) if 0 <= i < len(cmp) else 0
            forced = {0, t // size, max(0, t // size - 1)}
            others = sorted(set(range(len(score))) - forced, key=lambda j: (-score[j], j))
            chosen = sorted([*forced, *others[: sizes.top_k - len(forced)]])
            tokens = [s for j in chosen for s in range(j * size, min((j + 1) * size, t + 1))]
            for h in members:
                of_branch = [
                    sum(weight * v[group] for weight, (_, v) in zip(p[h], cmp, strict=True)),
                    softmax(query[h], (slc[s][0][group] for s in tokens)) @ np.stack([slc[s][1][group] for s in tokens]),
                    softmax(query[h], (k[group] for k, _ in win)) @ np.stack([v[group] for _, v in win]),
                ]
                y[h] = sum(gates[h, branch] * of_branch[branch] for branch in branches)
        out[t] = y.reshape(-1) @ np.asarray(w["out"]["kernel"])
    return out


def test_the_layer_is_the_rule_of_the_paper_token_by_token() -> None:
    mixer, x = ROW.mixer(), text(LENGTH)
    found = outputs(mixer, x)
    close(found, np.stack([sequential(mixer, np.asarray(row)) for row in x]), EXACT, unit=True)
    wider = outputs(as_other(mixer, "native_sparse", NATIVE | {"top_k": 5}), x)
    assert np.max(np.abs(found - wider)) > 0.1 * np.std(found), "nothing was left out"


@pytest.mark.parametrize("branch", range(3))
def test_gates_isolate_a_branch(branch: int) -> None:
    """Gates of 1 and 0: compression by the rule, which before its first entry gives 0; selection of all blocks is full
    attention, and of the window is a sliding window, each with its own keys and values."""
    mixer: Any = Row("native_sparse", NATIVE | {"top_k": 5 if branch == 1 else 4}).mixer()
    mixer.branch_gate.kernel[...] = 0 * mixer.branch_gate.kernel[...]
    x = text(LENGTH)
    if branch == 0:
        expected = 2 * np.stack([sequential(mixer, np.asarray(row), (0,)) for row in x])
        assert not expected[:, : NATIVE["pool_block"] - 1].any()
    else:
        weights, names = parameters(mixer), {"key": "near_key", "value": "near_value"} if branch == 2 else {}
        other = Row(*[("gqa", {}), ("sliding_window", {"window": NATIVE["near"], "num_kv_heads": GROUPS})][branch - 1])
        plain: Any = other.mixer()
        for name in ("query", "key", "value", "out"):
            getattr(plain, name).kernel[...] = weights[names.get(name, name)]["kernel"]
        expected = outputs(plain, x)
    only = jnp.zeros((*x.shape[:2], HEADS, 3)).at[..., branch].set(1.0)
    mixer.gates = lambda _: only
    close(outputs(mixer, x), expected, EXACT, unit=True)


def test_a_block_counts_the_pieces_that_entries_share_with_it() -> None:
    """The paper's double sum over 0-based entries and blocks, at its own sizes and where an entry is longer than a block."""
    paper = Row("native_sparse", {"pool_block": 32, "pool_stride": 16, "block": 64}).config()
    for config in (paper, Row("native_sparse", {"pool_block": 12, "pool_stride": 4, "block": 8}).config()):
        wide, long = config.block // config.pool_stride, config.pool_block // config.pool_stride
        expected = np.zeros((20, 6))
        for j in range(6):
            for m in range(wide):
                for n in range(long):
                    i = wide * (j + 1) - 1 - m - n
                    if 0 <= i < 20:
                        expected[i, j] += 1
        np.testing.assert_array_equal(in_common(20, 6, config), expected)
    np.testing.assert_array_equal(in_common(20, 6, paper)[7:12, 2], [1, 2, 2, 2, 1])


def test_the_parts_are_those_of_fla() -> None:
    """With blocks, entries and strides of one size, and this layer's queries, keys and values. It computes in fp32."""
    theirs, size, length = naive("nsa"), 6, 48
    mixer: Any = Row("native_sparse", {"pool_block": size, "pool_stride": size, "block": size, "top_k": 4}).mixer()
    where = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (2, length))

    @jax.jit
    def parts(x: jax.Array) -> Any:
        memory, queries = mixer.remember(x, where)[0], mixer.queries(x, where)
        mask = memory.mask(where)
        mask = dataclasses.replace(mask, chosen=mixer.choose(x, where, queries, memory, mask))
        arrays = *queries, *memory.beside.compressed.entries, *memory.entries
        return mask.chosen, mixer.branches(queries, memory, mask), arrays

    chosen, (pooled, selected, _), arrays = parts(text(length))
    turned, plain, k_cmp, v_cmp, k, v = (torch.tensor(np.asarray(a)) for a in arrays)
    blocks = theirs.naive_nsa_topk(plain, k_cmp, 4, size, WIDTH**-0.5)
    of_theirs = np.where(blocks[..., None] < 0, -1, blocks[..., None] * size + np.arange(size)).reshape(chosen.shape)
    np.testing.assert_array_equal(np.sort(chosen, axis=-1), np.sort(of_theirs, axis=-1))
    close(pooled, theirs.naive_nsa_compression(plain, k_cmp, v_cmp, size, WIDTH**-0.5)[0], 1e-5, "compression", unit=True)
    close(selected, theirs.naive_nsa_selection(turned, k, v, blocks, size), 1e-5, "selection", unit=True)


def test_bytes_held_and_read() -> None:
    """Held: a token, an entry every d tokens, a window and l - 1 open tokens. Read: n blocks, the last as far as it is
    filled, and the rest whole; as many as the last token chose."""
    mixer: Any = ROW.mixer(jnp.bfloat16)
    entry = 2 * GROUPS * WIDTH * 2
    for length in (1, 4, 9, 36, 48, 100):
        cache = jax.eval_shape(functools.partial(mixer.init_cache, 1, length, jnp.bfloat16))
        rest = length // 4 + min(length, 9) + 7
        assert content_bytes(cache) == entry * (length + rest)
        read = min(length, 3 * 12 + (length - 1) % 12 + 1)
        assert mixer.read_bytes(cache) == entry * (read + rest)
    exact: Any = ROW.mixer()
    where = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), (2, LENGTH))

    @jax.jit
    def step(x: jax.Array) -> Any:
        memory, cache = exact.remember(x, where, exact.init_cache(2, LENGTH, jnp.float64))
        last = x[:, -1:], where[:, -1:]
        return exact.choose(*last, exact.queries(*last), memory, memory.mask(last[1])), cache

    chosen, cache = step(text(LENGTH))
    held = np.sum((chosen >= 0) & (np.asarray(chosen) < LENGTH))
    assert held == 2 * GROUPS * exact.reads(LENGTH)["key"]
    assert exact.read_bytes(cache) == 2 * 4 * entry * (exact.reads(LENGTH)["key"] + LENGTH // 4 + 9 + 7)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pool_block": 0}, "mechanism.pool_block: 0 is not a positive number"),
        ({"pool_block": 6}, "mechanism.pool_block: 6 is no multiple of pool_stride 4"),
        ({"block": 10}, "mechanism.block: 10 is no multiple of pool_stride 4"),
        ({"pool_stride": 0}, "mechanism.pool_stride: 0 is not a positive number"),
        ({"near": 0}, "mechanism.near: 0 is not a positive number"),
        ({"top_k": 2}, "mechanism.top_k: 2 is below 3: the first block, the query's own and the one before it"),
        ({"window": 8}, "mechanism.window: near says how wide the window branch is; set it to 0"),
    ],
)
def test_refused_sizes(settings: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Row("native_sparse", NATIVE | settings).mixer()


def test_codes_that_come_later_are_refused() -> None:
    mixer = ROW.mixer()
    assert mixer.codecs("int8")["pool_key"] is not None
    with pytest.raises(UserError, match="where a layer finds tokens by where they stand"):
        mixer.codecs("key=kivi4")
