"""Training and decoding speed beside `transformers`: same architecture, weights, batch, optimizer and CPU, in one run.

    python benchmarks/train_speed.py [--out=FILE.json] [--quick]

mha is compared with LlamaForCausalLM, mla with DeepseekV3ForCausalLM without experts. Each side is a process of its own,
kept alive, with all cores and with huge pages for malloc. They work in turn, a slice each, so that a drift of the machine
meets both: read the ratio, not the tokens per second. That both compute the same is measured first: parameters, the losses
of the first steps from the same weights, greedy tokens. About seven minutes on two cores; `--quick` takes seconds and says
nothing about speed.
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
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from sides import QUICK, RIVALS, Ours, Shape, Theirs, cores, out_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

MALLOC = "glibc.malloc.hugetlb=1"
SLICES = 7  # of each measurement
QUIET = 0.1  # share of the cores that other processes may take during a slice that counts
COMPARED = 3  # steps whose losses are compared; they warm up as well


class Process:
    """One side in a process of its own, which waits between calls."""

    side: Any = None  # in that process

    def __init__(self, kind: type):
        self.kind, self.disturbance = kind, 0.0
        self.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        self.ready = self.pool.submit(kind.imports)

    def prepare(self, *arguments: Any) -> None:
        """Makes `side` there."""
        self.pool.submit(_prepare, self.kind, *arguments).result()

    def __call__(self, method: str, *arguments: Any) -> Any:
        """A method of `side`; `disturbance` is then the share of the cores that everybody else took meanwhile."""
        start, before = time.perf_counter(), busy()
        result, own = self.pool.submit(_call, method, *arguments).result()
        self.disturbance = max(0.0, busy() - before - own) / (time.perf_counter() - start) / cores()
        return result


def _prepare(kind: type, *arguments: Any) -> None:
    Process.side = None
    Process.side = kind(*arguments)


def _call(method: str, *arguments: Any) -> tuple[Any, float]:
    start = time.process_time()
    return getattr(Process.side, method)(*arguments), time.process_time() - start


def busy() -> float:
    """Seconds of work of all cores since the machine started, where the system says so."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _, _, *interrupts = map(int, stat.read_text().split("\n", 1)[0].split()[1:9])
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


def in_turn(sides: dict[str, Process], slices: int, measure: Callable[[Process], dict[str, float]]) -> dict[str, Any]:
    """Tokens per second of each side, slice by slice in turn (of several kinds, a side's fastest), and the ratio of medians.

    Until there are `slices` quiet rounds, in which neither side was disturbed; after three times as many, the quietest
    count.
    """
    rounds: list[tuple[float, dict[str, dict[str, float]]]] = []
    while len(rounds) < 3 * slices and sum(disturbance < QUIET for disturbance, _ in rounds) < slices:
        speeds = {name: measure(side) for name, side in sides.items()}
        rounds.append((max(side.disturbance for side in sides.values()), speeds))
    used = sorted(rounds, key=lambda item: item[0])[:slices]
    row: dict[str, Any] = {"others": statistics.median(disturbance for disturbance, _ in used)}
    for name in sides:
        by_kind = {kind: [speeds[name][kind] for _, speeds in used] for kind in used[0][1][name]}
        kind, found = max(by_kind.items(), key=lambda item: statistics.median(item[1]))
        row[name] = {"median": statistics.median(found), "low": min(found), "high": max(found), "kind": kind}
    return row | {"ratio": row["ours"]["median"] / row["theirs"]["median"]}


