"""Runs of a sweep as child processes of this one, some at a time."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Generator, Sequence

from mla.sweep.executors.contract import Ended, Executor, Job, carry_out
from mla.sweep.executors.process import StopRequest


class Local(Executor):
    """Child processes, one at a time unless `--jobs` says more; they then share the cores, each with some of its own."""

    has_settings = False

    def run(self, jobs: Sequence[Job], started: Callable[[Job], None]) -> Generator[Ended, None, None]:
        stop, threads = StopRequest(), list[threading.Thread]()
        ended: queue.SimpleQueue[tuple[Sequence[int], Ended | BaseException]] = queue.SimpleQueue()
        waiting, free = list(reversed(jobs)), shares(min(self.jobs or 1, len(jobs)))

        def work(job: Job, cores: Sequence[int]) -> None:
            try:
                _stay_on(cores)
                ended.put((cores, carry_out(job, stop)))
            except BaseException as error:
                ended.put((cores, error))

        try:
            for _ in jobs:
                while waiting and free:
                    job = waiting.pop()
                    started(job)
                    threads.append(threading.Thread(target=work, args=(job, free.pop(0))))
                    threads[-1].start()
                cores, outcome = ended.get()
                free.append(cores)
                if isinstance(outcome, BaseException):
                    raise outcome
                yield outcome
        finally:
            stop.asked.set()
            try:
                _join(threads)
            except KeyboardInterrupt:  # a second one
                stop.at_once.set()
                _join(threads)
                raise


def _join(threads: Sequence[threading.Thread]) -> None:
    for thread in threads:
        thread.join()


def shares(jobs: int) -> list[Sequence[int]]:
    """The cores of each of so many jobs: neighbours, as evenly as it goes, one core for several jobs where there are fewer.

    Empty for a single job, which has them all, and where the system cannot say.
    """
    if jobs == 1 or not hasattr(os, "sched_getaffinity"):
        return [()] * jobs
    cores = sorted(os.sched_getaffinity(0))
    return [cores[i * len(cores) // jobs : (i + 1) * len(cores) // jobs] or [cores[i % len(cores)]] for i in range(jobs)]


def _stay_on(cores: Sequence[int]) -> None:
    """Keeps this thread, and the processes that it starts, on some cores: XLA takes as many threads as it may use."""
    if cores:
        os.sched_setaffinity(0, cores)
