"""What an executor of a sweep must provide: it takes jobs, which are commands, and says how each ended."""

from __future__ import annotations

import abc
import dataclasses
import os
import secrets
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from mla import paths
from mla.claims import JOB_VARIABLE, claim
from mla.errors import UserError
from mla.sweep.executors.process import StopRequest, run


class Command(NamedTuple):
    """A program of a job.

    Attributes:
      done: what is said when it has ended well, such as `trained`.
      arguments: what follows `python` on the command line.
      doing: what is said while it runs, such as `training`.
    """

    done: str
    arguments: tuple[str, ...]
    doing: str = "running"


@dataclasses.dataclass(frozen=True)
class Job:
    """A run of a sweep as commands, so that it can be sent to another process or machine.

    Attributes:
      name: of the run.
      commands: one after the other; one that fails is the last.
      log: the file, absolute, that receives their output.
      variables: added to their environment.
      cwd: the folder they run in.
      folder: must be there before the first command, which does not make it; None: there is none such.
      token: random; another try of the job has the same, and waits for what is left of an earlier one.
    """

    name: str
    commands: tuple[Command, ...]
    log: Path
    variables: Mapping[str, str]
    cwd: str
    folder: Path | None = None
    token: str = dataclasses.field(default_factory=lambda: secrets.token_hex(8))


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a job ended: why it failed, or '', and the seconds that each of its commands took."""

    name: str
    failure: str
    seconds: tuple[float, ...] = ()


def carry_out(job: Job, stop: StopRequest | None = None) -> Ended:
    """Runs a job's commands in child processes of this one, unless another process does so already.

    Where that is an earlier try of the same job, whose worker or node was given up while it lives on, its end is waited for.
    """
    seconds: list[float] = []
    variables = {**job.variables, JOB_VARIABLE: job.token}
    try:
        with claim(claim_of(job.log), "starting", job.token) as held:
            for command in job.commands:
                held.say(command.doing)
                start = time.monotonic()
                try:
                    failure = run(command.arguments, job.log, variables, job.cwd, stop)
                except OSError as error:  # the folder has been changed meanwhile, or its disk is full
                    failure = str(error)
                seconds.append(time.monotonic() - start)
                if failure:
                    return Ended(job.name, failure, tuple(seconds))
    except UserError as error:
        return Ended(job.name, f"is run elsewhere: {error}", tuple(seconds))
    except OSError as error:
        return Ended(job.name, str(error), tuple(seconds))
    return Ended(job.name, "", tuple(seconds))


def claim_of(log: Path) -> Path:
    """The file by which a process says that it runs the job with this log."""
    return log.with_name(f".{log.stem}.claim")


class Executor(abc.ABC):
    """Where the jobs of a sweep run.

    Args:
      jobs: how many at once; None: what suits the executor.
      folder: of the sweep, for files that an executor keeps.
      settings: of the executor, as `--engine_settings` has them.

    Attributes:
      runs: whether it runs jobs; one that does not only shows them.
      has_settings: whether there are any.

    Raises:
      UserError: settings that it does not have, or a number of jobs where none run.
    """

    runs: ClassVar[bool] = True
    has_settings: ClassVar[bool] = True

    def __init__(self, jobs: int | None, folder: Path, settings: Mapping[str, Any]):
        self.jobs, self.folder, self.settings = jobs, folder, settings
        if settings and not self.has_settings:
            raise UserError(f"--engine_settings: {next(iter(settings))!r}: this engine has no settings; leave it out")
        if jobs is not None and not self.runs:
            raise UserError("--jobs has no effect where nothing runs; leave it out")

    @abc.abstractmethod
    def run(self, jobs: Sequence[Job], started: Callable[[Job], None]) -> Generator[Ended, None, None]:
        """Runs jobs and yields how each ended, as it does. A job that fails stops no other.

        An exception at a `yield`, such as KeyboardInterrupt or the end of the iteration, stops those that run.

        Args:
          jobs: in the order in which they are to start.
          started: called with each job that is about to start, in this thread.
        """


def be_importable() -> dict[str, str]:
    """Has other processes find this package, as jobs name a function of it: those that inherit the environment of this one.

    Returns:
      The variables that processes need which do not inherit it.
    """
    if paths.CHECKOUT is not None:
        before = os.environ.get("PYTHONPATH", "")
        if str(paths.CHECKOUT) not in before.split(os.pathsep):
            os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(paths.CHECKOUT), before]))
    return {"PYTHONPATH": os.environ["PYTHONPATH"]} if os.environ.get("PYTHONPATH") else {}
