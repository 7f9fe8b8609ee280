"""What a sweep has done, what it is doing where, and how long that will take: read off its folder, on any machine."""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from mla import claims
from mla.errors import UserError
from mla.report.layout import aligned
from mla.sweep.executors.contract import claim_of
from mla.sweep.loop import duration
from mla.sweep.tasks import Task, tasks
from mla.training.checkpoint import steps_in
from mla.training.logs import read_metrics


class Standing(NamedTuple):
    """Of one run.

    Attributes:
      state: finished, refused, training, evaluating, trained, stopped or waiting.
      step, steps: of training; None where nothing is trained, or nothing is known.
      left: seconds of training still to come at the newest rate; None: not known.
      took: seconds of training of a finished run; None: not known.
      by: who works on it; None: nobody.
      figure: the loss of a finished run, or why one is refused.
    """

    name: str
    state: str
    step: int | None = None
    steps: int | None = None
    left: float | None = None
    took: float | None = None
    by: claims.Holder | None = None
    figure: str = ""


def status(spec: str, workdir: str) -> int:
    """Prints how each run of a sweep stands; writes nothing. 0, also where runs have failed.

    Raises:
      UserError: a sweep config or a workdir that cannot be used.
    """
    found = standings(tasks(spec, Path(workdir)))
    for line in lines(found):
        print(line)
    return 0


def standings(plan: Sequence[Task]) -> list[Standing]:
    """How the runs stand. Takes a while where a process on another host may have gone (`claims.lives`)."""

    def holder(task: Task) -> claims.Holder | None:
        path = claim_of(task.log)
        held = claims.read(path)
        return held if held is not None and claims.lives(path, held) else None

    with ThreadPoolExecutor(max(1, min(64, len(plan)))) as threads:
        holders = list(threads.map(holder, plan))
    return [_standing(task, by) for task, by in zip(plan, holders, strict=True)]


def _standing(task: Task, by: claims.Holder | None) -> Standing:
    name, config = task.run.name, task.config
    if task.refusal or config is None:
        return Standing(name, "refused", figure=task.refusal)
    try:
        logged = read_metrics(task.folder)[-1:]
    except (UserError, OSError):
        logged = []
    row = task.finished()
    if row is not None and by is None:
        took = logged[0].get("elapsed_seconds") if logged else None
        return Standing(name, "finished", took=took, figure=f"loss {row.loss:.4f}")
    if task.trained:
        return Standing(name, by.doing if by else "waiting", by=by)
    saved = steps_in(task.folder)[-1:] or [0]
    step = max(logged[0]["step"] if logged and by else 0, saved[0])
    left = None
    if by is not None and logged and by.doing == "training":
        rate = logged[0].get("tokens_per_second") or 0
        left = (config.steps - step) * config.batch_size * config.context / rate if rate else None
    state = by.doing if by else "waiting" if not step else "trained" if step >= config.steps else "stopped"
    return Standing(name, state, step, config.steps, left, by=by)


def lines(found: Sequence[Standing]) -> list[str]:
    """A table, a line a run, and a line that sums up."""
    rows = [("run", "state", "step", "since", "training left", "")]
    for one in found:
        step = "" if one.step is None else f"{one.step:,}/{one.steps:,}"
        since, where = "", one.figure
        if one.by is not None:
            began = datetime.datetime.fromisoformat(one.by.since)
            since = began.astimezone().strftime("%Y-%m-%d %H:%M:%S")
            where = f"{one.by.host}, process {one.by.process}"
        rows.append((one.name, one.state, step, since, "" if one.left is None else duration(one.left), where))
    counts = Counter(one.state for one in found)
    said = ", ".join(f"{count} {state}" for state, count in counts.items())
    left = remaining(found)
    eta = "" if left is None else f"; training to come: {duration(left)}"
    return [*aligned(rows).splitlines(), f"{len(found)} runs: {said}{eta}"]


def remaining(found: Sequence[Standing]) -> float | None:
    """Seconds until all is trained, if as many go on at once and those that wait take as long as finished ones did.

    None: nothing is left, or nothing says how long.
    """
    working = [one for one in found if one.by is not None]
    before = [one.took for one in found if one.took]
    waiting = sum(one.state in ("waiting", "stopped") for one in found)
    known = [one.left for one in working if one.left is not None]
    if not (known or waiting) or (waiting and not before):
        return None
    return (sum(known) + waiting * (sum(before) / len(before) if before else 0)) / max(1, len(working))
