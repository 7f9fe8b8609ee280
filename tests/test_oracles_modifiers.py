"""Windows, chunks, sinks, caps, gates, scales, partial RoPE and shared keys and values against transformers' modules.

As in test_oracles, with two differences: the masks are transformers' own, and every parameter of theirs starts as NaN.
"""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
from matrix import Row
from test_oracles import COMMON, D_MODEL, LENGTH, assert_close, copy_heads, put, tensors
from transformers import (
    Gemma2Config,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    GptOssConfig,
    Llama4TextConfig,
    Qwen3NextConfig,
    SmolLM3Config,
    StableLmConfig,
)
from transformers.masking_utils import create_masks_for_generate
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.gemma3n import modeling_gemma3n
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.llama4 import modeling_llama4
from transformers.models.qwen3_next import modeling_qwen3_next
from transformers.models.smollm3 import modeling_smollm3
from transformers.models.stablelm import modeling_stablelm

WINDOW, CHUNK = 17, 23  # both far below LENGTH, and neither divides it
LOCAL, GLOBAL = 0, 1  # layers of a config with `LAYERS`
LAYERS = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 1e4}

# heads * head_dim is never D_MODEL: a transposed or swapped projection does not fit
both_layers = pytest.mark.parametrize(
    ("layer", "heads", "kv_heads", "head_dim"),
    [(LOCAL, 4, 2, 12), (LOCAL, 4, 1, 16), (GLOBAL, 8, 2, 6), (GLOBAL, 4, 1, 16)],
    ids=["local-4-2-12", "local-4-1-16", "global-8-2-6", "global-4-1-16"],
)


def layer_row(layer, heads, kv_heads, head_dim, *, qk_norm=False, global_theta=0.0, **settings):
    settings |= {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": head_dim}
    local = settings | {"window": WINDOW}
    everywhere = settings | {"rope_theta": global_theta}
    return Row("sliding_window", local, qk_norm=qk_norm) if layer == LOCAL else Row("gqa", everywhere, qk_norm=qk_norm)


def common(heads, kv_heads, head_dim=None, **changes):
    width = {"head_dim": head_dim} if head_dim else {}
    return COMMON | {"num_attention_heads": heads, "num_key_value_heads": kv_heads} | width | changes


def blank(attention):
    """The module with NaN in every parameter: one that is not copied shows."""
    for parameter in attention.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    return attention.eval()


def tokens(seed=7):
    return jax.random.normal(jax.random.key(seed), (2, LENGTH, D_MODEL))


def run(attention, rotary, x, **more):
    """The module on x with the rotation and the mask that its model gives a layer of its kind."""
    x, position, config = torch.tensor(np.asarray(x)), torch.arange(x.shape[1])[None], attention.config
    masks = create_masks_for_generate(config, x, None, None, position)
    kind = config.layer_types[attention.layer_idx] if isinstance(masks, dict) else None
    by_kind = {"layer_type": kind} if hasattr(rotary, "layer_types") else {}  # a base for each kind of layer
    with torch.no_grad():
        turn = rotary(x, position, **by_kind)
        more |= {"position_embeddings": turn, "attention_mask": masks[kind] if kind else masks}
        return attention(hidden_states=x, **more)[0].numpy()


def assert_same(mixer, attention, rotary):
    count = sum(a.numel() for a in jax.tree.leaves(tensors(mixer)))
    assert count == sum(p.numel() for p in attention.parameters())
    assert_close(mixer, tokens(), run(attention, rotary, tokens()))


def copy_norms(attention, weights, offset=0.0):
    put(attention, "q_norm.weight", weights["query_norm"]["scale"] - offset)
    put(attention, "k_norm.weight", weights["key_norm"]["scale"] - offset)


@both_layers
def test_gpt_oss_sink(layer, heads, kv_heads, head_dim):
    mixer = layer_row(layer, heads, kv_heads, head_dim, sink=True).mixer()
    config = GptOssConfig(**common(heads, kv_heads, head_dim), **LAYERS, rope_parameters=DEFAULT_ROPE)
    attention = blank(modeling_gpt_oss.GptOssAttention(config, layer))
    weights = tensors(mixer)
    copy_heads(attention, weights)
    put(attention, "sinks", weights["sink"])
    assert_same(mixer, attention, modeling_gpt_oss.GptOssRotaryEmbedding(config))


@both_layers
def test_gemma2_soft_cap_and_scale(layer, heads, kv_heads, head_dim):
    mixer = layer_row(layer, heads, kv_heads, head_dim, soft_cap=2.0, scale=5**-0.5).mixer()
    caps = {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 5}
    config = Gemma2Config(**common(heads, kv_heads, head_dim), **LAYERS, **caps, rope_parameters=DEFAULT_ROPE)
    attention = blank(modeling_gemma2.Gemma2Attention(config, layer))
    copy_heads(attention, tensors(mixer))
    assert_same(mixer, attention, modeling_gemma2.Gemma2RotaryEmbedding(config))


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(6, 3, 24), (4, 1, 40)])
def test_qwen3_next_gate_and_partial_rope(heads, kv_heads, head_dim):
    settings = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": head_dim}
    mixer = Row("gqa", settings | {"output_gate": True, "rope_fraction": 0.25}, qk_norm=True).mixer()
    config = Qwen3NextConfig(
        **common(heads, kv_heads, head_dim),
        num_hidden_layers=1,
        layer_types=["full_attention"],
        rope_parameters=DEFAULT_ROPE | {"partial_rotary_factor": 0.25},
    )
    attention = blank(modeling_qwen3_next.Qwen3NextAttention(config, 0))
    weights = tensors(mixer)
    # theirs is [q | gate] head by head
    both = [weights[name]["kernel"].reshape(D_MODEL, heads, -1) for name in ("query", "gate")]
    copy_heads(attention, {**weights, "query": {"kernel": torch.cat(both, dim=-1).reshape(D_MODEL, -1)}})
    copy_norms(attention, weights, offset=1.0)
    assert_same(mixer, attention, modeling_qwen3_next.Qwen3NextRotaryEmbedding(config))


