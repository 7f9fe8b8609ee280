"""Multi-query associative recall (MQAR) of Zoology (2312.04927), and two harder forms from its authors' code.

    k1 v1 k2 v2 .. kn vn  then slots of two tokens, some of which begin with a key; at each key its value is to be said.

The answer never stands in the input after the pairs. Slots are given to keys by a power law that prefers near ones. Not
here: the continuous form, whose inputs are vectors and not ids.

Legend: N episodes, T tokens of each, n keys, W pairs that are written, V ids.
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

FILLERS = ("blank", "random")
BLANK = 0


@dataclasses.dataclass(frozen=True)
class Lookup(Task):
    """What the forms of MQAR share.

    Attributes:
      vocabulary: V; 0 is blank, the rest is split evenly into keys, or halves of keys, and values.
      power: a of the law: the chance of the slot g from the pairs on goes with (g + 1)^(a - 1). 1: all alike.
      filler: what stands where no key is asked: `blank`, or `random` ids but for this episode's keys. (The authors' code
        draws from all ids, so that a key may come up unasked.)
    """

    vocabulary: int = 512
    power: float = 0.01
    filler: str = "blank"

    @property
    def vocab_size(self) -> int:
        return self.vocabulary

    def check(self) -> None:
        self.need(self.filler in FILLERS, f"filler={self.filler!r} is not known; {nearest(self.filler, FILLERS)}")
        self.need(0 < self.power < math.inf, f"power={self.power} is not a positive number")
        self.need(self.length % 2 == 0, f"length={self.length} is odd; it must be even")

    def need_room(self, written: int, asked: int, size: int, why: str) -> None:
        """Raises UserError unless `written` pairs and `asked` slots of `size` tokens each fit into the length."""
        tokens = (written + asked) * size
        self.need(
            tokens <= self.length,
            f"{why} need {size} x ({written} + {asked}) = {tokens} tokens; length={self.length} has fewer",
        )

    def slots(self, random: np.random.Generator, count: int, space: int, asked: int) -> np.ndarray:
        """The slots of `asked` keys, without replacement: [N, asked], below `space`."""
        return drawing.weighted(random, count, (self.power - 1) * np.log(np.arange(1, space + 1)), asked)

    def background(self, random: np.random.Generator, count: int, keys: np.ndarray) -> np.ndarray:
        """Filler: ids [N, T], none of them in keys [N, n]."""
        if self.filler == "blank":
            return np.full((count, self.length), BLANK)
        return drawing.outside(random, self.vocabulary, keys, self.length)


@dataclasses.dataclass(frozen=True)
class MQAR(Lookup):
    """At each key that comes up again, the value that followed it.

    Floor: pairs x log2(vocabulary / 2) bits
    Window: the share of keys that are asked near their value; many are, by the power law
    Source: Zoology, 2312.04927; its code
    """

    name: ClassVar[str] = "mqar"
    axes: ClassVar[tuple[str, ...]] = ("length", "pairs")
    mixture: ClassVar[str] = "64x4+64x8+128x16+128x32"

    pairs: int = 4  # n

    @property
    def written(self) -> int:
        """W, pairs that stand before the first question."""
        return self.pairs

    @property
    def answers(self) -> range:
        return range(self.vocabulary // 2, self.vocabulary)

    def check(self) -> None:
        super().check()
        self.need_at_least(1, "pairs")
        self.need(
            self.written < self.vocabulary // 2,
            f"vocabulary={self.vocabulary} has too few keys and values for {self.written} pairs; "
            f"it must be at least {2 * self.written + 2}",
        )
        self.need_room(self.written, self.pairs, 2, f"pairs={self.pairs}")

    def floor_bytes(self) -> float:
        return self.pairs * math.log2(len(self.answers)) / 8

    def pairs_written(self, random: np.random.Generator, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which of the keys [N, n] each pair has, [N, W], and which pair holds the value that counts of each key, [N, n]."""
        order = np.broadcast_to(np.arange(self.pairs), keys.shape)
        return order, order

    def generate(self, random: np.random.Generator, count: int) -> Episodes:
        keys = 1 + drawing.distinct(random, count, self.vocabulary // 2 - 1, self.pairs)
        values = self.answers.start + drawing.distinct(random, count, len(self.answers), self.written)
        of_pair, counts = self.pairs_written(random, keys)
        context = 2 * self.written
        queries = context + 2 * self.slots(random, count, (self.length - context) // 2, self.pairs)
        tokens = self.background(random, count, keys)
        tokens[:, 0:context:2] = np.take_along_axis(keys, of_pair, 1)
        tokens[:, 1:context:2] = values
        np.put_along_axis(tokens, queries, keys, 1)
        return Episodes.asked(tokens, queries, np.take_along_axis(values, counts, 1), 2 * counts + 1)

    def read(self, tokens: Sequence[int]) -> Mapping[int, Reading]:
        context = 2 * self.written
        known = {tokens[at - 1]: Reading(tokens[at], at) for at in range(1, context, 2)}
        return {at: known[tokens[at]] for at in range(context, len(tokens)) if tokens[at] in known}


@dataclasses.dataclass(frozen=True)
class Overwrite(MQAR):
    """MQAR with some keys written twice: the newer value is the answer. All values of an episode differ.

    Floor: as mqar
    Window: as mqar; what is written twice stands nearer
    Source: Zoology's code (forgetting MQAR)
    """

    name: ClassVar[str] = "overwrite"
    mixture: ClassVar[str] = ""

    updates: int = 4  # keys that are written again after all of them were written once

    @property
    def written(self) -> int:
        return self.pairs + self.updates

    def check(self) -> None:
        self.need_at_least(1, "updates")
        self.need(
            self.updates <= self.pairs, f"updates={self.updates} are more than pairs={self.pairs}; set at most as many"
        )
        super().check()

    def pairs_written(self, random: np.random.Generator, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        order = np.broadcast_to(np.arange(self.pairs), keys.shape)
        again = drawing.distinct(random, len(keys), self.pairs, self.updates)
        counts = order.copy()
        np.put_along_axis(counts, again, np.arange(self.pairs, self.written)[None], 1)
        return np.concatenate([order, again], 1), counts


@dataclasses.dataclass(frozen=True)
class Compositional(Lookup):
    """MQAR whose keys are two tokens, every first half with every second half: neither alone determines the value.

    Floor: side^2 x log2(vocabulary / 3) bits
    Window: as mqar, with slots of three tokens
    Source: Zoology's code (compositional MQAR)
    """

    name: ClassVar[str] = "compositional"
    axes: ClassVar[tuple[str, ...]] = ("length", "side")

    side: int = 2  # first halves, and second halves; side x side keys

    @property
    def pairs(self) -> int:
        """n, keys of two halves with their values."""
        return self.side**2

    @property
    def answers(self) -> range:
        return range(2 * (self.vocabulary // 3), self.vocabulary)

    def check(self) -> None:
        super().check()
        self.need_at_least(1, "side")
        self.need(
            self.pairs < self.vocabulary // 3,
            f"vocabulary={self.vocabulary} is too small for {self.pairs} values; it must be at least {3 * self.pairs + 3}",
        )
        self.need_room(self.pairs, self.pairs, 3, f"side={self.side}: {self.pairs} keys")

    def floor_bytes(self) -> float:
        return self.pairs * math.log2(len(self.answers)) / 8

    def generate(self, random: np.random.Generator, count: int) -> Episodes:
        third, pairs, context = self.vocabulary // 3, self.pairs, 3 * self.pairs
        first = 1 + drawing.distinct(random, count, third - 1, self.side)
        second = third + drawing.distinct(random, count, third, self.side)
        values = self.answers.start + drawing.distinct(random, count, len(self.answers), pairs)
        order = drawing.distinct(random, count, pairs, pairs)
        firsts = np.take_along_axis(first, order // self.side, 1)
        seconds = np.take_along_axis(second, order % self.side, 1)
        queries = context + 3 * self.slots(random, count, (self.length - context) // 3, pairs)
        tokens = self.background(random, count, np.concatenate([first, second], 1))
        for offset, ids in enumerate((firsts, seconds, values)):
            tokens[:, offset:context:3] = ids
        np.put_along_axis(tokens, queries, firsts, 1)
        np.put_along_axis(tokens, queries + 1, seconds, 1)
        return Episodes.asked(tokens, queries + 1, values, 3 * np.arange(pairs) + 2)

    def read(self, tokens: Sequence[int]) -> Mapping[int, Reading]:
        context = 3 * self.pairs
        known = {(tokens[at - 2], tokens[at - 1]): Reading(tokens[at], at) for at in range(2, context, 3)}
        halves = ((at, (tokens[at - 1], tokens[at])) for at in range(context + 1, len(tokens)))
        return {at: known[key] for at, key in halves if key in known}
