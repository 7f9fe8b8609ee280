"""Runs that are killed, stopped, damaged or out of disk: what is left, and that the same command ends where it should."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ends import assert_same_end, final
from helpers import close

from mla import config as configs
from mla import workdir as folder
from mla.config import Config
from mla.data import prepared as data
from mla.data.prepared import prepare
from mla.errors import UserError
from mla.sharding import make_mesh
from mla.training import loop
from mla.training.checkpoint import UNREADABLE, load_params, restore_latest, steps_in
from mla.training.logs import read_metrics
from mla.training.loop import train
from mla.training.step import Trainer, schedule

ROOT = Path(__file__).resolve().parent.parent
STEPS = 40

# Reads and writes that were abandoned after a failure complain when nobody waits for them any more.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


# ------------------------------------------------------------------------------------------------ killed from outside


def start(config_file: Path, workdir: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "train.py", f"--config={config_file}:mla", f"--workdir={workdir}"]
    command += [f"--config.steps={STEPS}", "--config.checkpoint.every_steps=3"]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for_step(process: subprocess.Popen[str], workdir: Path, step: int) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        lines = read_metrics(workdir)
        if lines and lines[-1]["step"] >= step:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    raise AssertionError(f"step {step} was not reached")


@pytest.fixture(scope="module")
def run_config(tiny: Any) -> Config:
    return tiny("mla", steps=STEPS, checkpoint={"every_steps": 3})


@pytest.fixture(scope="module")
def uninterrupted(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    process = start(config_file, workdir)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and not err, err
    assert out.splitlines()[-1].endswith(f"done, {STEPS} steps")
    return workdir


def test_killed_and_restarted_ends_bitwise_equal(
    uninterrupted: Path, config_file: Path, run_config: Config, tmp_path: Path
) -> None:
    workdir = tmp_path / "killed"
    for step in (2, 13, 29):  # before the first checkpoint, and twice later
        process = start(config_file, workdir)
        wait_for_step(process, workdir, step)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        if step == 13:  # what a kill in the middle of a write leaves
            with (workdir / "metrics.jsonl").open("a") as log:
                log.write('{"step": 14, "tok')
    process = start(config_file, workdir)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and not err, err
    assert "resumed after step" in out
    assert_same_end(run_config, uninterrupted, workdir)


def test_sigterm_saves_and_exits_143(uninterrupted: Path, config_file: Path, run_config: Config, tmp_path: Path) -> None:
    workdir = tmp_path / "stopped"
    process = start(config_file, workdir)
    wait_for_step(process, workdir, 4)
    for _ in range(3):  # as from a scheduler and from the parent
        process.send_signal(signal.SIGTERM)
        time.sleep(0.02)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 143 and not err, err
    step = steps_in(workdir)[-1]
    assert 4 <= step < STEPS
    assert out.splitlines()[-1] == f"SIGTERM: saved step {step}; the same command goes on from there"
    process = start(config_file, workdir)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and not err, err
    assert f"resumed after step {step} of {STEPS}" in out
    assert_same_end(run_config, uninterrupted, workdir)


# ------------------------------------------------------------------------------------------------------ in one process


@pytest.fixture(scope="module")
def finished(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps with checkpoints after 2, 4 and 6."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    assert train(tiny("mla"), workdir) == 0
    assert steps_in(workdir) == [2, 4, 6]
    return workdir


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def largest_file(checkpoint: Path) -> Path:
    return max((p for p in checkpoint.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def truncate(checkpoint: Path) -> None:
    largest = largest_file(checkpoint)
    os.truncate(largest, largest.stat().st_size // 2)


def test_workdir_holds_what_is_promised(finished: Path, tiny: Any) -> None:
    assert json.loads((finished / "config.json").read_text())["model"]["mechanism"]["kv_lora_rank"] == 8
    environment = json.loads((finished / "environment.json").read_text())
    assert set(environment) - {"git_commit"} == {
        *("jax", "flax", "python", "device_kind", "device_count", "corpus_sha256", "command")
    }
    assert environment["device_count"] == 8 and len(environment["corpus_sha256"]) == 64
    assert list(finished.glob("events.out.tfevents.*"))
    lines = read_metrics(finished)
    keys = ["step", "tokens", "loss", "grad_norm", "learning_rate", "tokens_per_second", "elapsed_seconds"]
    assert [list(line) for line in lines] == [keys] * 6
    assert [line["tokens"] for line in lines] == [128 * n for n in range(1, 7)]
    assert all(line["tokens_per_second"] > 0 for line in lines)
    assert np.all(np.diff([line["elapsed_seconds"] for line in lines]) >= 0)  # in milliseconds: a step may take less


def test_a_finished_run_says_so(copy: Path, tiny: Any, snapshot: Any, capfd: pytest.CaptureFixture[str]) -> None:
    before = snapshot(copy)
    assert train(tiny("mla"), copy) == 0
    out, err = capfd.readouterr()
    assert out.splitlines()[-1] == f"{copy}: finished, all 6 steps are done" and not err
    assert snapshot(copy) == before


def test_mesh_and_bookkeeping_may_change_between_runs(
    finished: Path, copy: Path, tiny: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(copy / "checkpoints" / "6")
    changed = tiny("mla", mesh={"data": 2, "fsdp": 2, "tensor": 2}, checkpoint={"keep": 1}, log={"tensorboard": False})
    assert train(changed, copy) == 0
    assert "resumed after step 4 of 6" in capfd.readouterr().out
    assert steps_in(copy) == [6]
    (_, expected, position), (_, found, position_2) = final(tiny("mla"), finished), final(tiny("mla"), copy)
    assert position == position_2
    for path in expected:  # the sums of a gradient run over the devices in another order
        close(expected[path], found[path], 2e-4, path)


def test_truncated_checkpoint_falls_back_and_says_so(
    finished: Path, copy: Path, tiny: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    truncate(copy / "checkpoints" / "6")
    damaged = {p.name: p.stat().st_size for p in (copy / "checkpoints" / "6").rglob("*")}
    assert train(tiny("mla"), copy) == 0
    out, err = capfd.readouterr()
    aside = copy / UNREADABLE / "6"
    assert err == f"checkpoint of step 6 cannot be read; moved to {aside}, going on from step 4\n"
    assert "resumed after step 4 of 6" in out
    assert {p.name: p.stat().st_size for p in aside.rglob("*")} == damaged
    assert steps_in(copy) == [2, 4, 6]
    assert_same_end(tiny("mla"), finished, copy)


@pytest.mark.parametrize(
    "name", ["position/metadata", "params/_METADATA", "optimizer/manifest.ocdbt", "checksums.json", "one flipped bit"]
)
def test_any_damage_falls_back(name: str, copy: Path, tiny: Any, capfd: pytest.CaptureFixture[str]) -> None:
    if name == "one flipped bit":
        path = largest_file(copy / "checkpoints" / "6")
        content = bytearray(path.read_bytes())
        content[len(content) // 3] ^= 1
        path.write_bytes(bytes(content))
    else:
        os.truncate(copy / "checkpoints" / "6" / name, 0)
    config = tiny("mla")
    trainer = Trainer(config, data.prepare(config.data).vocab_size, make_mesh(config.mesh))
    restored = restore_latest(copy, trainer.abstract_state)
    assert restored is not None and restored.step == 4
    assert len(capfd.readouterr().err.splitlines()) == 1


def test_no_readable_checkpoint_is_refused(copy: Path, tiny: Any, snapshot: Any) -> None:
    for step in (2, 4, 6):
        truncate(copy / "checkpoints" / str(step))
    before = snapshot(copy)
    with pytest.raises(UserError, match=r"no checkpoint can be read \(steps 2, 4, 6"):
        train(tiny("mla"), copy)
    assert snapshot(copy) == before


def test_another_models_checkpoint_is_refused(copy: Path, tiny: Any, snapshot: Any, tmp_path: Path) -> None:
    wide = tmp_path / "wide"
    config = tiny("mla", model={"d_model": 32})
    wide.mkdir()
    (wide / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    shutil.copytree(copy / "checkpoints", wide / "checkpoints")
    before = snapshot(wide)
    expected = r"a checkpoint that does not fit: parameter \S+ is \[.*16.*\] there and \[.*32.*\] in this model"
    with pytest.raises(UserError, match=expected):
        train(config, wide)
    after = snapshot(wide)
    assert after == before


def test_not_finite_stops_with_the_step_and_is_never_saved(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Breaking(Trainer):
        def __init__(self, *arguments: Any):
            super().__init__(*arguments)
            healthy = self.step

            def step(state: Any, tokens: Any) -> Any:
                number = int(state.step) + 1
                state, metrics = healthy(state, tokens)
                return state, metrics | {"grad_norm": metrics["grad_norm"] / (number != 4)}

            self.step: Any = step

    monkeypatch.setattr(loop, "Trainer", Breaking)
    with pytest.raises(UserError, match=r"^step 4: grad_norm is inf.* the checkpoint of step 2 is the last good one"):
        train(tiny("mla"), tmp_path / "run")
    assert steps_in(tmp_path / "run") == [2]
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3]
    monkeypatch.undo()
    assert train(tiny("mla"), tmp_path / "run") == 0


@contextlib.contextmanager
def small_files(limit: int) -> Iterator[None]:
    """As on a full disk, writing fails: beyond `limit` bytes of a file, with EFBIG instead of ENOSPC."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_disk_while_logging(tiny: Any, tmp_path: Path) -> None:
    config = tiny("mla", steps=STEPS, checkpoint={"every_steps": 100}, log={"tensorboard": False})
    prepare(config.data)  # its files are larger
    with small_files(4000), pytest.raises(UserError, match=r"run: step \d+ could not be logged: File too large"):
        train(config, tmp_path / "run")
    assert 3 < len(read_metrics(tmp_path / "run")) < STEPS