@both_layers
def test_gemma3_two_bases(layer, heads, kv_heads, head_dim):
    mixer = layer_row(layer, heads, kv_heads, head_dim, qk_norm=True, global_theta=1e6, scale=20**-0.5).mixer()
    config = Gemma3TextConfig(**common(heads, kv_heads, head_dim), **LAYERS, query_pre_attn_scalar=20)
    bases = [config.rope_parameters[kind]["rope_theta"] for kind in config.layer_types]
    assert bases == [1e4, 1e6]
    attention = blank(modeling_gemma3.Gemma3Attention(config, layer))
    weights = tensors(mixer)
    copy_heads(attention, weights)
    copy_norms(attention, weights, offset=1.0)
    assert_same(mixer, attention, modeling_gemma3.Gemma3RotaryEmbedding(config))


def interleaved(kernel, heads):
    """Columns of a projection whose heads pair channels (k, k + R/2), in the order that pairs (2k, 2k + 1)."""
    return kernel.reshape(D_MODEL, heads, 2, -1).transpose(2, 3).reshape(D_MODEL, -1)


@pytest.mark.parametrize("layer", ["chunked", "chunked_raw", "global", "global_cool"])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(6, 3, 10), (4, 1, 16)])
def test_llama4(layer, heads, kv_heads, head_dim):
    settings = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": head_dim}
    if layer in ("chunked", "chunked_raw"):
        mixer = Row("chunked", settings | {"chunk": CHUNK, "unit_norm": layer == "chunked"}).mixer()
    else:
        floor = 7 if layer == "global" else 0
        mixer = Row("chunked_global", settings | {"temperature_floor": floor, "temperature_scale": 0.5}).mixer()
    config = Llama4TextConfig(
        **common(heads, kv_heads, head_dim),
        num_hidden_layers=2,
        no_rope_layers=[1, 0],
        attention_chunk_size=CHUNK,
        use_qk_norm=layer != "chunked_raw",
        attn_temperature_tuning=layer != "global_cool",
        floor_scale=7,
        attn_scale=0.5,
        rope_parameters=DEFAULT_ROPE,
    )
    attention = blank(modeling_llama4.Llama4TextAttention(config, 0 if layer.startswith("chunked") else 1))
    weights = tensors(mixer)
    turned = {name: {"kernel": interleaved(weights[name]["kernel"], n)} for name, n in [("query", heads), ("key", kv_heads)]}
    copy_heads(attention, {**weights, **turned})
    assert_same(mixer, attention, modeling_llama4.Llama4TextRotaryEmbedding(config))


