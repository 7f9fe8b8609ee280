"""What a mechanism may say in training: a loss over a memory that may be another layer's, metrics, draws of its own."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close
from jax.sharding import Mesh

from mla import model as models
from mla.attention import contract
from mla.attention.contract import Output, Step, mechanism
from mla.data.batch import Batch
from mla.sharding import AXES
from mla.training.step import Trainer

VOCAB = 61
GQAConfig, GroupedQuery = mechanism("gqa")


class OutspokenConfig(GQAConfig):  # type: ignore[misc, valid-type]
    pass


class Outspoken(GroupedQuery):  # type: ignore[misc, valid-type]
    """Wants the keys that it reads to be small."""

    def forward(
        self, x: jax.Array, positions: jax.Array | None = None, memory: Any = None, step: Step | None = None
    ) -> Output:
        y = super().forward(x, positions, memory).y
        if step is None:
            return Output(y, {}, {})
        size = jnp.mean(memory.entries.key**2, axis=(1, 3))  # [B, K]
        return Output(y, {"size": size}, {"size": size, "drawn": jax.random.uniform(step.key), "progress": step.progress})


def test_a_layer_that_reads_another_adds_to_the_loss(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(contract.REGISTRY, "outspoken", f"{__name__}:OutspokenConfig:Outspoken")
    config = tiny("outspoken/2", steps=6, model={"num_layers": 2}, optimizer={"accumulate_steps": 2})
    trainer = Trainer(config, VOCAB, Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1, 1), AXES))
    batch = Batch.of_windows(np.random.default_rng(0).integers(0, VOCAB, (8, 17), dtype=np.int32))
    params, number = trainer.init().params, jnp.int32(3)

    def size(params: Any) -> jax.Array:
        model = trainer.model(params)
        memory, _ = model.blocks[0].remember(model.embed(batch.tokens), None)
        return jnp.mean(memory.entries.key**2)

    def objective(params: Any) -> Any:
        return trainer.objective(params, batch)[0] + 2 * size(params)  # both layers look at the lower one's keys

    expected = jax.jit(jax.grad(objective))(params)
    (nats, reported), gradients = jax.jit(lambda p: trainer._gradients(p, batch, trainer.now(number)))(params)
    close(nats, jax.jit(trainer.objective)(params, batch)[0], 1e-5, "without a step nothing is added")
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
        close(a, b, 1e-5)
    assert float(jnp.abs(jax.grad(size)(params)["blocks"]["0"]["mixer"]["key"]["kernel"]).max()) > 1e-2

    ((owner, said),) = trainer.model(params).by_owner(reported).items()
    assert (owner, len(said)) == (Outspoken, 2)
    logged = owner.logged(said)
    assert float(logged["progress"]) == 0.5
    close(logged["size"], size(params), 1e-5)
    key = jax.random.fold_in(jax.random.key(config.seed), number)
    keys = [jax.random.fold_in(jax.random.fold_in(key, part), layer) for part in range(2) for layer in (0, 1)]
    close(logged["drawn"], np.mean([jax.random.uniform(k) for k in keys]), 1e-6, "a key a layer and micro-batch")
    assert models.count(params) == trainer.sizes.total


@pytest.mark.parametrize("name", ["loss", "expert_load"])
def test_a_metric_has_one_owner(name: str, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the step's own nor another layer's is overwritten in silence."""
    monkeypatch.setitem(contract.REGISTRY, "outspoken", f"{__name__}:OutspokenConfig:Outspoken")
    monkeypatch.setattr(Outspoken, "logged", classmethod(lambda cls, said: {name: jnp.zeros(())}))
    config = tiny("outspoken/2", model={"num_layers": 2, "mlp": "moe"})
    trainer = Trainer(config, VOCAB, Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1, 1), AXES))
    batch = Batch.of_windows(np.zeros((8, 17), np.int32))
    other = {"loss": "Trainer and Outspoken", "expert_load": "Outspoken and MixtureOfExperts"}[name]
    with pytest.raises(TypeError, match=f"^both {other} log a metric '{name}'; rename one"):
        jax.eval_shape(trainer.step, trainer.abstract_state, batch)
