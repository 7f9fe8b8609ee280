"""Several processes that are one run: the same losses as one process, any number of them after a resume, and kills.

PROCESS_KILLS=20 in the environment adds what takes minutes: four processes, and so many kills at random moments of random
processes, others for each PROCESS_SEED. `pytest -s` shows them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import close

from mla import processes
from mla.config import MeshConfig
from mla.errors import UserError
from mla.relay import FATAL, LOST, relayed
from mla.training.checkpoint import steps_in
from mla.training.logs import read_metrics

ROOT = Path(__file__).resolve().parent.parent
STEPS = 24
KILLS = int(os.environ.get("PROCESS_KILLS", "0"))
SEED = int(os.environ.get("PROCESS_SEED", "0"))
SILENCE = 10  # seconds, mesh.silence_seconds here
JOIN = 30  # seconds, mesh.join_seconds here
ENDING = 30  # seconds that the end of a process itself may take on a busy machine
BOUND = 1e-5  # nats
GO_ON = "the same command goes on from there"


@dataclasses.dataclass(frozen=True)
class Ended:
    """A process that is over."""

    status: int
    out: str
    err: str


class Group:
    """Processes of one command. A context manager: what still runs at its end is killed."""

    def __init__(self, count: int, *command: str):
        with socket.create_server(("", 0)) as server:
            address = f"127.0.0.1:{server.getsockname()[1]}"
        self._all = []
        for number in range(count):
            told = {processes.ADDRESS: address, processes.COUNT: str(count), processes.NUMBER: str(number)}
            environment = os.environ | (told if count > 1 else {})
            pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            self._all.append(subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, **pipes))

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *error: Any) -> None:
        for process in self._all:
            process.kill()
            process.communicate()

    @property
    def running(self) -> list[int]:
        return [number for number, process in enumerate(self._all) if process.poll() is None]

    def kill(self, number: int, what: signal.Signals = signal.SIGKILL) -> None:
        self._all[number].send_signal(what)

    def ended(self, seconds: float) -> list[Ended]:
        """All of them, which must be over by then."""
        deadline, over = time.monotonic() + seconds, []
        for process in self._all:
            out, err = process.communicate(timeout=max(deadline - time.monotonic(), 0.1))
            over.append(Ended(process.returncode, out, err))
        return over

    def done(self) -> str:
        """What the primary printed, when all have ended well and only it has printed and none complained."""
        over = self.ended(240)
        assert all(one.status == 0 and not one.err for one in over), over
        for one in over[1:]:
            assert all(line.startswith("[Gloo]") for line in one.out.splitlines()), one.out
        return over[0].out


def training(config_file: Path, workdir: Path, count: int, *more: str, steps: int = STEPS) -> Group:
    mesh = {"host_devices": 0, "join_seconds": JOIN, "silence_seconds": SILENCE}
    return Group(
        count,
        *("train.py", f"--config={config_file}:mla", f"--workdir={workdir}", f"--config.steps={steps}"),
        *(f"--config.mesh.{name}={value}" for name, value in mesh.items()),
        *("--config.checkpoint.every_steps=3", *more),
    )


def wait_for_step(group: Group, workdir: Path, step: int) -> None:
    deadline = time.monotonic() + 240
    while not (lines := read_metrics(workdir)) or lines[-1]["step"] < step:
        assert group.running and time.monotonic() < deadline, group.ended(ENDING)
        time.sleep(0.005)


def require_same_run(alone: Path, workdir: Path, steps: int = STEPS) -> None:
    """Each step logged once, with the losses of one process, and the same position in the data at the end."""
    one, other = read_metrics(alone), read_metrics(workdir)
    assert [line["step"] for line in other] == list(range(1, steps + 1)) == [line["step"] for line in one]
    assert len((workdir / "metrics.jsonl").read_text().splitlines()) == steps
    for key in ("loss", "grad_norm", "learning_rate"):
        close([line[key] for line in other], [line[key] for line in one], 0, key, relative=BOUND)
    positions = [(w / "checkpoints" / str(steps) / "position" / "metadata").read_text() for w in (alone, workdir)]
    assert positions[0] == positions[1] and steps_in(workdir)[-1] == steps


@pytest.fixture(scope="module")
def alone(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of an undisturbed run by one process."""
    workdir = tmp_path_factory.mktemp("alone")
    with training(config_file, workdir, 1) as group:
        group.done()
    yield workdir


