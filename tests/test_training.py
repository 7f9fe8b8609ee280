"""The training step: the same numbers on every mesh, and what each option may and may not change."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import close, golden
from jax.sharding import Mesh
from matrix import ROWS

from mla import config as configs
from mla import model as models
from mla.attention.contract import REGISTRY
from mla.config import MeshConfig, OptimizerConfig
from mla.data.batch import Batch
from mla.errors import UserError
from mla.sharding import AXES, make_mesh
from mla.training.checkpoint import Checkpoints, load_model, restore_latest
from mla.training.loss import cross_entropy
from mla.training.step import Trainer, make_optimizer, schedule

VOCAB = 61
THREE_MESHES = ("mha", "mqa", "mla", "sliding_window", "linear")  # mechanisms tried on all of:
MESHES = {"data": (8, 1, 1), "fsdp": (1, 8, 1), "all": (2, 2, 2)}


def mesh_of(*shape: int) -> Mesh:
    return Mesh(np.asarray(jax.devices()[: int(np.prod(shape))]).reshape(shape), AXES)


@functools.cache
def batches(count: int = 5, batch: int = 8, context: int = 16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCAB, (count, batch, context + 1)).astype(np.int32)


@functools.cache
def trainer_of(config_json: str, shape: tuple[int, ...]) -> Trainer:
    import json

    return Trainer(configs.from_dict(json.loads(config_json)), VOCAB, mesh_of(*shape))


@pytest.fixture
def make(tiny: Any) -> Any:
    """make("mla", mesh shape, fields ...) -> Trainer; equal arguments share the compiled step."""
    import json

    def trainer(variant: str, shape: tuple[int, ...] = (1, 1, 1), **fields: Any) -> Trainer:
        return trainer_of(json.dumps(configs.to_dict(tiny(variant, **fields))), shape)

    return trainer


def losses(trainer: Trainer, state: Any, tokens: np.ndarray) -> tuple[Any, list[float]]:
    found = []
    for batch in tokens:
        state, metrics = trainer.step(state, Batch.of_windows(batch))
        found.append(float(metrics["loss"]))
    return state, found


def nats(trainer: Trainer) -> Any:
    """(params, windows) -> loss."""
    return lambda params, windows: trainer.objective(params, Batch.of_windows(windows))[0]


def leaves(tree: Any) -> list[np.ndarray]:
    return [np.asarray(a) for a in jax.tree.leaves(tree)]


def test_learns(make: Any) -> None:
    """Twenty steps on one batch halve its loss: what the other tests compare is training."""
    trainer = make("mla", steps=20, optimizer={"learning_rate": 3e-2})
    _, found = losses(trainer, trainer.init(), np.repeat(batches()[:1], 20, axis=0))
    assert found[0] == pytest.approx(np.log(VOCAB), rel=0.2)
    assert found[-1] < found[0] / 2


def test_a_mesh_that_cuts_through_heads_is_refused(make: Any) -> None:
    with pytest.raises(UserError, match=r"config\.mesh\.tensor: 4 does not divide the 2 heads of mla"):
        make("mla", (1, 2, 4))


@pytest.mark.parametrize("variant", THREE_MESHES)
def test_every_mesh_gives_the_losses_of_one_device(variant: str, make: Any) -> None:
    single = make(variant)
    initial = jax.device_get(single.init())
    _, expected = losses(single, single.init(), batches())
    assert len(set(expected)) == 5
    golden(variant, expected)
    for name, shape in MESHES.items():
        trainer = make(variant, shape)
        placed = jax.tree.map(lambda a: a.sharding, trainer.abstract_state)
        # Initialised on the mesh once; elsewhere the same values are put there, which saves a compilation.
        state = trainer.init() if name == "all" else jax.device_put(initial, placed)
        split = any(a.addressable_shards[0].data.size < a.size for a in jax.tree.leaves(state.params))
        assert split == (name != "data"), "this mesh tests nothing"
        _, found = losses(trainer, state, batches())
        close(found, expected, 1e-5, f"mesh {name} {shape}")


# The rest on the mesh of three axes, several to a model: most of the time is compilation. Pattern -> layers.
MIXED = {
    "gqa,grouped_tied,slim": 3,
    "grouped_latent,low_rank_blocks,temporal_latent,tensor_product": 4,
    "multi_matrix,multi_matrix_kr": 2,
    "chunked,chunked_global,compressive": 3,
    "gqa,dmc": 2,
    "block_mixture,deepseek_sparse": 2,
    "strided,fixed_columns,dilated,big_bird,native_sparse": 5,
    "compressed,compressed_sparse": 2,
    "retention,lightning,gated_linear,mamba2": 4,
    "delta,gated_delta,kimi_delta,gated_delta_2": 4,
    "short_convolution,mqa": 2,
    "gqa/2": 2,
    "mla/2": 2,
    "yoco": 3,  # the third layer reads the second
}


@pytest.mark.parametrize("variant", MIXED)
def test_a_mesh_of_three_axes_gives_the_losses_of_one_device(variant: str, make: Any) -> None:
    model = {"num_layers": MIXED[variant]}
    single, trainer = (make(variant, shape, model=model) for shape in ((1, 1, 1), MESHES["all"]))
    reads = configs.layers(single.config.model)[-1].source is not None
    assert reads == ("," not in variant), "only layers that are shared read one another"
    initial = jax.device_get(single.init())
    _, expected = losses(single, single.init(), batches()[:3])
    golden(variant, expected)
    state = jax.device_put(initial, jax.tree.map(lambda a: a.sharding, trainer.abstract_state))
    _, found = losses(trainer, state, batches()[:3])
    close(found, expected, 1e-5)


def test_every_mechanism_is_tried_on_a_mesh() -> None:
    mixed = {name for variant in MIXED if "," in variant for name in variant.split(",")}
    assert mixed | set(THREE_MESHES) == set(REGISTRY)


def test_a_checkpoint_of_one_mesh_resumes_on_another(make: Any, tmp_path: Any) -> None:
    single = make("mla")
    _, expected = losses(single, single.init(), batches())
    first, second = make("mla", MESHES["data"]), make("mla", MESHES["all"])
    state, _ = losses(first, first.init(), batches()[:3])
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(3, state, {"next_index": 3}, {"vocab_size": VOCAB})

    restored = restore_latest(tmp_path, second.abstract_state)
    assert restored is not None and restored.step == 3 and restored.position == {"next_index": 3}
    for old, new, wanted in zip(*(jax.tree.leaves(t) for t in (state, restored.state, second.abstract_state)), strict=True):
        np.testing.assert_array_equal(old, new)
        assert new.sharding == wanted.sharding
    _, found = losses(second, restored.state, batches()[3:])
    close(found, expected[3:], 1e-5)


def gradients_of(trainer: Trainer) -> Any:
    """The compiled (params, batch) -> ((loss, what layers report), gradients) of the first step."""
    return jax.jit(lambda params, batch: trainer._gradients(params, batch, trainer.now(jnp.int32(0))))


def test_accumulated_gradients_equal_the_big_batch(make: Any) -> None:
    whole, parts = make("mla"), make("mla", optimizer={"accumulate_steps": 4})
    params = whole.init().params
    ((loss, _), gradients), ((loss_parts, _), gradients_parts) = (
        gradients_of(trainer)(params, Batch.of_windows(batches()[0])) for trainer in (whole, parts)
    )
    close(loss, loss_parts, 4 * np.spacing(np.float32(loss)), "loss")  # four micro-batches, a rounding each
    for a, b in zip(leaves(gradients), leaves(gradients_parts), strict=True):
        assert np.abs(a).max() > 1e-5
        close(a, b, 1e-6, "gradients")


def test_accumulation_runs_smaller_batches(make: Any) -> None:
    """The program with four micro-batches never holds hidden states of the whole batch."""
    shapes = {}
    for count in (1, 4):
        trainer = make("mla", optimizer={"accumulate_steps": count})
        jaxpr = jax.make_jaxpr(gradients_of(trainer))(trainer.abstract_state.params, Batch.of_windows(batches()[0]))
        shapes[count] = {v.aval.shape for eqn in equations(jaxpr.jaxpr) for v in eqn.outvars}
    assert (8, 16, 16) in shapes[1] and (8, 16, 16) not in shapes[4] and (2, 16, 16) in shapes[4]


def equations(jaxpr: Any) -> Any:
    """Every equation of a jaxpr and of the jaxprs inside it."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


