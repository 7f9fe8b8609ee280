"""Pages that decoding chooses by the bounds of their keys (Quest), over mechanisms that were trained without them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import EXACT, close
from matrix import D_MODEL, ROWS, Row

from mla import config as configs
from mla import model as models
from mla.cache.meter import content_bytes
from mla.cache.pages import PageCache, Quest
from mla.config import MeshConfig
from mla.errors import UserError
from mla.evaluation import cache_bytes, perplexity
from mla.evaluation.plan import cache_plan
from mla.ops.mask import Mask
from mla.sharding import make_mesh

LENGTH = 29  # no whole number of pages
QUEST = Quest(page=4, pages=3, start=0)
GQA = Row("gqa", {"num_kv_heads": 2, "head_dim": 6, "sink": True})
BIASED = Row("mla", {"kv_lora_rank": 20, "qk_rope_head_dim": 4, "latent_bias": True, "q_lora_rank": 24})


def way(row: Row) -> tuple[Any, ...]:
    """How a row's queries meet keys."""
    of = row.of[1]
    return of.queries, of.expanded, of.page_keys, row.name, row.settings.get("qk_rope_head_dim") == 0


PAGED = [row for row in ROWS if not row.long and getattr(row.of[1], "paged", False) and not row.config().window]
PAGED = [*{way(row): row for row in PAGED}.values(), BIASED]  # one of each way


def text(length: int = LENGTH) -> jax.Array:
    return jnp.asarray(np.random.default_rng(3).normal(size=(2, length, D_MODEL)))


def where(start: int, stop: int) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(start, stop, dtype=jnp.int32), (2, stop - start))


def filled(mixer: Any, x: jax.Array, sizes: list[int], quest: Quest | None, dtype: Any = jnp.float64) -> tuple[Any, Any]:
    """Outputs of the pieces of a text through a cache, and the cache after them."""
    graph, state = nnx.split(mixer)
    extend = jax.jit(lambda s, x, p, c: nnx.merge(graph, s).extend(x, p, c))
    cache, start, outputs = mixer.init_cache(2, x.shape[1], dtype, mixer.plan(read=quest)), 0, []
    for size in sizes:
        y, cache = extend(state, x[:, start : start + size], where(start, start + size), cache)
        outputs.append(y)
        start += size
    return np.concatenate(outputs, axis=1), cache


