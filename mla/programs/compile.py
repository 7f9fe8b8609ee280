"""Compiles the steps of a run for a TPU topology, on a machine without one, and says what they need and what bounds them.

    python -m mla.compile --config=configs/small.py:mla --topology=v5e:2x2 [--config.mesh.fsdp=4 ...]
    mla compile --config=configs/small.py:mla --topology=v5p:2x2x1 --steps=train --out=plan.json

For each of train, prefill and decode, per device: memory (peak, arguments, temporaries), FLOPs, bytes, collectives by kind,
compile time, and the least time a step takes by the chip's published limits. Nothing runs and no data is read: a vocabulary
of bpe:N is taken to have N ids. Prefill and decode are of config.eval.decode_batch sequences, a multiple of mesh.data x
mesh.fsdp, with a cache for the evaluated context and a token more. Needs libtpu (pip install 'jax[tpu]').

For GPUs, such as --topology=h100:8, programs are lowered and not compiled, which needs no GPU: memory is that of arguments
alone, and what devices exchange is not known.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import flags

from mla import commands
from mla import config as configs
from mla.compilation import figures, targets
from mla.compilation.programs import PROGRAMS, formula
from mla.data import tokenizers
from mla.errors import UserError, nearest
from mla.model import sizes
from mla.sharding import AXES, abstract_mesh, make_mesh
from mla.workdir import environment, write_json

WORKDIR = commands.define_workdir("folder of a run whose config to take, where --config is not given", required=False)
CONFIG = commands.define_config_file(WORKDIR)
TOPOLOGY = flags.DEFINE_string("topology", "v5e:2x2", "of TPUs, such as v5e:4x4 or v5p:2x2x2; or of GPUs, such as h100:8")
STEPS = flags.DEFINE_string("steps", ",".join(PROGRAMS), "which of them, separated by commas")
LEVEL = flags.DEFINE_enum(
    "level", "UNKNOWN", list(figures.LEVELS), "of optimisation; O0 and O1 compile several times as fast"
)
OUT = commands.define_path("out", "", "JSON file for the figures; its folder is made if it is not there")


def main() -> None:
    names = STEPS.value.split(",")
    for name in names:
        if name not in PROGRAMS:
            raise UserError(f"--steps: {name!r}: {nearest(name, PROGRAMS)}")
    targets.prepare()
    config, chip = CONFIG.value, targets.chip(TOPOLOGY.value)
    count, kind = targets.gpus(TOPOLOGY.value), TOPOLOGY.value.partition(":")[0]
    mesh: Any = abstract_mesh(config.mesh, count, kind) if count else None
    mesh = mesh or make_mesh(config.mesh, targets.devices(TOPOLOGY.value))
    tokenizer = tokenizers.parse(config.data.tokenizer, config.data.end_token)
    vocab_size = tokenizer if isinstance(tokenizer, int) else tokenizer.vocab_size
    size = sizes(config, vocab_size)
    axes = " ".join(f"{axis}={mesh.shape[axis]}" for axis in AXES)
    print(
        f"{config.name}: {size.total:,} parameters, {vocab_size:,} ids, {configs.describe(config.model)};"
        f" {TOPOLOGY.value}, mesh {axes}; train {config.batch_size} x {config.context} tokens, decode"
        f" {config.eval.decode_batch} x {config.evaluated_context}"
    )
    results = []
    for name in names:
        program, arguments = PROGRAMS[name](config, vocab_size, mesh)
        expected = formula(name, config, vocab_size)
        given = (name, program, arguments, mesh.size, expected)
        results.append(figures.lowered(*given) if count else figures.compiled(*given, LEVEL.value))
        print(figures.said(results[-1], chip), flush=True)
    if OUT.value:
        plan = {
            "config": configs.to_dict(config),
            "topology": TOPOLOGY.value,
            "mesh": dict(mesh.shape),
            "level": LEVEL.value,
            "parameters": size.total,
            "vocab_size": vocab_size,
            "steps": [figures.as_json(result, chip) for result in results],
            "environment": environment(),
        }
        Path(OUT.value).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(OUT.value), plan)


def run(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs the program on a command line, by default that of this process, and exits with its status."""
    commands.run(main, CONFIG, argv=argv)
