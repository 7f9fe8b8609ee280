"""What a synthetic task provides: episodes with answers that are scored, and what is known of it beforehand.

Legend: N episodes, T tokens of each.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import ClassVar, NamedTuple

import numpy as np


class Episodes(NamedTuple):
    """Sequences of one length with their answers.

    Attributes:
      tokens: int32 [N, T], what a model reads.
      targets: int32 [N, T], what it is to say after each token; 0 where nothing is asked.
      weights: fp32 [N, T], 1 where the answer counts, 0 elsewhere.
      distances: int32 [N, T], how many tokens back the last one stands that the answer needs; 0 where nothing is asked.
    """

    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    distances: np.ndarray


class Size(NamedTuple):
    """How hard an episode is: its tokens, and how many things it asks to be remembered."""

    tokens: int
    items: int

    def __str__(self) -> str:
        return f"{self.tokens}x{self.items}"


@dataclasses.dataclass(frozen=True)
class Task(abc.ABC):
    """A task with its sizes, which are fields of the subclass.

    Attributes:
      train: sizes of training episodes, a batch of each in turn, in this order.
      test: sizes of evaluation, harder ones behind.
    """

    train: tuple[Size, ...]
    test: tuple[Size, ...]
    name: ClassVar[str]

    @property
    @abc.abstractmethod
    def vocab_size(self) -> int:
        """Ids of tokens and answers: 0 .. vocab_size - 1."""

    @abc.abstractmethod
    def draw(self, size: Size, count: int, seed: int) -> Episodes:
        """So many episodes of a size; the same for the same seed, 0 to 2^32 - 1."""

    @abc.abstractmethod
    def check(self) -> None:
        """Raises UserError for sizes that the task cannot have, in one line."""

    @abc.abstractmethod
    def floor_bytes(self, size: Size) -> float:
        """Bytes below which no memory of an episode can answer everything."""

    @abc.abstractmethod
    def chance(self, size: Size) -> float:
        """Accuracy of a guess among all answers that an episode may ask for."""
