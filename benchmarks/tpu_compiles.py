"""Whether the steps of every mechanism compile for a TPU, on two meshes: what `make tpu` runs.

    python benchmarks/tpu_compiles.py [--mechanisms=NAME,NAME] [--jobs=2] [--out=FILE]

Two layers of configs/quick.py at its widths over short texts, for a v5e slice of 2x2: parameters split over four chips
(fsdp), and heads over four (tensor). Each of train, prefill and decode is a cell, seconds of its compilation or what was
wrong; after them stand the kernels of the training step. Exit status 1 if something did not compile. About eleven minutes
on two cores of an AMD EPYC.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

TOPOLOGY, VOCAB = "v5e:2x2", 257
MESHES = {"fsdp": {"data": 1, "fsdp": 4, "tensor": 1}, "tensor": {"data": 1, "fsdp": 1, "tensor": 4}}
STEPS = ("train", "prefill", "decode")
SHORT = {"context": 128, "batch_size": 4, "model.num_layers": 2, "eval.decode_batch": 4, "loss_chunk_tokens": 256}


def compiled(name: str, mesh: str) -> dict[str, Any]:
    """Figures of the steps of one mechanism on a mesh, or the error of the one that did not compile."""
    from mla.commands import load_config, override, quieten
    from mla.compilation import figures, targets
    from mla.compilation.programs import PROGRAMS, formula
    from mla.sharding import make_mesh

    quieten()
    targets.prepare()
    chip = targets.chip(TOPOLOGY)
    fields = SHORT | {f"mesh.{axis}": size for axis, size in MESHES[mesh].items()}
    config = override(
        load_config(f"configs/quick.py:{name}"), [f"--config.{field}={size}" for field, size in fields.items()]
    )
    on = make_mesh(config.mesh, targets.devices(TOPOLOGY))
    row: dict[str, Any] = {"mechanism": name, "mesh": mesh, "steps": {}}
    for step in STEPS:
        try:
            program, arguments = PROGRAMS[step](config, VOCAB, on)
            expected = formula(step, config, VOCAB)
            # Whether it compiles is asked, not how well.
            made = figures.compiled(step, program, arguments, on.size, expected, level="O0")
            row["steps"][step] = figures.as_json(made, chip)
        except Exception as error:
            row["steps"][step] = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
    return row


def main() -> int:
    """Compiles all, prints a line for each mechanism and mesh as it is done; 1 if something failed."""
    from mla.attention.contract import REGISTRY

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mechanisms", default=",".join(REGISTRY), help="some of them")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    names = options.mechanisms.split(",")
    if unknown := [name for name in names if name not in REGISTRY]:
        print(f"error: --mechanisms: {unknown[0]!r} is not one of {', '.join(REGISTRY)}", file=sys.stderr)
        return 1
    print(
        f"| | mesh | {' | '.join(f'{step}, s' for step in STEPS)} | kernels |\n|---|---|{'---:|' * len(STEPS)}---|",
        flush=True,
    )
    points, rows, failed = [(name, mesh) for name in names for mesh in MESHES], [], []
    spawned = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(options.jobs, mp_context=spawned) as pool:
        for row in pool.map(compiled, *zip(*points, strict=True)):
            cells = [f"{cell['compile_seconds']:.1f}" if "error" not in cell else "failed" for cell in row["steps"].values()]
            kernels = sorted({name.partition("_")[0] for name in row["steps"]["train"].get("kernels", ())})
            print(f"| {row['mechanism']} | {row['mesh']} | {' | '.join(cells)} | {', '.join(kernels)} |", flush=True)
            rows.append(row)
            for step, cell in row["steps"].items():
                if "error" in cell:
                    failed.append(f"{row['mechanism']}, {row['mesh']}, {step}: {' '.join(cell['error'].split())}")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        written = {"topology": TOPOLOGY, "fields": SHORT, "rows": rows}
        options.out.write_text(json.dumps(written, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    for line in failed:
        print(f"error: {line}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
