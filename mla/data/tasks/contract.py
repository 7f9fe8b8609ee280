"""What a synthetic task provides: episodes, what a reader can know of them, and what they cost to remember.

A task is a frozen dataclass whose fields are its sizes, so that one object is one difficulty; several of them are a
`mla.data.tasks.mixture.Mixture`. Adding a task is one file with a `Task` and one line in the registry of `mla.data.tasks`.

Legend: N episodes, T tokens of each, Q answers of each.
"""

from __future__ import annotations

import abc
import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import numpy as np

from mla.errors import UserError

BLOCK = 64  # episodes that are drawn together, whatever is asked for
SEEDS = 2**32
LONGEST = LARGEST = 2**20  # tokens of an episode, ids
SplitName = Literal["train", "validation", "test"]  # never drawn from one stream


class Episodes(NamedTuple):
    """Episodes of one length, as a model is to read and to answer them.

    Attributes:
      tokens: int32 [N, T], what is read.
      targets: int32 [N, T], what is to be said once that token is read; 0 where nothing is asked.
      weights: fp32 [N, T], 1 where an answer counts and 0 elsewhere.
      distances: int32 [N, T], how many tokens back the one stands that the answer is read from: the farthest of them
        where it needs several. A reader that sees a token and the `distance` before it can answer, one that sees fewer
        has to guess. -1 where nothing is asked.
    """

    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    distances: np.ndarray

    @classmethod
    def asked(cls, tokens: np.ndarray, positions: Any, answers: Any, sources: Any, where: Any = True) -> Episodes:
        """Episodes of tokens [N, T] with answers at some positions.

        Args:
          tokens: integers [N, T].
          positions: where answers are said, [N, Q], or [Q] if in all episodes alike.
          answers: ids, [N, Q].
          sources: positions of the tokens that they are read from, [N, Q] or [Q].
          where: bool [N, Q], which of them are there; by default all.
        """
        positions, answers, sources, where = np.broadcast_arrays(positions, answers, sources, where)
        place = np.nonzero(where)[0], positions[where]
        targets, weights = np.zeros(tokens.shape, np.int32), np.zeros(tokens.shape, np.float32)
        distances = np.full(tokens.shape, -1, np.int32)
        targets[place], weights[place], distances[place] = answers[where], 1, (positions - sources)[where]
        return cls(tokens.astype(np.int32), targets, weights, distances)


class Reading(NamedTuple):
    """What a sequential reader answers, and the position of the token that it has the answer from."""

    answer: int
    source: int


@dataclasses.dataclass(frozen=True)
class Task(abc.ABC):
    """One difficulty of a synthetic task. Its sizes are refused when it is made, with a UserError of one line.

    Attributes:
      name: in the registry.
      axes: fields that a level of a mixture sets, in the order in which `64x4` writes them.
      mixture: the levels of a specification that sets none of the axes; '': the defaults of the fields.
      length: T, tokens of an episode.
    """

    name: ClassVar[str]
    axes: ClassVar[tuple[str, ...]] = ("length",)
    mixture: ClassVar[str] = ""

    length: int = 64

    def __post_init__(self) -> None:
        self.need(1 <= self.length <= LONGEST, f"length={self.length} is not a number from 1 to {LONGEST}")
        self.check()
        self.need(self.vocab_size <= LARGEST, f"its sizes make {self.vocab_size} ids; at most {LARGEST} can be had")

    @abc.abstractmethod
    def check(self) -> None:
        """Raises UserError for sizes that the task cannot have."""

    @property
    @abc.abstractmethod
    def vocab_size(self) -> int:
        """Ids are 0 .. vocab_size - 1."""

    @property
    @abc.abstractmethod
    def answers(self) -> range:
        """Ids that an answer can be, without knowing anything of the episode."""

    @abc.abstractmethod
    def floor_bytes(self) -> float:
        """Bytes of answers that a state must hold at the fullest moment to give them all; what finds them comes on top."""

    @abc.abstractmethod
    def generate(self, random: np.random.Generator, count: int) -> Episodes:
        """Episodes from a stream of random numbers; `draw` is what users call."""

    @abc.abstractmethod
    def read(self, tokens: Sequence[int]) -> Mapping[int, Reading]:
        """Position -> what is to be said there, by a rule that goes through the T tokens of one episode."""

    @property
    def chance(self) -> float:
        """Accuracy of answers drawn uniformly from those there can be."""
        return 1 / len(self.answers)

    @property
    def spec(self) -> str:
        """The specification, without what is as by default: `mqar:length=128,pairs=8`."""
        chosen = [f"{f.name}={_spelt(getattr(self, f.name))}" for f in dataclasses.fields(self) if self._is_set(f)]
        return f"{self.name}:{','.join(chosen)}".removesuffix(":")

    def _is_set(self, field: dataclasses.Field[Any]) -> bool:
        return bool(getattr(self, field.name) != field.default)

    def draw(self, count: int, seed: int, start: int = 0, split: SplitName = "train") -> Episodes:
        """Episodes start .. start + count - 1 of an endless sequence.

        The sequence is fixed by the task's sizes, the seed and the split, and in no way by how it is cut into calls.
        Numbers are NumPy's own, which another release may draw otherwise.

        Args:
          count: N, from 1 up.
          seed: from 0 to 2**32 - 1.
          start: the first episode; a training step that takes `start=step * batch` can be resumed anywhere.
          split: sequences of different splits have nothing to do with each other.
        """
        self.need(count >= 1 and start >= 0, f"count={count}, start={start}: draw from 1 episode up, starting from 0 up")
        self.need(0 <= seed < SEEDS, f"seed={seed} is not a number from 0 to {SEEDS - 1}")
        first, end = start // BLOCK, -(-(start + count) // BLOCK)
        words = [get_args(SplitName).index(split), seed, zlib.crc32(self.spec.encode())]
        blocks = [self.generate(np.random.default_rng([*words, block]), BLOCK) for block in range(first, end)]
        begin = start - first * BLOCK
        return Episodes(*(np.concatenate(arrays)[begin : begin + count] for arrays in zip(*blocks, strict=True)))

    def predict(self, tokens: np.ndarray, window: int | None = None) -> np.ndarray:
        """What the sequential reader says.

        Args:
          tokens: int32 [N, T].
          window: how many tokens before the newest it can answer from; None: all. Each of them is known with what stood
            next to it, as after a short convolution.

        Returns:
          int32 [N, T]; -1 where it has nothing to say.
        """
        said = np.full(tokens.shape, -1, np.int32)
        for row, episode in zip(said, tokens.tolist(), strict=True):
            for position, reading in self.read(episode).items():
                if window is None or position - reading.source <= window:
                    row[position] = reading.answer
        return said

    def need(self, condition: bool, message: str) -> None:
        """Raises UserError, a line that starts with the task's name, unless a condition holds."""
        if not condition:
            raise UserError(f"{self.name}: {message}")

    def need_at_least(self, least: int, *fields: str) -> None:
        """Raises UserError unless each of these fields is at least that large."""
        for field in fields:
            number = getattr(self, field)
            self.need(number >= least, f"{field}={number} is too small; it must be at least {least}")


def _spelt(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