# ----------------------------------------------------------------------------------------------------------- optimizer


def test_schedule() -> None:
    rate = schedule(OptimizerConfig(learning_rate=2.0, warmup_steps=10, final_fraction=0.1), 110)
    assert float(rate(0)) == 0
    assert float(rate(5)) == pytest.approx(1.0)
    assert float(rate(10)) == pytest.approx(2.0)
    assert float(rate(60)) == pytest.approx((2.0 + 0.2) / 2)  # the middle of the cosine
    assert float(rate(110)) == pytest.approx(0.2)
    with pytest.raises(UserError, match="warmup_steps"):
        schedule(OptimizerConfig(warmup_steps=10), 10)


def test_the_logged_rate_is_the_applied_one(make: Any) -> None:
    """At a rate of zero (the first step of a warm-up) nothing moves; at the next one something does."""
    trainer = make("mha")
    state = trainer.init()
    before = leaves(state.params)
    state, metrics = trainer.step(state, Batch.of_windows(batches()[0]))
    assert float(metrics["learning_rate"]) == 0
    assert all(np.array_equal(a, b) for a, b in zip(before, leaves(state.params), strict=True))
    state, metrics = trainer.step(state, Batch.of_windows(batches()[1]))
    assert float(metrics["learning_rate"]) == pytest.approx(3e-3 / 2)
    assert not any(np.array_equal(a, b) for a, b in zip(before, leaves(state.params), strict=True))


