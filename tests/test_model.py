"""The model around the mechanisms: patterns, caches of mixed kinds, parameter matching, config errors."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import close

from mla import config as configs
from mla import model as models
from mla.attention.contract import REGISTRY
from mla.cache.meter import bookkeeping_bytes, content_bytes
from mla.commands import override
from mla.errors import UserError
from mla.workdir import differences

SMALL = {"d_model": 32, "num_layers": 3, "num_heads": 4}
MIXED = "sliding_window,linear,mla"
MIXED_SETTINGS = {"sliding_window": {"window": 8}, "mla": {"kv_lora_rank": 12, "qk_rope_head_dim": 4}}


def make(variant, settings=None, vocab=50, **model):
    config = configs.create(variant, settings, context=64, model=SMALL | model)
    configs.validate(config)
    return config, models.create(config, vocab)


@pytest.mark.parametrize("tied", [True, False])
def test_a_mixed_pattern_decodes_as_it_trains(tied):
    _, model = make(MIXED, MIXED_SETTINGS, tie_embeddings=tied)
    tokens = jax.random.randint(jax.random.key(0), (2, 40), 0, 50)
    positions = jnp.broadcast_to(jnp.arange(40, dtype=jnp.int32), (2, 40))
    parallel, cache, pieces = jax.jit(model)(tokens), model.init_cache(2, 40), []
    extend = jax.jit(model.extend, static_argnames="last_only")
    for start, stop in [(0, 17), (17, 18), (18, 19), (19, 40)]:
        logits, cache = extend(tokens[:, start:stop], positions[:, start:stop], cache)
        pieces.append(logits)
    close(jnp.concatenate(pieces, 1), parallel, 1e-5)
    last, _ = extend(tokens[:, :17], positions[:, :17], model.init_cache(2, 40), last_only=True)
    close(last[:, 0], parallel[:, 16], 1e-5)


def test_bookkeeping_is_kept_once_for_layers_that_store_the_same_tokens():
    _, model = make("mha")
    cache = model.init_cache(2, 20)
    assert len(cache.slots) == 1 and bookkeeping_bytes(cache) == 4 * (2 * 20 + 2)
    assert content_bytes(cache) == 3 * 2 * 20 * 2 * 32 * 4
    _, mixed = make(MIXED, MIXED_SETTINGS)
    cache = mixed.init_cache(2, 20)
    assert len(cache.slots) == 2 and [slots.clock.window for slots in cache.slots] == [8, None]
    # ring of 8 slots, state in fp32, latents
    assert content_bytes(cache) == 2 * 4 * (8 * 2 * 32 + 4 * 8 * 9 + 20 * 16)


def test_bf16_compute_keeps_fp32_parameters():
    _, model = make("mla", {"kv_lora_rank": 12, "qk_rope_head_dim": 4}, dtype="bfloat16")
    assert {a.dtype for a in jax.tree.leaves(models.parameters(model))} == {jnp.dtype("float32")}
    tokens = jnp.zeros((1, 8), jnp.int32)
    assert model.hidden(tokens).dtype == jnp.bfloat16 and model(tokens).dtype == jnp.float32
    assert {a.dtype for a in jax.tree.leaves(model.init_cache(1, 8).content())} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("variant", ["mqa", "gqa", "mla", "linear", MIXED])
def test_parameters_are_matched_to_the_mha_model(variant):
    settings = MIXED_SETTINGS if variant == MIXED else {}
    for multiple in (1, 8):
        config, model = make(variant, settings, d_model=64, num_layers=6, mlp_multiple=multiple)
        sizes = models.sizes(config, 50)
        assert sizes.total == models.count(models.parameters(model))
        _, mha = make("mha", d_model=64, num_layers=6)
        assert sizes.mha_total == models.count(models.parameters(mha))
        assert abs(sizes.total - sizes.mha_total) <= multiple * 3 * 64 * 6 / 2
        assert sizes.mismatch == sizes.total / sizes.mha_total - 1
    free, _ = make(variant, settings, match_parameters=False)
    assert models.sizes(free, 50).mlp_width == models.sizes(make("mha")[0], 50).mlp_width


def test_the_124m_ladder():
    """MLP widths that give every mechanism MHA's parameters at d 768, 12 heads, SwiGLU 2048."""
    shape = {"d_model": 768, "num_layers": 12, "num_heads": 12, "mlp_multiple": 1}
    mla = {"kv_lora_rank": 256, "q_lora_rank": 512, "qk_rope_head_dim": 32}
    for variant, settings, attention, width in [
        ("mha", {}, 2_359_296, 2048),
        ("gqa", {"num_kv_heads": 4}, 1_572_864, 2389),
        ("mqa", {}, 1_277_952, 2517),
        ("mla", mla, 2_188_032, 2122),
    ]:
        sizes = models.sizes(configs.create(variant, settings, model=shape), 50_257)
        assert (sizes.attention, sizes.mlp_width) == (12 * attention, width)


