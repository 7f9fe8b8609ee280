"""Many runs, one after the other, each in processes of its own: train.py, then eval.py, then table, report and plot.

A sweep config is a Python file with `get_runs(variant="")`, which yields `Run`s (or plain tuples like them). Its workdir
receives NAME/ (a training workdir with eval.json) and NAME.log for each, results.jsonl, report.md, frontier.png. Where
evaluation settings change later, a run keeps its eval.json, and its point is in eval-LABEL.json.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shlex
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mla import commands, paths, strict_json
from mla import config as configs
from mla import workdir as workdirs
from mla.config import Config
from mla.errors import UserError, nearest
from mla.evaluation.cache_bytes import of_row
from mla.evaluation.evaluate import label
from mla.report import frontier
from mla.report.rows import PLOT_FILE, REPORT_FILE, RESULTS_FILE, Row, from_json
from mla.report.tables import text_table
from mla.sweep import children
from mla.training.checkpoint import FOLDER, steps_in

EVAL_GROUPS = ("eval", "mesh")  # config groups that eval.py takes from its own command line
MOST_SEEDS = 10_000  # of one point
MOST_NAME_BYTES = 255  # of a file, everywhere
# Fields that change no figure of eval.json: a run that differs in them only is finished all the same.
INDIFFERENT = ("checkpoint", "log", "data.cache_dir")


class Run(NamedTuple):
    """One point of a sweep.

    Attributes:
      name: of its folder, unique. Runs of one family whose names differ only in `-s<seed>` are seeds of one point.
      config: FILE:VARIANT as train.py takes it.
      overrides: 'config.path.to.field' -> value.
      family: the line of the plot it is on.
      trained: workdir of a finished run that is evaluated, with `overrides` of eval.py's config groups; `config` is then
        empty and nothing is trained.
    """

    name: str
    config: str
    overrides: dict[str, Any] = {}  # noqa: RUF012
    family: str = ""
    trained: str = ""


@dataclasses.dataclass(frozen=True)
class Task:
    """A run with its place and its config, or with the reason why it has none."""

    run: Run
    folder: Path
    config: Config | None
    refusal: str = ""

    @property
    def log(self) -> Path:
        # Beside the folder: a folder with files but without config.json is no training workdir.
        return self.folder.with_name(_log(self.folder.name))

    def overrides(self, groups: Sequence[str] = ()) -> list[str]:
        """Command line arguments, of all config groups or of some. A run is called what its folder is called."""
        found = {"name": self.run.name} | {key.removeprefix("config."): value for key, value in self.run.overrides.items()}
        return [f"--config.{key}={_spelt(v)}" for key, v in found.items() if not groups or key.split(".")[0] in groups]

    @property
    def point(self) -> Path:
        """The file with this point's evaluation: eval.json, and for other settings than a trained run's own the file that
        eval.py names after them, so that nothing takes the place of the run's own evaluation."""
        path = self.folder / workdirs.EVAL_FILE
        if self.run.trained or self.config is None or not os.path.exists(self.folder / workdirs.CONFIG_FILE):
            return path
        there = workdirs.read_config(self.folder)
        told = label(there, dataclasses.replace(there, eval=self.config.eval, mesh=self.config.mesh))
        return path.with_name(f"eval-{told}.json") if told else path

    def train_command(self, root: Path | None) -> list[str]:
        return [
            *children.program("train", root),
            f"--config={self.run.config}",
            f"--workdir={self.folder}",
            *self.overrides(),
        ]

    def eval_command(self, root: Path | None) -> list[str]:
        """With the fields of `EVAL_GROUPS` in which the folder's config, if it is there, is not this run's."""
        arguments = dict.fromkeys(self.overrides(EVAL_GROUPS))
        out = f"--out={self.point}"
        if self.run.trained:
            return [*children.program("eval", root), f"--workdir={self.run.trained}", *arguments, out]
        if self.config is not None and (self.folder / workdirs.CONFIG_FILE).exists():
            there, here = configs.to_dict(workdirs.read_config(self.folder)), configs.to_dict(self.config)
            for field, _, value in workdirs.differences(there, here):
                if field.split(".")[0] in EVAL_GROUPS:
                    arguments[f"--config.{field}={_spelt(value)}"] = None
        return [*children.program("eval", root), f"--workdir={self.folder}", *arguments, out]

    def _trained_since(self) -> bool:
        """Whether the finished run has a checkpoint that is newer than its evaluation."""
        newest = Path(self.run.trained) / FOLDER / str(steps_in(self.run.trained)[-1])
        return newest.stat().st_mtime > self.point.stat().st_mtime

    def row(self) -> Row | None:
        """The row of results.jsonl, if the run is finished with this very config.

        Raises:
          UserError: an evaluation is there that no table can be made of; it is to be made again.
        """
        path = self.point
        try:
            row = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: is damaged ({error})") from None
        if self.config is None or (self.run.trained and self._trained_since()):
            return None
        told = {"run": self.run.name, "family": self.run.family, "overrides": self.run.overrides}
        told |= {"trained": self.run.trained} if self.run.trained else {}
        found = from_json(told | row if isinstance(row, dict) else row, path)
        try:  # as this version reads it: later fields have their defaults, and paths are absolute
            there = configs.to_dict(configs.from_dict(row["config"]))
        except (UserError, KeyError, TypeError, ValueError, AttributeError):
            return None
        changed = [field for field, _, _ in workdirs.differences(there, configs.to_dict(self.config))]
        trained = self.config.steps * self.config.batch_size * self.config.context
        same = row.get("train_tokens") == trained and all(_within(field, INDIFFERENT) for field in changed)
        return found if same else None

    def finished(self) -> Row | None:
        """`row`, or None where that cannot be used."""
        try:
            return self.row()
        except UserError:
            return None

    def make_room(self) -> None:
        """Moves what is no evaluation out of the way of one: eval.py replaces nothing else."""
        path = self.point
        if os.path.lexists(path) and workdirs.read_evaluation(path) is None:
            os.replace(path, path.with_name(f"damaged-{path.name}"))


