"""The delta family: layers of transformers and recurrences of fla-core with the same numbers, and what reduces to what."""

from __future__ import annotations

import dataclasses
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
from test_oracles import assert_close, put, tensors

from mla.errors import UserError
from mla.layers.decay import RATES, STEPS, SoftplusDecay
from mla.model import decays, parameters, with_parameters
from mla.ops.recurrence import linear_recurrence

LENGTH = 70  # past one chunk of 64, ours and theirs
recurrence = jax.jit(linear_recurrence, static_argnames="chunk")
EPS = {"norm_eps": 1e-5}


def copy(theirs: Any, names: dict[str, str], weights: Any) -> None:
    """Linear layers and norms by name, the convolution of [q | k | v], A_log and dt_bias."""
    for own, other in names.items():
        put(theirs, f"{other}.weight", weights[own]["scale" if own == "out_norm" else "kernel"])
    kernels = weights["convolution"]["kernels"]
    with torch.no_grad():
        theirs.conv1d.weight.copy_(torch.cat([kernels[name].T for name in ("query", "key", "value")])[:, None])
        rates = theirs.forget_gate if hasattr(theirs, "forget_gate") else theirs
        rates.A_log.copy_(weights["rates"]["a_log"].reshape(rates.A_log.shape))
        rates.dt_bias.copy_(weights["rates"]["dt_bias"])


SHARED = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj", "out_norm": "o_norm", "beta": "b_proj"}
LOW_RANK = {
    "decay_down": "forget_gate.f_a_proj",
    "decay_up": "forget_gate.f_b_proj",
    "gate_down": "g_a_proj",
    "gate_up": "g_b_proj",
}


def outputs(theirs: Any, x: jax.Array) -> np.ndarray:
    with torch.no_grad():
        return theirs.eval()(torch.tensor(np.asarray(x))).numpy()


def test_gated_delta_is_the_layer_of_olmo_hybrid() -> None:
    """Its beta is doubled; all other layers of its kind leave it."""
    olmo = modeling("olmo_hybrid")
    mixer = Row("gated_delta", {"head_dim": 12, "v_head_dim": 20, "negative_eigenvalues": True}).mixer(**EPS)
    config = olmo.OlmoHybridConfig(
        hidden_size=D_MODEL,
        linear_num_key_heads=HEADS,
        linear_num_value_heads=HEADS,
        linear_key_head_dim=12,
        linear_value_head_dim=20,
        linear_allow_neg_eigval=True,
        layer_types=["linear_attention", "full_attention"],
        num_hidden_layers=2,
    )
    layer = olmo.OlmoHybridGatedDeltaNet(config, 0)
    copy(layer, SHARED | {"decay_in": "a_proj", "gate_in": "g_proj"}, tensors(mixer))
    x = jax.random.normal(jax.random.key(7), (2, LENGTH, D_MODEL))
    assert_close(mixer, x, outputs(layer, x))


def test_kimi_delta_is_the_layer_of_kimi_linear() -> None:
    kimi = modeling("kimi_linear")
    mixer = Row("kimi_delta", {"head_dim": 12}).mixer(**EPS)
    config = kimi.KimiLinearConfig(
        hidden_size=D_MODEL, linear_num_heads=HEADS, linear_head_dim=12, num_hidden_layers=2, rms_norm_eps=1e-5
    )
    layer = kimi.KimiLinearDeltaAttention(config, 0)
    copy(layer, SHARED | LOW_RANK, tensors(mixer))
    x = jax.random.normal(jax.random.key(7), (2, LENGTH, D_MODEL))
    assert_close(mixer, x, outputs(layer, x))


@pytest.mark.parametrize("bound", [0.0, 5.0])
def test_decays_are_those_of_glm(bound: float) -> None:
    """Transformers' gate of GLM, with a bound and without; fla's recurrence takes the same logarithms."""
    glm = modeling("glm5_next")
    mixer: Any = Row("kimi_delta", {"head_dim": 12, "gate_bound": bound}).mixer()
    fields = {"hidden_size": D_MODEL, "linear_head_dim": 12, "linear_num_heads": HEADS, "linear_lower_bound": -bound or None}
    gate, weights = glm.Glm5NextTextForgetGate(type("Config", (), fields)()), tensors(mixer)
    for own, other in (("decay_down", "f_a_proj"), ("decay_up", "f_b_proj")):
        put(gate, f"{other}.weight", weights[own]["kernel"])
    with torch.no_grad():
        gate.A_log.copy_(weights["rates"]["a_log"])
        gate.dt_bias.copy_(weights["rates"]["dt_bias"])
    x = 3 * jax.random.normal(jax.random.key(7), (2, 9, D_MODEL))
    found = np.asarray(mixer.decay(x))
    close(found, outputs(gate, x), 2e-5, unit=True)
    assert (found <= 0).all() and (not bound or -bound <= found.min() < -bound / 2)


