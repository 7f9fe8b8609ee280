"""Where runs have ended: that one which was interrupted holds bit for bit what another holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from mla.config import Config
from mla.data.prepared import prepare
from mla.sharding import make_mesh
from mla.training.checkpoint import restore_latest
from mla.training.logs import read_metrics
from mla.training.step import Trainer


def final(config: Config, workdir: Path) -> tuple[int, dict[str, np.ndarray], Any]:
    """(step, every array of the state by path, position in the data) of a run's last checkpoint."""
    trainer = Trainer(config, prepare(config.data).vocab_size, make_mesh(config.mesh))
    restored = restore_latest(workdir, trainer.abstract_state)
    assert restored is not None
    arrays = {jax.tree_util.keystr(p): np.asarray(a) for p, a in jax.tree.leaves_with_path(restored.state)}
    return restored.step, arrays, restored.position


def assert_same_end(config: Config, one: Path, other: Path) -> None:
    """Bitwise equal parameters, optimizer state, step and data position; every step logged once, with the same numbers."""
    (step, arrays, position), (step_2, arrays_2, position_2) = final(config, one), final(config, other)
    assert step == step_2 == config.steps and position == position_2
    assert arrays.keys() == arrays_2.keys() and len(arrays) > 20
    for path in arrays:
        np.testing.assert_array_equal(arrays[path], arrays_2[path], err_msg=path)
    logs = [
        [{k: line[k] for k in ("step", "tokens", "loss", "grad_norm", "learning_rate")} for line in read_metrics(w)]
        for w in (one, other)
    ]
    assert [line["step"] for line in logs[0]] == list(range(1, config.steps + 1))
    assert logs[0] == logs[1]
    assert len((other / "metrics.jsonl").read_text().splitlines()) == config.steps
