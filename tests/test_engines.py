"""Sweeps on real schedulers that take jobs away in mid-training: every point ends bit for bit where it would have ended.

Slurm is Debian's, on this machine alone (tests/slurm.sh), as root; Ray is the package. Where one cannot start, its test is
skipped and says why.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ends import assert_same_end

from mla import claims
from mla import workdir as workdirs
from mla.report.rows import read_rows
from mla.sweep.executors.contract import claim_of
from mla.training.checkpoint import steps_in
from mla.training.logs import read_metrics

ROOT = Path(__file__).resolve().parent.parent
SETUP = ROOT / "tests/slurm.sh"
STEPS = 200
POINTS = [f"s{seed}" for seed in range(6)]

pytestmark = [pytest.mark.skipif(sys.platform != "linux", reason="finds processes by /proc"), pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def spec(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of six seeds of a tiny model, which take a second or two of training each."""
    fields = {
        "config.steps": STEPS,
        "config.checkpoint.every_steps": 20,
        "config.log.tensorboard": False,
        "config.mesh.host_devices": 1,
        "config.eval.decode_tokens": 0,
        "config.eval.tokens": 64,
    }
    runs = [(name, f"{config_file}:mha", fields | {"config.seed": seed}) for seed, name in enumerate(POINTS)]
    path = tmp_path_factory.mktemp("engines") / "sweep.py"
    path.write_text(f"def get_runs(variant=''):\n    return {runs!r}\n")
    return path


