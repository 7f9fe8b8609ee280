"""Evaluation against brute force, formulas written anew, broken caches, and the promised shape of eval.json."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
from flax import nnx
from helpers import close
from jax.sharding import Mesh

from mla import config as configs
from mla import model as models
from mla import workdir as workdirs
from mla.attention.contract import constant
from mla.attention.recurrent.linear import LinearConfig
from mla.attention.softmax.grouped_query import GQAConfig
from mla.attention.softmax.mla import MLAConfig
from mla.cache import meter
from mla.cache import tokens as token_caches
from mla.data.prepared import Split, prepare, unigram_perplexity
from mla.errors import UserError
from mla.evaluation import cache_bytes, decoding, perplexity, speed
from mla.evaluation.evaluate import evaluate_model, sample_text
from mla.evaluation.sample import Sampling
from mla.report import frontier, plot, rates
from mla.report import text as report
from mla.report.points import points
from mla.report.rows import read_rows
from mla.report.tables import markdown_table, text_table
from mla.sharding import AXES, cache_shardings, make_mesh, shardings
from tests.programs import status
from tests.rows import make_row, typed

ROOT = Path(__file__).resolve().parent.parent
VOCAB = 29


def mesh(data: int = 1, tensor: int = 1) -> Mesh:
    return Mesh(np.asarray(jax.devices()[: data * tensor]).reshape(data, 1, tensor), AXES)


def build(
    variant: str = "mla", settings: dict[str, Any] | None = None, vocab: int = VOCAB, **fields: Any
) -> tuple[Any, Any]:
    """A config, and a model whose weights are large enough that what it attends to matters."""
    model = {"d_model": 16, "num_layers": 1, "num_heads": 2, "match_parameters": False} | fields.pop("model", {})
    config = configs.create(variant, settings, model=model, **({"context": 12} | fields))
    configs.validate(config)
    made = models.create(config, vocab)
    louder = jax.tree.map(lambda p: p * 2 if p.ndim > 1 else p, models.parameters(made))
    return config, models.with_parameters(nnx.graphdef(made), louder)


def split(length: int, vocab: int = VOCAB) -> Split:
    draw = np.random.default_rng(length)
    tokens = draw.integers(0, vocab, length).astype(np.uint16)
    counts = draw.integers(0, 4, length).astype(np.uint16)
    return Split("validation", tokens, counts, 1, int(counts.sum()))


def brute_force(model: models.Model, part: Split, context: int, limit: int) -> tuple[float, int, int]:
    """Mean nats, tokens and bytes: one window at a time, no padding, no batch, float64."""
    losses, num_bytes, start = [], 0, 0
    forward = jax.jit(model.__call__)
    while start + 1 < len(part.tokens) and (not limit or start < limit):
        stop = min(start + context, len(part.tokens) - 1, limit or start + context)
        logits = np.asarray(forward(jnp.asarray(part.tokens[start:stop], jnp.int32)[None])[0], np.float64)
        for t in range(start, stop):
            row = logits[t - start]
            losses.append(math.log(sum(math.exp(v - row.max()) for v in row)) + row.max() - row[part.tokens[t + 1]])
            num_bytes += int(part.byte_counts[t + 1])
        start = stop
    return math.fsum(losses) / len(losses), len(losses), num_bytes


# -------------------------------------------------------------------------------------------------------------- perplexity


@pytest.mark.parametrize(
    ("length", "limit", "batch"), [(2, 0, 3), (13, 0, 2), (14, 0, 2), (25, 0, 1), (66, 0, 2), (66, 40, 2), (66, 24, 64)]
)
def test_every_token_but_the_first_is_predicted_once(length: int, limit: int, batch: int) -> None:
    config, model = build(eval={"tokens": limit, "batch_size": batch}, settings={"kv_lora_rank": 6, "qk_rope_head_dim": 4})
    part = split(length)
    found = perplexity.measure(config, model, mesh(), part)
    loss, tokens, num_bytes = brute_force(model, part, config.context, limit)
    assert (found.tokens, found.num_bytes) == (tokens, num_bytes)
    assert found.tokens == min(length - 1, limit or length)
    rounded = 40 * np.finfo(np.float32).eps / 2 * loss  # logits in fp32, through two layers
    close(found.loss, loss, rounded)
    close(found.loss_cached, loss, rounded)
    close(found.perplexity, math.exp(loss), relative=1e-5)
    if num_bytes:
        close(found.bits_per_byte, loss * tokens / math.log(2) / num_bytes, relative=1e-5)


@pytest.mark.parametrize(("limit", "weighted"), [(0, False), (20, False), (0, True)])
def test_losses_by_document_add_up(limit: int, weighted: bool) -> None:
    config, model = build(eval={"tokens": limit}, settings={"kv_lora_rank": 6, "qk_rope_head_dim": 4})
    part, end = split(40), 3
    part.tokens[:] = np.where(part.tokens == end, 4, part.tokens)
    part.tokens[[0, 7, 8, 21]] = end  # the first document has one token, which is not predicted, and the third none before
    if weighted:
        part = dataclasses.replace(part, weights=np.linspace(0, 2, 40).astype(np.float32) * (np.arange(40) % 3 > 0))
    found = perplexity.measure(config, model, mesh(), part, end_id=end)
    stops = [stop for stop in (7, 8, 21) if stop < (limit or 39)] + [limit or 39]
    if weighted:
        assert part.weights is not None
        weights = np.array([part.weights[a + 1 : b + 1].sum() for a, b in itertools.pairwise([0, *stops])])
        close(found.documents[0], weights[weights > 0], relative=1e-5)
    else:
        up_to = [0.0, *(loss * tokens for loss, tokens, _ in (brute_force(model, part, config.context, n) for n in stops))]
        assert found.documents[0].tolist() == np.diff([0, *stops]).tolist()
        close(found.documents[1], np.diff(up_to), 1e-5, relative=1e-5)
    close(found.documents[1].sum() / found.documents[0].sum(), found.loss, relative=1e-6)
    close(found.documents[2].sum() / found.documents[0].sum(), found.loss_cached, relative=1e-6)
    row = perplexity.summary(found)
    assert sum(row["documents"]["tokens"]) == pytest.approx(found.documents[0].sum(), rel=1e-9)
    assert len(perplexity.measure(config, model, mesh(), part).documents[0]) == 0


def test_many_documents_stand_together_with_their_neighbours() -> None:
    documents = np.arange(30.0).reshape(3, 10)
    assert perplexity.grouped(documents, 10) is documents
    groups = perplexity.grouped(documents, 4)  # 2, 3, 2 and 3 of them
    assert groups[0].tolist() == [0 + 1, 2 + 3 + 4, 5 + 6, 7 + 8 + 9]
    close(groups.sum(axis=1), documents.sum(axis=1))


@pytest.mark.parametrize(
    ("variant", "settings"),
    [
        ("mha", {}),
        ("gqa", {"num_kv_heads": 1}),
        ("mqa", {}),
        ("mla", {"kv_lora_rank": 6, "qk_rope_head_dim": 4, "attend": "absorbed"}),
        ("sliding_window", {"window": 5}),
        ("linear", {"chunk": 4}),
        ("sliding_window,mha", {"sliding_window": {"window": 5}}),
    ],
)
def test_both_losses_agree(variant: str, settings: dict[str, Any]) -> None:
    config, model = build(variant, settings, model={"num_layers": variant.count(",") + 1})
    found = perplexity.measure(config, model, mesh(), split(30))
    close(found.token_difference, 0.0, 5e-6)
    close(found.loss, found.loss_cached, 1e-6)


def test_both_losses_agree_in_bf16_and_on_a_mesh() -> None:
    settings = {"kv_lora_rank": 8, "qk_rope_head_dim": 4}
    config, model = build("mla", settings, model={"dtype": "bfloat16"})
    found = perplexity.measure(config, model, mesh(), split(30))
    assert 0 < found.token_difference < perplexity.TOKEN_FACTOR * perplexity.BF16_TOLERANCE
    assert abs(found.loss - found.loss_cached) < perplexity.BF16_TOLERANCE

    config, model = build("mla", settings)
    alone = perplexity.measure(config, model, mesh(), split(30))
    devices = mesh(data=2, tensor=2)
    params = models.parameters(model)
    placed = jax.device_put(params, shardings(params, models.axes(model), devices))
    spread = models.with_parameters(nnx.graphdef(model), placed)
    found = perplexity.measure(config, spread, devices, split(30))  # three windows: the batch is rounded up to four
    close((found.loss, found.loss_cached), (alone.loss, alone.loss_cached), 2e-6)
    assert found.tokens == alone.tokens == 29


@pytest.mark.parametrize("context", [*range(1, 41), 256, 1000])
def test_pieces_cover_a_window_and_end_in_single_tokens(context: int) -> None:
    pieces = perplexity.pieces(context)
    assert [start for start, _ in pieces] == [0, *(stop for _, stop in pieces[:-1])]
    assert pieces[-1][1] == context
    assert all(stop > start for start, stop in pieces)
    singles = max(1, context // 4)
    assert pieces[-singles:] == [(t, t + 1) for t in range(context - singles, context)]
    if context >= 32:  # a prefill of about half, then chunks of more than one token
        assert context // 2 <= pieces[0][1] < context * 0.6
        assert all(stop - start > 1 for start, stop in pieces[1:-singles])
        assert len(pieces) > singles + 2


def test_losses_in_chunks_are_the_losses() -> None:
    _, model = build()
    hidden = jax.random.normal(jax.random.key(0), (3, 7, 16))
    targets = jax.random.randint(jax.random.key(1), (3, 7), 0, VOCAB)
    logits = model.logits(hidden)
    expected = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), np.asarray(targets)[..., None], -1)[..., 0]
    for chunk in (1, 6, 20, 21):
        found = perplexity.token_losses(model, hidden, targets, chunk)
        close(found, expected, 1e-6, relative=1e-5)


def test_long_pieces_never_hold_all_logits() -> None:
    """The largest array of the compiled losses stays below batch x context x vocabulary."""
    vocab, batch, length, chunk = 5000, 4, 64, 32
    _, model = build(vocab=vocab)
    hidden = jax.ShapeDtypeStruct((batch, length, 16), jnp.float32)
    targets = jax.ShapeDtypeStruct((batch, length), jnp.int32)

    def temporaries(chunk: int) -> int:
        run = jax.jit(lambda h, t: perplexity.token_losses(model, h, t, chunk)).lower(hidden, targets).compile()
        return run.memory_analysis().temp_size_in_bytes

    assert temporaries(chunk) < batch * length * vocab * 4 / 2 < temporaries(batch * length)


# ---------------------------------------------------------------------------------------------------------- broken caches


def forgets_values(monkeypatch: pytest.MonkeyPatch) -> None:
    write = token_caches.write
    # Only what is decoded is lost, and only from arrays with heads: positions stay right.
    monkeypatch.setattr(token_caches, "write", lambda s, n, i: s if s.ndim > 2 and n.shape[1] == 1 else write(s, n, i))


def one_slot_late(monkeypatch: pytest.MonkeyPatch) -> None:
    write = token_caches.write
    monkeypatch.setattr(token_caches, "write", lambda s, n, i: write(s, n, i if s.ndim == 2 else i + 1))


def not_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    write = token_caches.write
    monkeypatch.setattr(token_caches, "write", lambda s, n, i: write(s, n, i) * (1 if s.ndim == 2 else jnp.nan))


@pytest.mark.parametrize("sabotage", [forgets_values, one_slot_late, not_a_number])
def test_a_broken_cache_fails_loudly(sabotage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config, model = build(settings={"kv_lora_rank": 6, "qk_rope_head_dim": 4})
    sabotage(monkeypatch)
    with pytest.raises(UserError) as error:
        perplexity.measure(config, model, mesh(), split(40))
    assert str(error.value).startswith("eval: the loss through the cache is")
    assert "\n" not in str(error.value)


def test_errors_that_cancel_in_the_mean_fail_too() -> None:
    found = perplexity.Perplexity(loss=2.0, loss_cached=2.0, token_difference=0.1, tokens=10, num_bytes=10)
    config, _ = build()
    with pytest.raises(UserError, match="broken"):
        perplexity.require_agreement(found, perplexity.tolerance(config), config)
    perplexity.require_agreement(dataclasses.replace(found, token_difference=1e-6), perplexity.tolerance(config), config)


def test_a_loss_that_is_not_finite_is_no_result() -> None:
    config, model = build()
    nothing = jax.tree.map(lambda p: p * jnp.nan, models.parameters(model))
    with pytest.raises(UserError, match="nan"):
        perplexity.measure(config, models.with_parameters(nnx.graphdef(model), nothing), mesh(), split(14))


# ------------------------------------------------------------------------------------------------------------- cache bytes

# variant, settings -> elements a token and layer; elements held whatever the length, and their bytes; d 16, 2 heads of 8.
SIZES = [
    ("mha", {}, 2 * 2 * 8, 0, 0),
    ("gqa", {"num_kv_heads": 1, "head_dim": 6}, 2 * 1 * 6, 0, 0),
    ("mqa", {}, 2 * 8, 0, 0),
    ("mla", {"kv_lora_rank": 10, "qk_rope_head_dim": 4, "v_head_dim": 6}, 14, 0, 0),
    ("mla", {"kv_lora_rank": 7, "qk_rope_head_dim": 0}, 7, 0, 0),
    ("sliding_window", {"window": 70, "num_kv_heads": 1}, 0, 70 * 2 * 8, None),
    ("linear", {}, 0, 2 * 8 * 9, 4),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("variant", "settings", "elements", "constant", "constant_itemsize"), SIZES)
def test_bytes_of_live_arrays(
    variant: str, settings: dict[str, Any], elements: int, constant: int, constant_itemsize: int | None, dtype: str
) -> None:
    layers, itemsize = 2, {"float32": 4, "bfloat16": 2}[dtype]
    config, model = build(variant, settings, model={"num_layers": layers, "dtype": dtype})
    found = cache_bytes.measure(config, model, mesh())
    assert found["bytes_per_token"] == found["bytes_per_token_formula"] == elements * layers * itemsize
    assert found["bytes_per_token_per_device"] == found["bytes_per_token"]
    assert found["elements_per_token_per_layer"] == elements
    assert found["constant_bytes"] == constant * layers * (constant_itemsize or itemsize)
    assert found["bookkeeping_bytes_per_token"] == (4 if elements else 0)  # one int32 position for all layers
    assert found["dtype"] == ("float32" if variant == "linear" else dtype)
    assert set(found["bytes_at"]) == {"12", "1024", "8192", "131072"} == set(found["read_bytes_per_step"])
    for length, held in found["bytes_at"].items():
        window = settings.get("window")
        expected = min(int(length), window) * constant // window * itemsize * layers if window else found["constant_bytes"]
        assert held == expected + elements * layers * itemsize * int(length)


def test_layers_that_grow_and_layers_that_do_not_add_up() -> None:
    config, model = build("sliding_window*2,mha", {"sliding_window": {"window": 5}}, model={"num_layers": 3})
    found = cache_bytes.measure(config, model, mesh())
    assert found["bytes_per_token"] == 2 * 16 * 4  # of one layer
    assert found["constant_bytes"] == 2 * 5 * 2 * 16 * 4
    assert found["elements_per_token_per_layer"] == pytest.approx(2 * 16 / 3)
    assert found["bytes_at"]["1024"] == found["constant_bytes"] + 1024 * found["bytes_per_token"]


def test_measured_caches_are_full() -> None:
    """Zeros allocated and never written would have the right size too."""
    _, model = build("sliding_window,mha", {"sliding_window": {"window": 5}}, model={"num_layers": 2})
    cache = cache_bytes.filled(model, mesh(), 40)
    assert all((slots.positions >= 0).all() for slots in cache.slots)
    assert sorted(slots.positions.shape[1] for slots in cache.slots) == [5, 40]
    assert all((jnp.abs(array).sum(axis=(0, *range(2, array.ndim))) > 0).all() for array in jax.tree.leaves(cache.content()))


@pytest.mark.parametrize(
    ("layers", "heads", "d_model", "rank", "q_rank", "expected"),
    [
        (60, 128, 5120, 512, 1536, 34_560),  # DeepSeek-V2
        (27, 16, 2048, 512, 0, 15_552),  # DeepSeek-V2-Lite
    ],
)
def test_deepseek_shapes_without_allocating(
    layers: int, heads: int, d_model: int, rank: int, q_rank: int, expected: int
) -> None:
    sizes = {"kv_lora_rank": rank, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "q_lora_rank": q_rank}
    shape = {"num_layers": layers, "num_heads": heads, "d_model": d_model, "dtype": "bfloat16", "match_parameters": False}
    config = configs.create("mla", sizes, model=shape)
    model = cache_bytes.abstract_model(config, 102_400)
    assert models.count(models.parameters(model)) > 1e9  # the whole model is there, as shapes
    assert cache_bytes.abstract_bytes_at(model, 131_072) == expected * 2 * 131_072  # bf16
    assert cache_bytes.formula_growth(config) == expected * 2


def test_bytes_per_device_say_what_a_mesh_cannot_split() -> None:
    devices = mesh(data=2, tensor=2)
    halves, whole = (
        cache_bytes.measure(*build(variant, settings), devices)
        for variant, settings in (("mha", {}), ("mla", {"kv_lora_rank": 8, "qk_rope_head_dim": 4}))
    )
    assert halves["bytes_per_token"] == 2 * 16 * 4
    assert halves["bytes_per_token_per_device"] == halves["bytes_per_token"] / 2  # one of two heads
    assert whole["bytes_per_token"] == whole["bytes_per_token_per_device"] == 12 * 4  # one latent for all heads


# Bytes of one token and layer on each of 1, 2 and 4 tensor-parallel devices, bf16.
# d 2048, 16 heads of 128: the 1.47B models of 2505.21487 (low_rank_blocks: 2603.02188 at the same latent).
AT_1471M = {
    "mha": ({}, (8192, 4096, 2048)),
    "gqa": ({"num_kv_heads": 4}, (2048, 1024, 512)),
    "grouped_tied": ({"num_kv_heads": 4}, (1152, 640, 384)),
    "mla": ({"kv_lora_rank": 512, "qk_rope_head_dim": 64}, (1152, 1152, 1152)),
    "grouped_latent": ({"num_latents": 2, "qk_rope_head_dim": 64}, (1152, 640, 640)),
    "low_rank_blocks": ({"kv_lora_rank": 512, "qk_rope_head_dim": 64}, (1152, 640, 384)),
}
# d 768, 12 heads of 64: the same formulas, (split part / devices + what every device holds) x 2 bytes.
AT_124M = {
    "mqa": ({}, (256, 256, 256)),
    "tensor_product": ({}, (608, 560, 536)),
    "multi_matrix": ({"head_dim": 128}, (512, 512, 512)),
    "multi_matrix_kr": ({"head_dim": 128}, (256, 256, 256)),
    "slim": ({}, (1536, 1536, 1536)),  # a head's value needs every head's key
}


@pytest.mark.parametrize("devices", [1, 2, 4])
@pytest.mark.parametrize("shape", [(2048, 16, AT_1471M), (768, 12, AT_124M)], ids=["1.47B", "124M"])
def test_published_bytes_per_device(shape: Any, devices: int) -> None:
    """Of live caches, placed on so many host devices by the rules that training and evaluation use."""
    d_model, heads, table = shape
    for variant, (settings, published) in table.items():
        sizes = {"d_model": d_model, "num_heads": heads, "num_layers": 1, "dtype": "bfloat16", "match_parameters": False}
        model = cache_bytes.abstract_model(configs.create(variant, settings, model=sizes), 61)

        def empty(model: Any = model) -> Any:
            return model.init_cache(1, 64)

        cache = jax.jit(empty, out_shardings=cache_shardings(jax.eval_shape(empty), mesh(tensor=devices)))()
        assert meter.content_bytes_per_device(cache) / 64 == published[[1, 2, 4].index(devices)], variant


def test_two_latents_decode_on_four_devices() -> None:
    """Each of them is held by two devices, and the losses are those of one device."""
    settings = {"qk_rope_head_dim": 4, "num_latents": 2}
    config, model = build("grouped_latent", settings, model={"num_heads": 4})
    four = mesh(tensor=4)
    params = models.parameters(model)
    params = jax.device_put(params, shardings(params, models.axes(model), four))
    placed = models.with_parameters(nnx.graphdef(model), params)
    found = cache_bytes.measure(config, placed, four)
    assert (found["bytes_per_token"], found["bytes_per_token_per_device"]) == ((2 * 8 + 4) * 4, (8 + 4) * 4)
    alone, split_up = (perplexity.measure(config, m, where, split(50)) for m, where in ((model, mesh()), (placed, four)))
    close(split_up.loss_cached, alone.loss_cached, 1e-5)


def test_bytes_that_are_not_the_formula_fail_loudly(monkeypatch: pytest.MonkeyPatch) -> None:
    config, model = build(settings={"kv_lora_rank": 6, "qk_rope_head_dim": 4})
    formula = MLAConfig.cache_formula

    def forgets_the_rotary_key(self: MLAConfig, around: Any) -> Any:
        return [dataclasses.replace(term, elements=self.kv_lora_rank) for term in formula(self, around)]

    monkeypatch.setattr(MLAConfig, "cache_formula", forgets_the_rotary_key)
    with pytest.raises(UserError, match="formula says"):
        cache_bytes.measure(config, model, mesh())

    config, model = build("gqa", {"num_kv_heads": 1})
    monkeypatch.setattr(GQAConfig, "kv_heads", lambda self, around: 2)
    with pytest.raises(UserError, match="formula says"):
        cache_bytes.measure(config, model, mesh())

    config, model = build("linear")  # what does not grow is compared too
    monkeypatch.setattr(LinearConfig, "cache_formula", lambda self, around: [constant(2 * 8 * 8)])
    with pytest.raises(UserError, match="after 64 tokens of linear holds 576 bytes a sequence, its formula says 512"):
        cache_bytes.measure(config, model, mesh())


# -------------------------------------------------------------------------------------------------------------------- speed


def test_speed_counts_all_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(speed.time, "perf_counter", lambda: float(next(clock)))  # each part takes a second
    config, model = build("mha", eval={"decode_batch": 3, "decode_tokens": 5})
    found = speed.measure(config, model, mesh(data=2))
    assert found == {"batch": 4, "context": 12, "prefill_tokens_per_second": 48.0, "tokens_per_second": 20.0}


def test_decoding_donates_its_cache() -> None:
    _, model = build("mha")
    decoder = decoding.Decoder(model, 1, 8, mesh())
    cache = decoder.empty()
    decoder.compiled(speed.greedy)(cache, np.zeros((1, 4), np.int32), decoding.positions(1, 0, 4))
    assert all(array.is_deleted() for array in jax.tree.leaves(cache.content()))


@pytest.mark.parametrize("variant", ["mha", "mla"])
def test_a_decode_step_copies_no_cache(variant: str) -> None:
    """One sequence, one token: what the program allocates is far smaller than the cache it was given."""
    _, model = build(variant)
    graph, state = nnx.split(model)
    cache = jax.eval_shape(lambda: model.init_cache(1, 4096))
    one = jax.ShapeDtypeStruct((1, 1), jnp.int32)

    def step(state: Any, cache: Any, tokens: Any, where: Any) -> Any:
        return speed.greedy(nnx.merge(graph, state), cache, tokens, where)

    program = jax.jit(step, donate_argnums=1).lower(state, cache, one, one).compile()
    assert program.memory_analysis().temp_size_in_bytes < meter.content_bytes(cache) / 3


# --------------------------------------------------------------------------------------------------------------- eval.json


def check_schema(row: dict[str, Any]) -> None:
    """The promised object, spelt out here independently of the code that writes it."""

    def whole(value: Any) -> bool:
        return type(value) is int

    def number(value: Any) -> bool:
        return type(value) in (int, float) and math.isfinite(value)

    def text(value: Any) -> bool:
        return type(value) is str and bool(value)

    lengths = {"1024": number, "8192": number, "131072": number}
    required: dict[str, Any] = {
        "schema": whole,
        "name": text,
        "mechanism": text,
        "seed": whole,
        "train_tokens": whole,
        "params": {"total": whole, "embedding": whole, "attention": whole, "mlp": whole},
        "loss": number,
        "perplexity": number,
        "bits_per_byte": number,
        "eval_tokens": whole,
        "eval_bytes": whole,
        "cache": {
            "dtype": text,
            "bytes_per_token": number,
            "bytes_per_token_formula": number,
            "elements_per_token_per_layer": number,
            "constant_bytes": number,
            "bookkeeping_bytes_per_token": number,
            "bytes_at": lengths,
            "read_bytes_per_step": lengths,
            "bytes_per_token_per_device": number,
        },
        "decode": {"batch": whole, "context": whole, "prefill_tokens_per_second": number, "tokens_per_second": number},
        "environment": {"jax": text, "flax": text, "device_kind": text, "device_count": whole, "python": text},
    }

    def check(value: Any, rule: Any, path: str) -> None:
        if callable(rule):
            assert rule(value), f"{path}: {value!r}"
            return
        assert isinstance(value, dict), path
        assert set(rule) <= set(value), f"{path}: without {set(rule) - set(value)}"
        for key, inner in rule.items():
            check(value[key], inner, f"{path}.{key}")

    check(row, required, "eval")
    assert row["schema"] == 1
    assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
    assert row["bits_per_byte"] == pytest.approx(row["loss"] * row["eval_tokens"] / math.log(2) / row["eval_bytes"])
    params = row["params"]
    assert params["embedding"] + params["attention"] + params["mlp"] <= params["total"]
    json.dumps(row, allow_nan=False)


def test_eval_json_of_a_model(tiny: Any) -> None:
    config = tiny("mha", seed=3, eval={"decode_tokens": 2, "tokens": 100})
    data = prepare(config.data)
    model = models.create(config, data.vocab_size)
    row = evaluate_model(config, model, mesh(), data, train_tokens=768, say=lambda line: None)
    check_schema(row)
    assert (row["name"], row["mechanism"], row["seed"], row["train_tokens"]) == ("mha", "mha", 3, 768)
    assert row["eval_tokens"] == 100
    assert row["eval_bytes"] == int(data.split("validation").byte_counts[1:101].sum())
    assert row["params"]["total"] == models.count(models.parameters(model))
    assert row["baseline"] == {"unigram_perplexity": unigram_perplexity(data)}
    assert row["corpus"]["sha256"] == data.sha256
    assert row["cache"]["bytes_at"]["16"] == 16 * row["cache"]["bytes_per_token"] == 16 * 2 * 16 * 4
    assert configs.from_dict(json.loads(json.dumps(row["config"]))) == config


def test_a_figure_that_was_not_measured_is_absent(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    silent = perplexity.Perplexity(loss=1.0, loss_cached=1.0, token_difference=0.0, tokens=3, num_bytes=0)
    config = tiny("mha", eval={"split": "train"})
    data = prepare(config.data)
    cache = {"bytes_per_token": 1, "bytes_per_token_formula": 1, "constant_bytes": 0, "dtype": "float32"}
    decode = {"prefill_tokens_per_second": 1.0, "tokens_per_second": 1.0, "batch": 1, "context": 1}
    monkeypatch.setattr(perplexity, "measure", lambda *_: silent)
    monkeypatch.setattr(cache_bytes, "measure", lambda *_: cache)
    monkeypatch.setattr(speed, "measure", lambda *_: decode)
    monkeypatch.setattr(speed, "decoder", lambda *_: None)
    model = cache_bytes.abstract_model(config, data.vocab_size)
    row = evaluate_model(config, model, mesh(), data, 0, say=lambda line: None)
    assert "bits_per_byte" not in row
    assert "baseline" not in row  # it is the validation split's


def test_the_three_commands_end_to_end(config_file: Path, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep.py"
    sweep.write_text(
        f"""