@pytest.mark.parametrize("row", PAGED, ids=lambda row: row.id)
def test_bounds_dominate_every_logit(row: Row, float64: Any) -> None:
    """Of the heads' own queries and keys, up to a number that all keys share; and a page of one token is its logit."""
    mixer: Any = row.mixer()
    x, positions = text(11), where(0, 11)
    queries, entries = mixer.queries(x, positions), mixer.entries(x, positions)
    seen = mixer.expanded(queries, entries, Mask(positions, positions))
    heads, shared = mixer.num_heads, np.zeros(())
    logits = sum(
        np.einsum("bshd,bchd->bshc", q, np.repeat(k, heads // k.shape[2], axis=2))
        for q, k in zip(seen.queries, seen.keys, strict=True)
    )
    for size in (1, 4):
        quest = Quest(page=size)
        empty = PageCache.empty(mixer.page_shapes(), 2, 11, jnp.float64, quest)
        before = mixer.init_cache(2, 11, jnp.float64)["entries"].slots
        pages = empty.extend(mixer.page_keys(entries), positions, before)
        scores = np.repeat(np.asarray(pages.scores(mixer.page_queries(queries))), size, axis=-1)[..., :11]
        over = scores - logits
        shared = over[..., :1] if size == 1 else shared
        if size == 1:
            close(over, np.broadcast_to(shared, over.shape), 1e-8)
        assert (over - shared > -1e-8).all() and (size == 1 or np.max(over - shared) > 0.1)


@pytest.mark.parametrize("row", [GQA, BIASED], ids=lambda row: row.id)
def test_decoding_reads_the_best_pages_and_nothing_else(row: Row, float64: Any) -> None:
    """Prompts as they are; then, by numpy, the open page and the two with the highest bounds, for each head."""
    mixer, x = row.mixer(), text()
    plain, _ = filled(mixer, x, [LENGTH], None)
    y, cache = filled(mixer, x, [13, 9, *[1] * (LENGTH - 22)], QUEST)
    close(y[:, :22], plain[:, :22], EXACT, unit=True)
    assert np.max(np.abs(y[:, 22:] - plain[:, 22:])) > 0.05 * np.std(plain), "nothing was left out"

    anyway: Any = mixer
    queries, entries = anyway.queries(x, where(0, LENGTH)), anyway.entries(x, where(0, LENGTH))
    keys, asked = anyway.page_keys(entries), anyway.page_queries(queries)
    last, chosen = LENGTH - 1, []
    for b, h in np.ndindex(2, mixer.num_heads):
        bounds = []
        for page in range(last // 4):
            own = [np.asarray(k[b, 4 * page : 4 * page + 4, h * k.shape[2] // mixer.num_heads]) for k in keys]
            at = [np.asarray(q[b, last, h]) for q in asked]
            bounds.append(sum(np.maximum(q * k.max(0), q * k.min(0)).sum() for q, k in zip(at, own, strict=True)))
        best = [last // 4, *sorted(range(last // 4), key=lambda page: (-bounds[page], page))[:2]]
        chosen.append([4 * page + i for page in best for i in range(4)])
    slots = jnp.asarray(chosen, jnp.int32).reshape(2, 1, mixer.num_heads, -1)
    slots = jnp.where(slots < LENGTH, slots, -1)
    mask = dataclasses.replace(Mask(where(last, LENGTH), where(0, LENGTH)), chosen=slots)
    heads = anyway.attend(anyway.queries(x[:, last:], where(last, LENGTH)), entries, mask)
    close(y[:, last:], anyway.finish(x[:, last:], heads), EXACT, unit=True)

    for part, low, high in zip(keys, cache["pages"].bounds.low, cache["pages"].bounds.high, strict=True):
        for page in range(-(-LENGTH // 4)):
            close(low[:, page], part[:, 4 * page : 4 * page + 4].min(axis=1), EXACT)
            close(high[:, page], part[:, 4 * page : 4 * page + 4].max(axis=1), EXACT)


def test_pages_for_the_whole_text_change_nothing_and_one_is_the_own(float64: Any) -> None:
    mixer, x = Row("gqa").mixer(), text()
    sizes = [5, *[1] * (LENGTH - 5)]
    plain, _ = filled(mixer, x, [LENGTH], None)
    close(filled(mixer, x, sizes, Quest(page=4, pages=8, start=0))[0], plain, EXACT, unit=True)
    own = filled(mixer, x, sizes, Quest(page=4, pages=1, start=0))[0]
    other = Row("chunked", {"chunk": 4, "unit_norm": False}).mixer()
    local, _ = filled(other, x, [LENGTH], None)
    close(own[:, 5:], local[:, 5:], EXACT, unit=True)


def test_padding_and_rows_of_other_lengths_leave_the_bounds_alone(float64: Any) -> None:
    quest, shapes = Quest(page=4), (jax.ShapeDtypeStruct((1, 1, 1, 3), jnp.float64),)
    keys = jnp.asarray(np.random.default_rng(0).normal(size=(2, 9, 1, 3)))
    mixer = Row("mqa").mixer()
    slots = mixer.init_cache(2, 12, jnp.float64)["entries"].slots
    positions = jnp.asarray([[-1, -1, *range(7)], [*range(9)]], jnp.int32)
    once = PageCache.empty(shapes, 2, 12, jnp.float64, quest).extend((keys,), positions, slots)
    pages, before = PageCache.empty(shapes, 2, 12, jnp.float64, quest), slots
    for start, stop in ((0, 4), (4, 9)):
        pages = pages.extend((keys[:, start:stop],), positions[:, start:stop], before)
        before = before.assign(positions[:, start:stop])[1]
    for a, b in zip(jax.tree.leaves(pages), jax.tree.leaves(once), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(once.bounds.low[0][0, 1], keys[0, 6:].min(axis=0))
    assert not once.bounds.low[0][0, 2].any() and once.bounds.high[0][1, 2].any()


# ------------------------------------------------------------------------------------------------------------ evaluation


def small(variant: str, read: str, layers: int = 4, **cache: Any) -> Any:
    settings = {"mla": {"kv_lora_rank": 12, "qk_rope_head_dim": 4}}.get(variant.split("/")[0], {})
    model = {"d_model": 16, "num_layers": layers, "num_heads": 4}
    return configs.create(variant, settings, context=64, model=model, eval={"cache": {"read": read, **cache}})


@pytest.mark.parametrize("variant,codec", [("gqa", "none"), ("mla", "c_kv=int8"), ("gqa/2", "none")])
def test_live_bytes_and_bytes_read_are_those_of_the_formulas(variant: str, codec: str) -> None:
    config = small(variant, "quest:page=8,pages=2,start=2", codec=codec)
    configs.validate(config)
    model = models.create(config, 50)
    plan = cache_plan(config, model, None)  # type: ignore[arg-type]
    row = cache_bytes.measure(config, model, make_mesh(MeshConfig(data=-1)), plan, lengths=(100,))
    if variant == "mla":  # two layers with bounds of 12 + 4 channels; a head reads its own page and another one
        token, bound, shared = 12 + 2 + 4 * 4, 2 * 16 * 4, 4
    else:
        token, bound, shared = 2 * 2 * 4 * 4, 2 * 2 * 4 * 4, 2
    whole, paged = (2, 1) if variant == "gqa/2" else (4, 2)
    assert row["bytes_at"]["100"] == whole * 100 * token + paged * 13 * bound
    read = min(100, 4 + 8 * shared)  # the page that is being filled has 4 tokens
    assert row["read_bytes_per_step"]["100"] == 2 * 100 * token + 2 * (read * token + 13 * bound)


def test_an_evaluation_decodes_with_pages() -> None:
    """The loss of a window's prompt is that of the parallel form; after it one page is not enough, and all are."""
    tokens = np.random.default_rng(0).integers(0, 50, (8, 17), dtype=np.int32)
    for pages in (1, 8):
        config = small("mla", f"quest:page=2,pages={pages},start=1", layers=2)
        model, mesh = models.create(config, 50), make_mesh(MeshConfig(data=-1))
        plan = cache_plan(config, model, None)  # type: ignore[arg-type]
        assert plan.exact(16) == (pages == 8) and plan.alters
        losses = perplexity.Losses(model, mesh, 8, 16, 64, plan)
        change = np.abs(losses.cached(tokens) - losses.parallel(tokens))
        close(change[:, : losses.prompt], 0.0, 1e-5)
        assert (np.max(change) < 1e-5) == (pages == 8)


@pytest.mark.parametrize(
    ("variant", "cache", "words"),
    [
        ("gqa", {"read": "quests"}, "config.eval.cache.read: 'quests' is not known; did you mean 'quest'?"),
        ("gqa", {"read": "quest:pages=0"}, "config.eval.cache.read: quest: pages=0 is below 1"),
        ("gqa", {"read": "quest", "merge": "minicache"}, "pages are of caches that keep every entry; set these two to none"),
        ("gqa", {"read": "quest:start=4"}, "gqa has no layer from 4 up that keeps every token"),
        ("sliding_window", {"read": "quest"}, "sliding_window has no layer from 2 up that keeps every token"),
        ("slim", {"read": "quest"}, "slim has no layer from 2 up"),
        ("linear", {"read": "quest"}, "linear has no layer from 2 up"),
    ],
)
def test_what_cannot_be_read_in_pages_is_refused_with_one_line(variant: str, cache: dict[str, Any], words: str) -> None:
    config = small(variant, **cache)
    with pytest.raises(UserError) as error:
        configs.validate(config)
        cache_plan(config, cache_bytes.abstract_model(config, 50), None)  # type: ignore[arg-type]
    assert words in str(error.value) and "\n" not in str(error.value)


def test_what_has_no_pages_is_as_it_was(float64: Any) -> None:
    mixer = Row("slim", {"head_dim": 12}).mixer()
    assert not mixer.pageable and mixer.plan(read=QUEST).read is None
    assert content_bytes(mixer.init_cache(1, 9, jnp.float64, mixer.plan(read=QUEST))) == 9 * 4 * 12 * 8
