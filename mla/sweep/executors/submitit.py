"""Runs of a sweep as jobs of Slurm, or of processes that behave alike where there is none, by the package submitit."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError, UncompletedJobError

from mla.errors import UserError
from mla.sweep.executors.contract import Ended, Executor, Job, be_importable, carry_out
from mla.sweep.executors.process import StopRequest

POLL_SECONDS = 1.0
SQUEUE_SECONDS = 10.0  # between questions to Slurm
LONGEST_MINUTES = 24 * 60  # of a job, unless timeout_min is set: submitit's own default is 5
FORGOTTEN = "unknown"  # a job that ended a while ago
# States of Slurm that a job does not leave by itself; one that it queues again is pending.
ENDED_STATES = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED"),
    *("NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT"),
    FORGOTTEN,
}


class Resumable:
    """A job as submitit runs it; one that is preempted or out of time is queued again, and its commands resume."""

    def __init__(self, job: Job):
        self.job = job

    def __call__(self) -> Ended:
        """Runs the job. Where Slurm takes it away, with SIGTERM to this process and its child, that is no end of the job:
        no result is left, since Slurm may be about to queue it again."""
        stop = StopRequest()
        main = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGTERM, lambda *_: stop.asked.set()) if main else None
        try:
            ended = carry_out(self.job, stop)
        finally:
            if main:
                signal.signal(signal.SIGTERM, before)
        if ended.failure and stop.asked.is_set():
            sys.exit(128 + signal.SIGTERM)
        return ended

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
        # Also where the cluster's own default is not to queue a job again whose node has failed.
        chosen = {"slurm_additional_parameters": {"requeue": True}} | chosen
        try:
            queue = submitit.AutoExecutor(folder=folder, cluster=chosen.pop("cluster", None))
            queue.update_parameters(**chosen)
        except (NameError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"--engine_settings: submitit: {' '.join(str(error).split())}") from error
        return queue

    def run(self, jobs: Sequence[Job], started: Callable[[Job], None]) -> Generator[Ended, None, None]:
        be_importable()
        queue, waiting, running = self._queue(self.folder / ".submitit"), list(reversed(jobs)), dict[Any, Job]()
        slurm = _Slurm()
        try:
            while waiting or running:
                while waiting and len(running) < (self.jobs or len(jobs)):
                    job = waiting.pop()
                    started(job)
                    try:
                        running[queue.submit(Resumable(job))] = job
                    except (FailedJobError, FailedSubmissionError) as error:  # Slurm refuses it, or does not answer
                        yield Ended(job.name, f"was not queued: {' '.join(str(error).split())}")
                for submitted in list(running):
                    if isinstance(submitted, submitit.SlurmJob) and not _has_result(submitted):
                        state = slurm.ended_as(submitted.job_id)
                        if state and not _has_result(submitted):  # it may have left one meanwhile
                            yield Ended(running.pop(submitted).name, _without_result(submitted, state))
                    elif submitted.done():
                        outcome = _outcome(submitted, running.pop(submitted))
                        _withdraw(submitted)
                        yield outcome
                if running:
                    time.sleep(POLL_SECONDS)
        finally:
            for submitted in running:
                submitted.cancel(check=False)


class _Slurm:
    """What Slurm's controller says of this user's jobs, asked now and then.

    The controller and not the accounting, which submitit asks: a cluster may have none, and it calls a job finished whose
    node has failed, while that waits to be run again.
    """

    def __init__(self) -> None:
        self._asked = -SQUEUE_SECONDS
        self._states: dict[str, list[str]] = {}  # job id -> the newest two since it was first asked about

    def ended_as(self, job: str) -> str:
        """The state in which a job has ended, where two answers in a row say that it has, or ''."""
        self._states.setdefault(job, [])
        if time.monotonic() >= self._asked + SQUEUE_SECONDS:
            self._asked = time.monotonic()
            self._ask()
        states = self._states[job]
        return states[-1] if len(states) == 2 and ENDED_STATES.issuperset(states) else ""

    def _ask(self) -> None:
        command = ["squeue", f"--user={os.getuid()}", "--states=all", "--noheader", "--format=%i %T"]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
        except (OSError, subprocess.SubprocessError):  # it is away for now
            return
        states = dict(line.split(maxsplit=1) for line in answer.splitlines())
        for job, newest in self._states.items():
            newest[:] = [*newest[-1:], states.get(job, FORGOTTEN)]


def _has_result(submitted: submitit.SlurmJob[Ended]) -> bool:
    folder = submitted.paths.folder
    with contextlib.suppress(OSError):  # has a network's file system look again
        folder.chmod(folder.stat().st_mode)
    return bool(submitted.paths.result_pickle.exists())


def _withdraw(submitted: Any) -> None:
    """Has Slurm not start a job that has a result: it may live on beyond its node, and end when it is queued again."""
    if isinstance(submitted, submitit.SlurmJob):
        command = ["scancel", "--quiet", "--state=PENDING", submitted.job_id]
        subprocess.run(command, stderr=subprocess.DEVNULL, check=False)


def _without_result(submitted: submitit.SlurmJob[Ended], state: str) -> str:
    return f"job {submitted.job_id} did not finish: Slurm calls it {state}; see {submitted.paths.stderr}"


def _outcome(submitted: Any, job: Job) -> Ended:
    """What a job of submitit returned; a failure where it was cancelled or killed, or its machine went away."""
    try:
        ended: Ended = submitted.result()
    except UncompletedJobError as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        return Ended(job.name, f"job {submitted.job_id} did not finish: {lines[0] if lines else 'no reason given'}")
    return ended
