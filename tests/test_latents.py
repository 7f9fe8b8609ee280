"""Cut latents and tied heads against their papers: float64 numpy transcriptions, what each reduces to, published sizes."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import EXACT, close, contiguous_mask
from matrix import D_MODEL, HEADS, Row
from test_mla import paper_norm, paper_rope

from mla import config as configs
from mla import model as models
from mla.evaluation import cache_bytes

LENGTH, HEAD = 30, D_MODEL // HEADS

pytestmark = pytest.mark.usefixtures("float64")


# ----------------------------------------------------------------- the papers, token by token and head by head, float64


def double(mixer):
    """Its parameters as float64 numpy arrays."""
    return jax.tree.map(lambda a: np.asarray(a, np.float64), models.parameters(mixer))


def affine(x, weights):
    return x @ weights["kernel"] + weights.get("bias", 0.0)


def columns(weights, start, width):
    """A projection to `width` of the output channels only."""
    return {name: array[..., start : start + width] for name, array in weights.items()}


def turned(vector, t, mixer):
    return paper_rope(vector, t, mixer.around.rope_theta, False, None)


def softmax_average(query, keys, values, scale):
    """What one query gets from the tokens up to its own."""
    scores = np.array([query @ key for key in keys]) * scale
    weights = np.exp(scores - scores.max())
    return sum(w * value for w, value in zip(weights / weights.sum(), values, strict=True))


def gated_output(weights, x_t, heads):
    """(sigmoid(x W_gate) o concat(heads)) W_O; no gate where there are no weights for one."""
    concatenated = np.concatenate(heads)
    if "gate" in weights:
        concatenated = concatenated / (1 + np.exp(-x_t @ weights["gate"]["kernel"]))
    return concatenated @ weights["out"]["kernel"]


def normed_pieces(flat, gains, count, width, config, eps):
    """Cut into pieces, each over its own RMS and, where asked, times sqrt(width / channels of a piece)."""
    size = len(flat) // count
    factor = np.sqrt(width / size) if config.latent_scale == "sqrt" else 1.0
    cuts = [slice(j * size, (j + 1) * size) for j in range(count)]
    return [paper_norm(flat[cut], gains[cut], eps) * factor for cut in cuts]


def paper_query(mixer, weights, x_t, t, i):
    """Head i's query: from x, from c_Q, or (GLA_q) from the piece of c_Q that belongs to the head's group."""
    config, wide = mixer.config, mixer.nope_dim + mixer.rope_dim
    if config.q_lora_rank:
        count = config.num_latents if getattr(config, "group_queries", False) else 1
        flat, gains = affine(x_t, weights["query"]["down"]), weights["query"]["norm"]["scale"]
        pieces = normed_pieces(flat, gains, count, len(x_t), config, mixer.around.norm_eps)
        query = affine(pieces[i // (HEADS // count)], columns(weights["query"]["up"], i * wide, wide))
    else:
        query = x_t @ weights["query"]["kernel"][:, i * wide : (i + 1) * wide]
    return np.concatenate([query[: mixer.nope_dim], turned(query[mixer.nope_dim :], t, mixer)])


def paper_latents(mixer, weights, x, count):
    """Per token the normed pieces of c_KV, and the rotated key that all heads share."""
    rank, latents, rotated = len(weights["kv_norm"]["scale"]), [], []
    for t, x_t in enumerate(x):
        down = affine(x_t, weights["kv_down"])
        gains = weights["kv_norm"]["scale"]
        latents.append(normed_pieces(down[:rank], gains, count, len(x_t), mixer.config, mixer.around.norm_eps))
        rotated.append(turned(down[rank:], t, mixer))
    return latents, rotated


def paper_grouped_latent(mixer, x):
    """GLA-h_c (2505.21487): head i of group j = i / (n_h / h_c) has its keys and values from c_j."""
    weights, n, v, count = double(mixer), mixer.nope_dim, mixer.v_dim, mixer.config.num_latents
    latents, rotated = paper_latents(mixer, weights, x, count)
    heads = [[] for _ in x]
    for i in range(HEADS):
        j = i // (HEADS // count)
        w_uk, w_uv = columns(weights["key_up"], i * n, n), columns(weights["value_up"], i * v, v)
        keys = [np.concatenate([affine(c[j], w_uk), k_r]) for c, k_r in zip(latents, rotated, strict=True)]
        values = [affine(c[j], w_uv) for c in latents]
        for t in range(len(x)):
            query = paper_query(mixer, weights, x[t], t, i)
            heads[t].append(softmax_average(query, keys[: t + 1], values[: t + 1], (n + mixer.rope_dim) ** -0.5))
    return np.stack([gated_output(weights, x[t], heads[t]) for t in range(len(x))])


def paper_low_rank_blocks(mixer, x):
    """MLRA (2603.02188). MLRA-4: a head reads all four blocks. MLRA-2: heads of the first half read blocks 0 and 2, of the
    second half blocks 1 and 3. Weights of a block stand together, then those of the heads that read it."""
    weights, n, v, branches = double(mixer), mixer.nope_dim, mixer.v_dim, mixer.config.branches
    latents, rotated = paper_latents(mixer, weights, x, 4)
    heads = [[] for _ in x]
    for i in range(HEADS):
        half, within = divmod(i, HEADS // 2)
        # (block, which of the heads that read this block head i is)
        reads = [(b, i) for b in range(4)] if branches == 4 else [(half, within), (half + 2, within)]
        readers = HEADS if branches == 4 else HEADS // 2
        sums = np.zeros((len(x), v))
        for block, place in reads:
            at = block * readers + place
            w_uk, w_uv = columns(weights["key_up"], at * n, n), columns(weights["value_up"], at * v, v)
            keys = [np.concatenate([affine(c[block], w_uk), k_r]) for c, k_r in zip(latents, rotated, strict=True)]
            values = [affine(c[block], w_uv) for c in latents]
            for t in range(len(x)):
                query = paper_query(mixer, weights, x[t], t, i)
                sums[t] += softmax_average(query, keys[: t + 1], values[: t + 1], (n + mixer.rope_dim) ** -0.5)
        for t in range(len(x)):
            heads[t].append(sums[t] * {4: 1 / 2, 2: 2**-0.5}[branches])
    return np.stack([gated_output(weights, x[t], heads[t]) for t in range(len(x))])


def paper_grouped_tied(mixer, x):
    """GTA (2505.21487): v = u, k = [first channels of u ; RoPE(x W_KR)], the last channels of q are rotated."""
    weights, config = double(mixer), mixer.config
    d_h = config.head_dim or HEAD
    d_r = config.qk_rope_head_dim or d_h // 2
    rotated = [turned(x_t @ weights["rope_down"]["kernel"], t, mixer) for t, x_t in enumerate(x)]
    heads = [[] for _ in x]
    for i in range(HEADS):
        g = i // (HEADS // config.num_kv_heads)
        values = [x_t @ weights["tied"]["kernel"][:, g * d_h : (g + 1) * d_h] for x_t in x]
        keys = [np.concatenate([u[: d_h - d_r], k_r]) for u, k_r in zip(values, rotated, strict=True)]
        for t in range(len(x)):
            query = x[t] @ weights["query"]["kernel"][:, i * d_h : (i + 1) * d_h]
            query = np.concatenate([query[: d_h - d_r], turned(query[d_h - d_r :], t, mixer)])
            heads[t].append(softmax_average(query, keys[: t + 1], values[: t + 1], d_h**-0.5))
    return np.stack([gated_output(weights, x[t], heads[t]) for t in range(len(x))])


SMALL = {"kv_lora_rank": 20, "qk_rope_head_dim": 4}
BOTH_FORMS = ("expanded", "absorbed")

PAPERS = {
    "gla": ("grouped_latent", {"qk_rope_head_dim": 4}),  # latents of 2 d_h, as published
    "gla_query_latent": ("grouped_latent", SMALL | {"q_lora_rank": 24}),
    "gla_4_sqrt": ("grouped_latent", SMALL | {"num_latents": 4, "q_lora_rank": 12, "latent_scale": "sqrt", "v_head_dim": 6}),
    "gla_q": ("grouped_latent", SMALL | {"q_lora_rank": 24, "group_queries": True}),
    "gla_q_sqrt": ("grouped_latent", SMALL | {"q_lora_rank": 12, "group_queries": True, "latent_scale": "sqrt"}),
    "gla_bias": ("grouped_latent", SMALL | {"latent_bias": True}),
    "gla_q_4_bias": (
        "grouped_latent",
        SMALL | {"num_latents": 4, "q_lora_rank": 12, "group_queries": True, "latent_bias": True},
    ),
    "mlra_4": ("low_rank_blocks", SMALL),
    "mlra_4_unscaled_bias": ("low_rank_blocks", SMALL | {"q_lora_rank": 12, "latent_scale": "none", "latent_bias": True}),
    "mlra_4_gated": ("low_rank_blocks", SMALL | {"q_lora_rank": 24, "output_gate": True}),
    "mlra_2": ("low_rank_blocks", SMALL | {"branches": 2, "v_head_dim": 6}),
    "mlra_2_query_latent_gated": ("low_rank_blocks", SMALL | {"branches": 2, "q_lora_rank": 24, "output_gate": True}),
    "gta_1": ("grouped_tied", {"num_kv_heads": 1}),
    "gta_2": ("grouped_tied", {"num_kv_heads": 2}),
    "gta_4": ("grouped_tied", {"num_kv_heads": 4}),
    "gta_2_quarter_rope": ("grouped_tied", {"num_kv_heads": 2, "qk_rope_head_dim": 2}),
    "gta_2_all_rope": ("grouped_tied", {"num_kv_heads": 2, "qk_rope_head_dim": 8}),
    "gta_1_wide": ("grouped_tied", {"num_kv_heads": 1, "head_dim": 10, "qk_rope_head_dim": 4}),
}
TRANSCRIPTIONS = {
    "grouped_latent": paper_grouped_latent,
    "low_rank_blocks": paper_low_rank_blocks,
    "grouped_tied": paper_grouped_tied,
}


def tokens(batch=1):
    return np.random.default_rng(0).normal(size=(batch, LENGTH, D_MODEL)).astype(np.float32).astype(np.float64)


def with_parameters(name, settings, params):
    """A mixer with the parameters of another, whose names and shapes must be its own. Compiles nothing."""
    shapes = nnx.eval_shape(Row(name, settings).mixer)
    assert jax.tree.map(jnp.shape, models.parameters(shapes)) == jax.tree.map(jnp.shape, params)
    return models.with_parameters(nnx.graphdef(shapes), jax.tree.map(jnp.asarray, params))


def single(mixer):
    """Its parameters as numpy arrays, which are the caller's to change."""
    return jax.tree.map(np.array, models.parameters(mixer))


