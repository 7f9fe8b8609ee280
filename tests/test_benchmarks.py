"""The benchmarks run, and compare what they say they compare; their speeds are not tested."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest
from helpers import close

from mla.config import OptimizerConfig, RestartConfig
from mla.training.step import schedule

ROOT = Path(__file__).resolve().parent.parent


def test_out_is_a_path_as_people_write_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setenv("HOME", str(tmp_path))
    out_file = importlib.import_module("sides").out_file
    assert out_file("~/speed.json") == tmp_path / "speed.json"
    for text, words in (("~no_user/x.json", "no user 'no_user'"), ("~/none/x.json", "not there"), ("~", "is a folder")):
        with pytest.raises(argparse.ArgumentTypeError, match=words):
            out_file(text)


def test_both_sides_are_the_same_model(tmp_path: Path) -> None:
    out = tmp_path / "speed.json"
    command = [sys.executable, str(ROOT / "benchmarks/train_speed.py"), "--quick", f"--out={out}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert [result["mechanism"] for result in found["results"]] == ["mha", "mla"]
    for result in found["results"]:
        assert result["parameters"]["ours"] == result["parameters"]["theirs"]
        close(result["loss_difference"], 0.0, 1e-4)
        tasks = {row["task"].split(",")[0] for row in result["rows"]}
        assert tasks == {"train", "decode"}
        for row in result["rows"]:
            assert abs(row["ratio"] - row["ours"]["median"] / row["theirs"]["median"]) < 1e-6 * row["ratio"]
    assert {"jax", "torch", "transformers", "cores", "GLIBC_TUNABLES"} <= set(found["environment"])


def test_a_selection_is_timed_beside_all_entries() -> None:
    command = [sys.executable, str(ROOT / "benchmarks/selection_speed.py"), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert len([line for line in done.stdout.splitlines() if " times faster" in line]) == 3


def test_codecs_are_compared_on_one_model(tmp_path: Path) -> None:
    out = tmp_path / "cache.json"
    command = [sys.executable, str(ROOT / "benchmarks/cache_speed.py"), "--quick", f"--out={out}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [row["mechanism"] for row in rows] == ["mha", "gqa", "mla"]
    for row in rows:
        codecs = row["codecs"]
        assert list(codecs) == ["none", "bf16", "fp8", "int8", "int4"]
        for name, cell in codecs.items():
            for against in ("none", "bf16"):
                ratio = cell["milliseconds"] / codecs[against]["milliseconds"]
                assert abs(cell[f"against_{against}"] - ratio) < 1e-6 * ratio
            assert name == "none" or cell["cache_bytes"] < codecs["none"]["cache_bytes"]


def test_a_longer_run_followed_the_documented_schedule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The committed results: rates and tokens of every logged step, through an interruption; and the picture of them."""
    results = json.loads((ROOT / "results/longer/results.json").read_text())
    lines = results["metrics"]["restarted"]
    rate = schedule(OptimizerConfig(learning_rate=3e-3, warmup_steps=20, restart=RestartConfig((150,))), 300)
    assert [line["step"] for line in lines] == list(range(10, 301, 10))
    for line in lines:
        close(line["learning_rate"], rate(line["step"] - 1), 1e-8, "learning rate")
        assert line["tokens"] == line["step"] * 16 * 256
    assert results["evaluations"]["before the restart"]["train_tokens"] * 2 == lines[-1]["tokens"]
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    importlib.import_module("longer").draw(results, tmp_path / "longer.png")
    assert matplotlib.image.imread(tmp_path / "longer.png").std() > 0.02