def test_config_survives_json():
    for variant, settings in [("gqa", {"num_kv_heads": 2}), (MIXED, MIXED_SETTINGS), ("local=mla,mla", {})]:
        config = configs.create(variant, settings, model=SMALL | {"num_layers": 4})
        again = configs.from_dict(json.loads(json.dumps(configs.to_dict(config))))
        assert configs.to_dict(again) == configs.to_dict(config)
        configs.validate(again)


def test_labels_configure_one_mechanism_twice():
    _, model = make("local=sliding_window*2,sliding_window", {"local": {"window": 4}, "sliding_window": {"window": 32}})
    assert [b.mixer.window for b in model.blocks] == [4, 4, 32]
    assert len(model.init_cache(1, 64).slots) == 2


@pytest.mark.parametrize(
    ("variant", "settings", "fields", "words"),
    [
        ("mls", {}, {}, "unknown mechanism 'mls': did you mean 'mla'?"),
        ("mla", {"kv_lora_rnk": 3}, {}, "config.model.mechanism.kv_lora_rnk: no such field; did you mean 'kv_lora_rank'?"),
        ("mla", {"kv_lora_rank": "3"}, {}, "config.model.mechanism.kv_lora_rank: '3' is no int"),
        ("mla", {"qk_rope_head_dim": 7}, {}, "config.model.mechanism.qk_rope_head_dim: 7 is not an even number"),
        ("mla", {"attend": "fast"}, {}, "config.model.mechanism.attend: 'fast' is none of auto, expanded, absorbed"),
        ("mla", {}, {"model": {"qk_norm": True}}, "set config.model.qk_norm=false"),
        ("gqa", {"num_kv_heads": 3}, {}, "config.model.mechanism.num_kv_heads: 3 does not divide num_heads 4"),
        ("mha", {"head_dim": 7}, {}, "config.model.mechanism.head_dim: 7 is odd"),
        ("mha", {}, {"model": {"num_heads": 5}}, "config.model.mechanism.head_dim: set it: d_model 32 does not divide"),
        ("grouped_latent", {"num_latents": 3}, {}, "config.model.mechanism.num_latents: 3 does not divide num_heads 4"),
        ("grouped_latent", {"kv_lora_rank": 9}, {}, "kv_lora_rank: 9 does not divide into num_latents 2 pieces"),
        ("grouped_latent", {"group_queries": True}, {}, "q_lora_rank: 0: group_queries needs a multiple of num_latents 2"),
        ("low_rank_blocks", {"branches": 3}, {}, "branches: 3 is neither 2 (MLRA-2) nor 4 (MLRA-4)"),
        ("low_rank_blocks", {"kv_lora_rank": 30}, {}, "kv_lora_rank: 30 does not divide into 4 blocks"),
        ("low_rank_blocks", {"sink": True}, {}, "sink: one sink for several attention maps of a head is not defined"),
        ("low_rank_blocks", {"branches": 2, "num_heads": 1}, {}, "num_heads: 1 does not divide into 2 groups"),
        ("grouped_tied", {"num_kv_heads": 3}, {}, "num_kv_heads: 3 does not divide num_heads 4"),
        ("grouped_tied", {"qk_rope_head_dim": 10}, {}, "qk_rope_head_dim: 10 is no even number of channels up to"),
        ("tensor_product", {"rank_k": 0}, {}, "rank_k: 0 is not a positive number of outer products"),
        ("tensor_product", {"head_dim": 7}, {}, "head_dim: 7 is odd"),
        ("tensor_product", {"factor_init": "unti"}, {}, "factor_init: 'unti' is none of code, paper, unit"),
        ("tensor_product", {"contextual_a": False, "contextual_b": False}, {}, "contextual_a: a and b factors are both"),
        ("multi_matrix", {"rope_fraction": 1.5}, {}, "rope_fraction: 1.5 is above 1"),
        ("multi_matrix", {}, {"model": {"qk_norm": True}}, "set config.model.qk_norm=false"),
        ("gqa", {"rope_fraction": 0.3}, {}, "rope_fraction: 0.3 of head_dim 8 is 2.4 channels; RoPE rotates pairs"),
        ("slim", {"head_dim": 4}, {}, "head_dim: heads have 16 key channels, fewer than d_model 32"),
        ("slim", {"value_norm": True}, {}, "value_norm: with a norm, values are no matrix times the keys"),
        ("chunked", {"window": 4}, {}, "window: 4 beside chunk 128: a layer has a window or chunks, set one to 0"),
        ("mha", {}, {"model": {"residual_init": "zeros"}}, "config.model.residual_init: 'zeros': did you mean 'zero'?"),
        ("gqa,yoco", {}, {}, "config.model.pattern: 'gqa,yoco': yoco lays out all layers; write yoco, yoco+LOWER or"),
        ("a=yoco", {}, {}, "config.model.pattern: 'a=yoco': yoco lays out all layers"),
        ("yoco+", {}, {}, "config.model.pattern: 'yoco+': yoco lays out all layers"),
        ("mha,,gqa", {}, {}, "config.model.pattern: 'mha,,gqa': an entry is empty"),
        ("gqa,gqa@", {}, {}, "config.model.pattern: 'gqa@' in layer 1: '' is no layer; write @-1"),
        ("gqa,gqa@+0", {}, {"model": {"num_layers": 2}}, "'+0' is no layer"),
        (
            "gqa,gqa@0",
            {},
            {"model": {"num_layers": 4}},
            "has 2 entries for model.num_layers=4; repeated, @ and a number name",
        ),
        ("mla/²", {}, {}, "config variant 'mla/²': '²' is no sharing factor"),
        ("gqa", {"window": 10**12}, {}, "window: 1000000000000 is beyond what 32 bits can count"),
        ("gqa", {"takes_qk_norm": True}, {}, "config.model.mechanism.takes_qk_norm: no such field"),
        (
            "gqa",
            {"head_dim": 32},
            {"model": {"num_heads": 3, "d_model": 100}},
            "num_kv_heads: 2 does not divide num_heads 3",
        ),
        (
            "mqa",
            {"head_dim": 32},
            {"model": {"num_heads": 3}},
            "config.model.num_heads: 3 does not divide d_model 32",
        ),
        ("sliding_window", {"window": 0}, {}, "config.model.mechanism.window: 0 is not a positive number of tokens"),
        ("mha*4", {}, {}, "config.model.pattern: has 4 entries for model.num_layers=3"),
        ("a=mha,a=mla", {}, {}, "config.model.pattern: label 'a' stands for both 'mha' and 'mla'"),
        ("mha,gqa", {"gqa": {"num_kv_heads": 3}}, {}, "config.model.mechanism.gqa.num_kv_heads: 3 does not divide"),
        ("mha,mla", {"mqa": {}}, {}, "config.model.mechanism.mqa: no such label in the pattern"),
        ("mha", {}, {"model": {"dtype": "float16"}}, "config.model.dtype: 'float16' is neither float32 nor bfloat16"),
        (
            "mha",
            {},
            {"optimizer": {"accumulate_steps": 3}},
            "config.optimizer.accumulate_steps: 3 does not divide batch_size 16",
        ),
        ("mha", {"head_dim": -2}, {}, "config.model.mechanism.head_dim: -2 is not a number from 0 up"),
        ("linear", {"num_heads": -2}, {}, "config.model.mechanism.num_heads: -2 is not a number from 0 up"),
        ("mla", {"yarn": {"factor": 0.5}}, {}, "config.model.mechanism.yarn.factor: 0.5 is below 1"),
        ("mla", {"yarn": {"beta_fast": 0.0}}, {}, "config.model.mechanism.yarn.beta_fast: 0.0 is not positive"),
        ("mha", {}, {"model": {"rope_theta": -1.0}}, "config.model.rope_theta: -1.0 is not a positive number"),
        ("mha", {}, {"optimizer": {"clip_norm": -1.0}}, "config.optimizer.clip_norm: -1.0 is not a number from 0 up"),
        ("mha", {}, {"optimizer": {"final_fraction": -3.0}}, "config.optimizer.final_fraction: -3.0 is not from 0 to 1"),
        ("mha", {}, {"optimizer": {"learning_rate": float("inf")}}, "config.optimizer.learning_rate: inf is not"),
        ("mha", {}, {"eval": {"cache": {"budget_tokens": 16}}}, "config.eval.cache.budget_tokens: 16 has no effect"),
        ("mha", {}, {"batchsize": 3}, "config.batchsize: no such field; did you mean 'batch_size'?"),
        ("mha", {}, {"eval": {"split": "test"}}, "config.eval.split: 'test'"),
        ("mha", {}, {"eval": {"cache": {"codec": "int3"}}}, "config.eval.cache.codec: 'int3' is not known"),
    ],
)
def test_bad_configs_are_refused_with_one_line(variant, settings, fields, words):
    model = SMALL | fields.pop("model", {})
    with pytest.raises(UserError) as error:
        configs.validate(configs.create(variant, settings, model=model, **fields))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_pattern_changed_after_the_fact_is_refused():
    config = configs.create("mla", model=SMALL)
    changed = dataclasses.replace(config, model=dataclasses.replace(config.model, pattern=("gqa",)))
    with pytest.raises(UserError, match=r"names 'gqa', but config\.model\.mechanism has mla"):
        configs.validate(changed)