# ---------------------------------------------------------------------------------------------------- writing a sweep config


def settings(variant: str, **defaults: Any) -> dict[str, Any]:
    """The settings in a sweep config's variant, such as `all,base=small,seeds=3`, over their defaults and of their types.

    A truth value needs no `=`: naming it switches it on.

    Raises:
      UserError: an unknown setting, with the nearest match, one that is given twice, or a value of the wrong type.
    """
    found, given = dict(defaults), set[str]()
    for entry in filter(None, variant.split(",")):
        key, _, value = entry.partition("=")
        if key not in defaults:
            raise UserError(f"sweep variant {variant!r}: no setting {key!r}; {nearest(key, defaults)}")
        if key in given:
            raise UserError(f"sweep variant {variant!r}: {key} is given twice; leave one of them out")
        given.add(key)
        if isinstance(defaults[key], bool):
            if value not in ("", "true", "false"):
                raise UserError(f"sweep variant {variant!r}: {key}={value!r} is no truth value; write {key} or leave it out")
            found[key] = value != "false"
            continue
        try:
            found[key] = type(defaults[key])(value)
        except ValueError:
            raise UserError(f"sweep variant {variant!r}: {key}={value!r} is no {type(defaults[key]).__name__}") from None
    return found


def with_seeds(runs: Iterable[Run], count: int) -> Iterator[Run]:
    """Each run with seeds 0 to count-1; a single seed is left as the base config has it."""
    if count < 1:
        raise UserError(f"sweep variant: seeds={count} is not a positive number")
    if count > MOST_SEEDS:
        raise UserError(f"sweep variant: seeds={count} is more than {MOST_SEEDS}")
    for run in runs:
        for seed in range(count) if count > 1 else ():
            yield run._replace(name=f"{run.name}-s{seed}", overrides={**run.overrides, "config.seed": seed})
        if count == 1:
            yield run


# ---------------------------------------------------------------------------------------------------- reading a sweep config