def outputs(x, *mixers):
    """Of mixers that differ in parameters alone, which are one program."""
    graph = nnx.graphdef(mixers[0])
    call = jax.jit(lambda params, x: models.with_parameters(graph, params)(x))
    return [np.asarray(call(models.parameters(mixer), x), np.float64) for mixer in mixers]


def run(mixer, x):
    return outputs(x, mixer)[0]


def assert_close(found, expected):
    close(found, expected, EXACT, unit=True)


@pytest.mark.parametrize(("name", "settings"), PAPERS.values(), ids=PAPERS)
def test_equals_the_papers_equations(name, settings):
    mixer, x = Row(name, settings).mixer(), tokens()
    expected = TRANSCRIPTIONS[name](mixer, np.asarray(x[0], np.float64))
    if name == "grouped_tied":
        assert_close(run(mixer, x)[0], expected)
        return
    for form in BOTH_FORMS:
        mixer.config = dataclasses.replace(mixer.config, attend=form)
        assert_close(run(mixer, x)[0], expected)


# ------------------------------------------------------------------------------------- what the definitions reduce to


@pytest.mark.parametrize(
    "settings",
    [
        {"rope_interleaved": False},
        {"rope_interleaved": True, "q_lora_rank": 12, "latent_bias": True, "latent_scale": "sqrt", "attend": "absorbed"},
    ],
    ids=["plain", "all"],
)
def test_one_latent_is_mla(settings):
    settings = SMALL | settings
    one = settings | {"num_latents": 1, "group_queries": "q_lora_rank" in settings}
    mixer, x = Row("grouped_latent", one).mixer(), tokens(2)
    np.testing.assert_array_equal(run(mixer, x), run(with_parameters("mla", settings, single(mixer)), x))


