"""Decode steps that read few of the entries they hold, beside the dense form of the same mechanism, over lengths of text.

    python benchmarks/sparse_decode.py [--out=FILE.json] [--pairs=NAME,NAME] [--quick]

One layer of a model of the 124M class, d_model 768, fp32, after a text of so many tokens; batch 1 and 8. A slice is some
decode steps through a compiled program that writes its cache in place; the two sides work in turn, in one process with all
cores, so that a drift of the machine meets both: read the ratio. Bytes are those that a step reads of one sequence
(`Mixer.read_bytes`). Said too is the shortest of the lengths from which on the sparse form is faster at all longer ones.
About six minutes on two cores; `--quick` takes seconds and says nothing about speed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sides import out_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

LATENT = {"kv_lora_rank": 256, "qk_rope_head_dim": 32}
VECTORS = {"head_dim": 128, "q_lora_rank": 384, "out_rank": 192}
QUEST = "quest:page=16,pages=8,start=0"


@dataclass(frozen=True)
class Form:
    """A mechanism with its settings, and what a decode step reads of it (`eval.cache.read`)."""

    mechanism: str
    settings: dict[str, Any] = field(default_factory=dict)
    read: str = "none"


# name -> the sparse form, and the dense one that it is measured by
PAIRS = {
    "deepseek_sparse": (Form("deepseek_sparse", LATENT | {"top_k": 128}), Form("mla", LATENT)),
    "compressed_sparse": (
        Form("compressed_sparse", VECTORS | {"top_k": 32}),
        Form("compressed_sparse", VECTORS | {"top_k": 10**6}),  # every compressed entry
    ),
    "block_mixture": (Form("block_mixture", {"num_kv_heads": 4}), Form("gqa", {"num_kv_heads": 4})),
    "quest on mha": (Form("mha", read=QUEST), Form("mha")),
    "quest on mla": (Form("mla", LATENT, QUEST), Form("mla", LATENT)),
}


@dataclass(frozen=True)
class Sizes:
    """What is run. A layer of the quick run is a twelfth as wide."""

    lengths: tuple[int, ...] = (512, 2048, 8192)
    batches: tuple[int, ...] = (1, 8)
    shrink: int = 1
    steps: int = 24
    slices: int = 5


QUICK = Sizes(lengths=(16, 32), batches=(2,), shrink=12, steps=2, slices=1)
CHUNK = 512  # tokens of a prompt that go in at once


class Side:
    """One form of a layer, compiled for a decode step after `length` tokens."""

    def __init__(self, form: Form, length: int, batch: int, sizes: Sizes):
        import jax
        import jax.numpy as jnp
        from flax import nnx

        from mla.attention.contract import Surroundings, mechanism
        from mla.cache import pages
        from mla.config import build
        from mla.model import parameters, with_parameters

        config, mixer = mechanism(form.mechanism)
        small = {
            key: value // sizes.shrink or 1 for key, value in form.settings.items() if "head" not in key or sizes.shrink == 1
        }
        settings = build(config, form.settings if sizes.shrink == 1 else small, "config.model.mechanism")
        around = Surroundings(768 // sizes.shrink, 12 if sizes.shrink == 1 else 4, context=length, platform="cpu")
        settings.validate(around)
        layer = mixer(settings, around, rngs=nnx.Rngs(0))
        graph, self.params = nnx.graphdef(layer), parameters(layer)
        plan = layer.plan("none", None, pages.reading(form.read))

        def extend(params: Any, x: Any, at: Any, cache: Any) -> Any:
            return with_parameters(graph, params).extend(x, at, cache)

        capacity = length + sizes.steps * (sizes.slices + 2)
        cache, prompt = layer.init_cache(1, capacity, jnp.float32, plan), jax.jit(extend, donate_argnums=3)
        x = jax.random.normal(jax.random.key(0), (1, length, around.d_model))
        for start in range(0, length, CHUNK):
            stop = min(start + CHUNK, length)
            at = jnp.arange(start, stop, dtype=jnp.int32)[None]
            _, cache = prompt(self.params, x[:, start:stop], at, cache)
        self.bytes = layer.read_bytes(jax.eval_shape(lambda: layer.init_cache(1, length, jnp.float32, plan)))
        cache = jax.tree.map(lambda a: jnp.repeat(a, batch, axis=0), cache)
        self.x, self.position = jnp.repeat(x[:, :1], batch, axis=0), jnp.full((batch, 1), length, jnp.int32)

        def step(params: Any, x: Any, at: Any, cache: Any) -> Any:
            y, cache = extend(params, x, at, cache)
            return y, at + 1, cache

        given = self.params, self.x, self.position, cache
        self.step, self.cache = jax.jit(step, donate_argnums=(2, 3)).lower(*given).compile(), cache
        self.run(sizes.steps)

    def run(self, steps: int) -> float:
        """Seconds of a step, the mean of so many."""
        import jax

        start = time.perf_counter()
        for _ in range(steps):
            y, self.position, self.cache = self.step(self.params, self.x, self.position, self.cache)
        jax.block_until_ready(y)
        return (time.perf_counter() - start) / steps


def compare(name: str, batch: int, sizes: Sizes) -> list[dict[str, Any]]:
    """Rows of one pair at one batch, a length each, printed as they come."""
    rows = []
    for length in sizes.lengths:
        sides = {kind: Side(form, length, batch, sizes) for kind, form in zip(("sparse", "dense"), PAIRS[name], strict=True)}
        times: dict[str, list[float]] = {kind: [] for kind in sides}
        for _ in range(sizes.slices):
            for kind, side in sides.items():
                times[kind].append(side.run(sizes.steps))
        best = {kind: 1e3 * statistics.median(seconds) for kind, seconds in times.items()}
        ratio = best["dense"] / best["sparse"]
        read = {kind: side.bytes for kind, side in sides.items()}
        rows.append({"pair": name, "batch": batch, "tokens": length, "ms": best, "ratio": ratio, "read_bytes": read})
        print(
            f"| {name} | {batch} | {length:,} | {best['sparse']:.2f} | {best['dense']:.2f} | **{ratio:.2f}** |"
            f" {read['sparse']:,} | {read['dense']:,} |",
            flush=True,
        )
    return rows


def pays_from(rows: list[dict[str, Any]]) -> int | None:
    """The shortest length from which on the sparse form is faster at all longer ones; None: it is not at the longest."""
    found = None
    for row in sorted(rows, key=lambda row: -row["tokens"]):
        if row["ratio"] <= 1:
            break
        found = row["tokens"]
    return found


def main() -> int:
    """Measures every pair; 1 if a name is unknown."""
    from recurrence_speed import environment
    from train_speed import MALLOC

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=out_file, help="JSON file for the numbers")
    parser.add_argument("--pairs", default=",".join(PAIRS), help="some of them")
    parser.add_argument("--quick", action="store_true", help="tiny layers, to try the program")
    options = parser.parse_args()
    names, sizes = options.pairs.split(","), QUICK if options.quick else Sizes()
    if unknown := [name for name in names if name not in PAIRS]:
        print(f"error: --pairs: {unknown[0]!r} is not one of {', '.join(PAIRS)}", file=sys.stderr)
        return 1
    os.environ["JAX_PLATFORMS"] = "cpu"
    if os.environ.get("GLIBC_TUNABLES") != MALLOC:  # huge pages: glibc reads it before Python starts
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"GLIBC_TUNABLES": MALLOC})
    print("| | batch | tokens | sparse, ms | dense, ms | ratio | bytes read | dense |\n|" + "---|" * 8)
    rows = [row for name in names for batch in sizes.batches for row in compare(name, batch, sizes)]
    for name in names:
        for batch in sizes.batches:
            first = pays_from([row for row in rows if (row["pair"], row["batch"]) == (name, batch)])
            print(f"{name}, batch {batch}: {'does not pay' if first is None else f'pays from {first:,} tokens on'}")
    if options.out:
        written = {"environment": environment(), "d_model": 768 // sizes.shrink, "rows": rows}
        options.out.write_text(json.dumps(written, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
