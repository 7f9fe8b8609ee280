"""Runs of a sweep with their places: what would run, what is there already, and whether that is current."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mla import commands
from mla import config as configs
from mla import workdir as workdirs
from mla.config import Config
from mla.errors import UserError
from mla.evaluation.evaluate import label
from mla.report.failures import stopped_at_infinity
from mla.report.rows import Row, from_json
from mla.sweep.executors.contract import Command, Job
from mla.sweep.runs import Evaluation, Run, Training, load_runs, log_of
from mla.training.checkpoint import identity, steps_in

EVAL_GROUPS = ("eval", "mesh")  # config groups that eval.py takes from its own command line
# Fields that change no figure of eval.json: a run that differs in them only is finished all the same.
INDIFFERENT = ("checkpoint", "log", "data.cache_dir")


@dataclasses.dataclass(frozen=True)
class Task:
    """A run with its place and its config, or with the reason why it has none."""

    run: Run
    folder: Path
    config: Config | None
    refusal: str = ""

    @property
    def trained(self) -> str:
        """The folder of the finished run that is evaluated; '' where one is trained."""
        return self.run.trained if isinstance(self.run, Evaluation) else ""

    @property
    def log(self) -> Path:
        return self.folder.with_name(log_of(self.folder.name))

    def overrides(self, groups: Sequence[str] = ()) -> list[str]:
        """Command line arguments, of all config groups or of some. A run is called what its folder is called."""
        fields = {"name": self.run.name} | {key.removeprefix("config."): value for key, value in self.run.overrides.items()}
        return [f"--config.{key}={_spelt(v)}" for key, v in fields.items() if not groups or key.split(".")[0] in groups]

    def _config_there(self) -> Config | None:
        """The config of the run that is in the folder; None where there is none."""
        there = not self.trained and os.path.exists(self.folder / workdirs.CONFIG_FILE)
        return workdirs.read_config(self.folder) if there else None

    def _kept_config(self) -> Config | None:
        """The config in the folder if training leaves it there, because all its steps are done."""
        done = self.config is not None and steps_in(self.folder)[-1:] >= [self.config.steps]
        return self._config_there() if done else None

    @property
    def evaluation(self) -> Path:
        """The file that this run's evaluation is to be in: eval.json, and for other settings than a trained run's own the
        file that eval.py names after them, so that nothing takes the place of the run's own evaluation."""
        return self._evaluation_beside(self._kept_config())

    def _evaluation_beside(self, kept: Config | None) -> Path:
        path = self.folder / workdirs.EVAL_FILE
        if kept is None or self.config is None:
            return path
        differs = label(kept, dataclasses.replace(kept, eval=self.config.eval, mesh=self.config.mesh))
        return path.with_name(f"eval-{differs}.json") if differs else path

    def train_command(self, root: Path | None) -> list[str]:
        assert not isinstance(self.run, Evaluation)
        where = [f"--config={self.run.config}", f"--workdir={self.folder}"]
        return [*program("train", root), *where, *self.overrides()]

    def eval_command(self, root: Path | None) -> list[str]:
        """With the fields of `EVAL_GROUPS` in which the folder's config, if it stays there, is not this run's."""
        arguments, kept = dict.fromkeys(self.overrides(EVAL_GROUPS)), self._kept_config()
        if kept is not None and self.config is not None:
            for field, _, value in workdirs.differences(configs.to_dict(kept), configs.to_dict(self.config)):
                if field.split(".")[0] in EVAL_GROUPS:
                    arguments[f"--config.{field}={_spelt(value)}"] = None
        where = [f"--workdir={self.trained or self.folder}", *arguments, f"--out={self.evaluation}"]
        return [*program("eval", root), *where]

    def job(self, root: Path | None, variables: Mapping[str, str]) -> Job:
        """What an executor runs."""
        programs = [] if self.trained else [Command("trained", tuple(self.train_command(root)), "training")]
        programs.append(Command("evaluated", tuple(self.eval_command(root)), "evaluating"))
        folder = self.folder if self.trained else None  # train.py makes its own
        return Job(self.run.name, tuple(programs), self.log.absolute(), variables, os.getcwd(), folder)

    def row(self) -> Row | None:
        """The row of results.jsonl, if the run is finished with this very config and its evaluation is current.

        Raises:
          UserError: an evaluation is there that no table can be made of; it is to be made again.
        """
        row = self._row(self.evaluation)
        if row is None and not steps_in(self.folder):  # somebody may have deleted the checkpoints of an evaluated run
            row = self._row(self._evaluation_beside(self._config_there()))
        return row

    def _row(self, path: Path) -> Row | None:
        try:
            evaluated = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: is damaged ({error})") from None
        if self.config is None:
            return None
        run = self.run
        named: dict[str, Any] = {"run": run.name, "point": run.point, "family": run.family, "overrides": run.overrides}
        named |= {"trained": self.trained} if self.trained else {}
        named |= {"search": True} if isinstance(run, Training) and run.search else {}
        row = from_json(named | evaluated if isinstance(evaluated, dict) else evaluated, path)
        try:  # as this version reads it: later fields have their defaults, and paths are absolute
            there = configs.to_dict(configs.from_dict(row.json["config"]))
        except (UserError, KeyError, TypeError, ValueError, AttributeError):
            return None
        changed = [field for field, _, _ in workdirs.differences(there, configs.to_dict(self.config))]
        same = all(_within(field, INDIFFERENT) for field in changed)
        return row if same and self._of_newest_checkpoint(row) else None

    def _of_newest_checkpoint(self, row: Row) -> bool:
        """Whether an evaluation is of the parameters that are there now: by what they hold, not by when files were written.

        A row without `checkpoint` is from an earlier version: it counts if it saw as many tokens as the newest checkpoint.
        Where the checkpoints of a run that the sweep trained have been deleted, the tokens that it was to see decide.
        """
        config, run, evaluated = self.config, self.trained or self.folder, row.json.get("checkpoint")
        assert config is not None
        steps = steps_in(run)
        if steps and evaluated is not None and evaluated != identity(run):
            return False
        steps_seen = steps[-1] if self.trained else config.steps
        return row.train_tokens == steps_seen * config.batch_size * config.context

    def finished(self) -> Row | None:
        """`row`, or None where that cannot be used."""
        try:
            return self.row()
        except UserError:
            return None

    def loss(self) -> float | None:
        """Nats a token of a finished run, infinity where training stopped at a number that is not finite; None: unknown."""
        if row := self.finished():
            return row.loss
        return math.inf if not self.trained and stopped_at_infinity(self.log) else None

    def make_room(self) -> None:
        """Makes the folder of an evaluation, and moves what is none out of its way: eval.py replaces nothing else."""
        if self.trained:
            workdirs.make(self.folder)
        path = self.evaluation
        if os.path.lexists(path) and workdirs.read_evaluation(path) is None:
            os.replace(path, path.with_name(f"damaged-{path.name}"))


