"""Mechanisms whose queries choose what they read: against the published rule in numpy, and where they are full attention."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from fla_naive import modeling, naive
from flax import nnx
from helpers import EXACT, close
from matrix import D_MODEL, HEADS, Row

from mla import model as models
from mla.attention.contract import Step
from mla.attention.softmax.evidence import Observed
from mla.attention.sparse.base import slots_at
from mla.cache import eviction
from mla.cache.evicted import EvictedCache, Eviction
from mla.cache.meter import content_bytes
from mla.errors import UserError
from mla.model import parameters, with_parameters
from mla.ops.attention import attention_shares
from mla.ops.indexer import best, best_by_index, chosen_scores, divergence, index_scores
from mla.ops.mask import Mask

pytestmark = pytest.mark.usefixtures("float64")

LENGTH = 37  # no whole number of blocks


def text(length: int = LENGTH, seed: int = 3) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(2, length, D_MODEL)))


def outputs(mixer: Any, x: jax.Array) -> np.ndarray:
    graph, state = nnx.split(mixer)
    return np.asarray(jax.jit(lambda state, x: nnx.merge(graph, state)(x))(state, x))


def with_config(mixer: Any, **changes: Any) -> Any:
    """A mixer with the same parameters and other settings that make none."""
    config = dataclasses.replace(mixer.config, **changes)
    return with_parameters(
        nnx.graphdef(nnx.eval_shape(lambda: type(mixer)(config, mixer.around, rngs=nnx.Rngs(0)))), parameters(mixer)
    )


def as_other(mixer: Any, name: str, settings: dict[str, Any]) -> Any:
    """Another mechanism with the parameters of this one, as many as it has."""
    other = nnx.eval_shape(Row(name, settings).mixer)
    given, wanted = parameters(mixer), parameters(other)
    return with_parameters(nnx.graphdef(other), {key: given[key] for key in wanted})


# ------------------------------------------------------------------------------------------------------------------- base


def test_the_best_are_chosen_first_and_of_equal_ones_the_earliest() -> None:
    scores = jnp.asarray([1.0, 3.0, 3.0, -2.0, 3.0, 9.0])
    visible = jnp.asarray([True] * 5 + [False])
    np.testing.assert_array_equal(best(scores, visible, 2), [1, 2])
    np.testing.assert_array_equal(best(scores, visible, 9), [1, 2, 4, 0, 3, -1])
    assert best(scores[:0], visible[:0], 3).shape == (0,)


def test_entries_are_found_by_where_they_stand() -> None:
    positions = jnp.asarray([[-1, -1, 4, 5, 6], [0, 1, 2, -1, -1], [-1] * 5], jnp.int32)
    wanted = jnp.asarray([[3, 4, 6, 7], [0, 2, -1, -5], [-1, -1, -1, -1]], jnp.int32)
    np.testing.assert_array_equal(slots_at(wanted, positions), [[1, 2, 4, -1], [0, 2, -1, -1], [-1] * 4])


# --------------------------------------------------------------------------------------------------------- block_mixture

MOBA = {"block": 8, "top_k": 3}


def moba(q: np.ndarray, k: np.ndarray, v: np.ndarray, size: int, top_k: int) -> np.ndarray:
    """The published rule, one head and query at a time: q [T, H, D], k and v [T, K, D]."""
    out, (length, heads, width) = np.zeros_like(q), q.shape
    for t, h in np.ndindex(length, heads):
        group = h * k.shape[1] // heads
        blocks = range(t // size + 1)
        gate = {i: q[t, h] @ k[i * size : (i + 1) * size, group].mean(axis=0) for i in blocks}
        gate[t // size] = np.inf
        chosen = sorted(blocks, key=lambda i: (-gate[i], i))[:top_k]
        tokens = [s for i in chosen for s in range(i * size, min((i + 1) * size, t + 1))]
        logits = k[tokens, group] @ q[t, h] / width**0.5
        weights = np.exp(logits - logits.max())
        out[t, h] = weights / weights.sum() @ v[tokens, group]
    return out


def test_block_mixture_is_the_published_rule() -> None:
    mixer: Any = Row("block_mixture", MOBA).mixer()
    x, positions = text(), jnp.arange(LENGTH, dtype=jnp.int32)[None]
    q, (k, v) = mixer.queries(x, positions), mixer.entries(x, positions)
    rows = zip(*map(np.asarray, (q, k, v)), strict=True)
    heads = np.stack([moba(*row, size=8, top_k=3) for row in rows])
    close(outputs(mixer, x), mixer.out(jnp.asarray(heads.reshape(2, LENGTH, -1))), EXACT, unit=True)
    full = outputs(as_other(mixer, "gqa", {"num_kv_heads": 2}), x)
    assert np.max(np.abs(outputs(mixer, x) - full)) > 0.1 * np.std(full), "nothing was left out"


@pytest.mark.parametrize(
    "settings,other",
    [
        ({"block": 8, "top_k": 5}, ("gqa", {})),  # as many blocks as there are
        ({"block": 50, "top_k": 1}, ("gqa", {})),  # one block for all
        ({"block": 8, "top_k": 1}, ("chunked", {"chunk": 8, "unit_norm": False})),
    ],
)
def test_block_mixture_reduces(settings: dict[str, Any], other: tuple[str, dict[str, Any]]) -> None:
    """To full attention, and with the own block alone to attention within blocks."""
    mixer = Row("block_mixture", settings).mixer()
    close(outputs(mixer, text()), outputs(as_other(mixer, *other), text()), EXACT, unit=True)


def test_of_blocks_with_equal_means_the_earliest_is_read() -> None:
    """A text of one token repeated, without rotation: all blocks score alike."""
    mixer: Any = Row("block_mixture", MOBA | {"rope_fraction": 0.0}).mixer()
    x, positions = jnp.broadcast_to(text(1), (2, 40, D_MODEL)), jnp.arange(40, dtype=jnp.int32)[None]
    memory, queries = mixer.remember(x, positions)[0], mixer.queries(x, positions)
    memory = dataclasses.replace(memory, beside=memory.beside._replace(means=jnp.ones_like(memory.beside.means)))
    chosen = mixer.choose(x, positions, queries, memory, memory.mask(jnp.broadcast_to(positions, (2, 40))))
    np.testing.assert_array_equal(chosen[0, 39, 0], [*range(32, 40), *range(16)])


@pytest.mark.parametrize("kv_heads,length", [(4, 3), (4, 36), (4, 40), (2, 37)])
def test_block_mixture_reads_what_it_says(kv_heads: int, length: int) -> None:
    """Counted from the choices of the last token: exactly, and for shared key heads as if no two heads chose alike."""
    mixer: Any = Row("block_mixture", MOBA | {"num_kv_heads": kv_heads}).mixer()
    x, positions = text(length), jnp.arange(length, dtype=jnp.int32)[None]
    cache = mixer.init_cache(2, length, jnp.float64)
    memory, after = mixer.remember(x, jnp.broadcast_to(positions, (2, length)), cache)
    mask = memory.mask(jnp.full((2, 1), length - 1, jnp.int32))
    chosen = np.asarray(mixer.choose(x[:, -1:], None, mixer.queries(x[:, -1:], positions[:, -1:]), memory, mask))[:, 0]
    pairs = [len({int(i) for i in row if 0 <= i < length}) for row in chosen.reshape(2 * kv_heads, -1)]
    said = mixer.reads(length)["key"]
    assert max(pairs) <= said and (kv_heads < 4 or set(pairs) == {said})
    token, blocks = 2 * 8 * 8, length // 8 * 8 * 8
    assert mixer.read_bytes(after) == 2 * kv_heads * (said * token + blocks + 8 * 8)
    assert mixer.read_bytes(after) <= content_bytes(after)
    abstract = jax.eval_shape(functools.partial(mixer.init_cache, 2, length, jnp.float64))
    assert mixer.read_bytes(abstract) == mixer.read_bytes(after)


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"block": 0}, "mechanism.block: 0 is not a positive number of tokens"),
        ({"top_k": 0}, "mechanism.top_k: 0 is below 1, the block that a query stands in"),
        ({"window": 9}, "mechanism.window: blocks are chosen from the whole text"),
    ],
)
def test_refused_sizes_of_block_mixture(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Row("block_mixture", settings).mixer()


def test_block_mixture_takes_codecs_of_single_tokens_only() -> None:
    mixer = Row("block_mixture", MOBA).mixer()
    assert mixer.codecs("int8")["mean"] is not None
    with pytest.raises(UserError, match="where a layer finds tokens by where they stand"):
        mixer.codecs("kivi4")


# ------------------------------------------------------------------------------------------------------- deepseek_sparse

DSA = {"kv_lora_rank": 20, "qk_rope_head_dim": 4, "q_lora_rank": 24, "top_k": 9, "index_head_dim": 10, "index_heads": 3}


def at(progress: float) -> Step:
    return Step(jnp.asarray(progress), jnp.asarray(progress - 0.1), jax.random.key(0))


def test_the_indexer_chooses_as_that_of_fla() -> None:
    """Of the entries that a query sees, in blocks of queries as at once. So many heads that hardly any entry scores 0."""
    draw = np.random.default_rng(0)
    q, k, w = (draw.normal(size=shape) for shape in ((2, LENGTH, 9, 6), (2, LENGTH, 6), (2, LENGTH, 9)))
    positions = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), (2, LENGTH))
    arrays = jnp.asarray(q), jnp.asarray(w * 6**-0.5), jnp.asarray(k)
    found = best_by_index(*arrays, Mask(positions, positions), 7)
    theirs = naive("dsa").naive_dsa_indexer(*map(torch.tensor, (q, k, w)), topk=7, activation="relu").numpy()
    np.testing.assert_array_equal(np.sort(found, axis=-1), np.sort(theirs, axis=-1))
    picked = jnp.maximum(found, 0)
    close(
        chosen_scores(*arrays, picked), np.take_along_axis(np.asarray(index_scores(*arrays)), picked, -1), EXACT, unit=True
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mla.ops.indexer._SCORES", 5 * LENGTH)
        np.testing.assert_array_equal(best_by_index(*arrays, Mask(positions, positions), 7), found)


def v32(mixer: Any) -> tuple[Any, Any]:
    """The attention of transformers' DeepSeek-V3.2 with the weights of a mixer, in float64, and its rotary embedding."""
    module, weights = modeling("deepseek_v32"), parameters(mixer)
    settings = mixer.config
    config = module.DeepseekV32Config(
        hidden_size=D_MODEL,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        kv_lora_rank=settings.kv_lora_rank,
        q_lora_rank=settings.q_lora_rank,
        qk_rope_head_dim=settings.qk_rope_head_dim,
        qk_nope_head_dim=8,
        v_head_dim=8,
        index_n_heads=settings.index_heads,
        index_head_dim=settings.index_head_dim,
        index_topk=settings.top_k,
        attention_bias=False,
        attention_dropout=0.0,
        attn_implementation="eager",
        rms_norm_eps=1e-6,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )
    theirs = module.DeepseekV32Attention(config, 0).double().eval()
    key, value = (weights[name]["kernel"].reshape(-1, HEADS, 8) for name in ("key_up", "value_up"))
    for name, ours in {
        "q_a_proj.weight": weights["query"]["down"]["kernel"].T,
        "q_a_layernorm.weight": weights["query"]["norm"]["scale"],
        "q_b_proj.weight": weights["query"]["up"]["kernel"].T,
        "kv_a_proj_with_mqa.weight": weights["kv_down"]["kernel"].T,
        "kv_a_layernorm.weight": weights["kv_norm"]["scale"],
        "kv_b_proj.weight": jnp.concatenate([key, value], axis=-1).reshape(key.shape[0], -1).T,
        "o_proj.weight": weights["out"]["kernel"].T,
        "indexer.wq_b.weight": weights["index_query"]["kernel"].T,
        "indexer.wk.weight": weights["index_key"]["kernel"].T,
        "indexer.k_norm.weight": weights["index_norm"]["scale"],
        "indexer.k_norm.bias": weights["index_norm"]["bias"],
        "indexer.weights_proj.weight": weights["index_weight"]["kernel"].T,
    }.items():
        parameter = theirs.get_parameter(name)
        assert parameter.shape == ours.shape, name
        with torch.no_grad():
            parameter.copy_(torch.tensor(np.asarray(ours)))
    return theirs, module.DeepseekV32RotaryEmbedding(config).double()