def test_a_pattern_changed_on_the_command_line_takes_its_mechanism_along():
    config = configs.create("mla", {"kv_lora_rank": 16, "qk_rope_head_dim": 4}, model=SMALL)
    mixed = override(
        config, ["--config.model.pattern=sliding_window*2,mla", "--config.model.mechanism.sliding_window.window=9"]
    )
    configs.validate(mixed)
    assert mixed.model.mechanism["sliding_window"].window == 9
    assert mixed.model.mechanism["mla"] == config.model.mechanism["mla"]
    assert override(config, ["--config.model.pattern=gqa"]).model.mechanism == configs.create("gqa").model.mechanism


def test_a_labelled_pattern_can_be_set_on_the_command_line():
    config = override(configs.create("mla", model=SMALL), ["--config.model.pattern=local=sliding_window*2,far=mha"])
    assert config.model.pattern == ("local=sliding_window", "local=sliding_window", "far=mha")
    assert config.model.mechanism["local"].window == 128
    assert configs.to_dict(configs.from_dict(configs.to_dict(config))) == configs.to_dict(config)


def test_a_label_may_be_called_as_a_field():
    config = configs.create("yarn=mla", {"kv_lora_rank": 12}, model=SMALL)
    assert config.model.mechanism["yarn"].kv_lora_rank == 12
    assert configs.from_dict(configs.to_dict(config)) == config


