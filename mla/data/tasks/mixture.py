"""Several difficulties of one task, one after the other."""

from __future__ import annotations

import dataclasses

from mla.data.tasks.contract import Episodes, SplitName, Task


@dataclasses.dataclass(frozen=True)
class Level:
    """One difficulty.

    Attributes:
      task: with its sizes.
      share: of the episodes, in relation to those of the other levels.
    """

    task: Task
    share: int = 1


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Difficulties in the order in which they are trained on, the short ones first as a rule.

    Attributes:
      levels: at least one, all of one task.
    """

    levels: tuple[Level, ...]

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The task at each difficulty."""
        return tuple(level.task for level in self.levels)

    @property
    def vocab_size(self) -> int:
        """Ids that a model of all levels needs; an id means the same in each."""
        return max(task.vocab_size for task in self.tasks)

    @property
    def length(self) -> int:
        """T of the longest level."""
        return max(task.length for task in self.tasks)

    def at(self, step: int, steps: int, rounds: int = 1) -> Task:
        """The task of a training step.

        Args:
          step: from 0.
          steps: of the whole training; beyond them it starts again.
          rounds: how often all levels are gone through, each for its share of a round, in order and without shuffling;
            the epochs of Zoology's recipe.
        """
        total = sum(level.share for level in self.levels)
        reached, end = step * rounds % steps * total, 0
        for level in self.levels:
            end += level.share * steps
            if reached < end:
                return level.task
        raise AssertionError("shares do not add up")

    def draw(self, batch: int, seed: int, step: int, steps: int, rounds: int = 1, split: SplitName = "train") -> Episodes:
        """The episodes of a training step, which depend on nothing but these arguments: no episode comes twice."""
        return self.at(step, steps, rounds).draw(batch, seed, start=step * batch, split=split)