def load_runs(spec: str) -> list[Run]:
    """The runs of a sweep config, FILE[:VARIANT].

    Raises:
      UserError: no such file, a file that fails, no runs in it, something that is no run, or a name given twice.
    """
    path, _, variant = spec.partition(":")
    get_runs = getattr(commands.load_module(path), "get_runs", None)
    if not callable(get_runs):
        raise UserError(f"--config={path}: defines no get_runs(variant); is it the config of a single run?")
    try:
        runs = [_run(item, path) for item in get_runs(variant)]
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"--config={path}: get_runs({variant!r}): {type(error).__name__}: {error}") from error
    if not runs:
        raise UserError(f"--config={spec}: yields no runs")
    names = [run.name for run in runs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"--config={spec}: two runs are named {twice!r}")
    logs = {Path(_log(name)).name: name for name in names}
    taken = next((name for name in names if name in logs), None)
    if taken is not None:
        raise UserError(f"--config={spec}: a run is named {taken!r}, which is the log of run {logs[taken]!r}")
    return runs


def _run(item: Any, path: str) -> Run:
    shown = f"--config={path}: {item!r} is no (name, config file, overrides, family)"
    if not isinstance(item, tuple) or not 2 <= len(item) <= len(Run._fields):
        raise UserError(shown)
    run = Run(*item)
    if not (isinstance(run.name, str) and isinstance(run.config, str) and isinstance(run.overrides, dict)):
        raise UserError(shown)
    if not re.fullmatch(r"[\w.=+-]+", run.name) or run.name.startswith("."):
        raise UserError(f"--config={path}: {run.name!r} is no name for a folder; use letters, digits and . _ = + -")
    if run.name in (RESULTS_FILE, REPORT_FILE, PLOT_FILE):
        raise UserError(f"--config={path}: {run.name!r} is a file of the sweep itself; give the run another name")
    if len(os.fsencode(_log(run.name))) > MOST_NAME_BYTES:
        raise UserError(f"--config={path}: {run.name[:20]!r}... is too long a name for a folder and its log")
    wrong = next((key for key in run.overrides if not str(key).startswith("config.")), None)
    if wrong is not None:
        raise UserError(f"--config={path}: run {run.name!r} overrides {wrong!r}; write 'config.{wrong}'")
    return run._replace(trained=paths.expand(str(run.trained), f"--config={path}: run {run.name!r}"))


def tasks(spec: str, workdir: Path) -> list[Task]:
    """The runs of a sweep config with their configs. What cannot work is found out here, before anything runs."""
    workdirs.standing(workdir)
    found = []
    for run in load_runs(spec):
        folder = workdir / run.name
        task = Task(run, folder, None)
        try:
            if run.trained:
                _require_finished(run)
                config = commands.override(workdirs.read_config(Path(run.trained)), task.overrides(EVAL_GROUPS))
            else:
                config = commands.override(commands.load_config(run.config), task.overrides())
            configs.validate(config)
            found.append(dataclasses.replace(task, config=config))
        except UserError as error:
            found.append(dataclasses.replace(task, refusal=" ".join(str(error).split())))
    return found


def _require_finished(run: Run) -> None:
    """Refuses a run that there is nothing of to evaluate, and overrides that would have to be trained."""
    if not steps_in(run.trained):
        raise UserError(f"{run.trained}: holds no checkpoint of a training run; train it first")
    for key in run.overrides:
        if key.split(".")[1] not in EVAL_GROUPS:
            raise UserError(f"{key}: {run.trained} is trained already; only {' and '.join(EVAL_GROUPS)} fields can change")


# ----------------------------------------------------------------------------------------------------------------- running


def sweep(spec: str, workdir: str | os.PathLike[str], root: Path | None = paths.CHECKOUT) -> int:
    """Runs what is not finished, then writes the report.

    Returns:
      0 when every point is finished, 1 when some failed (they are listed at the end), 130 after Ctrl-C or SIGTERM.

    Raises:
      UserError: a sweep config or a workdir that cannot be used, or results there that would be lost; nothing is touched.
    """
    folder = Path(workdir)
    _require_writable(folder)
    plan = tasks(spec, folder)
    _require_kept(plan, folder)
    workdirs.make(folder)
    failures = {task.run.name: task.refusal for task in plan if task.refusal}
    for name, refusal in failures.items():
        _say(f"{name}: refused, the others go on: {refusal}")
    interrupted = False
    try:
        with children.interruptible():
            _run_all(plan, folder, root, failures)
    except KeyboardInterrupt:
        interrupted = True
    _finish(plan, folder, failures)
    if interrupted:
        _say("interrupted; the same command goes on from here")
        return 130
    return 1 if failures else 0


