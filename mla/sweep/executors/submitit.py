"""Runs of a sweep as jobs of Slurm, or of processes that behave alike where there is none, by the package submitit."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError, UncompletedJobError

from mla.errors import UserError
from mla.sweep.executors.contract import Ended, Executor, Job, be_importable, carry_out

POLL_SECONDS = 1.0
LONGEST_MINUTES = 24 * 60  # of a job, unless timeout_min is set: submitit's own default is 5


class Resumable:
    """A job as submitit runs it; one that is preempted or out of time is queued again, and its commands resume."""

    def __init__(self, job: Job):
        self.job = job

    def __call__(self) -> Ended:
        return carry_out(self.job)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """What submitit queues in place of a job that is stopped."""
        return submitit.helpers.DelayedSubmission(Resumable(self.job))


class Submitit(Executor):
    """A job a run. Settings: `cluster` (slurm, local, debug; by default Slurm where there is one) and submitit's parameters,
    such as timeout_min, gpus_per_node, slurm_partition. What it keeps lies in the sweep's folder, in .submitit/."""

    def __init__(self, jobs: int | None, folder: Path, settings: Mapping[str, Any]):
        super().__init__(jobs, folder, settings)
        with tempfile.TemporaryDirectory() as elsewhere:  # it makes its folder, and a sweep may still be refused
            self._queue(Path(elsewhere))

    def _queue(self, folder: Path) -> submitit.AutoExecutor:
        chosen: dict[str, Any] = {"timeout_min": LONGEST_MINUTES, "name": "mla"} | dict(self.settings)
        try:
            queue = submitit.AutoExecutor(folder=folder, cluster=chosen.pop("cluster", None))
            queue.update_parameters(**chosen)
        except (NameError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"--engine_settings: submitit: {' '.join(str(error).split())}") from error
        return queue

    def run(self, jobs: Sequence[Job], started: Callable[[Job], None]) -> Generator[Ended, None, None]:
        be_importable()
        queue, waiting, running = self._queue(self.folder / ".submitit"), list(reversed(jobs)), dict[Any, Job]()
        try:
            while waiting or running:
                while waiting and len(running) < (self.jobs or len(jobs)):
                    job = waiting.pop()
                    started(job)
                    try:
                        running[queue.submit(Resumable(job))] = job
                    except (FailedJobError, FailedSubmissionError) as error:  # Slurm refuses it, or does not answer
                        yield Ended(job.name, f"was not queued: {' '.join(str(error).split())}")
                for submitted in [submitted for submitted in running if submitted.done()]:
                    yield _outcome(submitted, running.pop(submitted))
                if running:
                    time.sleep(POLL_SECONDS)
        finally:
            for submitted in running:
                submitted.cancel(check=False)


def _outcome(submitted: Any, job: Job) -> Ended:
    """What a job of submitit returned; a failure where it was cancelled or killed, or its machine went away."""
    try:
        ended: Ended = submitted.result()
    except UncompletedJobError as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        return Ended(job.name, f"job {submitted.job_id} did not finish: {lines[0] if lines else 'no reason given'}")
    return ended