def test_matrices_decay_and_gains_do_not(make: Any) -> None:
    trainer = make("mla")
    params = jax.tree.map(lambda a: jnp.ones(a.shape), trainer.abstract_state.params)
    decays = models.decays(nnx.eval_shape(lambda: models.create(trainer.config, VOCAB)))
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.5, warmup_steps=0, weight_decay=0.1), 100, decays)
    updates = jax.jit(lambda p: optimizer.update(jax.tree.map(jnp.zeros_like, p), optimizer.init(p), p)[0])(params)
    changed = dict(jax.tree.leaves_with_path(jax.tree.map(lambda u: float(np.abs(u).max()), updates)))
    kinds = set()
    for path, decayed in jax.tree.leaves_with_path(decays):
        name = jax.tree_util.keystr(path)
        assert decayed == ("norm" not in name)
        assert changed[path] == (pytest.approx(0.5 * 0.1) if decayed else 0), name
        kinds.add(decayed)
    assert kinds == {True, False}


def test_what_decays_is_declared_by_its_owner_and_is_what_has_two_dimensions(tiny: Any) -> None:
    built = [nnx.eval_shape(row.mixer) for row in ROWS]
    for variant in ("mla", "mha,mqa=@0", "local=sliding_window*2,mha"):
        for tied in (True, False):
            config = tiny(variant, model={"tie_embeddings": tied})
            built.append(nnx.eval_shape(functools.partial(models.create, config, VOCAB)))
    for module in built:
        wide = jax.tree.map(lambda p: p.ndim >= 2, models.parameters(module))
        assert models.decays(module) == wide, module
    assert models.decays(built[-1])["embedding"] is True

    class Silent(nnx.Module):
        def __init__(self) -> None:
            self.kernel = nnx.Param(jnp.ones((2, 2)))

    with pytest.raises(TypeError, match=r"kernel: a parameter of shape \(2, 2\) does not say 'decays'"):
        models.decays(Silent())


def test_clipping_bounds_the_gradient_and_reports_it_unclipped(make: Any) -> None:
    params = {"w": jnp.zeros((2, 2))}
    gradients = {"w": jnp.full((2, 2), 50.0)}  # norm 100
    optimizer = make_optimizer(OptimizerConfig(clip_norm=1.0), 100, {"w": True})
    _, state = optimizer.update(gradients, optimizer.init(params), params)
    moment = next(leaf for leaf in jax.tree.leaves(state) if getattr(leaf, "shape", None) == (2, 2))
    close(moment, (1 - 0.9) * 0.5, relative=1e-6)

    loose, tight = make("mha"), make("mha", optimizer={"clip_norm": 1e-3})
    norms = [float(t.step(t.init(), Batch.of_windows(batches()[0]))[1]["grad_norm"]) for t in (loose, tight)]
    assert norms[0] == pytest.approx(norms[1]) and norms[0] > 1e-2


