"""What a coded cache costs in time: decode steps of one model with its cache as fp32, bf16, fp8, int8 and int4, in turn.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python benchmarks/cache_speed.py [--out=FILE.json] [--quick]

Random weights, 4,096 cached tokens, on the CPU. All sides of a row are compiled and filled first; then they take turns, a
slice of steps each, so that a drift of the machine meets them all: read the ratios, not the milliseconds. Codecs run where
decoding reads the cache, so a ratio is the cost of reading fewer bytes and turning them back into numbers. Some minutes
on two cores; `--quick` takes seconds and says nothing about speed.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from sides import cores, out_file
from train_speed import busy, cpu_model

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

MECHANISMS = ("mha", "gqa", "mla")
CODECS = ("none", "bf16", "fp8", "int8", "int4")  # none: fp32
ROUNDS = 5  # that count: the quietest of at most three times as many
QUIET = 0.1  # share of the cores that other processes may take during a round that counts
CHUNK = 256  # tokens of the prompt at once


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model, and what is measured on it."""

    d_model: int
    layers: int
    heads: int
    latent: tuple[int, int]  # MLA's kv_lora_rank and qk_rope_head_dim
    cached: int = 4096  # tokens in the cache when the first slice begins
    steps: int = 8  # of a slice
    batches: tuple[int, ...] = (1,)
    vocabulary: int = 257


SHAPES = (Shape(128, 4, 4, (64, 16)), Shape(256, 6, 8, (128, 32)))
QUICK = (Shape(16, 1, 2, (8, 4), cached=32, steps=2, vocabulary=17),)


class Side:
    """One model whose cache is stored by one codec, filled and compiled."""

    def __init__(self, shape: Shape, mechanism: str, batch: int, codec: str, rounds: int):
        import jax

        from mla import config as configs
        from mla import model as models
        from mla.cache.meter import content_bytes
        from mla.cache.plan import CachePlan
        from mla.evaluation.decoding import Decoder, positions
        from mla.evaluation.speed import greedy
        from mla.sharding import make_mesh

        latent = dict(zip(("kv_lora_rank", "qk_rope_head_dim"), shape.latent, strict=True))
        config = configs.create(
            mechanism,
            {"gqa": {"num_kv_heads": shape.heads // 2}, "mla": latent}.get(mechanism, {}),
            model={"d_model": shape.d_model, "num_layers": shape.layers, "num_heads": shape.heads},
        )
        model = models.create(config, shape.vocabulary)
        self.steps, capacity = shape.steps, shape.cached + (rounds + 1) * shape.steps
        decoder = Decoder(model, batch, capacity, make_mesh(config.mesh), CachePlan(codec))
        self.step, self.cache = decoder.compiled(greedy), decoder.empty()
        self.bytes = content_bytes(self.cache) * shape.cached // capacity
        prompt = np.random.default_rng(0).integers(0, shape.vocabulary, (batch, shape.cached), dtype=np.int32)
        for start in range(0, shape.cached, CHUNK):
            stop = min(start + CHUNK, shape.cached)
            self.following, self.cache = self.step(self.cache, prompt[:, start:stop], positions(batch, start, stop))
        jax.block_until_ready(self.following)
        self.slice()  # compiles

    def slice(self) -> float:
        """Milliseconds of a decode step, the mean of a slice."""
        import jax

        start = time.perf_counter()
        for _ in range(self.steps):
            self.following, self.cache = self.step(self.cache, *self.following)
        jax.block_until_ready(self.following)
        return (time.perf_counter() - start) / self.steps * 1e3


def compare(shape: Shape, mechanism: str, batch: int, rounds: int) -> dict[str, Any]:
    """One row: medians of each codec over the rounds that count, and their ratios."""
    sides = {codec: Side(shape, mechanism, batch, codec, 3 * rounds) for codec in CODECS}
    found: list[tuple[float, dict[str, float]]] = []
    while len(found) < 3 * rounds and sum(others < QUIET for others, _ in found) < rounds:
        start, before, own = time.perf_counter(), busy(), time.process_time()
        times = {codec: side.slice() for codec, side in sides.items()}
        others = busy() - before - (time.process_time() - own)
        found.append((max(0.0, others) / (time.perf_counter() - start) / cores(), times))
    used = sorted(found, key=lambda item: item[0])[:rounds]
    medians = {codec: statistics.median(times[codec] for _, times in used) for codec in CODECS}
    return {
        "d_model": shape.d_model,
        "layers": shape.layers,
        "mechanism": mechanism,
        "batch": batch,
        "cached": shape.cached,
        "others": statistics.median(others for others, _ in used),
        "codecs": {
            codec: {
                "milliseconds": median,
                "low": min(times[codec] for _, times in used),
                "high": max(times[codec] for _, times in used),
                "against_none": median / medians["none"],
                "against_bf16": median / medians["bf16"],
                "cache_bytes": sides[codec].bytes,
            }
            for codec, median in medians.items()
        },
    }


def environment() -> dict[str, Any]:
    """Where the numbers come from."""
    return {
        # Where huge pages are not asked for, temporaries of megabytes fault in anew every step.
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
        "command": shlex.join(["python", *sys.argv]),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")},
        "cpu": cpu_model(),
        "cores": cores(),
    }


def main() -> None:
    """Measures every shape, mechanism and batch, printed as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=out_file, help="JSON file for the numbers")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to try the program")
    options = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    shapes, rounds = (QUICK, 1) if options.quick else (SHAPES, ROUNDS)
    where, rows = environment(), []
    heads = " | ".join(f"{codec}, ms (/ none, / bf16)" for codec in CODECS[2:])
    print(f"| | none, ms | bf16, ms (/ none) | {heads} | cores taken by others |\n|{'---|' * (len(CODECS) + 2)}")
    for shape in shapes:
        for batch in shape.batches:
            for mechanism in MECHANISMS:
                row = compare(shape, mechanism, batch, rounds)
                rows.append(row)
                none, bf16, *rest = row["codecs"].values()
                cells = [f"d {shape.d_model}, {shape.layers} layers, {mechanism}, B {batch}", f"{none['milliseconds']:.2f}"]
                cells.append(f"{bf16['milliseconds']:.2f} ({bf16['against_none']:.2f})")
                for cell in rest:
                    cells.append(f"{cell['milliseconds']:.2f} ({cell['against_none']:.2f}, {cell['against_bf16']:.2f})")
                print(f"| {' | '.join(cells)} | {row['others']:.0%} |", flush=True)
    print("", *(f"{key}: {value}" for key, value in where.items()), f"shapes: {shapes}", sep="\n")
    print(f"Medians of {rounds} slices of {shapes[0].steps} steps.")
    if options.out:
        found = {
            "environment": where,
            "shapes": [dataclasses.asdict(shape) for shape in shapes],
            "rounds": rounds,
            "rows": rows,
        }
        options.out.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