def get_runs(variant=""):
    yield "mla", "{config_file}:mla", {{"config.steps": 3, "config.eval.tokens": 64, "config.mesh.host_devices": 1}}, "x"
"""
    )
    work = tmp_path / "work"

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300)

    done = run("sweep.py", f"--config={sweep}", f"--workdir={work}")
    assert done.returncode == 0, done.stdout + done.stderr
    row = json.loads((work / "mla/eval.json").read_text())
    check_schema(row)
    assert (row["mechanism"], row["train_tokens"], row["eval_tokens"]) == ("mla", 3 * 8 * 16, 64)
    assert row["environment"]["device_count"] == 1
    assert [json.loads(line)["loss"] for line in (work / "results.jsonl").read_text().splitlines()] == [row["loss"]]
    assert str(work / "frontier.png") in done.stdout

    other = run("eval.py", f"--workdir={work}/mla", "--config.mesh.data=3", f"--out={tmp_path}/other.json")
    assert other.returncode == 1
    assert len(other.stderr.splitlines()) == 1 and "config.mesh" in other.stderr
    assert not (tmp_path / "other.json").exists()
    assert json.loads((work / "mla/eval.json").read_text()) == row

    # Trained on one device, read on the eight of this process.
    how = Sampling(tokens=5, temperature=0.0)
    (written,) = sample_text(work / "mla", workdirs.read_config(work / "mla"), "the cache", how)
    assert written.startswith("the cache") and len(written) > len("the cache")


# ---------------------------------------------------------------------------------------------------------------- frontier


ROWS = [
    make_row("mha", "heads", 1.30, 4096),
    make_row("gqa", "heads", 1.32, 2048),
    make_row("mla", "latent", 1.31, 1536),
    make_row("linear", "state", 1.45, 0, 65_536),
]


def test_points_stand_at_their_bytes() -> None:
    found = {point.label: point for point in points(typed(ROWS))}
    assert list(found) == ["linear", "mla", "gqa", "mha"]  # fewest bytes first
    assert (found["mha"].cache_bytes, found["mha"].amortised) == (4096, False)
    assert (found["linear"].cache_bytes, found["linear"].amortised) == (65_536 / 256, True)
    assert found["mla"].error is None
    assert found["mla"].perplexity == pytest.approx(math.exp(1.31))


def test_seeds_are_one_point_with_an_error() -> None:
    losses = (1.30, 1.33, 1.36)
    rows = [make_row(f"mla-s{seed}", "latent", loss, 1536, seed=seed) for seed, loss in enumerate(losses)]
    point: Any
    (point,) = points(typed(rows))
    assert point.label == "mla" and len(point.rows) == 3
    assert point.loss == pytest.approx(1.33)
    assert point.error == pytest.approx(0.03 / math.sqrt(3))  # stdev of 1.30, 1.33, 1.36 is 0.03
    (mark,) = plot.marks_of([point], perplexity.Quality.axes[0])
    assert mark.y == pytest.approx(math.exp(1.33))
    assert mark.bounds == pytest.approx((math.exp(1.33 - point.error), math.exp(1.33 + point.error)))
    assert "1.3300 ± 0.0173" in text_table(typed(rows)) and "mla (3 seeds)" in text_table(typed(rows))
    assert len(points(typed([*rows, make_row("mla-s9", "other", 1.0, 1, seed=9)]))) == 2


def test_table_says_each_number() -> None:
    lines = text_table(typed(ROWS)).splitlines()
    assert len({len(line.split()) for line in lines[2:]}) == 1 and len(lines) == 2 + len(ROWS)
    (mha,) = (line for line in lines if line.startswith("mha"))
    assert mha.split() == [
        *("mha", "heads", "1,000,000", "+0.10%", "1.3000", "3.669", "1.8755"),
        *("4,096", "4,096", "0", "33,554,432", "1,234"),
    ]
    without = {key: value for key, value in ROWS[0].items() if key not in ("decode", "bits_per_byte")}
    assert len(text_table(typed([without])).splitlines()[-1].split()) == len(mha.split()) - 2  # absent, not zero
    assert "| mha | heads | 1,000,000 |" in markdown_table(typed(ROWS))


def test_plot_shows_every_point_and_names_cover_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [*ROWS, *(make_row(f"mla-r{r}", "latent", 1.33 + 1 / r, 700 + 8 * r) for r in (30, 40, 50, 60))]
    boxes: dict[Any, Any] = {}
    markers: list[Any] = []
    lines: dict[str, list[np.ndarray]] = {}
    place = plot._place_labels

    def remember(canvas: Any, axes: Any, found: Any, colours: Any) -> None:
        place(canvas, axes, found, colours)
        boxes.update((text.get_text(), text.get_window_extent(canvas.get_renderer())) for text in axes.texts)
        for mark in found:
            markers.append((mark.point.label, axes.transData.transform((mark.x, mark.y))))
            lines.setdefault(mark.point.family, []).append(markers[-1][1])

    monkeypatch.setattr(plot, "_place_labels", remember)
    path = tmp_path / "plot.png"
    plot.draw(typed(rows), path)
    labels = {row["run"]: boxes[row["run"]] for row in rows}
    assert len(labels) == len(rows) == len(markers)
    for name, box in labels.items():
        assert not any(box.overlaps(other) for label, other in labels.items() if label != name), name
        assert not any(box.contains(*where) for _, where in markers), name
        for ends in lines.values():
            for a, b in itertools.pairwise(ends):
                assert not any(box.contains(*(a + (b - a) * t)) for t in np.linspace(0, 1, 200)), name

    image = matplotlib.image.imread(path)
    assert image.shape[0] > 600 and image.shape[1] > 900
    for colour, _, _ in plot.STYLES[:3]:  # one for each family
        wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        assert (np.abs(image[..., :3] - wanted).max(axis=-1) < 0.02).sum() > 50, colour


def test_report_draws_its_conclusions_from_the_rows() -> None:
    alone = report.report(typed(ROWS), command="python sweep.py --config=x", redraw="python -m y")
    assert "no standard error" in alone and "1 tokens per parameter" in alone
    assert "python sweep.py --config=x" in alone and "python -m y" in alone
    assert "27.5" in alone and "sha256 5ha" in alone and "every model is below it" in alone
    assert "in all 4 rows" in alone and "NOT" not in alone and "DIFFER" not in alone
    assert "at most 1.0e-07 nats" in alone

    seeded = [make_row(f"{n}-s{s}", n, b + s / 1e4, 64, seed=s) for n, b in (("a", 1.0), ("b", 1.5)) for s in range(3)]
    text = report.report(typed(seeded))
    assert "means over at least 3 seeds" in text and "no standard error" not in text
    assert "No neighbours in loss are that close" in text
    tied = [row | {"loss": 1.0 + row["seed"] / 10} for row in seeded]
    assert "Ties here, between neighbours in loss: a and b" in report.report(typed(tied))
    assert "take 3 or more" in report.report(typed(seeded[:2] + seeded[3:5]))

    trained = [row | {"train_tokens": 40_000_000} for row in ROWS]
    assert "Minutes of training" not in report.report(typed(trained)) and "Minutes of training" in alone
    wrong = [ROWS[0] | {"cache": ROWS[0]["cache"] | {"bytes_per_token_formula": 1}, "perplexity": 30.0}]
    assert "DIFFER" in report.report(typed(wrong)) and "NOT below it" in report.report(typed(wrong))


def test_report_picks_learning_rates() -> None:
    key = "config.optimizer.learning_rate"
    rows = [
        make_row(f"{name}-{rate}", name, 1 + abs(math.log(rate / best)), 64, overrides={key: rate})
        for name, best in (("mha", 2e-3), ("mla", 4e-3))
        for rate in (1e-3, 2e-3, 4e-3)
    ]
    text = rates.section(typed(rows))
    assert "| mha | 0.002 | 1.0000 | 0.001: 1.6931, 0.002: 1.0000, 0.004: 1.6931 |" in text
    assert "edge of the grid for mla:" in text
    assert rates.section(typed(ROWS)) == ""


def test_runs_that_look_for_a_rate_stand_in_no_table_of_losses(tmp_path: Path) -> None:
    key = "config.optimizer.learning_rate"
    searched = [
        make_row(f"mha-lr{rate}", "mha", 1 + abs(math.log(rate / 2e-3)), 64, overrides={key: rate}, search=True)
        for rate in (1e-3, 2e-3, 4e-3)
    ]
    trained = [make_row(f"mha-s{seed}", "heads", 1.5, 64, seed=seed, overrides={key: 2e-3}) for seed in (1, 2)]
    rows = typed(searched + trained)
    assert [point.label for point in points(rows)] == ["mha"] and len(points(rows[:3])) == 3
    frontier.write(rows, tmp_path)
    text, page = (tmp_path / "report.md").read_text(), (tmp_path / "report.html").read_text()
    assert "| mha | 0.002 | 1.0000 |" in text and "mha (2 seeds)" in text and "mha-lr" not in text + page
    assert "![loss over learning rate](learning_rates.png)" in text
    drawn = matplotlib.image.imread(tmp_path / "learning_rates.png")
    assert drawn.std() > 0.02


def test_results_file_is_redrawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert status("report", path) == 0
    assert text_table(typed(ROWS)) in capsys.readouterr().out
    assert (tmp_path / "report.md").read_text().startswith("# ")
    assert matplotlib.image.imread(tmp_path / "frontier.png").std() > 0.02
    one = tmp_path / "eval.json"
    one.write_text(json.dumps(ROWS[0], indent=2))
    assert [row.json for row in read_rows(one)] == [ROWS[0]]


@pytest.mark.parametrize("content", [None, "", "{", '{"loss": 1}\n', "[1, 2]\n"])
def test_a_file_of_no_results_is_one_line(content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.jsonl"
    if content is not None:
        path.write_text(content)
    assert status("report", path) == 1
    said = capsys.readouterr().err.strip()
    assert said.startswith("error:") and str(path) in said and "\n" not in said
    assert not (tmp_path / "frontier.png").exists()


def test_mesh_of_the_config_is_used(tiny: Any) -> None:
    config = tiny("mha", eval={"decode_tokens": 1})
    assert decoding.batch_multiple(make_mesh(config.mesh)) == 8
    assert decoding.round_up(3, 8) == 8 and decoding.round_up(8, 8) == 8
