"""A sweep: many runs, each in processes of its own, then table, report and plot of all.

Its workdir receives NAME/ (a training workdir with eval.json) and NAME.log for each run, results.jsonl, report.md and
frontier.png. Where evaluation settings change later, a run keeps its eval.json, and its row is in eval-LABEL.json.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence, Set
from functools import partial
from pathlib import Path
from types import FrameType

from mla import paths, strict_json
from mla import workdir as workdirs
from mla.errors import UserError
from mla.evaluation.cache_bytes import of_row
from mla.report import frontier
from mla.report.rows import PLOT_FILE, REPORT_FILE, RESULTS_FILE, Row
from mla.report.tables import text_table
from mla.sweep import executors
from mla.sweep.executors.contract import Ended, Executor, Job
from mla.sweep.tasks import Task, tasks
from mla.training.checkpoint import steps_in


def sweep(
    spec: str,
    workdir: str | os.PathLike[str],
    root: Path | None = paths.CHECKOUT,
    engine: str = "local",
    jobs: int | None = None,
    settings: str = "",
) -> int:
    """Runs what is not finished, then writes the report. An engine that only shows the runs writes nothing.

    Args:
      spec: sweep config, FILE[:VARIANT].
      workdir: folder of the sweep; made if it is not there.
      root: the folder of train.py and eval.py; None: the installed package.
      engine, jobs, settings: where the runs run, how many at once, and how; see `executors.create`.

    Returns:
      0 when every run is finished, or would be; 1 when some failed or were refused (they are listed at the end); 130 after
      Ctrl-C or SIGTERM.

    Raises:
      UserError: a sweep config or a workdir that cannot be used, or results there that would be lost; nothing is touched.
    """
    folder = Path(workdir)
    executor = executors.create(engine, jobs, folder, settings)
    if executor.runs:
        workdirs.require_writable(workdirs.standing(folder) / RESULTS_FILE, "choose another --workdir")
    plan = tasks(spec, folder)
    _require_kept(plan, folder)
    failures = {task.run.name: task.refusal for task in plan if task.refusal}
    say = _say if executor.runs else partial(print, file=sys.stderr)  # there stdout is for the runs alone
    for name, refusal in failures.items():
        say(f"{name}: refused, the others go on: {refusal}")
    if not executor.runs:
        root = root and Path(os.path.relpath(root))
        list(executor.run([task.job(root, environment(folder)) for _, task in _unfinished(plan, say)], _nothing))
        return 1 if failures else 0
    workdirs.make(folder)
    interrupted = False
    try:
        with interruptible():
            _run_all(plan, folder, root, executor, failures)
            while len(more := tasks(spec, folder)) > len(plan):
                known = {task.run.name for task in plan}
                plan = more
                failures |= {task.run.name: task.refusal for task in plan if task.refusal}
                _say(f"{len(plan) - len(known)} more follow from what these gave")
                _run_all(plan, folder, root, executor, failures, known)
    except KeyboardInterrupt:
        interrupted = True
    _finish(plan, folder, failures)
    if interrupted:
        _say("interrupted; the same command goes on from here")
        return 130
    return 1 if failures else 0


def environment(workdir: Path) -> dict[str, str]:
    """Variables that runs get beside this process's own; what is set already stays.

    Huge pages make training on a CPU a quarter faster. The runs of a sweep share compiled programs.
    """
    wanted = {
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
        "JAX_COMPILATION_CACHE_DIR": str((workdir / ".compilation_cache").absolute()),
    }
    return {key: os.environ.get(key, value) for key, value in wanted.items()}


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Inside, SIGTERM is KeyboardInterrupt too: job schedulers send it before they kill."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, interrupt) if main else None
    try:
        yield
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)


def _unfinished(plan: Sequence[Task], say: Callable[[str], None], done: Set[str] = frozenset()) -> list[tuple[str, Task]]:
    """The runs that there is no current row of, each with its number and name; says what is left out and why.

    Nothing is said of runs in `done`, and they are not tried again.
    """
    unfinished = []
    for number, task in enumerate(plan, 1):
        if task.refusal or task.run.name in done:
            continue
        head = f"[{number}/{len(plan)}] {task.run.name}"
        try:
            row = task.row()
        except UserError as error:
            row = None
            say(f"{head}: {error}: does not count")
        if row is None:
            unfinished.append((head, task))
        else:
            say(f"{head}: finished before with the same config, skipped; {_figures(row)}")
    return unfinished


def _run_all(
    plan: Sequence[Task],
    folder: Path,
    root: Path | None,
    executor: Executor,
    failures: dict[str, str],
    tried: Set[str] = frozenset(),
) -> None:
    """Runs what is not finished and not in `tried`, and adds to `failures` what failed."""
    heads, jobs = dict[str, tuple[str, Task]](), dict[str, Job]()
    for head, task in _unfinished(plan, _say, tried):
        name = task.run.name
        try:
            task.make_room()
            heads[name], jobs[name] = (head, task), task.job(root, environment(folder))
        except (UserError, OSError) as error:  # the folder cannot be made, or its disk is full
            failures[name] = str(error)
            _say(f"{head}: FAILED: {error}")

    def started(job: Job) -> None:
        _say(f"{heads[job.name][0]}: running, log in {job.log}")

    start = time.monotonic()
    with contextlib.closing(executor.run(list(jobs.values()), started)) as outcomes:
        for done, ended in enumerate(outcomes, 1):
            left = len(jobs) - done
            eta = f"; ETA {duration((time.monotonic() - start) / done * left)} for {left} more" if left else ""
            head, task = heads[ended.name]
            failure, row = (ended.failure, None) if ended.failure else _outcome(task)
            if row is None:
                failures[ended.name] = failure
                _say(f"{head}: FAILED after {duration(sum(ended.seconds))}: {failure}{eta}")
            else:
                _say(f"{head}: {_times(jobs[ended.name], ended)}; {_figures(row)}{eta}")
                _write_results(plan, folder)


def _outcome(task: Task) -> tuple[str, Row | None]:
    """Why there is no row although both programs ended well, or '', and the row."""
    try:
        row = task.row()
    except UserError as error:
        return str(error), None
    return "" if row else f"eval.py ended well but left no {workdirs.EVAL_FILE} for this config", row


def _require_kept(plan: Sequence[Task], workdir: Path) -> None:
    """Refuses a plan that contradicts what is there, while nothing has been touched.

    Raises:
      UserError: a run was trained with another config, or there are results of a run that the plan does not have.
    """
    for task in plan:
        if task.trained:
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
    same = os.path.realpath(task.folder) == os.path.realpath(task.trained)
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


def _times(job: Job, ended: Ended) -> str:
    """How long each command took."""
    return ", ".join(f"{command.done} in {duration(s)}" for command, s in zip(job.commands, ended.seconds, strict=True))


def _nothing(job: Job) -> None:
    """There is nothing to say of a job that does not start."""


def _say(line: str) -> None:
    print(line, flush=True)


def _figures(row: Row) -> str:
    cache = of_row(row)
    held = f" and {cache.constant_bytes:,} constant" if cache.constant_bytes else ""
    return f"loss {row.loss:.4f}, perplexity {math.exp(row.loss):.3f}, cache {cache.bytes_per_token:,} B/token{held}"


def duration(seconds: float) -> str:
    """Seconds in words."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
