"""Runs of a sweep as tasks of Ray: on the cluster that RAY_ADDRESS names, or on this machine."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

import ray

from mla.sweep.executors.contract import Ended, Executor, Job, be_importable, carry_out


class Ray(Executor):
    """A task a run. Settings: those of ray.remote, such as num_gpus, num_cpus, max_retries."""

    def run(self, jobs: Sequence[Job], started: Callable[[Job], None]) -> Generator[Ended, None, None]:
        be_importable()
        ray.init(ignore_reinit_error=True, log_to_driver=False)
        task = ray.remote(**self.settings)(carry_out) if self.settings else ray.remote(carry_out)
        waiting, running = list(reversed(jobs)), dict[Any, Job]()
        try:
            while waiting or running:
                while waiting and len(running) < (self.jobs or len(jobs)):
                    job = waiting.pop()
                    started(job)
                    running[task.remote(job)] = job
                (done, *_), _ = ray.wait(list(running), num_returns=1)
                job = running.pop(done)
                try:
                    yield ray.get(done)
                except ray.exceptions.RayError as error:  # a worker that was killed, a machine that went away
                    yield Ended(job.name, f"its task did not finish: {' '.join(str(error).split())}")
        finally:
            for reference in running:
                ray.cancel(reference)
            ray.shutdown()