# ----------------------------------------------------------------------------------------------------------- one run by many


def test_two_processes_are_stopped_killed_and_succeeded_by_one(alone: Path, config_file: Path, tmp_path: Path) -> None:
    """SIGTERM to one, which both heed, then SIGKILL to the primary, which held the folder, then one process to the end."""
    workdir = tmp_path / "run"
    with training(config_file, workdir, 2) as group:
        wait_for_step(group, workdir, 4)
        group.kill(1, signal.SIGTERM)
        over = group.ended(60)
    assert [one.status for one in over] == [143, 143] and not any(one.err for one in over), over
    assert (
        over[0].out.splitlines()[-1] == f"SIGTERM: saved step {steps_in(workdir)[-1]}; the same command goes on from there"
    )
    with training(config_file, workdir, 2) as group:
        wait_for_step(group, workdir, 13)
        group.kill(0)
        require_told(group, 0)
    saved = steps_in(workdir)[-1]
    with training(config_file, workdir, 1) as group:
        assert f"resumed after step {saved} of {STEPS}" in group.done()
    require_same_run(alone, workdir)
    assert len([*workdir.rglob("events.out.tfevents.*")]) == 3  # one a start: the primary's


def test_two_processes_evaluate_as_one(alone: Path, tmp_path: Path) -> None:
    """The same figures, written once."""
    rows, groups = [], []
    for count in (1, 2):
        out = tmp_path / f"{count}.json"
        groups.append(
            (out, Group(count, "eval.py", f"--workdir={alone}", "--config.mesh.silence_seconds=60", f"--out={out}"))
        )
    for out, group in groups:
        with group:
            assert group.done().count("wrote") == 1
        rows.append(json.loads(out.read_text()))
    one, two = (dict(leaves(row)) for row in rows)
    assert one.keys() == two.keys()
    assert (one.pop("environment.device_count"), two.pop("environment.device_count")) == (1, 2)
    for name, value in one.items():
        if isinstance(value, float):
            close(two[name], value, 0, name, relative=BOUND)
        else:
            assert two[name] == value, name


