"""Layers that read what another layer remembers (YOCO 2405.05254, CLA 2405.12981, Gemma 3n): a float64 model of them,
prefill for the last token alone, what is stored and read, and the patterns that cannot work."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import EXACT, close
from matrix import BIRD, INDEX, LATENT, NATIVE, V4, Row
from test_factors import assert_same, differs, paper_grouped_query, wide
from test_mla import paper_norm

from mla import config as configs
from mla import model as models
from mla.attention.contract import mechanism
from mla.attention.recurrent.base import RecurrentMixer
from mla.cache.meter import bookkeeping_bytes, content_bytes
from mla.errors import UserError
from mla.evaluation.cache_bytes import abstract_bytes_at, formula_bytes_at, read_bytes_per_step

D_MODEL, HEADS, VOCAB, WINDOW = 32, 4, 31, 5
GEMMA_3N = "sliding_window*3,gqa,sliding_window@2,gqa@3"
LOCAL = {"sliding_window": {"window": WINDOW, "num_kv_heads": 2}}
FIELDS = {
    "mla": {"kv_lora_rank": 12, "qk_rope_head_dim": 4},
    "tensor_product": {"rank_q": 3, "factor_init": "unit"},
    "linear": {"chunk": 4},
} | LOCAL
DEPTH = {"mha": 2, "mla/2": 2, "tensor_product/2": 2, "slim/2": 2, "sliding_window,linear,mla": 3}  # others: 4
DEPTH |= {"grouped_tied/3": 6, GEMMA_3N: 6}
SHARED = {"gqa/2": 2, "mla/2": 2, "tensor_product/2": 2, "slim/2": 2, "grouped_tied/3": 3}  # variant -> layers a cache

pytestmark = pytest.mark.usefixtures("float64")


def config_of(variant, layers=None, **model):
    names = set(configs.labels(configs.parse_pattern(variant)))
    own = {name: FIELDS[name] for name in names & set(FIELDS)}
    settings = own if len(names) > 1 else next(iter(own.values()), {})
    shape = {
        "d_model": D_MODEL,
        "num_heads": HEADS,
        "num_layers": layers or DEPTH.get(variant, 4),
        "mlp_multiple": 1,
    }
    config = configs.create(variant, settings, context=64, model=shape | model)
    configs.validate(config)
    return config


class Compiled:
    """A model in float64 with loud weights and gains away from 1, and its forms, compiled once for each shape."""

    def __init__(self, config):
        config.model.dtype = "float64"  # what no run may have
        draw = np.random.default_rng(1)

        def loud(shape):
            noise = draw.normal(size=shape.shape)
            return jnp.asarray(1.5 * noise / D_MODEL**0.5 if noise.ndim > 1 else 1 + 0.3 * noise)

        abstract = nnx.eval_shape(lambda: models.create(config, VOCAB))
        self.config, self.graph = config, nnx.graphdef(abstract)
        self.params = jax.tree.map(loud, models.parameters(abstract))
        self.model = models.with_parameters(self.graph, self.params)
        self.parallel = jax.jit(lambda p, tokens: models.with_parameters(self.graph, p)(tokens))
        self.step = jax.jit(self._extend, static_argnums=4)

    def _extend(self, params, tokens, positions, cache, last_only):
        return models.with_parameters(self.graph, params).extend(tokens, positions, cache, last_only)

    def __call__(self, tokens):
        return self.parallel(self.params, tokens)

    def extend(self, tokens, positions, cache, last_only=False):
        return self.step(self.params, tokens, positions, cache, last_only)


@functools.cache
def compiled(variant, layers=None):
    return Compiled(config_of(variant, layers))


def text(rows=2, length=20):
    return np.random.default_rng(0).integers(0, VOCAB, (rows, length), dtype=np.int32)


def padded(tokens, spans, width):
    """Spans (start, stop) of each row, left-padded to `width`: tokens and positions."""
    chunk, positions = np.full((len(spans), width), 7, np.int32), np.full((len(spans), width), -1, np.int32)
    for row, (start, stop) in enumerate(spans):
        chunk[row, width - (stop - start) :] = tokens[row, start:stop]
        positions[row, width - (stop - start) :] = np.arange(start, stop)
    return chunk, positions


# ------------------------------------------------------------------------------------------- the whole model in float64


def paper_linear(weights, x):
    """o_t = phi(q_t) sum_s phi(k_s) v_s / phi(q_t) sum_s phi(k_s), phi = elu + 1 (2006.16236)."""
    q, k, v = ((x @ weights[part]["kernel"]).reshape(len(x), HEADS, -1) for part in ("query", "key", "value"))
    q, k = (np.where(a > 0, a + 1, np.exp(np.minimum(a, 0))) for a in (q, k))
    out = np.zeros_like(v)
    for t in range(len(x)):
        for i in range(HEADS):
            shares = np.array([q[t, i] @ k[s, i] for s in range(t + 1)])
            out[t, i] = shares @ v[: t + 1, i] / shares.sum()
    return out.reshape(len(x), -1) @ weights["out"]["kernel"]


def paper_model(config, params, tokens):
    """Logits of one sequence by a pre-norm decoder whose layers may read the keys and values of another."""
    weights, eps = wide(params), config.model.norm_eps
    x, remembered = weights["embedding"][tokens], {}
    for index, layer in enumerate(configs.layers(config.model)):
        block = weights["blocks"][str(index)]
        mixer, source = block["mixer"], index if layer.source is None else layer.source
        normed = np.array([paper_norm(row, block["mixer_norm"]["scale"], eps) for row in x])
        if issubclass(mechanism(layer.name)[1], RecurrentMixer):
            x = x + paper_linear(mixer, normed)
        else:
            if layer.source is None:
                norm = block.get("entries_norm", block["mixer_norm"])["scale"]  # a layer with readers has a second norm
                entries = np.array([paper_norm(row, norm, eps) for row in x])
                remembered[index] = {"key": mixer["key"], "value": mixer["value"]}, entries
            projections, entries = remembered[source]
            theta, window = layer.config.rope_theta or config.model.rope_theta, layer.config.window or None
            x = x + paper_grouped_query(mixer | projections, normed, entries, theta, heads=HEADS, window=window)
        normed = np.array([paper_norm(row, block["mlp_norm"]["scale"], eps) for row in x])
        gate = normed @ block["mlp"]["gate"]["kernel"]
        x = x + (gate / (1 + np.exp(-gate)) * (normed @ block["mlp"]["up"]["kernel"])) @ block["mlp"]["down"]["kernel"]
    x = np.array([paper_norm(row, weights["final_norm"]["scale"], eps) for row in x])
    return x @ weights["embedding"].T


@pytest.mark.parametrize("variant", ["yoco", "yoco+linear", "gqa/2", GEMMA_3N])
def test_equals_the_papers_model(variant):
    run, tokens = compiled(variant), text()
    assert_same(run(tokens)[0], paper_model(run.config, run.params, tokens[0]))


def test_yoco_has_one_layer_that_remembers_for_the_upper_half():
    run = compiled("yoco")
    assert [layer.name for layer in configs.layers(run.config.model)] == ["sliding_window"] * 2 + ["gqa"] * 2
    assert run.model.sources == (None, None, None, 2)
    assert ["entries_norm" in block for block in run.params["blocks"].values()] == [False, False, True, False]
    assert [block.mixer.window for block in run.model.blocks] == [WINDOW, WINDOW, None, None]


# ----------------------------------------------------------------------------------------------- through the cache

EVERY = ["mha", "sliding_window,linear,mla", "yoco", "yoco+linear", GEMMA_3N, *SHARED]
PROMPTED = ["yoco", "gqa/2"]  # also a prompt for its last token, from an empty cache


@pytest.mark.parametrize("variant", EVERY)
def test_any_way_through_the_cache_equals_the_parallel_form(variant):
    """A left-padded prompt longer than windows, a second chunk for its last token only (not for all), and a token more."""
    run, tokens = compiled(variant), text()
    reference = np.asarray(run(tokens))
    rms = np.sqrt(np.mean(reference**2))
    stages = [([(0, 12), (0, 9)], 12), ([(12, 19), (9, 16)], 7), ([(19, 20), (16, 17)], 1)]
    if variant in SHARED and variant not in PROMPTED:
        stages = [stages[0], ([(12, 13), (9, 10)], 1)]
    cache = empty = run.model.init_cache(2, 20)
    for spans, width in stages:
        chunk, positions = padded(tokens, spans, width)
        last_only = width == 7
        logits, cache = run.extend(chunk, positions, cache, last_only)
        assert logits.shape == (2, 1 if last_only else width, VOCAB)
        for row, (start, stop) in enumerate(spans):
            expected = reference[row, start:stop][-1:] if last_only else reference[row, start:stop]
            close(logits[row, -len(expected) :] / rms, expected / rms, EXACT, f"{width} tokens")
    if variant in PROMPTED:
        chunk, positions = padded(tokens, *stages[0])
        logits, prompt = run.extend(chunk, positions, empty, last_only=True)
        expected = np.stack([reference[0, 11], reference[1, 8]])
        close(logits[:, 0] / rms, expected / rms, EXACT, "last token")
        assert jax.tree.structure(prompt) == jax.tree.structure(cache)


# What a layer remembers beside an entry a token, or chooses from: who reads it has queries alone.
BEYOND = [
    Row("temporal_latent", LATENT | {"stride": 3}),
    Row("compressed", V4 | {"stride": 3}),
    Row("compressed_sparse", V4 | INDEX | {"stride": 3, "top_k": 4}),
    Row("block_mixture", {"block": 4, "top_k": 2}),
    Row("deepseek_sparse", LATENT | {"top_k": 6, "index_head_dim": 10}),
    Row("native_sparse", NATIVE),
    Row("strided", {"stride": 5}),
    Row("fixed_columns", {"stride": 5, "columns": 2}),
    Row("dilated", {"tokens_read": 4, "dilation": 2}),
    Row("big_bird", BIRD),
    Row("chunked", {"chunk": 7}),
    Row("chunked_global", {"temperature_floor": 4}),
]


@pytest.mark.parametrize("row", BEYOND, ids=lambda row: row.name)
def test_a_layer_reads_the_memory_of_another_mechanism_like_it(row):
    """In pieces what it is in parallel, and not what the owner reads: its queries are its own. It makes no entries."""
    owner = row.mixer()
    reader = row.of[1](row.config(), row.around(remembers=False), rngs=nnx.Rngs(1))
    count = [sum(a.size for a in jax.tree.leaves(models.parameters(mixer))) for mixer in (owner, reader)]
    assert count[1] < count[0]
    made_by = ("key", "value", "kv", "compressor", "index_compressor")
    assert not [name for name in made_by if hasattr(reader, name)]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 25, owner.around.d_model)))
    graph, state = nnx.split((owner, reader))

    @jax.jit
    def read(state, x, where=None, cache=None):
        owner, reader = nnx.merge(graph, state)
        memory, cache = owner.remember(x, where, cache)
        return reader.read(x, where, memory), owner.read(x, where, memory), cache

    (whole, owned, _), cache, pieces = read(state, x), owner.init_cache(2, 25, jnp.float64), []
    for start, stop in ((0, 12), (12, 13), (13, 25)):
        where = jnp.broadcast_to(jnp.arange(start, stop, dtype=jnp.int32), (2, stop - start))
        y, _, cache = read(state, x[:, start:stop], where, cache)
        pieces.append(y)
    close(jnp.concatenate(pieces, axis=1), whole, EXACT, unit=True)
    assert differs(whole, owned) > 1e-2


def roles(function: Any, params: Any, *arguments: Any) -> tuple[dict[str, int], set[str]]:
    """Traces function(params, ...): rows of x in each product x W with a parameter W, and the parameters that take part."""
    traced = jax.make_jaxpr(function)(params, *arguments)
    paths = ["/".join(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    rows: dict[str, int] = {}
    used: set[str] = set()

    def walk(jaxpr: Any, names: dict[Any, str]) -> None:
        for equation in jaxpr.eqns:
            inputs = [None if hasattr(v, "val") else names.get(v) for v in equation.invars]
            inner = [getattr(p, "jaxpr", p) for p in equation.params.values() if hasattr(getattr(p, "jaxpr", p), "eqns")]
            for jaxpr_within in inner:
                named = zip(jaxpr_within.invars, inputs, strict=True)
                walk(jaxpr_within, {v: name for v, name in named if name is not None})
            if not inner:
                used.update(name for name in inputs if name is not None)
            if equation.primitive.name == "dot_general" and inputs[1] is not None:
                rows[inputs[1]] = equation.invars[0].aval.shape[0]

    walk(traced.jaxpr, dict(zip(traced.jaxpr.invars, paths, strict=False)))
    return rows, used


@pytest.mark.parametrize(("variant", "top"), [("yoco", 2), ("gqa/2", 2), ("mha", 1), (GEMMA_3N, 3), ("yoco+linear", 2)])
def test_the_last_token_alone_goes_through_layers_that_only_read(variant, top):
    """Rows of every product x W: all tokens up to the entries of the top layer that remembers, one token from there on."""
    run, (batch, length) = compiled(variant), (2, 12)
    chunk, positions = padded(text(), [(0, 12), (0, 9)], length)
    for last_only in (False, True):
        extend = functools.partial(run._extend, last_only=last_only)
        rows, _ = roles(extend, run.params, chunk, positions, run.model.init_cache(batch, 20))
        for index in range(run.config.model.num_layers):
            found = {path: n for path, n in rows.items() if path.startswith(f"blocks/{index}/")}
            assert len(found) >= 5, found  # W_Q, W_O and three of the MLP at least
            for path, count in found.items():
                remembers = any(f"mixer/{part}/" in path for part in ("key", "value"))
                alone = last_only and (index > top or (index == top and not remembers))
                assert count == (batch if alone else batch * length), (path, last_only)


def test_upper_layers_cost_nothing_for_earlier_tokens():
    """FLOPs of the compiled prefill: what last_only saves is the upper half's share of all tokens but one."""
    run, length = compiled("yoco"), 12
    chunk, positions = padded(text(), [(0, 12), (0, 12)], length)
    arguments = run.params, chunk, positions, run.model.init_cache(2, 20)
    every, last = (run.step.lower(*arguments, only).cost_analysis()["flops"] for only in (False, True))
    upper = [run.params["blocks"][str(index)] for index in (2, 3)]
    matrices = sum(p.size for p in jax.tree.leaves(upper) if p.ndim == 2) + VOCAB * D_MODEL
    matrices -= sum(upper[0]["mixer"][part]["kernel"].size for part in ("key", "value"))  # of all tokens, either way
    saved = 2 * 2 * (length - 1) * matrices
    assert saved <= every - last < 1.5 * saved  # and attention's part
    assert last < 0.65 * every


