"""MLPs and blocks: against implementations by others, their parameters counted, and what experts add to training."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from helpers import close
from jax.sharding import Mesh
from matrix import Row
from test_oracles import COMMON, put, run_torch
from transformers import DeepseekV3Config, Gemma2Config, MixtralConfig, StableLmConfig, Starcoder2Config
from transformers.models.deepseek_v3 import modeling_deepseek_v3
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.mixtral import modeling_mixtral
from transformers.models.stablelm import modeling_stablelm
from transformers.models.starcoder2 import modeling_starcoder2

from mla import config as configs
from mla import model as models
from mla.attention.contract import Step, Surroundings
from mla.commands import override
from mla.config import build
from mla.data.batch import Batch
from mla.errors import UserError
from mla.layers.mlp import REGISTRY, mlp
from mla.layers.moe import BACKENDS, MixtureOfExperts
from mla.model import Block, parameters, with_parameters
from mla.sharding import AXES
from mla.training.step import Trainer

D_MODEL, WIDTH, LENGTH = 32, 24, 100
AROUND = Surroundings(d_model=D_MODEL, num_heads=4)
STEP = Step(jnp.asarray(0.5), jnp.asarray(0.4), jax.random.key(0))
FORMS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in REGISTRY),
    ("gelu", {"use_bias": True}),
    ("moe", {"num_experts": 5, "experts_per_token": 3, "shared_experts": 0, "router": "sigmoid", "scale": 2.5}),
]


def drawn(module: Any, seed: int = 0) -> Any:
    """A module with parameters that are far from their initial values, so that none can be mistaken or forgotten."""
    draw = np.random.default_rng(seed)

    def one(path: Any, a: Any) -> jax.Array:
        size, centre = a.shape[-2] ** -0.5 if a.ndim > 1 else 0.3, float(path[-1].key == "scale")
        return jnp.asarray(centre + size * draw.normal(size=a.shape), jnp.float32)

    return with_parameters(nnx.graphdef(module), jax.tree_util.tree_map_with_path(one, parameters(module)))


def made(name: str, seed: int = 0, **fields: Any) -> Any:
    config, module = mlp(name)
    return drawn(module(build(config, fields, "config.model.mlp_fields"), AROUND, WIDTH, rngs=nnx.Rngs(0)), seed)


def tokens(length: int = LENGTH) -> jax.Array:
    return jax.random.normal(jax.random.key(7), (2, length, D_MODEL))


def tensors(module: Any) -> Any:
    return jax.tree.map(lambda a: torch.tensor(np.asarray(a)), parameters(module))


def copy_linear(theirs: Any, names: dict[str, str], weights: Any) -> None:
    for ours, name in names.items():
        put(theirs, f"{name}.weight", weights[ours]["kernel"])
        if "bias" in weights[ours]:
            put(theirs, f"{name}.bias", weights[ours]["bias"])


SWIGLU = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


# --------------------------------------------------------------------------------------------------------------- experts


def copy_experts(theirs: Any, weights: Any) -> None:
    with torch.no_grad():
        both = torch.cat([weights["experts"]["gate"], weights["experts"]["up"]], dim=-1)
        theirs.experts.gate_up_proj.copy_(both.transpose(1, 2))
        theirs.experts.down_proj.copy_(weights["experts"]["down"].transpose(1, 2))
    put(theirs, "gate.weight", weights["router"]["kernel"])


def test_softmax_routing_is_mixtral_with_its_balance_loss() -> None:
    ours = made("moe", num_experts=6, shared_experts=0, balance_loss=1.0)
    sizes = {"hidden_size": D_MODEL, "intermediate_size": WIDTH, "num_local_experts": 6, "num_experts_per_tok": 2}
    theirs = modeling_mixtral.MixtralSparseMoeBlock(MixtralConfig(**sizes)).eval()
    copy_experts(theirs, tensors(ours))
    inputs = tokens() + 0.5 * parameters(ours)["router"]["kernel"][:, 2]  # one expert is fuller than others
    x = torch.tensor(np.asarray(inputs))
    with torch.no_grad():
        logits, _, chosen = theirs.gate(x)
        expected, balance = theirs(x), modeling_mixtral.load_balancing_loss_func((logits,), 6, 2)
    y, losses, metrics = jax.jit(lambda x: ours.forward(x, STEP))(inputs)
    close(y, expected, 1e-5, unit=True)
    close(losses["balance"], balance / 2, 1e-5)  # theirs sums over a token's choices, ours is 1 where all are alike
    loads = np.bincount(chosen.flatten(), minlength=6)
    close(metrics["expert_load"], 6 * loads.max() / loads.sum(), 1e-6)
    assert loads.argmax() == 2 and loads.max() > 1.5 * loads.min()


@pytest.mark.parametrize("normalise", [True, False])
def test_sigmoid_routing_with_shared_experts_is_deepseek(normalise: bool) -> None:
    ours = made(
        "moe", num_experts=8, experts_per_token=3, shared_experts=2, router="sigmoid", normalise=normalise, scale=2.5
    )
    config = DeepseekV3Config(
        **COMMON, moe_intermediate_size=WIDTH, n_routed_experts=8, num_experts_per_tok=3, n_shared_experts=2,
        n_group=1, topk_group=1, norm_topk_prob=normalise, routed_scaling_factor=2.5,
    )  # fmt: skip
    theirs, weights = modeling_deepseek_v3.DeepseekV3MoE(config).eval(), tensors(ours)
    copy_experts(theirs, weights)
    copy_linear(theirs.shared_experts, SWIGLU, weights["shared"])
    with torch.no_grad():
        expected = theirs(torch.tensor(np.asarray(tokens())))
    close(jax.jit(ours.__call__)(tokens()), expected, 1e-5, unit=True)


def test_both_ways_to_multiply_agree_in_values_and_gradients() -> None:
    """The one of accelerators, which a CPU can run too, and the one of a CPU; where one expert gets nearly everything."""
    moe = made("moe", num_experts=6)
    graph, params = nnx.graphdef(moe), parameters(moe)
    x = tokens().reshape(-1, D_MODEL) + 3 * params["router"]["kernel"][:, 2]

    def loss(form: str, params: Any) -> Any:
        moe = with_parameters(graph, params)
        _, chosen, weights = moe.route(x)
        experts = moe.experts
        y = BACKENDS[form].run([kernel[...] for kernel in (experts.gate, experts.up, experts.down)], x, chosen, weights)
        return jnp.mean(y**2), (y, chosen)

    (_, (a, chosen)), a_gradients = jax.jit(jax.value_and_grad(lambda p: loss("by_choice", p), has_aux=True))(params)
    (_, (b, _)), b_gradients = jax.jit(jax.value_and_grad(lambda p: loss("by_all", p), has_aux=True))(params)
    assert np.bincount(np.asarray(chosen).flatten()).max() > 0.9 * len(x), "no expert is full"
    close(a, b, 1e-5, unit=True)
    for (path, one), two in zip(jax.tree.leaves_with_path(a_gradients), jax.tree.leaves(b_gradients), strict=True):
        if "shared" not in jax.tree_util.keystr(path):
            close(one, two, 1e-4, jax.tree_util.keystr(path), unit=True)


# ---------------------------------------------------------------------------------------------------------------- counts


@pytest.mark.parametrize(("name", "fields"), FORMS)
def test_parameters_are_counted(name: str, fields: dict[str, Any]) -> None:
    """By the config as by the arrays; matched to the MHA model with a SwiGLU; and no token's output depends on others'."""
    ours = made(name, **fields)
    counted = ours.config.parameters(D_MODEL, WIDTH)
    assert counted.total == models.count(parameters(ours))
    if isinstance(ours, MixtureOfExperts):
        idle = ours.config.num_experts - ours.config.experts_per_token
        assert counted.total - counted.active == idle * 3 * D_MODEL * WIDTH
    else:
        assert counted.active == counted.total
    shape = {"d_model": 64, "num_layers": 2, "num_heads": 4, "mlp": name, "mlp_fields": fields, "mlp_multiple": 1}
    config = configs.create("gqa", {"num_kv_heads": 2}, model=shape)
    configs.validate(config)
    sizes, model = models.sizes(config, 50), nnx.eval_shape(lambda: models.create(config, 50))
    assert sizes.total == models.count(parameters(model))
    assert sizes.mlp == sum(models.count(parameters(block.mlp)) for block in model.blocks)
    per_width = config.model.mlp_fields.parameters(64, 1).total - config.model.mlp_fields.parameters(64, 0).total
    assert abs(sizes.total - sizes.mha_total) <= 2 * per_width / 2
    assert sizes.mha_total == models.sizes(configs.create("mha", {}, model={"d_model": 64, "num_layers": 2}), 50).total
    assert (sizes.active < sizes.total) == (name == "moe")
    close(jax.jit(ours.__call__)(tokens())[:, 3:7], jax.jit(ours.__call__)(tokens()[:, 3:7]), 1e-5)


# -------------------------------------------------------------------------------------------------------------- training


def trainer(shape: tuple[int, ...] = (1, 1, 1), **fields: Any) -> Trainer:
    model = {"d_model": 16, "num_layers": 2, "num_heads": 2, "mlp": "moe", "mlp_fields": {"num_experts": 4} | fields}
    config = configs.create(
        "mla", {"kv_lora_rank": 8, "qk_rope_head_dim": 4}, context=16, batch_size=8, steps=6, model=model
    )
    config.optimizer.warmup_steps = 1
    return Trainer(config, 61, Mesh(np.asarray(jax.devices()[: int(np.prod(shape))]).reshape(shape), AXES))


def batch(seed: int = 0) -> Batch:
    return Batch.of_windows(np.random.default_rng(seed).integers(0, 61, (8, 17), dtype=np.int32))


def test_experts_train_on_every_mesh_and_say_their_loads() -> None:
    single, split = trainer(), trainer((2, 2, 2))
    states = [single.init()]
    states.append(jax.device_put(jax.device_get(states[0]), jax.tree.map(lambda a: a.sharding, split.abstract_state)))
    kernel = states[1].params["blocks"]["0"]["mlp"]["experts"]["gate"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4
    for seed in range(3):
        said = []
        for index, each in enumerate((single, split)):
            states[index], metrics = each.step(states[index], batch(seed))
            said.append(metrics)
        assert set(said[0]) == {"loss", "grad_norm", "learning_rate", "expert_load"}
        for name, value in said[0].items():
            close(said[1][name], value, 1e-5, name)
        assert 1 < float(said[0]["expert_load"]) < 4


def test_the_balance_loss_is_added_over_layers_and_not_logged_as_the_loss() -> None:
    plain, balanced = trainer(balance_loss=0.0), trainer(balance_loss=0.5)
    params, now = plain.init().params, plain.now(jnp.int32(0))
    total, (nats, _) = jax.jit(plain.objective)(params, batch(), now)
    (more, (same, said)), gradients = jax.jit(jax.value_and_grad(balanced.objective, has_aux=True))(params, batch(), now)
    assert float(total) == float(nats)
    close(same, nats, 1e-6)
    assert [bool(words) for words in said] == [False, True, False, True], "a mixer and an MLP in each of two layers"
    # 1 where all experts are chosen alike, which they nearly are at the start; two layers at half of it.
    assert 1.0 <= float(more - same) < 1.3
    assert float(jnp.abs(gradients["blocks"]["1"]["mlp"]["router"]["kernel"]).max()) > 1e-4
    close(jax.jit(balanced.objective)(params, batch())[0], nats, 1e-6, "without a step nothing is learned")


def test_decoding_is_the_parallel_form() -> None:
    config = configs.create("gqa", model={"d_model": 32, "num_layers": 2, "num_heads": 4, "mlp": "moe", "post_norms": True})
    model = drawn(models.create(config, 61))
    ids = jnp.asarray(batch().tokens[:2])
    where = jnp.broadcast_to(jnp.arange(16, dtype=jnp.int32), ids.shape)
    cache, found = model.init_cache(2, 16), []
    for start, stop in ((0, 9), (9, 10), (10, 16)):
        logits, cache = jax.jit(model.extend)(ids[:, start:stop], where[:, start:stop], cache)
        found.append(logits)
    close(jnp.concatenate(found, axis=1), jax.jit(model.__call__)(ids), 1e-4)


# ---------------------------------------------------------------------------------------------------------------- blocks


def block(mixer: Row, **fields: Any) -> Block:
    model = configs.create("gqa", model={"d_model": D_MODEL, "num_heads": 4, **fields}).model
    ffn = mlp(model.mlp)[1](model.mlp_fields, AROUND, WIDTH, rngs=nnx.Rngs(0))
    return drawn(Block(mixer.mixer(), ffn, model))


def copy_block(theirs: Any, weights: Any, mlps: dict[str, str], norms: dict[str, str], offset: float = 0.0) -> None:
    heads = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}
    copy_linear(theirs.self_attn, heads, weights["mixer"])
    copy_linear(theirs.mlp, mlps, weights["mlp"])
    for ours, name in norms.items():
        put(theirs, f"{name}.weight", weights[ours]["scale"] - offset)
        if "bias" in weights[ours]:
            put(theirs, f"{name}.bias", weights[ours]["bias"])


def assert_same_block(ours: Block, theirs: Any, rotary: Any) -> None:
    assert models.count(parameters(ours)) == sum(p.numel() for p in theirs.parameters())
    x = tokens()

    def layer(**arguments: Any) -> tuple[torch.Tensor]:
        return (theirs.eval()(**arguments),)

    close(jax.jit(lambda x: ours(x, None))(x), run_torch(layer, rotary, x), 2e-5, unit=True)


DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 1e4}
PRE = {"mixer_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}


def test_post_norms_and_geglu_are_gemma2() -> None:
    ours = block(Row("gqa", {"num_kv_heads": 2, "head_dim": 12, "soft_cap": 2.0}), post_norms=True, mlp="geglu")
    config = Gemma2Config(
        **COMMON, num_key_value_heads=2, head_dim=12, query_pre_attn_scalar=12, attn_logit_softcapping=2.0,
        intermediate_size=WIDTH, rope_parameters=DEFAULT_ROPE,
    )  # fmt: skip
    theirs = modeling_gemma2.Gemma2DecoderLayer(config, 1)
    norms = {
        "mixer_norm": "input_layernorm",
        "mixer_post_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
    }
    copy_block(theirs, tensors(ours), SWIGLU, norms, offset=1.0)
    assert_same_block(ours, theirs, modeling_gemma2.Gemma2RotaryEmbedding(config))


def test_layernorm_is_stablelm() -> None:
    ours = block(Row("gqa", {"num_kv_heads": 2, "rope_fraction": 0.25}), norm="layernorm", norm_eps=1e-5)
    rope = DEFAULT_ROPE | {"partial_rotary_factor": 0.25}
    config = StableLmConfig(**COMMON, num_key_value_heads=2, intermediate_size=WIDTH, rope_parameters=rope)
    theirs = modeling_stablelm.StableLmDecoderLayer(config, 0)
    copy_block(theirs, tensors(ours), SWIGLU, PRE)
    assert_same_block(ours, theirs, modeling_stablelm.StableLmRotaryEmbedding(config))


def test_gelu_with_biases_is_starcoder2() -> None:
    fields = {"mlp": "gelu", "mlp_fields": {"use_bias": True}, "norm": "layernorm", "norm_eps": 1e-5}
    ours = block(Row("gqa", {"num_kv_heads": 2}), **fields)
    config = Starcoder2Config(**COMMON, num_key_value_heads=2, intermediate_size=WIDTH, rope_parameters=DEFAULT_ROPE)
    theirs = modeling_starcoder2.Starcoder2DecoderLayer(config, 0)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):  # use_bias is for these too there
        torch.nn.init.zeros_(getattr(theirs.self_attn, name).bias)
        getattr(theirs.self_attn, name).bias = None
    copy_block(theirs, tensors(ours), {"up": "c_fc", "down": "c_proj"}, PRE)
    assert_same_block(ours, theirs, modeling_starcoder2.Starcoder2RotaryEmbedding(config))


# ---------------------------------------------------------------------------------------------------------------- config


def test_the_command_line_chooses_an_mlp_and_its_fields() -> None:
    arguments = ["--config.model.mlp=moe", "--config.model.mlp_fields.num_experts=4"]
    config = override(configs.create("mla"), arguments)
    assert override(configs.create("mla"), arguments[::-1]) == config, "whatever their order"
    assert configs.to_dict(config)["model"]["mlp_fields"]["num_experts"] == 4
    again = override(config, ["--config.model.mlp=moe", "--config.model.norm=layernorm"])
    assert configs.from_dict(configs.to_dict(again)).model == again.model
    assert dataclasses.asdict(again.model.mlp_fields) == dataclasses.asdict(config.model.mlp_fields)
    older = configs.to_dict(configs.create("mla"))
    for field in ("mlp", "mlp_fields", "norm", "post_norms"):
        del older["model"][field]
    assert configs.from_dict(older) == configs.create("mla")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mlp": "swigl"}, r"config\.model\.mlp: 'swigl': did you mean 'swiglu'\?"),
        ({"mlp_fields": {"num_experts": 4}}, r"config\.model\.mlp_fields\.num_experts: no such field"),
        ({"norm": "batchnorm"}, r"config\.model\.norm: 'batchnorm'"),
        ({"mlp": "moe", "mlp_fields": {"experts_per_token": 9}}, r"mlp_fields\.experts_per_token: 9 is not from 1 to"),
        ({"mlp": "moe", "mlp_fields": {"router": "hash"}}, r"config\.model\.mlp_fields\.router: 'hash'"),
        ({"mlp": "moe", "mlp_fields": {"balance_loss": -1.0}}, r"mlp_fields\.balance_loss: -1\.0 is not a number from 0"),
        ({"mlp": "moe", "mlp_fields": {"scale": 0.0}}, r"config\.model\.mlp_fields\.scale: 0\.0 is not a positive"),
    ],
)
def test_refuses_what_cannot_work(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        configs.validate(configs.create("mla", model=fields))
