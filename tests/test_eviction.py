"""Eviction: every policy against its published rule in plain numpy, budgets at every step, bytes that really fall."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import close
from jax.sharding import Mesh
from matrix import Row, rows_of

from mla import config as configs
from mla import model as models
from mla.attention.softmax.base import SoftmaxMixer
from mla.attention.softmax.evidence import Observed
from mla.cache import eviction
from mla.cache.evicted import EvictedCache, Eviction, formula_bytes, kept
from mla.cache.eviction.contract import Evidence, draw, text_numbers
from mla.cache.eviction.fastgen import FastGen
from mla.cache.eviction.snapkv import neighbours
from mla.cache.meter import content_bytes
from mla.cache.plan import CachePlan
from mla.cache.stores import LayerCache
from mla.errors import UserError
from mla.evaluation.evaluate import evaluate, sample_text
from mla.evaluation.perplexity import Losses
from mla.evaluation.sample import Sampling
from mla.sharding import AXES

B, K, G, PROMPT, TEXT, BUDGET = 2, 2, 2, 24, 34, 11
H, WIDTH = K * G, 4


class One(NamedTuple):
    """A stream that holds each token's number."""

    entry: jax.Array


class Given(Evidence):
    """Evidence made up: attention of each head from a table of query x token logits, softmax over what is there."""

    def __init__(self, table: Any, cache: EvictedCache, where: Any, tokens: Any = None):
        self.positions, self.query_positions = jnp.swapaxes(cache.slots, 1, 2), jnp.asarray(where)
        self.scores, self.memo, self.layer = jnp.swapaxes(cache.scores, 1, 2), cache.memo, 0
        self.tokens = jnp.zeros_like(self.query_positions) if tokens is None else jnp.asarray(tokens)
        self.decoding = self.query_positions.shape[1] == 1
        self.texts = None if cache.texts is None else text_numbers(cache.texts, self.tokens, self.query_positions)
        self.table = table
        per_head = np.repeat(np.asarray(self.positions), H // self.positions.shape[1], axis=1)
        self.at = per_head  # [B, H, C]

    def weights(self) -> np.ndarray:
        """[B, H, S, C]."""
        where = np.asarray(self.query_positions)
        logits = np.stack([[self.table["logits"][b, h][where[b]][:, self.at[b, h]] for h in range(H)] for b in range(B)])
        seen = (self.at[:, :, None] >= 0) & (self.at[:, :, None] <= where[:, None, :, None])
        raw = np.where(seen, np.exp(logits), 0.0)
        return raw / np.maximum(raw.sum(-1, keepdims=True), 1e-30)

    def columns(self, last: int | None = None) -> jax.Array:
        weights = self.weights()
        return jnp.asarray(weights[:, :, -min(last or weights.shape[2], weights.shape[2]) :].sum(2), jnp.float32)

    def _gathered(self, name: str) -> jax.Array:
        return jnp.asarray(
            np.stack([[self.table[name][b, h][self.at[b, h]] for h in range(H)] for b in range(B)]), jnp.float32
        )

    def keys(self) -> jax.Array:
        return self._gathered("keys")

    def values(self) -> jax.Array:
        return self._gathered("values")


def table(seed: int = 0) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    return {
        "logits": 2 * draw.standard_normal((B, H, TEXT, TEXT)),
        "keys": draw.standard_normal((B, H, TEXT, WIDTH)),
        "values": draw.standard_normal((B, H, TEXT, WIDTH)),
        "tokens": draw.integers(0, 12, (B, TEXT)),
    }


def drive(policy: Any, budget: int, when: str, given: dict[str, np.ndarray]) -> list[EvictedCache]:
    """The cache after the prompt and after each token."""
    spec = Eviction(policy, budget, when)
    ((slots, own),) = spec.slots(1, PROMPT, TEXT)
    cache = EvictedCache.empty(
        One(jax.ShapeDtypeStruct((1, 1, K, 1), jnp.float32)),
        B,
        slots,
        jnp.float32,
        dataclasses.replace(spec, budget=own),
        K,
        {},
    )
    found = []
    for start, stop in [(0, PROMPT), *((t, t + 1) for t in range(PROMPT, TEXT))]:
        where = np.broadcast_to(np.arange(start, stop, dtype=np.int32), (B, stop - start))
        numbers = jnp.broadcast_to(jnp.asarray(where, jnp.float32)[..., None, None], (*where.shape, K, 1))
        _, cache = cache.extend(One(numbers), jnp.asarray(where))
        cache = cache.keep(Given(given, cache, where, given["tokens"][:, start:stop]))
        found.append(cache)
    return found


# --------------------------------------------------------------------------------- the published rules, in plain numpy


def attention(given: Any, b: int, h: int, queries: Any, tokens: list[int]) -> np.ndarray:
    """[S, C] of one head: the causal softmax over what is there."""
    logits = given["logits"][b, h][np.ix_(queries, tokens)]
    raw = np.where(np.asarray(tokens)[None] <= np.asarray(queries)[:, None], np.exp(logits), 0)
    return raw / raw.sum(-1, keepdims=True)


def top(scores: dict[int, float], count: int) -> set[int]:
    return set(sorted(scores, key=lambda j: (-scores[j], j))[:count])


class Reference:
    """One owner of one sequence: `heads` share what is kept."""

    def __init__(self, given: Any, b: int, heads: list[int]):
        self.given, self.b, self.heads = given, b, heads
        self.sums: dict[Any, Any] = {}

    def mean(self, queries: list[int], tokens: list[int], weigh: Any = lambda h, j: 1.0) -> dict[int, float]:
        """Mean over heads of the sum over queries, each times a weight."""
        found = dict.fromkeys(tokens, 0.0)
        for h in self.heads:
            columns = attention(self.given, self.b, h, queries, tokens).sum(0)
            for j, column in zip(tokens, columns, strict=True):
                found[j] += column * weigh(h, j) / len(self.heads)
        return found

    def streaming(self, queries: list[int], tokens: list[int], budget: int) -> set[int]:
        return set(tokens) if len(tokens) <= budget else set(tokens[:4]) | set(tokens[4:][-(budget - 4) :])

    def heavy(self, added: dict[int, float], tokens: list[int], budget: int, sinks: int = 0) -> set[int]:
        self.sums = {j: self.sums.get(j, 0.0) + added[j] for j in tokens}
        first = {j for j in tokens if j < sinks}
        recent = set(tokens[len(tokens) - min(budget // 2, budget - sinks) :])
        rest = {j: s for j, s in self.sums.items() if j not in first | recent}
        return first | recent | top(rest, budget - len(first | recent))

    def heavy_hitter(self, queries: list[int], tokens: list[int], budget: int) -> set[int]:
        return self.heavy(self.mean(queries, tokens), tokens, budget)

    def value_aware(self, queries: list[int], tokens: list[int], budget: int) -> set[int]:
        norm = np.abs(self.given["values"][self.b]).sum(-1)
        return self.heavy(self.mean(queries, tokens, lambda h, j: norm[h, j]), tokens, budget, sinks=3)

    def tova(self, queries: list[int], tokens: list[int], budget: int) -> set[int]:
        return top(self.mean(queries[-1:], tokens), budget)

    def snapkv(self, queries: list[int], tokens: list[int], budget: int, average: bool = False) -> set[int]:
        if len(tokens) <= budget:
            return set(tokens)
        prefix, window = tokens[:-4], tokens[-4:]
        pooled = dict.fromkeys(prefix, 0.0)
        for h in self.heads:
            votes = np.pad(attention(self.given, self.b, h, queries[-4:], tokens)[:, :-4].sum(0), 1)
            for n, j in enumerate(prefix):
                near = votes[n : n + 3]
                pooled[j] += (near.sum() / 3 if average else near.max()) / len(self.heads)
        return set(window) | top(pooled, budget - 4)

    def snapkv_average(self, queries: list[int], tokens: list[int], budget: int) -> set[int]:
        return self.snapkv(queries, tokens, budget, average=True)

    def l2_norm(self, queries: list[int], tokens: list[int], budget: int) -> set[int]:
        norms = np.linalg.norm(self.given["keys"][self.b][self.heads], axis=-1).mean(0)
        return top({j: -norms[j] for j in tokens}, budget)

    def fastgen(self, queries: list[int], tokens: list[int], budget: int) -> set[int]:
        added = self.mean(queries, tokens)
        self.sums = {j: self.sums.get(j, 0.0) + added[j] for j in tokens}
        length, ids = queries[-1] + 1, self.given["tokens"][self.b]
        special = {j for j in tokens if ids[j] == 11 or j < 2}
        marks = {j for j in tokens if ids[j] in (3, 5)} - special
        others = {j: s for j, s in self.sums.items() if j not in special | marks}
        frequent = top(others, int(0.3 * length))
        local = set(tokens[len(tokens) - int(0.3 * length) :])
        rules = [special, special | marks, special | marks | frequent, special | marks | frequent | local, set(tokens)]
        if len(queries) > 1:
            mass = [sum(self.sums[j] for j in rule) / len(queries) for rule in rules[:4]] + [1.0]
            self.rule = next(n for n, m in enumerate(mass) if m >= 0.8 or n == 4)
        wanted = rules[self.rule]

        def tier(j: int) -> tuple[float, float]:
            if j in special:
                return 3, 0
            if j in marks:
                return 2, 0
            return (1, j) if self.rule >= 3 and j in local else (0, self.sums[j])

        return set(sorted(wanted, key=lambda j: (tier(j), -j), reverse=True)[:budget])


CASES = [
    ("streaming", "streaming", "both"),
    ("streaming", "streaming", "decode"),
    ("heavy_hitter", "heavy_hitter", "both"),
    ("heavy_hitter", "heavy_hitter", "decode"),
    ("value_aware:sinks=3", "value_aware", "both"),
    ("tova", "tova", "both"),
    ("snapkv:window=4,kernel=3", "snapkv", "prefill"),
    ("snapkv:window=4,kernel=3,pool=average", "snapkv_average", "prefill"),
    ("l2_norm", "l2_norm", "both"),
    ("fastgen:recovery=0.8,sinks=2", "fastgen", "both"),
]


@pytest.mark.parametrize(("spec", "rule", "when"), CASES)
def test_kept_sets_are_those_of_the_published_rule(spec: str, rule: str, when: str) -> None:
    policy, given = eviction.policy(spec), table()
    assert policy is not None
    if isinstance(policy, FastGen):
        policy = dataclasses.replace(policy, special=(11,), punctuation=(3, 5))
    caches = drive(policy, BUDGET, when, given)
    for b in range(B):
        owners = [list(range(k * G, k * G + G)) for k in range(K)] if policy.per_head else [list(range(H))]
        for k, heads in enumerate(owners):
            there: list[Any] = []
            reference = Reference(given, b, heads)
            for number, cache in enumerate(caches):
                queries = list(range(PROMPT)) if not number else [PROMPT + number - 1]
                there = there + queries
                acts = when == "both" or (when == "prefill") == (number == 0)
                chosen = getattr(reference, rule)(queries, there, BUDGET) if acts or when == "decode" else set(there)
                there = sorted(chosen) if acts else there
                found = [int(j) for j in np.asarray(cache.slots)[b, :, k] if j >= 0]
                assert found == there, (b, k, number)
                assert len(found) <= BUDGET or not acts
                stream = np.asarray(cache.streams.entry)[b, : len(found), :, 0]
                own = stream[:, k] if policy.per_head else stream[:, 0]
                assert own.tolist() == found, "the entries are not those of the positions"


def test_random_is_a_fair_sample_that_does_not_change_its_mind() -> None:
    policy = eviction.policy("random:recent=2,sinks=1")
    caches = drive(policy, BUDGET, "both", table())
    for before, after in itertools.pairwise(caches):
        for b in range(B):
            for k in range(K):
                old, new = (set(np.asarray(c.slots)[b, :, k].tolist()) for c in (before, after))
                newest = max(new)
                assert new - old == {newest} and {newest - 1, newest, 0} <= new
    sets = {tuple(np.asarray(caches[-1].slots)[b, :, k]) for b in range(B) for k in range(K)}
    assert len(sets) > 1
    seen = Fixed(np.zeros((1, 24)))
    draws = [kept(eviction.policy(f"random:seed={seed}").choose(seen, 12).priority, 12, 12) for seed in range(150)]
    counts = np.bincount(np.concatenate(draws).ravel(), minlength=24)
    assert counts.min() > 0.6 * counts.mean() and counts.max() < 1.4 * counts.mean()


# ------------------------------------------------------------------------------- a row's answer is its own, in any batch


def test_a_text_is_told_by_its_first_tokens_whatever_stands_around_it() -> None:
    tokens, where = np.asarray([[5, 6, 7, 8], [6, 5, 7, 8], [5, 6, 7, 8]], np.int32), np.arange(4, dtype=np.int32)[None]
    nothing = jnp.zeros(3, jnp.uint32)
    first, swapped, same = np.asarray(text_numbers(nothing, tokens, np.repeat(where, 3, 0))).tolist()
    assert first == same != swapped and first and swapped
    alone = text_numbers(nothing[:1], tokens[:1], where)
    padded = text_numbers(
        nothing[:1], np.pad(tokens[:1], ((0, 0), (3, 0))), np.pad(where, ((0, 0), (3, 0)), constant_values=-1)
    )
    assert alone.tolist() == padded.tolist() == [first]
    assert text_numbers(alone, tokens[1:2], where + 4).tolist() == [first], "later tokens do not change it"
    assert text_numbers(nothing[:1], tokens[:1], np.full((1, 4), -1)).tolist() == [0], "nor does padding alone begin it"
    many = text_numbers(
        jnp.zeros(5000, jnp.uint32), jnp.arange(5000)[:, None] // 50 * jnp.asarray([[1, 0]]), jnp.asarray([[0, 1]])
    )
    assert len(np.unique(many)) == 100
    numbers = np.asarray(draw(0, 0, jnp.unique(many), jnp.zeros((100, 50, 1), jnp.int32)))
    assert abs(numbers.mean() - 0.5) < 0.02 and len(np.unique(numbers)) > 4900


def one_device() -> Mesh:
    return Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1, 1), AXES)


@pytest.mark.parametrize("spec", ["random", "cam", "pyramid:window=2,beta=3"])
def test_a_sequence_has_one_loss_in_every_batch(tiny: Any, spec: str) -> None:
    """Eight windows at once, one at a time, and in another order."""
    layers, policy = 2 if "pyramid" in spec else 1, eviction.policy(spec)
    model = models.create(tiny("gqa", model={"num_layers": layers}), 50)
    assert policy is not None
    plan = CachePlan(eviction=Eviction(policy, 4, policy.when))
    tokens = np.random.default_rng(0).integers(0, 50, (8, 17), dtype=np.int32)
    together, alone = (Losses(model, one_device(), batch, 16, 64, plan) for batch in (8, 1))
    losses = together.cached(tokens)
    each = np.concatenate([alone.cached(tokens[row : row + 1]) for row in range(8)])
    close(losses, each, 1e-4, f"{spec}: batches of 8 and of 1")
    close(together.cached(tokens[::-1])[::-1], losses, 1e-4, f"{spec}: rows in another order")
    assert np.abs(together.cached(np.roll(tokens, 1, axis=1)) - losses).max() > 1e-2


def test_pyramid_budgets_are_those_of_each_rows_own_prompt(tiny: Any) -> None:
    """Prompts of 14 and 5 tokens padded to 14: what stays, and the logits of two more tokens, of the shorter as alone."""
    model, policy = models.create(tiny("gqa", model={"num_layers": 2}), 50), eviction.policy("pyramid:window=2")
    assert policy is not None
    plan = CachePlan(eviction=Eviction(policy, 5, "prefill"))
    assert [policy.layer_budgets(5, 2, n, n) for n in (14, 5)] == [[8, 2], [5, 5]]
    tokens = np.random.default_rng(0).integers(0, 50, (2, 16), dtype=np.int32)
    graph, state = nnx.split(model)
    step = jax.jit(lambda tokens, where, cache: nnx.merge(graph, state).extend(tokens, where, cache))

    def run(rows: slice, lengths: list[int], prompt: Any) -> tuple[np.ndarray, list[list[set[int]]], int]:
        """Logits of the last two tokens, what each row keeps of its prompt, slots of all layers."""
        longest, count = max(lengths), len(lengths)
        where = np.maximum(np.arange(16 - longest, 18)[None] - 16 + np.asarray(lengths)[:, None], -1).astype(np.int32)
        text = np.pad(tokens[rows], ((0, 0), (0, 2)), constant_values=3)[:, 16 - longest :]
        cache, found = model.init_cache(count, longest + 2, prompt=prompt, plan=plan), []
        for start, stop in ((0, longest), (longest, longest + 1), (longest + 1, longest + 2)):
            logits, cache = step(text[:, start:stop], where[:, start:stop], cache)
            found.append(np.asarray(logits)[:, -1])
            if not start:
                slots = [np.asarray(layer["entries"].slots)[..., 0] for layer in cache.layers]
                stays = [[set(layer[row].tolist()) - {-1} for layer in slots] for row in range(count)]
        return np.stack(found, 1), stays, sum(layer.shape[1] for layer in slots)

    logits, stays, slots = run(slice(0, 2), [14, 5], 14)
    assert [len(layer) for layer in stays[0]] == [8, 2] and [len(layer) for layer in stays[1]] == [5, 5]
    assert slots == 8 + 5 + 2 * 2
    own, kept_alone, fewer = run(slice(1, 2), [5], [5])
    assert kept_alone[0] == stays[1] and fewer == 10 + 2 * 2
    close(own[0], logits[1], 1e-4, "a row padded and alone")


@pytest.mark.parametrize("spec", ["streaming", "heavy_hitter", "tova", "random", "fastgen:recovery=0.8,sinks=2"])
def test_a_row_that_gets_nothing_but_padding_stays_as_it_is(spec: str) -> None:
    policy, given = eviction.policy(spec), table()
    cache = drive(policy, BUDGET, "both", given)[0]
    where = np.asarray([[PROMPT], [-1]], np.int32)
    new = jnp.full((B, 1, K, 1), float(PROMPT))
    _, joined = cache.extend(One(new), jnp.asarray(where))
    after = joined.keep(Given(given, joined, where))
    for part in ("slots", "memo"):
        np.testing.assert_array_equal(getattr(after, part)[1], getattr(cache, part)[1])
    np.testing.assert_array_equal(
        after.streams.entry[1] * (after.slots[1] >= 0)[..., None], cache.streams.entry[1] * (cache.slots[1] >= 0)[..., None]
    )
    assert (np.asarray(after.slots)[0] != np.asarray(cache.slots)[0]).any()


def test_snapkv_pools_over_tokens_that_follow_one_another() -> None:
    """Empty slots between what was stored and what is new are no neighbours."""
    votes, policy = [0.1, 0.0, 0.3, 0.0, 0.2, 0.4], eviction.policy("snapkv:window=1,kernel=3")
    plain, gap = Fixed([votes]), Fixed([[*votes[:3], 0.0, 0.0, *votes[3:]]])
    gap.positions = jnp.asarray([[[0, 1, 2, -1, -1, 3, 4, 5]]])
    expected = policy.choose(plain, 4).priority[0, 0].tolist()
    assert [
        p for p, j in zip(policy.choose(gap, 4).priority[0, 0].tolist(), gap.positions[0, 0], strict=True) if j >= 0
    ] == expected
    close(expected[:5], [0.1, 0.3, 0.3, 0.3, 0.2], 1e-6, "votes pooled")


# ------------------------------------------------------------------------------------------ numbers at the end of fp32


@pytest.mark.parametrize("size", [1e25, float(np.finfo(np.float32).max)])
@pytest.mark.parametrize("spec", ["l2_norm", "value_aware:sinks=2", "heavy_hitter"])
def test_scores_stay_finite_and_nothing_leaves_while_there_is_room(spec: str, size: float) -> None:
    given = table()
    for name in ("keys", "values"):
        given[name][:, :, ::3] = size
    for cache in drive(eviction.policy(spec), TEXT, "both", given):
        assert np.isfinite(cache.scores).all()
    assert (np.asarray(cache.slots) == np.arange(TEXT)[None, :, None]).all()
    small = np.asarray(drive(eviction.policy(spec), BUDGET, "both", given)[-1].slots)
    assert (small >= 0).all()
    assert spec != "l2_norm" or (small % 3 != 0).all(), "the largest keys leave first"


def remembered(mixer: Any, x: jax.Array, positions: jax.Array, slots: int, evicts: Any) -> tuple[Any, EvictedCache]:
    """A memory of one text in an evicted cache of so many slots, before anything leaves, and that cache."""
    memory, layer = mixer.remember(x, positions, mixer.init_cache(1, slots, jnp.float32, mixer.plan(eviction=evicts)))
    return memory, layer["entries"]


def test_expected_attention_is_a_number_where_its_quadratic_form_is_none() -> None:
    mixer: Any = Row("mha", {"rope_fraction": 0.0}).mixer()
    x, positions = jax.random.normal(jax.random.key(1), (1, 12, 32)), jnp.arange(12, dtype=jnp.int32)[None]
    policy = eviction.policy("expected_attention:future=2")
    memory, cache = remembered(mixer, x, positions, 0, Eviction(policy, 8, "prefill"))
    loud = memory.entries._replace(key=memory.entries.key * 1e22, value=memory.entries.value * 1e22)
    seen = Observed(mixer, x, positions, dataclasses.replace(memory, entries=loud), cache, positions, 0)
    assert np.isfinite(policy.choose(seen, 8).priority[..., 4:]).all()  # type: ignore[union-attr]


# ------------------------------------------------------------------------------------------------ worked examples


def chosen(priority: Any, budget: int) -> list[int]:
    index = kept(jnp.asarray(priority, jnp.float32)[None, None], budget, budget)
    return np.asarray(index)[0, 0].tolist()


def test_ties_go_to_the_older_and_order_is_kept() -> None:
    assert chosen([1, 5, 5, 5, 0], 2) == [1, 2]
    assert chosen([3, 1, 2, 9], 3) == [0, 2, 3]
    assert chosen([-np.inf, 1, -np.inf], 2) == [1, 3], "nothing takes the place of what must leave"
    assert np.asarray(kept(jnp.zeros((1, 1, 2)), 4, 6))[0, 0].tolist() == [0, 1, 2, 2, 2, 2]


class Fixed(Given):
    """One head with this attention [S, C]."""

    def __init__(self, attention: Any, values: Any = None, scores: Any = None):
        rows, count = np.shape(attention)
        self.positions, self.query_positions = jnp.arange(count)[None, None], jnp.arange(count - rows, count)[None]
        self.attention, self.tokens, self.memo = np.asarray(attention), jnp.zeros((1, rows), jnp.int32), jnp.zeros((1, 1, 1))
        self.scores = jnp.zeros((1, 1, count, 2)) if scores is None else scores
        self.own_values, self.layer, self.decoding = values, 0, False
        self.texts = jnp.ones(1, jnp.uint32)

    def columns(self, last: int | None = None) -> jax.Array:
        return jnp.asarray(self.attention[-(last or len(self.attention)) :].sum(0), jnp.float32)[None, None]

    def values(self) -> jax.Array:
        return jnp.asarray(self.own_values, jnp.float32)[None, None]


def test_heavy_hitters_of_a_worked_example() -> None:
    rows = np.zeros((5, 5))
    for i, row in enumerate([[1.0], [0.6, 0.4], [0.5, 0.1, 0.4], [0.4, 0.1, 0.2, 0.3], [0.3, 0.1, 0.1, 0.2, 0.3]]):
        rows[i, : i + 1] = row
    choice = eviction.policy("heavy_hitter:recent=0.67").choose(Fixed(rows), 3)
    close(choice.scores[0, 0, :, 0], [2.8, 0.7, 0.7, 0.5, 0.3], 1e-6)
    assert chosen(choice.priority[0, 0], 3) == [0, 3, 4]


def test_tova_may_drop_the_current_token() -> None:
    last = np.mean([[0.5, 0.1, 0.2, 0.2], [0.1, 0.4, 0.3, 0.2]], axis=0)
    assert chosen(eviction.policy("tova").choose(Fixed(last[None]), 3).priority[0, 0], 3) == [0, 1, 2]


def test_pooling_counts_zeros_beyond_the_edge() -> None:
    votes = jnp.asarray([[[0.1, 0, 0.6, 0, 0, 0.2]]])
    close(neighbours(votes, 3, "average")[0, 0], [0.1 / 3, 0.7 / 3, 0.2, 0.2, 0.2 / 3, 0.2 / 3], 1e-6)
    close(neighbours(votes, 3, "max")[0, 0], [0.1, 0.6, 0.6, 0.6, 0.2, 0.2], 1e-6)


def test_value_norms_decide_where_attention_is_equal() -> None:
    policy = eviction.policy("value_aware:sinks=0,recent=0")
    for scale in (1, 7):
        seen = Fixed(
            np.full((1, 3), 1 / 3), values=scale * np.asarray([[3.0], [1.0], [-2.0]]), scores=jnp.zeros((1, 1, 3, 1))
        )
        assert chosen(policy.choose(seen, 2).priority[0, 0], 2) == [0, 2]


@pytest.mark.parametrize(("recovery", "rule"), [(0.5, 0), (0.7, 1), (0.9, 2), (0.95, 3), (0.98, 4)])
def test_fastgen_takes_the_cheapest_rule_that_recovers(recovery: float, rule: int) -> None:
    """Special .60, punctuation .15, frequent .15, local .07, the rest .03; ten tokens, frequent and local 0.2 of them."""
    attention = [0.6, 0.15, 0.005, 0.005, 0.08, 0.07, 0.01, 0.01, 0.03, 0.04]
    policy = FastGen(recovery, 0.2, 0.2, sinks=0, special=(7,), punctuation=(8,))
    seen = Fixed(np.repeat([attention], 10, axis=0))
    seen.tokens = jnp.asarray([[7, 8] + [0] * 8])
    assert float(policy.choose(seen, 10).memo[0, 0, 0]) == rule


def test_fastgen_profiles_a_prompt_of_one_token_alone_as_in_a_batch() -> None:
    policy = FastGen(sinks=0)
    for alone in (False, True):
        seen = Fixed([[1.0]])
        seen.decoding = alone
        assert float(policy.choose(seen, 4).memo[0, 0, 0]) == 4
    later = Fixed([[0.5, 0.5]])
    later.decoding, later.memo = True, jnp.full((1, 1, 1), 3.0)
    assert float(policy.choose(later, 4).memo[0, 0, 0]) == 3, "and keeps its rule"


def test_pyramid_budgets_of_a_worked_example() -> None:
    """L 12, C 288, w 32, T 1024: rounded by largest remainder, the sum is 12 x 256."""
    policy = eviction.policy("pyramid:window=32")
    shares = [budget - 32 for budget in policy.layer_budgets(288, 12, 1024, 2048)]
    assert shares == [499, 455, 411, 367, 322, 278, 234, 190, 145, 101, 57, 13] and sum(shares) == 12 * 256
    clipped = [budget - 32 for budget in policy.layer_budgets(288, 12, 520, 2048)]
    assert max(clipped) == 520 - 32 and sum(clipped) == 12 * 256
    assert policy.layer_budgets(288, 12, 511, 2048) == [288] * 12
    assert eviction.policy("l2_norm:skip_layers=2").layer_budgets(10, 4, 24, 34) == [34, 34, 10, 10]


# ------------------------------------------------------------------------------------------------ real mechanisms

SOFTMAX = [row for row in rows_of(SoftmaxMixer) if row.mixer().evictable]


def text(length: int, width: int = 32) -> tuple[jax.Array, jax.Array]:
    x = jax.random.normal(jax.random.key(5), (2, length, width))
    # The second row is shorter: it is padded on the left, as prompts are.
    positions = jnp.stack([jnp.arange(length), jnp.maximum(jnp.arange(length) - 3, -1)]).astype(jnp.int32)
    return x, positions


@pytest.mark.parametrize("row", SOFTMAX, ids=lambda row: row.id)
def test_observed_attention_is_that_of_the_layer(row: Row) -> None:
    """What a policy is shown, put together again in float64, is the layer's own output."""
    mixer: Any = row.mixer()
    x, positions = text(9)
    memory, _ = mixer.remember(x, positions)
    shape = EvictedCache.empty(mixer.streams(), 2, 0, jnp.float32, Eviction(eviction.policy("tova"), 4, "both"), 1, {})
    _, cache = shape.extend(memory.entries, positions)
    seen = Observed(mixer, x, positions, memory, cache, positions, 0)
    keys, values, asked = (np.asarray(a, np.float64) for a in (seen.keys(), seen.values(), seen.scaled_queries(positions)))
    logits = np.einsum("bhsd,bhcd->bhsc", asked, keys)
    if row.config().soft_cap:
        logits = row.config().soft_cap * np.tanh(logits / row.config().soft_cap)
    visible = (positions[:, None, :] >= 0) & (positions[:, None, :] <= positions[:, :, None])
    weights = np.where(visible[:, None], np.exp(logits), 0)
    sink = np.exp(np.asarray(mixer.sink[...], np.float64))[None, :, None] if row.config().sink else 0
    weights /= np.maximum(weights.sum(-1) + sink, 1e-30)[..., None]
    for last in (None, 1, 4):
        close(seen.columns(last), weights[:, :, -(last or 9) :].sum(2), 2e-5)
    heads = np.einsum("bhsc,bhcd->bshd", weights, values).reshape(2, 9, row.maps, -1).sum(2) / row.maps**0.5
    gate = 1 / (1 + np.exp(-np.asarray(mixer.gate(x), np.float64))) if mixer.gate else 1.0
    expected = heads * gate @ np.asarray(mixer.out.kernel[...], np.float64)
    scale = np.std(expected)
    real = np.asarray(positions)[..., None] >= 0
    close(np.asarray(mixer.read(x, positions, memory)) * real / scale, expected * real / scale, 1e-5)


def way(row: Row) -> tuple[Any, ...]:
    """How a row places keys: whose function does it, with YaRN or not, absorbed or not."""
    return row.of[1].shift, "yarn" in row.settings, row.settings.get("attend") == "absorbed"


INDEXED = list({way(row): row for row in reversed(SOFTMAX) if row.shift and not row.order_only}.values())  # one of each way


def evicting(mixer: Any, spec: str, budget: int, slots: int, codec: str = "none", when: str = "both") -> EvictedCache:
    policy = eviction.policy(spec)
    assert policy is not None
    cache = mixer.init_cache(2, slots, jnp.float32, mixer.plan(codec, Eviction(policy, budget, when)))["entries"]
    assert isinstance(cache, EvictedCache)
    return cache


def advance(mixer: Any, x: jax.Array, positions: jax.Array, cache: EvictedCache) -> tuple[jax.Array, EvictedCache]:
    """What `Model.extend` does with one layer."""
    memory, layer = mixer.remember(x, positions, LayerCache.of(entries=cache))
    y, cache = mixer.read(x, positions, memory), layer["entries"]
    return y, cache.keep(Observed(mixer, x, positions, memory, cache, jnp.zeros_like(positions), 0))


@pytest.mark.parametrize("row", INDEXED, ids=lambda row: row.id)
def test_streaming_positions_count_what_is_in_the_cache(row: Row) -> None:
    """Tokens 0 1 2 3 6 7 8 and a query at 9 stand at 0 .. 7 (2309.17453, section 3.2): the same as a text of just those."""
    mixer: Any = row.mixer()
    x = jax.random.normal(jax.random.key(7), (2, 10, 32))
    positions = jnp.broadcast_to(jnp.arange(10, dtype=jnp.int32), (2, 10))
    step = jax.jit(functools.partial(advance, mixer))
    _, cache = step(x[:, :9], positions[:, :9], evicting(mixer, "streaming", 7, 7))
    assert cache.slots[0, :, 0].tolist() == [0, 1, 2, 3, 6, 7, 8]
    y, after = step(x[:, 9:], positions[:, 9:], cache)
    assert after.slots[0, :, 0].tolist() == [0, 1, 2, 3, 7, 8, 9]
    those = jnp.asarray([0, 1, 2, 3, 6, 7, 8, 9])
    literal = mixer(x[:, those])[:, -1:]
    close(y / jnp.std(literal), literal / jnp.std(literal), 1e-5)


def test_streaming_at_original_positions_is_another_thing() -> None:
    mixer: Any = Row("mha").mixer()
    x, positions = (
        jax.random.normal(jax.random.key(7), (2, 10, 32)),
        jnp.broadcast_to(jnp.arange(10), (2, 10)).astype(jnp.int32),
    )
    outputs = []
    for spec in ("streaming", "streaming:reindex=false"):
        _, cache = advance(mixer, x[:, :9], positions[:, :9], evicting(mixer, spec, 7, 7))
        outputs.append(advance(mixer, x[:, 9:], positions[:, 9:], cache)[0])
    assert float(jnp.abs(outputs[0] - outputs[1]).max()) > 1e-2


POLICIES = [
    "streaming",
    "heavy_hitter",
    "value_aware:sinks=2",
    "tova",
    "l2_norm",
    "random:sinks=1,recent=2",
    "fastgen:recovery=1",
    "snapkv:window=4",
    "pyramid:window=4",
    "expected_attention:future=8",
]
GQA, MLA = Row("gqa", {"num_kv_heads": 2}), Row("mla", {"kv_lora_rank": 20, "qk_rope_head_dim": 4})
PAIRS = [(GQA, spec) for spec in POLICIES] + [(MLA, spec) for spec in ("streaming", "value_aware:sinks=2", "l2_norm")]


@pytest.mark.parametrize(("row", "spec"), PAIRS, ids=lambda value: getattr(value, "id", None))
def test_a_budget_for_the_whole_text_changes_nothing(row: Row, spec: str) -> None:
    """And a smaller one leaves arrays of its size, at every step, whose bytes are the formula; unequal prompts alike."""
    mixer: Any = row.mixer()
    step = jax.jit(functools.partial(advance, mixer))
    x, positions = text(18)
    whole = mixer(x, positions)
    policy = eviction.policy(spec)
    assert policy is not None
    for budget, slots in ((18, 18), (8, 8 if policy.elsewhere else 8 + 3)):
        cache = evicting(mixer, spec, budget, slots, when="both" if policy.elsewhere else "prefill")
        found = []
        for start, stop in ((0, 15), (15, 16), (16, 17), (17, 18)):
            y, cache = step(x[:, start:stop], positions[:, start:stop], cache)
            found.append(y)
            assert cache.slots.shape[1] == slots
            entry = sum(int(np.prod(a.shape[2:])) * 4 for a in jax.tree.leaves(mixer.streams()))
            assert content_bytes(cache) == 2 * formula_bytes(cache.eviction, mixer.owners(), slots, entry)
            there = np.sum(np.asarray(cache.slots) >= 0, axis=1)
            grown = 0 if policy.elsewhere else stop - 15
            assert (there <= min(budget, 18) + grown).all() and (there[0] == min(stop, budget + grown)).all()
            order = np.asarray(cache.slots)[0, : there[0, 0]]
            assert (np.diff(order, axis=0) > 0).all(), "entries are not in the order of the text"
        if budget == 18:
            real, scale = positions[..., None] >= 0, float(jnp.std(whole))
            close(jnp.concatenate(found, 1) * real / scale, whole * real / scale, 1e-5)


def test_heads_look_at_what_their_owner_kept() -> None:
    """GQA after H2O has cut a prompt: each head's softmax over its own key head's tokens and the new one, in float64."""
    mixer: Any = GQA.mixer(seed=2)
    x, positions = text(15)
    y, cache = jax.jit(functools.partial(advance, mixer))(
        x[:, :14], positions[:, :14], evicting(mixer, "heavy_hitter", 6, 6)
    )
    stays = np.asarray(cache.slots)
    assert (stays[0, :, 0] != stays[0, :, 1]).any(), "both key heads keep the same: nothing is tested"
    y, _ = advance(mixer, x[:, 14:], positions[:, 14:], cache)
    whole, _ = mixer.remember(x, positions)
    query = np.asarray(mixer.queries(x[:, 14:], positions[:, 14:]), np.float64)[:, 0]
    key, value = (np.asarray(a, np.float64) for a in whole.entries)
    heads = np.zeros_like(query)
    for b, h in np.ndindex(*query.shape[:2]):
        own = [np.flatnonzero(np.asarray(positions)[b] == p)[0] for p in (*stays[b, :, h // 2], positions[b, 14])]
        weights = np.exp(key[b, own, h // 2] @ query[b, h] * mixer.scale)
        heads[b, h] = weights / weights.sum() @ value[b, own, h // 2]
    expected = heads.reshape(2, 1, -1) @ np.asarray(mixer.out.kernel[...], np.float64)
    close(y / expected.std(), expected / expected.std(), 1e-5)


@pytest.mark.parametrize(
    ("variant", "dtype"), [("gqa/2", "float32"), ("sliding_window,gqa", "float32"), ("mla", "bfloat16")]
)
def test_whole_models_forget(variant: str, dtype: str, tiny: Any) -> None:
    """Layers that read another's, windows beside what grows, bf16: a budget for all changes nothing, a small one is kept."""
    config = tiny(variant, model={"num_layers": 2, "dtype": dtype})
    model, policy = models.create(config, 50), eviction.policy("heavy_hitter")
    assert policy is not None
    tokens = jax.random.randint(jax.random.key(0), (2, 14), 0, 50)
    positions = jnp.broadcast_to(jnp.arange(14, dtype=jnp.int32), (2, 14))
    graph, state = nnx.split(model)
    whole = np.asarray(model(tokens))
    for budget in (14, 4):
        step = jax.jit(lambda s, t, p, c: nnx.merge(graph, s).extend(t, p, c))
        cache, found = model.init_cache(2, 14, plan=CachePlan(eviction=Eviction(policy, budget, "both"))), []
        for start, stop in ((0, 12), (12, 13), (13, 14)):
            logits, cache = step(state, tokens[:, start:stop], positions[:, start:stop], cache)
            found.append(np.asarray(logits))
        layers = [c["entries"] for c in cache.layers if c and isinstance(c["entries"], EvictedCache)]
        assert len(layers) == len(model.evicting()) >= 1
        assert all(layer.slots.shape[1] == budget for layer in layers)
        difference = np.abs(np.concatenate(found, 1) - whole)
        bound = 1e-5 if dtype == "float32" else 0.1
        assert difference[:, :12].max() < bound and (difference.max() < bound) == (budget == 14)


@pytest.mark.parametrize("codec", ["int8", "int4:4"])
def test_coded_entries_leave_as_plain_ones_do(codec: str) -> None:
    mixer: Any = Row("gqa", {"num_kv_heads": 2}).mixer()
    x, positions = text(16)
    step = jax.jit(functools.partial(advance, mixer))
    caches = [evicting(mixer, "streaming", 6, 6, name) for name in ("none", codec)]
    for start, stop in ((0, 12), (12, 13), (13, 16)):
        results = [step(x[:, start:stop], positions[:, start:stop], cache) for cache in caches]
        caches = [cache for _, cache in results]
    np.testing.assert_array_equal(caches[0].slots, caches[1].slots)
    plain, coded = caches
    read = coded.streams.key.codec.decode(coded.streams.key.payload, jnp.float32)
    assert float(jnp.linalg.norm(read - plain.streams.key) / jnp.linalg.norm(plain.streams.key)) < 0.2
    assert content_bytes(coded) < content_bytes(plain) / 2


def test_observing_never_holds_all_pairs() -> None:
    """2,048 queries over 2,048 entries of 4 heads: 64 MB of weights; no array of the program is half as large."""
    mixer: Any = Row("mha").mixer()
    x, positions = jnp.zeros((1, 2048, 32)), jnp.arange(2048, dtype=jnp.int32)[None]
    policy = eviction.policy("heavy_hitter")
    assert policy is not None
    cache = mixer.init_cache(1, 64, jnp.float32, mixer.plan(eviction=Eviction(policy, 64, "both")))["entries"]
    program = jax.jit(functools.partial(advance, mixer)).lower(x, positions, cache).compile()
    assert program.memory_analysis().temp_size_in_bytes < 4 * 4 * 2048 * 2048 / 2


def test_expected_attention_of_gaussian_queries() -> None:
    """exp(z) is the mean of exp(s q . k) over queries drawn with the prompt's mean and covariance: 10^5 draws, 3 %."""
    mixer: Any = Row("mha", {"rope_fraction": 0.0}).mixer()
    x = jax.random.normal(jax.random.key(1), (1, 24, 32)) * 0.4
    positions = jnp.arange(24, dtype=jnp.int32)[None]
    memory, cache = remembered(mixer, x, positions, 0, Eviction(eviction.policy("expected_attention"), 8, "prefill"))
    seen = Observed(mixer, x, positions, memory, cache, positions, 0)
    queries = np.asarray(seen.scaled_queries(positions), np.float64)[0, :, 4:]
    keys, norms = np.asarray(seen.keys(), np.float64)[0], np.linalg.norm(np.asarray(seen.values()), axis=-1)[0]
    draw, expected = np.random.default_rng(0), np.full((4, 24), np.inf)
    for h in range(4):
        mean, spread = queries[h].mean(0), np.cov(queries[h].T, bias=True)
        drawn = draw.multivariate_normal(mean, spread, 100_000)
        weights = np.exp(drawn @ keys[h, 4:].T).mean(0)
        expected[h, 4:] = weights / weights.sum() * norms[h, 4:]
    found = eviction.policy("expected_attention:future=3").choose(seen, 8).priority
    close(found[0], expected, relative=0.03)


def test_expected_attention_turns_queries_to_positions_to_come() -> None:
    """The mean over positions of a rotated query, against the explicit mean rotation matrix."""
    mixer: Any = Row("mha").mixer()
    x, positions = jax.random.normal(jax.random.key(1), (1, 6, 32)), jnp.arange(6, dtype=jnp.int32)[None]
    memory, cache = remembered(mixer, x, positions, 4, Eviction(eviction.policy("expected_attention"), 4, "prefill"))
    seen = Observed(mixer, x, positions, memory, cache, positions, 0)
    plain = np.asarray(seen.scaled_queries(jnp.zeros_like(positions)), np.float64)
    angles = np.arange(6, 6 + 5)[:, None] * 10_000.0 ** (-np.arange(4) / 4)
    matrix = np.zeros((8, 8))
    for pair in range(4):
        c, s = np.cos(angles[:, pair]).mean(), np.sin(angles[:, pair]).mean()
        matrix[pair, pair] = matrix[pair + 4, pair + 4] = c
        matrix[pair, pair + 4], matrix[pair + 4, pair] = s, -s
    turned = np.mean([np.asarray(seen.scaled_queries(jnp.full_like(positions, 6 + n))) for n in range(5)], axis=0)
    close(turned, plain @ matrix, 1e-5)


# ---------------------------------------------------------------------------------------------------- the command, refusals


@pytest.mark.parametrize(
    ("cache", "words"),
    [
        ({"evict": "snapvk"}, "evict: 'snapvk' is not known; did you mean 'snapkv'?"),
        ({"evict": "snapkv:windw=3"}, "evict: 'snapkv:windw=3': no setting 'windw'; did you mean 'window'?"),
        ({"evict": "snapkv:window=x"}, "evict: 'snapkv:window=x': window='x' is no int; by default it is 32"),
        ({"evict": "snapkv:pool=sum"}, "evict: snapkv: pool='sum' is neither max nor average"),
        ({"evict": "snapkv:window=4,window=8"}, "evict: 'snapkv:window=4,window=8': window is given twice"),
        ({"evict": "snapkv:kernel=4"}, "evict: snapkv: kernel=4 is no odd number below 1000"),
        ({"evict": "fastgen:recovery=2"}, "evict: fastgen: recovery=2.0 is above 1, all of it"),
        ({"evict": "expected_attention:future=0"}, "future=0 is no number of positions from 1 to"),
        ({"evict": "tova:sinks=1"}, "evict: 'tova:sinks=1': tova has no settings"),
        ({"evict": "streaming"}, "budget_tokens: 0 leaves nothing to streaming; set how many entries stay"),
        ({"evict": "streaming", "budget_tokens": 4}, "budget_tokens: 4 is less than the 5 that streaming needs"),
        ({"evict": "snapkv", "budget_tokens": 32}, "budget_tokens: 32 is less than the 33 that snapkv needs"),
        ({"evict": "tova", "budget_tokens": 4, "budget_bytes": 9}, "budget_bytes: is given beside budget_tokens"),
        ({"evict": "tova", "budget_tokens": 4, "evict_when": "later"}, "evict_when: 'later'"),
        ({"evict": "snapkv", "budget_tokens": 64, "evict_when": "both"}, "chooses at the end of a prompt only, not 'both'"),
        ({"budget_tokens": 4}, "budget_tokens: 4 has no effect while eval.cache.evict is none"),
        ({"evict_when": "both"}, "evict_when: 'both' has no effect while eval.cache.evict is none"),
        ({"evict": "tova", "budget_tokens": -4}, "budget_tokens: -4 is not a number from 0 up"),
    ],
)
def test_bad_settings_are_refused_with_one_line(tiny: Any, cache: dict[str, Any], words: str) -> None:
    config = tiny("gqa", eval={"cache": cache})
    with pytest.raises(UserError) as error:
        configs.validate(config)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).startswith("config.eval.cache.")


def with_cache(config: Any, decode_tokens: int = 0, **cache: Any) -> Any:
    own = dataclasses.replace(config.eval, cache=configs.EvalCacheConfig(**cache), decode_tokens=decode_tokens)
    changed = dataclasses.replace(config, eval=own)
    configs.validate(changed)
    return changed


def test_a_trained_model_whose_entries_leave(trained: Any) -> None:
    config, workdir = trained("gqa", model={"num_heads": 4})
    plain = evaluate(workdir, with_cache(config))
    close(plain["decoded"]["loss"], plain["decoded"]["loss_full_cache"], 1e-5)
    entry = plain["cache"]["bytes_per_token"]
    assert plain["cache"]["bytes_after_window"] == 16 * entry

    whole = evaluate(workdir, with_cache(config, evict="tova", budget_tokens=16))
    close(whole["loss"], plain["loss"], 1e-6)
    cut = evaluate(workdir, with_cache(config, decode_tokens=2, evict="heavy_hitter", budget_tokens=4))
    assert cut["loss"] == cut["loss_cached"] != cut["loss_full_cache"] == pytest.approx(plain["loss"], abs=1e-6)
    assert cut["cache"]["bytes_per_token"] == 0
    # Four entries, each with its attention so far in fp32: one layer, one key head.
    assert cut["cache"]["constant_bytes"] == cut["cache"]["bytes_after_window"] == 4 * (entry + 4)
    assert cut["decode"]["tokens_per_second"] > 0 and "decode" not in plain

    snap = evaluate(workdir, with_cache(config, evict="snapkv:window=2", budget_tokens=4, codec="int8"))
    coded = 2 * (4 + 2)  # key and value of 4 channels and a scale; after four of the prompt, eight are appended
    assert snap["cache"]["constant_bytes"] == 4 * coded and snap["cache"]["bytes_after_window"] == (4 + 8) * coded
    how = Sampling(tokens=5, temperature=0.0)
    assert sample_text(workdir, with_cache(config, evict="tova", budget_tokens=99), "the cache", how) == sample_text(
        workdir, with_cache(config), "the cache", how
    )
    late = evaluate(workdir, with_cache(config, evict="streaming", evict_when="decode", budget_bytes=5 * entry))
    assert late["cache"]["bytes_per_token"] == entry and late["cache"]["bytes_after_window"] == 5 * entry
    assert len(list(workdir.glob("eval-*.json"))) == 5, "each evaluation has a file of its own"
    (named,) = workdir.glob("eval-*cache.evict=streaming-cache.evict_when=decode-cache.budget_bytes=*.json")
    assert json.loads(named.read_text())["loss"] == late["loss"]
    with pytest.raises(UserError, match="codes tokens together and tova has some of them leave"):
        evaluate(workdir, with_cache(config, evict="tova", budget_tokens=5, codec="kivi2:16"))
    with pytest.raises(UserError, match=f"budget_bytes: {3 * entry} are 3 entries a layer, fewer than the 5 that streaming"):
        evaluate(workdir, with_cache(config, evict="streaming", budget_bytes=3 * entry))


NOWHERE = {
    "dmc": "dmc merges or drops entries by a rule of its own",
    "linear": "linear keeps a state and no entries of tokens",
    "sliding_window": "keeps a window of tokens already",
}


@pytest.mark.parametrize(("variant", "words"), NOWHERE.items())
def test_where_nothing_can_leave(trained: Any, variant: str, words: str) -> None:
    config, workdir = trained(variant)
    with pytest.raises(UserError, match=f"config.eval.cache.evict: 'tova': .*{words}"):
        evaluate(workdir, with_cache(config, evict="tova", budget_tokens=5))
