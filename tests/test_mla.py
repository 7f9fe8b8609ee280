"""MLA against its paper: a float64 numpy transcription of the equations, the two forms, the published sizes."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import EXACT, close, contiguous_mask, relative_norm
from matrix import YARN, Row

from mla import config as configs
from mla import model as models
from mla.attention.softmax.mla import MLA, MLAConfig
from mla.cache.meter import bookkeeping_bytes, content_bytes

FORMS = {
    "plain": {"kv_lora_rank": 20, "qk_rope_head_dim": 4},
    "query_compression": {"kv_lora_rank": 20, "qk_rope_head_dim": 4, "q_lora_rank": 24},
    "values_wider": {"kv_lora_rank": 12, "qk_rope_head_dim": 6, "qk_nope_head_dim": 10, "v_head_dim": 14},
    "sqrt_scale": {"kv_lora_rank": 20, "qk_rope_head_dim": 4, "q_lora_rank": 12, "latent_scale": "sqrt"},
    "yarn": {"kv_lora_rank": 20, "qk_rope_head_dim": 8, "yarn": YARN},
    "yarn_half_split": {"kv_lora_rank": 20, "qk_rope_head_dim": 8, "yarn": YARN, "rope_interleaved": False},
    "yarn_unequal_mscale": {"kv_lora_rank": 20, "qk_rope_head_dim": 8, "yarn": YARN | {"mscale": 1.3}},
    "yarn_no_mscale_all_dim": {"kv_lora_rank": 20, "qk_rope_head_dim": 8, "yarn": YARN | {"mscale_all_dim": 0.0}},
    "nope": {"kv_lora_rank": 20, "qk_rope_head_dim": 0},
}
pytestmark = pytest.mark.usefixtures("float64")
every_form = pytest.mark.parametrize("settings", FORMS.values(), ids=FORMS)


# ------------------------------------------------------------------- the paper, token by token and head by head, float64


def paper_rope(vector, position, theta, interleaved, yarn):
    """Rotation of one vector at one position, from the definitions of RoPE and of YaRN (DeepSeek-V2, section 3.1.4)."""
    dim = len(vector)
    out = np.zeros(dim)
    for j in range(dim // 2):
        frequency = theta ** (-2 * j / dim)
        magnitude = 1.0
        if yarn:
            # channel pairs that turn more than beta_fast times within the original context keep their frequency
            def at(beta):
                return dim * np.log(yarn["original_context"] / (beta * 2 * np.pi)) / (2 * np.log(theta))

            low, high = max(np.floor(at(32.0)), 0), min(np.ceil(at(1.0)), dim - 1)
            ramp = min(max((j - low) / (high - low), 0.0), 1.0)
            frequency = frequency * (1 - ramp) + frequency / yarn["factor"] * ramp

            def temperature(a):
                return 0.1 * a * np.log(yarn["factor"]) + 1

            if yarn["mscale_all_dim"]:
                magnitude = temperature(yarn["mscale"]) / temperature(yarn["mscale_all_dim"])
            else:
                magnitude = temperature(1.0)
        a, b = (2 * j, 2 * j + 1) if interleaved else (j, j + dim // 2)
        cos, sin = np.cos(position * frequency) * magnitude, np.sin(position * frequency) * magnitude
        out[a] = vector[a] * cos - vector[b] * sin
        out[b] = vector[b] * cos + vector[a] * sin
    return out


def paper_norm(vector, gain, eps):
    return vector / np.sqrt(np.mean(vector**2) + eps) * gain


def paper_mla(mixer: MLA, x: np.ndarray) -> np.ndarray:
    """Equations 9 to 19 for one sequence x [T, D], with k_i and v_i written out."""
    weights = jax.tree.map(lambda a: np.asarray(a, np.float64), models.parameters(mixer))
    config, heads, eps = mixer.config, mixer.num_heads, mixer.around.norm_eps
    n, r, v = mixer.nope_dim, config.qk_rope_head_dim, mixer.v_dim
    theta, length, width = mixer.around.rope_theta, len(x), x.shape[1]
    yarn = dataclasses.asdict(config.yarn) if config.yarn.factor > 1 else None

    def factor(rank):
        return np.sqrt(width / rank) if config.latent_scale == "sqrt" else 1.0

    latents, rotated, out = [], [], np.zeros((length, width))
    scale = 1 / np.sqrt(n + r)
    if yarn and yarn["mscale_all_dim"]:
        scale *= (0.1 * yarn["mscale_all_dim"] * np.log(yarn["factor"]) + 1) ** 2
    w_uk = weights["key_up"]["kernel"].reshape(-1, heads, n)
    w_uv = weights["value_up"]["kernel"].reshape(-1, heads, v)
    w_o = weights["out"]["kernel"].reshape(heads, v, width)
    for t in range(length):
        down = x[t] @ weights["kv_down"]["kernel"]
        c = paper_norm(down[: config.kv_lora_rank], weights["kv_norm"]["scale"], eps)
        latents.append(c * factor(config.kv_lora_rank))
        rotated.append(paper_rope(down[config.kv_lora_rank :], t, theta, config.rope_interleaved, yarn))
        if config.q_lora_rank:
            c_q = paper_norm(x[t] @ weights["query"]["down"]["kernel"], weights["query"]["norm"]["scale"], eps)
            flat = (c_q * factor(config.q_lora_rank)) @ weights["query"]["up"]["kernel"]
        else:
            flat = x[t] @ weights["query"]["kernel"]
        for i, q in enumerate(flat.reshape(heads, n + r)):
            q = np.concatenate([q[:n], paper_rope(q[n:], t, theta, config.rope_interleaved, yarn)])
            keys = [np.concatenate([latents[s] @ w_uk[:, i], rotated[s]]) for s in range(t + 1)]
            scores = np.array([q @ k for k in keys]) * scale
            p = np.exp(scores - scores.max())
            p /= p.sum()
            out[t] += sum(p[s] * (latents[s] @ w_uv[:, i]) for s in range(t + 1)) @ w_o[i]
    return out


@every_form
def test_equals_the_papers_equations(settings):
    mixer = Row("mla", settings).mixer()
    x = jax.random.normal(jax.random.key(0), (1, 40, 32))
    expected = paper_mla(mixer, np.asarray(x[0], np.float64))
    for form in (MLA.attend_expanded, MLA.attend_absorbed):
        positions = jnp.arange(40, dtype=jnp.int32)[None]
        mask = contiguous_mask(1, 40)
        made = jax.jit(lambda x: mixer.out(form(mixer, mixer.queries(x, positions), mixer.entries(x, positions), mask)))  # noqa: B023
        close(made(x)[0], expected, EXACT, unit=True)


@every_form
@pytest.mark.parametrize("seed", [0, 1])
def test_absorbed_equals_expanded(settings, seed):
    mixer = Row("mla", settings).mixer(seed=seed)
    x = jax.random.normal(jax.random.key(seed), (2, 300, 32))
    positions = jnp.broadcast_to(jnp.arange(300, dtype=jnp.int32), (2, 300))
    mask = contiguous_mask(2, 300)

    @jax.jit
    def both(x):
        queries, entries = mixer.queries(x, positions), mixer.entries(x, positions)
        return mixer.attend_expanded(queries, entries, mask), mixer.attend_absorbed(queries, entries, mask)

    expanded, absorbed = both(x)
    close(absorbed, expanded, EXACT, unit=True)


def test_absorbed_stays_close_in_bf16():
    mixer = Row("mla", FORMS["query_compression"]).mixer(jnp.bfloat16)
    x = jax.random.normal(jax.random.key(0), (2, 64, 32), jnp.bfloat16)
    positions = jnp.broadcast_to(jnp.arange(64, dtype=jnp.int32), (2, 64))
    queries, entries = jax.jit(lambda: (mixer.queries(x, positions), mixer.entries(x, positions)))()
    mask = contiguous_mask(2, 64)
    expanded, absorbed = (jax.jit(form)(queries, entries, mask) for form in (mixer.attend_expanded, mixer.attend_absorbed))
    assert relative_norm(absorbed, expanded) < 1.5e-2


# ------------------------------------------------------------------------------------------------- which form, and when


def test_the_cheaper_form_is_chosen_by_the_number_of_new_tokens():
    """At DeepSeek-V3's shape the crossover is 262,144 / 1,536 = 170.7 new tokens over a long cache."""
    config = MLAConfig(kv_lora_rank=512, q_lora_rank=1536, qk_nope_head_dim=128, qk_rope_head_dim=64)
    around = dataclasses.replace(Row("mla").around(), d_model=7168, num_heads=128)
    mixer = nnx.eval_shape(lambda: MLA(config, around, rngs=nnx.Rngs(0)))
    assert mixer.absorbs(1, 100_000) and mixer.absorbs(170, 10**7)
    assert not mixer.absorbs(171, 10**7) and not mixer.absorbs(4096, 4096)
    for form, absorbed in [("absorbed", True), ("expanded", False)]:
        mixer.config = dataclasses.replace(config, attend=form)
        assert mixer.absorbs(1, 4096) is absorbed and mixer.absorbs(4096, 4096) is absorbed


