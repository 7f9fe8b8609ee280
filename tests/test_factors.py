"""Factored, multi-matrix and keys-only attention against their papers in float64, the identities that tie them to MHA, GQA
and MQA, and the modifiers that every softmax mechanism has, as formulas."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import EXACT, close, contiguous_mask
from jax.sharding import Mesh
from matrix import Row
from test_mla import paper_norm, paper_rope

from mla import config as configs
from mla import model as models
from mla.attention.contract import mechanism
from mla.attention.softmax.slim import from_mha, to_mha
from mla.data.batch import Batch
from mla.errors import UserError
from mla.ops.rope import rotate
from mla.sharding import AXES
from mla.training.step import Trainer

LENGTH, D_MODEL, HEADS = 30, 32, 4

pytestmark = pytest.mark.usefixtures("float64")


def batch(length=LENGTH, rows=1, seed=0):
    x = jax.random.normal(jax.random.key(seed), (rows, length, D_MODEL))
    return x, jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (rows, length))


def heads_of(mixer, x, positions, form=None):
    """Heads before W_O, [B, T, H * d], by `attend` or one of its two forms."""
    attend = getattr(mixer, f"attend_{form}" if form else "attend")
    mask = contiguous_mask(*x.shape[:2], mixer.window)
    return attend(mixer.queries(x, positions), mixer.entries(x, positions), mask)


def forms(mixer):
    return ("expanded", "absorbed") if hasattr(mixer, "attend_absorbed") else (None,)


def assert_same(found, expected, bound=EXACT):
    close(found, expected, bound, unit=True)


def differs(a, b):
    """Largest difference, in units of the rms of b."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.max(np.abs(a - b)) / np.sqrt(np.mean(b**2))


# ------------------------------------------------------------------ the papers, token by token and head by head, float64


def fresh_mixer(name, around=None, **settings):
    """A mixer as it is initialised."""
    return mechanism(name)[1](Row(name, settings).config(), around or Row(name).around(), rngs=nnx.Rngs(0))


def wide(tree):
    return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


def paper_softmax(logits, cap=0.0, sink=None):
    """Weights of one query: logits are capped, then a sink joins the denominator."""
    logits = cap * np.tanh(logits / cap) if cap else logits
    top = max(logits.max(), -np.inf if sink is None else sink)
    weights = np.exp(logits - top)
    return weights / (weights.sum() + (0.0 if sink is None else np.exp(sink - top)))


def paper_attention(q, k, v, scale, window=None, cap=0.0, sinks=None):
    """Causal attention of one sequence: q [T, H, d], k [T, K, d], v [T, K, d_v] -> [T, H * d_v]."""
    length, heads, _ = q.shape
    out = np.zeros((length, heads, v.shape[-1]))
    for t in range(length):
        first = 0 if window is None else max(0, t - window + 1)
        for i in range(heads):
            g = i * k.shape[1] // heads
            logits = np.array([scale * (q[t, i] @ k[s, g]) for s in range(first, t + 1)])
            p = paper_softmax(logits, cap, None if sinks is None else sinks[i])
            out[t, i] = sum(weight * v[s, g] for weight, s in zip(p, range(first, t + 1), strict=True))
    return out.reshape(length, -1)


def turned(vector, position, theta, dim=None):
    """RoPE, half-split, on the first `dim` channels."""
    dim = len(vector) if dim is None else dim
    return np.concatenate([paper_rope(vector[:dim], position, theta, False, None), vector[dim:]])


