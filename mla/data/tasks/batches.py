"""Batches of a task to train on: episodes that nobody has seen, drawn as they are needed. Legend: B sequences, T tokens."""

from __future__ import annotations

from typing import Any

import numpy as np

from mla.data.batch import Batch
from mla.data.tasks.contract import SEEDS
from mla.data.tasks.mixture import Mixture
from mla.errors import UserError


class TaskBatches:
    """An endless iterator over batches, each of one level of a mixture; resumed bit-equal by `get_state` and `set_state`.

    Levels come in their order, each as many steps as its share says, and again. Episodes shorter than the context are filled
    up behind with what nothing is asked of.

    Args:
      mixture: what is drawn from.
      context: T.
      batch_size: B.
      seed: of the data order, from 0 up.

    Raises:
      UserError: a level does not fit the context.
    """

    def __init__(self, mixture: Mixture, context: int, batch_size: int, seed: int):
        if mixture.length > context:
            said = f"{context} is less than the {mixture.length} tokens of config.data.corpus"
            raise UserError(f"config.context: {said}; set it to {mixture.length}")
        self._mixture, self._context, self._batch, self._seed, self._taken = mixture, context, batch_size, seed % SEEDS, 0
        self._round = sum(level.share for level in mixture.levels)  # steps

    def __iter__(self) -> TaskBatches:
        return self

    def __next__(self) -> Batch:
        drawn = self._mixture.draw(self._batch, self._seed, self._taken, self._round)
        self._taken += 1
        short = ((0, 0), (0, self._context - drawn.tokens.shape[1]))
        return Batch(*(np.pad(part, short) for part in (drawn.tokens, drawn.targets, drawn.weights)))

    def get_state(self) -> dict[str, Any]:
        """How many batches were taken."""
        return {"taken": self._taken}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on after so many batches."""
        self._taken = int(state["taken"])
