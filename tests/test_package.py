"""The package: the command `mla`, the configs that come with it, and one list of dependencies that pins are made from."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import mla
from mla import commands, paths
from mla import workdir as workdirs
from mla.__main__ import PROGRAMS
from mla.errors import UserError
from mla.report.tables import text_table
from mla.sweep import tasks as sweep
from mla.sweep.executors import process
from tests.programs import Outcome, status
from tests.rows import make_row, typed

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PYTHONS = ("3.11", "3.12")


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """command("train", "--flag=value", ...): the command `mla` in this process, from an empty folder."""
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments: str) -> Outcome:
        capsys.readouterr()
        return Outcome(status(*arguments), *capsys.readouterr())

    return invoke


# ------------------------------------------------------------------------------------------------------------ the command


def test_help_has_a_line_for_each_command(command: Any) -> None:
    outcome = command("--help")
    assert outcome.status == 0 and not outcome.err
    for name, told in PROGRAMS.items():
        assert re.search(rf"^  {name} +{re.escape(told)}$", outcome.out, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trian"], "'trian' is no command of mla; did you mean 'train'?"),
        (["Sweeps", "--workdir=x"], "'Sweeps' is no command of mla; did you mean 'sweep'?"),
        (["--workdir=x"], "'--workdir=x' is no command of mla"),
        ([], "a command is missing: mla train|eval|convert|sweep|compile|report"),
        (["train", "--workdir=x"], "--config is missing: FILE[:VARIANT]"),
        (["train", "--workdir=x", "--config=configs/quick.py:mla", "--config.stepps=3"], "did you mean config.steps?"),
        (["train", "--workdir=x", "--config=configs/quick.py:mla", "y"], "unexpected argument 'y'"),
        (["eval", "--workdir=x"], "x: holds no training run"),
        (["sweep", "--workdir=x"], "--config is missing: sweep config, FILE[:VARIANT]"),
        (["convert", "--workdir=x", "--as_mechanism=slim"], "--out is missing: folder of the new run"),
        (["convert", "--workdir=x", "--as_mechanism=slim", "--out=y"], "x: holds no training run"),
        (["report"], "a PATH is missing"),
        (["report", "x"], "x: No such file or directory"),
        (["report", "x", "y"], "--out is missing"),
        (["report", "."], ".: holds no results.jsonl, no eval.json and no run with one"),
        (["report", "--workdir=x"], "--workdir: no such flag; known: --out"),
    ],
)
def test_what_cannot_be_meant_is_one_line(arguments: list[str], said: str, command: Any) -> None:
    outcome = command(*arguments)
    assert said in outcome.err
    assert outcome.status == 1 and len(outcome.err.splitlines()) == 1 and outcome.err.startswith("error: ")
    assert not list(Path().iterdir())


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_command_explains_itself(name: str, command: Any) -> None:
    outcome = command(name, "--help")
    assert outcome.status == 0 and not outcome.err
    assert f"mla {name}" in outcome.out and "  --" in outcome.out


def test_the_version_is_said_once(command: Any) -> None:
    assert command("--version").out == f"mla {mla.__version__}\n"
    assert PROJECT["project"]["dynamic"] == ["version"] and PROJECT["tool"]["hatch"]["version"]["path"] == "mla/__init__.py"
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == mla.__version__ and cited["license"] == PROJECT["project"]["license"]
    assert {"cff-version", "message", "title", "authors"} <= set(cited)


@pytest.mark.parametrize(
    ("program", "told"),
    [
        ("/x/bin/mla", "mla sweep '--workdir=a b'"),
        ("/x/mla/__main__.py", "python -m mla sweep '--workdir=a b'"),
        ("/x/sweep.py", "python sweep.py sweep '--workdir=a b'"),
    ],
)
def test_a_report_says_how_it_was_started(program: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [program, "sweep", "--workdir=a b"])
    assert workdirs.command() == told


# ----------------------------------------------------------------------------------------------------------------- report


def write_run(folder: Path, row: dict[str, Any], file: str = "eval.json") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    told = {key: value for key, value in row.items() if key not in ("run", "family")}
    (folder / file).write_text(json.dumps(told, indent=2))


def test_report_of_a_sweep_and_of_runs(command: Any) -> None:
    rows = [make_row("mla", "latents", 1.2, 64), make_row("mha", "heads", 1.1, 128)]
    Path("sweep").mkdir()
    Path("sweep/results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for place in ("sweep", "sweep/results.jsonl"):
        outcome = command("report", place)
        assert outcome.status == 0 and text_table(typed(rows)) in outcome.out, outcome.err
        assert "| mla | latents |" in Path("sweep/report.md").read_text() and Path("sweep/frontier.png").stat().st_size > 1e4

    # Runs are called what their folders are called: all of these say "mla" themselves.
    for folder, seed, loss in (("runs/a-s0", 0, 1.3), ("runs/a-s1", 1, 1.4), ("runs/b", 0, 1.5)):
        write_run(Path(folder), make_row("mla", "latents", loss, 64, seed=seed))
    write_run(Path("runs/b"), make_row("mla", "latents", 1.6, 64), "eval-split=train.json")
    outcome = command("report", "runs/a-s0", "runs/a-s1", "runs/b/", "runs/b/eval-split=train.json", "--out=both/of them")
    assert outcome.status == 0, outcome.err
    assert "a (2 seeds)" in outcome.out and "b-split=train" in outcome.out
    told = Path("both/of them/report.md").read_text()
    assert "mla report runs/a-s0 runs/a-s1 runs/b/ runs/b/eval-split=train.json '--out=both/of them'" in told
    assert command("report", "runs").status == 0  # a sweep that another scheduler ran: no results.jsonl yet
    assert "a (2 seeds)" in Path("runs/report.md").read_text()


def test_a_report_replaces_no_other(command: Any, snapshot: Any) -> None:
    Path("sweep").mkdir()
    Path("sweep/results.jsonl").write_text(json.dumps(make_row("mla", "latents", 1.2, 64)) + "\n")
    write_run(Path("a"), make_row("mha", "heads", 1.1, 128))
    Path("file").touch()
    assert command("report", "sweep").status == 0
    before = snapshot(Path())
    for out, said in (("sweep", "the report there is of its results.jsonl"), ("file", "is a file, not a folder")):
        outcome = command("report", "a", f"--out={out}")
        assert outcome.status == 1 and said in outcome.err and len(outcome.err.splitlines()) == 1
    assert snapshot(Path()) == before


# ---------------------------------------------------------------------------------------------------------------- configs


def test_configs_come_with_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert commands.load_config("configs/quick.py:mha").name == "mha"
    plan = sweep.tasks("configs/sweeps/compare.py", tmp_path / "work")
    assert len(plan) == 7 and not any(task.refusal for task in plan)
    with pytest.raises(UserError, match=r"configs/quik\.py: no such file; did you mean 'configs/quick\.py'\?") as refused:
        commands.load_config("configs/quik.py")
    assert str(tmp_path) in str(refused.value) and str(paths.SHIPPED.parent) in str(refused.value)
    with pytest.raises(UserError, match="no such file"):
        commands.load_config("train.py")  # beside the shipped configs, but none of them
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/quick.py").write_text("raise ValueError('the nearer one')")
    with pytest.raises(UserError, match="the nearer one"):
        commands.load_config("configs/quick.py:mha")


def test_an_installed_package_knows_its_configs_and_runs_its_children(tmp_path: Path) -> None:
    """Laid out as pyproject.toml lays out the wheel."""
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    (tmp_path / "elsewhere").mkdir()
    site, ignored = tmp_path / "site", shutil.ignore_patterns("__pycache__")
    for package in wheel["packages"]:
        shutil.copytree(ROOT / package, site / package, ignore=ignored)
    for source, target in wheel["force-include"].items():
        shutil.copytree(ROOT / source, site / target, ignore=ignored)
    code = """