def paper_tensor_product(mixer, x):
    """TPA, 2501.06425: sums of outer products; RoPE on the b factors of queries and keys."""
    weights, config, width = wide(models.parameters(mixer)), mixer.config, mixer.head_dim
    theta = mixer.around.rope_theta

    def factors(kind, name, row, rank):
        part = weights[f"{kind}_{name}"]
        flat = row @ part["project"]["kernel"] if "project" in part else part["constant"]
        return flat.reshape((mixer.num_heads, rank) if kind == "a" else (rank, width))

    def heads(name, rank, rotates):
        out = np.zeros((len(x), mixer.num_heads, width))
        for t, row in enumerate(x):
            a, b = factors("a", name, row, rank), factors("b", name, row, rank)
            for i in range(mixer.num_heads):
                for r in range(rank):
                    out[t, i] += a[i, r] * (turned(b[r], t, theta) if rotates else b[r]) / rank
        return out

    if config.rank_q:
        q = heads("query", config.rank_q, True)
    else:
        plain = (x @ weights["query"]["kernel"]).reshape(len(x), mixer.num_heads, width)
        q = np.array([[turned(head, t, theta) for head in row] for t, row in enumerate(plain)])
    k, v = heads("key", config.rank_k, True), heads("value", config.rank_v, False)
    return paper_attention(q, k, v, width**-0.5) @ weights["out"]["kernel"]


def paper_multi_matrix(mixer, x):
    """MFA and MFA-KR, 2412.19255: queries from one normed latent, one wide key head; KR's values are k + alpha * (N k)."""
    weights, width, theta = wide(models.parameters(mixer)), mixer.head_dim, mixer.around.rope_theta
    q, k, v = np.zeros((len(x), mixer.num_heads, width)), np.zeros((len(x), 1, width)), np.zeros((len(x), 1, width))
    per_head = weights["query"]["up"]["kernel"].reshape(-1, mixer.num_heads, width)
    for t, row in enumerate(x):
        c = paper_norm(row @ weights["query"]["down"]["kernel"], weights["query"]["norm"]["scale"], mixer.around.norm_eps)
        for i in range(mixer.num_heads):
            q[t, i] = turned(c @ per_head[:, i], t, theta)
        key = row @ weights["key"]["kernel"]
        k[t, 0] = turned(key, t, theta)
        if "value" in weights:
            v[t, 0] = row @ weights["value"]["kernel"]
        else:
            v[t, 0] = key + weights["value_gate"] * (weights["value_mix"]["kernel"].T @ key)
    return paper_attention(q, k, v, width**-0.5) @ weights["out"]["kernel"]


def paper_slim(mixer, x):
    """Slim attention, 2503.05840: values are a linear map of the raw keys of all heads."""
    weights, width, eps = wide(models.parameters(mixer)), mixer.head_dim, mixer.around.norm_eps

    def heads(flat, norm, t):
        rows = flat.reshape(mixer.num_heads, width)
        rows = [paper_norm(row, weights[norm]["scale"], eps) for row in rows] if norm in weights else rows
        return [turned(row, t, mixer.around.rope_theta, int(width * mixer.config.rope_fraction)) for row in rows]

    raw = x @ weights["key"]["kernel"]
    q = np.array([heads(row @ weights["query"]["kernel"], "query_norm", t) for t, row in enumerate(x)])
    k = np.array([heads(row, "key_norm", t) for t, row in enumerate(raw)])
    v = np.array([row @ weights["value_from_key"]["kernel"] for row in raw]).reshape(q.shape)
    return paper_attention(q, k, v, width**-0.5) @ weights["out"]["kernel"]


PAPERS = {
    "tpa": (paper_tensor_product, Row("tensor_product", {"rank_q": 3, "rank_k": 2, "rank_v": 1, "factor_init": "unit"})),
    "tpa_code_init": (paper_tensor_product, Row("tensor_product", {"head_dim": 6})),
    "tpa_kv_only": (paper_tensor_product, Row("tensor_product", {"rank_q": 0, "rank_k": 3, "factor_init": "unit"})),
    "tpa_constant_a": (paper_tensor_product, Row("tensor_product", {"contextual_a": False, "factor_init": "unit"})),
    "tpa_constant_b": (paper_tensor_product, Row("tensor_product", {"contextual_b": False, "factor_init": "unit"})),
    "mfa": (paper_multi_matrix, Row("multi_matrix", {"head_dim": 10, "q_lora_rank": 20})),
    "mfa_kr": (paper_multi_matrix, Row("multi_matrix_kr", {"head_dim": 12})),
    "slim": (paper_slim, Row("slim")),
    "slim_wide_normed": (paper_slim, Row("slim", {"head_dim": 10, "rope_fraction": 0.4}, qk_norm=True)),
}


