"""DeepSeek-V4's compressed attention, in its two forms: against transformers' layers, by the rule, and what is refused."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from fla_naive import modeling
from flax import nnx
from helpers import EXACT, close
from matrix import D_MODEL, HEADS, INDEX, V4, Row

from mla.attention.contract import Step
from mla.cache.meter import content_bytes
from mla.errors import UserError
from mla.layers.compressor import Compressor, Pool
from mla.model import parameters, with_parameters

pytestmark = pytest.mark.usefixtures("float64")

LENGTH = 37  # no whole number of windows
FORMS = {
    "heavily_compressed_attention": Row("compressed", V4 | {"stride": 5, "q_lora_rank": 12}),
    # So many index heads that hardly any entry scores 0: torch takes any of those.
    "compressed_sparse_attention": Row(
        "compressed_sparse",
        V4 | INDEX | {"stride": 3, "top_k": 4, "index_heads": 9, "q_lora_rank": 12},
    ),
    "sliding_attention": Row("compressed", V4 | {"stride": 0, "q_lora_rank": 12}),
}


def text(length: int = LENGTH, seed: int = 3) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(2, length, D_MODEL)))


def outputs(mixer: Any, x: jax.Array) -> np.ndarray:
    graph, state = nnx.split(mixer)
    return np.asarray(jax.jit(lambda state, x: nnx.merge(graph, state)(x))(state, x))


def compressor_names(prefix: str, ours: str) -> dict[str, str]:
    """Names of a compressor of theirs -> of ours."""
    pairs = {"kv_proj.weight": "value/kernel", "gate_proj.weight": "weight/kernel", "position_bias": "bias"}
    return {f"{prefix}.{theirs}": f"{ours}/{own}" for theirs, own in (pairs | {"kv_norm.weight": "norm/scale"}).items()}


def v4(kind: str, mixer: Any) -> tuple[Any, Any]:
    """The attention of transformers' DeepSeek-V4 of one kind with the weights of a mixer, in float64, and its rotary
    embedding; every layer turns at the same base."""
    module, settings = modeling("deepseek_v4"), mixer.config
    config = module.DeepseekV4Config(
        hidden_size=D_MODEL,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        head_dim=settings.head_dim,
        q_lora_rank=settings.q_lora_rank,
        o_groups=settings.out_groups,
        o_lora_rank=settings.out_rank,
        sliding_window=settings.window,
        layer_types=[kind],
        mlp_layer_types=["moe"],
        compress_rates={
            "compressed_sparse_attention": settings.stride or 1,
            "heavily_compressed_attention": settings.stride or 1,
        },
        index_n_heads=getattr(settings, "index_heads", 1),
        index_head_dim=getattr(settings, "index_head_dim", 4),
        index_topk=getattr(settings, "top_k", 1),
        partial_rotary_factor=settings.qk_rope_head_dim / settings.head_dim,
        rope_theta=1e4,
        compress_rope_theta=1e4,
        rms_norm_eps=1e-6,
        max_position_embeddings=512,
        attention_dropout=0.0,
        attn_implementation="eager",
    )
    theirs = module.DeepseekV4Attention(config, 0).double().eval()
    names = {
        "q_a_proj.weight": "query/down/kernel",
        "q_a_norm.weight": "query/norm/scale",
        "q_b_proj.weight": "query/up/kernel",
        "kv_proj.weight": "kv/kernel",
        "kv_norm.weight": "kv_norm/scale",
        "o_b_proj.weight": "out/up/kernel",
        "sinks": "sink",
    }
    if settings.stride:
        names |= compressor_names("compressor", "compressor")
    if "sparse" in kind:
        names |= compressor_names("compressor.indexer", "index_compressor")
        names |= {"compressor.indexer.q_b_proj.weight": "index_query/kernel"}
        names |= {"compressor.indexer.scorer.weights_proj.weight": "index_weight/kernel"}
    weights = {"/".join(key.key for key in path): leaf for path, leaf in jax.tree.leaves_with_path(parameters(mixer))}
    given = {theirs: np.asarray(weights.pop(ours)) for theirs, ours in names.items()}
    given["o_a_proj.weight"] = np.asarray(weights.pop("out/down")).swapaxes(1, 2).reshape(-1, HEADS * 10 // 2)
    assert not weights, weights.keys()
    parameters_of_theirs = dict(theirs.named_parameters())
    assert parameters_of_theirs.keys() == given.keys(), parameters_of_theirs.keys() ^ given.keys()
    with torch.no_grad():
        for name, parameter in parameters_of_theirs.items():
            value = given[name].T if name.endswith("proj.weight") and name != "o_a_proj.weight" else given[name]
            assert parameter.shape == value.shape, name
            parameter.copy_(torch.tensor(value.copy()))
    return theirs, module.DeepseekV4RotaryEmbedding(config).double()


@pytest.mark.parametrize("kind", FORMS)
def test_it_is_the_attention_of_v4(kind: str) -> None:
    mixer: Any = FORMS[kind].mixer()
    theirs, rotary = v4(kind, mixer)
    x = text()
    tokens, where = torch.tensor(np.asarray(x)), torch.arange(LENGTH)[None]
    distance = where[0][:, None] - where[0]
    seen = (distance >= 0) & (distance < mixer.config.window)
    mask = torch.zeros(2, 1, LENGTH, LENGTH, dtype=torch.float64).masked_fill(~seen, float("-inf"))
    turns = {name: rotary(tokens, where, layer_type=name) for name in ("main", "compress")}
    with torch.no_grad():
        expected = theirs(tokens, turns, where.expand(2, -1), mask)[0].numpy()
    # Rotations and the softmax over tokens are fp32 there.
    close(outputs(mixer, x), expected, 1e-5, unit=True)


@pytest.mark.parametrize("overlap", [False, True])
def test_entries_are_those_of_the_rule_in_pieces_of_any_size(overlap: bool) -> None:
    """In numpy, a window at a time; logits large and small, so that running maxima change; an unequal row of padding."""
    m, width, batch = 4, 6, 2
    make: dict[str, Any] = {"rngs": nnx.Rngs(0), "dtype": jnp.float64}
    part = Compressor(D_MODEL, width, m, overlap=overlap, eps=1e-6, **make)
    draw = np.random.default_rng(1)
    part.bias[...] = jnp.asarray(draw.normal(size=part.bias[...].shape) * 20, jnp.float32)
    graph, state = nnx.split(part)
    pooled = jax.jit(lambda state, *given: nnx.merge(graph, state)(*given))
    x = text()
    values, logits = (np.asarray(each(x)) for each in (part.value, part.weight))
    logits = logits + np.tile(np.asarray(part.bias[...]), (LENGTH // m + 1, 1))[:LENGTH]
    for b in range(batch):
        rule = []
        for i in range(LENGTH // m):
            own, before = slice(i * m, (i + 1) * m), slice(max(i - 1, 0) * m, i * m)
            z, c = logits[b, own, -width:], values[b, own, -width:]
            if overlap and i:
                z = np.concatenate([logits[b, before, :width], z])
                c = np.concatenate([values[b, before, :width], c])
            p = np.exp(z - z.max(axis=0))
            e = np.sum(p / p.sum(axis=0) * c, axis=0)
            rule.append(e / np.sqrt(np.mean(e**2) + 1e-6))
        for sizes, piece in (([LENGTH], LENGTH + 2), ([3, 9, 1, 2, 14, 8], 16), ([1] * LENGTH, 1)):
            start, open_, entries = 0, None, []
            for size in sizes:
                ahead = 0 if size % 2 else piece - size  # else behind the tokens
                stands = np.full((1, piece), -1, np.int32)
                stands[0, ahead : ahead + size] = np.arange(start, start + size)
                tokens = jnp.where((stands >= 0)[..., None], x[b, np.maximum(stands, 0)], 7.0)
                done = pooled(state, tokens, jnp.asarray(stands), open_)
                open_, start = done.open, start + size
                entries += [e for e, end in zip(done.entries[0], done.ends[0], strict=True) if end >= 0]
            close(np.stack(entries), np.stack(rule), EXACT, f"pieces of {sizes[:3]}")


def test_an_empty_pool_adds_nothing_however_low_the_others_logits() -> None:
    nothing = Pool(*(jnp.zeros(3) for _ in range(3)))
    some = Pool(jnp.asarray([-900.0, 0.0, 900.0]), jnp.ones(3), jnp.arange(3.0))
    for one, other in ((nothing, some), (some, nothing)):
        for found, expected in zip(one.joined(other), some, strict=True):
            np.testing.assert_array_equal(found, expected)
    slope = jax.grad(lambda v: jnp.sum(nothing.joined(some._replace(values=v)).values))(some.values)
    np.testing.assert_array_equal(slope, jnp.ones(3))


@pytest.mark.parametrize("kind", ["heavily_compressed_attention", "compressed_sparse_attention"])
def test_an_entry_knows_nothing_of_later_tokens(kind: str) -> None:
    mixer: Any = FORMS[kind].mixer()
    stride, x = mixer.config.stride, text()
    cut = 3 * stride + 1
    other = x.at[:, cut:].add(1.0)
    graph, state = nnx.split(mixer)
    windows = jax.jit(lambda state, x: nnx.merge(graph, state).remember(x)[0].beside)
    first, second = windows(state, x), windows(state, other)
    for a, b in zip(first.entries, second.entries, strict=True):
        np.testing.assert_array_equal(a[:, :3], b[:, :3])
        assert not np.array_equal(a[:, 3:], b[:, 3:])


def test_with_enough_choices_every_entry_is_read() -> None:
    """As many as there are, and one fewer: the last queries read one fewer."""
    settings = V4 | INDEX | {"stride": 3, "q_lora_rank": 12}
    many, all_, few = (Row("compressed_sparse", settings | {"top_k": k}).mixer() for k in (90, LENGTH // 3, LENGTH // 3 - 1))
    x = text()
    found, dense = outputs(few, x), outputs(many, x)
    close(outputs(all_, x), dense, EXACT, unit=True)
    last = LENGTH // 3 * 3 - 1  # the token that ends the last window
    close(found[:, :last], dense[:, :last], EXACT, unit=True)
    assert np.max(np.abs(found[:, last:] - dense[:, last:])) > 1e-3


@pytest.mark.parametrize("progress", [0.0, 0.5], ids=["dense", "sparse"])
def test_each_loss_trains_its_own(progress: float) -> None:
    """No gradient of an output in the indexer, none of the indexer's loss in anything else: exactly."""
    settings = {"stride": 3, "top_k": 4, "dense_steps": 0.2}
    mixer: Any = Row("compressed_sparse", V4 | INDEX | settings).mixer()
    graph, x = nnx.graphdef(mixer), text()
    step = Step(jnp.asarray(progress), jnp.asarray(progress - 0.1), jax.random.key(0))

    @jax.jit
    def gradients(point: Any) -> Any:
        def both(point: Any) -> Any:
            made = with_parameters(graph, point["mixer"]).forward(point["x"], step=step)
            return jnp.stack([jnp.sum(made.y**2), jnp.mean(made.losses["index"])]), made

        return jax.jacrev(both, has_aux=True)(point)

    slopes, made = gradients({"mixer": parameters(mixer), "x": x})
    for path, slope in jax.tree.leaves_with_path(slopes):
        of_output, of_loss = np.abs(np.asarray(slope)).reshape(2, -1).max(axis=1)
        indexer = "index_" in jax.tree_util.keystr(path)
        assert (of_output == 0) == indexer and (of_loss == 0) == (not indexer), jax.tree_util.keystr(path)
    mixer.config.top_k = 90 if progress < 0.2 else 4
    close(made.y, outputs(mixer, x), EXACT, unit=True)
    assert (np.asarray(made.losses["index"]) > -1e-12).all() and float(jnp.mean(made.losses["index"])) > 1e-3