@contextlib.contextmanager
def sweeping(spec: Path, work: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A sweep in a process of its own, which is gone when the block ends."""
    command = [sys.executable, "sweep.py", f"--config={spec}", f"--workdir={work}", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            process.kill()


def ended_well(process: subprocess.Popen[str], work: Path) -> None:
    said, _ = process.communicate(timeout=800)
    assert process.returncode == 0 and "FAILED" not in said, said
    assert sorted(row.run for row in read_rows(work / "results.jsonl")) == POINTS


@pytest.fixture(scope="module")
def undisturbed(spec: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("engines") / "undisturbed"
    with sweeping(spec, work, "--jobs=2") as process:
        ended_well(process, work)
    return work


def assert_same_sweep(undisturbed: Path, work: Path) -> None:
    for name in POINTS:
        assert_same_end(workdirs.read_config(work / name), undisturbed / name, work / name)
        assert "another process" not in (work / f"{name}.log").read_text()


def until(condition: Callable[[], Any], process: subprocess.Popen[str], what: str) -> Any:
    """What the condition says as soon as it is true, while a sweep runs."""
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline:
        if result := condition():
            return result
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    raise AssertionError(f"{what} took too long")


def is_in_mid_training(work: Path, name: str) -> bool:
    """Whether a point has a checkpoint; it is not to be trained already."""
    if not steps_in(work / name):
        return False
    assert read_metrics(work / name)[-1]["step"] < STEPS
    return True


def worker(work: Path, name: str) -> int:
    """The process that runs a point's programs."""
    return claims.read(claim_of(work / f"{name}.log")).process


def trainer(work: Path, name: str) -> int:
    return claims.read(work / name / workdirs.LOCK_FILE).process


def times_trained(work: Path, name: str) -> int:
    return (work / f"{name}.log").read_text().count("train.py --config")


# ---------------------------------------------------------------------------------------------------------------- Slurm


@pytest.fixture
def slurm(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a running Slurm."""
    missing = next((name for name in ("slurmctld", "slurmd", "munged") if shutil.which(name) is None), None)
    if missing:
        pytest.skip(f"{missing} is not installed: apt-get install slurm-wlm")
    if os.getuid():
        pytest.skip("Slurm is started by root alone")
    folder = tmp_path_factory.mktemp("slurm")
    try:
        begun = subprocess.run([SETUP, "start", folder], capture_output=True, text=True, timeout=60)
        if begun.returncode:
            pytest.skip(f"Slurm does not start: {' '.join(begun.stderr.split())}")
        monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        yield folder
    finally:
        subprocess.run([SETUP, "stop", folder], check=True, timeout=60)


def jobs() -> dict[str, tuple[str, str]]:
    """Job id -> (state, node)."""
    said = subprocess.check_output(["squeue", "--noheader", "--format=%i %T %N"], text=True)
    return {line.split()[0]: (line.split()[1], line.split()[-1]) for line in said.splitlines()}


def hurry() -> dict[str, tuple[str, str]]:
    """`jobs`; those that Slurm has queued again start now and not after two minutes."""
    time.sleep(0.3)
    now = jobs()
    for job, (state, _) in now.items():
        if state == "PENDING":
            subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], capture_output=True)
    return now


def lose_power(job: str) -> None:
    """Kills what a job has on its node, the daemon of its step first: it would say that they have ended."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            title, variables = ((folder / name).read_bytes().split(b"\0") for name in ("cmdline", "environ"))
            ours = f"SLURM_CONF={os.environ['SLURM_CONF']}".encode() in variables
            daemon = title[0].startswith(f"slurmstepd: [{job}.".encode())
            if ours and (daemon or f"SLURM_JOB_ID={job}".encode() in variables):
                found.append((not daemon, int(folder.name)))
    assert sum(not other for other, _ in found) >= 2
    for _, process in sorted(found):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def test_slurm_takes_jobs_away(slurm: Path, spec: Path, undisturbed: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    with sweeping(spec, work, "--engine=submitit") as process:
        until(lambda: [state for state, _ in jobs().values()] == ["RUNNING"] * len(POINTS), process, "start")
        places = dict(zip(POINTS, sorted(jobs().items(), key=lambda entry: int(entry[0])), strict=True))
        on_one, on_two = ([name for name in POINTS if places[name][1][1] == node] for node in ("one1", "one2"))
        requeued, out_of_time, _ = on_one
        lost, lives_on, _ = on_two
        held = 0

        def hold() -> None:
            nonlocal held
            held = trainer(work, lives_on)
            os.kill(held, signal.SIGSTOP)

        def fail() -> None:
            os.kill(trainer(work, lost), signal.SIGSTOP)  # it is not to end while its daemons are looked for
            os.kill(int((slurm / "slurmd-one2.pid").read_text()), signal.SIGKILL)
            lose_power(places[lost][0])

        # A node loses its network, and one job on it its power too; the trainer of another is held until it is run again.
        hits: dict[str, Callable[[], Any]] = {
            lives_on: hold,
            lost: fail,
            requeued: lambda: subprocess.run(["scontrol", "requeue", places[requeued][0]], check=True),
            out_of_time: lambda: subprocess.run(["scancel", "--signal=USR2", places[out_of_time][0]], check=True),
        }

        def hit() -> bool:
            for name in [name for name in hits if is_in_mid_training(work, name)]:
                hits.pop(name)()
            return not hits

        until(hit, process, "the first checkpoints")
        until(lambda: hurry().get(places[lives_on][0]) == ("RUNNING", "one1"), process, "another try")
        time.sleep(3)  # in which it would train beside the first one, or give up
        assert process.poll() is None and times_trained(work, lives_on) == 1 and trainer(work, lives_on) == held
        os.kill(held, signal.SIGCONT)
        until(lambda: not hurry() or process.poll() is not None, process, "the rest")
        ended_well(process, work)
    assert_same_sweep(undisturbed, work)
    for name in (requeued, out_of_time):
        log = (work / f"{name}.log").read_text()
        assert "SIGTERM: saved step" in log and log.count("resumed after step") == 1
    assert (work / f"{lost}.log").read_text().count("resumed after step") == 1
    assert "resumed after step" not in (work / f"{lives_on}.log").read_text()


def test_a_job_that_is_cancelled_for_good_is_a_failure(slurm: Path, spec: Path, tmp_path: Path) -> None:
    """Although there is no accounting to ask."""
    work = tmp_path / "work"
    with sweeping(spec, work, "--engine=submitit") as process:
        until(lambda: len(jobs()) == len(POINTS), process, "start")
        subprocess.run(["scancel", *jobs()], check=True)
        said, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and said.count("did not finish: Slurm calls it CANCELLED; see ") == 2 * len(POINTS), said


# ------------------------------------------------------------------------------------------------------------------ Ray


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed: pip install ray")
def test_ray_loses_workers(spec: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_worker_niceness", "0")  # by default its workers give way to all else on the machine
    work = tmp_path / "work"
    with sweeping(spec, work, "--engine=ray", "--jobs=2") as process:
        until(lambda: is_in_mid_training(work, "s0"), process, "a checkpoint of s0")
        killed = worker(work, "s0"), trainer(work, "s0")
        os.kill(killed[0], signal.SIGKILL)  # its trainer is left, and ends by itself
        until(lambda: is_in_mid_training(work, "s3"), process, "a checkpoint of s3")
        for pid in (worker(work, "s3"), trainer(work, "s3")):
            os.kill(pid, signal.SIGKILL)
        ended_well(process, work)
    assert_same_sweep(undisturbed, work)
    log = (work / "s0.log").read_text()
    assert "SIGTERM: saved step" in log and log.count("resumed after step") == 1
    assert (work / "s3.log").read_text().count("resumed after step") == 1
    assert [times_trained(work, name) for name in POINTS] == [2, 1, 1, 2, 1, 1]
