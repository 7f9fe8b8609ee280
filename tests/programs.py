"""The command `mla` in the process of a test."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from absl import flags

from mla import commands
from mla.__main__ import PROGRAMS, run


@dataclasses.dataclass
class Outcome:
    """The exit status of a program and what it said."""

    status: int
    out: str
    err: str


@contextlib.contextmanager
def no_flags() -> Iterator[None]:
    """Inside, no program has been imported and no flags but those of libraries are defined, as in a new process."""
    programs = [f"mla.programs.{name}" for name in PROGRAMS]

    def take() -> tuple[list[tuple[str, Any]], dict[str, Any]]:
        defined = [(module, flag) for module, found in commands._own_flags().items() for flag in found]
        for name in {flag.name for _, flag in defined if flag.name in flags.FLAGS}:
            delattr(flags.FLAGS, name)
        for module, _ in defined:  # also keeps what another program's flag of that name has replaced
            flags.FLAGS.flags_by_module_dict().pop(module, None)
        return defined, {name: sys.modules.pop(name) for name in programs if name in sys.modules}

    defined, modules = take()
    try:
        yield
    finally:
        take()
        sys.modules.update(modules)
        for module, flag in defined:
            flags.FLAGS[flag.name] = flag
            flags.FLAGS.register_flag_by_module(module, flag)


def status(*arguments: object) -> int:
    """The exit status of `mla NAME --flag=value ...`."""
    before = sys.unraisablehook
    try:
        with no_flags(), pytest.raises(SystemExit) as ended:
            run(["mla", *map(str, arguments)])
    finally:
        sys.unraisablehook = before
    return int(ended.value.code or 0)
