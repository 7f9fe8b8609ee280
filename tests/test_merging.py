"""Merging, of values with those that stay (CaM) and of adjacent layers (MiniCache), against their rules in numpy."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close, relative_norm

from mla import config as configs
from mla import model as models
from mla.cache import eviction, merged
from mla.cache.codecs import codec
from mla.cache.evicted import EvictedCache, Eviction
from mla.cache.eviction.contract import Evidence, draw
from mla.cache.plan import CachePlan
from mla.cache.stores import ModelCache
from mla.errors import UserError
from mla.evaluation import cache_bytes
from mla.evaluation.decoding import Decoder
from mla.evaluation.plan import cache_plan
from mla.sharding import make_mesh

# ----------------------------------------------------------------------------------------------------------------- CaM

B, K, G, PROMPT, TEXT, BUDGET, WIDTH = 2, 2, 2, 6, 22, 12, 3
TEXTS = jnp.asarray([7, 2**32 - 1], jnp.uint32)  # what tells the two rows apart


class KeyValue(NamedTuple):
    """A stream that holds each token's number, and one that is merged."""

    key: jax.Array
    value: jax.Array


class Given(Evidence):
    """One step's evidence: attention is the softmax of given logits [B, H, queries, tokens] over what is there."""

    layer = 0

    def __init__(self, logits: np.ndarray, cache: EvictedCache, where: Any):
        self.positions, self.query_positions = jnp.swapaxes(cache.slots, 1, 2), jnp.asarray(where)
        self.scores, self.memo, self.logits = jnp.swapaxes(cache.scores, 1, 2), cache.memo, logits
        self.decoding, self.texts = self.query_positions.shape[1] == 1, TEXTS

    def columns(self, last: int | None = None) -> jax.Array:
        at = np.asarray(self.to_heads(self.positions, self.logits.shape[1]))  # [B, H, C]
        query = int(self.query_positions[0, -1])
        raw = np.where(at >= 0, np.exp(np.take_along_axis(self.logits[:, :, query], np.maximum(at, 0), axis=2)), 0.0)
        return jnp.asarray(raw / raw.sum(-1, keepdims=True), jnp.float32)


def given(owners: int = K) -> tuple[np.ndarray, np.ndarray]:
    """Logits and values [B, tokens, heads, width]."""
    random = np.random.default_rng(3)
    return 2 * random.standard_normal((B, K * G, TEXT, TEXT)), random.standard_normal((B, TEXT, owners, WIDTH))


def drive(
    spec: str, logits: np.ndarray, values: np.ndarray, budget: int = BUDGET, prompt: int = PROMPT
) -> list[EvictedCache]:
    """The cache after the prompt and after each token."""
    policy, heads = eviction.policy(spec), values.shape[2]
    assert policy is not None
    like = KeyValue(*(jax.ShapeDtypeStruct((1, 1, heads, width), jnp.float32) for width in (1, WIDTH)))
    cache = EvictedCache.empty(like, B, budget, jnp.float32, Eviction(policy, budget, "both"), heads, {})
    found = []
    for start, stop in [(0, prompt), *((t, t + 1) for t in range(prompt, TEXT))]:
        where = np.broadcast_to(np.arange(start, stop, dtype=np.int32), (B, stop - start))
        numbers = jnp.broadcast_to(jnp.asarray(where, jnp.float32)[..., None, None], (*where.shape, heads, 1))
        _, cache = cache.extend(KeyValue(numbers, jnp.asarray(values[:, start:stop], jnp.float32)), jnp.asarray(where))
        cache = cache.keep(Given(logits, cache, where))
        found.append(cache)
    return found


