"""Trains and evaluates every point of a sweep, each in a process of its own, and draws quality against cache bytes.

    python sweep.py --config=configs/sweeps/compare.py[:VARIANT] --workdir=DIR [--engine=local|submitit|ray|print] [--jobs=N]

Finished points are skipped, so the same command goes on after an interruption. DIR receives a folder a point, results.jsonl,
report.md and frontier.png. --engine says where the points run: local processes (--jobs=N at once, which share the cores),
jobs of Slurm (submitit), tasks of Ray; print only shows their commands, one point a line, for another job scheduler: when
they are done, run this command without it for the report. --status says what is done and what runs where, of a sweep that
is running or not: it may be asked from any machine that sees DIR.

Where the package is installed, `mla sweep` is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from absl import flags

from mla import commands
from mla.errors import UserError
from mla.sweep.executors import REGISTRY
from mla.sweep.loop import sweep
from mla.sweep.status import status

CONFIG_HELP = "sweep config, FILE[:VARIANT], for example configs/sweeps/compare.py"
CONFIG = flags.DEFINE_string("config", None, CONFIG_HELP, allow_override=True)
WORKDIR = commands.define_workdir("folder of this sweep; made if it is not there, continued if it is")
ENGINE = flags.DEFINE_enum("engine", "local", list(REGISTRY), "where the points run; print: only show their commands")
JOBS = flags.DEFINE_integer("jobs", None, "points that run at once; by default one of local processes, and all elsewhere")
SETTINGS = flags.DEFINE_string("engine_settings", "", "of the engine, KEY=VALUE,..: timeout_min=600,slurm_partition=gpu")


STATUS = flags.DEFINE_bool("status", False, "only say how each run stands: done, running where and since when, or waiting")


def main() -> int:
    if not CONFIG.value:
        raise UserError(f"--config is missing: {CONFIG_HELP}")
    if STATUS.value:
        return status(CONFIG.value, WORKDIR.value)
    return sweep(CONFIG.value, WORKDIR.value, engine=ENGINE.value, jobs=JOBS.value, settings=SETTINGS.value)


def run(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs the program on a command line, by default that of this process, and exits with its status."""
    commands.run(main, argv=argv)
