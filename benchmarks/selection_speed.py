"""One decode step over all entries of a cache and over a few chosen ones, in turn.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python benchmarks/selection_speed.py [--quick]

The softmax op alone, fp32, one new token, on this machine's default device. Both sides take turns and the median of the
ratios counts, so that a drift of the machine meets both. A minute; `--quick` takes seconds and says nothing about speed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mla.ops.attention import selected_attention, softmax_attention
from mla.ops.mask import Mask

# Query heads; (key heads, channels) of each part of the keys, and of the values.
SHAPES = {
    "grouped heads": (8, ((2, 64),), (2, 64)),
    "one latent": (8, ((1, 128), (1, 32)), (1, 128)),
    "a head's own keys": (8, ((8, 64),), (8, 64)),
}


def sides(shape: str, cached: int, chosen: int) -> dict[str, Callable[[], jax.Array]]:
    heads, parts, value = SHAPES[shape]
    draw = np.random.default_rng(0)

    def normal(*sizes: int) -> jax.Array:
        return jnp.asarray(draw.standard_normal(sizes), jnp.float32)

    q, k = tuple(normal(1, 1, heads, d) for _, d in parts), tuple(normal(1, cached, n, d) for n, d in parts)
    v = normal(1, cached, *value)
    mask = Mask(jnp.full((1, 1), cached - 1, jnp.int32), jnp.arange(cached, dtype=jnp.int32)[None])
    indices = jnp.asarray(draw.permutation(cached)[:chosen], jnp.int32).reshape(1, 1, 1, chosen)
    dense = jax.jit(lambda q, k, v, mask: softmax_attention(q, k, v, mask, scale=0.1))
    few = jax.jit(lambda q, k, v, mask, i: selected_attention(q, k, v, i, mask, scale=0.1))
    return {"all": lambda: dense(q, k, v, mask), "chosen": lambda: few(q, k, v, mask, indices)}


def milliseconds(function: Callable[[], jax.Array], steps: int) -> float:
    start = time.perf_counter()
    for _ in range(steps):
        function().block_until_ready()
    return (time.perf_counter() - start) / steps * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that it runs")
    cached, chosen, steps, rounds = (64, 4, 2, 2) if parser.parse_args().quick else (4096, 64, 20, 15)
    print(f"{chosen} of {cached:,} entries, one query, fp32, {jax.devices()[0].device_kind}: milliseconds a step")
    for shape in SHAPES:
        both = sides(shape, cached, chosen)
        for function in both.values():
            function()
        times = [{name: milliseconds(function, steps) for name, function in both.items()} for _ in range(rounds)]
        middle = {name: statistics.median(t[name] for t in times) for name in both}
        ratio = statistics.median(t["all"] / t["chosen"] for t in times)
        print(f"{shape:20} all {middle['all']:.3f}  chosen {middle['chosen']:.3f}  {ratio:.1f} times faster", flush=True)


if __name__ == "__main__":
    main()
