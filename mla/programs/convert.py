"""Turns a trained model into one of another mechanism that computes the same, as a run of its own.

    mla convert --workdir=runs/mha --as_mechanism=slim --out=runs/slim
    mla eval --workdir=runs/slim
    mla train --workdir=runs/slim --config.steps=300

OUT receives config.json, environment.json, the tokenizer, conversion.json (what was converted, and how well conditioned it
was) and one checkpoint, at the step the run had reached. It can be evaluated, trained for longer and converted again. A
folder that holds anything is refused, and nothing is left where the conversion fails. In a checkout: python -m mla convert.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from absl import flags

from mla import commands
from mla.interop.convert import convert, known

WORKDIR = commands.define_workdir("folder of a training run")
CONFIG = commands.define_config_from_workdir(WORKDIR, only=("mesh",))
AS_MECHANISM = flags.DEFINE_string("as_mechanism", None, f"what to turn the model into: {known()}", required=True)
OUT = commands.define_path("out", None, "folder of the new run; must not be there or be empty", required=True)


def main() -> None:
    convert(WORKDIR.value, AS_MECHANISM.value, OUT.value, CONFIG.value)


def run(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs the program on a command line, by default that of this process, and exits with its status."""
    commands.run(main, CONFIG, argv=argv)