from pathlib import Path
from mla import commands, paths
from mla.sweep.runs import Training
from mla.sweep.tasks import Task
print(paths.CHECKOUT, paths.SHIPPED, commands.load_config("configs/quick.py:gqa").name)
print(Task(Training("a", "configs/quick.py"), Path("a"), None).train_command(paths.CHECKOUT))
"""
    environment = {**os.environ, "PYTHONPATH": str(site)}
    pipes: Any = {"cwd": tmp_path / "elsewhere", "env": environment, "text": True, "capture_output": True}
    done = subprocess.run([sys.executable, "-P", "-c", code], timeout=120, **pipes)
    first, second = done.stdout.splitlines()
    assert first == f"None {site}/mla/configs gqa", done.stderr
    assert ast.literal_eval(second)[:5] == ["-P", "-m", "mla", "train", "--config=configs/quick.py"]

    log, command = tmp_path / "log", sweep.program("trian", None)
    assert process.run(command, log, {"PYTHONPATH": str(site)}).startswith("mla trian: 'trian' is no command of mla")
    assert log.read_text().startswith("$ python -P -m mla trian\n")


def test_the_commit_is_that_of_this_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment may lie in a checkout of something else."""
    installed = tmp_path / ".venv/mla/workdir.py"
    installed.parent.mkdir(parents=True)
    installed.touch()
    (tmp_path / "own.py").touch()
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.com", "-C", str(tmp_path)]
    for arguments in (["init", "-q"], ["add", "own.py"], ["commit", "-q", "-m", "own"]):
        subprocess.run([*git, *arguments], check=True, timeout=60)
    monkeypatch.setattr(workdirs, "__file__", str(installed))
    assert workdirs.git_commit() is None
    monkeypatch.setattr(workdirs, "__file__", str(tmp_path / "own.py"))
    assert re.fullmatch(r"[0-9a-f]{40}", workdirs.git_commit() or "")


