"""Synthetic tasks, by name: what a corpus of text cannot ask for. Adding one is one file with a `Task` and one line here.

A specification is a name and settings: mqar, mqar:vocabulary=128,train=64x4+64x8,test=64x8+128x16. Sizes are tokens x items.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from mla.data.tasks.contract import Size, Task
from mla.data.tasks.mqar import MQAR
from mla.errors import UserError, nearest

REGISTRY: dict[str, type[Task]] = {"mqar": MQAR}
WHERE = "config.data.corpus"


def is_task(corpus: str) -> bool:
    """Whether the corpus of a config names a task."""
    return corpus.partition(":")[0] in REGISTRY


def parse(spec: str) -> Task:
    """The task of a specification; see the top of this file.

    Raises:
      UserError: a field that the task does not have, a value of another kind, or sizes that it cannot have.
    """
    name, _, rest = spec.partition(":")
    kind = REGISTRY[name]
    fields = {field.name: field for field in dataclasses.fields(kind)}
    values: dict[str, Any] = {}
    for entry in filter(None, rest.split(",")):
        field, equals, text = entry.partition("=")
        if field not in fields or not equals:
            raise UserError(f"{WHERE}: {name}: {entry!r} is no FIELD=VALUE of this task; {nearest(field, fields)}")
        values[field] = _value(f"{WHERE}: {name}: {field}", text, fields[field].default)
    task: Task = kind(**values)
    task.check()
    return task


def _value(where: str, text: str, like: Any) -> Any:
    """A setting, of the kind that its default is of."""
    if isinstance(like, tuple):
        sizes = [re.fullmatch(r"([0-9]{1,6})x([0-9]{1,6})", part) for part in text.split("+")]
        if not all(sizes):
            raise UserError(f"{where}: {text!r}: write TOKENSxITEMS+.., such as {'+'.join(map(str, like[:2]))}")
        return tuple(Size(int(size[1]), int(size[2])) for size in sizes if size)
    try:
        return type(like)(text)
    except ValueError:
        raise UserError(f"{where}: {text!r} is not of the kind of {like!r}") from None


def told(task: Task) -> str:
    """The whole specification, every field said: what decides which episodes are drawn."""
    fields = {field.name: getattr(task, field.name) for field in dataclasses.fields(task)}
    said = (f"{key}={'+'.join(map(str, v)) if isinstance(v, tuple) else v}" for key, v in fields.items())
    return f"{task.name}:{','.join(said)}"
