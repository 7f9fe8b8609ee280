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
from mla.interop.convert import CONVERSIONS, convert, converted
from mla.sharding import make_mesh
from mla.training.checkpoint import load_model
from mla.training.loop import train
from mla.workdir import read_config
from tests.programs import status


@pytest.fixture(scope="module")
def trained(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    fields: Any = {"model": {"num_layers": 2}, "eval": {"decode_tokens": 0}}
    config, workdir = tiny("mha", **fields), tmp_path_factory.mktemp("runs") / "mha"
    assert train(config, workdir) == 0
    return config, workdir


def test_a_trained_mha_as_slim_loses_nothing_and_stores_half(trained: tuple[Any, Path]) -> None:
    config, workdir = trained
    plain, slim = evaluate(workdir, config), evaluate(workdir, config, as_mechanism="slim")
    close(slim["loss"], plain["loss"], 1e-5)
    close(slim["loss_cached"], plain["loss_cached"], 1e-4)
    assert slim["cache"]["bytes_per_token"] * 2 == plain["cache"]["bytes_per_token"]
    assert slim["params"]["mlp"] == plain["params"]["mlp"]
    said = slim["conversion"]
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
            converted(other, models.create(other, 31), 31, "slim", make_mesh(other.mesh))


def test_a_converted_run_is_evaluated_trained_and_converted_as_any_other(
    trained: tuple[Any, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, workdir = trained
    slim, back = tmp_path / "slim", tmp_path / "back"
    assert status("convert", f"--workdir={workdir}", "--as_mechanism=slim", f"--out={slim}", "--config.mesh.fsdp=2") == 0
    assert f"{slim}: {workdir} at step 6, as slim; largest condition number of a layer " in capsys.readouterr().out
    told = json.loads((slim / "conversion.json").read_text())
    assert (told["workdir"], told["step"], told["from"], told["to"]) == (str(workdir), 6, "mha", "slim")
    in_memory = evaluate(workdir, config, as_mechanism="slim", out=str(tmp_path / "eval.json"))
    row = evaluate(slim, read_config(slim))
    assert (row["name"], row["mechanism"], row["train_tokens"]) == ("mha-as-slim", "slim", in_memory["train_tokens"])
    for figure in ("loss", "loss_cached", "params", "cache", "corpus"):
        assert row[figure] == in_memory[figure], figure

    before = Checkpoint(slim)
    assert status("train", f"--workdir={slim}", "--config.steps=8", "--config.optimizer.restart.warmup_steps=1") == 0
    after = Checkpoint(slim)
    assert (before.step, after.step) == (6, 8) and before.position == load_model(workdir).position != after.position
    logged = [json.loads(line) for line in (slim / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged] == [7, 8] and logged[0]["tokens"] == 7 * 8 * 16
    assert not np.array_equal(after.value_map, before.value_map), "what the conversion made is trained"

    convert(str(slim), "mha", str(back), read_config(slim))
    assert read_config(back).model.pattern == ("mha",)
    close(evaluate(back, read_config(back))["loss"], evaluate(slim, read_config(slim))["loss"], 1e-5)


class Checkpoint:
    """Of the newest one of a slim run: its step, its position in the data, and M of the first layer."""

    def __init__(self, workdir: Path):
        loaded = load_model(workdir)
        self.step, self.position = loaded.step, loaded.position
        self.value_map = np.asarray(loaded.params["blocks"]["0"]["mixer"]["value_from_key"]["kernel"])


def test_a_folder_that_holds_anything_is_no_place_for_a_conversion(
    trained: tuple[Any, Path], tmp_path: Path, snapshot: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    _, workdir = trained
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "notes").write_text("x")
    before = snapshot(tmp_path)
    for out, name, said in (
        (tmp_path / "there", "slim", "there: is not empty; choose another --out"),
        (tmp_path / "there" / "notes", "slim", "notes: is a file, not a folder"),
        (workdir, "slim", f"{workdir}: is not empty"),
        (tmp_path / "new", "mha", "--as_mechanism=mha: mha cannot be turned into it; known: mha to slim, slim to mha"),
        (tmp_path / "new", "mla", "--as_mechanism=mla: nothing can be turned into it"),
    ):
        assert status("convert", f"--workdir={workdir}", f"--as_mechanism={name}", f"--out={out}") == 1
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1, (name, error)
    assert snapshot(tmp_path) == before


def test_layers_keep_their_own_settings() -> None:
    """Two kinds of MHA layers stay two kinds of slim layers."""
    settings = {"local": {"window": 4, "sink": True}, "far": {"rope_theta": 1e6, "output_gate": True}}
    shape = {"d_model": 32, "num_layers": 4, "num_heads": 4}
    config = configs.create("local=mha,far=mha", settings, context=24, model=shape)
    model, mesh = models.create(config, 31), make_mesh(config.mesh)
    tokens = np.random.default_rng(0).integers(0, 31, (2, 24))
    changed, made, notes = converted(config, model, 31, "slim", mesh)
    assert [layer.name for layer in configs.layers(changed.model)] == ["slim"] * 4
    assert configs.to_dict(config)["model"]["pattern"] == ("local=mha", "far=mha"), "left as it was"
    expected, worst = np.asarray(model(tokens)), max(notes["condition_numbers"])
    close(made(tokens), expected, 1e-6 * worst * np.std(expected))
    assert worst < 1e3


def test_experts_keep_their_width_and_the_reference_its_own() -> None:
    """The MHA model that sizes are compared to has the run's SwiGLU width, not that of an expert; there and back."""
    for source, name, changes in (("mha", "slim", {"mlp": "moe"}), ("slim", "mha", {}), ("mha", "slim", {"mlp_width": 72})):
        shape = {"d_model": 64, "num_layers": 2, "num_heads": 4} | changes
        config = configs.create(source, context=16, model=shape)
        before, mesh = models.sizes(config, 31), make_mesh(config.mesh)
        changed, model, _ = converted(config, models.create(config, 31), 31, name, mesh)
        after = models.sizes(changed, 31)
        assert (after.mlp_width, after.mlp, after.mha_total) == (before.mlp_width, before.mlp, before.mha_total)
        assert after.total == models.count(models.parameters(model)) == before.total - before.attention + after.attention
        back, _, _ = converted(changed, model, 31, source, mesh)
        assert models.sizes(back, 31) == before


def test_a_conversion_is_built_at_the_context_and_with_the_yarn_of_the_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONVERSIONS, ("mla", "mla"), lambda mixer: (mixer, 1.0))
    longer: Any = {"context": 96, "yarn": {"factor": 4.0}}
    shape = {"d_model": 32, "num_layers": 1, "num_heads": 2}
    config = configs.create("mla", {"kv_lora_rank": 8, "qk_rope_head_dim": 8}, context=24, model=shape, eval=longer)
    tokens = np.random.default_rng(0).integers(0, 31, (2, 96))
    plain, model = models.create(config, 31), models.create(configs.for_evaluation(config), 31)
    _, made, _ = converted(config, model, 31, "mla", make_mesh(config.mesh))
    want = np.asarray(model(tokens))
    close(made(tokens), want, 1e-5)
    assert np.abs(plain(tokens) - want).max() > 1e-2, "YaRN is seen"