def block_diagonal(kernel, count):
    """[rows of a piece, all columns] as the matrix [count x rows, all columns] that it is a short form of."""
    rows, width = kernel.shape[0], kernel.shape[1] // count
    whole = np.zeros((count * rows, kernel.shape[1]))
    for j in range(count):
        cut = slice(j * width, (j + 1) * width)
        whole[j * rows : (j + 1) * rows, cut] = kernel[:, cut]
    return whole


@pytest.mark.parametrize(("form", "group_queries"), [("expanded", False), ("absorbed", True)])
def test_an_mla_of_block_diagonal_up_projections_and_a_norm_per_block_is_the_same(form, group_queries):
    settings = SMALL | {"q_lora_rank": 12, "attend": form}
    mixer, x = Row("grouped_latent", settings | {"group_queries": group_queries}).mixer(), tokens(2)
    params = single(mixer)
    ups = [params["key_up"], params["value_up"], *([params["query"]["up"]] if group_queries else [])]
    for up in ups:
        up["kernel"] = block_diagonal(up["kernel"], 2)
    whole = with_parameters("mla", settings | {"rope_interleaved": False}, params)

    def norm_per_block(gains):
        def norm(c):
            halves = zip(jnp.split(c, 2, axis=-1), np.split(gains, 2), strict=True)
            return jnp.concatenate([h / jnp.sqrt(jnp.mean(h * h, -1, keepdims=True) + 1e-6) * g for h, g in halves], -1)

        return norm

    whole.kv_norm = norm_per_block(params["kv_norm"]["scale"])
    if group_queries:
        whole.query.norm = norm_per_block(params["query"]["norm"]["scale"])
    assert_close(run(mixer, x), jax.jit(lambda x: whole(x))(x))


