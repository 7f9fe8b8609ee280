"""Many stacks, told what to take and asked what they give back. Legend: N episodes, T tokens of each, O operations."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from mla.data.tasks.contract import Episodes, Reading, Task


@dataclasses.dataclass(frozen=True)
class Stack(Task):
    """After `POP stack` the value last pushed there and not popped yet; an operation is three tokens, `PUSH stack value`.

    Floor: log2(values) bits for each value that may still be popped, at the fullest moment, mean of 64 episodes
    Window: what was pushed lately; fewer stacks, nearer answers
    Source: Kimi Linear, 2510.26692; how operations are drawn is not given there
    """

    name: ClassVar[str] = "stack"
    axes: ClassVar[tuple[str, ...]] = ("length", "stacks")

    length: int = 256
    stacks: int = 16
    values: int = 64  # ids from 0; then PUSH, POP, PAD and the stacks
    push: float = 0.6  # chance, for a stack that is not empty

    @property
    def vocab_size(self) -> int:
        return self.values + 3 + self.stacks

    @property
    def answers(self) -> range:
        return range(self.values)

    @property
    def operations(self) -> int:
        """O."""
        return self.length // 3

    def check(self) -> None:
        self.need_at_least(6, "length")
        self.need_at_least(1, "stacks")
        self.need_at_least(2, "values")
        self.need(0 < self.push < 1, f"push={self.push} is not between 0 and 1")

    def floor_bytes(self) -> float:
        pushed = self.draw(64, 0).tokens[:, 0 : 3 * self.operations : 3] == self.values
        held = np.cumsum(np.where(pushed, 1, -1), axis=1)
        to_come = np.arange(self.operations)[::-1]
        return float(np.minimum(held, to_come).mean(axis=0).max()) * math.log2(self.values) / 8

    def generate(self, random: np.random.Generator, count: int) -> Episodes:
        of_stack = random.integers(self.stacks, size=(count, self.operations))
        wish = random.random((count, self.operations)) < self.push
        fresh = random.integers(self.values, size=(count, self.operations))
        # which operation pushed what lies on each stack, and which one pushed the value that each operation has
        lying = np.zeros((count, self.stacks, self.operations), np.int32)
        height = np.zeros((count, self.stacks), int)
        origin = np.empty((count, self.operations), int)
        pushes = np.empty((count, self.operations), bool)
        rows = np.arange(count)
        for turn in range(self.operations):
            stack = of_stack[:, turn]
            below = height[rows, stack]
            push = pushes[:, turn] = wish[:, turn] | (below == 0)
            cell = rows, stack, below - ~push
            lying[cell] = origin[:, turn] = np.where(push, turn, lying[cell])
            height[rows, stack] = below + np.where(push, 1, -1)
        values = np.take_along_axis(fresh, origin, 1)
        tokens = np.full((count, self.length), self.values + 2)
        triples = (np.where(pushes, self.values, self.values + 1), self.values + 3 + of_stack, values)
        for offset, ids in enumerate(triples):
            tokens[:, offset : 3 * self.operations : 3] = ids
        return Episodes.asked(tokens, 3 * np.arange(self.operations) + 1, values, 3 * origin + 2, ~pushes)

    def read(self, tokens: Sequence[int]) -> Mapping[int, Reading]:
        stacks: dict[int, list[Reading]] = {}
        said = {}
        for at in range(0, 3 * self.operations, 3):
            operation, stack, value = tokens[at : at + 3]
            if operation == self.values:
                stacks.setdefault(stack, []).append(Reading(value, at + 2))
            else:
                said[at + 1] = stacks[stack].pop()
        return said
