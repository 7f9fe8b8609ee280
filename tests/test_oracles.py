"""Each mechanism against an implementation by others, with the same random weights (transformers, on a CPU)."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from helpers import close, rounding
from matrix import YARN, Row
from transformers import DeepseekV3Config, LlamaConfig, MistralConfig, Qwen3Config
from transformers.models.deepseek_v3 import modeling_deepseek_v3
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen3 import modeling_qwen3

from mla.model import parameters, with_parameters

D_MODEL, HEADS, LENGTH = 32, 4, 100


def tensors(mixer):
    return jax.tree.map(lambda a: torch.tensor(np.asarray(a)), parameters(mixer))


def put(module, name, value):
    """Copies one of our arrays [in, out] or gains into a torch module's weight [out, in], checking the shape."""
    weight = module.get_parameter(name)
    value = value.T if value.ndim == 2 else value
    assert weight.shape == value.shape, name
    with torch.no_grad():
        weight.copy_(value)


def run_torch(attention, rotary, x, window=None):
    """A transformers attention module on x [B, T, D], eager, causal, with its own rotary embedding."""
    tokens = torch.tensor(np.asarray(x))
    position = torch.arange(x.shape[1])[None]
    distance = position[0][:, None] - position[0][None]
    hidden = (distance < 0) | (distance >= (window or x.shape[1]))
    mask = torch.zeros(distance.shape).masked_fill(hidden, torch.finfo(torch.float32).min)[None, None]
    with torch.no_grad():
        return attention(hidden_states=tokens, position_embeddings=rotary(tokens, position), attention_mask=mask)[0].numpy()


def assert_close(mixer, x, expected, call=lambda mixer, x: mixer(x)):
    """Outputs of a mixer within what fp32 can do to them."""
    graph, params = nnx.graphdef(mixer), parameters(mixer)
    ours = jax.jit(lambda x, params: call(with_parameters(graph, params), x))
    bound = rounding(ours, x, params)
    assert bound < 1e-3, "so blurred that a fault would pass"
    close(ours(x, params), expected, 2 * bound, unit=True)  # theirs rounds as well


def assert_same(mixer, attention, rotary, window=None):
    assert all(p.requires_grad for p in attention.parameters())
    x = jax.random.normal(jax.random.key(7), (2, LENGTH, D_MODEL))
    expected = run_torch(attention.eval(), rotary, x, window)
    assert_close(mixer, x, expected)


COMMON = {
    "hidden_size": D_MODEL,
    "num_attention_heads": HEADS,
    "attn_implementation": "eager",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "attention_dropout": 0.0,
}


def copy_heads(attention, weights):
    for ours, theirs in [("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("out", "o_proj")]:
        put(attention, f"{theirs}.weight", weights[ours]["kernel"])


@pytest.mark.parametrize(("name", "kv_heads"), [("mha", 4), ("gqa", 2), ("mqa", 1)])
def test_llama(name, kv_heads):
    mixer = Row(name, {"num_kv_heads": kv_heads} if name == "gqa" else {}).mixer()
    config = LlamaConfig(**COMMON, num_key_value_heads=kv_heads, rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    attention = modeling_llama.LlamaAttention(config, 0)
    copy_heads(attention, tensors(mixer))
    assert_same(mixer, attention, modeling_llama.LlamaRotaryEmbedding(config))


def test_qwen3_qk_norm():
    mixer = Row("gqa", {"num_kv_heads": 2}, qk_norm=True).mixer()
    config = Qwen3Config(
        **COMMON, num_key_value_heads=2, head_dim=8, rope_parameters={"rope_type": "default", "rope_theta": 1e4}
    )
    attention = modeling_qwen3.Qwen3Attention(config, 0)
    weights = tensors(mixer)
    copy_heads(attention, weights)
    put(attention, "q_norm.weight", weights["query_norm"]["scale"])
    put(attention, "k_norm.weight", weights["key_norm"]["scale"])
    assert_same(mixer, attention, modeling_qwen3.Qwen3RotaryEmbedding(config))


def test_mistral_window():
    mixer = Row("sliding_window", {"window": 17, "num_kv_heads": 2}).mixer()
    common = {k: v for k, v in COMMON.items() if k != "attention_bias"}
    config = MistralConfig(
        **common,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=17,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )
    attention = modeling_mistral.MistralAttention(config, 0)
    copy_heads(attention, tensors(mixer))
    assert_same(mixer, attention, modeling_mistral.MistralRotaryEmbedding(config), window=17)


@pytest.mark.parametrize("query_latent", [0, 24], ids=["no_query_latent", "query_latent"])
@pytest.mark.parametrize("yarn", [None, YARN, YARN | {"mscale": 1.3}], ids=["no_yarn", "yarn", "yarn_unequal"])
@pytest.mark.parametrize("v_dim", [8, 14])
def test_deepseek_v3(query_latent, yarn, v_dim):
    settings = {"kv_lora_rank": 20, "qk_rope_head_dim": 8, "q_lora_rank": query_latent, "v_head_dim": v_dim}
    mixer = Row("mla", settings | ({"yarn": yarn} if yarn else {})).mixer()
    rope = {"rope_type": "default", "rope_theta": 1e4}
    if yarn:
        rope |= {"rope_type": "yarn", "factor": yarn["factor"], "beta_fast": 32.0, "beta_slow": 1.0}
        rope |= {"original_max_position_embeddings": yarn["original_context"]}
        rope |= {"mscale": yarn["mscale"], "mscale_all_dim": yarn["mscale_all_dim"]}
    config = DeepseekV3Config(
        **COMMON,
        num_key_value_heads=HEADS,
        kv_lora_rank=20,
        q_lora_rank=query_latent or None,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=v_dim,
        rope_interleave=True,
        rope_parameters=rope,
    )
    attention = modeling_deepseek_v3.DeepseekV3Attention(config, 0)
    weights = tensors(mixer)
    if query_latent:
        put(attention, "q_a_proj.weight", weights["query"]["down"]["kernel"])
        put(attention, "q_a_layernorm.weight", weights["query"]["norm"]["scale"])
        put(attention, "q_b_proj.weight", weights["query"]["up"]["kernel"])
    else:
        put(attention, "q_proj.weight", weights["query"]["kernel"])
    put(attention, "kv_a_proj_with_mqa.weight", weights["kv_down"]["kernel"])
    put(attention, "kv_a_layernorm.weight", weights["kv_norm"]["scale"])
    # theirs is [k_nope | v] head by head
    both = [weights[name]["kernel"].reshape(20, HEADS, -1) for name in ("key_up", "value_up")]
    put(attention, "kv_b_proj.weight", torch.cat(both, dim=-1).reshape(20, -1))
    put(attention, "o_proj.weight", weights["out"]["kernel"])
    assert_same(mixer, attention, modeling_deepseek_v3.DeepseekV3RotaryEmbedding(config))