def test_deepseek_sparse_is_the_attention_of_v32() -> None:
    """With so many index heads that hardly any entry scores 0: torch takes any of those."""
    mixer: Any = Row("deepseek_sparse", DSA | {"index_heads": 9}).mixer()
    theirs, rotary = v32(mixer)
    x = text()
    tokens, where = torch.tensor(np.asarray(x)), torch.arange(LENGTH)[None]
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()[None, None].expand(2, 1, -1, -1)
    mask = torch.zeros(2, 1, LENGTH, LENGTH, dtype=torch.float64).masked_fill(~mask, float("-inf"))
    with torch.no_grad():
        expected = theirs(hidden_states=tokens, position_embeddings=rotary(tokens, where), attention_mask=mask)[0].numpy()
    # The rotary embedding's angles are fp32, and so is their softmax.
    close(outputs(mixer, x), expected, 1e-4, unit=True)
    full = outputs(as_other(mixer, "mla", {k: v for k, v in DSA.items() if "index" not in k and k != "top_k"}), x)
    assert np.max(np.abs(expected - full)) > 0.1 * np.std(full), "nothing was left out"


def test_with_enough_choices_it_is_mla() -> None:
    """Exactly: nothing is chosen, so nothing is gathered; and one choice fewer leaves the last query one entry fewer."""
    mixer = Row("deepseek_sparse", DSA | {"top_k": LENGTH}).mixer()
    x, full = text(), {k: v for k, v in DSA.items() if "index" not in k and k != "top_k"}
    dense = outputs(as_other(mixer, "mla", full), x)
    np.testing.assert_array_equal(outputs(mixer, x), dense)
    nearly = outputs(with_config(mixer, top_k=LENGTH - 1), x)
    close(nearly[:, :-1], dense[:, :-1], EXACT, unit=True)
    assert np.max(np.abs(nearly[:, -1] - dense[:, -1])) > 1e-3


