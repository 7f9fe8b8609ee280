"""What a compiled program sends between devices, read off its text in XLA's HLO."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Of a total that each of n devices is to have (or to give), what crosses its links: a ring's share.
SHARES = {"all-gather": 1.0, "all-reduce": 2.0, "reduce-scatter": 1.0, "all-to-all": 1.0}

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\) -> .*\{$")
_COLLECTIVE = re.compile(rf"^(?:ROOT )?%[\w.-]+ = (.*?) ({'|'.join(KINDS)})(?:-start)?\((.*)$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.-]+)")
_BRANCHES = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONDITION = re.compile(r"condition=%?([\w.-]+)")
_CONSTANT = re.compile(r" = s32\[\]\S* constant\((\d+)\)")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")
_LISTED = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_IOTA = re.compile(r"replica_groups=\[(?:\d+,)*(\d+)\]<=")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange between groups of devices.

    Attributes:
      kind: one of `KINDS`.
      size: bytes of the whole: what an all-gather makes, a reduce-scatter takes or an all-reduce sums, on one device.
      group: devices that take part together.
      times: how often a run of the program does it.
    """

    kind: str
    size: int
    group: int
    times: int

    @property
    def moved(self) -> float:
        """Bytes that reach each device in all its runs, if they go round a ring."""
        share = SHARES[self.kind] * (self.group - 1) / self.group if self.kind in SHARES else 1.0
        return self.size * share * self.times


def collectives(text: str) -> list[Collective]:
    """The exchanges of a program, by the text of its compiled module. One that is spread over several fusions is one."""
    limits: dict[str, list[int]] = {}  # computation -> the whole numbers in it
    for computation, line in _lines(text):
        if match := _CONSTANT.search(line):
            limits.setdefault(computation, []).append(int(match[1]))

    def turns(line: str) -> int:
        """How often a loop runs; 1 where that cannot be told."""
        if match := _TRIPS.search(line):
            return int(match[1])
        counted = limits.get(match[1], []) if (match := _CONDITION.search(line)) else []
        return counted[0] if len(counted) == 1 else 1  # loops over a known range compare with one number

    callers: dict[str, list[tuple[str, int]]] = {}  # computation -> who calls it, and how often
    seen: dict[str, tuple[str, str, int, int]] = {}  # channel -> computation, kind, size, group
    for computation, line in _lines(text):
        trips = turns(line) if " while(" in line else 1
        called = _CALLED.findall(line)
        for branches in _BRANCHES.findall(line):
            called += [name.strip().lstrip("%") for name in branches.split(",")]
        for name in called:
            callers.setdefault(name, []).append((computation, trips))
        if (match := _COLLECTIVE.match(line)) is None:
            continue
        result, kind, rest = match.groups()
        scattered = kind == "all-reduce" and computation.startswith("all-reduce-scatter")
        arrays = [_bytes(*array) for array in _ARRAY.findall(result)]
        size, group = max(arrays) if line.count("-start(") else sum(arrays), _group(rest)
        if kind == "reduce-scatter":
            size *= group  # of what is taken, not of what is left of it
        channel = found[1] if (found := _CHANNEL.search(rest)) else line
        seen.setdefault(channel, (computation, "reduce-scatter" if scattered else kind, size, group))

    def times(computation: str, above: tuple[str, ...] = ()) -> int:
        calls = [(name, count) for name, count in callers.get(computation, []) if name not in above]
        return max((count * times(name, (*above, computation)) for name, count in calls), default=1)

    found_here = [Collective(kind, size, group, times(where)) for where, kind, size, group in seen.values()]
    return [each for each in found_here if each.group > 1]


def _lines(text: str) -> Iterator[tuple[str, str]]:
    """(name of the computation, instruction) of a module."""
    computation = ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            computation = match[1]
        elif line.startswith(" "):
            yield computation, line.strip()


def _bytes(dtype: str, shape: str) -> int:
    """Of an array as HLO writes it; 0 for tokens and the like."""
    count = math.prod(int(size) for size in shape.split(",") if size)
    bits = re.search(r"\d+", dtype)
    if dtype == "pred":
        return count
    return math.ceil(count * int(bits[0]) / 8) if bits else 0


def _group(text: str) -> int:
    """Devices of a group, by an instruction's replica groups; a permutation has pairs instead and counts as 2."""
    if match := _MESH.search(text):
        sizes = dict(pair.split("=") for pair in match[1].split(","))
        return math.prod(int(sizes[axis.strip()]) for axis in match[2].split(",") if axis.strip() in sizes)
    if match := _LISTED.search(text):
        return len(match[1].split(","))
    if match := _IOTA.search(text):
        return int(match[1])
    return 2