@pytest.mark.parametrize("form", BOTH_FORMS)
def test_a_group_of_heads_has_no_gradient_in_the_other_groups_latent(form):
    """Neither in c_1 nor, with the query latent cut too, in the weights that make the first half of c_Q."""
    settings = SMALL | {"q_lora_rank": 12, "group_queries": True, "latent_bias": True, "attend": form}
    mixer, x = Row("grouped_latent", settings).mixer(), tokens()
    graph, params = nnx.graphdef(mixer), models.parameters(mixer)
    positions, mask = jnp.arange(LENGTH, dtype=jnp.int32)[None], contiguous_mask(1, LENGTH)

    @jax.jit
    def gradients(params, entries):
        def of_group(params, entries, group):
            mixer = models.with_parameters(graph, params)
            heads = mixer.attend(mixer.queries(x, positions), entries, mask)
            return jnp.sum(jnp.split(heads, 2, axis=-1)[group] ** 2)

        return [jax.grad(of_group, (0, 1))(params, entries, group) for group in range(2)]

    for group, (in_params, in_entries) in enumerate(gradients(params, mixer.entries(x, positions))):
        query_down = jnp.split(in_params["query"]["down"]["kernel"], 2, axis=-1)
        for own, other in [
            (in_entries.c_kv[:, :, group], in_entries.c_kv[:, :, 1 - group]),
            (query_down[group], query_down[1 - group]),
        ]:
            assert np.all(other == 0) and np.any(own != 0)
        assert np.any(in_entries.k_rope != 0)  # which both groups read


def partial_rope_gqa(tied):
    """The grouped-query mixer whose keys are [x W_KR ; first channels of u] and whose values are u.

    It rotates the first channels of a head, the tied one the last, so queries and keys are written in that order.
    """
    d_h, d_r, groups = tied.head_dim, tied.head_dim - tied.nope_dim, tied.num_kv_heads
    settings, params = {"num_kv_heads": groups, "head_dim": d_h, "rope_fraction": d_r / d_h}, single(tied)

    def rope_first(kernel, heads, rope=None):
        by_head = kernel.reshape(D_MODEL, heads, d_h)
        rope = by_head[..., d_h - d_r :] if rope is None else np.repeat(rope[:, None], heads, axis=1)
        return {"kernel": np.concatenate([rope, by_head[..., : d_h - d_r]], axis=-1).reshape(D_MODEL, -1)}

    u, k_r = params.pop("tied"), params.pop("rope_down")
    params["query"] = rope_first(params["query"]["kernel"], HEADS)
    return with_parameters("gqa", settings, params | {"key": rope_first(u["kernel"], groups, k_r["kernel"]), "value": u})


