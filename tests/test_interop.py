"""A trained model as another mechanism that computes the same."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import close

from mla import config as configs
from mla import model as models
from mla.errors import UserError
from mla.evaluation.evaluate import evaluate
from mla.interop.convert import convert
from mla.sharding import make_mesh
from mla.training.loop import train


@pytest.fixture(scope="module")
def trained(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    config, workdir = tiny("mha", model={"num_layers": 2}), tmp_path_factory.mktemp("runs") / "mha"
    assert train(config, workdir) == 0
    return config, workdir


def test_a_trained_mha_as_slim_loses_nothing_and_stores_half(trained: tuple[Any, Path]) -> None:
    config, workdir = trained
    plain, converted = evaluate(workdir, config), evaluate(workdir, config, as_mechanism="slim")
    close(converted["loss"], plain["loss"], 1e-5)
    close(converted["loss_cached"], plain["loss_cached"], 1e-4)
    assert converted["cache"]["bytes_per_token"] * 2 == plain["cache"]["bytes_per_token"]
    assert converted["params"]["mlp"] == plain["params"]["mlp"]
    said = converted["conversion"]
    assert (said["from"], said["to"], len(said["condition_numbers"])) == ("mha", "slim", 2)
    assert all(1 <= number < 1e4 for number in said["condition_numbers"])
    assert json.loads((workdir / "eval-slim.json").read_text())["mechanism"] == "slim"
    assert json.loads((workdir / "eval.json").read_text())["mechanism"] == "mha", "the model's own figures stay"


def test_what_cannot_be_turned_is_refused(trained: tuple[Any, Path]) -> None:
    config, workdir = trained
    with pytest.raises(UserError, match="--as_mechanism=mla: nothing can be turned into it; known: mha to slim"):
        evaluate(workdir, config, as_mechanism="mla")
    assert not (workdir / "eval-mla.json").exists()
    for variant in ("gqa", "mha,gqa", "mha/2"):
        other = configs.create(variant, model={"d_model": 16, "num_layers": 2, "num_heads": 2})
        with pytest.raises(
            UserError, match=re.escape(f"slim: {configs.describe(other.model)} cannot be turned into it; known: mha to slim")
        ):
            convert(other, models.create(other, 31), 31, "slim", make_mesh(other.mesh))


def test_layers_keep_their_own_settings() -> None:
    """Two kinds of MHA layers stay two kinds of slim layers."""
    settings = {"local": {"window": 4, "sink": True}, "far": {"rope_theta": 1e6, "output_gate": True}}
    shape = {"d_model": 32, "num_layers": 4, "num_heads": 4}
    config = configs.create("local=mha,far=mha", settings, context=24, model=shape)
    model, mesh = models.create(config, 31), make_mesh(config.mesh)
    tokens = np.random.default_rng(0).integers(0, 31, (2, 24))
    changed, converted, notes = convert(config, model, 31, "slim", mesh)
    assert [layer.name for layer in configs.layers(changed.model)] == ["slim"] * 4
    assert configs.to_dict(config)["model"]["pattern"] == ("local=mha", "far=mha"), "left as it was"
    expected, worst = np.asarray(model(tokens)), max(notes["condition_numbers"])
    close(converted(tokens), expected, 1e-6 * worst * np.std(expected))
    assert worst < 1e3
