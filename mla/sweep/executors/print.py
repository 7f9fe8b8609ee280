"""Runs of a sweep as lines for a shell or a job scheduler; none is run."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Generator, Sequence

from mla.sweep.executors.contract import Ended, Executor, Job


class Print(Executor):
    """One line a run on stdout: train && eval, with the variables that they should have."""

    has_settings = False
    runs = False

    def run(self, jobs: Sequence[Job], started: Callable[[Job], None]) -> Generator[Ended, None, None]:
        for job in jobs:
            variables = [f"{key}={value}" for key, value in job.variables.items() if os.environ.get(key) != value]
            print(" && ".join(shlex.join(["env", *variables, sys.executable, *step.command]) for step in job.steps))
        yield from ()
