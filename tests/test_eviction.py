"""Eviction: every policy against its published rule in plain numpy, budgets at every step, bytes that really fall."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matrix import ROWS, Row

from mla.attention.evidence import Observed
from mla.attention.softmax import SoftmaxMixer
from mla.cache import eviction
from mla.cache.evicted import EvictedCache, Eviction, kept
from mla.cache.eviction.contract import Evidence
from mla.cache.eviction.fastgen import FastGen
from mla.cache.eviction.snapkv import neighbours

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

    def columns(self, rows: Any) -> jax.Array:
        return jnp.asarray(np.einsum("bhsc,bs->bhc", self.weights(), np.asarray(rows)), jnp.float32)

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
        self.given, self.b, self.heads, self.sums = given, b, heads, {}

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
            reference, there = Reference(given, b, heads), []
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
    for before, after in zip(caches, caches[1:], strict=False):
        for b in range(B):
            for k in range(K):
                old, new = (set(np.asarray(c.slots)[b, :, k].tolist()) for c in (before, after))
                newest = max(new)
                assert new - old == {newest} and {newest - 1, newest, 0} <= new
    sets = {tuple(np.asarray(caches[-1].slots)[b, :, k]) for b in range(B) for k in range(K)}
    assert len(sets) > 1
    draws = [drive(eviction.policy(f"random:seed={seed}"), 12, "prefill", table())[0].slots for seed in range(40)]
    counts = np.bincount(np.concatenate([np.asarray(d)[:, :12].ravel() for d in draws]), minlength=PROMPT)
    assert counts.min() > 0.6 * counts.mean() and counts.max() < 1.4 * counts.mean()


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

    def columns(self, rows: Any) -> jax.Array:
        return jnp.asarray(np.asarray(rows)[0] @ self.attention, jnp.float32)[None, None]

    def values(self) -> jax.Array:
        return jnp.asarray(self.own_values, jnp.float32)[None, None]


def test_heavy_hitters_of_a_worked_example() -> None:
    rows = np.zeros((5, 5))
    for i, row in enumerate([[1], [0.6, 0.4], [0.5, 0.1, 0.4], [0.4, 0.1, 0.2, 0.3], [0.3, 0.1, 0.1, 0.2, 0.3]]):
        rows[i, : i + 1] = row
    choice = eviction.policy("heavy_hitter:recent=0.67").choose(Fixed(rows), 3)
    np.testing.assert_allclose(choice.scores[0, 0, :, 0], [2.8, 0.7, 0.7, 0.5, 0.3], atol=1e-6)
    assert chosen(choice.priority[0, 0], 3) == [0, 3, 4]


def test_tova_may_drop_the_current_token() -> None:
    last = np.mean([[0.5, 0.1, 0.2, 0.2], [0.1, 0.4, 0.3, 0.2]], axis=0)
    assert chosen(eviction.policy("tova").choose(Fixed(last[None]), 3).priority[0, 0], 3) == [0, 1, 2]


def test_pooling_counts_zeros_beyond_the_edge() -> None:
    votes = jnp.asarray([[[0.1, 0, 0.6, 0, 0, 0.2]]])
    np.testing.assert_allclose(
        neighbours(votes, 3, "average")[0, 0], [0.1 / 3, 0.7 / 3, 0.2, 0.2, 0.2 / 3, 0.2 / 3], atol=1e-6
    )
    np.testing.assert_allclose(neighbours(votes, 3, "max")[0, 0], [0.1, 0.6, 0.6, 0.6, 0.2, 0.2], atol=1e-6)


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


def test_pyramid_budgets_of_a_worked_example() -> None:
    """L 12, C 288, w 32, T 1024: rounded by largest remainder, the sum is 12 x 256."""
    policy = eviction.policy("pyramid:window=32")
    shares = [budget - 32 for budget in policy.layer_budgets(288, 12, 1024, 2048)]
    assert shares == [499, 455, 411, 367, 322, 278, 234, 190, 145, 101, 57, 13] and sum(shares) == 12 * 256
    clipped = [budget - 32 for budget in policy.layer_budgets(288, 12, 400, 2048)]
    assert max(clipped) == 400 - 32 and sum(clipped) == 12 * 256
    assert policy.layer_budgets(288, 12, 200, 2048) == [288] * 12
    assert eviction.policy("l2_norm:skip_layers=2").layer_budgets(10, 4, 24, 34) == [34, 34, 10, 10]


# ------------------------------------------------------------------------------------------------ real mechanisms

SOFTMAX = [row for row in ROWS if issubclass(type(row.mixer()), SoftmaxMixer) and row.mixer().grows]


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
    memory = dataclasses.replace(mixer.remember(x, positions))
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
    rows = np.asarray([[1, 2, 0, 1, 1, 0, 1, 3, 1.0]] * 2)
    np.testing.assert_allclose(seen.columns(jnp.asarray(rows)), np.einsum("bhsc,bs->bhc", weights, rows), atol=2e-5)
    if row.name == "low_rank_blocks":
        return  # branches of a head are added before the output projection
    heads = np.einsum("bhsc,bhcd->bshd", weights, values).reshape(2, 9, -1)
    gate = 1 / (1 + np.exp(-np.asarray(mixer.gate(x), np.float64))) if mixer.gate else 1.0
    expected = heads * gate @ np.asarray(mixer.out.kernel[...], np.float64)
    scale = np.std(expected)
    real = np.asarray(positions)[..., None] >= 0
    np.testing.assert_allclose(
        np.asarray(mixer.read(x, positions, memory)) * real / scale, expected * real / scale, atol=1e-5
    )
