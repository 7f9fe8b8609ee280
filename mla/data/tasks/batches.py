"""Batches of a task to train on: episodes that nobody has seen, drawn as they are needed. Legend: B sequences, T tokens."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from mla.data.batch import Batch
from mla.data.tasks.contract import Episodes, Size, Task
from mla.errors import UserError

HALF = 2**31  # seeds below are of training, from it on of tests


def seed_of(*words: object, test: bool = False) -> int:
    """A seed that no other words have, but for chance; of tests never one of training."""
    drawn = int.from_bytes(hashlib.sha256(" ".join(map(str, words)).encode()).digest()[:4], "big") % HALF
    return drawn + HALF * test


def episodes_of_test(task: Task, size: Size, count: int) -> Episodes:
    """Those that a task is tested on, the same for every run."""
    return task.draw(size, count, seed_of(task.name, size, test=True))


class TaskBatches:
    """An endless iterator over batches, of each size of the task in turn; resumed bit-equal by `get_state` and `set_state`.

    Episodes shorter than the context are filled up behind with what nothing is asked of.

    Args:
        task: what is drawn from.
        context: T.
        batch_size: B.
        seed: of the data order; any integer.

    Raises:
        UserError: a training size does not fit the context.
    """

    def __init__(self, task: Task, context: int, batch_size: int, seed: int):
        longest = max(size.tokens for size in task.train)
        if longest > context:
            said = f"{context} is less than the {longest} tokens of {task.name}"
            raise UserError(f"config.context: {said}; set it to {longest}")
        self._task, self._context, self._batch, self._seed, self._taken = task, context, batch_size, seed, 0

    def __iter__(self) -> TaskBatches:
        return self

    def __next__(self) -> Batch:
        size = self._task.train[self._taken % len(self._task.train)]
        drawn = self._task.draw(size, self._batch, seed_of(self._seed, self._taken))
        self._taken += 1
        short = ((0, 0), (0, self._context - size.tokens))
        return Batch(*(np.pad(part, short) for part in (drawn.tokens, drawn.targets, drawn.weights)))

    def get_state(self) -> dict[str, Any]:
        """How many batches were taken."""
        return {"taken": self._taken}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on after so many batches."""
        self._taken = int(state["taken"])