def test_configs_of_earlier_results_say_what_they_said():
    """Rows and config.json in results/ were written by several versions; whatever they name is read as it was."""
    folder = Path(__file__).parent.parent / "results"
    written = [json.loads(line)["config"] for path in folder.glob("*/results.jsonl") for line in path.open()]
    written += [json.loads(path.read_text()) for path in folder.glob("*/config.json")]
    assert len(written) > 200
    for before in written:
        after = configs.to_dict(configs.from_dict(before))
        changed = [field for field, old, _ in differences(before, after) if old is not None]
        assert changed in ([], ["init_from"]), "all but a relative path, which is made absolute"


def test_more_tokens_than_a_cache_holds_are_refused():
    _, model = make("mha")
    tokens = jnp.zeros((1, 9), jnp.int32)
    with pytest.raises(ValueError, match="9 new tokens for a cache of 8"):
        model.extend(tokens, jnp.arange(9, dtype=jnp.int32)[None], model.init_cache(1, 8))


def test_attention_larger_than_the_whole_mha_model_is_refused():
    config = configs.create("mla", {"kv_lora_rank": 4096}, model=SMALL)
    with pytest.raises(UserError, match=r"config\.model\.match_parameters"):
        models.sizes(config, 50)


def test_modules_need_no_mesh_and_no_arrays():
    config = configs.create("mla", {"kv_lora_rank": 16, "qk_rope_head_dim": 4}, model=SMALL)
    abstract = nnx.eval_shape(lambda: models.create(config, 50))
    assert all(isinstance(a, jax.ShapeDtypeStruct) for a in jax.tree.leaves(models.parameters(abstract)))


# What each field of every config is tried with: nothing may end in a traceback, and what is accepted has a reason.
PROBES = ("0", "-1", str(2**31), str(2**63), str(10**20), "nan", "inf", "-inf", "1e-39", "1e39", "", "é日本")
TEXTS = ("corpus", "tokenizer", "text_field", "end_token", "cache_dir")
NAMES = ("name", "init_from", *(f"data.{field}" for field in TEXTS), "log.wandb_project")
EMPTY = (*NAMES[1:], "eval.cache.evict_when", "eval.task")  # '' is off, the default, or refused where it is looked up
MINUS_ONE = ("mesh.data", "mesh.fsdp", "mesh.tensor")  # what is left of the devices


def accepted(path: str, value: object, text: str) -> bool:
    """Whether there is a reason to accept `text` for the field `path`, which holds `value` by default."""
    if isinstance(value, str):
        return path in (EMPTY if text == "" else NAMES)
    if isinstance(value, bool):
        return text == "0"
    if text == "0":
        return True  # off or derived, or refused by the field's own check
    if text == "-1":
        return path in MINUS_ONE
    number = float(text) if isinstance(value, float) and text not in ("", PROBES[-1]) else None
    return (path == "seed" and text == str(2**31)) or number in (2.0**31, 2.0**63, 1e20)