@pytest.mark.parametrize("progress", [0.0, 0.5], ids=["dense", "sparse"])
def test_each_loss_trains_its_own(progress: float) -> None:
    """No gradient of an output in the indexer, none of the indexer's loss in anything else: exactly."""
    mixer: Any = Row("deepseek_sparse", DSA | {"dense_steps": 0.2}).mixer()
    graph, x = nnx.graphdef(mixer), text()

    @jax.jit
    def gradients(point: Any) -> Any:
        def both(point: Any) -> Any:
            made = with_parameters(graph, point["mixer"]).forward(point["x"], step=at(progress))
            return jnp.stack([jnp.sum(made.y**2), jnp.mean(made.losses["index"])]), made

        return jax.jacrev(both, has_aux=True)(point)

    slopes, made = gradients({"mixer": parameters(mixer), "x": x})
    for path, slope in jax.tree.leaves_with_path(slopes):
        of_output, of_loss = np.abs(np.asarray(slope)).reshape(2, -1).max(axis=1)
        indexer = "index_" in jax.tree_util.keystr(path)
        assert (of_output == 0) == indexer and (of_loss == 0) == (not indexer), jax.tree_util.keystr(path)
    plain = outputs(with_config(mixer, top_k=LENGTH) if progress < 0.2 else mixer, x)
    close(made.y, plain, EXACT, unit=True)


