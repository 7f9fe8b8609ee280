"""How the cost of one layer grows with the length of the text, in training and in decoding, for every mechanism.

    python benchmarks/length.py [--out=FOLDER] [--mechanisms=NAME,NAME] [--quick]

A training step is forward and backward of one layer, batch 1, fp32, of small width so that quadratic mechanisms come to an
end; a decode step follows as many cached tokens. The exponent is the slope of log time over log T, fitted to all lengths,
and between the two longest. Times alone: XLA counts the work of a scan's body once. Writes results.json and length.png into
FOLDER; what is there of other mechanisms stays. About 25 minutes for all, on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

LENGTHS, QUICK = (512, 2048, 8192, 16384), (16, 32)
D_MODEL, HEADS, REPEATS, DECODED = 128, 4, 3, 16
ENOUGH = 3.0  # seconds of calls that are timed; longer ones are not repeated
LINEAR = 1.25  # largest exponent of training in the upper row of the picture


def best(run: Any, repeats: int) -> float:
    """Seconds of the fastest of at most `repeats` calls, after one that warms up; see `ENOUGH`."""
    run()
    times: list[float] = []
    while len(times) < repeats and sum(times) < ENOUGH:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def measure(name: str, length: int, repeats: int) -> dict[str, float]:
    """Seconds of a training step of `length` tokens, and of a decode step after as many."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from mla.attention.contract import Surroundings, mechanism
    from mla.model import parameters, with_parameters

    config, mixer = mechanism(name)
    around = Surroundings(D_MODEL, HEADS, context=length, platform="cpu")
    layer = mixer(config(), around, rngs=nnx.Rngs(0))
    graph, params = nnx.graphdef(layer), parameters(layer)
    x = jax.random.normal(jax.random.key(0), (1, length, D_MODEL))
    train = jax.jit(jax.grad(lambda p, x: jnp.sum(with_parameters(graph, p).forward(x).y ** 2), argnums=(0, 1)))
    seconds = best(lambda: jax.block_until_ready(train(params, x)), repeats)

    cache = layer.init_cache(1, length + DECODED * (repeats + 1), jnp.float32)
    extend = jax.jit(lambda p, x, at, cache: with_parameters(graph, p).extend(x, at, cache), donate_argnums=3)
    for start in range(0, length, 512):
        at = jnp.arange(start, min(start + 512, length), dtype=jnp.int32)[None]
        _, cache = extend(params, x[:, start : start + 512], at, cache)
    held = [cache, length]

    def decode() -> None:
        for _ in range(DECODED):
            y, held[0] = extend(params, x[:, :1], jnp.full((1, 1), held[1], jnp.int32), held[0])
            held[1] += 1
        jax.block_until_ready(y)

    return {"tokens": length, "train": seconds, "decode": best(decode, repeats) / DECODED}


def exponents(rows: list[dict[str, float]], task: str) -> dict[str, float]:
    """Slopes of log time over log T: of a fit to all lengths, and between the two longest."""
    tokens, seconds = (np.log([row[key] for row in rows]) for key in ("tokens", task))
    return {
        "fitted": float(np.polyfit(tokens, seconds, 1)[0]),
        "longest": float((seconds[-1] - seconds[-2]) / (tokens[-1] - tokens[-2])),
    }


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Microseconds a token over T, training left, decoding right; the upper row has what trains in about linear time."""
    parts = [[], []]  # type: list[list[dict[str, Any]]]
    for result in sorted(results, key=lambda result: -result["rows"][-1]["train"]):  # in the order of the lines' ends
        parts[result["exponents"]["train"]["fitted"] > LINEAR].append(result)
    rows = [(title, part) for title, part in zip(("about linear in T", "more than linear"), parts, strict=True) if part]
    figure = Figure(figsize=(14, 6 * len(rows)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for (title, part), row in zip(rows, figure.subplots(len(rows), 2, squeeze=False), strict=True):
        for axes, task in zip(row, ("train", "decode"), strict=True):
            for number, result in enumerate(part):
                tokens = [point["tokens"] for point in result["rows"]]
                each = [1e6 * point[task] / (point["tokens"] if task == "train" else 1) for point in result["rows"]]
                label = f"{result['mechanism']} {result['exponents']['train']['fitted']:.2f}"
                axes.loglog(tokens, each, ("-", "--", ":")[number // 10 % 3], marker=".", label=label)
            axes.set(xlabel="tokens T", ylabel="microseconds a token", title=f"{task}, {title}")
            axes.grid(True, color="#DDDDDD", linewidth=0.6)
        row[1].legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1), title="exponent of training")
    figure.savefig(path, format="png")


def main() -> int:
    """Measures every mechanism, printed as they come; 1 if a name is unknown."""
    from recurrence_speed import environment

    from mla.attention.contract import REGISTRY

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for results.json and length.png")
    parser.add_argument("--mechanisms", default=",".join(REGISTRY), help="some of them")
    parser.add_argument("--quick", action="store_true", help="short texts, to try the program")
    options = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("GLIBC_TUNABLES", "")
    results: list[dict[str, Any]] = []
    if options.out and (options.out / "results.json").exists():
        results = json.loads((options.out / "results.json").read_text(encoding="utf-8"))["results"]
    lengths, repeats = (QUICK, 1) if options.quick else (LENGTHS, REPEATS)
    names = options.mechanisms.split(",")
    if unknown := [name for name in names if name not in REGISTRY]:
        print(f"error: --mechanisms: {unknown[0]!r} is not one of {', '.join(REGISTRY)}", file=sys.stderr)
        return 1
    print("| | " + " | ".join(f"train {n}, ms" for n in lengths) + " | exponent | decode exponent |")
    print("|" + "---|" * (len(lengths) + 3))
    for name in names:
        rows = [measure(name, length, repeats) for length in lengths]
        slopes = {task: exponents(rows, task) for task in ("train", "decode")}
        results = [result for result in results if result["mechanism"] != name]
        results.append({"mechanism": name, "rows": rows, "exponents": slopes, "environment": environment()})
        cells = [f"{1e3 * row['train']:,.1f}" for row in rows]
        print(
            f"| {name} | {' | '.join(cells)} | {slopes['train']['fitted']:.2f} | {slopes['decode']['fitted']:.2f} |",
            flush=True,
        )
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            written = {"d_model": D_MODEL, "num_heads": HEADS, "results": sorted(results, key=lambda r: r["mechanism"])}
            path = options.out / "results.json"
            path.write_text(json.dumps(written, indent=1, allow_nan=False) + "\n", encoding="utf-8")
            draw(results, options.out / "length.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