@pytest.mark.parametrize("settings", [{"num_kv_heads": 1}, {"num_kv_heads": 2, "qk_rope_head_dim": 2}, {"num_kv_heads": 4}])
def test_grouped_tied_is_a_partial_rope_gqa_of_tied_weights(settings):
    mixer, x = Row("grouped_tied", settings).mixer(), tokens(2)
    assert_close(run(mixer, x), run(partial_rope_gqa(mixer), x))


def test_the_key_without_position_is_the_value_bit_for_bit():
    mixer, seen, x = Row("grouped_tied", {"num_kv_heads": 2}).mixer(), {}, tokens()
    softmax = mixer.softmax

    def spy(queries, keys, values, mask, scale):
        seen.update(keys=keys, values=values)
        return softmax(queries, keys, values, mask, scale)

    mixer.softmax = spy
    mixer(x)
    np.testing.assert_array_equal(seen["keys"][0], seen["values"][..., : HEAD // 2])
    # and the value is all of x W_KV, never rotated
    np.testing.assert_array_equal(seen["values"], mixer.tied(x).reshape(1, LENGTH, 2, HEAD))


def part(mixer, *blocks):
    """The grouped-latent mixer that holds these blocks of a low_rank_blocks mixer, and the heads that read them: one softmax
    a head, no sum over branches."""
    config, rank = mixer.config, mixer.config.kv_lora_rank // 4
    served = config.branches * HEADS // 4  # heads that read a block
    readers = [block * served + place for block in blocks for place in range(served)]  # as the up-projections count them
    settings = {"num_heads": len(readers), "num_latents": len(blocks), "kv_lora_rank": len(blocks) * rank}
    settings |= {"latent_scale": "sqrt", "qk_nope_head_dim": HEAD} | {
        name: getattr(config, name) for name in ("q_lora_rank", "qk_rope_head_dim", "attend")
    }
    given = single(mixer)

    def heads(kernel, of, width, axis=-1):
        """The heads `of`, each `width` neighbouring channels along an axis."""
        return np.concatenate([np.take(kernel, range(i * width, (i + 1) * width), axis) for i in of], axis)

    channels = np.concatenate([np.arange(b * rank, (b + 1) * rank) for b in blocks])
    rope = np.arange(4 * rank, 4 * rank + config.qk_rope_head_dim)
    asking = [i % HEADS for i in readers]
    query = given["query"]["up"]
    query["kernel"] = heads(query["kernel"], asking, HEAD + config.qk_rope_head_dim)
    given["kv_down"]["kernel"] = given["kv_down"]["kernel"][:, np.concatenate([channels, rope])]
    given["kv_norm"]["scale"] = given["kv_norm"]["scale"][channels]
    for up in ("key_up", "value_up"):
        given[up]["kernel"] = heads(given[up]["kernel"], readers, HEAD)
    given["out"]["kernel"] = heads(given["out"]["kernel"], asking, HEAD, axis=0)
    return with_parameters("grouped_latent", settings, given)


MLRA = SMALL | {"q_lora_rank": 12}


@pytest.mark.parametrize("form", BOTH_FORMS)
def test_mlra_2_is_a_sum_of_two_grouped_latents(form):
    mixer, x = Row("low_rank_blocks", MLRA | {"branches": 2, "attend": form}).mixer(), tokens(2)
    assert_close(run(mixer, x), 2**-0.5 * sum(outputs(x, part(mixer, 0, 1), part(mixer, 2, 3))))


@pytest.mark.parametrize("branches", [2, 4])
def test_four_devices_with_one_block_each_add_up_to_the_whole(branches):
    """A device has its block, the up-projections and queries of the heads that read it, and their rows of W_O."""
    mixer, x = Row("low_rank_blocks", MLRA | {"branches": branches}).mixer(), tokens(2)
    partial = outputs(x, *(part(mixer, block) for block in range(4)))
    assert_close(run(mixer, x), branches**-0.5 * sum(partial))
    assert all(np.sqrt(np.mean(np.square(y))) > 0.1 for y in partial)


def test_mlra_4_of_identical_blocks_is_twice_one_branch():
    params, rank, wide = single(Row("low_rank_blocks", MLRA).mixer()), 5, HEADS * HEAD
    down = params["kv_down"]["kernel"]
    params["kv_down"]["kernel"] = np.concatenate([np.tile(down[:, :rank], 4), down[:, 4 * rank :]], axis=1)
    params["kv_norm"]["scale"] = np.tile(params["kv_norm"]["scale"][:rank], 4)
    for up in ("key_up", "value_up"):
        params[up]["kernel"] = np.tile(params[up]["kernel"][:, :wide], 4)
    mixer, x = with_parameters("low_rank_blocks", MLRA, params), tokens(2)
    # One branch of one block is MLA with its latent times sqrt(width / rank).
    one = MLRA | {"kv_lora_rank": rank, "latent_scale": "sqrt", "rope_interleaved": False}
    assert_close(run(mixer, x), 2 * run(with_parameters("mla", one, single(part(mixer, 0))), x))


# ---------------------------------------------------------------------------------------------------------------- sizes


def abstract_mixer(config):
    """The first layer's mixer, of shapes."""
    return cache_bytes.abstract_model(config, 8).blocks[0].mixer


def class_124m(variant, settings, **model):
    """d_model 768, 12 heads, an MHA FFN of 2048; in one layer or as many as the pattern has."""
    layers = len(configs.parse_pattern(variant))
    return configs.create(variant, settings, model={"d_model": 768, "num_layers": layers, "num_heads": 12} | model)


LATENT_124M = {"kv_lora_rank": 256, "q_lora_rank": 512, "qk_rope_head_dim": 32}
TPA, TPA_KV = {"rank_q": 6, "rank_k": 2, "rank_v": 2}, {"rank_q": 0, "rank_k": 2, "rank_v": 2}
MFA = {"head_dim": 128, "q_lora_rank": 512}

# variant, settings, attention parameters of a layer (norm gains of latents included), those gains, FFN width that makes up
# for the difference to MHA.
LADDER = {
    "MHA": ("mha", {}, 2_359_296, 0, 2048),
    "GQA-4": ("gqa", {"num_kv_heads": 4}, 1_572_864, 0, 2389),
    "MQA": ("mqa", {}, 1_277_952, 0, 2517),
    "MLA": ("mla", LATENT_124M, 2_188_032, 768, 2122),
    "GLA-2": ("grouped_latent", LATENT_124M, 1_991_424, 768, 2208),
    "GLA_q-2": ("grouped_latent", LATENT_124M | {"group_queries": True}, 1_696_512, 768, 2336),
    "MLRA-2": ("low_rank_blocks", LATENT_124M | {"branches": 2}, 1_991_424, 768, 2208),
    "MLRA-4": ("low_rank_blocks", LATENT_124M, 2_188_032, 768, 2122),
    "GTA-4": ("grouped_tied", {"num_kv_heads": 4}, 1_400_832, 0, 2464),
    "TPA 6/2/2": ("tensor_product", TPA, 1_173_504, 0, 2563),
    "TPA K/V-only": ("tensor_product", TPA_KV, 1_413_120, 0, 2459),
    "MFA": ("multi_matrix", MFA, 2_556_416, 512, 1962),
}


@pytest.mark.parametrize(("variant", "settings", "attention", "gains", "width"), LADDER.values(), ids=LADDER)
def test_attention_parameters_of_the_124m_class(variant, settings, attention, gains, width):
    """By the papers' formulas; without biases, every vector is a norm gain."""
    config = class_124m(variant, settings, mlp_multiple=1)
    params = models.parameters(abstract_mixer(config))
    assert models.count(params) == attention
    assert models.count([a for a in jax.tree.leaves(params) if len(a.shape) == 1]) == gains
    sizes = models.sizes(config, 50_304)
    assert (sizes.attention, sizes.mlp_width) == (attention, width)


ELEMENTS = {
    "MHA": ("mha", {}, 1536),
    "GQA-4": ("gqa", {"num_kv_heads": 4}, 512),
    "TPA, 34 heads": ("tensor_product", TPA | {"num_heads": 34, "head_dim": 64}, 392),
    "TPA K/V-only, 22 heads": ("tensor_product", TPA_KV | {"num_heads": 22, "head_dim": 64}, 344),
    "TPA, 12 heads": ("tensor_product", TPA, 304),
    "TPA K/V-only, 12 heads": ("tensor_product", TPA_KV, 304),
    "MLA": ("mla", LATENT_124M, 288),
    "GLA-2": ("grouped_latent", {"q_lora_rank": 512}, 288),  # 2 latents of 2 d_h by default
    "GLA_q-2": ("grouped_latent", {"q_lora_rank": 512, "group_queries": True}, 288),
    "MLRA-2": ("low_rank_blocks", LATENT_124M | {"branches": 2}, 288),
    "MLRA-4": ("low_rank_blocks", LATENT_124M, 288),
    "GTA-4": ("grouped_tied", {"num_kv_heads": 4}, 288),
    "MFA": ("multi_matrix", MFA, 256),
    "CLA2 GQA-4": ("gqa/2", {"num_kv_heads": 4}, 256),
    "MQA": ("mqa", {}, 128),
    "MFA-KR": ("multi_matrix_kr", MFA, 128),
    "CLA2 MQA": ("mqa/2", {}, 64),
}


@pytest.mark.parametrize(("variant", "settings", "elements"), ELEMENTS.values(), ids=ELEMENTS)
def test_elements_a_token_and_layer_of_the_124m_class(variant, settings, elements):
    """Counted in the arrays of a cache, none of which belongs to a layer that reads another's."""
    config = class_124m(variant, settings)
    model = cache_bytes.abstract_model(config, 8)  # shapes only; its cache is made of arrays
    held = jax.tree.leaves(model.init_cache(2, 3).content())
    assert sum(array.size for array in held) == 2 * 3 * len(model.blocks) * elements
    assert cache_bytes.formula_growth(config) == len(model.blocks) * elements * 4


# variant, settings, FFN width, million parameters (2505.21487, appendix). Latents have biases, as in the released code.
GLA, GLA_Q = {"latent_bias": True}, {"latent_bias": True, "group_queries": True}
TOTALS = {
    "183M MHA": ("mha", {}, 2048, "183.45"),
    "183M GQA-4": ("gqa", {"num_kv_heads": 4}, 2392, "183.53"),
    "183M MQA": ("mqa", {}, 2520, "183.53"),
    "183M GTA-4": ("grouped_tied", {"num_kv_heads": 4}, 2462, "183.40"),
    "183M MLA": ("mla", {"latent_bias": True}, 2128, "183.65"),
    "183M GLA-2": ("grouped_latent", GLA, 2208, "183.51"),
    "183M GQA-4, width of MHA": ("gqa", {"num_kv_heads": 4}, 2048, "174.0"),
    "183M MQA, width of MHA": ("mqa", {}, 2048, "170.5"),
    "183M MLA, width of MHA": ("mla", {"latent_bias": True}, 2048, "181.4"),
    "433M GLA_q-2": ("grouped_latent", GLA_Q, 3280, "433.89"),
}
SHAPES = {
    "183M": {"d_model": 768, "num_layers": 12, "num_heads": 12},
    "433M": {"d_model": 1024, "num_layers": 24, "num_heads": 16},
}


@pytest.mark.parametrize("name", TOTALS)
def test_published_totals(name):
    """d_c = 4 d_h, d_q = 8 d_h and d_r = 32 in all of them; a vocabulary of 128,256, tied."""
    variant, settings, width, millions = TOTALS[name]
    shape = SHAPES[name.split()[0]]
    if "latent_bias" in settings:
        head = shape["d_model"] // shape["num_heads"]
        settings = settings | {"kv_lora_rank": 4 * head, "q_lora_rank": 8 * head, "qk_rope_head_dim": 32}
    config = configs.create(variant, settings, model=shape | {"mlp_width": width, "match_parameters": False})
    total = models.sizes(config, 128_256).total
    assert f"{total / 1e6:.{len(millions.split('.')[1])}f}" == millions
    if name == "183M GLA-2":
        assert models.count(models.parameters(cache_bytes.abstract_model(config, 128_256))) == total


def test_cutting_the_query_latent_saves_what_the_published_ffn_gained():
    """GLA_q-2 at 433M: 3152 -> 3280 is exactly half of W_UQ (2505.21487)."""
    shape = SHAPES["433M"] | {"match_parameters": False}
    settings = {"q_lora_rank": 512, "kv_lora_rank": 256, "latent_bias": True}
    totals = [
        models.sizes(configs.create("grouped_latent", settings | cut, model=shape | {"mlp_width": width}), 128_256).total
        for cut, width in [({}, 3152), ({"group_queries": True}, 3280)]
    ]
    assert totals[0] == totals[1]