# ------------------------------------------------------------------------------------------------------- sharing by CLA


def test_sharing_by_one_is_no_sharing():
    shared, base = config_of("gqa/1"), config_of("gqa")
    assert shared.model.pattern == base.model.pattern == ("gqa",)
    ours, theirs = (models.parameters(models.create(config, VOCAB)) for config in (shared, base))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def key_value_parameters(name):
    """P_KV: what makes the entries of one layer at these sizes, by the papers' formulas."""
    dim = D_MODEL // HEADS
    return {
        "gqa": 2 * D_MODEL * 2 * dim,
        "mla": D_MODEL * (12 + 4) + 12,
        "tensor_product": D_MODEL * (2 + 2) * (HEADS + dim),
        "slim": D_MODEL * HEADS * dim,
        "grouped_tied": D_MODEL * 2 * dim + D_MODEL * dim // 2,
    }[name]


READERS = {
    "gqa": {"query", "out"},
    "mla": {"query", "key_up", "value_up", "out"},
    "tensor_product": {"a_query", "b_query", "out"},
    "slim": {"query", "value_from_key", "out"},
    "grouped_tied": {"query", "out"},
}


@pytest.mark.parametrize(("variant", "share"), SHARED.items())
def test_parameters_of_layers_that_read(variant, share):
    """Readers have no projections of their own for what they read: L P - (L - L / s) P_KV."""
    name, config = variant.split("/")[0], config_of(variant)
    layers = config.model.num_layers
    shared = nnx.eval_shape(lambda: models.create(config, VOCAB))
    base = nnx.eval_shape(lambda: models.create(config_of(name, layers), VOCAB))
    per_layer = models.count(models.parameters(base.blocks[0].mixer))
    for index, block in enumerate(shared.blocks):
        parameters = models.parameters(block.mixer)
        assert shared.sources[index] == (index // share * share if index % share else None)
        if index % share:
            assert set(parameters) == READERS[name]
        assert (block.entries_norm is not None) == (index % share == 0)
        assert models.count(parameters) == per_layer - (key_value_parameters(name) if index % share else 0)
    sizes = models.sizes(config, VOCAB)
    assert sizes.attention == layers * per_layer - (layers - layers // share) * key_value_parameters(name)
    assert sizes.total == models.count(models.parameters(shared))
    assert abs(sizes.total - sizes.mha_total) <= 3 * D_MODEL * layers / 2 + D_MODEL * layers // share


NORMED = ["gqa/2", "slim/2", "yoco", GEMMA_3N]  # have per-head norms
READ_BY_OTHERS = [*NORMED, "mla/2", "tensor_product/2", "grouped_tied/3"]


@pytest.mark.parametrize(("variant", "qk_norm"), [*((v, False) for v in READ_BY_OTHERS), *((v, True) for v in NORMED)])
def test_every_parameter_takes_part(variant, qk_norm):
    """A reader owns no parameter that only a layer with keys of its own would use (Gemma 3n: W_Q, q-norm and W_O)."""
    config = config_of(variant, qk_norm=qk_norm)
    made = models.create(config, VOCAB)
    graph, params = nnx.graphdef(made), models.parameters(made)
    _, used = roles(lambda p, tokens: models.with_parameters(graph, p)(tokens), params, text())
    every = {"/".join(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    assert used == every, f"never read: {sorted(every - used)}"


@pytest.mark.parametrize(("variant", "share"), SHARED.items())
def test_sharing_divides_what_is_stored_and_not_what_is_read(variant, share):
    config, name = config_of(variant), variant.split("/")[0]
    layers = config.model.num_layers
    shared, base = (nnx.eval_shape(lambda c=c: models.create(c, VOCAB)) for c in (config, config_of(name, layers)))
    for length in (16, 64):
        stored = abstract_bytes_at(base, length)
        assert abstract_bytes_at(shared, length) == formula_bytes_at(config, length) == stored / share
        assert read_bytes_per_step(shared, length) == read_bytes_per_step(base, length) == stored
    cache = jax.eval_shape(lambda: shared.init_cache(2, 16))
    assert content_bytes(cache) == 2 * abstract_bytes_at(shared, 16)
    assert [held is None for held in cache.layers] == [index % share > 0 for index in range(layers)]


def test_gradients_of_shared_keys_and_values_come_from_their_readers_too():
    """Layer 0's W_K and W_V: the model's gradient is that of both paths, and not that of layer 0's own."""
    run, tokens = compiled("gqa/2", 2), text(1, 8)

    def loss(params, cut):
        model = models.with_parameters(run.graph, params)
        x, (first, second) = model.embed(tokens), model.blocks
        memory, _ = first.remember(x, None)
        x = first(x, None, memory)
        x = second(x, None, jax.lax.stop_gradient(memory) if cut else memory)
        return jnp.sum(jnp.square(model.logits(model.final_norm(x))))

    @jax.jit
    def gradients(params):
        whole = jax.grad(lambda p: jnp.sum(jnp.square(models.with_parameters(run.graph, p)(tokens))))(params)
        found = whole, jax.grad(loss)(params, False), jax.grad(loss)(params, True)
        return [[part["blocks"]["0"]["mixer"][name]["kernel"] for name in ("key", "value")] for part in found]

    for whole, both, own in zip(*gradients(run.params), strict=True):
        assert_same(both, whole)
        assert differs(own, whole) > 1e-2 and np.std(own) > 0


# ------------------------------------------------------------------------------------------------- Gemma 3n and YOCO bytes


def test_gemma_3n_reads_the_last_layer_of_its_kind():
    """35 layers, the last 15 of which read layer 18 (local) or 19 (global); here 6, the last 2 of which read 2 or 3."""
    model = compiled(GEMMA_3N).model
    assert model.sources == (None, None, None, None, 2, 3)
    assert [block.mixer.window for block in model.blocks] == [WINDOW] * 3 + [None, WINDOW, None]
    assert sum(held is not None for held in model.init_cache(1, 20).layers) == 6 - 2
    kinds, stored = ["sliding_window"] * 4 + ["gqa"], 20
    pattern = ",".join([*(kinds * 4), *(f"{kind}@{19 if kind == 'gqa' else 18}" for kind in kinds * 3)])
    sources = [layer.source for layer in configs.layers(config_of(pattern, 35).model)]
    assert sources == [None] * stored + [18, 18, 18, 18, 19] * 3


def test_what_several_layers_store_and_read():
    """Stored once, read by each layer; which token stands where is kept once for all layers alike."""
    pair = 2 * 2 * (D_MODEL // HEADS) * 8  # k and v of two heads in float64
    for variant, local, stored, read in [("yoco", 2, 1, 2), (GEMMA_3N, 3, 1, 2)]:
        model = compiled(variant).model
        windows = model.sources.count(0) + sum(block.mixer.window is not None for block in model.blocks)
        for length in (3, 20, 64):
            ring = min(length, WINDOW)
            assert abstract_bytes_at(model, length) == pair * (local * ring + stored * length)
            assert read_bytes_per_step(model, length) == pair * (windows * ring + read * length)
        cache = model.init_cache(2, 20)
        assert {slots.clock.window for slots in cache.slots} == {WINDOW, None} and len(cache.slots) == 2
        assert bookkeeping_bytes(cache) == 4 * (2 * WINDOW + 2) + 4 * (2 * 20 + 2)
        held = sum(array.nbytes for array in jax.tree.leaves(cache))
        assert held == content_bytes(cache) + bookkeeping_bytes(cache)


# ---------------------------------------------------------------------------------------------------------- refusals

REFUSED = {
    "itself": ("gqa,gqa@1,gqa,gqa", "'gqa@1' in layer 1 reads layer 1; it can read layers 0 to 0"),
    "above": ("gqa*2,gqa@3,gqa", "'gqa@3' in layer 2 reads layer 3; it can read layers 0 to 1"),
    "below all": ("gqa@-1,gqa", "'gqa@-1' in layer 0 reads layer -1; there is none below it"),
    "a reader": (
        "gqa,gqa@-1,gqa@-1,gqa",
        "'gqa@-1' in layer 2 reads layer 1, which remembers nothing; read layer 0, as that one does",
    ),
    "another kind": (
        "gqa,mla@-1",
        "'mla@-1' in layer 1 reads layer 0, which is 'gqa'; it can read one of its own kind",
    ),
    "another label": (
        "a=gqa,gqa@-1",
        "'gqa@-1' in layer 1 reads layer 0, which is 'a=gqa'; it can read one of its own kind",
    ),
    "a recurrent layer": (
        "linear/2",
        "layer 1 reads linear, which remembers a state and no entries; other layers cannot read that",
    ),
    "a layer that merges": ("dmc/2", "layer 1 reads dmc, which remembers slots that only its own queries were trained on;"),
    "no divisor": ("gqa/3", "shares over groups of 3 layers, which do not divide model.num_layers=4"),
    "no layer": ("gqa,gqa@x", "'gqa@x' in layer 1: 'x' is no layer; write @-1 for the one below, @3 for layer 3"),
    "yoco and more": ("yoco,gqa", "'yoco,gqa': yoco lays out all layers; write yoco, yoco+LOWER or yoco+LOWER+UPPER"),
    "three halves": ("yoco+gqa+gqa+gqa", "'yoco+gqa+gqa+gqa': yoco lays out all layers; write yoco, yoco+LOWER or"),
    "no sharing": ("mla/0", "'mla/0': '0' is no sharing factor; write name, name*count or name/sharing"),
    "no count": ("mla*x", "'mla*x': 'x' is no repeat count; write name, name*count or name/sharing"),
}


@pytest.mark.parametrize(("variant", "words"), REFUSED.values(), ids=REFUSED)
def test_patterns_that_cannot_work_are_refused_with_one_line(variant, words):
    with pytest.raises(UserError) as error:
        config_of(variant)
    message = str(error.value)
    assert words in message and "\n" not in message
    assert message.startswith(("config.model.pattern: ", "config variant "))


def test_yoco_needs_two_halves():
    with pytest.raises(UserError, match=r"^config\.model\.num_layers: 1: yoco needs at least 2, a lower and an upper half$"):
        config_of("yoco", 1)
    assert config_of("yoco", 2).model.num_layers == 2


@pytest.mark.parametrize("label", ["global", "far-away", "1st"])
def test_a_label_that_cannot_be_a_field_is_refused_with_one_line(label):
    """Labels are fields of config.model.mechanism."""
    with pytest.raises(UserError, match=rf"config\.model\.pattern: .*'{label}'"):
        config_of(f"local=gqa,{label}=gqa")