# ----------------------------------------------------------------------------------------------------------- dependencies


def environment(python: str) -> dict[str, str]:
    """Values of markers on a Linux machine; no extra is asked for."""
    version = {"python_version": python, "python_full_version": f"{python}.0"}
    return version | {"extra": "", "sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"}


def applies(requirement: Requirement, python: str, extras: Iterable[str] = ("",)) -> bool:
    here = environment(python)
    return requirement.marker is None or any(requirement.marker.evaluate(here | {"extra": extra}) for extra in extras)


def pins(file: str, python: str) -> dict[str, str]:
    """Name -> version of a requirements file, for one Python."""
    lines = [line for line in (ROOT / file).read_text().splitlines() if line and not line.startswith("#")]
    found = [requirement for requirement in map(Requirement, lines) if applies(requirement, python)]
    versions = {canonicalize_name(r.name): str(r.specifier) for r in found}
    assert len(versions) == len(found) and all(re.fullmatch(r"==[\w.+]+", pin) for pin in versions.values())
    return {name: pin.removeprefix("==") for name, pin in versions.items()}


def declared(*extras: str) -> list[Requirement]:
    project = PROJECT["project"]
    groups = [project["dependencies"], *(project["optional-dependencies"][extra] for extra in extras)]
    return [Requirement(line) for group in groups for line in group]


def needed(requirements: Iterable[Requirement], python: str, left_out: set[str]) -> Iterator[str]:
    """Names of all that is needed, as the packages installed here tell."""
    seen: set[tuple[str, str]] = set()
    queue = [r for r in requirements if applies(r, python)]
    while queue:
        requirement = queue.pop()
        name, extras = canonicalize_name(requirement.name), sorted({"", *requirement.extras})
        if name in left_out or (name, str(extras)) in seen:
            continue
        seen.add((name, str(extras)))
        yield name
        more = map(Requirement, importlib.metadata.requires(name) or [])
        queue += [r for r in more if applies(r, python, extras)]


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize(("file", "extras"), [("requirements.txt", ()), ("requirements-test.txt", ("test",))])
def test_pins_fit_the_declared_ranges(file: str, extras: tuple[str, ...], python: str) -> None:
    pinned = pins(file, python)
    for requirement in declared(*extras):
        if applies(requirement, python):
            assert pinned[canonicalize_name(requirement.name)] in requirement.specifier, requirement
    base = pins("requirements.txt", python)
    assert base.items() <= pinned.items()


@pytest.mark.parametrize(("file", "extras"), [("requirements.txt", ()), ("requirements-test.txt", ("test",))])
def test_everything_that_is_needed_is_pinned(file: str, extras: tuple[str, ...]) -> None:
    python = "3.11" if sys.version_info < (3, 12) else "3.12"  # of which the installed packages tell
    left_out = {canonicalize_name(name) for name in PROJECT["tool"]["uv"]["pip"]["no-emit-package"]}
    missing = set(needed(declared(*extras), python, left_out)) - set(pins(file, python))
    assert not missing, f"run make requirements: {missing}"


def test_what_is_imported_is_declared() -> None:
    packages = importlib.metadata.packages_distributions()
    optional = PROJECT["project"]["optional-dependencies"]
    imported = set()
    for file in [*(ROOT / "mla").rglob("*.py"), *(ROOT / "configs").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(str(node.module).partition(".")[0])
    imported -= {*sys.stdlib_module_names, "mla", *optional}
    found = {canonicalize_name(packages[name][0]) for name in imported}
    assert found == {canonicalize_name(requirement.name) for requirement in declared()}


def test_the_formatter_is_the_same_everywhere() -> None:
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert hook["rev"] == f"v{pins('requirements-test.txt', '3.11')['ruff']}"
    assert {entry["id"] for entry in hook["hooks"]} == {"ruff-check", "ruff-format"}
