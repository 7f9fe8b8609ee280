"""Trains one model, or goes on with a run that was stopped.

    python train.py --config=configs/quick.py:mla --workdir=runs/mla [--config.path.to.field=value ...]

The workdir receives config.json, environment.json, metrics.jsonl, TensorBoard events and checkpoints/. The same command
resumes from the last checkpoint, and so does --workdir alone; SIGTERM and Ctrl-C save one first (exit status 143 and 130).
With --config.steps raised it trains the run for longer, from its full state: the learning rate restarts where it was to end
(config.optimizer.restart).

Where the package is installed, `mla train` is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from mla import commands
from mla.training.loop import train

WORKDIR = commands.define_workdir("folder of this run; made if it is not there, resumed if it is")
CONFIG = commands.define_config_file(WORKDIR)


def main() -> int:
    return train(CONFIG.value, WORKDIR.value)


def run(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs the program on a command line, by default that of this process, and exits with its status."""
    commands.run(main, CONFIG, argv=argv)
