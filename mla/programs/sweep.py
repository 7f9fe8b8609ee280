"""Trains and evaluates every point of a sweep, each in a process of its own, and draws quality against cache bytes.

    python sweep.py --config=configs/sweeps/compare.py[:VARIANT] --workdir=DIR [--emit=shell]

Finished points are skipped, so the same command goes on after an interruption. DIR receives a folder a point, results.jsonl,
report.md and frontier.png. With --emit=shell the commands of unfinished points are printed instead, one point a line, for
a job scheduler; when they are done, run this command without it for the report.

Where the package is installed, `mla sweep` is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from absl import flags

from mla import commands
from mla.errors import UserError
from mla.sweep.loop import emit, sweep

CONFIG_HELP = "sweep config, FILE[:VARIANT], for example configs/sweeps/compare.py"
CONFIG = flags.DEFINE_string("config", None, CONFIG_HELP, allow_override=True)
WORKDIR = commands.define_workdir("folder of this sweep; made if it is not there, continued if it is")
EMIT = flags.DEFINE_enum("emit", "", ["", "shell"], "print the commands of unfinished points instead of running them")


def main() -> int:
    if not CONFIG.value:
        raise UserError(f"--config is missing: {CONFIG_HELP}")
    return (emit if EMIT.value else sweep)(CONFIG.value, WORKDIR.value)


def run(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs the program on a command line, by default that of this process, and exits with its status."""
    commands.run(main, argv=argv)