# ------------------------------------------------------------------------------------------------------------ recurrences


def drawn(values: int = 10) -> dict[str, Any]:
    """Unit queries and keys, values, gates and log-decays of every kind, fp32."""
    draw = np.random.default_rng(0)
    shape = (2, LENGTH, 3)
    q, k = (u / np.linalg.norm(u, axis=-1, keepdims=True) for u in draw.normal(size=(2, *shape, 8)))
    given = {
        "q": q,
        "k": k,
        "v": draw.normal(size=(*shape, values)),
        "beta": draw.random((*shape, 1)),
        "erase": draw.random((*shape, 8)),
        "write": draw.random((*shape, values)),
        "g": -(draw.random((*shape, 1)) ** 4),
        "channels": -(draw.random((*shape, 8)) ** 4),
        "state": draw.normal(size=(2, 3, 8, values)),
    }
    return {name: a.astype(np.float32) for name, a in given.items()}


def ours(given: dict[str, Any], decay: str, erase: str, write: str) -> tuple[jax.Array, jax.Array]:
    """Outputs and last state, with what stands under these names; no decay under an empty one."""
    d = {name: jnp.asarray(a) for name, a in given.items()}
    decays = d[decay] if decay else None
    return recurrence(d["q"] * 8**-0.5, d["k"], d["v"] * d[write], d["state"], decays, d[erase] * d["k"], chunk=16)


def theirs(rule: str, d: dict[str, Any]) -> tuple[Any, Any]:
    """Outputs and last state by fla-core's recurrence."""
    t = {name: torch.tensor(a) for name, a in d.items()}
    q, k, v, start = t["q"], t["k"], t["v"], {"initial_state": t["state"], "output_final_state": True}
    if rule == "delta":
        heads_first = [a.transpose(1, 2) for a in (q, k, v, t["beta"][..., 0])]
        o, state = naive("delta_rule").delta_rule_recurrence(*heads_first, **start)
        return o.transpose(1, 2), state
    if rule == "gated_delta":
        return naive("gated_delta_rule").naive_recurrent_gated_delta_rule(
            q, k, v, t["beta"][..., 0], t["g"][..., 0], **start
        )
    if rule == "kimi_delta":
        return naive("kda").naive_recurrent_kda(q, k, v, t["channels"], t["beta"][..., 0], **start)
    return naive("gdn2").naive_recurrent_gdn2(q, k, v, t["channels"], t["erase"], t["write"], **start)


RULES = {
    "delta": ("", "beta", "beta"),
    "gated_delta": ("g", "beta", "beta"),
    "kimi_delta": ("channels", "beta", "beta"),
    "gated_delta_2": ("channels", "erase", "write"),
}


