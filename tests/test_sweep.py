"""Sweeps with stand-ins for train.py and eval.py that take milliseconds: what is run, skipped, reported and kept."""

from __future__ import annotations

import functools
import importlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.image
import pytest
import submitit

from mla import commands, paths
from mla import config as configs
from mla import model as models
from mla.attention.contract import REGISTRY
from mla.cache.eviction import REGISTRY as POLICIES
from mla.errors import UserError
from mla.report.points import points
from mla.report.rows import read_rows
from mla.report.tables import markdown_table, text_table
from mla.sweep import executors
from mla.sweep import loop as sweeps
from mla.sweep import tasks as planned
from mla.sweep.executors import contract, local
from mla.sweep.runs import Training, settings, with_seeds
from mla.training import checkpoint
from tests.rows import make_row, typed

ROOT = Path(__file__).resolve().parent.parent
show = functools.partial(sweeps.sweep, engine="print")

BASE = """
from mla.config import create

def get_config(variant="mha"):
    return create(variant, {"kv_lora_rank": 8} if variant == "mla" else {}, steps=5, model={"d_model": 16, "num_heads": 2})
"""

# Both note that they ran. The config that train.py leaves is the one the test has put beside it.
TRAIN = """
import json, os, pathlib, shutil, sys, time
root = pathlib.Path(__file__).parent
folder = pathlib.Path(next(a for a in sys.argv if a.startswith("--workdir=")).partition("=")[2])
(root / "calls").open("a").write(f"train {folder.name} {json.dumps(sys.argv[1:])}\\n")
(root / "environment").write_text(json.dumps(dict(os.environ)))
if folder.name == "bad":
    print("step 1")
    sys.exit("error: config.data.corpus: the reason")
if folder.name == "crash":
    os.kill(os.getpid(), 9)
folder.mkdir(parents=True, exist_ok=True)
if folder.name.startswith("slow"):
    import signal
    def save(*_):
        (folder / "saved").touch()
        sys.exit(143)
    signal.signal(signal.SIGTERM, save)
    (folder / "started").touch()
    time.sleep(60)
shutil.copy(root / "configs" / folder.name, folder / "config.json")
"""
EVAL = """
import json, pathlib, sys
root = pathlib.Path(__file__).parent
folder = pathlib.Path(next(a for a in sys.argv if a.startswith("--workdir=")).partition("=")[2])
(root / "calls").open("a").write(f"eval {folder.name} {json.dumps(sys.argv[1:])}\\n")
if (root / f"fail-{folder.name}").exists():
    sys.exit("error: the evaluation failed")
row = json.loads((root / "row.json").read_text())
row["name"] = folder.name
row["config"] = config = json.loads((root / "configs" / folder.name).read_text())
if "steps" in config:
    row["train_tokens"] = config["steps"] * config["batch_size"] * config["context"]
out = next((a.partition("=")[2] for a in sys.argv if a.startswith("--out=")), folder / "eval.json")
try:
    there = "schema" in json.loads(pathlib.Path(out).read_text())
except FileNotFoundError:
    there = True
except ValueError:
    there = False
if not there:
    sys.exit("error: --out is there and holds no evaluation")
pathlib.Path(out).write_text(json.dumps(row))
"""


