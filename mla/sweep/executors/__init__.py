"""Where the runs of a sweep run: one small file an executor, chosen by `--engine`.

Adding one is one file with an `Executor` and one line in REGISTRY.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mla.errors import UserError, nearest
from mla.registry import load
from mla.sweep.executors.contract import Executor

# name -> where its class stands.
REGISTRY = {
    "local": "mla.sweep.executors.local:Local",
    "submitit": "mla.sweep.executors.submitit:Submitit",
    "ray": "mla.sweep.executors.ray:Ray",
    "print": "mla.sweep.executors.print:Print",
}


def create(name: str, jobs: int | None, folder: Path, settings: str = "") -> Executor:
    """The executor of a name.

    Args:
      jobs, folder: see `Executor`.
      settings: KEY=VALUE,..; numbers are passed as such.

    Raises:
      UserError: an unknown name or setting, a number of jobs that cannot be, or a package that is not installed.
    """
    if name not in REGISTRY:
        raise UserError(f"--engine: {name!r} is not known; {nearest(name, REGISTRY)}")
    if jobs is not None and jobs < 1:
        raise UserError(f"--jobs: {jobs} is no number of jobs; take 1 or more")
    try:
        (made,) = load(REGISTRY[name])
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise UserError(f"--engine={name}: the package {name} is not installed; run: pip install '.[{name}]'") from error
    executor: Executor = made(jobs, folder, _parsed(settings))
    return executor


def _parsed(settings: str) -> Mapping[str, Any]:
    parsed: dict[str, Any] = {}
    for entry in filter(None, settings.split(",")):
        key, equals, value = entry.partition("=")
        if not equals or not key:
            raise UserError(f"--engine_settings: {entry!r} is not of the form KEY=VALUE")
        number = re.fullmatch(r"-?[0-9]+(\.[0-9]*)?", value)
        parsed[key] = value if number is None else float(value) if number[1] else int(value)
    return parsed
