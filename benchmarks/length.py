"""How the cost of one layer grows with the length of the text, in training and in decoding, for every mechanism.

    python benchmarks/length.py [--out=FOLDER] [--mechanisms=NAME,NAME] [--quick]

A training step is forward and backward of one layer, batch 1, fp32, of small width so that quadratic mechanisms come to an
end; a decode step follows as many cached tokens. The exponent is the slope of log time over log T between the two longest
lengths and from the shortest to the longest. Times alone: XLA counts the work of a scan's body once. Writes results.json
and length.png into FOLDER.
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


def best(run: Any, repeats: int) -> float:
    """Seconds of the fastest of some calls, after one that warms up."""
    run()
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return min(found)


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
    """Microseconds a token over T, training left, decoding right."""
    figure = Figure(figsize=(11, 5), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, task in zip(figure.subplots(1, 2), ("train", "decode"), strict=True):
        for number, result in enumerate(results):
            tokens = [row["tokens"] for row in result["rows"]]
            each = [1e6 * row[task] / (row["tokens"] if task == "train" else 1) for row in result["rows"]]
            style = ("-", "--", ":")[number // 10 % 3]
            axes.loglog(tokens, each, style, marker=".", label=result["mechanism"])
        axes.set(xlabel="tokens", ylabel="microseconds a token", title=task)
        axes.grid(True, color="#DDDDDD", linewidth=0.6)
    axes.legend(fontsize=6.5, frameon=False, ncols=2)
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
    lengths, repeats = (QUICK, 1) if options.quick else (LENGTHS, REPEATS)
    names = options.mechanisms.split(",")
    if unknown := [name for name in names if name not in REGISTRY]:
        print(f"error: --mechanisms: {unknown[0]!r} is not one of {', '.join(REGISTRY)}", file=sys.stderr)
        return 1
    results: list[dict[str, Any]] = []
    print("| | " + " | ".join(f"train {n}, ms" for n in lengths) + " | exponent | decode exponent |")
    print("|" + "---|" * (len(lengths) + 3))
    for name in names:
        rows = [measure(name, length, repeats) for length in lengths]
        slopes = {task: exponents(rows, task) for task in ("train", "decode")}
        results.append({"mechanism": name, "rows": rows, "exponents": slopes})
        cells = [f"{1e3 * row['train']:,.1f}" for row in rows]
        print(
            f"| {name} | {' | '.join(cells)} | {slopes['train']['fitted']:.2f} | {slopes['decode']['fitted']:.2f} |",
            flush=True,
        )
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        found = {"environment": environment(), "d_model": D_MODEL, "num_heads": HEADS, "results": results}
        (options.out / "results.json").write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        draw(results, options.out / "length.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
