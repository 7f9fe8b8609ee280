"""Selective copy: tokens among blanks, then their order without the blanks. Legend: N episodes, T tokens of each."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from mla.data.tasks import drawing
from mla.data.tasks.contract import Episodes, Reading, Task


@dataclasses.dataclass(frozen=True)
class SelectiveCopy(Task):
    """Data tokens that stood among blanks, in order; they are said at the blanks after the mark, and not read again.

    Floor: data x log2(vocabulary - 2) bits
    Window: the data that stand late
    Source: MAD, 2403.17844; here the last one need not stand next to the mark
    """

    name: ClassVar[str] = "selective_copy"
    axes: ClassVar[tuple[str, ...]] = ("length", "data")

    length: int = 256
    vocabulary: int = 16  # ids of data from 0; the last but one is BLANK, the last the mark
    data: int = 16  # tokens

    @property
    def vocab_size(self) -> int:
        return self.vocabulary

    @property
    def answers(self) -> range:
        return range(self.vocabulary - 2)

    def check(self) -> None:
        self.need_at_least(4, "vocabulary")
        self.need_at_least(1, "data")
        least = 2 * self.data + 1
        self.need(self.length >= least, f"data={self.data} need at least {least} tokens; length={self.length} has fewer")

    def floor_bytes(self) -> float:
        return self.data * math.log2(len(self.answers)) / 8

    def generate(self, random: np.random.Generator, count: int) -> Episodes:
        mark = self.length - self.data - 1
        data = random.integers(len(self.answers), size=(count, self.data))
        places = np.sort(drawing.distinct(random, count, mark, self.data), axis=1)
        tokens = np.full((count, self.length), self.vocabulary - 2)
        np.put_along_axis(tokens, places, data, 1)
        tokens[:, mark] = self.vocabulary - 1
        return Episodes.asked(tokens, np.arange(mark + 1, self.length), data, places)

    def read(self, tokens: Sequence[int]) -> Mapping[int, Reading]:
        mark = tokens.index(self.vocabulary - 1)
        data = (Reading(tokens[at], at) for at in range(mark) if tokens[at] in self.answers)
        return dict(zip(range(mark + 1, len(tokens)), data, strict=True))
