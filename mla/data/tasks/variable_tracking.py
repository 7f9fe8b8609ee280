"""Chains of assignments in noise: RULER's variable tracking (2404.06654) without words.

    noise .. A x = v .. noise .. A y = x .. noise .. Q v x y

Legend: N episodes, T tokens of each, c chains, h hops, so h + 1 assignments of a chain.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from mla.data.tasks import drawing
from mla.data.tasks.contract import Episodes, Reading, Task
from mla.errors import nearest

ASSIGNMENT = 4  # tokens


@dataclasses.dataclass(frozen=True)
class VariableTracking(Task):
    """All names that hold a value, each assigned the one before; or, with `ask=value`, the value behind the last name.

    Floor: chains x (hops + 1) x log2(names) bits; of the value: chains x log2(values) bits
    Window: the names that are assigned near the end; of the value: chains that begin there
    Source: RULER, 2404.06654, as tokens; there one chain, whose names need no hop to be found
    """

    name: ClassVar[str] = "variable_tracking"
    axes: ClassVar[tuple[str, ...]] = ("length", "hops")

    length: int = 256
    hops: int = 2  # h
    chains: int = 4  # c
    ask: str = "names"  # names, each read before the next is said, or value: all hops at once
    noise: int = 256  # how many ids; then those of names, of values, A, = and Q
    names: int = 256
    values: int = 256

    @property
    def vocab_size(self) -> int:
        return self.noise + self.names + self.values + 3

    @property
    def answers(self) -> range:
        first = self.noise + self.names
        return range(self.noise, first) if self.ask == "names" else range(first, first + self.values)

    @property
    def assignments(self) -> int:
        """Of all chains."""
        return self.chains * (self.hops + 1)

    @property
    def body(self) -> int:
        """Tokens before the question."""
        return self.length + 1 - 2 - (self.hops + 1 if self.ask == "names" else 1)

    def check(self) -> None:
        asked = ("names", "value")
        self.need(self.ask in asked, f"ask={self.ask!r} is not known; {nearest(self.ask, asked)}")
        self.need_at_least(1, "chains", "noise")
        self.need_at_least(0, "hops")
        self.need_at_least(2, "names", "values")
        least = self.assignments * ASSIGNMENT + self.length - self.body
        self.need(
            self.length >= least,
            f"{self.assignments} assignments need at least {least} tokens; length={self.length} has fewer",
        )
        for field, needed in (("names", self.assignments), ("values", self.chains)):
            given = getattr(self, field)
            self.need(given >= needed, f"{field}={given} are too few for {needed} different ones; set it to that or more")

    def floor_bytes(self) -> float:
        count = self.assignments if self.ask == "names" else self.chains
        return count * math.log2(len(self.answers)) / 8

    def generate(self, random: np.random.Generator, count: int) -> Episodes:
        each, first_value = self.hops + 1, self.noise + self.names
        assign, equals, question = range(first_value + self.values, self.vocab_size)
        whole = random.integers(self.noise, size=(count, self.length + 1))
        starts = drawing.scattered(random, count, self.body, self.assignments, ASSIGNMENT)
        # chains share the places in the order of the text at random: where each has its assignments, [N, c, h + 1]
        owner = drawing.distinct(random, count, self.assignments, self.assignments) // each
        turns = np.argsort(owner, axis=1, kind="stable")
        places = np.take_along_axis(starts, turns, 1).reshape(count, self.chains, each)
        names = self.noise + drawing.distinct(random, count, self.names, self.assignments).reshape(places.shape)
        values = first_value + drawing.distinct(random, count, self.values, self.chains)
        holds = np.concatenate([values[..., None], names[..., :-1]], -1)
        parts = np.stack(np.broadcast_arrays(assign, names, equals, holds), -1)
        at = places[..., None] + np.arange(ASSIGNMENT)
        np.put_along_axis(whole, at.reshape(count, -1), parts.reshape(count, -1), 1)

        chain = random.integers(self.chains, size=count)
        rows = np.arange(count)
        if self.ask == "names":
            asked, answers, sources = values[rows, chain], names[rows, chain], places[rows, chain] + 1
        else:
            asked, answers = names[rows, chain, -1], values[rows, chain, None]
            sources = places[rows, chain, :1] + 3
        whole[:, self.body] = question
        whole[:, self.body + 1] = asked
        whole[:, self.body + 2 :] = answers
        return Episodes.asked(whole[:, :-1], np.arange(self.body + 1, self.length), answers, sources)

    def read(self, tokens: Sequence[int]) -> Mapping[int, Reading]:
        assign, _, question = range(self.noise + self.names + self.values, self.vocab_size)
        named: dict[int, Reading] = {}  # what is held -> the name that holds it
        origin: dict[int, Reading] = {}  # name -> the value behind it
        for at, token in enumerate(tokens):
            if token == assign:
                name, held = tokens[at + 1], tokens[at + 3]
                named[held] = Reading(name, at + 1)
                origin[name] = origin.get(held, Reading(held, at + 3))
        asked = tokens.index(question) + 1
        if self.ask == "value":
            return {asked: origin[tokens[asked]]}
        said, last = {}, tokens[asked]
        for position in range(asked, asked + self.hops + 1):
            said[position] = named[last]
            last = named[last].answer
        return said
