"""Where arrays live: what owners declare of their parameters, and the one table that maps it to a mesh."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from matrix import ROWS, Row, every_row

from mla import model as models
from mla.layers.basic import Linear, LowRank, matrix
from mla.sharding import AXES, partition, path_name, shardings
from mla.training.step import Trainer


def mesh(*shape: int) -> Mesh:
    return Mesh(np.asarray(jax.devices()[: int(np.prod(shape))]).reshape(shape), AXES)


def specs(module: nnx.Module, where: Mesh) -> dict[str, P]:
    placed = shardings(models.parameters(module), models.axes(module), where)
    return {path_name(path): leaf.spec for path, leaf in jax.tree.leaves_with_path(placed)}


# How Megatron (1909.08053) and its successors cut a block over a tensor axis: projections to heads on their output, the
# projection from heads on its input; what all heads share, a latent and its rotary key, is cut over no tensor axis.
PUBLISHED = {
    "query/down/kernel": P("fsdp", None),
    "query/norm/scale": P(None),
    "query/up/kernel": P("fsdp", "tensor"),
    "kv_down/kernel": P("fsdp", None),
    "key_up/kernel": P("fsdp", "tensor"),
    "value_up/kernel": P("fsdp", "tensor"),
    "gate/kernel": P("fsdp", "tensor"),
    "out/kernel": P("tensor", "fsdp"),
    "sink": P(None),
}


def test_published_cuts_of_a_latent_mechanism() -> None:
    row = Row("mla", {"kv_lora_rank": 20, "q_lora_rank": 24, "qk_rope_head_dim": 4, "output_gate": True, "sink": True})
    found = specs(nnx.eval_shape(row.mixer), mesh(2, 2, 2))
    assert {name: found[name] for name in PUBLISHED} == PUBLISHED


def test_factors_of_heads_are_cut_and_shared_factors_are_not() -> None:
    found = specs(nnx.eval_shape(Row("tensor_product").mixer), mesh(1, 2, 2))
    assert found["a_key/project/kernel"] == P("fsdp", "tensor") and found["b_key/project/kernel"] == P("fsdp", None)


def test_published_cuts_of_mlp_embedding_and_head(tiny: Any) -> None:
    config = tiny("mha", model={"tie_embeddings": False, "match_parameters": False, "mlp_width": 32})
    found = specs(nnx.eval_shape(lambda: models.create(config, 64)), mesh(2, 2, 2))
    assert found["embedding"] == P("tensor", "fsdp") and found["head/kernel"] == P("fsdp", "tensor")
    assert [found[f"blocks/0/mlp/{name}/kernel"] for name in ("gate", "up", "down")] == [
        P("fsdp", "tensor"),
        P("fsdp", "tensor"),
        P("tensor", "fsdp"),
    ]


@pytest.mark.parametrize("row", **every_row)
def test_every_mechanism_declares_its_parameters(row: Row) -> None:
    """Every matrix that comes from x is cut over fsdp, and only rows of constants are on every device."""
    found = specs(nnx.eval_shape(row.mixer), mesh(1, 2, 2))
    whole = {name for name, spec in found.items() if len(spec) > 1 and not any(spec)}
    assert all(name.endswith("constant") for name in whole), whole


def test_the_optimizer_state_lives_where_its_parameters_do(tiny: Any) -> None:
    """First and second moments by structure, whatever the path; counters everywhere."""
    trainer = Trainer(tiny("mla", model={"num_heads": 2}), 61, mesh(2, 2, 2))
    state = jax.tree.map(lambda a: a.sharding, trainer.abstract_state)
    expected = jax.tree.leaves(state.params)
    moments = [s for s in jax.tree.leaves(state.opt_state) if s.spec]
    assert moments == [*expected, *expected] and any(any(s.spec) for s in expected)
    assert state.step.spec == P()


def test_what_a_mesh_does_not_divide_is_whole() -> None:
    assert partition(("model", "ff"), (6, 8), mesh(1, 4, 2)).spec == P(None, "tensor")
    assert partition(("batch", "slot", "head", None), (8, 5, 4, 3), mesh(2, 2, 2)).spec == P(
        ("data", "fsdp"), None, "tensor", None
    )
    assert partition(("expert", "model", "ff"), (4, 8, 8), mesh(1, 2, 2)).spec == P("tensor", "fsdp", None)


def test_heads_are_split_as_far_as_they_go() -> None:
    """Six heads over four devices: three to a device, on two pairs of devices."""
    placed = partition(("batch", "slot", "head", None), (8, 5, 6, 3), mesh(2, 1, 4))
    assert dict(placed.mesh.shape) == {"data": 2, "fsdp": 1, "tensor": 2, "replica": 2}
    assert placed.shard_shape((8, 5, 6, 3)) == (4, 5, 3, 3)
    assert list(placed.mesh.devices.flat) == list(mesh(2, 1, 4).devices.flat)
    # Channels of heads are never cut so: it would go through a head.
    assert partition(("model", "head_channels"), (8, 6), mesh(2, 1, 4)).spec == P("fsdp", None)


class Experts(nnx.Module):
    """A matrix of each of four experts, declared as `axes` say."""

    def __init__(self, axes: Any) -> None:
        value = jnp.ones((4, 8, 8))
        self.gate = nnx.List([nnx.Param(value) if axes is None else matrix(value, axes)])


@pytest.mark.parametrize(
    "axes,message",
    [
        (None, r"gate/0: a parameter of shape \(4, 8, 8\) does not say 'axes'"),
        (("expert", "model", "width"), r"gate/0: axes \('expert', 'model', 'width'\) of an array of shape \(4, 8, 8\)"),
        (("model", "ff"), r"gate/0: axes .* give each one of None, batch, model, .*, expert"),
    ],
)
def test_a_matrix_that_declares_nothing_or_nonsense_is_refused_by_name(axes: Any, message: str) -> None:
    assert specs(Experts(("expert", "model", "ff")), mesh(1, 2, 2))["gate/0"] == P("tensor", "fsdp", None)
    with pytest.raises(TypeError, match=message):
        specs(Experts(axes), mesh(1, 2, 2))


def test_a_layer_cannot_be_made_without_saying_what_its_axes_mean() -> None:
    make: Any = {"rngs": nnx.Rngs(0), "dtype": jnp.float32}
    with pytest.raises(TypeError, match="axes"):
        Linear(4, 4, **make)
    for module in (LowRank(4, 2, 4, eps=1e-6, **make), *(r.mixer() for r in ROWS[:2])):
        assert all(spec is not None for spec in specs(module, mesh(1, 1, 1)).values())