@pytest.mark.parametrize("rule", RULES)
def test_recurrences_are_those_of_fla(rule: str) -> None:
    """Outputs and states from a state that is not 0, in fp32 as theirs are: 1e-5 of unit rms."""
    d = drawn()
    for name, one, other in zip(("outputs", "state"), ours(d, *RULES[rule]), theirs(rule, d), strict=True):
        close(one, other.numpy(), 1e-5, name, unit=True)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("general", "special"),
    [
        (("channels of one head alike", "erase alike", "write alike"), "gated_delta"),
        (("none", "erase alike", "write alike"), "delta"),
        (("channels", "erase alike", "write alike"), "kimi_delta"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_reduces_to_what(general: tuple[str, ...], special: str) -> None:
    """Gates of every channel that are alike are gates of a head, decays of 1 are none: in float64."""
    d = {name: a.astype(np.float64) for name, a in drawn().items()}
    d |= {"channels of one head alike": np.repeat(d["g"], 8, axis=-1), "none": np.zeros_like(d["channels"])}
    d |= {"erase alike": np.repeat(d["beta"], 8, axis=-1), "write alike": np.repeat(d["beta"], 10, axis=-1)}
    for a, b in zip(ours(d, *general), ours(d, *RULES[special]), strict=True):
        close(a, b, EXACT, unit=True)


@pytest.mark.usefixtures("float64")
def test_mechanisms_reduce_too() -> None:
    """Gated DeltaNet-2 whose gates see the same, with a sigmoid in the place of its gate's SiLU, is Kimi's."""
    kimi: Any = Row("kimi_delta", {"head_dim": 12}).mixer()
    second: Any = Row("gated_delta_2", {"head_dim": 12}).mixer()
    weights = parameters(kimi)
    beta = weights.pop("beta")["kernel"]
    weights["erase_in"], weights["write_in"] = ({"kernel": jnp.repeat(beta, 12, axis=-1)} for _ in range(2))
    weights["gate_up"]["bias"] = jnp.zeros(HEADS * 12)
    made = with_parameters(nnx.graphdef(second), weights)
    x = jax.random.normal(jax.random.key(7), (1, 30, D_MODEL))
    silu, sigmoid = made.gate(x), kimi.gate(x)
    close(silu, sigmoid * made.gate_up(made.gate_down(x)), EXACT, unit=True)
    for one, other in zip(made.tokens(x, {}, None), kimi.tokens(x, {}, None), strict=True):
        close(one, other, EXACT, unit=True)


@pytest.mark.usefixtures("float64")
def test_a_key_written_again_has_the_new_value_alone() -> None:
    """Orthonormal keys at full strength: each is read as it was written last, exactly."""
    keys, values = jnp.eye(8)[None, :, None], jax.random.normal(jax.random.key(0), (1, 16, 1, 5))
    twice = jnp.concatenate([keys, keys], axis=1)
    _, state = recurrence(twice, twice, values, jnp.zeros((1, 1, 8, 5)), None, twice, chunk=16)
    close(state[0, 0], values[0, 8:, 0], EXACT)


# ------------------------------------------------------------------------------------------------------- how they start


@pytest.mark.parametrize(("name", "rates"), [("gated_delta", (0.0, 16.0)), ("kimi_delta", RATES), ("gated_delta_2", RATES)])
def test_decays_start_as_published_and_do_not_shrink(name: str, rates: tuple[float, float]) -> None:
    row = Row(name, {"num_heads": 64, "head_dim": 6})
    mixer: Any = row.of[1](row.config(), row.around(jnp.bfloat16), rngs=nnx.Rngs(0))
    rate, step = np.exp(np.asarray(mixer.rates.a_log[...])), np.logaddexp(np.asarray(mixer.rates.dt_bias[...]), 0)
    assert rates[0] <= rate.min() < rates[0] + 2 and rates[1] - 2 < rate.max() <= rates[1]
    assert STEPS[0] * 0.99 <= step.min() < 3e-3 and 3e-2 < step.max() <= STEPS[1] * 1.01
    assert abs(np.mean(np.log(step)) - np.mean(np.log(STEPS))) < 0.5
    assert mixer.rates.a_log[...].dtype == mixer.rates.dt_bias[...].dtype == jnp.float32
    assert decays(mixer)["rates"] == {"a_log": False, "dt_bias": False} and decays(mixer)["query"]["kernel"]


def test_a_bound_holds_decays_that_would_be_faster() -> None:
    u = jnp.full((1, 1, 6), 30.0)
    free, held = (SoftplusDecay(2, 3, rngs=nnx.Rngs(0), bound=bound)(u) for bound in (0.0, 5.0))
    assert free.max() < -5 and held.min() >= -5


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("delta", {"num_heads": 5}, "mechanism.head_dim: set it: d_model 32 does not divide into 5 heads"),
        ("gated_delta", {"num_heads": 7}, "mechanism.head_dim: set it: 3/4 of d_model 32 does not divide into 7 heads"),
        ("gated_delta", {"num_key_heads": 3}, "mechanism.num_key_heads: 3 does not divide 4 heads"),
        ("kimi_delta", {"gate_bound": 90.0}, "mechanism.gate_bound: 90.0 is not from 0 to 80; 0 leaves the decay unbounded"),
        ("delta", {"conv_taps": 1}, "mechanism.conv_taps: 1 looks at no token but the newest; 0 leaves the convolution out"),
        ("kimi_delta", {"chunk": 0}, "mechanism.chunk: 0 is not a positive number of tokens"),
        ("linear", {"normalise": "none"}, "mechanism.normalise: 'none' is none of denominator, rmsnorm"),
    ],
)
def test_what_cannot_work_is_one_line(name: str, settings: dict[str, Any], message: str) -> None:
    row = Row(name, settings)
    with pytest.raises(UserError) as refused:
        row.config().validate(row.around())
    assert str(refused.value) == f"config.model.{message}"


def test_no_query_or_key_is_normed_twice() -> None:
    row = dataclasses.replace(Row("delta"), qk_norm=True)
    with pytest.raises(UserError, match=r"config\.model\.qk_norm: Delta has no per-head q and k to norm"):
        row.config().validate(row.around())