# ----------------------------------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize("chunk", [1, 24, 40, 1000])
def test_chunked_cross_entropy_equals_the_plain_one(chunk: int) -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (3, 16, 8))
    kernel = jax.random.normal(keys[1], (8, VOCAB))
    targets = jax.random.randint(keys[2], (3, 16), 0, VOCAB)

    def plain(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
        log_probabilities = jax.nn.log_softmax(hidden @ kernel)
        return -jnp.take_along_axis(log_probabilities, targets[..., None], -1).mean()

    def chunked(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
        return cross_entropy(hidden, kernel, targets, chunk)

    expected, gradients = jax.jit(jax.value_and_grad(plain, (0, 1)))(hidden, kernel)
    found, gradients_found = jax.jit(jax.value_and_grad(lambda *a: 3 * chunked(*a), (0, 1)))(hidden, kernel)
    close(jax.jit(chunked)(hidden, kernel), expected, relative=1e-6)
    close(found, 3 * expected, relative=1e-6)
    for a, b in zip(gradients_found, gradients, strict=True):
        close(a, 3 * b, 1e-6)

    sizes = [
        v.aval.size
        for eqn in equations(jax.make_jaxpr(jax.grad(chunked, (0, 1)))(hidden, kernel).jaxpr)
        for v in eqn.outvars
    ]
    assert (max(sizes) >= 3 * 16 * VOCAB) == (chunk >= 3 * 16), "logits of all tokens exist at once"


# -------------------------------------------------------------------------------------------------- memory and precision


@pytest.mark.parametrize("remat", ["block", "all_but_matmuls"])
def test_remat_changes_no_number(remat: str, make: Any) -> None:
    plain, again = make("mla", model={"num_layers": 2}), make("mla", model={"num_layers": 2, "remat": remat})
    params = plain.init().params
    (loss, gradients), (loss_again, gradients_again) = (
        jax.jit(jax.value_and_grad(nats(trainer)))(params, batches()[0]) for trainer in (plain, again)
    )
    close(loss, loss_again, 1e-6)
    for a, b in zip(leaves(gradients), leaves(gradients_again), strict=True):
        close(a, b, 1e-6, relative=1e-5)

    def matmuls(trainer: Trainer) -> int:
        jaxpr = jax.make_jaxpr(jax.grad(nats(trainer)))(params, batches()[0])
        return sum(eqn.primitive.name == "dot_general" for eqn in equations(jaxpr.jaxpr))

    assert matmuls(again) > matmuls(plain), "nothing is recomputed"


def test_bfloat16_computes_and_float32_remembers(make: Any) -> None:
    """An update far below a bfloat16 step of the weight still arrives."""
    full, half = make("mla"), make("mla", model={"dtype": "bfloat16"})
    state = half.init()
    before = leaves(state.params)
    hidden = jax.eval_shape(lambda p: half.model(p).hidden(batches()[0][:, :-1]), state.params)
    assert hidden.dtype == jnp.bfloat16
    low, high = (float(jax.jit(nats(trainer))(state.params, batches()[0])) for trainer in (half, full))
    assert low == pytest.approx(high, rel=1e-2) and low != high
    for batch in batches()[:2]:
        state, _ = half.step(state, Batch.of_windows(batch))
    assert {a.dtype for a in jax.tree.leaves((state.params, state.opt_state))} == {
        np.dtype("float32"),
        np.dtype("int32"),  # step counts
    }
    moved = [np.abs(a - b) for a, b in zip(before, leaves(state.params), strict=True)]
    ulps = [np.abs(a) * 2.0**-8 for a in before]
    hidden_from_bfloat16 = sum(int(((m > 0) & (m < u / 2)).sum()) for m, u in zip(moved, ulps, strict=True))
    assert hidden_from_bfloat16 > 100


# ------------------------------------------------------------------------------------------------------ mesh and batch size


def test_make_mesh_takes_what_is_left_and_refuses_what_does_not_fit() -> None:
    assert dict(make_mesh(MeshConfig(data=-1, fsdp=2, tensor=2)).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    for bad in (MeshConfig(data=3), MeshConfig(data=-1, fsdp=-1), MeshConfig(data=-1, tensor=3), MeshConfig(data=4)):
        with pytest.raises(UserError, match=r"config\.mesh"):
            make_mesh(bad)


def test_a_batch_that_does_not_divide_is_refused(make: Any) -> None:
    with pytest.raises(UserError, match=r"config\.batch_size: 8 in 4 micro-batch"):
        make("mla", MESHES["data"], optimizer={"accumulate_steps": 4})


def test_load_model_predicts_what_the_trainer_did(make: Any, tiny: Any, tmp_path: Any) -> None:
    from mla import workdir

    trainer = make("mla", MESHES["all"])
    state, _ = losses(trainer, trainer.init(), batches()[:3])
    workdir.write(tiny("mla"), tmp_path, {})
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(3, state, {}, {"vocab_size": VOCAB, "tokens": 384})
    loaded = load_model(tmp_path)
    assert (loaded.step, loaded.vocab_size, loaded.progress["tokens"]) == (3, VOCAB, 384)
    assert dataclasses.asdict(loaded.config) == dataclasses.asdict(tiny("mla"))
    tokens = batches()[3][:, :-1]
    expected = jax.jit(lambda p: trainer.model(p)(tokens))(state.params)
    close(loaded.model(tokens), expected, 1e-5)


def test_a_retrofit_is_through_when_the_schedule_restarts(make: Any) -> None:
    """What a mechanism learns in stages over the planned steps does not start anew in the steps that were added."""
    steps = [0, 3, 6, 9]
    planned, longer = make("mla", steps=6), make("mla", steps=12, optimizer={"restart": {"at": [6]}})
    assert [float(planned._progress(jnp.int32(step))) for step in steps[:3]] == [0, 0.5, 1]
    assert [float(longer._progress(jnp.int32(step))) for step in steps] == [0, 0.5, 1, 1]