def program(name: str, root: Path | None) -> list[str]:
    """What Python runs as `mla NAME`.

    Args:
      name: `train` or `eval`.
      root: the folder of the scripts; None: the installed package, whatever the current folder holds.
    """
    return ["-P", "-m", "mla", name] if root is None else [str(root / f"{name}.py")]


def tasks(spec: str, workdir: Path) -> list[Task]:
    """The runs of a sweep config with their configs, as many as it names with what is finished in the workdir.

    What cannot work is found out here, before anything runs.

    Raises:
      UserError: a sweep config or a workdir that cannot be used.
    """
    workdirs.standing(workdir)
    plan: dict[str, Task] = {}
    while True:
        losses = {name: loss for name, task in plan.items() if (loss := task.loss()) is not None}
        runs = {run.name: run for run in load_runs(spec, losses)}
        if lost := next((name for name in plan if name not in runs), None):
            raise UserError(f"--config={spec}: named run {lost!r} and, once others had finished, no longer does")
        before, plan = plan, {name: plan.get(name) or _task(run, workdir) for name, run in runs.items()}
        if len(plan) == len(before):
            return list(plan.values())


def _task(run: Run, workdir: Path) -> Task:
    task = Task(run, workdir / run.name, None)
    try:
        if isinstance(run, Evaluation):
            _require_finished(run)
            config = commands.override(workdirs.read_config(Path(run.trained)), task.overrides(EVAL_GROUPS))
        else:
            config = commands.override(commands.load_config(run.config), task.overrides())
        configs.validate(config)
    except UserError as error:
        return dataclasses.replace(task, refusal=" ".join(str(error).split()))
    return dataclasses.replace(task, config=config)


def _require_finished(run: Evaluation) -> None:
    """Refuses a run that there is nothing of to evaluate, and overrides that would have to be trained."""
    if not steps_in(run.trained):
        raise UserError(f"{run.trained}: holds no checkpoint of a training run; train it first")
    for key in run.overrides:
        if key.split(".")[1] not in EVAL_GROUPS:
            raise UserError(f"{key}: {run.trained} is trained already; only {' and '.join(EVAL_GROUPS)} fields can change")


def _spelt(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _within(field: str, groups: Sequence[str]) -> bool:
    return any(field == group or field.startswith(f"{group}.") for group in groups)
