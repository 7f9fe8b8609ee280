"""The command `mla`: `mla NAME --flag=value ...` runs one of the programs in mla/programs/."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

import mla
from mla import commands
from mla.errors import UserError

PROGRAMS = {
    "train": "train one model, or go on with a run that was stopped",
    "eval": "evaluate a trained model: loss, cache bytes, decode speed; or print a sample of it",
    "convert": "turn a trained model into one of another mechanism that computes the same",
    "sweep": "train and evaluate every point of a sweep, then table, report and plot",
    "compile": "what the steps of a run would need of a TPU and be bound by, on a machine without one",
    "report": "table, report and plot of runs and sweeps that are finished",
}


def run(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs what a command line asks for, by default that of this process, and exits with its status."""
    name, *rest = list(sys.argv if argv is None else argv)[1:] or [""]
    if name in PROGRAMS:
        importlib.import_module(f"mla.programs.{name}").run([f"mla {name}", *rest])
    commands.run(lambda: _other(name), argv=["mla"])


def _other(name: str) -> None:
    """Answers what is no program. Raises UserError where that is nothing at all."""
    if name in commands.HELP:
        print("usage: mla NAME --flag=value ...        mla NAME --help lists the flags of one\n")
        print("\n".join(f"  {program:8}{told}" for program, told in PROGRAMS.items()))
    elif name == "--version":
        print(f"mla {mla.__version__}")
    elif not name:
        raise UserError(f"a command is missing: mla {'|'.join(PROGRAMS)} --flag=value ...")
    else:
        near = difflib.get_close_matches(name, PROGRAMS, 1, cutoff=0.0)
        raise UserError(f"{name!r} is no command of mla; did you mean {near[0]!r}? known: {', '.join(PROGRAMS)}")


if __name__ == "__main__":
    run()
