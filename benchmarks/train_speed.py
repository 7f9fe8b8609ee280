"""Training and decoding speed beside `transformers`: same architecture, weights, batch, optimizer and CPU, in one run.

    python benchmarks/train_speed.py [--out=FILE.json] [--quick]

mha is compared with LlamaForCausalLM, mla with DeepseekV3ForCausalLM without experts. Each side is a process of its own, kept
alive, with all cores and with huge pages for malloc. They work in turn, a slice each, so that a drift of the machine meets
both: read the ratio, not the tokens per second. That both compute the same is measured first: parameters, the losses of the
first steps from the same weights, greedy tokens. About seven minutes on two cores; `--quick` takes seconds and says nothing
about speed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import platform
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sides import QUICK, RIVALS, Ours, Shape, Theirs, cores

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

MALLOC = "glibc.malloc.hugetlb=1"
SLICES = 7
COMPARED = 3  # steps whose losses are compared; they warm up as well


class Process:
    """One side in a process of its own, which waits between calls."""

    side: Any = None  # in that process

    def __init__(self, kind: type, *arguments: Any):
        self.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _make, (kind, *arguments))

    def __call__(self, method: str, *arguments: Any) -> Any:
        return self.pool.submit(_call, method, *arguments).result()


def _make(kind: type, *arguments: Any) -> None:
    Process.side = kind(*arguments)


def _call(method: str, *arguments: Any) -> Any:
    return getattr(Process.side, method)(*arguments)


def in_turn(sides: dict[str, Process], slices: int, measure: Callable[[Process], dict[str, float]]) -> dict[str, Any]:
    """Tokens per second of each side, a slice each in turn; of several kinds, a side's fastest. And the ratio of medians."""
    speeds: dict[str, dict[str, list[float]]] = {name: {} for name in sides}
    for _ in range(slices):
        for name, side in sides.items():
            for kind, speed in measure(side).items():
                speeds[name].setdefault(kind, []).append(speed)
    row: dict[str, Any] = {}
    for name, kinds in speeds.items():
        kind, found = max(kinds.items(), key=lambda item: statistics.median(item[1]))
        row[name] = {"median": statistics.median(found), "low": min(found), "high": max(found), "kind": kind}
    return row | {"ratio": row["ours"]["median"] / row["theirs"]["median"]}


def compare(shape: Shape, mechanism: str, slices: int, folder: str) -> dict[str, Any]:
    """Sizes, checks and rows of one mechanism."""
    weights = Path(folder, f"{mechanism}.npz")
    sides = {"ours": Process(Ours, shape, mechanism, weights)}
    width = sides["ours"]("mlp_width")
    sides["theirs"] = Process(Theirs, shape, mechanism, weights, width)
    found: dict[str, Any] = {"mechanism": mechanism, "rival": RIVALS[mechanism], "mlp_width": width, "rows": []}
    found["parameters"] = {name: side("parameters") for name, side in sides.items()}

    # Decoding first: training changes the weights.
    agreeing = []
    for batch in shape.decode_batches:

        def decode(side: Process, batch: int = batch) -> dict[str, float]:
            return {kind: batch * shape.decode_tokens / seconds for kind, (seconds, _) in side("decode", batch).items()}

        ours, *theirs = (tokens for side in sides.values() for _, tokens in side("decode", batch).values())  # compiles
        agreeing += [a == b for other in theirs for a, b in zip(sum(ours, []), sum(other, []), strict=True)]
        found["rows"].append({"task": f"decode, B {batch}", **in_turn(sides, slices, decode)})
    found["greedy_tokens_agreeing"] = statistics.mean(agreeing)

    def train(side: Process) -> dict[str, float]:
        return {"": shape.steps * shape.batch * shape.context / side("train", shape.steps)[0]}

    found["losses"] = {name: side("train", COMPARED)[1] for name, side in sides.items()}
    found["loss_difference"] = max(abs(a - b) for a, b in zip(*found["losses"].values(), strict=True))
    found["rows"].insert(0, {"task": "train", **in_turn(sides, slices, train)})
    for side in sides.values():
        side.pool.shutdown()
    return found


def environment() -> dict[str, Any]:
    """Where the numbers come from."""
    info = Path("/proc/cpuinfo")
    models = (
        [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        if info.exists()
        else []
    )
    return {
        "command": shlex.join(["python", *sys.argv]),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("jax", "flax", "torch", "transformers")},
        "cpu": models[0] if models else platform.processor(),
        "cores": cores(),
        "GLIBC_TUNABLES": os.environ["GLIBC_TUNABLES"],
        "load_before": [round(load, 2) for load in os.getloadavg()],
    }


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: a row a measurement, then what was checked."""
    lines = ["| | | tok/s, ours | transformers | ratio |", "|---|---|---|---|---|"]
    for result in results:
        for row in result["rows"]:
            cells = [f"{row[s]['median']:,.0f} ({row[s]['low']:,.0f} to {row[s]['high']:,.0f})" for s in ("ours", "theirs")]
            cells[1] += f" {row['theirs']['kind']}"
            lines.append(f"| {result['mechanism']} | {row['task']} | {cells[0]} | {cells[1].strip()} | {row['ratio']:.2f} |")
    lines.append("")
    for result in results:
        count = result["parameters"]
        lines.append(
            f"{result['mechanism']}, {result['rival']}: {count['ours']:,} and {count['theirs']:,} parameters, MLP width"
            f" {result['mlp_width']}; losses of the first {COMPARED} steps differ by {result['loss_difference']:.1e};"
            f" {result['greedy_tokens_agreeing']:.1%} of greedy tokens agree"
        )
    return "\n".join(lines)


def main() -> int:
    """Runs everything; 1 if something is missing or the two sides are not the same model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to try the program")
    options = parser.parse_args()
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"error: {' and '.join(missing)} missing: pip install -r requirements-test.txt", file=sys.stderr)
        return 1
    # Inherited by the sides; glibc reads it before Python starts.
    os.environ.update(GLIBC_TUNABLES=MALLOC, JAX_PLATFORMS="cpu", HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
    shape, slices = (QUICK, 2) if options.quick else (Shape(), SLICES)
    where = environment()
    with tempfile.TemporaryDirectory() as folder:
        results = [compare(shape, mechanism, slices, folder) for mechanism in RIVALS]
    print(table(results) + "\n")
    print("\n".join(f"{key}: {value}" for key, value in where.items()))
    print(f"shape: {shape}; {slices} slices of {shape.steps} steps or {shape.decode_tokens} tokens, medians (least to most)")
    if options.out:
        text = json.dumps({"environment": where, "shape": asdict(shape), "slices": slices, "results": results}, indent=1)
        options.out.write_text(text + "\n")
    different = [r["mechanism"] for r in results if r["loss_difference"] > 1e-4 or len(set(r["parameters"].values())) > 1]
    if different:
        print(f"error: not the same model on both sides: {', '.join(different)}", file=sys.stderr)
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