def test_no_value_of_any_field_is_misread_or_ends_in_a_traceback():
    seen, tried = set(), set()
    for variant in ("mha", "sliding_window*3,mha", *REGISTRY):
        config = configs.create(variant)
        for path, value in configs.leaves(config):
            if path in tried and not path.startswith("model.mechanism."):
                continue
            # Fields that mechanisms share are read in one place; what each makes of 0 is its own.
            probes = PROBES[:1] if path in tried else PROBES
            tried.add(path)
            for text in probes:
                try:
                    configs.validate(override(config, [f"--config.{path}={text}"]))
                except UserError as error:
                    assert "\n" not in str(error) and path.rpartition(".")[2] in str(error), (variant, path, text)
                else:
                    assert accepted(path, value, text), (variant, path, text)
                    seen.add((path, text))
    refused_zero = ("steps", "batch_size", "context", "model.d_model", "model.norm_eps", "eval.batch_size", "eval.tolerance")
    assert not {(path, "0") for path in refused_zero} & seen
    assert {("seed", "0"), ("mesh.host_devices", "0"), ("eval.decode_tokens", "0"), ("name", "é日本")} <= seen


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"seed": -1}, "config.seed: -1 is not from 0 to 4294967295"),
        ({"seed": 99999999999}, "config.seed: 99999999999 is not from 0 to 4294967295"),
        ({"steps": 10**20}, "config.steps: 100000000000000000000 is beyond what 32 bits can count"),
        ({"batch_size": 10**12}, "config.batch_size: 1000000000000 is beyond what 32 bits can count"),
        ({"eval": {"decode_tokens": 10**12}}, "config.eval.decode_tokens: 1000000000000 is beyond"),
        ({"model": {"num_layers": 2**31 - 1}}, "config.model.num_layers: 2147483647 is more than 1000"),
        ({"model": {"norm_eps": 1e-39}}, "config.model.norm_eps: 1e-39 is beyond what 32-bit floats can tell from 0"),
        ({"optimizer": {"learning_rate": 1e39}}, "config.optimizer.learning_rate: 1e+39 is beyond"),
        ({"mesh": {"host_devices": -2}}, "config.mesh.host_devices: -2 is not a number of devices from 0"),
        ({"mesh": {"host_devices": 10**6}}, "config.mesh.host_devices: 1000000 is not a number of devices from 0"),
        ({"name": ""}, "config.name: is empty or cannot be printed"),
        ({"name": "a\nb"}, "config.name: is empty or cannot be printed"),
        ({"log": {"wandb_project": "\udcff"}}, "config.log.wandb_project: '\\udcff' is not UTF-8 text"),
        ({"data": {"corpus": "a\0b"}}, "config.data.corpus: 'a\\x00b' is not UTF-8 text"),
    ],
)
def test_numbers_and_texts_that_no_run_can_have(fields, words):
    with pytest.raises(UserError) as error:
        configs.validate(configs.create("mha", **fields))
    assert words in str(error.value)


def test_a_config_file_may_assign_what_the_command_line_could_not():
    values = (("steps", "5"), ("steps", 5.0), ("steps", True), ("steps", np.int64(5)), ("name", 3), ("init_from", Path("x")))
    for field, value in (*values, ("data", None)):
        config = configs.create("mha")
        setattr(config, field, value)
        for check in (configs.validate, configs.settle_paths):
            with pytest.raises(UserError, match=rf"config\.{field}: .* is no (int|str|DataConfig)"):
                check(config)


@pytest.mark.parametrize("variant", ["mha*10000000000", "mha/10000000000", "mha*" + "9" * 5000, "mha*0", "mha*-1"])
def test_counts_in_a_pattern_that_no_memory_holds(variant):
    with pytest.raises(UserError, match=r"is no (repeat count|sharing factor)"):
        configs.parse_pattern(variant)


def test_where_a_run_starts_from_is_kept_as_an_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for text, path in (("runs/a", tmp_path / "runs/a"), ("~/runs/a", tmp_path / "home/runs/a"), ("/a/../b", "/b")):
        assert configs.create("mha", init_from=text).init_from == str(path)
        assert override(configs.create("mha"), [f"--config.init_from={text}"]).init_from == str(path)
    assert configs.create("mha").init_from == ""
    with pytest.raises(UserError, match=r"config\.init_from: ~nobody_at_all/a: no user 'nobody_at_all' is known"):
        configs.create("mha", init_from="~nobody_at_all/a")