@pytest.mark.parametrize("progress", [0.0, 0.5], ids=["dense", "sparse"])
def test_the_loss_is_the_divergence_from_attention(progress: float) -> None:
    """By the definition, in numpy: over all entries while attention is dense, over the chosen ones after that."""
    mixer: Any = Row("deepseek_sparse", DSA | {"dense_steps": 0.2, "attend": "expanded"}).mixer()
    x, where = text(), jnp.arange(LENGTH, dtype=jnp.int32)[None]
    found = np.asarray(mixer.forward(x, step=at(progress)).losses["index"])
    memory, queries = mixer.remember(x)[0], mixer.queries(x, where)
    mask = memory.mask(jnp.broadcast_to(where, x.shape[:2]))
    seen = mixer.expanded(queries, memory.entries, mask)
    logits = sum(
        np.einsum("bshd,bchd->bshc", q, np.broadcast_to(k, (*k.shape[:2], HEADS, k.shape[3])))
        for q, k in zip(seen.queries, seen.keys, strict=True)
    )
    asked = mixer.index(x, where)
    scores = np.asarray(index_scores(asked.queries, asked.weights, memory.entries.k_index[:, :, 0]))
    chosen = np.asarray(mixer.choose(x, where, queries, memory, mask))[:, :, 0]
    for b, t in np.ndindex(2, LENGTH):
        rows = list(range(t + 1)) if progress < 0.2 else [s for s in chosen[b, t] if s >= 0]
        p = np.exp(logits[b, t][:, rows] * seen.scale)
        p = (p / p.sum(axis=-1, keepdims=True)).mean(axis=0)
        q = np.exp(scores[b, t, rows]) / np.exp(scores[b, t, rows]).sum()
        close(found[b, t], np.sum(p * np.log(p / q)), EXACT, f"query {t}")
    assert (found > -1e-12).all() and found.mean() > 0.1
    uniform = jnp.asarray(np.log(p))[None, None]
    close(divergence(jnp.asarray(p)[None, None] * 3, uniform + 7, jnp.ones_like(uniform, bool)), 0.0, 1e-12)


