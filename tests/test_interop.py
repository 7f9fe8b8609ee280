"""A trained model as another mechanism that computes the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mla.errors import UserError
from mla.evaluation.evaluate import evaluate
from mla.training.loop import train


@pytest.fixture(scope="module")
def trained(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    config, workdir = tiny("mha", model={"num_layers": 2}), tmp_path_factory.mktemp("runs") / "mha"
    assert train(config, workdir) == 0
    return config, workdir


def test_a_trained_mha_as_slim_loses_nothing_and_stores_half(trained: tuple[Any, Path]) -> None:
    config, workdir = trained
    plain, converted = evaluate(workdir, config), evaluate(workdir, config, as_mechanism="slim")
    assert converted["loss"] == pytest.approx(plain["loss"], abs=1e-5)
    assert converted["loss_cached"] == pytest.approx(plain["loss_cached"], abs=1e-4)
    assert converted["cache"]["bytes_per_token"] * 2 == plain["cache"]["bytes_per_token"]
    assert converted["params"]["mlp"] == plain["params"]["mlp"]
    said = converted["conversion"]
    assert (said["from"], said["to"], len(said["condition_numbers"])) == ("mha", "slim", 2)
    assert all(1 <= number < 1e4 for number in said["condition_numbers"])
    assert json.loads((workdir / "eval-slim.json").read_text())["mechanism"] == "slim"
    assert json.loads((workdir / "eval.json").read_text())["mechanism"] == "mha", "the model's own figures stay"


def test_what_cannot_be_turned_is_refused(trained: tuple[Any, Path]) -> None:
    config, workdir = trained
    with pytest.raises(UserError, match="--as_mechanism=mla: mha cannot be turned into it; known: mha to slim"):
        evaluate(workdir, config, as_mechanism="mla")
    assert not (workdir / "eval-mla.json").exists()
