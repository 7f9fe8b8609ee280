"""Recurrences without the delta rule: layers of transformers and recurrences of fla-core with the same numbers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from fla_naive import modeling, naive
from helpers import EXACT, close
from matrix import D_MODEL, HEADS, Row
from test_oracles import assert_close, put, tensors

from mla.errors import UserError
from mla.model import decays, parameters
from mla.ops.recurrence import linear_recurrence

LENGTH = 70
recurrence = jax.jit(linear_recurrence, static_argnames="chunk")


def run(layer: Any, x: jax.Array, *arguments: Any) -> np.ndarray:
    with torch.no_grad():
        found = layer.eval()(torch.tensor(np.asarray(x)), *arguments)
    return (found[0] if isinstance(found, tuple) else found).numpy()


@pytest.mark.parametrize("layer", [0, 3])
def test_lightning_is_the_layer_of_minimax(layer: int) -> None:
    """q, k and v of one projection, head by head; its slopes are those of layer `layer` of five."""
    minimax = modeling("minimax")
    mixer = Row("lightning", {"head_dim": 12}).mixer(layer=layer, num_layers=5)
    config = minimax.MiniMaxConfig(
        hidden_size=D_MODEL, num_attention_heads=HEADS, head_dim=12, num_hidden_layers=5, block_size=16, hidden_act="silu"
    )
    theirs, weights = minimax.MiniMaxLightningAttention(config, layer), tensors(mixer)
    heads = [weights[name]["kernel"].reshape(D_MODEL, HEADS, 12) for name in ("query", "key", "value")]
    put(theirs, "qkv_proj.weight", torch.cat(heads, dim=-1).reshape(D_MODEL, -1))
    put(theirs, "norm.weight", weights["out_norm"]["scale"])
    put(theirs, "output_gate.weight", weights["gate"]["kernel"])
    put(theirs, "out_proj.weight", weights["out"]["kernel"])
    x = jax.random.normal(jax.random.key(7), (2, LENGTH, D_MODEL))
    assert_close(mixer, x, run(theirs, x, None, None))


@pytest.mark.parametrize("groups", [1, 2])
def test_mamba2_is_the_layer_of_transformers(groups: int) -> None:
    mamba = modeling("mamba2")
    mixer = Row("mamba2", {"head_dim": 16, "state_size": 10, "n_groups": groups}).mixer(norm_eps=1e-5)
    config = mamba.Mamba2Config(
        hidden_size=D_MODEL, num_heads=HEADS, head_dim=16, state_size=10, n_groups=groups, expand=2, chunk_size=32,
        num_hidden_layers=1,
    )  # fmt: skip
    theirs, weights = mamba.Mamba2Mixer(config, 0), tensors(mixer)
    order = ("value", "key", "query")
    projections = torch.cat([weights[name]["kernel"] for name in ("gate", *order, "step_in")], dim=1)
    put(theirs, "in_proj.weight", projections)
    put(theirs, "norm.weight", weights["out_norm"]["scale"])
    put(theirs, "out_proj.weight", weights["out"]["kernel"])
    convolution = weights["convolution"]
    with torch.no_grad():
        theirs.conv1d.weight.copy_(torch.cat([convolution["kernels"][name].T for name in order])[:, None])
        theirs.conv1d.bias.copy_(torch.cat([convolution["biases"][name] for name in order]))
        theirs.A_log.copy_(weights["rates"]["a_log"])
        theirs.dt_bias.copy_(weights["rates"]["dt_bias"])
        theirs.D.copy_(weights["skip"])
    x = jax.random.normal(jax.random.key(7), (2, LENGTH, D_MODEL))
    assert_close(mixer, x, run(theirs, x))


# ------------------------------------------------------------------------------------------------------------ recurrences


def given(values: int = 10) -> dict[str, np.ndarray]:
    """Queries, keys, values and log-decays, one a head and one a channel, fp32."""
    draw = np.random.default_rng(0)
    shape = (2, LENGTH, 3)
    q, k, v = (draw.normal(size=(*shape, width)) for width in (8, 8, values))
    numbers = {"q": q, "k": k, "v": v, "g": -(draw.random((*shape, 1)) ** 4), "channels": -(draw.random((*shape, 8)) ** 4)}
    return {name: a.astype(np.float32) for name, a in numbers.items()}


def fla(rule: str, d: dict[str, np.ndarray]) -> torch.Tensor:
    """Outputs of fla-core's recurrence, from an empty state."""
    q, k, v, g, channels = (torch.tensor(d[name]) for name in ("q", "k", "v", "g", "channels"))
    if rule == "scalar":
        return naive("simple_gla").naive_recurrent_simple_gla(q, k, v, g[..., 0])[0]
    if rule == "channels":
        return naive("gla").naive_recurrent_gla(q, k, v, channels)[0]
    if rule == "retention":
        return naive("retention").naive_retention(*(a.transpose(1, 2) for a in (q, k, v))).transpose(1, 2)
    return naive("linear_attn").naive_recurrent_linear_attn(q.exp(), k.exp(), v, normalize=rule == "normalised")[0]