def test_shares_are_mean_weights() -> None:
    """Under caps and sinks, of all entries and of chosen ones."""
    draw = np.random.default_rng(0)
    q, k = (jnp.asarray(draw.normal(size=(2, 9, heads, 6))) for heads in (4, 2))
    positions = jnp.broadcast_to(jnp.arange(9, dtype=jnp.int32), (2, 9))
    options = {"scale": 0.4, "soft_cap": 2.0, "sink": jnp.asarray(draw.normal(size=4))}
    found = attention_shares((q,), (k,), Mask(positions, positions), **options)
    logits = np.einsum("bshd,bchd->bshc", q, np.repeat(k, 2, axis=2)) * 0.4
    weights = np.exp(2 * np.tanh(logits / 2)) * np.tril(np.ones((9, 9)))[None, :, None]
    weights /= weights.sum(axis=-1, keepdims=True) + np.exp(np.asarray(options["sink"]))[:, None]
    close(found, weights.mean(axis=2), EXACT, unit=True)
    everything = jnp.broadcast_to(jnp.arange(9, dtype=jnp.int32), (2, 9, 1, 9))
    of_chosen = attention_shares((q,), (k,), Mask(positions, positions, chosen=everything), **options)
    close(of_chosen, found, EXACT, unit=True)


def test_ties_are_broken_by_the_text_where_entries_stand_in_several_forms() -> None:
    """Many entries score 0. Under KIVI a prompt's tokens are there raw and coded, out of the order of the text."""
    mixer: Any = Row("deepseek_sparse", DSA | {"index_heads": 2}).mixer()
    graph, state = nnx.split(mixer)
    extend = jax.jit(lambda state, x, p, c: nnx.merge(graph, state).extend(x, p, c))
    x, found = text(), []
    for size in (LENGTH, 1):
        cache, pieces = mixer.init_cache(2, LENGTH, jnp.float64, mixer.plan("kivi4:16")), []
        for start in range(0, LENGTH, size):
            where = jnp.broadcast_to(jnp.arange(start, start + size, dtype=jnp.int32), (2, size))
            y, cache = extend(state, x[:, start : start + size], where, cache)
            pieces.append(y)
        found.append(np.concatenate(pieces, axis=1))
    close(found[1], found[0], EXACT, unit=True)


