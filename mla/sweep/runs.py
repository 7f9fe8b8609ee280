"""The runs of a sweep, as a sweep config names them: what a config file writes, and how it is read.

A sweep config is a Python file with `get_runs(variant="")`, which yields `Training`s and `Evaluation`s, or plain tuples
(name, config file, overrides, family[, workdir of a finished run]).

Where later runs depend on what earlier ones gave, it is `get_runs(variant="", losses={})`: `losses` has the loss of each run
that is finished, by its name, and infinity where training stopped at a number that is not finite. It is asked again when all
that it named has ended, and names what it named before and what follows, until nothing does.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mla import commands, paths
from mla.errors import UserError, nearest
from mla.report.rows import PAGE_FILE, PLOT_FILE, RATES_FILE, REPORT_FILE, RESULTS_FILE

MOST_SEEDS = 10_000  # of one point
MOST_NAME_BYTES = 255  # of a file, everywhere


@dataclasses.dataclass(frozen=True)
class Training:
    """A run that is trained and evaluated.

    Attributes:
      point: what tables and plots call it, with all its seeds; unique in its family.
      config: FILE:VARIANT as train.py takes it.
      overrides: 'config.path.to.field' -> value.
      family: the line of the plot it is on.
      seed: which of several seeds of the point; None: the only one, which the config names.
      search: whether it only finds a setting, such as a learning rate: in no table or picture beside the runs that use it.
    """

    point: str
    config: str
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
    family: str = ""
    seed: int | None = None
    search: bool = False

    @property
    def name(self) -> str:
        """The name of its folder, unique in the sweep."""
        return self.point if self.seed is None else f"{self.point}-s{self.seed}"


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A finished run that is evaluated with settings that are not its own; nothing is trained.

    Attributes:
      point: what tables and plots call it, and the name of its folder, unique.
      trained: workdir of the finished run.
      overrides: 'config.path.to.field' -> value, of the config groups that eval.py takes.
      family: the line of the plot it is on.
    """

    point: str
    trained: str
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
    family: str = ""

    @property
    def name(self) -> str:
        """The name of its folder, unique in the sweep."""
        return self.point


Run = Training | Evaluation


# ---------------------------------------------------------------------------------------------------- writing a sweep config


def settings(variant: str, **defaults: Any) -> dict[str, Any]:
    """The settings in a sweep config's variant, such as `all,base=small,seeds=3`, over their defaults and of their types.

    A truth value needs no `=`: naming it switches it on.

    Raises:
      UserError: an unknown setting, with the nearest match, one that is given twice, or a value of the wrong type.
    """
    chosen, given = dict(defaults), set[str]()
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
            chosen[key] = value != "false"
            continue
        try:
            chosen[key] = type(defaults[key])(value)
        except ValueError:
            raise UserError(f"sweep variant {variant!r}: {key}={value!r} is no {type(defaults[key]).__name__}") from None
    return chosen


def with_seeds(runs: Iterable[Training], count: int) -> Iterator[Training]:
    """Each run with seeds 0 to count-1; a single seed is left as the base config has it."""
    if count < 1:
        raise UserError(f"sweep variant: seeds={count} is not a positive number")
    if count > MOST_SEEDS:
        raise UserError(f"sweep variant: seeds={count} is more than {MOST_SEEDS}")
    for run in runs:
        for seed in range(count) if count > 1 else ():
            yield dataclasses.replace(run, seed=seed, overrides={**run.overrides, "config.seed": seed})
        if count == 1:
            yield run


# ---------------------------------------------------------------------------------------------------- reading a sweep config


def load_runs(spec: str, losses: Mapping[str, float] | None = None) -> list[Run]:
    """The runs of a sweep config, FILE[:VARIANT].

    Args:
      spec: the sweep config.
      losses: what its runs gave so far, see the top of this file; nothing by default.

    Raises:
      UserError: no such file, a file that fails, no runs in it, something that is no run, or a name given twice.
    """
    path, _, variant = spec.partition(":")
    get_runs = getattr(commands.load_module(path), "get_runs", None)
    if not callable(get_runs):
        raise UserError(f"--config={path}: defines no get_runs(variant); is it the config of a single run?")
    more = {"losses": losses or {}} if "losses" in inspect.signature(get_runs).parameters else {}
    try:
        runs = [_checked(_run(item, path), path) for item in get_runs(variant, **more)]
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
    logs = {Path(log_of(name)).name: name for name in names}
    taken = next((name for name in names if name in logs), None)
    if taken is not None:
        raise UserError(f"--config={spec}: a run is named {taken!r}, which is the log of run {logs[taken]!r}")
    return runs


def log_of(name: str) -> str:
    """The file with the output of a run: beside its folder, which must hold the files of a training workdir alone."""
    return f"{name}.log"


def _run(item: Any, path: str) -> Run:
    """What a sweep config yielded, as a run: tuples are read by their places."""
    if isinstance(item, Training | Evaluation):
        return item
    shown = f"--config={path}: {item!r} is no Training, Evaluation or (name, config file, overrides, family)"
    if not isinstance(item, tuple) or not 2 <= len(item) <= 5:
        raise UserError(shown)
    parts: list[Any] = [*item, *list[Any](({}, "", ""))[len(item) - 2 :]]
    name, config, overrides, family, trained = parts
    if not (isinstance(name, str) and isinstance(config, str) and isinstance(overrides, dict)):
        raise UserError(shown)
    if trained:
        return Evaluation(name, str(trained), overrides, family)
    seed = overrides.get("config.seed")
    if seed is not None and name.endswith(f"-s{seed}"):
        return Training(name.removesuffix(f"-s{seed}"), config, overrides, family, seed)
    return Training(name, config, overrides, family)


def _checked(run: Run, path: str) -> Run:
    """The run with `~` expanded. Raises UserError where a folder or file cannot be named so, or an override has no group."""
    if not re.fullmatch(r"[\w.=+-]+", run.name) or run.name.startswith("."):
        raise UserError(f"--config={path}: {run.name!r} is no name for a folder; use letters, digits and . _ = + -")
    if run.name in (RESULTS_FILE, REPORT_FILE, PLOT_FILE, PAGE_FILE, RATES_FILE):
        raise UserError(f"--config={path}: {run.name!r} is a file of the sweep itself; give the run another name")
    if len(os.fsencode(log_of(run.name))) > MOST_NAME_BYTES:
        raise UserError(f"--config={path}: {run.name[:20]!r}... is too long a name for a folder and its log")
    wrong = next((key for key in run.overrides if not str(key).startswith("config.")), None)
    if wrong is not None:
        raise UserError(f"--config={path}: run {run.name!r} overrides {wrong!r}; write 'config.{wrong}'")
    if isinstance(run, Training):
        return run
    return dataclasses.replace(run, trained=paths.expand(run.trained, f"--config={path}: run {run.name!r}"))
