"""Runs of a sweep as lines for a shell or a job scheduler; none is run."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Generator, Sequence

from mla.sweep.executors.contract import Ended, Executor, Job


class Print(Executor):
    """One line a run on stdout: train && eval, with the variables that they should have and the folder that eval needs."""

    has_settings = False
    runs = False

    def run(self, jobs: Sequence[Job], started: Callable[[Job], None]) -> Generator[Ended, None, None]:
        for job in jobs:
            variables = [f"{key}={value}" for key, value in job.variables.items() if os.environ.get(key) != value]
            lines = [["env", *variables, sys.executable, *command.arguments] for command in job.commands]
            lines[:0] = [["mkdir", "-p", str(job.folder)]] if job.folder else []
            print(" && ".join(map(shlex.join, lines)))
        yield from ()
