"""Attention over chosen entries: the dense op under the mask of the choice, at the cost of the choice."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from fla_naive import naive
from helpers import EXACT, close, relative_norm

from mla.errors import UserError
from mla.ops import attention
from mla.ops.attention import BACKENDS, selected_attention, softmax_attention
from mla.ops.dispatch import watched
from mla.ops.mask import Mask

pytestmark = pytest.mark.usefixtures("float64")


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of one call. `parts`: (key heads, width) of each part of the keys; `value`: of the values."""

    parts: tuple[tuple[int, int], ...] = ((4, 8),)
    value: tuple[int, int] = (4, 8)
    groups: int = 1  # of heads that choose together
    queries: int = 9
    entries: int = 20
    chosen: int = 6
    heads: int = 4
    owners: int = 0  # key heads that have positions and lifetimes of their own; 0: none has
    window: int | None = None
    chunk: int | None = None
    soft_cap: float | None = None
    sink: bool = False
    lifetimes: bool = False


CASES = {
    "all heads choose together": Case(),
    "decode": Case(queries=1),
    "gqa": Case(((2, 8),), (2, 8), groups=2),
    "each head of a group": Case(((2, 8),), (2, 8), groups=4),
    "groups of key heads": Case(((4, 8),), (4, 8), groups=2),
    "mla expanded": Case(((4, 8), (1, 4)), (4, 6), groups=4),
    "mla absorbed": Case(((1, 16), (1, 4)), (1, 16)),
    "one latent, four choices": Case(((1, 16), (1, 4)), (1, 16), groups=4),
    "nothing divides": Case(((2, 8), (3, 4)), (6, 5), groups=2, heads=6),
    "no rope": Case(((1, 16), (1, 0)), (1, 16)),
    "window": Case(window=7),
    "chunk": Case(chunk=8),
    "cap and sink": Case(soft_cap=2.0, sink=True),
    "lifetimes": Case(lifetimes=True),
    "owners": Case(((2, 8),), (2, 8), groups=1, owners=2, lifetimes=True),
    "everything": Case(((2, 8), (1, 4)), (2, 6), 4, 40, 50, 11, 4, 2, 30, None, 3.0, True, True),
}


@dataclasses.dataclass
class Inputs:
    arrays: tuple[Any, ...]  # queries, keys, values, sink
    indices: jax.Array
    mask: Mask
    options: dict[str, Any]


