"""Synthetic tasks by specification: one small file a task, or a family of close kin.

    SPEC    = NAME[:FIELD=VALUE,...]                 mqar:vocabulary=512,length=64,pairs=8
    mixture = LEVEL+LEVEL+...                        mqar:mixture=64x4*5+64x8+128x16
    LEVEL   = SIZE[xSIZE][*SHARE]                    sizes of the fields that the task calls its axes, in their order

Adding a task is one file with a `Task` (`mla.data.tasks.contract`) and one line in REGISTRY.
"""

from __future__ import annotations

import re

from mla.data.tasks.contract import Episodes, Task
from mla.data.tasks.mixture import Level, Mixture
from mla.data.tasks.score import reach, score
from mla.errors import UserError
from mla.registry import load, specified

# name -> where its class stands.
REGISTRY = {
    "mqar": "mla.data.tasks.mqar:MQAR",
    "overwrite": "mla.data.tasks.mqar:Overwrite",
    "compositional": "mla.data.tasks.mqar:Compositional",
    "palindrome": "mla.data.tasks.copying:Palindrome",
    "copy": "mla.data.tasks.copying:Copy",
    "ngram_lookup": "mla.data.tasks.copying:NgramLookup",
    "selective_copy": "mla.data.tasks.selective_copy:SelectiveCopy",
    "induction": "mla.data.tasks.induction:Induction",
    "stack": "mla.data.tasks.stack:Stack",
    "state_tracking": "mla.data.tasks.state_tracking:StateTracking",
    "needle": "mla.data.tasks.needles:Needle",
    "multi_key": "mla.data.tasks.needles:MultiKey",
    "all_needles": "mla.data.tasks.needles:AllNeedles",
    "multi_value": "mla.data.tasks.needles:MultiValue",
    "multi_query": "mla.data.tasks.needles:MultiQuery",
    "variable_tracking": "mla.data.tasks.variable_tracking:VariableTracking",
    "phone_book": "mla.data.tasks.phone_book:PhoneBook",
}


def is_task(corpus: str) -> bool:
    """Whether the corpus of a config names a task."""
    return corpus.partition(":")[0] in REGISTRY


def told(mixture: Mixture) -> str:
    """Every size of every level: what decides which episodes are drawn."""
    return " ".join(f"{level.task!r}*{level.share}" for level in mixture.levels)


def parse(spec: str, field: str = "task") -> Mixture:
    """The levels of a specification: one, or those of its `mixture`, or the task's usual ones if it sets none of its axes.

    Args:
      spec: see the top of this file.
      field: what errors name, such as `config.task.spec`.

    Raises:
      UserError: an unknown task or field, with the nearest match; a value of the wrong type; sizes the task cannot have.
    """
    name, _, settings = spec.partition(":")
    entries = [entry.strip() for entry in settings.split(",") if entry.strip()]
    mixtures = [entry for entry in entries if entry.partition("=")[0] == "mixture"]
    others = [entry for entry in entries if entry not in mixtures]
    if len(mixtures) > 1:
        raise UserError(f"{field}: {spec!r}: mixture is given twice; leave one of them out")
    if name not in REGISTRY:
        specified(spec, REGISTRY, field)  # says which are known
    (task,) = load(REGISTRY[name])
    free = not {entry.partition("=")[0] for entry in others}.intersection(task.axes)
    written = mixtures[0].partition("=")[2] if mixtures else task.mixture if free else ""

    def made(sizes: list[str]) -> Task:
        try:
            level: Task = specified(f"{name}:{','.join([*others, *sizes])}", REGISTRY, field)
        except UserError as error:
            said = str(error)
            raise UserError(said if said.startswith(f"{field}:") else f"{field}: {said}") from None
        return level

    if not written and not mixtures:
        return Mixture((Level(made([])),))
    levels = []
    for entry in written.split("+"):
        body, star, share = entry.strip().partition("*")
        sizes = body.split("x")
        if len(sizes) != len(task.axes) or not all(map(str.isdecimal, sizes)):
            shape = "x".join(task.axes)
            raise UserError(f"{field}: {spec!r}: mixture: {entry!r} is no level of {name}; write {shape}, or {shape}*share")
        if star and not re.fullmatch("[1-9][0-9]{0,5}", share):
            raise UserError(f"{field}: {spec!r}: mixture: {entry!r}: {share!r} is no share; write a number from 1 up")
        chosen = [f"{axis}={size}" for axis, size in zip(task.axes, sizes, strict=True)]
        levels.append(Level(made(chosen), int(share) if star else 1))
    return Mixture(tuple(levels))


__all__ = ["Episodes", "Level", "Mixture", "Task", "is_task", "parse", "reach", "score", "told"]
