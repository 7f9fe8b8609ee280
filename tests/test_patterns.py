"""Patterns of positions: each against a softmax under the mask that its paper draws, in numpy; what leaves the cache."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import EXACT, close
from matrix import BIRD, HEADS, Row, columns, dilated, strided
from test_sparse import LENGTH, as_other, outputs, text

from mla import config as configs
from mla import model as models
from mla.cache.meter import content_bytes
from mla.errors import UserError
from mla.evaluation.plan import cache_plan

pytestmark = pytest.mark.usefixtures("float64")

WHERE = jnp.arange(LENGTH, dtype=jnp.int32)[None]
Reads = Callable[[int, int], set[int]]  # (head, query) -> the tokens that it reads


def masked(mixer: Any, x: jax.Array, reads: Reads) -> np.ndarray:
    """Outputs by the rule, one head and query at a time."""
    q, (k, v) = np.asarray(mixer.queries(x, WHERE)), (np.asarray(a) for a in mixer.entries(x, WHERE))
    out = np.zeros_like(q)
    for b, t, h in np.ndindex(q.shape[:3]):
        rows, group = sorted(reads(h, t)), h * k.shape[2] // HEADS
        assert t in rows, "a query that does not read its own token"
        weights = np.exp(k[b, rows, group] @ q[b, t, h] / q.shape[3] ** 0.5)
        out[b, t, h] = weights / weights.sum() @ v[b, rows, group]
    return np.asarray(mixer.out(jnp.asarray(out.reshape(*q.shape[:2], -1))))


def bird(mixer: Any, head: int, query: int) -> set[int]:
    """The rule of BIRD, with the blocks that the mechanism draws."""
    own, size = query // 4, 4
    between = jnp.asarray(own - 1 - 1, jnp.int32)
    drawn = mixer.config.drawn(jnp.asarray(own), jnp.asarray(head * 2 // HEADS), between, mixer.around.layer)
    blocks = {0, own, max(own - 1, 0), *(int(block) for block in drawn if block >= 0)}
    return {s for block in blocks for s in range(block * size, block * size + size) if s <= query}


@pytest.mark.parametrize(
    ("name", "settings", "rule"),
    [
        ("strided", {"stride": 6}, strided(6)),
        ("fixed_columns", {"stride": 8, "columns": 3}, columns(8, 3)),
        ("dilated", {"tokens_read": 5, "dilation": 3}, dilated(5, 3)),
        ("dilated", {"tokens_read": 6, "dilated_heads": 1}, None),
        ("big_bird", BIRD, None),
    ],
)
def test_each_is_a_softmax_under_the_mask_of_its_paper(name: str, settings: dict[str, int], rule: Any) -> None:
    mixer: Any = Row(name, settings).mixer()
    of_head: dict[str, Reads] = {
        "dilated": lambda head, query: dilated(6, 1 + (head == HEADS - 1))(query),
        "big_bird": functools.partial(bird, mixer),
    }
    reads: Reads = (lambda _, query: rule(query)) if rule else of_head[name]
    close(outputs(mixer, text()), masked(mixer, text(), reads), EXACT, unit=True)


@pytest.mark.parametrize(
    ("name", "settings", "other"),
    [
        ("strided", {"stride": LENGTH}, ("gqa", {})),
        ("strided", {"stride": 1}, ("gqa", {})),
        ("fixed_columns", {"stride": LENGTH, "columns": 1}, ("gqa", {})),
        ("fixed_columns", {"stride": 5, "columns": 5}, ("gqa", {})),
        ("dilated", {"tokens_read": LENGTH, "dilation": 1}, ("gqa", {})),
        ("dilated", {"tokens_read": 6, "dilation": 1}, ("sliding_window", {"window": 6, "num_kv_heads": 2})),
        ("big_bird", {"block": 10, "window_blocks": 4}, ("gqa", {})),
        ("big_bird", {"block": 10, "window_blocks": 1, "global_blocks": 1, "random_blocks": 3}, ("gqa", {})),
    ],
)
def test_each_is_dense_attention_where_it_covers_the_text(
    name: str, settings: dict[str, int], other: tuple[str, dict[str, int]]
) -> None:
    mixer = Row(name, settings).mixer()
    close(outputs(mixer, text()), outputs(as_other(mixer, *other), text()), EXACT, unit=True)


def test_blocks_are_drawn_without_return_and_alike() -> None:
    """As many as there are, each set as likely as another; other layers, heads and seeds draw others."""
    config = Row("big_bird", BIRD | {"random_blocks": 3}).config()
    block, head = jnp.arange(4000)[:, None], jnp.arange(2)
    drawn = {n: np.asarray(config.drawn(block, head, jnp.asarray(n), 0)) - config.global_blocks for n in (-2, 0, 2, 3, 9)}
    for n, found in drawn.items():
        kept = np.sort(np.where(found < 0, -1, found), axis=-1)[..., max(0, 3 - max(n, 0)) :]
        assert kept.shape[-1] == min(3, max(n, 0)) and np.all(kept >= 0) and np.all(kept < max(n, 1))
        assert np.all(np.diff(kept, axis=-1) > 0), "a block twice"
    counts = np.bincount(drawn[9].reshape(-1), minlength=9)
    expected = 8000 * 3 / 9
    assert np.all(np.abs(counts - expected) < 5 * expected**0.5)
    pairs = drawn[9][:, 0], drawn[9][:, 1], np.asarray(config.drawn(block, head, jnp.asarray(9), 1))[:, 0] - 1
    for a in pairs:
        for b in pairs:
            alike = np.mean(np.sort(a, axis=-1) == np.sort(b, axis=-1))
            assert (alike == 1) == (a is b) and (a is b or alike < 0.45)


def held(mixer: Any, length: int) -> tuple[Any, list[set[int]]]:
    """The cache after a text, as it stands in one piece, and in pieces, and the positions in it."""
    x, caches = text(length), []
    for size in (length, 5):
        cache = mixer.init_cache(2, length, jnp.float64)
        for start in range(0, length, size):
            where = jnp.arange(start, min(start + size, length), dtype=jnp.int32)
            cache = jax.jit(mixer.extend)(x[:, where], jnp.broadcast_to(where, (2, len(where))), cache)[1]
        caches.append(cache)
    for a, b in zip(*map(jax.tree.leaves, caches), strict=True):
        close(a, b, EXACT)
    return caches[0], [set(row[row >= 0].tolist()) for row in np.asarray(caches[0]["entries"].slots.positions)]


def test_what_a_pattern_never_reads_again_leaves() -> None:
    """Columns stay; of the other tokens one block's, and a dilated window's reach. Bytes at every length."""
    row = Row("fixed_columns", {"stride": 8, "columns": 3})
    _, positions = held(row.mixer(), LENGTH)
    stay = {s for s in range(LENGTH) if s % 8 >= 5}
    assert positions[0] == stay | set(sorted(set(range(LENGTH)) - stay)[-5:])
    _, positions = held(Row("dilated", {"tokens_read": 5, "dilation": 3}).mixer(), LENGTH)
    assert positions[0] == set(range(LENGTH - 13, LENGTH))
    _, positions = held(Row("strided", {"stride": 8}).mixer(), LENGTH)
    assert positions[0] == set(range(LENGTH)), "any may be in a later query's column"
    mixer = row.mixer(jnp.float32)
    for length in range(1, 40):
        cache = jax.eval_shape(lambda length=length: mixer.init_cache(1, length, jnp.float32))
        entries = min(length, 8 - 3) + 3 * -(-length // 8)
        assert content_bytes(cache) == entries * 2 * 2 * 8 * 4
        assert content_bytes(cache) == sum(term.bytes_at(length, 4) for term in row.config().cache_formula(row.around()))


@pytest.mark.parametrize("length", [3, 36, LENGTH])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("strided", {"stride": 6}),
        ("dilated", {"tokens_read": 5, "dilation": 3}),
        ("dilated", {"tokens_read": 6, "dilated_heads": 1}),
        ("big_bird", BIRD | {"num_kv_heads": 4}),
        ("fixed_columns", {"stride": 8, "columns": 3}),
    ],
)
def test_a_step_reads_what_it_says(name: str, settings: dict[str, int], length: int) -> None:
    """Counted from what the last token chooses, for each key head; of columns, which leave nothing unread, at most that."""
    mixer: Any = Row(name, settings).mixer()
    x, where = text(length), jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (2, length))
    memory, cache = mixer.remember(x, where, mixer.init_cache(2, length, jnp.float64))
    chosen = np.asarray(mixer.choose(x[:, -1:], where[:, -1:], None, memory, memory.mask(where[:, -1:])))[0, 0]
    sets = [set(row[row >= 0].tolist()) for row in chosen]
    share, group = len(sets) / HEADS, HEADS // mixer.num_kv_heads
    read = [
        set().union(*(sets[int(h * share)] for h in range(k * group, (k + 1) * group))) for k in range(mixer.num_kv_heads)
    ]
    said = mixer.read_bytes(cache)
    token = 2 * 8 * 8
    if name == "fixed_columns":
        assert 2 * sum(map(len, read)) * token <= said == content_bytes(cache)
    else:
        most = np.ceil(sum(map(len, read)) / mixer.num_kv_heads) * mixer.num_kv_heads
        assert said == 2 * most * token <= content_bytes(cache)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("strided", {"stride": 0}, "mechanism.stride: 0 is not a positive number"),
        ("strided", {"window": 9}, "mechanism.window: the pattern says what is seen; set it to 0"),
        ("fixed_columns", {"columns": 0}, "mechanism.columns: 0 is not a positive number"),
        ("fixed_columns", {"stride": 4, "columns": 5}, "mechanism.columns: 5 is above stride 4, tokens of a block"),
        ("dilated", {"tokens_read": 0}, "mechanism.tokens_read: 0 is not a positive number"),
        ("dilated", {"dilation": 0}, "mechanism.dilation: 0 is not a positive number"),
        ("dilated", {"dilated_heads": 5}, "mechanism.dilated_heads: 5 is above num_heads 4"),
        ("big_bird", {"block": 0}, "mechanism.block: 0 is not a positive number"),
        ("big_bird", {"window_blocks": 0}, "mechanism.window_blocks: 0 is not a positive number"),
    ],
)
def test_refused_sizes(name: str, settings: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Row(name, settings).mixer()


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        ({"evict": "tova", "budget_tokens": 8}, "strided finds tokens by where they stand; set it to none"),
        ({"codec": "kivi4"}, "where a layer finds tokens by where they stand"),
        ({"read": "quest:start=0"}, "has no layer from 0 up that keeps every token"),
        ({"merge": "minicache:start=0"}, "layer 0 keeps no entry of every token"),
    ],
)
def test_tokens_that_are_looked_up_by_place_stay_there(cache: dict[str, Any], message: str) -> None:
    config = configs.create("strided", {}, model={"d_model": 32, "num_layers": 2, "num_heads": 4})
    for name, value in cache.items():
        setattr(config.eval.cache, name, value)
    with pytest.raises(UserError, match=message):
        cache_plan(config, models.create(config, 29), None)