@pytest.mark.parametrize("rule", ["scalar", "channels", "retention", "plain", "normalised"])
def test_recurrences_are_those_of_fla(rule: str) -> None:
    """In fp32 as theirs are: 1e-5 of unit rms."""
    numbers = given()
    d = {name: jnp.asarray(a) for name, a in numbers.items()}
    gamma = jnp.log1p(-(2.0 ** (-5 - jnp.arange(3.0))))[:, None]
    decays = {"scalar": d["g"], "channels": d["channels"], "retention": jnp.broadcast_to(gamma, d["g"].shape)}
    q, k, v = d["q"] * 8**-0.5, d["k"], d["v"]
    if rule in ("plain", "normalised"):
        q, k = jnp.exp(d["q"]) * 8**-0.5, jnp.exp(k)
        v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
    outputs, _ = recurrence(q, k, v, jnp.zeros((2, 3, 8, v.shape[-1])), decays.get(rule), chunk=16)
    if rule in ("plain", "normalised"):
        outputs = outputs[..., :-1] / (outputs[..., -1:] if rule == "normalised" else 1)
    close(outputs, fla(rule, numbers).numpy(), 1e-5, unit=True)


@pytest.mark.usefixtures("float64")
def test_channels_that_decay_alike_are_one_decay() -> None:
    d = {name: jnp.asarray(a, jnp.float64) for name, a in given().items()}
    state = jnp.zeros((2, 3, 8, 10))
    both = (recurrence(d["q"], d["k"], d["v"], state, g, chunk=16) for g in (d["g"], jnp.repeat(d["g"], 8, axis=-1)))
    for one, other in zip(*both, strict=True):
        close(one, other, EXACT, unit=True)


@pytest.mark.usefixtures("float64")
def test_retention_is_its_parallel_form() -> None:
    """Equations 5 to 8 of 2307.08621 in numpy, the whole layer: y = (SiLU(x W_G) * norm((Q K^T * D) V)) W_O."""
    mixer = Row("retention", {"head_dim": 6, "v_head_dim": 10, "chunk": 16}).mixer()
    w = jax.tree.map(lambda a: np.asarray(a, np.float64), parameters(mixer))
    x = np.random.default_rng(1).normal(size=(LENGTH, D_MODEL))
    t, merged = np.arange(LENGTH), []
    turn = np.exp(1j * t[:, None] * 10_000.0 ** -np.linspace(0, 1, 3))
    for head in range(HEADS):
        q, k = ((x @ w[name]["kernel"][:, 6 * head : 6 * head + 6]).reshape(LENGTH, 3, 2) for name in ("query", "key"))
        q, k = ((u[..., 0] + 1j * u[..., 1]) * turn for u in (q, k))
        since = t[:, None] - t
        fading = np.where(since >= 0, (1 - 2.0 ** (-5 - head)) ** np.maximum(since, 0), 0)
        scores = (q @ k.conj().T).real * 6**-0.5 * fading
        o = scores @ (x @ w["value"]["kernel"][:, 10 * head : 10 * head + 10])
        merged.append(o / np.sqrt(np.mean(o**2, axis=-1, keepdims=True) + 1e-6))
    gate = x @ w["gate"]["kernel"]
    expected = (gate / (1 + np.exp(-gate)) * np.concatenate(merged, axis=-1)) @ w["out"]["kernel"]
    close(jax.jit(mixer)(jnp.asarray(x)[None])[0], expected, EXACT, unit=True)


@pytest.mark.usefixtures("float64")
def test_gated_linear_is_its_recurrence() -> None:
    """Section 4 of 2312.06635 in numpy, the whole layer, a token at a time."""
    mixer = Row("gated_linear", {"head_dim": 6, "v_head_dim": 10, "chunk": 16}).mixer()
    w = jax.tree.map(lambda a: np.asarray(a, np.float64), parameters(mixer))
    x = np.random.default_rng(1).normal(size=(LENGTH, D_MODEL))
    low = x @ w["decay_down"]["kernel"] @ w["decay_up"]["kernel"] + w["decay_up"]["bias"]
    alpha = (1 / (1 + np.exp(-low))) ** (1 / 16)
    gate = x @ w["gate"]["kernel"]
    expected = np.zeros((LENGTH, D_MODEL))
    for head in range(HEADS):
        keys, values = slice(6 * head, 6 * head + 6), slice(10 * head, 10 * head + 10)
        q, k, v = (x @ w[name]["kernel"][:, at] for name, at in (("query", keys), ("key", keys), ("value", values)))
        state = np.zeros((6, 10))
        for t in range(LENGTH):
            state = alpha[t, keys][:, None] * state + np.outer(k[t], v[t])
            o = q[t] @ state * 6**-0.5
            o = o / np.sqrt(np.mean(o**2) + 1e-6) * w["out_norm"]["scale"]
            expected[t] += (o * gate[t, values] / (1 + np.exp(-gate[t, values]))) @ w["out"]["kernel"][values]
    close(jax.jit(mixer)(jnp.asarray(x)[None])[0], expected, EXACT, unit=True)


