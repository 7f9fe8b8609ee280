"""Layers with phases in which nothing else of the model learns, and runs that start without the parameters they add."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers import close
from jax.sharding import Mesh
from test_resume import assert_same_end, final

from mla import model as models
from mla.config import Config
from mla.data.batch import Batch
from mla.errors import UserError
from mla.sharding import AXES
from mla.training.loop import train
from mla.training.step import Trainer

RATE = {
    "optimizer": {"learning_rate": 1e-2, "warmup_steps": 0, "final_fraction": 1.0, "weight_decay": 0.1, "clip_norm": 0.0}
}
PREFIX = ".params"


def indexed(tiny: Any, mechanism: dict[str, Any], **fields: Any) -> Config:
    """A model with indexers, as wide as tiny("mla")."""
    made = tiny("deepseek_sparse", **RATE | fields)
    made.model.solved_mlp_width = models.sizes(tiny("mla"), 0).mlp_width
    own = made.model.mechanism["deepseek_sparse"]
    made.model.mechanism["deepseek_sparse"] = dataclasses.replace(own, **mechanism)
    return made


def added(path: str) -> bool:
    return "index_" in path


def named(tree: Any) -> dict[str, np.ndarray]:
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}


def after_each_step(config: Config, count: int) -> tuple[list[dict[str, np.ndarray]], list[float]]:
    """The arrays of the training state by path, at the start and after each of `count` steps; and the norms of gradients."""
    trainer = Trainer(config, 257, Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1, 1), AXES))
    tokens = np.random.default_rng(0).integers(0, 200, (count, 8, 17), dtype=np.int32)
    state, states, norms = trainer.init(), [], []
    for each in tokens:
        states.append(named(state))
        state, metrics = trainer.step(state, Batch.of_windows(each))
        norms.append(float(metrics["grad_norm"]))
    return [*states, named(state)], norms


def changed(before: dict[str, np.ndarray], after: dict[str, np.ndarray], optimizer: bool = False) -> set[str]:
    """Paths of the parameters that are not bit for bit what they were; or of moments."""
    kinds = (".mu", ".nu") if optimizer else (PREFIX,)
    paths = [path for path in before if any(kind in path for kind in kinds)]
    return {path for path in paths if before[path].tobytes() != after[path].tobytes()}


def test_nothing_but_additions_learns_alone(tiny: Any) -> None:
    """Weight decay and moments included; what waited then starts as if these had been no steps."""
    states, norms = after_each_step(indexed(tiny, {"dense_steps": 0.5, "freeze": True}, steps=6), 4)
    paths = {path for path in states[0] if path.startswith(PREFIX)}
    indexers = {path for path in paths if added(path)}
    assert len(indexers) == 5
    for before, after in itertools.pairwise(states[:4]):
        assert changed(before, after) == indexers
        assert all(map(added, changed(before, after, optimizer=True)))
    slopes = [
        moment / 0.1 for path, moment in states[1].items() if ".mu" in path
    ]  # the norm that is clipped is theirs alone
    close(norms[0], np.sqrt(sum(np.sum(slope**2) for slope in slopes)), 1e-5)
    third, fourth = states[3:]
    assert changed(third, fourth) == paths
    kernel = f"{PREFIX}['blocks']['0']['mixer']['out']['kernel']"
    moved = (fourth[kernel] - third[kernel]) / 1e-2 + 0.1 * third[kernel]
    close(np.abs(moved), np.ones_like(moved), 1e-2)  # Adam's first step: the sign of the gradient


def test_an_indexer_is_not_moved_by_the_loss_of_the_language_model(tiny: Any) -> None:
    still = {"dense_steps": 0.5, "train_index": False}
    states, _ = after_each_step(indexed(tiny, still, steps=2, optimizer=RATE["optimizer"] | {"weight_decay": 0.0}), 2)
    for before, after in itertools.pairwise(states):
        assert changed(before, after) == {path for path in before if path.startswith(PREFIX) and not added(path)}


@pytest.fixture(scope="module")
def dense(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the model without indexers."""
    workdir = tmp_path_factory.mktemp("dense") / "run"
    assert train(tiny("mla", steps=3), workdir) == 0
    return workdir


def test_a_run_from_a_dense_one_resumes_across_the_switch(dense: Path, tiny: Any, tmp_path: Path, capfd: Any) -> None:
    def config() -> Config:
        return indexed(tiny, {"dense_steps": 0.5, "freeze": True}, init_from=str(dense))

    assert train(config(), tmp_path / "whole") == 0
    (line,) = [line for line in capfd.readouterr().out.splitlines() if "start fresh" in line]
    names = "index_key/kernel, blocks/*/mixer/index_norm/bias, blocks/*/mixer/index_norm/scale, "
    assert f"{dense}: lacks 5 parameters of this model, which start fresh: blocks/*/mixer/{names}" in line
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    for step in ("4", "6"):
        shutil.rmtree(tmp_path / "killed" / "checkpoints" / step)
    shutil.copytree(tmp_path / "killed", tmp_path / "warm")
    assert train(config(), tmp_path / "killed") == 0
    assert "resumed after step 2 of 6" in capfd.readouterr().out
    assert_same_end(config(), tmp_path / "whole", tmp_path / "killed")
    step, warm, _ = final(config(), tmp_path / "warm")
    source = final(tiny("mla", steps=3), dense)[1]
    kept = [path for path in source if path.startswith(PREFIX)]
    assert step == 2 and len(kept) > 10
    for path in kept:
        np.testing.assert_array_equal(warm[path], source[path], err_msg=path)


def test_what_else_is_missing_is_refused(dense: Path, tiny: Any, tmp_path: Path) -> None:
    width = models.sizes(tiny("mla"), 0).mlp_width
    narrow, deep = (indexed(tiny, {}, init_from=str(dense), model={"num_layers": n}) for n in (1, 2))
    narrow.model.solved_mlp_width = 0
    solved = models.sizes(narrow, 0).mlp_width
    said = rf"config\.model\.solved_mlp_width: 0 solves MLPs of width {solved}, and .* have {width}; set it to {width}"
    for config, message in ((narrow, said), (deep, r"does not fit: parameter blocks/1/\S+ is absent there")):
        with pytest.raises(UserError, match=message):
            train(config, tmp_path / "run")
        assert not (tmp_path / "run").exists()