def leaves(row: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of each figure in an eval.json; speed is no figure that can be compared."""
    for key, value in row.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        elif not f"{prefix}{key}".startswith("decode."):
            yield f"{prefix}{key}", value


def require_told(group: Group, killed: int) -> None:
    """All end soon after one was killed, each other one with one line on stderr and a status that says so."""
    over = group.ended(max(SILENCE, JOIN) + ENDING)
    assert over[killed].status == -signal.SIGKILL
    for number, one in enumerate(over):
        if number != killed:
            assert one.status not in (0, -signal.SIGKILL) and one.err == LOST + "\n", (number, one)
            assert "done," not in one.out


# ----------------------------------------------------------------------------------------- what takes minutes: PROCESS_KILLS

long = pytest.mark.skipif(not KILLS, reason="PROCESS_KILLS is not set")


@long
@pytest.mark.parametrize("split", ["data", "fsdp", "tensor"])
def test_four_processes_are_one(split: str, alone: Path, config_file: Path, tmp_path: Path) -> None:
    """Each splits another axis of the arrays, over processes with one device each."""
    axes = {"data": (), "fsdp": ("--config.mesh.fsdp=4", "--config.mesh.data=1"), "tensor": ("--config.mesh.tensor=2",)}
    with training(config_file, tmp_path / "run", 4, *axes[split]) as group:
        group.done()
    require_same_run(alone, tmp_path / "run")


@long
def test_one_two_four_one(alone: Path, config_file: Path, tmp_path: Path) -> None:
    """One process hands over to two, to four, and to one again, each time when it has been told to stop."""
    workdir = tmp_path / "run"
    for count, step in ((1, 4), (2, 10), (4, 16), (1, None)):
        with training(config_file, workdir, count) as group:
            if step is None:
                group.done()
                break
            wait_for_step(group, workdir, step)
            for number in range(count):
                group.kill(number, signal.SIGTERM)
            assert [one.status for one in group.ended(90)] == [143] * count
    require_same_run(alone, workdir)


@long
@pytest.mark.timeout(600 + 120 * KILLS)
def test_kills_at_random_moments_lose_nothing(config_file: Path, tmp_path: Path) -> None:
    """Random processes of runs by two and by four are killed, before they have met or within a write; one ends the run."""
    draw, steps = random.Random(SEED), STEPS * (KILLS + 1)
    undisturbed, workdir = tmp_path / "undisturbed", tmp_path / "killed"
    with training(config_file, undisturbed, 1, steps=steps) as group:
        group.done()
    for number in range(1, KILLS + 1):
        count = draw.choice((2, 4))
        killed, saved = draw.randrange(count), steps_in(workdir)
        with training(config_file, workdir, count, steps=steps) as group:
            if draw.random() < 0.25:
                moment = draw.uniform(0, 15)
                time.sleep(moment)
                told = f"{moment:.2f} s after the start"
            else:
                step, moment = (saved[-1] if saved else 0) + draw.randrange(1, 20), draw.uniform(0, 0.2)
                wait_for_step(group, workdir, step)
                time.sleep(moment)
                told = f"{moment:.2f} s after step {step}"
            assert len(group.running) == count, group.ended(ENDING)
            start = time.monotonic()
            group.kill(killed)
            require_told(group, killed)
        took, left = time.monotonic() - start, steps_in(workdir)
        print(
            f"kill {number}: process {killed} of {count}, {told}; the others ended in {took:.1f} s; saved: {left}",
            flush=True,
        )
        assert not saved or left[-1] >= saved[-1], "a checkpoint is gone"
    with training(config_file, workdir, 1, steps=steps) as group:
        group.done()
    require_same_run(undisturbed, workdir, steps)
    one, other = (read_metrics(w) for w in (undisturbed, workdir))
    worst = max(abs(a["loss"] - b["loss"]) for a, b in zip(one, other, strict=True))
    last = " and ".join(f"{log[-1]['loss']:.7f}" for log in (one, other))
    print(f"{steps} steps: losses differ by at most {worst:.2g} nats; the last is {last}")


# ----------------------------------------------------------------------------------------------------------- what is refused

REFUSED = {
    "nothing is told": ({}, "config.mesh.distributed: no cluster .* set JAX_COORDINATOR_ADDRESS and .* and JAX_PROCESS_ID"),
    "part is told": ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, "no cluster .* set JAX_COORDINATOR_ADDRESS, see"),
    "no number": ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES: 'two' is no whole number"),
    "too high": ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID: 2 is not from 0 to 1"),
    "no port": ({"JAX_COORDINATOR_ADDRESS": "localhost"}, "JAX_COORDINATOR_ADDRESS: 'localhost' is not HOST:PORT"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_missing_or_wrong_is_one_line(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    variables, said = REFUSED[case]
    monkeypatch.setattr(processes, "_filter_stderr", lambda: None)
    monkeypatch.setattr("jax.distributed.initialize", refuse)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said) as caught:
        processes.join(MeshConfig(distributed=True))
    assert "\n" not in str(caught.value)


def refuse(**_: Any) -> None:
    """As jax does where no manager is found; it cannot be asked here, where devices are in use."""
    raise ValueError("coordinator_address should be defined.")


def test_a_process_with_another_config_is_refused(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = tiny("mla", steps=7), {"config.steps": 6}
    processes.require_same(here)  # of one process there is nothing to compare
    monkeypatch.setattr(processes, "several", lambda: True)
    monkeypatch.setattr(processes, "from_primary", lambda values: values)
    processes.require_same(here, "abc")
    monkeypatch.setattr(processes, "from_primary", lambda values: values | there)
    with pytest.raises(UserError, match=r"config\.steps: is 6 in process 0 and 7 in process 0; start all alike"):
        processes.require_same(here, "abc")


def test_a_port_in_use_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("", 0)) as server:
        monkeypatch.setenv(processes.ADDRESS, f"localhost:{server.getsockname()[1]}")
        monkeypatch.setenv(processes.COUNT, "2")
        monkeypatch.setenv(processes.NUMBER, "0")
        with pytest.raises(UserError, match="cannot be served on this host"):
            processes.join(MeshConfig())


def test_one_line_stands_for_what_the_service_says() -> None:
    """Other libraries' lines stay."""
    service = "E1127 13:03:55.750324   15822 coordination_service.cc:1520] [9436600256836019090] has failed:\n"
    other = "W1127 13:03:56.000000   15822 cuda_executor.cc:1] something else\n"
    fatal = f"F1127 13:03:55.751515   15835 client.h:80] {FATAL}. This most likely\n"
    lines = [other, service, "INTERNAL: Barrier failed\n", other, fatal, "*** Check failure stack trace: ***\n", fatal]
    assert list(relayed(lines)) == [other, other, LOST + "\n"]
