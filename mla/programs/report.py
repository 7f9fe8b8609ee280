"""Draws quality against cache bytes of runs that are finished: prints the table, writes report.md and frontier.png.

    mla report runs/compare                                     a sweep
    mla report runs/mla runs/mha/eval.json --out=runs/both      several runs; the folder is made if it is not there
    mla report runs/compare --against=mla                       differences from this point, where points have several seeds

Each PATH is the folder of a sweep (its results.jsonl, or else the eval.json of every run in it), the folder of a run (its
eval.json), or such a file. A run is called what its folder is called, NAME-s1 and NAME-s2 being seeds of one point. Nothing
is trained or evaluated, and no results are changed. In a checkout: python -m mla report.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from absl import flags

from mla import commands
from mla.attention.contract import BASELINES
from mla.report.frontier import redraw

PATHS: list[str] = []
OUT = commands.define_path("out", "", "folder for report.md and frontier.png; by default that of a single PATH")
AGAINST = flags.DEFINE_list(
    "against",
    [],
    f"points, name,name, whose losses others are compared with; by default {' and '.join(BASELINES)}, where they are there",
    allow_override=True,
)


def main() -> None:
    redraw(PATHS, OUT.value, AGAINST.value)


def run(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs the program on a command line, by default that of this process, and exits with its status."""
    commands.run(main, argv=argv, arguments=PATHS)