@pytest.mark.parametrize(("paper", "row"), PAPERS.values(), ids=PAPERS)
def test_equals_the_papers_equations(paper, row):
    mixer = row.mixer()
    x, positions = batch()
    expected = paper(mixer, np.asarray(x[0], np.float64))
    assert np.std(expected) > 1e-3
    for form in forms(mixer):
        found = jax.jit(lambda x, form=form: mixer.out(heads_of(mixer, x, positions, form)))(x)
        assert_same(found[0], expected)


# --------------------------------------------------------------------------------------------- special cases and symmetries


@pytest.mark.parametrize(("name", "groups"), [("mqa", 1), ("gqa", 2), ("mha", 4)])
def test_constant_a_factors_give_grouped_query_attention(name, groups):
    """R = G and a = G x the mask of groups: MQA at G = 1, MHA at G = H (2501.06425, section 3.3), with RoPE on."""
    reference = Row(name, {"num_kv_heads": groups} if name == "gqa" else {}).mixer()
    mixer = Row("tensor_product", {"rank_q": 0, "rank_k": groups, "rank_v": groups, "contextual_a": False}).mixer()
    members = groups * jnp.repeat(jnp.eye(groups), HEADS // groups, axis=0)  # [H, G]
    for part in ("key", "value"):
        getattr(mixer, f"a_{part}").constant[...] = members
        getattr(mixer, f"b_{part}").project.kernel[...] = getattr(reference, part).kernel[...]
    mixer.query.kernel[...] = reference.query.kernel[...]
    x, positions = batch()
    for form in forms(mixer):
        assert_same(heads_of(mixer, x, positions, form), heads_of(reference, x, positions))


def test_contextual_a_factors_of_one_give_multi_query_attention():
    """The same with a_K = a_V = 1 as an outcome of x: a channel that is always 1."""
    reference = Row("mqa").mixer()
    mixer = Row("tensor_product", {"rank_q": 0, "rank_k": 1, "rank_v": 1}).mixer()
    x, positions = batch()
    x = x.at[..., 0].set(1.0)
    for part in ("key", "value"):
        getattr(mixer, f"a_{part}").project.kernel[...] = jnp.zeros((D_MODEL, HEADS)).at[0].set(1.0)
        getattr(mixer, f"b_{part}").project.kernel[...] = getattr(reference, part).kernel[...]
    mixer.query.kernel[...] = reference.query.kernel[...]
    for form in forms(mixer):
        assert_same(heads_of(mixer, x, positions, form), heads_of(reference, x, positions))


def test_scale_moves_freely_between_the_factors():
    mixer = Row("tensor_product", {"rank_q": 3, "factor_init": "unit"}).mixer()
    x, positions = batch()
    before = [heads_of(mixer, x, positions, form) for form in forms(mixer)]
    for part, c in (("query", 3.0), ("key", 0.2), ("value", -7.0)):
        getattr(mixer, f"a_{part}").project.kernel[...] *= c
        getattr(mixer, f"b_{part}").project.kernel[...] /= c
    for form, expected in zip(forms(mixer), before, strict=True):
        assert_same(heads_of(mixer, x, positions, form), expected)


def test_rotation_commutes_with_the_sum_over_factors():
    """Theorem 3.1: rotated b factors give rotated keys."""
    mixer = Row("tensor_product", {"rank_k": 3, "factor_init": "unit"}).mixer()
    x, positions = batch()
    entries, keys = mixer.entries(x, positions), jnp.einsum("bthr,btrd->bthd", mixer.a_key(x), mixer.b_key(x)) / 3
    rows = entries.b_key.reshape(1, LENGTH, 3, -1)
    assert_same(jnp.einsum("bthr,btrd->bthd", entries.a_key, rows) / 3, rotate(keys, positions, 1e4))


def test_multi_matrix_without_its_latent_is_multi_query():
    """C = d_h, C_q = d, S_q the identity, no norm."""
    mixer, reference = Row("multi_matrix", {"head_dim": 8, "q_lora_rank": D_MODEL}).mixer(), Row("mqa").mixer()
    mixer.query.down.kernel[...] = jnp.eye(D_MODEL)
    mixer.query.norm = lambda c: c
    for ours, theirs in [(mixer.query.up, reference.query), (mixer.key, reference.key), (mixer.value, reference.value)]:
        ours.kernel[...] = theirs.kernel[...]
    x, positions = batch()
    assert_same(heads_of(mixer, x, positions), heads_of(reference, x, positions))


@pytest.mark.parametrize("gate", [0.0, 1.0])
def test_key_reuse_is_multi_matrix_with_values_from_keys(gate):
    """S_v = S_k (I + N^T diag(alpha)), which is S_k at the alpha = 0 of initialisation."""
    assert not np.any(fresh_mixer("multi_matrix_kr").value_gate[...])
    reuse, reference = Row("multi_matrix_kr", {"head_dim": 12}).mixer(), Row("multi_matrix", {"head_dim": 12}).mixer()
    reuse.value_gate[...] *= gate
    n_t, alpha = wide(reuse.value_mix.kernel[...]), wide(reuse.value_gate[...])
    assert bool(np.any(alpha)) == bool(gate)
    for part in ("query.down", "query.up", "key"):
        *parents, name = part.split(".")
        ours, theirs = reuse, reference
        for step in (*parents, name):
            ours, theirs = getattr(ours, step), getattr(theirs, step)
        theirs.kernel[...] = ours.kernel[...]
    reference.query.norm.scale[...] = reuse.query.norm.scale[...]
    values = wide(reuse.key.kernel[...]) @ (np.eye(12) + n_t @ np.diag(alpha))
    reference.value.kernel[...] = jnp.asarray(values)
    x, positions = batch()
    expected = jax.jit(lambda x: heads_of(reference, x, positions))(x)
    for form in forms(reuse):
        assert_same(jax.jit(lambda x, form=form: heads_of(reuse, x, positions, form))(x), expected)


@pytest.mark.parametrize("name", ["slim", "multi_matrix_kr"])
def test_a_norm_on_values_that_are_never_built_is_refused(name):
    row = Row(name, {"value_norm": True})
    with pytest.raises(UserError, match=r"config\.model\.mechanism\.value_norm: "):
        row.config().validate(row.around())


# --------------------------------------------------------------------------------------------------------- slim from MHA


def converted(mha, settings):
    """slim with the weights of `mha`, and the condition number of W_K."""
    slim = fresh_mixer("slim", **settings)
    parameters, condition = from_mha(models.parameters(mha))
    return models.with_parameters(nnx.graphdef(slim), parameters), condition


@pytest.mark.parametrize(
    "settings", [{}, {"head_dim": 12}, {"rope_fraction": 0.5, "sink": True}], ids=["square", "wide", "nope"]
)
def test_slim_takes_over_the_weights_of_mha(settings):
    mha = Row("mha", settings).mixer()
    slim, condition = converted(mha, settings)
    assert condition == pytest.approx(np.linalg.cond(np.asarray(mha.key.kernel[...], np.float64)))
    assert condition < 1e3
    x, positions = batch()
    for form in forms(slim):
        assert_same(heads_of(slim, x, positions, form), heads_of(mha, x, positions))


def test_mha_takes_over_the_weights_of_slim():
    slim = Row("slim", {"head_dim": 12, "rope_fraction": 0.5}).mixer()
    parameters, condition = to_mha(models.parameters(slim))
    mha = models.with_parameters(nnx.graphdef(fresh_mixer("mha", head_dim=12, rope_fraction=0.5)), parameters)
    assert condition == 1
    x, positions = batch()
    assert_same(heads_of(mha, x, positions), heads_of(slim, x, positions, "expanded"))


def with_condition(kernel, condition):
    """W_K with singular values from 1 down to 1 / condition."""
    u, s, v = np.linalg.svd(np.asarray(kernel, np.float64))
    return jnp.asarray(u @ np.diag(np.geomspace(1, 1 / condition, len(s))) @ v, jnp.float32)


def test_error_of_slim_grows_with_the_condition_of_the_key_matrix():
    errors, conditions = [], [1e1, 1e3, 1e5]
    x, positions = batch()
    for condition in conditions:
        mha = Row("mha").mixer()
        mha.key.kernel[...] = with_condition(mha.key.kernel[...], condition)
        slim, found = converted(mha, {})
        assert found == pytest.approx(condition, rel=0.05)
        errors.append(differs(heads_of(slim, x, positions, "absorbed"), heads_of(mha, x, positions)))
    assert errors[0] < 1e-4 and errors[0] < errors[1] / 3 and errors[1] < errors[2] / 3, dict(
        zip(conditions, errors, strict=True)
    )


def test_slim_refuses_keys_that_lose_values():
    narrow, singular = Row("mha", {"head_dim": 4}).mixer(), Row("mha").mixer()
    with pytest.raises(ValueError, match=r"W_K is \(32, 16\)"):
        from_mha(models.parameters(narrow))
    with pytest.raises(ValueError, match=r"W_K is \(32, 16\)"):
        from_mha(models.parameters(Row("gqa", {"num_kv_heads": 2}).mixer()))
    singular.key.kernel[...] = singular.key.kernel[...].at[:, 1].set(singular.key.kernel[:, 0])
    with pytest.raises(ValueError, match=r"W_K has condition number .*cannot be recovered"):
        from_mha(models.parameters(singular))
    with pytest.raises(UserError, match=r"config\.model\.mechanism\.head_dim: heads have 16 key channels"):
        Row("slim", {"head_dim": 4}).config().validate(Row("slim").around())


def test_slim_takes_over_a_trained_model(tiny, record_property):
    """Every layer of an MHA after 40 steps: logits within 1e-4 of their rms, the condition numbers reported."""
    fields = {"steps": 40, "model": {"num_layers": 2}, "optimizer": {"learning_rate": 3e-2}}
    trainer = Trainer(tiny("mha", **fields), 61, Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1, 1), AXES))
    tokens = np.random.default_rng(0).integers(0, 61, (8, 17), dtype=np.int32)

    def logits_by(graph, params):
        return jax.jit(lambda p: models.with_parameters(graph, p)(tokens[:, :-1]))(params)

    state, before = trainer.init(), None
    for _ in range(40):
        state, metrics = trainer.step(state, Batch.of_windows(tokens))
        before = before or float(metrics["loss"])
    assert float(metrics["loss"]) < before / 2  # trained it is
    params, found = dict(jax.device_get(state.params)), []
    expected = logits_by(trainer.graph, params)
    blocks = {}
    for index, block in params["blocks"].items():
        mixer, condition = from_mha(block["mixer"])
        blocks[index] = block | {"mixer": mixer}
        found.append(condition)
    record_property("condition numbers of W_K after training", found)
    slim = nnx.eval_shape(lambda: models.create(tiny("slim", **fields), 61))
    error = differs(logits_by(nnx.graphdef(slim), params | {"blocks": blocks}), expected)
    assert len(found) == 2 and max(found) < 1e4 and error < 1e-4, f"error {error:.1e} at condition numbers {found}"