def test_policies_are_shown_attention_to_what_was_chosen() -> None:
    """Evidence for eviction: of the last three queries, nothing that they did not choose, and 1 a query and head in all."""
    mixer: Any = Row("deepseek_sparse", DSA | {"top_k": 4}).mixer()
    x, where = text(12), jnp.broadcast_to(jnp.arange(12, dtype=jnp.int32), (2, 12))
    memory = mixer.remember(x, where)[0]
    shape = EvictedCache.empty(mixer.streams(), 2, 0, jnp.float64, Eviction(eviction.policy("tova"), 4, "both"), 1, {})
    cache = shape.extend(memory.entries, where)[1]
    columns = np.asarray(Observed(mixer, x, where, memory, cache, where, 0).columns(3))
    chosen = np.asarray(mixer.choose(x, where, mixer.queries(x, where), memory, memory.mask(where)))[:, -3:]
    for b in range(2):
        left_out = np.setdiff1d(np.arange(12), chosen[b])
        assert len(left_out) and not columns[b][:, left_out].any()
    close(columns.sum(axis=-1), 3.0, EXACT)


def test_layers_may_read_the_index_keys_of_another_layer(tiny: Any) -> None:
    """With an indexer of their own: its queries and weights; its loss is of the entries that it reads."""
    config = tiny("deepseek_sparse/2", model={"num_layers": 2})
    model = nnx.eval_shape(lambda: models.create(config, 50))
    reader: Any = model.blocks[1].mixer
    assert not hasattr(reader, "index_key") and reader.index_query is not None
    tokens, graph = jax.ShapeDtypeStruct((2, 16), jnp.int32), nnx.graphdef(model)
    said = jax.eval_shape(lambda p, x: with_parameters(graph, p).forward(x, step=at(0.5))[1], parameters(model), tokens)
    losses = [each["index"] for each in said.losses if each]
    assert len(losses) == 2 and all(loss.shape == (2, 16) for loss in losses)


def test_deepseek_sparse_reads_all_index_keys_and_the_chosen_latents() -> None:
    mixer: Any = Row("deepseek_sparse", DSA).mixer(jnp.bfloat16)
    for length in (5, 9, 100):
        cache = jax.eval_shape(functools.partial(mixer.init_cache, 1, length, jnp.bfloat16))
        assert mixer.read_bytes(cache) == 2 * (10 * length + (20 + 4) * min(9, length))


def test_an_index_key_of_v32_is_132_bytes() -> None:
    """128 channels in fp8 and a scale, after a Hadamard rotation that changes no product."""
    wide = Row("deepseek_sparse", DSA | {"index_head_dim": 128, "kv_lora_rank": 512, "qk_rope_head_dim": 64}).mixer(
        jnp.bfloat16
    )
    plan = wide.plan("c_kv=latent_fp8,k_rope=bf16,k_index=hadamard+fp8")
    cache = jax.eval_shape(lambda: wide.init_cache(1, 10, jnp.bfloat16, plan))
    assert content_bytes(cache) == 10 * (656 + 132)
    assert wide.read_bytes(cache) == 10 * 132 + 9 * 656


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"top_k": 0}, "mechanism.top_k: 0 is not a positive number"),
        ({"index_head_dim": 2}, "mechanism.index_head_dim: 2 is below qk_rope_head_dim 4"),
        ({"dense_steps": 1.5}, "mechanism.dense_steps: 1.5 is no share of the steps, from 0 to 1"),
        ({"dense_steps": 0.0, "freeze": True}, "mechanism.freeze: is of the dense steps, and dense_steps is 0"),
    ],
)
def test_refused_sizes_of_deepseek_sparse(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Row("deepseek_sparse", DSA | settings).mixer()
