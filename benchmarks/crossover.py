"""When MLA attends in its expanded form and when in its absorbed one: new tokens against cached ones, by FLOPs and by time.

    python benchmarks/crossover.py [--out=results/crossover] [--quick]

One layer of a model of the 124M class, d_model 768, 12 heads, kv_lora_rank 256, qk_rope_head_dim 32, batch 1, fp32: so many
new tokens after so many that are in the cache. FLOPs are by the formulas behind `mla.flops`, all products of the layer, and
beside them those of multi-head attention, which has neither latents nor up-projections. Times are medians of slices in
which both forms work in turn, in one process with all cores. `auto` takes the form that has fewer FLOPs, in products with
entries alone. About three minutes on two cores; `--quick` takes seconds and says nothing about speed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

FORMS = ("expanded", "absorbed")


@dataclass(frozen=True)
class Sizes:
    """What is run. Lists are of tokens."""

    d_model: int = 768
    heads: int = 12
    rank: int = 256
    rope: int = 32
    new: tuple[int, ...] = (1, 4, 16, 64, 256, 1024)
    cached: tuple[int, ...] = (256, 1024, 4096, 16384)
    slices: int = 5


QUICK = Sizes(d_model=48, heads=4, rank=16, rope=4, new=(1, 8), cached=(16, 32), slices=1)


class Layer:
    """One layer with a form of attention chosen."""

    def __init__(self, name: str, settings: dict[str, Any], sizes: Sizes):
        from flax import nnx

        from mla.attention.contract import Surroundings, mechanism
        from mla.config import build
        from mla.model import parameters

        config, mixer = mechanism(name)
        built = build(config, settings, "config.model.mechanism")
        around = Surroundings(sizes.d_model, sizes.heads, context=max(sizes.cached), platform="cpu")
        built.validate(around)
        self.mixer = mixer(built, around, rngs=nnx.Rngs(0))
        self.graph, self.params = nnx.graphdef(self.mixer), parameters(self.mixer)

    def program(self, new: int, cached: int) -> Any:
        """A function without arguments that has `new` tokens look at a cache of `cached` and themselves."""
        import jax
        import jax.numpy as jnp

        from mla.model import with_parameters

        def step(params: Any, x: Any, cache: Any) -> Any:
            at = jnp.arange(cached, cached + new, dtype=jnp.int32)[None]
            return with_parameters(self.graph, params).extend(x, at, cache)[0]

        x = jax.random.normal(jax.random.key(1), (1, new, self.mixer.around.d_model))
        cache = self.mixer.init_cache(1, cached + new, jnp.float32)
        text = jax.random.normal(jax.random.key(0), (1, cached, self.mixer.around.d_model))
        fill = jax.jit(lambda x, cache: self.mixer.remember(x, jnp.arange(cached, dtype=jnp.int32)[None], cache)[1])
        cache = fill(text, cache)
        run = jax.jit(step).lower(self.params, x, cache).compile()
        return lambda: run(self.params, x, cache).block_until_ready()


def flops(layer: Any, new: int, cached: int, form: int | None = None) -> float:
    """FLOPs of the layer for all new tokens; of a form, for a mechanism with two."""
    mixer, entries = layer.mixer, cached + new
    if form is None:
        return new * (mixer.matrix_flops() + mixer.pair_flops() * entries)
    return new * mixer.matrix_flops() + mixer.costs()[form].total(new, entries)


def measure(layers: dict[str, Layer], new: int, cached: int, slices: int) -> dict[str, float]:
    """Milliseconds of each form."""
    programs = {form: layer.program(new, cached) for form, layer in layers.items()}
    times: dict[str, list[float]] = {form: [] for form in programs}
    for run in programs.values():
        run()
    for _ in range(slices):
        for form, run in programs.items():
            start, turns = time.perf_counter(), 0
            while turns < 2 or time.perf_counter() - start < 0.1:
                run()
                turns += 1
            times[form].append((time.perf_counter() - start) / turns)
    return {form: 1e3 * statistics.median(seconds) for form, seconds in times.items()}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Three panels over new and cached tokens: expanded over absorbed in FLOPs and in time, and MLA over MHA in FLOPs."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    table = {(row["new"], row["cached"]): row for row in rows}
    new, cached = sorted({row["new"] for row in rows}), sorted({row["cached"] for row in rows})
    figure = Figure(figsize=(13, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    titles = {
        "flops_ratio": "FLOPs: expanded over absorbed",
        "time_ratio": "time: expanded over absorbed",
        "overhead": "FLOPs: MLA's cheaper form over MHA",
    }
    for axes, (field, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
        cells = np.array([[table[n, c][field] for n in new] for c in cached])
        axes.imshow(cells, origin="lower", aspect="auto", cmap="RdBu_r", norm=LogNorm(1 / 16, 16))
        for (i, j), value in np.ndenumerate(cells):
            mark = f"\n{table[new[j], cached[i]]['auto'][0].upper()}" if field == "time_ratio" else ""
            colour = "white" if max(value, 1 / value) > 6 else "black"
            axes.text(j, i, f"{value:.2f}{mark}", ha="center", va="center", fontsize=8, color=colour)
        axes.set_xticks(range(len(new)), [f"{n:,}" for n in new])
        axes.set_yticks(range(len(cached)), [f"{c:,}" for c in cached])
        axes.set(title=title, xlabel="new tokens", ylabel="cached tokens")
    figure.supxlabel("red: the absorbed form (or MHA) is cheaper; blue: the other.  A, E: what auto takes", fontsize=9)
    figure.savefig(path, dpi=110)


def main() -> int:
    """Measures every cell, prints a row each and writes results.json and crossover.png into --out."""
    from recurrence_speed import environment
    from train_speed import MALLOC

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for results.json and crossover.png; made if it is not there")
    parser.add_argument("--quick", action="store_true", help="a tiny layer, to try the program")
    options = parser.parse_args()
    sizes = QUICK if options.quick else Sizes()
    os.environ["JAX_PLATFORMS"] = "cpu"
    if os.environ.get("GLIBC_TUNABLES") != MALLOC:  # huge pages: glibc reads it before Python starts
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"GLIBC_TUNABLES": MALLOC})
    settings = {"kv_lora_rank": sizes.rank, "qk_rope_head_dim": sizes.rope}
    layers = {form: Layer("mla", settings | {"attend": form}, sizes) for form in FORMS}
    auto, dense = Layer("mla", settings, sizes), Layer("mha", {}, sizes)
    print(
        "| new | cached | expanded, ms | absorbed, ms | time ratio | FLOPs ratio | auto | over MHA's FLOPs |\n|" + "---|" * 8
    )
    rows = []
    for cached in sizes.cached:
        for new in sizes.new:
            counts = {form: flops(auto, new, cached, number) for number, form in enumerate(FORMS)}
            row: dict[str, Any] = {"new": new, "cached": cached, "flops": counts}
            row["ms"] = measure(layers, new, cached, sizes.slices)
            row["auto"] = FORMS[auto.mixer.absorbs(new, cached + new)]
            row["flops_ratio"] = counts["expanded"] / counts["absorbed"]
            row["time_ratio"] = row["ms"]["expanded"] / row["ms"]["absorbed"]
            row["overhead"] = min(counts.values()) / flops(dense, new, cached)
            rows.append(row)
            print(
                f"| {new:,} | {cached:,} | {row['ms']['expanded']:.2f} | {row['ms']['absorbed']:.2f} |"
                f" {row['time_ratio']:.2f} | {row['flops_ratio']:.2f} | {row['auto']} | {row['overhead']:.2f} |",
                flush=True,
            )
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        written = {"environment": environment(), "layer": settings | {"d_model": sizes.d_model, "heads": sizes.heads}}
        text = json.dumps(written | {"rows": rows}, indent=1, allow_nan=False) + "\n"
        (options.out / "results.json").write_text(text, encoding="utf-8")
        draw(rows, options.out / "crossover.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