def _run_all(plan: Sequence[Task], folder: Path, root: Path | None, failures: dict[str, str]) -> None:
    """Runs what is not finished, one point after the other, and adds to `failures` what failed."""
    seconds: list[float] = []
    for number, task in enumerate(plan, 1):
        if task.refusal:
            continue
        head = f"[{number}/{len(plan)}] {task.run.name}"
        try:
            row = task.row()
        except UserError as error:
            row = None
            _say(f"{head}: {error}: does not count")
        if row is not None:
            _say(f"{head}: finished before with the same config, skipped; {_figures(row)}")
            continue
        _say(f"{head}: running, log in {task.log}")
        start = time.monotonic()
        failure, times = _carry_out(task, folder, root)
        seconds.append(time.monotonic() - start)
        left = sum(1 for later in plan[number:] if not later.refusal and later.finished() is None)
        eta = f"; ETA {_duration(statistics.fmean(seconds) * left)} for {left} more" if left else ""
        if not failure:
            failure, row = _outcome(task)
        if row is None:
            failures[task.run.name] = failure
            _say(f"{head}: FAILED after {_duration(seconds[-1])}: {failure}{eta}")
        else:
            _say(f"{head}: {times}; {_figures(row)}{eta}")
            _write_results(plan, folder)


def _outcome(task: Task) -> tuple[str, Row | None]:
    """Why there is no row although both programs ended well, or '', and the row."""
    try:
        row = task.row()
    except UserError as error:
        return str(error), None
    return "" if row else f"eval.py ended well but left no {workdirs.EVAL_FILE} for this config", row


def emit(spec: str, workdir: str | os.PathLike[str], root: Path | None = paths.CHECKOUT) -> int:
    """Prints, for each unfinished point, one line that a shell or a job scheduler can run; see `sweep`."""
    folder = Path(workdir)
    plan = tasks(spec, folder)
    _require_kept(plan, folder)
    root = root and Path(os.path.relpath(root))
    variables = [f"{key}={value}" for key, value in children.environment(folder).items() if os.environ.get(key) != value]
    for task in plan:
        if task.refusal:
            print(f"{task.run.name}: refused: {task.refusal}", file=sys.stderr)
            continue
        try:
            row = task.row()
        except UserError as error:
            row = None
            print(f"{task.run.name}: {error}: does not count", file=sys.stderr)
        if row is not None:
            print(f"{task.run.name}: finished before with the same config, left out", file=sys.stderr)
            continue
        pair = [task.eval_command(root)] if task.run.trained else [task.train_command(root), task.eval_command(root)]
        print(" && ".join(shlex.join(["env", *variables, sys.executable, *c]) for c in pair))
    return 1 if any(task.refusal for task in plan) else 0


def _require_kept(plan: Sequence[Task], workdir: Path) -> None:
    """Refuses a plan that contradicts what is there, while nothing has been touched.

    Raises:
      UserError: a run was trained with another config, or there are results of a run that the plan does not have.
    """
    for task in plan:
        if task.run.trained:
            _require_no_run(task)
        elif task.config is not None:
            workdirs.check(task.config, task.folder)
    if not os.path.exists(workdir / RESULTS_FILE):
        frontier.require_own(workdir, "choose another --workdir")
    path, planned = workdir / RESULTS_FILE, {task.run.name for task in plan}
    lost = next((run for run in _runs_in(path) if run not in planned), None)
    if lost is not None:
        raise UserError(f"{path}: holds run {lost!r}, which this sweep config does not have; choose another --workdir")