def inputs(case: Case, seed: int = 0) -> Inputs:
    """Two sequences: padded queries, empty slots that hold garbage, choices of any entry, some of nothing."""
    draw = np.random.default_rng(seed)
    batch, count = 2, case.entries
    owners = (case.owners,) if case.owners else ()

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(draw.standard_normal(shape))

    positions = np.stack([draw.permutation(count) for _ in range(batch * max(1, case.owners))])
    positions = np.where(draw.random(positions.shape) < 0.15, -1, positions)
    positions = positions.reshape(batch, max(1, case.owners), count).swapaxes(1, 2).reshape(batch, count, *owners)
    at = np.stack([np.arange(count - case.queries, count), np.r_[-1, np.arange(case.queries - 1)]])
    at = np.asarray([[count - 1], [count // 2]]) if case.queries == 1 else at
    lives = {}
    if case.lifetimes:
        since = draw.integers(0, count, positions.shape)
        lives = {"since": since, "until": since + draw.integers(1, count, positions.shape)}
    as_int = {name: jnp.asarray(value, jnp.int32) for name, value in lives.items()}
    mask = Mask(jnp.asarray(at, jnp.int32), jnp.asarray(positions, jnp.int32), case.window, case.chunk, **as_int)

    shape = (batch, case.queries, case.groups)
    chosen = np.stack([draw.permutation(count)[: case.chosen] for _ in range(int(np.prod(shape)))])
    chosen = np.where(draw.random(chosen.shape) < 0.2, -1, chosen).reshape(*shape, case.chosen)
    chosen[0, 1:2, 0] = -1  # a query that chose nothing
    queries = tuple(normal(batch, case.queries, case.heads, width) for _, width in case.parts)
    keys = tuple(normal(batch, count, heads, width) for heads, width in case.parts)
    sink = normal(case.heads) if case.sink else None
    options = {"scale": sum(width for _, width in case.parts) ** -0.5, "soft_cap": case.soft_cap}
    return Inputs((queries, keys, normal(batch, count, *case.value), sink), jnp.asarray(chosen, jnp.int32), mask, options)


def expected(given: Inputs) -> np.ndarray:
    """float64, one query and head at a time, over what it chose and sees, as often as it chose it."""
    queries, keys, values, sink = jax.tree.map(np.asarray, given.arrays)
    (batch, length, heads, _), mask = queries[0].shape, given.mask
    cap, out = given.options["soft_cap"], np.zeros((*queries[0].shape[:3], values.shape[-1]))
    visible = np.asarray(jnp.broadcast_to(mask.by_head(heads), (batch, heads, length, values.shape[1])))
    for b, s, h in np.ndindex(batch, length, heads):
        chosen = np.asarray(given.indices)[b, s, h * given.indices.shape[2] // heads]
        chosen = [c for c in chosen if c >= 0 and visible[b, h, s, c]]
        if not chosen:
            continue
        logits = sum(k[b, chosen, h * k.shape[2] // heads] @ q[b, s, h] for q, k in zip(queries, keys, strict=True))
        logits = logits * given.options["scale"]
        weights = np.exp(cap * np.tanh(logits / cap) if cap else logits)
        total = weights.sum() + (0 if sink is None else np.exp(sink[h]))
        out[b, s, h] = weights / total @ values[b, chosen, h * values.shape[2] // heads]
    return out


def attend(given: Inputs, *arrays: Any, **options: Any) -> jax.Array:
    """Compiled whole: op by op, most of a test would be compiling."""

    def run(arrays: Any, indices: jax.Array, mask: Mask) -> jax.Array:
        queries, keys, values, sink = arrays
        return selected_attention(queries, keys, values, indices, mask, sink=sink, **given.options, **options)

    return jax.jit(run)(arrays or given.arrays, options.pop("indices", given.indices), given.mask)


@pytest.mark.parametrize("name", CASES)
def test_equals_a_softmax_over_each_choice(name: str) -> None:
    given = inputs(CASES[name])
    found, want = np.asarray(attend(given)), expected(given)
    assert np.abs(want).max() > 0.1
    close(found, want, EXACT)
    assert not found[0, 1:2, 0].any(), "a query that chose nothing gives zeros"


@pytest.mark.parametrize("name,queries", [("mla absorbed", 1), ("gqa", 9), ("everything", 9)])
def test_all_entries_chosen_are_the_dense_op(name: str, queries: int) -> None:
    """In any order, with gradients."""
    case = dataclasses.replace(CASES[name], queries=queries)
    given = inputs(dataclasses.replace(case, chosen=case.entries))
    order = np.random.default_rng(3).permutation(case.entries)
    every = jnp.broadcast_to(jnp.asarray(order, jnp.int32), given.indices.shape)

    def both(*arrays: Any) -> tuple[jax.Array, jax.Array]:
        queries, keys, values, sink = arrays
        options = {**given.options, "sink": sink, "backend": "reference"}
        return attend(given, *arrays, indices=every), softmax_attention(queries, keys, values, given.mask, **options)

    close(*both(*given.arrays), EXACT)
    gradients = [jax.jit(jax.grad(lambda *a, i=i: jnp.sum(jnp.sin(both(*a)[i])), (0, 1, 2)))(*given.arrays) for i in (0, 1)]
    for one, other in zip(*map(jax.tree.leaves, gradients), strict=True):
        close(one, other, EXACT)


def test_an_entry_chosen_twice_counts_twice() -> None:
    """As if it were stored twice: its logit grows by log 2. Chosen once and once -1, it counts once."""
    given = inputs(CASES["decode"])
    once = given.indices
    for second, want in ((once, attend(given)), (jnp.full_like(once, -1), attend(given))):
        close(attend(given, indices=jnp.concatenate([once, second], axis=3)), want, EXACT)
    twice = dataclasses.replace(given, indices=jnp.concatenate([once, once[..., :2]], axis=3))
    close(attend(twice), expected(twice), EXACT)
    assert np.abs(attend(twice) - attend(given)).max() > 1e-3


@pytest.mark.parametrize("name", ["one latent, four choices", "everything"])
def test_gradients_by_finite_differences(name: str) -> None:
    given = inputs(dataclasses.replace(CASES[name], queries=4, entries=12, chosen=5))
    target = jnp.asarray(np.random.default_rng(5).standard_normal(attend(given).shape))

    def loss(arrays: Any) -> jax.Array:
        return 0.5 * jnp.sum((attend(given, *arrays) - target) ** 2)

    draw, gradient = np.random.default_rng(6), jax.jit(jax.grad(loss))(given.arrays)
    for _ in range(4):
        way = jax.tree.map(lambda a: jnp.asarray(draw.standard_normal(a.shape)), given.arrays)
        slope = sum(jnp.vdot(g, w) for g, w in zip(jax.tree.leaves(gradient), jax.tree.leaves(way), strict=True))
        ahead, behind = (loss(jax.tree.map(lambda a, w, e=e: a + e * w, given.arrays, way)) for e in (1e-5, -1e-5))
        close((ahead - behind) / 2e-5, slope, relative=1e-7)
    unchosen = np.setdiff1d(np.arange(12), np.asarray(given.indices)[1])
    for leaf in jax.tree.leaves(gradient[1:3]):
        assert np.asarray(leaf).any() and not np.asarray(leaf)[1, unchosen].any()


def test_nothing_chosen_gives_zeros_and_zero_gradients() -> None:
    given = inputs(CASES["cap and sink"])
    nothing = jnp.full_like(given.indices, -1)
    program = jax.jit(jax.value_and_grad(lambda arrays: jnp.sum(attend(given, *arrays, indices=nothing))))
    output, gradient = program(given.arrays)
    assert output == 0 and not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient))


def test_queries_are_taken_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal to all at once, and no array of all that all queries chose exists in the program or its backward pass."""
    given = inputs(dataclasses.replace(CASES["everything"], queries=41))
    whole = attend(given)
    monkeypatch.setattr(attention, "_GATHERED", 8 * 11)
    close(attend(given), whole, EXACT)

    def program(arrays: Any) -> Any:
        return jax.grad(lambda a: jnp.sum(attend(given, *a) ** 2))(arrays)

    largest = {}
    for gathered in (8 * 11, 2**14):
        monkeypatch.setattr(attention, "_GATHERED", gathered)
        compiled = jax.jit(lambda a: program(a)).lower(given.arrays).compile()
        largest[gathered] = compiled.memory_analysis().temp_size_in_bytes
    assert largest[8 * 11] < largest[2**14] / 2, largest


def test_memory_and_work_go_with_the_choice() -> None:
    """One query over 4,096 entries: 64 chosen cost a small part of all, whatever else is there."""
    case = Case(((1, 64), (1, 16)), (1, 64), queries=1, entries=4096, chosen=64)
    given = inputs(case)
    dense = jax.jit(lambda q, k, v, s: softmax_attention(q, k, v, given.mask, backend="blocked", **given.options))
    work = {}
    for name, function in {"dense": dense, "chosen": jax.jit(lambda *a: attend(given, *a))}.items():
        work[name] = function.lower(*given.arrays).compile().cost_analysis()["flops"]
    assert work["chosen"] < work["dense"] / 20, work


def test_bf16() -> None:
    given = inputs(CASES["everything"])
    want = expected(given)
    queries, keys, values, sink = given.arrays
    narrow = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (queries, keys, values))
    output = attend(given, *narrow, sink)
    assert output.dtype == jnp.bfloat16 and relative_norm(output, want) < 1e-2


def test_only_what_can_read_a_selection_does() -> None:
    given = inputs(CASES["decode"])
    with watched() as ran:
        attend(given)
        attend(given, backend="cudnn,auto", platform="cuda")
    assert ran == {"attention": {"gather"}}
    for name in set(BACKENDS) - {"gather"}:
        with pytest.raises(UserError, match=f"attention backend '{name}' cannot serve this call, it needs .*a selection"):
            attend(given, backend=name)
    queries, keys, values, _ = given.arrays
    with pytest.raises(UserError, match="attention backend 'gather' cannot serve this call, it needs a selection"):
        softmax_attention(queries, keys, values, given.mask, scale=1.0, backend="gather")
    text = jax.export.export(jax.jit(lambda a: attend(given, *a)), platforms=["cuda"])(given.arrays).mlir_module()
    assert "stablehlo.gather" in text


def test_what_an_indexer_chose_is_attended_to_as_by_fla() -> None:
    """Flash-linear-attention's reference of sparse attention, which computes in fp32: grouped heads, one choice for all."""
    draw = np.random.default_rng(5)
    shapes = {"q": (2, 21, 4, 6), "k": (2, 21, 2, 6), "v": (2, 21, 2, 6), "index_q": (2, 21, 3, 5), "index_k": (2, 21, 5)}
    arrays = {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    q, k, v, *index = map(torch.tensor, arrays.values())
    theirs, chosen = naive("dsa").naive_dsa(q, k, v, *index, topk=7, return_indices=True)
    positions = jnp.broadcast_to(jnp.arange(21, dtype=jnp.int32), (2, 21))
    ours = selected_attention(
        (jnp.asarray(arrays["q"]),),
        (jnp.asarray(arrays["k"]),),
        jnp.asarray(arrays["v"]),
        jnp.asarray(chosen.numpy(), jnp.int32)[:, :, None],
        Mask(positions, positions),
        scale=6**-0.5,
    )
    close(ours, theirs.numpy(), 1e-5, unit=True)