# -------------------------------------------------------------------------------------------------------- initialisation


def test_spread_of_the_factors_at_the_published_shape():
    """The released code's Xavier of three dimensions and the paper's of two: d 768, 34 heads of 64, ranks 6/2/2 (124M)."""
    expected = {
        "code": {"a_query": 0.0204, "a_key": 0.0353, "a_value": 0.0353, "b_query": 0.0064, "b_key": 0.0064},
        "paper": {"a_query": 0.0454, "a_key": (2 / (768 + 34 * 2)) ** 0.5, "b_query": (2 / (768 + 6 * 64)) ** 0.5},
        "unit": {"a_query": 768**-0.5, "a_key": 768**-0.5, "b_value": 768**-0.5},
    }
    around = Row("tensor_product").around(d_model=768, num_heads=34)
    for init, spreads in expected.items():
        made = models.parameters(fresh_mixer("tensor_product", around, head_dim=64, factor_init=init))
        for name, spread in spreads.items():
            assert np.std(made[name]["project"]["kernel"]) == pytest.approx(spread, rel=0.015), (init, name)


# ------------------------------------------------------------------------------------------------------------- modifiers

LATENT = {"kv_lora_rank": 20, "qk_rope_head_dim": 4}
SINKS = np.array([-3.0, 0.0, 0.7, 4.0])


