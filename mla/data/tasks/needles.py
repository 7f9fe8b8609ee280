"""Needles in a haystack of tokens: RULER's retrieval tasks (2404.06654) without words.

    noise .. A k u1 .. um .. noise .. Q k u1 .. um

A needle is a mark A, a key and the m tokens of its value; Q asks for a key. The model reads what it should have said.

Legend: N episodes, T tokens of each, B needles in the text, m tokens of a value, c values of a key, q questions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from mla.data.tasks import drawing
from mla.data.tasks.contract import Episodes, Reading, Task

DEPTHS = 40  # levels, evenly from 0 to 100 percent of the noise before a needle


@dataclasses.dataclass(frozen=True)
class Needle(Task):
    """The value of a key, which stands once in noise.

    Floor: keys in the text x values of each x answer x log2(values) bits
    Window: a share of window / T, the needles near the end
    Source: RULER, 2404.06654 (single), as tokens
    """

    name: ClassVar[str] = "needle"

    length: int = 256
    needles: int = 1  # different keys in the text
    queries: int = 1  # of them that are asked for, one after the other
    places: int = 1  # c: how often each key stands there, with another value; all of them are asked for, in order
    answer: int = 4  # m
    noise: int = 256  # how many ids; then those of keys, of values, A and Q
    keys: int = 256
    values: int = 256
    depth: float = -1.0  # percent of the noise before a lone needle; below 0: drawn from 40 levels

    @property
    def vocab_size(self) -> int:
        return self.noise + self.keys + self.values + 2

    @property
    def answers(self) -> range:
        return range(self.noise + self.keys, self.noise + self.keys + self.values)

    @property
    def hidden(self) -> int:
        """How many different keys the text has."""
        return self.needles

    @property
    def body(self) -> int:
        """Tokens before the first question."""
        return self.length + 1 - self.queries * (2 + self.places * self.answer)

    def check(self) -> None:
        self.need_at_least(1, "needles", "queries", "places", "answer", "noise", "keys")
        self.need_at_least(2, "values")
        self.need(self.depth <= 100, f"depth={self.depth} is not a percentage from 0 to 100")
        self.need_fitting()
        lone = self.hidden * self.places == 1
        self.need(self.depth < 0 or lone, f"depth={self.depth} is for one needle; leave it out with several")

    def need_fitting(self) -> None:
        """Raises UserError for needles that have no room, or no keys."""
        count, asked = self.hidden * self.places, self.length + 1 - self.body
        least = count * (2 + self.answer) + asked - 1
        self.need(
            self.length >= least,
            f"{count} needles of {2 + self.answer} tokens and the questions need {least}; length={self.length} is less",
        )
        self.need(
            self.hidden <= self.keys, f"keys={self.keys} are too few for {self.hidden} needles; set it to that or more"
        )
        self.need(
            self.queries <= self.hidden, f"queries={self.queries} are more than the {self.hidden} keys; set at most as many"
        )

    def floor_bytes(self) -> float:
        return self.hidden * self.places * self.answer * math.log2(self.values) / 8

    def _starts(self, random: np.random.Generator, count: int) -> np.ndarray:
        """Where needles start, in the order of the text: [N, B]."""
        blocks, size = self.hidden * self.places, 2 + self.answer
        if blocks > DEPTHS:  # more than there are levels
            return drawing.scattered(random, count, self.body, blocks, size)
        levels = np.sort(drawing.distinct(random, count, DEPTHS, blocks), axis=1) / (DEPTHS - 1)
        share = levels if self.depth < 0 else np.full((count, 1), self.depth / 100)
        return np.rint(share * (self.body - blocks * size)).astype(int) + np.arange(blocks) * size

    def generate(self, random: np.random.Generator, count: int) -> Episodes:
        blocks, within = self.hidden * self.places, np.arange(self.answer)
        mark, question = self.answers.stop, self.answers.stop + 1
        whole = random.integers(self.noise, size=(count, self.length + 1))
        keys = self.noise + drawing.distinct(random, count, self.keys, self.hidden)
        # which key each needle of the text has, and the needles of each key in the order of the text
        owner = drawing.distinct(random, count, blocks, blocks) // self.places
        of_key = np.argsort(owner, axis=1, kind="stable").reshape(count, self.hidden, self.places)
        values = self.answers.start + random.integers(self.values, size=(count, blocks, self.answer))
        starts = self._starts(random, count)
        np.put_along_axis(whole, starts, mark, 1)
        np.put_along_axis(whole, starts + 1, np.take_along_axis(keys, owner, 1), 1)
        at = starts[..., None] + 2 + within
        np.put_along_axis(whole, at.reshape(count, -1), values.reshape(count, -1), 1)

        asked = drawing.distinct(random, count, self.hidden, self.queries)
        rows = np.arange(count)[:, None]
        needles = of_key[rows, asked].reshape(count, -1)  # [N, q c]
        answers = values[rows, needles].reshape(count, self.queries, -1)  # [N, q, c m]
        opening = np.stack([np.full(asked.shape, question), np.take_along_axis(keys, asked, 1)], -1)
        whole[:, self.body :] = np.concatenate([opening, answers], -1).reshape(count, -1)
        turns = self.body + np.arange(self.queries) * (2 + self.places * self.answer)
        positions = (turns[:, None] + 1 + np.arange(self.places * self.answer)).ravel()
        sources = at[rows, needles].reshape(count, -1)
        return Episodes.asked(whole[:, :-1], positions, answers.reshape(count, -1), sources)

    def read(self, tokens: Sequence[int]) -> Mapping[int, Reading]:
        mark, question = self.answers.stop, self.answers.stop + 1
        known: dict[int, list[Reading]] = {}
        said: dict[int, Reading] = {}
        for at, token in enumerate(tokens):
            if token == mark:
                value = range(at + 2, at + 2 + self.answer)
                known.setdefault(tokens[at + 1], []).extend(Reading(tokens[i], i) for i in value)
            elif token == question:
                said |= {at + 1 + turn: reading for turn, reading in enumerate(known[tokens[at + 1]])}
        return said


@dataclasses.dataclass(frozen=True)
class MultiKey(Needle):
    """The value of one of several keys in noise.

    Floor: as needle
    Window: as needle
    Source: RULER, 2404.06654 (multi-key 1), as tokens
    """

    name: ClassVar[str] = "multi_key"
    axes: ClassVar[tuple[str, ...]] = ("length", "needles")

    needles: int = 4


@dataclasses.dataclass(frozen=True)
class AllNeedles(Needle):
    """The value of one of as many keys as have room: a haystack of needles.

    Floor: as needle
    Window: as needle
    Source: RULER, 2404.06654 (multi-key 2 and 3), as tokens
    """

    name: ClassVar[str] = "all_needles"

    needles: int = 0  # as many as fit

    @property
    def hidden(self) -> int:
        return self.needles or self.body // ((2 + self.answer) * self.places)

    def check(self) -> None:
        self.need(self.needles == 0, f"needles={self.needles}: they fill the text; leave it out, or take multi_key")
        self.need_at_least(1, "queries", "places", "answer", "noise", "keys")
        self.need_at_least(2, "values")
        self.need(self.depth < 0, f"depth={self.depth} is for one needle; leave it out")
        self.need(self.hidden >= 1, f"length={self.length} has no room for a needle and its question; set it higher")
        self.need_fitting()


@dataclasses.dataclass(frozen=True)
class MultiValue(Needle):
    """All values of a key that stands in noise several times, in the order of the text.

    Floor: as needle
    Window: as needle
    Source: RULER, 2404.06654 (multi-value), as tokens
    """

    name: ClassVar[str] = "multi_value"
    axes: ClassVar[tuple[str, ...]] = ("length", "places")

    places: int = 4


@dataclasses.dataclass(frozen=True)
class MultiQuery(Needle):
    """The values of several keys in noise, one question after the other.

    Floor: as needle
    Window: as needle
    Source: RULER, 2404.06654 (multi-query), as tokens
    """

    name: ClassVar[str] = "multi_query"
    axes: ClassVar[tuple[str, ...]] = ("length", "needles")

    needles: int = 4
    queries: int = 4
