"""Multi-query associative recall, as in Zoology (2312.04927): pairs of keys and values, then every key once, at distances
that follow a power law. The answer never stands in the input: it is asked for at the key's own position.

Legend: N episodes, T tokens, n pairs, V ids.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import numpy as np

from mla.data.tasks.contract import Episodes, Size, Task
from mla.errors import UserError

SMALL_TRAIN = (Size(64, 4), Size(64, 8), Size(128, 16), Size(128, 32))  # short ones first, for minutes on a CPU
SMALL_TEST = (*SMALL_TRAIN, Size(256, 64), Size(512, 128))
# Sizes of the tests of Based (2402.18668), whose vocabulary has 8,192 ids.
BASED_TEST = tuple(Size(*s) for s in ((64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256)))


@dataclasses.dataclass(frozen=True)
class MQAR(Task):
    """Keys are ids 1 .. V/2 - 1, values V/2 .. V - 1, and 0 fills what is left.

    Attributes:
      vocabulary: V.
      power: a of the law: gap g after the pairs is drawn with a probability proportional to (g + 1)^(a - 1).
    """

    train: tuple[Size, ...] = SMALL_TRAIN
    test: tuple[Size, ...] = SMALL_TEST
    vocabulary: int = 512
    power: float = 0.01
    name: ClassVar = "mqar"

    @property
    def vocab_size(self) -> int:
        return self.vocabulary

    def check(self) -> None:
        where, keys = "config.data.corpus: mqar", self.vocabulary // 2 - 1
        if keys < 1 or self.vocabulary % 2:
            raise UserError(
                f"{where}: vocabulary={self.vocabulary} has no two halves of keys and values; take an even number"
            )
        if not 0 < self.power <= 1:
            raise UserError(f"{where}: power={self.power:g} is not above 0 and at most 1")
        for size in (*self.train, *self.test):
            if size.tokens % 2 or 4 * size.items > size.tokens or size.items < 1:
                least = f"{size.items} pairs and as many queries take an even {4 * size.items} tokens or more"
                raise UserError(f"{where}: {size}: {least}, and there is one pair at least")
            if size.items > keys:
                raise UserError(f"{where}: {size}: vocabulary={self.vocabulary} has {keys} keys; raise it")

    def draw(self, size: Size, count: int, seed: int) -> Episodes:
        generator = np.random.default_rng(seed)
        tokens, pairs, half = size.tokens, size.items, self.vocabulary // 2

        def without_replacement(choices: int, scores: np.ndarray | float = 0.0) -> np.ndarray:
            """The first `pairs` of an order drawn with probabilities proportional to exp(scores), int [N, n]."""
            drawn = scores + generator.gumbel(size=(count, choices))
            return np.argsort(-drawn, axis=1, kind="stable")[:, :pairs]

        keys, values = 1 + without_replacement(half - 1), half + without_replacement(half)
        gaps = np.arange((tokens - 2 * pairs) // 2)
        slots = without_replacement(len(gaps), (self.power - 1) * np.log(gaps + 1.0))
        asked = 2 * pairs + 2 * slots  # where each key is asked for
        rows = np.arange(count)[:, None]
        read = np.zeros((count, tokens), np.int32)
        read[:, 0 : 2 * pairs : 2], read[:, 1 : 2 * pairs : 2] = keys, values
        read[rows, asked] = keys
        targets, distances = np.zeros_like(read), np.zeros_like(read)
        weights = np.zeros(read.shape, np.float32)
        targets[rows, asked], weights[rows, asked] = values, 1
        distances[rows, asked] = asked - (2 * np.arange(pairs) + 1)
        return Episodes(read, targets, weights, distances)

    def floor_bytes(self, size: Size) -> float:
        return size.items * math.log2(self.vocabulary / 2) / 8

    def chance(self, size: Size) -> float:
        return 2 / self.vocabulary
