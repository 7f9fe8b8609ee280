"""A running product in a finite group: what a state must compute, not only keep. Legend: N episodes, T tokens of each."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from mla.data.tasks.contract import Episodes, Reading, Task

LARGEST_CYCLE, LARGEST_SET = 1024, 5


@functools.cache
def products(group: str) -> np.ndarray:
    """The table of a group: ids of a b, [elements, elements]; 0 is the unit.

    `z7` adds modulo 7. `s3` composes permutations of 3 things, in lexicographic order: (a b)(i) = a(b(i)).
    """
    size = int(group[1:])
    if group[0] == "z":
        return np.add.outer(np.arange(size), np.arange(size)) % size
    elements = np.array(list(itertools.permutations(range(size))))
    digits = size ** np.arange(size)
    of_code = {code: number for number, code in enumerate((elements @ digits).tolist())}
    composed = elements[:, elements] @ digits  # elements[a, elements[b, i]]
    return np.vectorize(of_code.__getitem__)(composed)


@dataclasses.dataclass(frozen=True)
class StateTracking(Task):
    """At every token the product of all so far: `z2` is parity, `z7` addition modulo 7, `s5` permutations of 5 things.

    Floor: log2(elements) bits
    Window: the first tokens alone
    Source: 2411.12537 and others (sizes from memory)
    """

    name: ClassVar[str] = "state_tracking"

    group: str = "s3"

    @property
    def elements(self) -> int:
        """How many there are; their ids start from 0."""
        size = int(self.group[1:])
        return size if self.group[0] == "z" else math.factorial(size)

    @property
    def vocab_size(self) -> int:
        return self.elements

    @property
    def answers(self) -> range:
        return range(self.elements)

    def check(self) -> None:
        self.need_at_least(1, "length")
        kind, size = self.group[:1], self.group[1:]
        most = {"z": LARGEST_CYCLE, "s": LARGEST_SET}.get(kind, 0)
        self.need(
            re.fullmatch("[1-9][0-9]{0,3}", size) is not None and 2 <= int(size) <= most,
            f"group={self.group!r} is not known; write z2 to z{LARGEST_CYCLE} or s2 to s{LARGEST_SET}",
        )

    def floor_bytes(self) -> float:
        return math.log2(self.elements) / 8

    def generate(self, random: np.random.Generator, count: int) -> Episodes:
        table = products(self.group)
        tokens = random.integers(self.elements, size=(count, self.length))
        answers = tokens.copy()
        for at in range(1, self.length):
            answers[:, at] = table[answers[:, at - 1], tokens[:, at]]
        return Episodes.asked(tokens, np.arange(self.length), answers, np.zeros(self.length, int))

    def read(self, tokens: Sequence[int]) -> Mapping[int, Reading]:
        table = products(self.group)
        running = itertools.accumulate(tokens, lambda product, token: int(table[product, token]))
        return {at: Reading(product, 0) for at, product in enumerate(running)}