class Place:
    """A folder with stand-ins, a sweep config and a workdir."""

    def __init__(self, folder: Path):
        self.root, self.spec, self.work = folder / "root", str(folder / "sweep.py"), folder / "work"
        (self.root / "configs").mkdir(parents=True)
        self.base = folder / "base.py"
        self.base.write_text(BASE)
        for name, text in (("train.py", TRAIN), ("eval.py", EVAL)):
            (self.root / name).write_text(text)
        row = make_row("", "mha", 1.25, 64)
        (self.root / "row.json").write_text(json.dumps({key: row[key] for key in row if key not in ("run", "family")}))

    def runs(self, *runs: tuple[str, dict[str, Any]], variant: str = "mha") -> None:
        """Writes the sweep config, and what train.py is to leave for each run: found out without the code under test."""
        listed = [(name, f"{self.base}:{variant}", overrides, "a family") for name, overrides in runs]
        Path(self.spec).write_text(f"def get_runs(variant=''):\n    return {listed!r}\n")
        for name, overrides in runs:
            config = commands.load_config(f"{self.base}:{variant}")
            for key, value in {"config.name": name, **overrides}.items():
                *path, field = key.removeprefix("config.").split(".")
                node: Any = config
                for part in path:
                    node = getattr(node, part)
                setattr(node, field, value)
            (self.root / "configs" / name).write_text(json.dumps(configs.to_dict(config)))

    def sweep(self) -> int:
        (self.root / "calls").write_text("")
        return sweeps.sweep(self.spec, self.work, self.root)

    def calls(self) -> list[str]:
        """'train NAME' and 'eval NAME' in order, since the last sweep began."""
        return [" ".join(line.split()[:2]) for line in (self.root / "calls").read_text().splitlines()]

    def arguments(self, call: str) -> list[str]:
        (line,) = (line for line in (self.root / "calls").read_text().splitlines() if line.startswith(f"{call} "))
        return json.loads(line.split(maxsplit=2)[2])

    def results(self) -> list[str]:
        return [json.loads(line)["run"] for line in (self.work / "results.jsonl").read_text().splitlines()]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_every_point_is_trained_and_evaluated(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    place.runs(("a", {}), ("b", {"config.seed": 3, "config.eval.tokens": 50}))
    assert place.sweep() == 0
    assert place.calls() == ["train a", "eval a", "train b", "eval b"]
    folder = place.work / "b"
    both = ["--config.seed=3", "--config.eval.tokens=50"]
    assert place.arguments("train b") == [f"--config={place.base}:mha", f"--workdir={folder}", "--config.name=b", *both]
    out = f"--out={folder}/eval.json"
    assert place.arguments("eval b") == [f"--workdir={folder}", "--config.eval.tokens=50", out]

    rows = read_rows(place.work / "results.jsonl")
    assert [row.run for row in rows] == ["a", "b"]
    assert rows[1].overrides == {"config.seed": 3, "config.eval.tokens": 50} and rows[1].family == "a family"
    assert rows[1].loss == 1.25
    said = capsys.readouterr().out
    assert text_table(rows) in said and str(place.work / "frontier.png") in said
    assert "[1/2] a: trained in" in said and "ETA" in said
    assert matplotlib.image.imread(place.work / "frontier.png").std() > 0.02
    assert markdown_table(rows) in (place.work / "report.md").read_text()
    log = (place.work / "b.log").read_text()
    assert log.count("$ python") == 2 and "train.py" in log and "eval.py" in log


def test_children_share_compiled_programs_and_use_huge_pages(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GLIBC_TUNABLES", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    place.runs(("a", {}))
    assert place.sweep() == 0
    seen = json.loads((place.root / "environment").read_text())
    assert seen["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
    assert Path(seen["JAX_COMPILATION_CACHE_DIR"]).parent == place.work.absolute()
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/elsewhere")
    place.runs(("a", {}), ("b", {}))
    assert place.sweep() == 0
    assert json.loads((place.root / "environment").read_text())["JAX_COMPILATION_CACHE_DIR"] == "/elsewhere"


def test_a_failed_point_does_not_stop_the_others(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    place.runs(("a", {}), ("bad", {}), ("crash", {}), ("c", {}))
    assert place.sweep() == 1
    assert place.calls() == ["train a", "eval a", "train bad", "train crash", "train c", "eval c"]
    assert place.results() == ["a", "c"]
    said = capsys.readouterr()
    assert text_table(read_rows(place.work / "results.jsonl")) in said.out
    *failed, summary = said.err.strip().splitlines()
    assert [line.split(" (log")[0] for line in failed] == [
        "error: bad failed: train.py: config.data.corpus: the reason",
        "error: crash failed: train.py was ended by SIGKILL",
    ]
    assert "2 of 4" in summary
    assert str(place.work / "bad.log") in failed[0]


def test_finished_points_are_skipped_and_failed_ones_tried_again(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    place.runs(("a", {}), ("bad", {}), ("c", {}))
    assert place.sweep() == 1
    assert place.sweep() == 1
    assert place.calls() == ["train bad"]
    assert "a: finished before with the same config, skipped" in capsys.readouterr().out
    assert place.results() == ["a", "c"]

    place.runs(("a", {"config.log.tensorboard": False}), ("c", {"config.seed": 1}))
    assert place.sweep() == 0  # what changes no figure does not count; a seed does
    assert place.calls() == ["train c", "eval c"]

    row = json.loads((place.work / "a/eval.json").read_text())
    del row["config"]["data"]["end_token"], row["config"]["eval"]["yarn"]  # as an earlier version left it
    (place.work / "a/eval.json").write_text(json.dumps(row))
    assert place.sweep() == 0 and place.calls() == []

    (place.work / "a/eval.json").write_text("{ broken")
    assert place.sweep() == 0
    assert place.calls() == ["train a", "eval a"]
    assert (place.work / "a/damaged-eval.json").read_text() == "{ broken"


@pytest.mark.parametrize("run", [sweeps.sweep, show])
@pytest.mark.parametrize(
    ("runs", "said"),
    [
        ([("a", {"config.seed": 1}), ("b", {})], r"work/a: holds another config: config\.seed is 0 there and 1 here"),
        ([("a", {})], r"results\.jsonl: holds run 'b', which this sweep config does not have; choose another --workdir"),
    ],
)
def test_a_changed_spec_that_would_lose_results_is_refused_before_anything_is_touched(
    runs: list[tuple[str, dict[str, Any]]], said: str, run: Any, place: Place, snapshot: Any
) -> None:
    place.runs(("a", {}), ("b", {}))
    assert place.sweep() == 0
    for name in "ab":
        (place.work / name / "checkpoints/5").mkdir(parents=True)
    before = snapshot(place.work)
    place.runs(*runs, ("c", {}))
    (place.root / "calls").write_text("")
    with pytest.raises(UserError, match=said):
        run(place.spec, place.work, place.root)
    assert place.calls() == [] and snapshot(place.work) == before
    (place.work / "results.jsonl").write_text("mine")
    place.runs(("a", {}), ("b", {}))
    with pytest.raises(UserError, match=r"results\.jsonl: is no results file of a sweep"):
        run(place.spec, place.work, place.root)
    assert place.calls() == [] and (place.work / "results.jsonl").read_text() == "mine"


@pytest.mark.parametrize("why", ["failed", "interrupted", "refused"])
def test_rows_stay_until_an_evaluation_takes_their_place(
    why: str, place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place.runs(("a", {}), ("b", {}))
    assert place.sweep() == 0
    made = {path: path.read_bytes() for path in place.work.iterdir() if path.is_file() and path.suffix != ".log"}
    assert {path.name for path in made} == {"results.jsonl", "report.md", "frontier.png", "report.html"}
    other = {"config.eval.tokens": 50}
    place.runs(("a", other), ("b", {"config.model.num_heads": 3} if why == "refused" else other), ("c", other))
    (place.root / "fail-b").touch()
    if why == "interrupted":
        run = contract.run

        def until_b(command: Any, *rest: Any) -> str:
            if any(argument.endswith("work/b") for argument in command):
                raise KeyboardInterrupt
            return run(command, *rest)

        monkeypatch.setattr(contract, "run", until_b)
    assert place.sweep() == (130 if why == "interrupted" else 1)
    assert {path: path.read_bytes() for path in made} == made
    assert "nothing takes the place of their rows of b yet" in capsys.readouterr().out
    monkeypatch.undo()
    (place.root / "fail-b").unlink()
    place.runs(("a", other), ("b", other), ("c", other))
    assert place.sweep() == 0
    assert place.results() == ["a", "b", "c"]
    rows = read_rows(place.work / "results.jsonl")
    assert {row.json["config"]["eval"]["tokens"] for row in rows} == {50}


def test_an_evaluation_that_is_not_finite_does_not_count(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    text = (place.root / "row.json").read_text()
    row = json.loads(text)
    (place.root / "row.json").write_text(json.dumps(row | {"decode": {"tokens_per_second": float("inf")}}))
    place.runs(("a", {}))
    wrong = f"{place.work}/a/eval.json: run 'a': decode.tokens_per_second is inf, not a finite number; evaluate it again"
    assert place.sweep() == 1
    assert wrong in capsys.readouterr().err and place.results() == []
    assert show(place.spec, place.work, place.root) == 0
    shown = capsys.readouterr()
    assert wrong in shown.err and "eval.py" in shown.out
    (place.root / "row.json").write_text(text)
    assert place.sweep() == 0
    assert wrong in capsys.readouterr().out and place.results() == ["a"]


@pytest.mark.parametrize("there", [False, True])
def test_a_workdir_that_cannot_be_written_is_refused_first(
    there: bool, place: Place, monkeypatch: pytest.MonkeyPatch, snapshot: Any
) -> None:
    """As on a read-only disk, which says EROFS; permissions would not stop root."""
    place.runs(("a", {}))
    if there:
        assert place.sweep() == 0
    before = snapshot(place.work)

    def read_only(*_: Any, **__: Any) -> Any:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.NamedTemporaryFile", read_only)
    monkeypatch.setattr(sweeps, "tasks", lambda *_: pytest.fail("the plan was made"))
    with pytest.raises(
        UserError, match=r"results\.jsonl: cannot be written \(Read-only file system\); choose another --work"
    ):
        place.sweep()
    assert snapshot(place.work) == before


def test_other_evaluation_settings_reach_a_run_that_is_trained(place: Place) -> None:
    place.runs(("a", {"config.eval.tokens": 50}))
    assert place.sweep() == 0
    (place.work / "a/checkpoints/5").mkdir(parents=True)
    before, own = (place.work / "a/config.json").read_text(), (place.work / "a/eval.json").read_bytes()
    place.runs(("a", {}))
    (place.root / "train.py").write_text(TRAIN.replace("shutil.copy(", "(lambda *_: None)("))  # finished: changes nothing
    assert place.sweep() == 0
    assert (place.work / "a/config.json").read_text() == before
    out = place.work / "a/eval-tokens=0.json"
    assert place.arguments("eval a")[1:] == ["--config.eval.tokens=0", f"--out={out}"] and out.exists()
    assert (place.work / "a/eval.json").read_bytes() == own  # the run's own evaluation
    for tokens in (50, 0):
        place.runs(("a", {"config.eval.tokens": tokens}))
        assert place.sweep() == 0 and place.calls() == []
        assert read_rows(place.work / "results.jsonl")[0].json["config"]["eval"]["tokens"] == tokens


def test_an_evaluation_of_something_else_is_a_failure(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    place.runs(("a", {}))
    (place.root / "configs/a").write_text(json.dumps({"seed": 77}))
    assert place.sweep() == 1
    assert "left no eval.json for this config" in capsys.readouterr().err
    assert place.results() == [] and not (place.work / "frontier.png").exists()


def test_a_point_that_cannot_work_is_refused_at_once(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    place.runs(("a", {}), ("odd", {"config.model.num_heads": 3}), ("c", {}))
    assert place.sweep() == 1
    assert place.calls() == ["train a", "eval a", "train c", "eval c"]
    said = capsys.readouterr()
    assert said.out.startswith("odd: refused, the others go on: config.model")
    assert "error: odd failed: config.model" in said.err


@pytest.mark.parametrize(("number", "jobs"), [(signal.SIGINT, 1), (signal.SIGTERM, 1), (signal.SIGINT, 2)])
def test_an_interrupted_sweep_keeps_what_it_has(number: int, jobs: int, place: Place) -> None:
    slow = ["slow", "slow2"][:jobs]
    place.runs(*((name, {}) for name in ["a", *slow, "c"]))
    if jobs == 2:
        place.runs(("a", {}))
        assert place.sweep() == 0  # both slow ones start at once
        place.runs(*((name, {}) for name in ["a", *slow, "c"]))
        (place.root / "calls").write_text("")
    code = f"""
import signal, sys
from pathlib import Path
from mla import commands
from mla.sweep.loop import sweep
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background
run = lambda: sweep({place.spec!r}, {str(place.work)!r}, Path({str(place.root)!r}), jobs={jobs})
sys.exit(commands.invoke(run, ["sweep"]))
"""
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes)
    deadline = time.monotonic() + 60
    while not all((place.work / name / "started").exists() for name in slow):
        if time.monotonic() > deadline or process.poll() is not None:
            break
        time.sleep(0.05)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, out + err
    assert all((place.work / name / "saved").exists() for name in slow)  # the children had their chance to save
    first = ["train a", "eval a"] if jobs == 1 else []
    assert sorted(place.calls()) == sorted(first + [f"train {name}" for name in slow])
    assert place.results() == ["a"]
    assert "the same command goes on" in out and "Traceback" not in err


def test_shell_lines_do_what_the_sweep_would(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    place.runs(("a", {}))
    assert place.sweep() == 0
    place.runs(("a", {}), ("b", {"config.name": "two words; $HOME"}), ("odd", {"config.model.num_heads": 3}))
    capsys.readouterr()
    assert show(place.spec, place.work, place.root) == 1
    said = capsys.readouterr()
    assert "odd: refused" in said.err and "a: finished before" in said.err
    (line,) = said.out.splitlines()
    (place.root / "calls").write_text("")
    subprocess.run(["sh", "-c", line], check=True)
    assert place.calls() == ["train b", "eval b"]
    assert "--config.name=two words; $HOME" in place.arguments("train b")
    assert place.sweep() == 1 and place.calls() == []
    assert place.results() == ["a", "b"]


# ---------------------------------------------------------------------------------------------------------------- executors


MEET = """
import os, pathlib, sys, time
root = pathlib.Path(__file__).parent
name = next(a for a in sys.argv if a.startswith("--workdir=")).rpartition("/")[2]
(root / f"cores-{name}").write_text(str(sorted(os.sched_getaffinity(0))))
deadline = time.monotonic() + 30
while name in "ab" and not all((root / f"cores-{n}").exists() for n in "ab") and time.monotonic() < deadline:
    time.sleep(0.02)
"""


def test_jobs_run_at_once_on_cores_of_their_own(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """Each of two runs waits for the other one to start; a third that fails stops neither."""
    place.runs(("a", {}), ("b", {}), ("bad", {}), ("d", {}))
    (place.root / "train.py").write_text(MEET + TRAIN)
    (place.root / "calls").write_text("")
    assert sweeps.sweep(place.spec, place.work, place.root, jobs=2) == 1
    assert sorted(place.results()) == ["a", "b", "d"]
    assert set(place.calls()[:2]) == {"train a", "train b"}
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    heads = {f"[{number}/4] {name}" for number, name in enumerate(("a", "b", "bad", "d"), 1)}
    assert len(lines) == 8 and {line.split(":")[0] for line in lines} == heads
    log = (place.work / "a.log").read_text()
    assert "work/a" in log and "work/b" not in log
    cores = [set(json.loads((place.root / f"cores-{name}").read_text())) for name in "ab"]
    every = os.sched_getaffinity(0)
    assert cores[0] | cores[1] == every and (len(every) == 1 or not cores[0] & cores[1])


def test_cores_are_shared_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 1, 2, 0, 7}, raising=False)
    assert local.shares(1) == [()]
    assert local.shares(2) == [[0, 1], [2, 3, 7]]
    assert {len(share) for share in local.shares(7)} == {1}
    monkeypatch.delattr(os, "sched_getaffinity")
    assert local.shares(3) == [(), (), ()]


def test_fewer_runs_than_jobs_leave_no_core_idle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cores: list[Any] = []
    monkeypatch.setattr(local, "_stay_on", cores.append)
    (ended,) = local.Local(4, tmp_path, {}).run([contract.Job("a", (), tmp_path, {}, "")], lambda _: None)
    assert ended == contract.Ended("a", "") and cores == [()]


@pytest.mark.parametrize(("text", "value"), [("-1", -1), ("600", 600), ("0.5", 0.5), ("a100", "a100"), ("1-2", "1-2")])
def test_numbers_of_an_engine_are_numbers(text: str, value: Any) -> None:
    assert repr(executors._parsed(f"x={text}")) == repr({"x": value})


@pytest.mark.parametrize(
    ("engine", "jobs", "settings", "said"),
    [
        ("slurm", None, "", "--engine: 'slurm' is not known"),
        ("local", 0, "", "--jobs: 0 is no number of jobs"),
        ("local", None, "x=1", "--engine_settings: 'x': this engine has no settings"),
        ("print", 2, "", "--jobs has no effect where nothing runs"),
        ("submitit", None, "nothing", "--engine_settings: 'nothing' is not of the form KEY=VALUE"),
        ("submitit", None, "slrum_partition=gpu", "--engine_settings: submitit: "),
    ],
)
def test_an_engine_that_cannot_be_is_one_line(engine: str, jobs: int | None, settings: str, said: str, place: Place) -> None:
    place.runs(("a", {}))
    with pytest.raises(UserError) as error:
        sweeps.sweep(place.spec, place.work, place.root, engine, jobs, settings)
    assert said in str(error.value) and "\n" not in str(error.value)
    assert not place.work.exists()


@pytest.mark.parametrize("engine", ["ray", "submitit"])
def test_an_engine_that_is_not_installed_says_how_to(engine: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.runs(("a", {}))
    monkeypatch.setitem(sys.modules, engine, None)
    monkeypatch.delitem(sys.modules, f"mla.sweep.executors.{engine}", raising=False)
    with pytest.raises(UserError) as error:
        sweeps.sweep(place.spec, place.work, place.root, engine)
    said = f"--engine={engine}: the package {engine} is not installed; run: pip install '.[{engine}]'"
    assert str(error.value) == said and not place.work.exists()


def test_jobs_of_submitit(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """In processes that behave like Slurm's jobs."""
    place.runs(("a", {}), ("bad", {}))
    (place.root / "calls").write_text("")
    assert sweeps.sweep(place.spec, place.work, place.root, "submitit", settings="cluster=local,timeout_min=2") == 1
    assert sorted(place.calls()) == ["eval a", "train a", "train bad"] and place.results() == ["a"]
    assert "error: bad failed: train.py: config.data.corpus: the reason" in capsys.readouterr().err
    assert any((place.work / ".submitit").iterdir())
    job = contract.Job("a", (), Path("x"), {}, "")
    queued = importlib.import_module("mla.sweep.executors.submitit").Resumable(job).checkpoint()
    assert queued.function.job == job  # after a preemption


def test_a_job_that_is_not_queued_fails_alone(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    submit = submitit.AutoExecutor.submit

    def picky(queue: Any, job: Any) -> Any:
        if job.job.name == "bad":
            raise submitit.core.utils.FailedJobError("sbatch: error:\nInvalid account")
        return submit(queue, job)

    monkeypatch.setattr(submitit.AutoExecutor, "submit", picky)
    place.runs(("bad", {}), ("a", {}))
    assert sweeps.sweep(place.spec, place.work, place.root, "submitit", settings="cluster=local,timeout_min=2") == 1
    assert place.results() == ["a"]
    assert "error: bad failed: was not queued: sbatch: error: Invalid account" in capsys.readouterr().err


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stand-in with the calls of ray that are used, so that a test chooses what ends when. `done` has what it did."""
    done: list[Any] = []

    class RayError(Exception):
        pass

    def wait(references: list[Any], num_returns: int, timeout: float | None = None) -> tuple[list[Any], list[Any]]:
        if timeout is not None:
            done.append(f"waited for {num_returns}")
        return references[-1:], references[:-1]  # not in the order of submission

    def get(reference: Any) -> Any:
        if reference.args[0].name == "bad":
            raise RayError("the worker\ndied")
        return reference()

    def remote(function: Any = None, **settings: Any) -> Any:
        if function is None:
            if settings.keys() - {"num_cpus", "max_retries"}:
                raise ValueError(f"Invalid option keyword {settings}")
            return remote
        return SimpleNamespace(remote=lambda *arguments: functools.partial(function, *arguments))

    def init(runtime_env: Any, **_: Any) -> None:
        done.append(runtime_env["env_vars"]["PYTHONPATH"])

    fake = SimpleNamespace(init=init, remote=remote, wait=wait, get=get, done=done, shutdown=lambda: done.append("down"))
    fake.cancel = lambda reference: done.append(f"cancelled {reference.args[0].name}")
    fake.exceptions = SimpleNamespace(RayError=RayError)
    monkeypatch.setitem(sys.modules, "ray", fake)
    monkeypatch.delitem(sys.modules, "mla.sweep.executors.ray", raising=False)
    yield fake
    sys.modules.pop("mla.sweep.executors.ray", None)


def test_tasks_of_ray(place: Place, ray: Any, capsys: pytest.CaptureFixture[str]) -> None:
    place.runs(("a", {}), ("bad", {}), ("c", {}))
    (place.root / "calls").write_text("")
    assert sweeps.sweep(place.spec, place.work, place.root, "ray", jobs=2, settings="num_cpus=1") == 1
    assert place.results() == ["a", "c"]
    path, *after = ray.done
    assert str(paths.CHECKOUT) in path.split(os.pathsep) and after == ["down"]
    assert "error: bad failed: its task did not finish: the worker died" in capsys.readouterr().err


def test_tasks_of_ray_have_time_to_save(ray: Any, tmp_path: Path) -> None:
    jobs = [contract.Job(name, (), tmp_path, {}, "") for name in "ab"]
    outcomes = executors.create("ray", None, tmp_path, "max_retries=-1").run(jobs, lambda _: None)
    assert next(outcomes) == contract.Ended("b", "")
    outcomes.close()
    assert ray.done[1:] == ["cancelled a", "waited for 1", "down"]
    with pytest.raises(UserError, match="--engine_settings: ray: Invalid option keyword"):
        executors.create("ray", None, tmp_path, "num_gpu=1")


# ---------------------------------------------------------------------------------------------------------------- freshness


def write_checkpoint(run: Path, content: str, step: int = 5) -> dict[str, Any]:
    """What an evaluation says of it."""
    params = run / "checkpoints" / str(step) / "params"
    params.mkdir(parents=True, exist_ok=True)
    (params / "data").write_text(content)
    identity = checkpoint.identity(run)
    assert identity is not None and identity["step"] == step
    return identity


def test_what_a_checkpoint_holds_decides_whether_its_evaluation_is_current(place: Place, tmp_path: Path) -> None:
    trained = Trained(place)
    trained.runs({"config.eval.tokens": 0})
    row = json.loads((place.root / "row.json").read_text())
    identity = write_checkpoint(trained.folder, "parameters")
    (place.root / "row.json").write_text(json.dumps(row | {"checkpoint": identity}))
    assert place.sweep() == 0 and place.calls() == ["eval old", "eval old"]

    later = time.time() + 1e6
    for path in [trained.folder, *trained.folder.rglob("*")]:
        os.utime(path, (later, later))
    assert place.sweep() == 0 and place.calls() == []  # touched
    moved = trained.folder.with_name("moved")
    trained.folder.rename(moved)
    shutil.copytree(moved, trained.folder)
    shutil.copytree(place.work, tmp_path / "copy")
    place.work = tmp_path / "copy"
    assert place.sweep() == 0 and place.calls() == []  # copied

    trained.runs({"config.eval.tokens": 9})
    config = json.loads((place.root / "configs/old").read_text())
    (place.root / "configs/old").write_text(json.dumps(config | {"eval": config["eval"] | {"tokens": 9}}))
    assert place.sweep() == 0 and place.calls() == ["eval old"]  # other settings, of one of both

    (place.root / "configs/old").write_text(json.dumps(config))
    trained.runs({"config.eval.tokens": 0})
    before = os.stat(place.work / "old-none/eval.json").st_mtime
    changed = write_checkpoint(trained.folder, "others")
    for path in trained.folder.rglob("*"):
        os.utime(path, (before - 1e6, before - 1e6))
    (place.root / "row.json").write_text(json.dumps(row | {"checkpoint": changed}))
    assert place.sweep() == 0 and place.calls() == ["eval old", "eval old"]  # other parameters, older files
    assert place.sweep() == 0 and place.calls() == []


def test_evaluations_of_earlier_versions_count_by_their_tokens(place: Place) -> None:
    """They do not say which parameters they are of."""
    trained = Trained(place)
    trained.runs({"config.eval.tokens": 0})
    assert place.sweep() == 0
    write_checkpoint(trained.folder, "parameters")
    assert place.sweep() == 0 and place.calls() == []
    write_checkpoint(trained.folder, "trained for longer", step=7)
    assert place.sweep() == 1 and place.calls() == ["eval old", "eval old"]  # the stand-in says that it saw five steps


def test_a_trained_run_is_evaluated_again_for_other_parameters(place: Place) -> None:
    place.runs(("a", {}))
    assert place.sweep() == 0
    path = place.work / "a/eval.json"
    row, identity = json.loads(path.read_text()), write_checkpoint(place.work / "a", "parameters")
    path.write_text(json.dumps(row | {"checkpoint": identity}))
    assert place.sweep() == 0 and place.calls() == []
    again = write_checkpoint(place.work / "a", "others")
    (place.root / "row.json").write_text(
        json.dumps(json.loads((place.root / "row.json").read_text()) | {"checkpoint": again})
    )
    assert place.sweep() == 0 and place.calls() == ["train a", "eval a"]
    shutil.rmtree(place.work / "a/checkpoints")
    assert place.sweep() == 0 and place.calls() == []  # to save room: the evaluation stands


# ------------------------------------------------------------------------------------------------------------ sweep configs


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "no such file"),
        ("def get_runs(", "SyntaxError"),
        ("import nothing_of_this_name", "nothing_of_this_name"),
        ("x = 1", "get_runs"),
        ("def get_runs(variant=''):\n    return []", "yields no runs"),
        ("def get_runs(variant=''):\n    return 1 / 0", "ZeroDivisionError"),
        ("def get_runs(variant=''):\n    return [3]", "3 is no"),
        ("def get_runs(variant=''):\n    return [('a', 'x.py', [], '')]", "is no"),
        ("def get_runs(variant=''):\n    return [('a/b', 'x.py')]", "'a/b' is no name"),
        ("def get_runs(variant=''):\n    return [('a', 'x.py', {'seed': 1})]", "config.seed"),
        ("def get_runs(variant=''):\n    return [('a', 'x.py'), ('a', 'y.py')]", "two runs are named 'a'"),
        ("def get_runs(variant=''):\n    return [('a.log', 'x.py'), ('a', 'y.py')]", "'a.log', which is the log of run 'a'"),
        *(
            (f"def get_runs(variant=''):\n    return [({name!r}, 'x.py')]", f"{name!r} is a file of the sweep itself")
            for name in ("report.md", "results.jsonl", "frontier.png")
        ),
        ("def get_runs(variant=''):\n    return [('a' * 252, 'x.py')]", "is too long a name for a folder and its log"),
    ],
)
def test_a_broken_sweep_config_is_one_line(text: str | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "sweep.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError) as error:
        sweeps.sweep(str(path), tmp_path / "work")
    assert said in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "work").exists()


def test_a_workdir_that_is_a_file_is_refused(place: Place) -> None:
    place.runs(("a", {}))
    place.work.write_text("mine")
    with pytest.raises(UserError, match="is a file"):
        place.sweep()
    assert place.work.read_text() == "mine"


def test_settings_of_a_variant() -> None:
    assert settings("", base="quick", seeds=1) == {"base": "quick", "seeds": 1}
    assert settings("seeds=3,base=small", base="quick", seeds=1) == {"base": "small", "seeds": 3}
    with pytest.raises(UserError, match="did you mean 'seeds'"):
        settings("sedes=3", base="quick", seeds=1)
    with pytest.raises(UserError, match="'three'"):
        settings("seeds=three", base="quick", seeds=1)
    with pytest.raises(UserError, match="seeds is given twice"):
        settings("seeds=3,base=small,seeds=4", base="quick", seeds=1)


@pytest.mark.parametrize("base", ["quick", "small"])
def test_all_holds_every_mechanism_at_equal_parameters(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = planned.tasks(f"configs/sweeps/compare.py:all,base={base}", tmp_path)
    assert [task.refusal for task in found] == [""] * len(found)
    layers = [configs.layers(task.config.model) for task in found if task.config]
    # dmc continues a trained model and is not trained from the start.
    assert {layer.name for model in layers for layer in model} == set(REGISTRY) - {"dmc"}
    assert sum(any(layer.source is not None for layer in model) for model in layers) == 5, "shared across layers"
    for task in found:
        assert task.config is not None
        vocabulary = {"quick": 256, "small": 50304}[base]
        assert abs(models.sizes(task.config, vocabulary).mismatch) < 0.01, task.run.name


def test_a_truth_value_is_named_or_spelt_out() -> None:
    for text, expected in {"": False, "all": True, "all=true": True, "all=false": False}.items():
        assert settings(text, all=False, seeds=1) == {"all": expected, "seeds": 1}
    with pytest.raises(UserError, match="all='2' is no truth value; write all or leave it out"):
        settings("all=2", all=False)
    with pytest.raises(UserError, match="did you mean 'all'"):
        settings("al", all=False)


def test_a_run_says_its_point_and_seed() -> None:
    run = Training("mla", "c.py:mla", {"config.steps": 3}, "latent")
    assert list(with_seeds([run], 1)) == [run]
    first, second = with_seeds([run], 2)
    assert (first.name, second.name, second.point, second.seed) == ("mla-s0", "mla-s1", "mla", 1)
    assert second.overrides == {"config.steps": 3, "config.seed": 1} and run.overrides == {"config.steps": 3}
    rows = [make_row(r.name, r.family, 1.0, 64, seed=r.overrides["config.seed"]) for r in (first, second)]
    assert [point.label for point in points(typed(rows))] == ["mla"]
    with pytest.raises(UserError, match="seeds=0"):
        list(with_seeds([run], 0))
    with pytest.raises(UserError, match="seeds=1000000000000 is more than 10000"):
        next(with_seeds([run], 10**12))


@pytest.mark.parametrize("name", ["compare", "latent_rank", "learning_rate"])
@pytest.mark.parametrize("variant", ["", ":base=small,seeds=2"])
def test_the_sweeps_that_come_with_the_project_can_run(
    name: str, variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    found = planned.tasks(f"configs/sweeps/{name}.py{variant}", tmp_path)
    assert [task.refusal for task in found] == [""] * len(found)
    resolved = {task.run.name.removesuffix("-s0"): task.config for task in found}
    assert len({json.dumps(configs.to_dict(config)) for config in resolved.values() if config}) == len(found)
    if name == "compare":
        assert len(found) >= 6 * (2 if variant else 1)
        half, whole = (resolved[name].model.mechanism["mla"].kv_lora_rank for name in ("mla-half-rank", "mla"))
        assert half * 2 == whole
        mechanisms = {entry for config in resolved.values() for entry in config.model.pattern}
        assert mechanisms == {"mha", "gqa", "mqa", "mla", "sliding_window", "linear"}
    if name == "latent_rank":
        ranks = {
            (c.model.mechanism["mla"].kv_lora_rank, c.model.mechanism["mla"].qk_rope_head_dim)
            for c in resolved.values()
            if c.model.pattern == ("mla",)
        }
        assert len(ranks) == len({r for r, _ in ranks}) * len({p for _, p in ranks}) >= 9
        assert {"mha", "gqa", "mqa"} <= set(resolved)
    if name == "learning_rate":
        assert len({c.optimizer.learning_rate for c in resolved.values()}) >= 3


class Trained:
    """A finished run named old, and a sweep over it."""

    def __init__(self, place: Place):
        self.place, self.folder = place, place.root / "finished/old"
        (self.folder / "checkpoints/5").mkdir(parents=True)
        (self.folder / "config.json").write_text(json.dumps(configs.to_dict(commands.load_config(f"{place.base}:mha"))))
        # What the stand-in of eval.py puts into its row.
        shutil.copy(self.folder / "config.json", place.root / "configs/old")

        row = json.loads((place.root / "row.json").read_text())
        row["cache"]["bytes_after_window"], row["decoded"] = 9216, {"loss": 1.5, "loss_full_cache": 1.25}
        (place.root / "row.json").write_text(json.dumps(row))

    def runs(self, overrides: dict[str, Any]) -> None:
        runs = [("old-none", "", {}, "as trained", str(self.folder)), ("old-x", "", overrides, "x", str(self.folder))]
        Path(self.place.spec).write_text(f"def get_runs(variant=''):\n    return {runs!r}\n")


def test_finished_runs_are_evaluated_and_not_trained(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    trained = Trained(place)
    trained.runs({"config.eval.tokens": 0})
    before = sorted(trained.folder.rglob("*"))
    assert place.sweep() == 0
    assert place.calls() == ["eval old", "eval old"]
    lines = (place.root / "calls").read_text().splitlines()
    out = place.work / "old-x/eval.json"
    assert json.loads(lines[1].split(maxsplit=2)[2]) == [
        f"--workdir={trained.folder}",
        "--config.eval.tokens=0",
        f"--out={out}",
    ]
    assert sorted(trained.folder.rglob("*")) == before
    rows = read_rows(place.work / "results.jsonl")
    assert [row.trained for row in rows] == [str(trained.folder)] * 2
    assert {(point.cache_bytes, point.amortised) for point in points(rows)} == {(36.0, True)}
    report = (place.work / "report.md").read_text()
    assert "**old**" in report and "| x | x | 36.0 | 1.000 | 1.5000 | +0.2500 |" in report
    assert matplotlib.image.imread(place.work / "frontier.png").std() > 0.02
    assert place.sweep() == 0 and place.calls() == []


def test_shell_lines_evaluate_finished_runs(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """Each makes the folder that eval.py writes into."""
    Trained(place).runs({"config.eval.tokens": 0})
    assert show(place.spec, place.work, place.root) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [shlex.split(line)[:4] for line in lines] == [
        ["mkdir", "-p", str(place.work / name), "&&"] for name in ("old-none", "old-x")
    ]
    for line in lines:
        subprocess.run(["sh", "-c", line], check=True)
    assert place.sweep() == 0 and place.calls() == []


@pytest.mark.parametrize("run", [sweeps.sweep, show])
def test_an_evaluation_of_a_finished_run_takes_the_place_of_no_run(run: Any, place: Place, snapshot: Any) -> None:
    trained = Trained(place)
    shutil.copytree(trained.folder, trained.folder.with_name("another"))
    (trained.folder.with_name("file")).write_text("mine")
    (trained.folder / "eval.json").write_text("of the run itself")
    before = snapshot(place.root)
    for name, said in (
        ("old", "is the trained run's own folder"),
        ("another", "is the folder of a training run"),
        ("file", "is a file"),
    ):
        Path(place.spec).write_text(
            f"def get_runs(variant=''):\n    return [({name!r}, '', {{}}, '', {str(trained.folder)!r})]"
        )
        with pytest.raises(UserError, match=f"finished/{name}: {said}"):
            run(place.spec, trained.folder.parent, place.root)
        assert snapshot(place.root) == before


def test_a_sweep_replaces_no_report_of_somebody_else(place: Place, snapshot: Any) -> None:
    place.runs(("a", {}))
    place.work.mkdir()
    (place.work / "report.md").write_text("# My thesis\n")
    before = snapshot(place.work)
    with pytest.raises(UserError, match=r"report\.md: is there and was not written by this program"):
        place.sweep()
    assert place.calls() == [] and snapshot(place.work) == before


def test_finished_runs_that_cannot_be_evaluated_are_refused(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    trained = Trained(place)
    trained.runs({"config.steps": 3})
    assert place.sweep() == 1
    assert "config.steps: " in (said := capsys.readouterr().err) and "is trained already; only eval and mesh fields" in said
    shutil.rmtree(trained.folder / "checkpoints")
    assert place.sweep() == 1
    assert "holds no checkpoint of a training run; train it first" in capsys.readouterr().err


def test_the_grid_asks_each_model_what_it_can_take(tmp_path: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    folders = {}
    for variant in ("gqa", "mla", "sliding_window"):
        folders[variant] = tmp_path / variant
        (folders[variant] / "checkpoints/6").mkdir(parents=True)
        config = tiny(variant, context=128)
        (folders[variant] / "config.json").write_text(json.dumps(configs.to_dict(config)))
    spec = f"configs/sweeps/cache_grid.py:workdirs={'+'.join(map(str, folders.values()))},budgets=32"
    tasks = planned.tasks(spec, tmp_path / "grid")
    assert [task.refusal for task in tasks] == [""] * len(tasks)
    names = [task.run.name for task in tasks]
    assert "mla-latent_fp8" in names and "gqa-latent_fp8" not in names and "gqa-cam-32" in names
    assert [name for name in names if name.startswith("sliding_window")] == ["sliding_window-none"]
    policies = {task.config.eval.cache.evict.partition(":")[0] for task in tasks if task.config} - {"none"}
    assert policies == set(POLICIES)
    with pytest.raises(UserError, match="runs/compare/mha: holds no training run"):
        monkeypatch.chdir(tmp_path)
        planned.tasks(str(ROOT / "configs/sweeps/cache_grid.py"), tmp_path / "grid")


def test_a_run_that_was_cut_short_is_not_finished(place: Place) -> None:
    """Evaluating a half-trained run by hand does not make it a point of the sweep."""
    place.runs(("a", {}))
    assert place.sweep() == 0
    path = place.work / "a/eval.json"
    row = json.loads(path.read_text())
    path.write_text(json.dumps(row | {"train_tokens": row["train_tokens"] // 2}))
    assert place.sweep() == 0
    assert place.calls() == ["train a", "eval a"]