def compare(sides: dict[str, Process], shape: Shape, mechanism: str, slices: int, weights: Path) -> dict[str, Any]:
    """Sizes, checks and rows of one mechanism, printed as they come."""
    sides["ours"].prepare(shape, mechanism, weights)
    width = sides["ours"]("mlp_width")
    sides["theirs"].prepare(shape, mechanism, weights, width)
    found: dict[str, Any] = {"mechanism": mechanism, "rival": RIVALS[mechanism], "mlp_width": width, "rows": []}
    found["parameters"] = {name: side("parameters") for name, side in sides.items()}

    def row(task: str, measure: Callable[[Process], dict[str, float]]) -> None:
        row = {"task": task, **in_turn(sides, slices, measure)}
        found["rows"].append(row)
        cells = [f"{row[s]['median']:,.0f} ({row[s]['low']:,.0f} to {row[s]['high']:,.0f})" for s in ("ours", "theirs")]
        cells = [f"{mechanism} {task}", *cells, row["theirs"]["kind"], f"**{row['ratio']:.2f}**", f"{row['others']:.0%}"]
        print(f"| {' | '.join(cells)} |", flush=True)

    # Decoding first: training changes the weights.
    agreeing = []
    for batch in shape.decode_batches:

        def decode(side: Process, batch: int = batch) -> dict[str, float]:
            return {kind: batch * shape.decode_tokens / seconds for kind, (seconds, _) in side("decode", batch).items()}

        ours, *theirs = (np.array(tokens) for side in sides.values() for _, tokens in side("decode", batch).values())
        agreeing += [float((ours == other).mean()) for other in theirs]
        row(f"decode, B {batch}", decode)

    def train(side: Process) -> dict[str, float]:
        return {"": shape.steps * shape.batch * shape.context / side("train", shape.steps)[0]}

    found["losses"] = {name: side("train", COMPARED)[1] for name, side in sides.items()}
    found["loss_difference"] = max(abs(a - b) for a, b in zip(*found["losses"].values(), strict=True))
    found["greedy_tokens_agreeing"] = statistics.mean(agreeing)
    row("train", train)
    return found


def check(result: dict[str, Any]) -> str:
    """What says that both sides are the same model."""
    count = result["parameters"]
    return (
        f"{result['mechanism']} and {result['rival']}: {count['ours']:,} and {count['theirs']:,} parameters, MLP width"
        f" {result['mlp_width']}; losses of the first {COMPARED} steps within {result['loss_difference']:.1e};"
        f" {result['greedy_tokens_agreeing']:.1%} of greedy tokens agree"
    )


def cpu_model() -> str:
    """What the system calls the processor."""
    info = Path("/proc/cpuinfo")
    named = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return named[0].partition(":")[2].strip() if named else platform.processor() or platform.machine()


def environment() -> dict[str, Any]:
    """Where the numbers come from."""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("jax", "flax", "torch", "transformers")},
        "cpu": cpu_model(),
        "cores": cores(),
        "GLIBC_TUNABLES": os.environ["GLIBC_TUNABLES"],
    }


def main() -> int:
    """Runs everything; 1 if something is missing or the two sides are not the same model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=out_file, help="JSON file for the numbers")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to try the program")
    options = parser.parse_args()
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"error: {' and '.join(missing)} missing: pip install -r requirements-test.txt", file=sys.stderr)
        return 1
    # Inherited by the sides; glibc reads it before Python starts.
    os.environ.update(GLIBC_TUNABLES=MALLOC, JAX_PLATFORMS="cpu", HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
    shape, slices = (QUICK, 1) if options.quick else (Shape(), SLICES)
    where = environment()
    print("| | ours, tok/s | transformers, tok/s | its cache | ratio | cores taken by others |\n|---|---|---|---|---|---|")
    sides = {"ours": Process(Ours), "theirs": Process(Theirs)}
    with tempfile.TemporaryDirectory() as folder:
        results = [compare(sides, shape, name, slices, Path(folder, f"{name}.npz")) for name in RIVALS]
    for side in sides.values():
        side.pool.shutdown()
    print("", *map(check, results), "", *(f"{key}: {value}" for key, value in where.items()), f"shape: {shape}", sep="\n")
    print(f"Medians (least to most) of {slices} slices of {shape.steps} steps or {shape.decode_tokens} tokens a sequence.")
    if options.out:
        found = {"environment": where, "shape": asdict(shape), "slices": slices, "results": results}
        options.out.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    different = [r["mechanism"] for r in results if r["loss_difference"] > 1e-4 or len(set(r["parameters"].values())) > 1]
    if different:
        print(f"error: not the same model on both sides: {', '.join(different)}", file=sys.stderr)
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