# ---------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(("rank", "rope"), [(20, 4), (12, 6), (64, 16)])
def test_the_live_cache_holds_exactly_the_latent_and_the_rope_key(rank, rope):
    mixer = Row("mla", {"kv_lora_rank": rank, "qk_rope_head_dim": rope}).mixer()
    x = jax.random.normal(jax.random.key(0), (2, 9, 32))
    positions = jnp.broadcast_to(jnp.arange(9, dtype=jnp.int32), (2, 9))
    empty = mixer.init_cache(2, 9, jnp.float64)
    cache, entries = jax.jit(lambda: (mixer.extend(x, positions, empty)[1], mixer.entries(x, positions)))()
    streams = cache["entries"].streams
    assert sum(a.size for a in streams) == 2 * 9 * (rank + rope)
    np.testing.assert_array_equal(streams.c_kv, entries.c_kv)
    np.testing.assert_array_equal(streams.k_rope, entries.k_rope)


def deepseek_v2(layers: int) -> configs.Config:
    """The published shape: d_model 5120, 60 layers, 128 heads of 128, latent 512, query latent 1536, RoPE 64."""
    mechanism = {"kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64}
    model = {"d_model": 5120, "num_layers": layers, "num_heads": 128, "dtype": "bfloat16", "match_parameters": False}
    return configs.create("mla", mechanism, model=model)


def test_deepseek_v2_remembers_34560_elements_a_token():
    """60 x (512 + 64), counted abstractly in the cache of the whole model (DeepSeek-V2 table 1: 9/2 d_h l)."""
    model = nnx.eval_shape(lambda: models.create(deepseek_v2(60), 102_400))
    at = {n: jax.eval_shape(lambda n=n: model.init_cache(1, n)) for n in (1024, 2048)}
    growth = (content_bytes(at[2048]) - content_bytes(at[1024])) / 1024
    assert growth == 34_560 * 2  # bf16
    assert growth / 2 == 60 * 4.5 * 128
    # Positions and lengths are kept once, not once a layer.
    assert bookkeeping_bytes(at[1024]) == 4 * 1024 + 4


def test_published_attention_parameters():
    """V2's attention at its published shape, by the formula of its matrices (gains included)."""
    mixer = nnx.eval_shape(lambda: models.create(deepseek_v2(1), 8)).blocks[0].mixer
    d, heads, d_c, d_q, n, r, v = 5120, 128, 512, 1536, 128, 64, 128
    expected = d * d_q + d_q * heads * (n + r) + d * (d_c + r) + d_c * heads * (n + v) + heads * v * d + d_q + d_c
    assert models.count(models.parameters(mixer)) == expected


def test_any_nope_mha_is_an_mla_of_full_rank():
    """With d_rope 0, no norm and a latent as wide as [W_K | W_V], the latent can carry k and v themselves."""
    heads, dim, width = 4, 8, 32
    keys = jax.random.split(jax.random.key(0), 4)
    w_q, w_k, w_v = (jax.random.normal(k, (width, heads * dim)) / width**0.5 for k in keys[:3])
    mixer = Row("mla", {"kv_lora_rank": 2 * heads * dim, "qk_rope_head_dim": 0}).mixer()
    mixer.kv_norm = lambda c: c
    eye, none = jnp.eye(heads * dim), jnp.zeros((heads * dim, heads * dim))
    mixer.query.kernel[...] = w_q
    mixer.kv_down.kernel[...] = jnp.concatenate([w_k, w_v], axis=1)
    mixer.key_up.kernel[...] = jnp.concatenate([eye, none])
    mixer.value_up.kernel[...] = jnp.concatenate([none, eye])
    x = jax.random.normal(keys[3], (2, 12, width))

    def heads_of(w):
        return (x @ w).reshape(2, 12, heads, dim)

    scores = jnp.einsum("bshd,bchd->bhsc", heads_of(w_q), heads_of(w_k)) / dim**0.5
    p = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones((12, 12), bool)), scores, -jnp.inf))
    expected = mixer.out(jnp.einsum("bhsc,bchd->bshd", p, heads_of(w_v)).reshape(2, 12, -1))
    close(mixer(x), expected, EXACT, unit=True)