def test_attention_backends_stand_beside_the_reference(tmp_path: Path) -> None:
    """What cannot serve on this device is left out with its reason."""
    out = tmp_path / "backends.json"
    command = [sys.executable, str(ROOT / "benchmarks/attention_backends.py"), "--quick", f"--out={out}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("left out: attention backend 'cudnn' cannot serve this call") == 2
    rows = json.loads(out.read_text())["rows"]
    assert [(row["backend"], row["window"]) for row in rows] == [
        (b, w) for w in (None, 16) for b in ("reference", "blocked")
    ]
    assert all(norm < 2e-2 for row in rows for norm in row["relative_norms"])
    assert any(norm > 0 for row in rows for norm in row["relative_norms"])


def test_recurrent_layers_stand_beside_those_of_transformers(tmp_path: Path) -> None:
    """It fails by itself where the two sides do not compute the same."""
    out = tmp_path / "recurrence.json"
    command = [
        sys.executable,
        str(ROOT / "benchmarks/recurrence_speed.py"),
        "--quick",
        "--mechanisms=gated_delta",
    ]
    done = subprocess.run([*command, f"--out={out}"], capture_output=True, text=True, timeout=300, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())["results"]
    assert [result["mechanism"] for result in results] == ["gated_delta"]
    for result in results:
        assert [row["task"] for row in result["rows"]] == ["train, T 16", "decode", "products, 16 rows", "products, 1 rows"]
        close(result["rows"][0]["difference"], 0.0, 1e-4)


def test_cost_over_length_has_an_exponent_and_a_picture(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks/length.py"), "--quick", "--mechanisms=gated_delta,mha"]
    done = subprocess.run([*command, f"--out={tmp_path}"], capture_output=True, text=True, timeout=300, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    for result in json.loads((tmp_path / "results.json").read_text())["results"]:
        (short, long), slope = result["rows"], result["exponents"]["train"]
        close(2.0 ** slope["fitted"], long["train"] / short["train"], 1e-6, unit=True)  # twice as many tokens
        close(slope["fitted"], slope["longest"], 1e-6)
    assert matplotlib.image.imread(tmp_path / "length.png").std() > 0.02


def test_sparse_decoding_is_timed_beside_its_dense_form(tmp_path: Path) -> None:
    out = tmp_path / "sparse.json"
    command = [sys.executable, str(ROOT / "benchmarks/sparse_decode.py"), "--quick", "--pairs=deepseek_sparse,quest on mha"]
    done = subprocess.run([*command, f"--out={out}"], capture_output=True, text=True, timeout=300, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [(row["pair"], row["tokens"]) for row in rows] == [
        (pair, tokens) for pair in ("deepseek_sparse", "quest on mha") for tokens in (16, 32)
    ]
    for row in rows:
        close(row["ratio"], row["ms"]["dense"] / row["ms"]["sparse"], 1e-6, unit=True)
        assert row["read_bytes"].keys() == {"sparse", "dense"} and min(row["read_bytes"].values()) > 0
    assert done.stdout.count("batch 2: ") == 2


def test_both_forms_of_latent_attention_are_timed_and_counted(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks/crossover.py"), "--quick", f"--out={tmp_path / 'new'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "new" / "results.json").read_text())["rows"]
    assert [(row["new"], row["cached"]) for row in rows] == [(1, 16), (8, 16), (1, 32), (8, 32)]
    for row in rows:
        close(row["time_ratio"], row["ms"]["expanded"] / row["ms"]["absorbed"], 1e-6, unit=True)
    # 48 to 4 heads of 12 + 4 and 12 channels over a latent of 16: x W_Q, W_DKV and W_O, and for one token over 17 entries
    # keys and values of each, or the latents themselves.
    shared = 2 * (48 * 64 + 48 * 20 + 48 * 48)
    assert rows[0]["flops"]["expanded"] == shared + 17 * (2 * 4 * 16 * 24 + 2 * 4 * 28)
    assert rows[0]["flops"]["absorbed"] == shared + 2 * 4 * 16 * 24 + 17 * 4 * (4 * 16 + 2 * 4)
    assert matplotlib.image.imread(tmp_path / "new" / "crossover.png").std() > 0.02
