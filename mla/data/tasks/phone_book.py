r"""A phone book in bytes of text, without a tokenizer: N lines, two of them again as examples, then a third name.

    "Bako Timu: 0123456789\n" x N   "\n"   two lines   "Lepi Zora: 9876543210"

Legend: N episodes, T bytes of each, E entries of a book.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from mla.data.tasks import drawing
from mla.data.tasks.contract import Episodes, Reading, Task

SYLLABLES = np.array([[ord(a), ord(b)] for a in "bcdfghjklmnpqrstvwyz" for b in "aeiou"])  # [100, 2]
NAME, DIGITS = 9, 10  # bytes: two words of two syllables; a number
LINE = NAME + len(": ") + DIGITS + len("\n")
EXAMPLES = 2


@dataclasses.dataclass(frozen=True)
class PhoneBook(Task):
    """The number of a name in a phone book, after two examples. As many entries as have room; newlines before them fill up.

    Floor: entries x 10 x log2(10) bits
    Window: the entries near the end
    Source: 2402.01032, in bytes, with names of one length
    """

    name: ClassVar[str] = "phone_book"

    length: int = 512

    @property
    def vocab_size(self) -> int:
        return 256

    @property
    def answers(self) -> range:
        return range(ord("0"), ord("9") + 1)

    @property
    def entries(self) -> int:
        """E."""
        return (self.length + 1 - len("\n") - EXAMPLES * LINE - (LINE - 1)) // LINE

    def check(self) -> None:
        least = (EXAMPLES + 1) * LINE + EXAMPLES * LINE + LINE - 1
        self.need(
            self.entries > EXAMPLES,
            f"length={self.length} has no room for {EXAMPLES + 1} entries; it must be at least {least}",
        )

    def floor_bytes(self) -> float:
        return self.entries * DIGITS * math.log2(10) / 8

    def generate(self, random: np.random.Generator, count: int) -> Episodes:
        entries = self.entries
        name = drawing.distinct(random, count, len(SYLLABLES) ** 4, entries)
        syllables = SYLLABLES[name[..., None] // len(SYLLABLES) ** np.arange(4) % len(SYLLABLES)]  # [N, E, 4, 2]
        syllables[:, :, ::2, 0] += ord("A") - ord("a")
        book = np.full((count, entries, LINE), ord(" "))
        book[..., :4] = syllables[:, :, :2].reshape(count, entries, 4)
        book[..., 5:NAME] = syllables[:, :, 2:].reshape(count, entries, 4)
        book[..., NAME], book[..., -1] = ord(":"), ord("\n")
        numbers = NAME + 2 + np.arange(DIGITS)
        book[..., numbers] = self.answers.start + random.integers(10, size=(count, entries, DIGITS))

        again = drawing.distinct(random, count, entries, EXAMPLES + 1)
        lines = book[np.arange(count)[:, None], again]
        whole = np.full((count, self.length + 1), ord("\n"))
        end = self.length + 1 - (EXAMPLES + 1) * LINE + 1  # of the book and the empty line
        first = end - 1 - entries * LINE
        whole[:, first : end - 1] = book.reshape(count, -1)
        whole[:, end:] = lines.reshape(count, -1)[:, :-1]
        positions = np.arange(self.length - DIGITS, self.length)
        sources = first + again[:, -1:] * LINE + numbers
        return Episodes.asked(whole[:, :-1], positions, lines[:, -1, numbers], sources)

    def read(self, tokens: Sequence[int]) -> Mapping[int, Reading]:
        text = bytes(tokens).decode("ascii")
        asked = text.rindex("\n") + 1
        number = text.index(text[asked : asked + NAME]) + NAME + 2
        space = asked + NAME + 1
        return {space + j: Reading(tokens[number + j], number + j) for j in range(DIGITS)}
