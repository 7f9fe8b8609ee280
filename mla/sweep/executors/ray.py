"""Runs of a sweep as tasks of Ray: on the cluster that RAY_ADDRESS names, or on this machine."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray

from mla.errors import UserError
from mla.sweep.executors.contract import Ended, Executor, Job, be_importable, carry_out
from mla.sweep.executors.process import GRACE_SECONDS


class Ray(Executor):
    """A task a run. Settings: those of ray.remote, such as num_gpus, num_cpus, max_retries."""

    def __init__(self, jobs: int | None, folder: Path, settings: Mapping[str, Any]):
        super().__init__(jobs, folder, settings)
        try:
            self.task = ray.remote(**settings)(carry_out) if settings else ray.remote(carry_out)
        except (TypeError, ValueError) as error:
            raise UserError(f"--engine_settings: ray: {' '.join(str(error).split())}") from error

    def run(self, jobs: Sequence[Job], started: Callable[[Job], None]) -> Generator[Ended, None, None]:
        ray.init(ignore_reinit_error=True, log_to_driver=False, runtime_env={"env_vars": be_importable()})
        waiting, running = list(reversed(jobs)), dict[Any, Job]()
        try:
            while waiting or running:
                while waiting and len(running) < (self.jobs or len(jobs)):
                    job = waiting.pop()
                    started(job)
                    running[self.task.remote(job)] = job
                (done, *_), _ = ray.wait(list(running), num_returns=1)
                job = running.pop(done)
                try:
                    yield ray.get(done)
                except ray.exceptions.RayError as error:  # a worker that was killed, a machine that went away
                    yield Ended(job.name, f"its task did not finish: {' '.join(str(error).split())}")
        finally:
            try:
                for reference in running:
                    ray.cancel(reference)  # a KeyboardInterrupt in its worker, whose child then saves its checkpoint
                if running:
                    ray.wait(list(running), num_returns=len(running), timeout=GRACE_SECONDS + 10)
            finally:
                ray.shutdown()