@pytest.mark.usefixtures("float64")
def test_mamba2_of_one_step_size_is_a_scalar_decay() -> None:
    """dt = 1 everywhere and D = 0: gated linear attention with one decay a head, without a scale."""
    mixer: Any = Row("mamba2", {"head_dim": 16, "state_size": 6, "n_groups": 2}).mixer()
    mixer.step_in.kernel[...] = jnp.zeros_like(mixer.step_in.kernel[...])
    mixer.rates.dt_bias[...] = jnp.full_like(mixer.rates.dt_bias[...], np.log(np.e - 1))
    mixer.skip[...] = jnp.zeros_like(mixer.skip[...])
    x = jax.random.normal(jax.random.key(7), (1, 30, D_MODEL))
    inputs = mixer.convolution(mixer.inputs(x), None, mixer.init_cache(1, 30, jnp.float64)["tail"])[0]
    tokens = mixer.tokens(x, inputs, None)
    close(tokens.values, inputs["value"].reshape(tokens.values.shape), EXACT)
    close(tokens.decay, -jnp.broadcast_to(jnp.exp(mixer.rates.a_log[...])[:, None], tokens.decay.shape), EXACT)
    heads, _ = recurrence(*tokens[:3], jnp.zeros((1, 4, 6, 16)), tokens.decay, chunk=16)
    close(jax.jit(mixer)(x), mixer.finished(x, inputs, heads), EXACT, unit=True)


# --------------------------------------------------------------------------------------------------- sizes and bad input


def test_what_shrinks_and_what_does_not() -> None:
    said = decays(Row("mamba2").mixer())
    assert not any([said["skip"], said["rates"]["a_log"], said["rates"]["dt_bias"], said["out_norm"]["scale"]])
    assert said["value"]["kernel"] and said["convolution"]["kernels"]["value"]


@pytest.mark.parametrize(
    ("name", "heads", "elements"),
    [
        ("linear", 12, 49_920),
        ("lightning", 12, 49_152),
        ("gated_linear", 4, 73_728),
        ("delta", 6, 98_304 + 6_912),
        ("kimi_delta", 6, 98_304 + 6_912),
        ("gated_delta", 6, 110_592 + 6_912),
        ("gated_delta_2", 6, 98_304 + 6_912),
        ("mamba2", 24, 196_608 + 5_376),
        ("retention", 3, 393_216),
    ],
)
def test_states_have_their_published_sizes(name: str, heads: int, elements: int) -> None:
    """At d_model 768, states and tails of convolutions together."""
    row = Row(name, {"num_heads": heads})
    assert sum(term.elements for term in row.config().cache_formula(row.around(d_model=768, num_heads=12))) == elements


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("retention", {"head_dim": 7}, "head_dim: 7 is odd; channels are rotated in pairs"),
        ("lightning", {"num_heads": 5}, "head_dim: set it: d_model 32 does not divide into 5 heads"),
        ("gated_linear", {"num_heads": 5}, "head_dim: set it: half of d_model 32 does not divide into 5 heads"),
        ("gated_linear", {"gate_rank": 0}, "gate_rank: 0 is not a positive number of channels"),
        ("mamba2", {"n_groups": 3, "head_dim": 16}, "n_groups: 3 does not divide 4 heads"),
        ("mamba2", {"head_dim": 12}, "head_dim: 12 does not divide 64 inner channels, expand 2 times d_model 32"),
        ("mamba2", {"num_heads": 3, "head_dim": 16}, "num_heads: 3 heads of head_dim 16 are not 64 inner channels; set one"),
        ("mamba2", {"conv_taps": 1}, "conv_taps: 1 looks at no token before the newest; 2 is the least"),
        ("mamba2", {"chunk": -1}, "chunk: -1 is not a positive number of tokens"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_one_line(name: str, settings: dict[str, Any], message: str) -> None:
    row = Row(name, settings)
    with pytest.raises(UserError) as refused:
        row.config().validate(row.around())
    assert str(refused.value) == f"config.model.mechanism.{message}"