def _require_no_run(task: Task) -> None:
    """Refuses a folder for the evaluation of a finished run that is the folder of a run, that one or another."""
    workdirs.standing(task.folder)
    same = os.path.realpath(task.folder) == os.path.realpath(task.run.trained)
    if same or os.path.lexists(task.folder / workdirs.CONFIG_FILE) or steps_in(task.folder):
        what = "the trained run's own folder" if same else "the folder of a training run"
        raise UserError(
            f"{task.folder}: is {what}, where the evaluation of run {task.run.name!r} would take the place of its own; give"
            " the run another name or choose another --workdir"
        )


def _runs_in(path: Path) -> list[str]:
    """Names of the runs in a results file; none where there is no file."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        return [json.loads(line)["run"] for line in lines if line.strip()]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: is no results file of a sweep ({why}); move it away or choose another --workdir") from None


def _require_writable(folder: Path) -> None:
    workdirs.require_writable(workdirs.standing(folder) / RESULTS_FILE, "choose another --workdir")


def _carry_out(task: Task, workdir: Path, root: Path | None) -> tuple[str, str]:
    """Trains and evaluates one point: the reason for its failure or '', and how long each part took."""
    times = []
    commands_of = [("trained", task.train_command), ("evaluated", task.eval_command)]
    if task.run.trained:
        del commands_of[0]
    for what, command in commands_of:
        start = time.monotonic()
        try:
            if task.run.trained:
                workdirs.make(task.folder)
            if what == "evaluated":
                task.make_room()
            failure = children.run(command(root), task.log, children.environment(workdir))
        except (UserError, OSError) as error:  # the folder has been changed meanwhile, or its disk is full
            failure = str(error)
        if failure:
            return failure, ""
        times.append(f"{what} in {_duration(time.monotonic() - start)}")
    return "", ", ".join(times)


def _finish(plan: Sequence[Task], workdir: Path, failures: dict[str, str]) -> None:
    """Results, report and plot of what is there; then the table and what failed."""
    rows, missing = _write_results(plan, workdir)
    if rows:
        print(f"\n{text_table(rows)}\n")
    if missing:
        names = f"{RESULTS_FILE}, {REPORT_FILE} and {PLOT_FILE}"
        _say(f"{names} stay as they were: nothing takes the place of their rows of {', '.join(missing)} yet")
    elif rows:
        plot = frontier.write(rows, workdir, command=workdirs.command())
        print(
            f"results: {workdir / RESULTS_FILE}\nreport:  {workdir / REPORT_FILE}\nplot:    {plot}",
            flush=True,
        )
    for name, failure in failures.items():
        log = next(task.log for task in plan if task.run.name == name)
        where = f" (log: {log})" if log.exists() else ""
        print(f"error: {name} failed: {failure}{where}", file=sys.stderr, flush=True)
    if failures:
        print(f"error: {len(failures)} of {len(plan)} runs failed; the same command tries them again", file=sys.stderr)


def _write_results(plan: Sequence[Task], workdir: Path) -> tuple[list[Row], list[str]]:
    """Writes the rows of all finished points, unless that would lose some.

    Returns:
      The rows, and the runs that the file holds rows of and has no new ones for; where there are any, it is left as it is.
    """
    rows = [row for row in (task.finished() for task in plan) if row is not None]
    path = workdir / RESULTS_FILE
    done = {row.run for row in rows}
    missing = [run for run in _runs_in(path) if run not in done]
    if not missing:
        workdirs.write_text(path, "".join(strict_json.dumps(row.json, str(path)) + "\n" for row in rows))
    return rows, missing


# ------------------------------------------------------------------------------------------------------------- small tools


def _log(name: str) -> str:
    return f"{name}.log"


def _say(line: str) -> None:
    print(line, flush=True)


def _spelt(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _within(field: str, groups: Sequence[str]) -> bool:
    return any(field == group or field.startswith(f"{group}.") for group in groups)


def _figures(row: Row) -> str:
    cache = of_row(row)
    held = f" and {cache.constant_bytes:,} constant" if cache.constant_bytes else ""
    return f"loss {row.loss:.4f}, perplexity {math.exp(row.loss):.3f}, cache {cache.bytes_per_token:,} B/token{held}"


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