def gemma3n_row(layer, *shape):
    return layer_row(layer, *shape, qk_norm=True, global_theta=1e6, scale=1.0, value_norm=True)


@both_layers
def test_gemma3n_value_norm(layer, heads, kv_heads, head_dim):
    mixer = gemma3n_row(layer, heads, kv_heads, head_dim).mixer()
    config = Gemma3nTextConfig(**common(heads, kv_heads, head_dim), **LAYERS, num_kv_shared_layers=0)
    attention = blank(modeling_gemma3n.Gemma3nTextAttention(config, layer))
    weights = tensors(mixer)
    copy_heads(attention, weights)
    copy_norms(attention, weights)
    assert_same(mixer, attention, modeling_gemma3n.Gemma3nRotaryEmbedding(config))


@both_layers
def test_gemma3n_shared_keys_and_values(layer, heads, kv_heads, head_dim):
    row = gemma3n_row(layer, heads, kv_heads, head_dim)
    source, reader = row.mixer(), row.mixer(seed=3, remembers=False)
    four = {"num_hidden_layers": 4, "layer_types": LAYERS["layer_types"] * 2, "num_kv_shared_layers": 2}
    config = Gemma3nTextConfig(**common(heads, kv_heads, head_dim), **LAYERS | four)
    their_source = blank(modeling_gemma3n.Gemma3nTextAttention(config, layer))
    their_reader = blank(modeling_gemma3n.Gemma3nTextAttention(config, layer + 2))
    weights = tensors(source)
    copy_heads(their_source, weights)
    copy_norms(their_source, weights)
    weights = tensors(reader)
    put(their_reader, "q_proj.weight", weights["query"]["kernel"])
    put(their_reader, "q_norm.weight", weights["query_norm"]["scale"])
    put(their_reader, "o_proj.weight", weights["out"]["kernel"])
    rotary, shared, below, above = modeling_gemma3n.Gemma3nRotaryEmbedding(config), {}, tokens(7), tokens(8)
    memory, _ = source.remember(below)

    def read(mixer, x):
        return mixer.read(x, None, memory)

    assert_close(source, below, run(their_source, rotary, below, shared_kv_states=shared), read)
    assert_close(reader, above, run(their_reader, rotary, above, shared_kv_states=shared), read)


@pytest.mark.parametrize(("fraction", "heads", "kv_heads"), [(0.25, 4, 2), (0.75, 4, 1), (0.25, 2, 2)])
def test_stablelm_partial_rope(fraction, heads, kv_heads):
    mixer = Row("gqa", {"num_heads": heads, "num_kv_heads": kv_heads, "rope_fraction": fraction}).mixer()
    config = StableLmConfig(
        **common(heads, kv_heads), num_hidden_layers=1, rope_parameters=DEFAULT_ROPE | {"partial_rotary_factor": fraction}
    )
    attention = blank(modeling_stablelm.StableLmAttention(config, 0))
    copy_heads(attention, tensors(mixer))
    assert_same(mixer, attention, modeling_stablelm.StableLmRotaryEmbedding(config))


@pytest.mark.parametrize(("window", "heads", "kv_heads"), [(0, 4, 2), (0, 2, 1), (WINDOW, 8, 2)])
def test_smollm3_nope(window, heads, kv_heads):
    mixer = Row("gqa", {"num_heads": heads, "num_kv_heads": kv_heads, "rope_fraction": 0.0, "window": window}).mixer()
    sliding = {"use_sliding_window": True, "sliding_window": window} if window else {}
    config = SmolLM3Config(
        **common(heads, kv_heads), num_hidden_layers=1, no_rope_layers=[0], **sliding, rope_parameters=DEFAULT_ROPE
    )
    attention = blank(modeling_smollm3.SmolLM3Attention(config, 0))
    copy_heads(attention, tensors(mixer))
    assert_same(mixer, attention, modeling_smollm3.SmolLM3RotaryEmbedding(config))