def test_parameters_and_bytes_of_the_published_layers() -> None:
    """DeepSeek-V4-Flash: totals by the report's sizes, and what is held and read after a million tokens, in bf16."""
    d, c, heads, rank, groups, out, window = 4096, 512, 64, 1024, 8, 1024, 128
    common = d * rank + rank + rank * heads * c + d * c + c + heads * c * out + groups * out * d + heads
    flash = {"window": window, "head_dim": c, "qk_rope_head_dim": 64, "out_groups": groups, "out_rank": out}
    around: dict[str, Any] = {"d_model": d, "num_heads": heads, "dtype": jnp.bfloat16}
    tokens = 2**20
    for name, settings, more, held, read in (
        ("compressed", {"stride": 0}, 0, 0, 0),
        ("compressed", {"stride": 128}, 2 * d * c + 128 * c + c, tokens // 128 * c * 2 + 4 * 3 * c, None),
        (
            "compressed_sparse",
            {"stride": 4, "top_k": 512, "index_heads": 64, "index_head_dim": 128},
            4 * d * c + 8 * c + c + 4 * d * 128 + 8 * 128 + 128 + rank * 64 * 128 + d * 64,
            tokens // 4 * (c + 128) * 2 + 4 * 6 * (c + 128),
            tokens // 4 * 128 * 2 + 512 * c * 2 + 4 * 6 * (c + 128),
        ),
    ):
        row = Row(name, flash | settings | {"q_lora_rank": rank})
        config, cls = row.config(), row.of[1]
        config.validate(row.around(**around))
        mixer = nnx.eval_shape(lambda cls=cls, config=config, row=row: cls(config, row.around(**around), rngs=nnx.Rngs(0)))
        assert sum(leaf.size for leaf in jax.tree.leaves(parameters(mixer))) == common + more
        cache = jax.eval_shape(lambda mixer=mixer: mixer.init_cache(1, tokens, jnp.bfloat16))
        assert content_bytes(cache) == window * c * 2 + held
        assert mixer.read_bytes(cache) == window * c * 2 + (held if read is None else read)


def test_entries_and_index_keys_take_codecs() -> None:
    """Of each vector by itself; 132 bytes an index key of 128 channels."""
    row = Row("compressed_sparse", V4 | {"stride": 4, "index_head_dim": 128})
    mixer = row.mixer(jnp.bfloat16)
    plain, coded = (
        jax.eval_shape(lambda spec=spec: mixer.init_cache(1, 64, jnp.bfloat16, mixer.plan(spec)))
        for spec in ("none", "k_index=hadamard+fp8")
    )
    assert content_bytes(plain) - content_bytes(coded) == 16 * (2 * 128 - 132)
    with pytest.raises(UserError, match="entries are gone before they are coded"):
        mixer.codecs("kivi2")


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("compressed", {"window": 0}, "mechanism.window: 0 is not a positive number of tokens"),
        ("compressed", {"stride": -1}, "mechanism.stride: -1 is below 0, which means no compressed entries"),
        ("compressed", {"qk_rope_head_dim": 12}, "mechanism.qk_rope_head_dim: 12 is not an even number of channels"),
        ("compressed", {"out_groups": 3}, "mechanism.out_groups: 3 does not divide the 4 heads"),
        ("compressed", {"soft_cap": 3.0}, "mechanism.soft_cap: logits are not capped here"),
        ("compressed_sparse", {"stride": 0}, "mechanism.stride: 0 is not a positive number of tokens"),
        ("compressed_sparse", {"top_k": 0}, "mechanism.top_k: 0 is not a positive number"),
        ("compressed_sparse", {"index_head_dim": 2}, "mechanism.index_head_dim: 2 is below qk_rope_head_dim 4"),
    ],
)
def test_refused_sizes(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Row(name, V4 | settings).mixer()