def test_full_disk_leaves_the_older_checkpoint_and_mends(
    finished: Path, copy: Path, tiny: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    for step in (4, 6):
        shutil.rmtree(copy / "checkpoints" / str(step))
    message = "the checkpoint of step 4 could not be written: File too large; the checkpoint of step 2 is intact"
    with small_files(4096), pytest.raises(UserError, match=message):
        train(tiny("mla"), copy)
    assert steps_in(copy) == [2]
    assert not capfd.readouterr().err
    assert train(tiny("mla"), copy) == 0
    assert_same_end(tiny("mla"), finished, copy)


def test_a_second_process_is_refused(copy: Path, tiny: Any) -> None:
    from mla import workdir

    shutil.rmtree(copy / "checkpoints" / "6")
    with workdir.hold(copy), pytest.raises(UserError, match="another process is training in it"):
        train(tiny("mla"), copy)
    assert steps_in(copy) == [2, 4]


def test_init_from_takes_the_parameters_and_nothing_else(finished: Path, tiny: Any, tmp_path: Path) -> None:
    config = tiny("mla", init_from=str(finished), optimizer={"learning_rate": 1e-12})
    assert train(config, tmp_path / "run") == 0
    step, arrays, position = final(config, tmp_path / "run")
    _, source, _ = final(tiny("mla"), finished)
    assert step == 6 and position == {"next_index": 6}
    moments = 0
    for path, array in arrays.items():
        if path.startswith(".params"):
            close(array, source[path], 1e-9)
        elif ".mu" in path:
            moments += not np.allclose(array, source[path], atol=1e-9)
    assert moments > 5


def test_init_from_refuses_what_does_not_fit(finished: Path, tiny: Any, tmp_path: Path) -> None:
    for fields, message in (
        ({"init_from": str(tmp_path / "nowhere")}, "nowhere: holds no training run"),
        ({"init_from": str(finished), "model": {"num_layers": 2}}, r"does not fit: parameter blocks/1/\S+ is absent there"),
        ({"init_from": str(finished), "model": {"d_model": 32}}, "a checkpoint that does not fit"),
    ):
        with pytest.raises(UserError, match=message):
            train(tiny("mla", **fields), tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_what_a_run_started_from_may_be_gone_once_it_has_begun(
    copy: Path, tiny: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = tiny("mla", init_from=str(tmp_path / "gone"))
    (copy / "config.json").write_text(json.dumps(configs.to_dict(config)))
    assert train(config, copy) == 0
    assert "finished, all 6 steps are done" in capfd.readouterr().out
    shutil.rmtree(copy / "checkpoints" / "6")
    assert train(config, copy) == 0
    assert "resumed after step 4 of 6" in capfd.readouterr().out


def test_two_processes_that_write_one_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "eval.json"
    with folder.replacing(path) as one, folder.replacing(path) as other:
        assert one != other and one.parent == other.parent == tmp_path
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(KeyError), folder.replacing(path) as place:
        place.write_text("half")
        raise KeyError
    assert path.read_text() == "one" and list(tmp_path.iterdir()) == [path]


def test_load_params_leaves_a_damaged_folder_as_it_is(copy: Path, tiny: Any, snapshot: Any, capfd: Any) -> None:
    truncate(copy / "checkpoints" / "6")
    config = tiny("mla")
    trainer = Trainer(config, data.prepare(config.data).vocab_size, make_mesh(config.mesh))
    before = snapshot(copy)
    load_params(copy, trainer.abstract_state.params)
    assert snapshot(copy) == before
    assert capfd.readouterr().err == (
        f"{copy / 'checkpoints' / '6'}: cannot be read; an earlier checkpoint is used instead\n"
    )


# ------------------------------------------------------------------------------------------------------- trained for longer


@pytest.fixture(scope="module")
def longer(finished: Path, tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`finished`, evaluated in pretence, and then trained to step 12."""
    workdir = Path(shutil.copytree(finished, tmp_path_factory.mktemp("runs") / "longer"))
    for name in ("eval.json", "eval-split=all.json"):
        (workdir / name).write_text(json.dumps({"schema": 1, "name": name, "mechanism": "mla", "loss": 1.0, "cache": {}}))
    (workdir / "evaluators.json").write_text("mine")
    assert train(tiny("mla", steps=12), workdir) == 0
    return workdir


def test_a_longer_run_is_the_run_that_was_planned_with_a_restart(
    finished: Path, longer: Path, tiny: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Bitwise, from the first step or from an unfinished run; and its checkpoint before the restart stays."""
    planned = tiny("mla", steps=12, optimizer={"restart": {"at": (6,)}})
    assert train(planned, tmp_path / "at once") == 0
    assert_same_end(planned, longer, tmp_path / "at once")
    assert steps_in(longer) == steps_in(tmp_path / "at once") == [6, 8, 10, 12]
    rates = [line["learning_rate"] for line in read_metrics(longer)]
    assert rates[:6] == [line["learning_rate"] for line in read_metrics(finished)]
    close(rates[6:9], [3e-4, (3e-4 + 3e-3) / 2, 3e-3], relative=1e-6)
    assert 3e-4 < rates[-1] < rates[-2] < 3e-3
    said = "warm restart after step 6, from the full state: the learning rate goes from 0.0003 to 0.003 in 2 steps and by a"
    assert f"{said} cosine to 0.0003 at step 12" in capfd.readouterr().out

    unfinished = Path(shutil.copytree(finished, tmp_path / "unfinished"))
    shutil.rmtree(unfinished / "checkpoints" / "6")
    assert train(tiny("mla", steps=12), unfinished) == 0
    assert_same_end(planned, longer, unfinished)


def test_a_longer_run_that_is_interrupted_ends_bitwise_equal(
    finished: Path, longer: Path, tiny: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The command that raised the steps goes on from where it was; the one before it no longer fits."""
    workdir = Path(shutil.copytree(longer, tmp_path / "run"))
    for step in (10, 12):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    assert train(tiny("mla", steps=12), workdir) == 0
    assert "resumed after step 8 of 12" in capfd.readouterr().out
    assert_same_end(tiny("mla", steps=12, optimizer={"restart": {"at": (6,)}}), longer, workdir)
    assert train(tiny("mla", steps=12), workdir) == 0
    assert capfd.readouterr().out.splitlines()[-1] == f"{workdir}: finished, all 12 steps are done"
    with pytest.raises(UserError, match=r"config\.steps is 12 there and 6 here"):
        train(tiny("mla"), workdir)


def test_a_longer_run_keeps_what_described_it(finished: Path, longer: Path, tiny: Any) -> None:
    kept = longer / "history" / "6"
    for name in ("config.json", "environment.json"):
        assert (kept / name).read_bytes() == (finished / name).read_bytes()
    for name in ("eval.json", "eval-split=all.json"):
        assert json.loads((kept / name).read_text())["name"] == name
        assert not (longer / name).exists(), "it is not of the newest checkpoint"
    assert (longer / "evaluators.json").read_text() == "mine"
    assert json.loads((longer / "config.json").read_text())["optimizer"]["restart"]["at"] == [6]
    lines = read_metrics(longer)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert [line["tokens"] for line in lines] == [128 * n for n in range(1, 13)]
    assert np.all(np.diff([line["elapsed_seconds"] for line in lines]) >= 0)  # in milliseconds: a step may take less


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 7}, r"config\.optimizer\.restart\.warmup_steps: 2 leaves nothing of steps 6 to 7; set it lower"),
        ({"steps": 12, "optimizer": {"learning_rate": 1e-3}}, r"optimizer\.learning_rate is 0\.003 there and 0\.001 here"),
        ({"steps": 12, "batch_size": 16}, r"config\.batch_size is 8 there and 16 here"),
        ({"steps": 12, "optimizer": {"restart": {"at": (8,)}}}, r"config\.steps is 6 there and 12 here"),
        ({"steps": 12, "optimizer": {"restart": {"at": (12,)}}}, r"restart\.at: 12 is not before the last of 12 steps"),
        ({"steps": 12, "optimizer": {"restart": {"at": (8, 4)}}}, r"restart\.at: 8,4 are no steps from 1 up, each after"),
        ({"steps": 12, "optimizer": {"restart": {"at": ("x",)}}}, r"restart\.at: x are no steps"),
        ({"steps": 12, "optimizer": {"restart": {"peak_fraction": 0.0}}}, r"peak_fraction: 0\.0 is not a positive number"),
        ({"steps": 4}, r"config\.steps is 6 there and 4 here"),
    ],
)
def test_a_longer_run_that_cannot_be_meant_is_refused(
    fields: dict[str, Any], message: str, copy: Path, tiny: Any, snapshot: Any
) -> None:
    before = snapshot(copy)
    with pytest.raises(UserError, match=message):
        train(tiny("mla", **fields), copy)
    assert snapshot(copy) == before


def test_what_a_restart_does_is_settled_by_the_first(longer: Path, tiny: Any) -> None:
    """Before it, peak and warm-up can be chosen; a third part goes on with them."""
    assert folder.continued(tiny("mla", steps=20), longer).optimizer.restart.at == (6, 12)
    folder.check(folder.continued(tiny("mla", steps=20), longer), longer)
    with pytest.raises(UserError, match=r"restart\.peak_fraction is 1\.0 there and 0\.5 here"):
        folder.check(folder.continued(tiny("mla", steps=20, optimizer={"restart": {"peak_fraction": 0.5}}), longer), longer)
    with pytest.raises(UserError, match=r"config\.steps is 12 there and 20 here"):  # what a comparison of runs must not do
        folder.check(tiny("mla", steps=20), longer)
    rate = schedule(configs.OptimizerConfig(1.0, 10, 0.1, restart=configs.RestartConfig((100,), 0.5, 20)), 200)
    assert [float(rate(step)) for step in (10, 100, 110, 120, 200)] == pytest.approx([1.0, 0.1, 0.3, 0.5, 0.05])