def logits_of(mixer, x, positions):
    """Scaled logits of grouped-query attention, [T][H] arrays over the tokens seen, and values."""
    q, (k, v) = wide(mixer.queries(x, positions)[0]), wide(tuple(a[0] for a in mixer.entries(x, positions)))
    group = HEADS // k.shape[1]
    return q, k, v, [[mixer.scale * (k[: t + 1, i // group] @ q[t, i]) for i in range(HEADS)] for t in range(len(q))]


def test_sink_multiplies_heads_by_a_sigmoid():
    """o = plain o * sigmoid(logsumexp(l) - s): the sink takes weight and gives no value."""
    mixer = Row("gqa", {"sink": True}).mixer()
    x, positions = batch()
    mixer.sink[...] = jnp.asarray(SINKS)
    with_sink = heads_of(mixer, x, positions)
    q, k, v, logits = logits_of(mixer, x, positions)
    lse = np.array([[np.logaddexp.reduce(row) for row in rows] for rows in logits])
    plain = paper_attention(q, k, v, mixer.scale).reshape(LENGTH, HEADS, -1)
    assert_same(with_sink[0], (plain / (1 + np.exp(SINKS - lse))[..., None]).reshape(LENGTH, -1))
    mixer.sink[...] = jnp.full(HEADS, -1e9)
    assert_same(heads_of(mixer, x, positions)[0], plain.reshape(LENGTH, -1))
    mixer.sink[...] = jnp.zeros(HEADS)
    by_one = [[np.exp(row) / (1 + np.exp(row).sum()) for row in rows] for rows in logits]  # softmax off by one
    expected = [[by_one[t][i] @ v[: t + 1, i // 2] for i in range(HEADS)] for t in range(LENGTH)]
    assert_same(heads_of(mixer, x, positions)[0], np.reshape(expected, (LENGTH, -1)))


@pytest.mark.parametrize(("name", "settings"), [("mla", LATENT), ("tensor_product", {"factor_init": "unit"}), ("slim", {})])
def test_sink_and_cap_act_alike_in_both_forms(name, settings):
    """They act on final logits, so absorbing changes nothing; and they do act."""
    x, positions = batch()
    mixer = Row(name, settings | {"sink": True, "soft_cap": 1.5}).mixer()
    mixer.sink[...] = jnp.asarray(SINKS)
    expanded, absorbed = (heads_of(mixer, x, positions, form) for form in forms(mixer))
    assert_same(absorbed, expanded)
    mixer.sink[...] = jnp.full(HEADS, -1e9)
    capped = heads_of(mixer, x, positions, "expanded")
    mixer.config.soft_cap = 1e6
    plain = heads_of(mixer, x, positions, "expanded")
    assert differs(expanded, capped) > 1e-2 and differs(capped, plain) > 1e-2
    assert_same(heads_of(mixer, x, positions, "absorbed"), plain)


def test_soft_cap_bends_logits_before_the_mask():
    """l = cap tanh(l / cap); a large cap is none."""
    mixer = Row("gqa", {"soft_cap": 2.0}).mixer()
    x, positions = batch()
    q, k, v, _ = logits_of(mixer, x, positions)
    assert_same(heads_of(mixer, x, positions)[0], paper_attention(q, k, v, mixer.scale, cap=2.0))
    plain = paper_attention(q, k, v, mixer.scale)
    assert differs(heads_of(mixer, x, positions)[0], plain) > 1e-2
    mixer.config.soft_cap = 1e8
    assert_same(heads_of(mixer, x, positions)[0], plain)


@pytest.mark.parametrize(("name", "settings"), [("gqa", {}), ("mla", LATENT), ("tensor_product", {"factor_init": "unit"})])
def test_output_gate_multiplies_heads_before_the_output_projection(name, settings):
    """concat(o) * sigmoid(x W_g); zero gate weights halve the output."""
    mixer = Row(name, settings | {"output_gate": True}).mixer()
    x, positions = batch()
    heads = heads_of(mixer, x, positions)
    gate = 1 / (1 + np.exp(-wide(x) @ wide(mixer.gate.kernel[...])))
    assert_same(mixer(x), wide(heads) * gate @ wide(mixer.out.kernel[...]))
    mixer.gate.kernel[...] *= 0
    assert_same(mixer(x), 0.5 * mixer.out(heads))


@pytest.mark.parametrize(
    ("name", "nope", "rope"),
    [
        ("gqa", {"rope_fraction": 0.0}, {}),
        ("slim", {"rope_fraction": 0.0}, {"rope_fraction": 0.5}),
        ("multi_matrix", {"rope_fraction": 0.0}, {}),
        ("mla", {"kv_lora_rank": 20, "qk_rope_head_dim": 0}, LATENT),
    ],
)
def test_without_rotation_earlier_tokens_are_a_set(name, nope, rope):
    """The last token's output does not see the order of the tokens before it; with rotation it does."""
    x, _ = batch()
    order = np.r_[np.random.default_rng(0).permutation(LENGTH - 1), LENGTH - 1]
    mixer = Row(name, nope).mixer()
    assert_same(mixer(x[:, order])[:, -1], mixer(x)[:, -1])
    mixer = Row(name, rope).mixer()
    assert differs(mixer(x[:, order])[:, -1], mixer(x)[:, -1]) > 1e-2


def paper_grouped_query(weights, x, entries_x, theta, *, heads, window=None):
    """GQA of one sequence with its RoPE base: queries from x, keys and values from entries_x (the same, but for readers)."""
    width = weights["query"]["kernel"].shape[1] // heads
    q = (x @ weights["query"]["kernel"]).reshape(len(x), heads, width)
    k, v = ((entries_x @ weights[part]["kernel"]).reshape(len(x), -1, width) for part in ("key", "value"))
    q, k = (np.array([[turned(head, t, theta) for head in row] for t, row in enumerate(a)]) for a in (q, k))
    return paper_attention(q, k, v, width**-0.5, window) @ weights["out"]["kernel"]


def test_local_and_global_layers_rotate_with_bases_of_their_own():
    """Gemma 3 (2503.19786): each kind's rope_theta reaches its layers, and only them."""
    settings = {"local": {"window": 7, "rope_theta": 1e2, "num_kv_heads": 2}, "far": {"rope_theta": 1e5}}
    model = {"d_model": D_MODEL, "num_heads": HEADS, "num_layers": 6}
    config = configs.create("local=sliding_window*2,far=gqa", settings, model=model)
    configs.validate(config)
    made = models.create(config, 31)
    assert [layer.name for layer in configs.layers(config.model)] == ["sliding_window", "sliding_window", "gqa"] * 2
    x, _ = batch()
    for index, block in enumerate(made.blocks):
        theta, window = (1e5, None) if index % 3 == 2 else (1e2, 7)
        weights, row = wide(models.parameters(block.mixer)), wide(x[0])
        assert_same(block.mixer(x)[0], paper_grouped_query(weights, row, row, theta, heads=HEADS, window=window), 1e-5)
        wrong = paper_grouped_query(weights, row, row, 1e4, heads=HEADS, window=window)
        assert differs(block.mixer(x)[0], wrong) > 1e-3


def test_training_never_holds_all_logits():
    """Ranks so low that the absorbed form costs fewer FLOPs even for a whole text: it is left to a few queries."""
    mixer = Row("tensor_product", {"rank_q": 2, "rank_k": 1, "rank_v": 1, "num_heads": 12, "head_dim": 64}).mixer()
    assert mixer.absorbs(1, 1024) and mixer.absorbs(16, 1024)
    assert not mixer.absorbs(17, 1024) and not mixer.absorbs(1024, 1024)