def owner_by_rule(
    logits: np.ndarray, values: np.ndarray, b: int, k: int, start: int, near: int, m: Any
) -> list[dict[int, Any]]:
    """One owner, in plain numpy: position -> value after the prompt and each token; m(p, position) is the share given."""
    owners = values.shape[2]
    heads = range(k * K * G // owners, (k + 1) * K * G // owners)
    kept = {j: values[b, j, k] for j in range(PROMPT)}
    found = [dict(kept)]
    for t in range(PROMPT, TEXT):
        kept[t] = values[b, t, k]
        if len(kept) > BUDGET:
            there = list(kept)
            rows = np.exp(logits[b, list(heads), t][:, there])
            attention = dict(zip(there, (rows / rows.sum(-1, keepdims=True)).mean(0), strict=True))
            e = next(j for j in there if j >= start)
            recent = [j for j in there if j > e]
            p = min(attention[e] / np.mean([attention[j] for j in recent]), 1)
            gone = kept.pop(e)
            for j in recent[:near]:
                kept[j] = kept[j] + m(p, e) * gone / min(near, len(recent))
        found.append(dict(kept))
    return found


@pytest.mark.parametrize(
    ("spec", "owners", "start", "near"),
    [
        ("cam", 2, 6, 32),
        ("cam:neighbours=3,seed=5", 2, 6, 3),
        ("cam:neighbours=3,sample=false", 1, 6, 3),
        ("cam:start=0.25,sample=false", 2, 3, 32),
    ],
)
def test_values_are_merged_as_published(spec: str, owners: int, start: int, near: int) -> None:
    (logits, values), policy = given(owners), eviction.policy(spec)
    caches = drive(spec, logits, values)
    merged_ones = 0
    for b in range(B):
        for k in range(owners):

            def m(p: float, position: int, b: int = b, k: int = k) -> float:
                number = draw(policy.seed, 0, TEXTS, jnp.full((B, owners, 1), position))[b, k, 0]  # type: ignore[union-attr]
                return float(number < p) if policy.sample else p  # type: ignore[union-attr]

            steps = owner_by_rule(logits, values, b, k, start, near, m)
            for cache, expected in zip(caches, steps, strict=True):
                there = np.asarray(cache.slots)[b, :, k] >= 0
                assert np.asarray(cache.slots)[b, there, k].tolist() == list(expected)
                assert np.asarray(cache.streams.key)[b, there, k, 0].tolist() == list(expected), (
                    "keys are dropped, not merged"
                )
                stored = np.asarray(cache.streams.value)[b, there, k]
                close(stored, list(expected.values()), 1e-5)
            merged_ones += not np.allclose(stored, [values[b, j, k] for j in expected])
    assert merged_ones


def sums(caches: list[EvictedCache]) -> np.ndarray:
    """[steps, B, K, width]"""
    return np.stack([np.where(np.asarray(c.slots)[..., None] >= 0, c.streams.value, 0).sum(1) for c in caches])


def test_an_entry_with_more_attention_than_the_mean_is_always_merged_and_nothing_is_lost() -> None:
    logits, values = given()
    flat = np.zeros_like(logits)
    flat -= 1e-6 * np.arange(TEXT)  # the older, the more attention: p = 1
    assert np.all(draw(0, 0, TEXTS, jnp.broadcast_to(jnp.arange(TEXT), (B, K, TEXT))) < 1)
    found = sums(drive("cam", flat, values))
    close(found, np.cumsum(values, axis=1)[:, PROMPT - 1 :].swapaxes(0, 1), 1e-4)


def test_without_attention_it_is_plain_eviction() -> None:
    logits, values = given()
    ignored = logits - 1e4 * (np.arange(TEXT) < TEXT - BUDGET + 6) * (np.arange(TEXT) >= 6)
    cache = drive("cam", ignored, values)[-1]
    where = np.asarray(cache.slots)[0, :, 0]
    assert where.tolist() == [*range(6), *range(TEXT - 6, TEXT)]
    np.testing.assert_array_equal(cache.streams.value, values[:, where].astype(np.float32))
    nobody = drive("cam", np.full_like(logits, -1e4) * (np.arange(TEXT) >= 6), values)[-1]  # 0 / 0 is 0
    np.testing.assert_array_equal(nobody.streams.value, values[:, where].astype(np.float32))


def test_a_prompt_is_cut_without_merging() -> None:
    logits, values = given()
    cache = drive("cam", logits, values, prompt=20)[0]
    np.testing.assert_array_equal(cache.streams.value, values[:, [*range(6), *range(14, 20)]].astype(np.float32))


def test_merging_happens_as_often_as_its_chance() -> None:
    numbers = np.asarray(draw(1, 2, TEXTS, jnp.broadcast_to(jnp.arange(1000), (2, 3, 1000))))
    assert abs((numbers < 0.3).mean() - 0.3) < 0.02
    assert len(np.unique(numbers)) > 5900, "texts, owners and positions differ"
    assert not np.array_equal(numbers, draw(2, 2, TEXTS, jnp.broadcast_to(jnp.arange(1000), (2, 3, 1000))))


# ----------------------------------------------------------------------------------------------------------- MiniCache


def vectors(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def by_rule(lower: np.ndarray, upper: np.ndarray, t: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """float64: both restored [.., D] and the distance [..]."""
    low, high = (np.linalg.norm(x, axis=-1, keepdims=True) for x in (lower, upper))
    u, v = lower / low, upper / high
    angle = np.arccos(np.clip((u * v).sum(-1, keepdims=True), -1, 1))
    e = (np.sin((1 - t) * angle) * u + np.sin(t * angle) * v) / np.sin(angle)
    return low * e, high * e, angle[..., 0] / np.pi


def test_directions_of_worked_examples() -> None:
    e, angle = merged.slerp(jnp.asarray([1.0, 0.0]), jnp.asarray([0.0, 1.0]), 0.6)
    close(e, [math.sin(0.2 * math.pi), math.sin(0.3 * math.pi)], 1e-6)  # 0.5878, 0.8090
    assert float(angle) == pytest.approx(math.pi / 2)
    same, angle = merged.slerp(jnp.asarray([0.6, 0.8]), jnp.asarray([0.6, 0.8]), 0.6)
    close(same, [0.6, 0.8], 1e-6)
    assert float(angle) == 0
    opposite, _ = merged.slerp(jnp.asarray([1.0, 0.0]), jnp.asarray([-1.0, 0.0]), 0.6)
    close(opposite, [-1, 0], 1e-6)
    nothing, _ = merged.slerp(jnp.zeros(2), jnp.asarray([0.0, 1.0]), 0.6)
    close(nothing, [0, 1], 1e-6)


def test_what_is_merged_is_restored_but_for_the_direction() -> None:
    """A prompt of 40 tokens, the second row of 31 and padded on the left, then one token."""
    merge, real = merged.MiniCache(retain=0.05, t=0.6), np.asarray([40, 31])
    lower, upper = vectors(2, 40, 3, 8), vectors(2, 40, 3, 8, seed=1)
    slot = np.where(np.arange(40) >= 40 - real[:, None], np.arange(40) - (40 - real[:, None]), 44).astype(np.int32)
    both = tuple(jnp.asarray(x, jnp.float32) for x in (lower, upper))
    empty = merged.Merged.empty((2, 44, 3, 8), merge.retained(40), jnp.float32)
    write = jax.jit(lambda s, new, slot, lengths: s.write(new, slot, lengths, merge))
    stream = write(empty, both, slot, np.zeros(2, np.int32))
    later = tuple(x[:, :1] for x in both)
    stream = write(stream, later, real[:, None].astype(np.int32), real.astype(np.int32))

    assert merge.retained(40) == 2 and stream.index.shape == (2, 2, 3)
    *expected, distance = by_rule(lower, upper, 0.6)
    for half, (raw, restored) in enumerate(zip((lower, upper), expected, strict=True)):
        found = np.asarray(stream.restored(half, real + 1))
        for b in range(2):
            own = slice(40 - real[b], 40)
            for h in range(3):
                kept = np.sort(np.argsort(-distance[b, own, h])[: math.ceil(0.05 * real[b])])
                assert np.sort(stream.index[b, :, h]).tolist() == kept.tolist()
                others = np.setdiff1d(np.arange(real[b]), kept)
                np.testing.assert_array_equal(found[b, kept, h], raw[b, own, h][kept].astype(np.float32))
                close(found[b, others, h], restored[b, own, h][others], 1e-5)
            norms = np.linalg.norm(found[b, : real[b]], axis=-1)
            close(norms, np.linalg.norm(raw[b, own], axis=-1), relative=1e-6)
            close(found[b, real[b]], restored[b, 0], 1e-5)


# Codecs that code a token as it comes, and ones that leave it raw for a while, in blocks of 6 and behind 5.
CODECS = ["none", "int4", "hadamard+int8", "kivi4_channel:6", "kivi4_token:5"]


@pytest.mark.parametrize("name", CODECS)
def test_any_split_of_a_text_stores_the_same(name: str) -> None:
    """After a prompt of 9 and of 6 tokens, padded on the left: pieces of any length, and one token after another."""
    merge, made, capacity = merged.MiniCache(retain=0.15), codec(name), 24
    pair = tuple(jnp.asarray(vectors(2, capacity, 2, 8, seed=seed), jnp.float32) for seed in (0, 1))
    write = jax.jit(lambda s, new, slot, lengths: s.write(new, slot, lengths, merge))

    def run(*sizes: int) -> merged.Merged:
        stream = merged.Merged.empty((2, capacity, 2, 8), merge.retained(9), jnp.float32, made)
        start = np.zeros(2, np.int32)
        for number, size in enumerate(sizes):
            stop = start + (np.asarray([size, size - 3]) if not number else size)
            width = 1 if size == 1 else 9
            token = np.arange(width) - width + stop[:, None]
            slot = np.where(token >= start[:, None], token, capacity).astype(np.int32)
            new = tuple(jax.vmap(lambda x, i: x[i])(x, np.maximum(token, 0)) for x in pair)
            stream, start = write(stream, new, slot, start), stop.astype(np.int32)
        return stream

    whole = run(9, 9, 5)
    for sizes in ((9, 2, 5, 7), (9, *[1] * 14)):
        for a, b in zip(jax.tree.leaves(run(*sizes)), jax.tree.leaves(whole), strict=True):
            np.testing.assert_array_equal(a, b)
    # What is read is what the codec makes of the merged direction, times each layer's norm; in float64.
    lower, upper = (np.asarray(x, np.float64) for x in pair)
    lengths, exact = jnp.asarray([23, 20]), by_rule(lower, upper, merge.t)
    coarse = {"none": 1e-5, "int4": 0.3, "hadamard+int8": 0.02, "kivi4_channel:6": 0.3, "kivi4_token:5": 0.3}[name]
    for half in (0, 1):
        found, norms = np.asarray(whole.restored(half, lengths)), np.linalg.norm(pair[half], axis=-1)
        kept = np.zeros((2, capacity, 2), bool)
        for b, h in np.ndindex(2, 2):
            index = np.asarray(whole.index)[b, :, h]
            kept[b, index[index < capacity], h] = True
        there = np.arange(capacity)[None, :, None] < np.asarray(lengths)[:, None, None]
        error = float((np.linalg.norm(found - exact[half], axis=-1) / norms)[there & ~kept].max())
        if name == "none":
            close(error, 0.0, coarse, "restored")
        assert error < coarse and (name == "none" or error > 1e-3)
        raw = np.linalg.norm(found - np.asarray(pair[half]), axis=-1)[kept]
        assert (raw.max() == 0) == (name == "none" or "kivi" in name) and raw.max() < coarse * norms.max()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["none", "int4"])
def test_vectors_of_any_finite_size_are_restored_as_finite_ones(dtype: str, name: str) -> None:
    """Both layers alike, so that merging alone loses nothing: the error is the codec's of a direction, times the norm."""
    sizes = np.asarray([0.0, 1e-30, 1.0, 7e4, 1e9, 1e19, 1e30, 3e38])
    x = jnp.asarray(sizes[:, None, None] * vectors(8, 1, 16).clip(-1, 1), dtype)[None]
    merge = merged.MiniCache(retain=0)
    write = jax.jit(lambda s, x: s.write((x, x), jnp.arange(8)[None], jnp.zeros(1, jnp.int32), merge))
    stream = write(merged.Merged.empty(x.shape, 0, jnp.dtype(dtype), codec(name)), x)
    found = np.asarray(stream.restored(0, jnp.full(1, 8)), np.float64)
    assert np.isfinite(found).all()
    exact = np.asarray(x, np.float64)
    error = np.linalg.norm(found - exact, axis=-1) / np.maximum(np.linalg.norm(exact, axis=-1), 1e-37)
    error = error[:, :-1].max()  # the last one's norm is beyond fp32, and saturates
    rounding = 3e-6 if dtype == "float32" else 0.03
    if name == "none":
        close(error, 0.0, rounding, f"restored in {dtype}")
    assert error < (0.15 if name == "int4" else 0) + rounding


def test_the_upper_half_is_merged_in_pairs_and_an_odd_last_layer_is_not() -> None:
    assert merged.MiniCache().pairs(4) == [2] and merged.MiniCache().pairs(8) == [4, 6]
    assert merged.MiniCache().pairs(3) == [1] and merged.MiniCache().pairs(5) == [2]
    assert merged.MiniCache(start=0).pairs(4) == [0, 2] and merged.MiniCache(start=1).pairs(4) == [1]
    assert [merged.MiniCache(retain=share).retained(60) for share in (0, 0.05, 0.051, 1)] == [0, 3, 4, 60]


def small(variant: str, layers: int = 4, **fields: Any) -> configs.Config:
    settings = {"gqa": {"num_kv_heads": 2}, "mla": {"kv_lora_rank": 12, "qk_rope_head_dim": 4}}.get(variant, {})
    model = {"d_model": 32, "num_heads": 4, "num_layers": layers}
    return configs.create(variant, settings, context=64, model=model, **fields)


def text(length: int) -> tuple[jax.Array, jax.Array]:
    """Tokens and positions; the second row is shorter, and padded on the left as prompts are."""
    tokens = jax.random.randint(jax.random.key(2), (2, length), 0, 50)
    return tokens, jnp.stack([jnp.arange(length), jnp.maximum(jnp.arange(length) - 3, -1)]).astype(jnp.int32)


def replaced(cache: ModelCache, merge: merged.MiniCache, before: np.ndarray) -> ModelCache:
    """A plain cache whose pairs hold what merging leaves of the tokens that each row has beyond `before`."""
    layers, after = list(cache.layers), np.asarray(cache.slots[0].lengths)
    token = np.arange(cache.slots[0].positions.shape[1])
    fresh = (token >= before[:, None]) & (token < after[:, None])
    for lower in merge.pairs(len(layers)):
        stores: Any = [layer and layer["entries"] for layer in layers[lower : lower + 2]]
        pair = [store.streams for store in stores]
        new: tuple[list[jax.Array], list[jax.Array]] = ([], [])
        for own in zip(*pair, strict=True):
            was = [np.asarray(stream, np.float64) for stream in own]
            with np.errstate(invalid="ignore"):
                *restored, distance = by_rule(was[0], was[1], merge.t)
            changed = np.broadcast_to(fresh[..., None], distance.shape).copy()
            for b in np.flatnonzero(before == 0):
                for h in range(distance.shape[2]):
                    changed[b, np.argsort(-distance[b, : after[b], h])[: math.ceil(merge.retain * after[b])], h] = False
            for half in (0, 1):
                new[half].append(jnp.asarray(np.where(changed[..., None], restored[half], was[half]), jnp.float32))
        for half in (0, 1):
            store = dataclasses.replace(stores[half], streams=type(pair[0])(*new[half]))
            layers[lower + half] = layers[lower + half].replace(entries=store)
    return dataclasses.replace(cache, layers=tuple(layers))


def mesh(**axes: int) -> Any:
    """Of all eight devices."""
    return make_mesh(configs.MeshConfig(**axes))


def stepper(model: models.Model, capacity: int, prompt: int, plan: CachePlan, **axes: int) -> tuple[Any, Any]:
    """`extend` compiled, and an empty cache, of two sequences on a mesh."""
    decoder = Decoder(model, 2, capacity, mesh(**axes), plan, prompt=prompt)
    return decoder.compiled(lambda model, cache, *new: model.extend(*new, cache)), decoder.empty()


@pytest.mark.parametrize("variant", ["gqa", "mla"])
def test_decoding_after_a_merged_prompt(variant: str) -> None:
    """A plain cache whose entries are replaced, in float64, after every call, gives the same logits."""
    merge, prompt, stop = merged.MiniCache(start=0, retain=0.15), 12, 14
    model = models.create(small(variant, 2), 50)
    tokens, positions = text(stop)
    plain, exact = model.init_cache(2, stop), model(tokens, positions)
    plain_step = jax.jit(lambda cache, tokens, where: model.extend(tokens, where, cache))
    plan = CachePlan(merge=merge)
    assert not plan.exact(stop)
    step, cache = stepper(model, stop, prompt, plan, data=2, tensor=4)
    for start, end in [(0, prompt), *((t, t + 1) for t in range(prompt, stop))]:
        before, new = np.asarray(plain.slots[0].lengths), np.s_[:, start:end]
        expected, plain = plain_step(plain, tokens[new], positions[new])
        found, cache = step(cache, tokens[new], positions[new])
        real = np.asarray(positions[new])[..., None] >= 0
        close(found * real, expected * real, 1e-5)
        if start == 0:
            close(found * real, exact[new] * real, 1e-5, "a prompt alone is attended exactly")
        else:
            assert np.max(np.abs(found - exact[new]) * real) > 1e-3
        plain = replaced(plain, merge, before)


def test_a_step_reads_what_is_merged_as_its_codec_stores_it() -> None:
    """Keys before their rotation, in 4 bits: far nearer to what merging alone gives than that is to no merging."""
    model, found = models.create(small("gqa", 2), 50), []
    tokens, positions = text(13)
    merge = merged.MiniCache(start=0, retain=0.15)
    for plan in (CachePlan(), CachePlan(merge=merge), CachePlan("kvquant4:4", merge=merge)):
        step = jax.jit(lambda cache, tokens, where: model.extend(tokens, where, cache)[::-1])
        cache, _ = step(model.init_cache(2, 13, prompt=12, plan=plan), tokens[:, :12], positions[:, :12])
        found.append(step(cache, tokens[:, 12:], positions[:, 12:])[1])
    plain, merged_alone, both = found
    assert relative_norm(merged_alone, plain) > 0.5
    assert 1e-3 < relative_norm(both, merged_alone) < 0.15


def test_a_prompt_that_is_retained_whole_is_read_as_it_was() -> None:
    model = models.create(small("mla", 2), 50)
    tokens, positions = text(9)
    found = []
    for merge in (None, merged.MiniCache(start=0, retain=1.0)):
        plan = CachePlan(merge=merge)
        step = jax.jit(lambda cache, tokens, where: model.extend(tokens, where, cache))
        _, cache = step(model.init_cache(2, 9, prompt=8, plan=plan), tokens[:, :8], positions[:, :8])
        found.append(step(cache, tokens[:, 8:], positions[:, 8:])[0])
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize(
    ("variant", "layers", "spec", "codec"),
    [
        ("gqa", 4, "minicache", "none"),
        ("mla", 5, "minicache:retain=0.1", "none"),
        ("tensor_product", 4, "minicache:start=0,retain=0", "none"),
        ("gqa", 4, "minicache", "int4"),
        ("gqa", 4, "minicache:start=0", "kvquant2:32"),
        ("mla", 5, "minicache:retain=0.1", "c_kv=kivi4:16,k_rope=hadamard+int8"),
        ("mla", 4, "minicache:retain=0.05", "latent_fp8"),
    ],
)
def test_bytes_are_those_of_the_formula(variant: str, layers: int, spec: str, codec: str) -> None:
    config = small(variant, layers, eval={"cache": {"merge": spec, "codec": codec}})
    configs.validate(config)
    model = cache_bytes.abstract_model(config, 50)
    plan = cache_plan(config, model, None)
    for length in (1, 19, 20, 64, 1000):
        assert cache_bytes.abstract_bytes_at(model, length, plan) == cache_bytes.formula_bytes_at(config, length)
    short, long = cache_bytes.lengths_to_compare(config)
    growth = cache_bytes.formula_bytes_at(config, long) - cache_bytes.formula_bytes_at(config, short)
    assert growth == pytest.approx((long - short) * cache_bytes.formula_growth(config))


def test_bytes_of_the_upper_half_are_halved_but_for_norms() -> None:
    """Four layers of 2 x 2 heads of 8 channels in fp32; 100 tokens."""
    config = small("gqa", eval={"cache": {"merge": "minicache:retain=0"}})
    whole = 4 * 4 * 8 * 4 * 100
    assert cache_bytes.formula_bytes_at(config, 100) == 0.75 * whole + 2 * 4 * 4 * 100
    config.eval.cache.merge = "minicache:retain=0.05"
    retained = 5 * 4 * (2 * 8 * 4 + 4)  # in both layers, and where they stand
    assert cache_bytes.formula_bytes_at(config, 100) == 0.75 * whole + 2 * 4 * 4 * 100 + retained


def test_the_published_ratio_needs_both() -> None:
    """32 layers of heads of 128 channels in bf16, 4.25 bits a channel: 4 / 3 x 16 / 4.25 without norms (2405.14366)."""
    model = {"d_model": 1024, "num_heads": 8, "num_layers": 32, "dtype": "bfloat16"}

    def bytes_of(**cache: str) -> int:
        return cache_bytes.formula_bytes_at(configs.create("mha", context=64, model=model, eval={"cache": cache}), 100)

    both = bytes_of(merge="minicache:retain=0", codec="int4:128")
    norms = 100 * 16 * 8 * 2 * 2  # of keys and values, in each of the upper layers
    assert bytes_of() / (both - norms) == pytest.approx(4 / 3 * 16 / 4.25) == pytest.approx(5.02, abs=5e-3)
    assert both == 100 * 8 * 2 * (24 * 68 + 16 * 2)
    assert bytes_of(codec="int4:128") == 100 * 8 * 2 * 32 * 68


def test_what_a_step_reads_of_a_pair() -> None:
    """Directions and indices once for each layer, its own norms and retained vectors once."""
    config = small("gqa", 2, eval={"cache": {"merge": "minicache:start=0"}})
    model = cache_bytes.abstract_model(config, 50)
    plan = cache_plan(config, model, None)
    assert cache_bytes.read_bytes_per_step(model, 100, plan) == 2 * 4 * (100 * (8 + 1) * 4 + 5 * (8 * 4 + 4))


@pytest.mark.parametrize("codec", ["none", "c_kv=int4:12,k_rope=kvquant4:16"])
def test_a_live_merged_cache_is_measured(corpus: Any, codec: str) -> None:
    config = small("mla", 2, eval={"cache": {"merge": "minicache:start=0,retain=0.125", "codec": codec}})
    configs.validate(config)
    model = models.create(config, 50)
    row = cache_bytes.measure(config, model, mesh(), cache_plan(config, model, None), lengths=(128,))
    # An entry of 12 + 4 channels, two norms of each part, an eighth of both layers' entries and of indices.
    if codec == "none":
        assert row["bytes_per_token"] == 16 * 4 + 2 * 2 * 4 + (2 * 16 * 4 + 2 * 4) / 8
        assert row["constant_bytes"] == 0
    else:  # 12 / 2 + 4 bytes; 4 channels of 16 tokens, 8 + 4 each; retained: the former coded, the latter as they are
        assert row["bytes_per_token"] == 10 + 4 * 12 / 16 + 2 * 2 * 4 + (2 * (10 + 4 * 4) + 2 * 4) / 8
        assert row["constant_bytes"] == 16 * 4 * 4


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("cache", "words"),
    [
        ({"merge": "minicash"}, "config.eval.cache.merge: 'minicash' is not known; did you mean 'minicache'?"),
        ({"merge": "minicache:retained=0.1"}, "no setting 'retained'; did you mean 'retain'?"),
        ({"merge": "minicache:start=half"}, "config.eval.cache.merge: 'minicache:start=half': start='half' is no int"),
        ({"merge": "minicache:retain=1.5"}, "retain=1.5 is above 1"),
        ({"merge": "minicache:retain=0.0001"}, "retain=0.0001 is no whole number of thousandths"),
        ({"merge": "minicache", "evict": "tova", "budget_tokens": 9}, "'minicache' beside eval.cache.evict='tova'"),
        ({"evict": "cam:start=1", "budget_tokens": 9}, "cam: start=1.0 leaves no recent entries"),
        ({"evict": "cam:neighbours=0", "budget_tokens": 9}, "cam: neighbours=0 leaves no entries"),
        ({"evict": "cam:neighbors=3", "budget_tokens": 9}, "no setting 'neighbors'; did you mean 'neighbours'?"),
    ],
)
def test_bad_settings_are_refused_with_one_line(cache: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as error:
        configs.validate(small("gqa", eval={"cache": cache}))
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("variant", "cache", "words"),
    [
        ("mla", {"evict": "cam", "budget_tokens": 9}, "evict: 'cam': layer 0 of mla has no stream 'value' of its own"),
        (
            "gqa",
            {"evict": "cam", "budget_tokens": 9, "codec": "int8"},
            "layer 0 of gqa codes 'value', 'int8', which is merged",
        ),
        ("gqa", {"merge": "minicache:start=3"}, "no two adjacent layers from there up, of 4; set start to at most 2"),
        ("gqa/2", {"merge": "minicache"}, "layer 3 reads what layer 2 remembers"),
        ("linear", {"merge": "minicache"}, "layer 2 keeps no entry of every token"),
        ("gqa,sliding_window", {"merge": "minicache"}, "layer 3 keeps no entry of every token"),
        ("gqa,mha", {"merge": "minicache"}, "the entries of layers 2 and 3 differ in shape"),
    ],
)
def test_what_cannot_be_merged_is_refused_with_one_line(variant: str, cache: dict[str, Any], words: str) -> None:
    config = small(variant, eval={"cache": cache})
    configs.validate(config)
    with pytest.raises(UserError) as error:
        cache_plan(config, cache_bytes.abstract_model(config, 50), None)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_keys_alone_may_be_coded_where_values_are_merged() -> None:
    config = small("gqa", eval={"cache": {"evict": "cam", "budget_tokens": 9, "codec": "key=int8"}})
    model = cache_bytes.abstract_model(config, 50)
    plan = cache_plan(config, model, None)
    assert cache_bytes.abstract_bytes_at(model, 99, plan) == 4 * 9 * 2 * (8 + 2 + 8 * 4)
