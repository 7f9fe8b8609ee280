"""Induction: one token comes up a second time, and with it what followed it. Legend: N episodes, T tokens of each."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from mla.data.tasks.contract import Episodes, Reading, Task


@dataclasses.dataclass(frozen=True)
class Induction(Task):
    """What followed the mark, which stands somewhere among random tokens and again at the end.

    Floor: log2(vocabulary) bits
    Window: a share of window / T
    Source: Mamba, 2312.00752 (from memory); there trained at T 256 and tested far beyond
    """

    name: ClassVar[str] = "induction"

    length: int = 256
    vocabulary: int = 16  # ids from 0; the mark follows

    @property
    def vocab_size(self) -> int:
        return self.vocabulary + 1

    @property
    def answers(self) -> range:
        return range(self.vocabulary)

    def check(self) -> None:
        self.need_at_least(3, "length")
        self.need_at_least(2, "vocabulary")

    def floor_bytes(self) -> float:
        return math.log2(self.vocabulary) / 8

    def generate(self, random: np.random.Generator, count: int) -> Episodes:
        tokens = random.integers(self.vocabulary, size=(count, self.length))
        mark = random.integers(self.length - 2, size=(count, 1))
        answers = np.take_along_axis(tokens, mark + 1, 1)
        np.put_along_axis(tokens, mark, self.vocabulary, 1)
        tokens[:, -1] = self.vocabulary
        return Episodes.asked(tokens, np.array([self.length - 1]), answers, mark + 1)

    def read(self, tokens: Sequence[int]) -> Mapping[int, Reading]:
        after = tokens.index(self.vocabulary) + 1
        return {len(tokens) - 1: Reading(tokens[after], after)}
