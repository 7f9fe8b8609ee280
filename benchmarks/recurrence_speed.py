"""Recurrent layers beside those of `transformers` without GPU kernels: training, memory and decoding, in one run.

    python benchmarks/recurrence_speed.py [--out=FILE.json] [--mechanisms=NAME,NAME] [--tasks=TASK,TASK] [--quick]

One layer of a model of the 124M class, d_model 768, batch 1, fp32, with the same weights on both sides, each in a process of
its own with all cores and huge pages for malloc. A training step is forward and backward, with gradients of all parameters
and of the input; its memory is the growth of the process's resident set during one step. The sides work in turn, so that a
drift of the machine meets both: read the ratio. That both compute the same is measured first, on outputs and the input's
gradient. About twelve minutes on two cores; `--quick` takes seconds and says nothing about speed. Tasks: train, decode and
products: what no layer of these shapes can do without, the rows of the input times each of its matrices, forward and both
gradients in training, forward alone in decoding. No ratio can pass the other side's whole time over our products' alone.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sides import cores, out_file
from train_speed import MALLOC, Process, environment, in_turn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

TASKS = ("train", "decode", "products")
TARGETS = {"train": 1.5, "decode": 3.0}  # times as fast as the other side
SAME = 1e-4  # of outputs and gradients, in units of their root mean square
STEPS_OF = 2048  # tokens of a slice of training, at least one step
SLICES = 5


@dataclass(frozen=True)
class Sizes:
    """What is run. A layer of the quick run has two heads and an eighth of the width."""

    lengths: tuple[int, ...] = (512, 2048, 8192)
    shrink: int = 1
    decoded: int = 256  # tokens of a slice of decoding
    slices: int = SLICES


QUICK = Sizes(lengths=(16,), shrink=8, decoded=2, slices=1)


@dataclass(frozen=True)
class Pair:
    """A mechanism and the layer of `transformers` that computes the same.

    Attributes:
      module, layer, config: transformers.models.X.modeling_X, the class of the layer, and of its config.
      eps: of its norm.
      heads: of the layer at full width.
      ours, theirs: (heads, width of the model) -> settings of our mechanism, and of their config.
      names: their parameter -> ours, joined along the last axis; `by_head`: head by head.
    """

    module: str
    layer: str
    config: str
    eps: float
    heads: int
    ours: Any
    theirs: Any
    names: dict[str, tuple[str, ...]]
    by_head: tuple[str, ...] = ()


def _kernels(**names: str) -> dict[str, tuple[str, ...]]:
    return {f"{theirs.replace('__', '.')}.weight": (f"{ours}/kernel",) for theirs, ours in names.items()}


CONVOLUTION = tuple(f"convolution/kernels/{name}" for name in ("query", "key", "value"))
PROJECTIONS = _kernels(q_proj="query", k_proj="key", v_proj="value", b_proj="beta", o_proj="out")
DELTA = PROJECTIONS | {"conv1d.weight": CONVOLUTION, "o_norm.weight": ("out_norm/scale",)}
PAIRS = {
    "gated_delta": Pair(
        "olmo_hybrid",
        "OlmoHybridGatedDeltaNet",
        "OlmoHybridConfig",
        1e-5,
        6,
        lambda heads, width: {},
        lambda heads, width: {"num_attention_heads": heads, "num_hidden_layers": 4, "linear_allow_neg_eigval": False},
        DELTA | _kernels(a_proj="decay_in", g_proj="gate_in") | {"A_log": ("rates/a_log",), "dt_bias": ("rates/dt_bias",)},
    ),
    "kimi_delta": Pair(
        "kimi_linear",
        "KimiLinearDeltaAttention",
        "KimiLinearConfig",
        1e-5,
        6,
        lambda heads, width: {},
        lambda heads, width: {"linear_num_heads": heads, "linear_head_dim": width // heads, "num_hidden_layers": 4},
        DELTA
        | _kernels(forget_gate__f_a_proj="decay_down", forget_gate__f_b_proj="decay_up")
        | _kernels(g_a_proj="gate_down", g_b_proj="gate_up")
        | {"forget_gate.A_log": ("rates/a_log",), "forget_gate.dt_bias": ("rates/dt_bias",)},
    ),
    "mamba2": Pair(
        "mamba2",
        "Mamba2Mixer",
        "Mamba2Config",
        1e-5,
        24,
        lambda heads, width: {"state_size": 128 if width >= 512 else 16},
        lambda heads, width: {
            "num_heads": heads,
            "head_dim": 2 * width // heads,
            "state_size": 128 if width >= 512 else 16,
            "n_groups": 1,
            "num_hidden_layers": 2,
        },
        {
            "in_proj.weight": tuple(f"{name}/kernel" for name in ("gate", "value", "key", "query", "step_in")),
            "conv1d.weight": tuple(f"convolution/kernels/{name}" for name in ("value", "key", "query")),
            "conv1d.bias": tuple(f"convolution/biases/{name}" for name in ("value", "key", "query")),
            "out_proj.weight": ("out/kernel",),
            "norm.weight": ("out_norm/scale",),
            "A_log": ("rates/a_log",),
            "dt_bias": ("rates/dt_bias",),
            "D": ("skip",),
        },
    ),
    "lightning": Pair(
        "minimax",
        "MiniMaxLightningAttention",
        "MiniMaxConfig",
        1e-6,
        12,
        lambda heads, width: {},
        lambda heads, width: {"num_attention_heads": heads, "num_key_value_heads": heads, "num_hidden_layers": 12},
        {
            "qkv_proj.weight": ("query/kernel", "key/kernel", "value/kernel"),
            "output_gate.weight": ("gate/kernel",),
            "out_proj.weight": ("out/kernel",),
            "norm.weight": ("out_norm/scale",),
        },
        by_head=("qkv_proj.weight",),
    ),
}
LAYER, LAYERS = 1, 12  # where it stands: lightning's decays depend on it


def drawn(length: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """An input [1, length, width] and what outputs are weighed by, the same on both sides."""
    draw = np.random.default_rng(length)
    return tuple(draw.normal(size=(2, 1, length, width)).astype(np.float32))  # type: ignore[return-value]


def growth(step: Any) -> float | None:
    """MB by which the resident set grows at most while `step()` runs, where the system says so."""
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not clear.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)  # what was freed is not there to be used again
    clear.write_text("5")  # the peak starts anew

    def said(name: str) -> int:
        return int(next(line.split()[1] for line in status.read_text().splitlines() if line.startswith(name)))

    before = said("VmRSS")
    step()
    return (said("VmHWM") - before) / 1024


class Side:
    """What both sides have; a subclass writes `step` and `decoder`."""

    def __init__(self, name: str, sizes: Sizes):
        self.pair, self.sizes = PAIRS[name], sizes
        self.width, self.heads = 768 // sizes.shrink, self.pair.heads if sizes.shrink == 1 else 2
        self.steps: dict[int, Any] = {}
        self.decoding: Any = None
        self.multipliers: dict[int, Any] = {}

    def step(self, length: int) -> Any:
        """A function without arguments: outputs and the input's gradient, when they are there."""
        raise NotImplementedError

    def decoder(self) -> Any:
        """A function without arguments that decodes `sizes.decoded` tokens."""
        raise NotImplementedError

    def same(self, length: int) -> tuple[np.ndarray, ...]:
        """Outputs and the input's gradient, [length, width]."""
        self.steps = {length: self.step(length)}
        return tuple(np.asarray(a)[0] for a in self.steps[length]())

    def memory(self, length: int) -> float | None:
        """MB of a step, see `growth`."""
        return growth(self.steps[length])

    def train(self, length: int) -> float:
        """Seconds of a step, the mean of a slice."""
        count, start = max(1, STEPS_OF // length), time.perf_counter()
        for _ in range(count):
            self.steps[length]()
        return (time.perf_counter() - start) / count

    def decode(self) -> float:
        """Seconds of a token, the mean of a slice."""
        self.decoding = self.decoding or self.decoder()
        start = time.perf_counter()
        self.decoding()
        return (time.perf_counter() - start) / self.sizes.decoded

    def multiplier(self, rows: int) -> Any:
        """A function of how often: `rows` rows times each matrix of the layer; with both gradients if rows > 1."""
        raise NotImplementedError

    def products(self, rows: int) -> float:
        """Seconds of it, the mean of a slice."""
        if rows not in self.multipliers:
            self.multipliers[rows] = self.multiplier(rows)
            self.multipliers[rows](1)
        count, start = self.sizes.decoded if rows == 1 else max(1, STEPS_OF // rows), time.perf_counter()
        self.multipliers[rows](count)
        return (time.perf_counter() - start) / count


class Ours(Side):
    """The mixer, compiled. Writes its parameters to `weights` (npz)."""

    @staticmethod
    def imports() -> None:
        """The slow ones."""
        import mla.model  # noqa: F401

    def __init__(self, name: str, sizes: Sizes, weights: Path):
        import jax
        from flax import nnx

        from mla import model as models
        from mla import sharding
        from mla.attention.contract import Surroundings, mechanism

        super().__init__(name, sizes)
        config, mixer = mechanism(name)
        around = Surroundings(
            self.width, self.heads, LAYERS, norm_eps=self.pair.eps, platform="cpu", layer=LAYER, residual_init="depth"
        )
        settings = config(**self.pair.ours(self.heads, self.width))
        settings.num_heads = self.heads
        settings.validate(around)
        self.mixer = mixer(settings, around, rngs=nnx.Rngs(0))
        self.graph, self.params = nnx.graphdef(self.mixer), jax.device_get(models.parameters(self.mixer))
        leaves = jax.tree_util.tree_leaves_with_path(self.params)
        np.savez(weights, **{sharding.path_name(path): leaf for path, leaf in leaves})
        self.params = jax.device_put(self.params)

    def step(self, length: int) -> Any:
        import jax
        import jax.numpy as jnp

        from mla.model import with_parameters

        def weighed(params: Any, x: Any, weight: Any) -> Any:
            y = with_parameters(self.graph, params)(x)
            return jnp.sum(y * weight), y

        given = (self.params, *map(jnp.asarray, drawn(length, self.width)))
        compiled = jax.jit(jax.value_and_grad(weighed, argnums=(0, 1), has_aux=True)).lower(*given).compile()

        def run() -> Any:
            (_, y), (_, dx) = jax.block_until_ready(compiled(*given))
            return y, dx

        return run

    def decoder(self) -> Any:
        import jax
        import jax.numpy as jnp

        from mla.model import with_parameters

        def extend(params: Any, cache: Any, x: Any, position: Any) -> Any:
            positions = position + jnp.arange(x.shape[1], dtype=jnp.int32)[None]
            return *with_parameters(self.graph, params).extend(x, positions, cache), position + x.shape[1]

        x = jnp.asarray(drawn(64, self.width)[0])
        cache = self.mixer.init_cache(1, 10**6, jnp.float32)
        _, cache, position = jax.jit(extend)(self.params, cache, x, jnp.zeros((), jnp.int32))
        token, held = x[:, :1], [cache, position]
        compiled = jax.jit(extend, donate_argnums=1).lower(self.params, cache, token, position).compile()

        def run() -> None:
            for _ in range(self.sizes.decoded):
                y, *held[:] = compiled(self.params, held[0], token, held[1])
            jax.block_until_ready(y)

        run()
        return run

    def multiplier(self, rows: int) -> Any:
        import jax
        import jax.numpy as jnp

        from mla import sharding

        leaves = jax.tree_util.tree_leaves_with_path(self.params)
        matrices = [leaf for path, leaf in leaves if sharding.path_name(path).endswith("/kernel")]
        inputs = {matrix.shape[0]: jnp.ones((rows, matrix.shape[0])) for matrix in matrices}

        def forward(matrices: Any, inputs: Any) -> Any:
            return [inputs[matrix.shape[0]] @ matrix for matrix in matrices]

        def both(matrices: Any, inputs: Any) -> Any:
            outputs, back = jax.vjp(forward, matrices, inputs)
            return back(outputs)

        compiled = jax.jit(forward if rows == 1 else both).lower(matrices, inputs).compile()

        def run(count: int) -> None:
            jax.block_until_ready([compiled(matrices, inputs) for _ in range(count)][-1])

        return run


class Theirs(Side):
    """The layer of `transformers`, uncompiled, from the parameters in `weights`."""

    @staticmethod
    def imports() -> None:
        """The slow ones, without fla: its kernels would be taken, and need a GPU."""
        sys.modules["fla"] = None  # type: ignore[assignment]
        import torch

        torch.set_num_threads(cores())
        for pair in PAIRS.values():
            importlib.import_module(f"transformers.models.{pair.module}.modeling_{pair.module}")

    def __init__(self, name: str, sizes: Sizes, weights: Path):
        import torch

        super().__init__(name, sizes)
        pair = self.pair
        self.module = importlib.import_module(f"transformers.models.{pair.module}.modeling_{pair.module}")
        config = getattr(importlib.import_module("transformers"), pair.config)
        self.config = config(hidden_size=self.width, **pair.theirs(self.heads, self.width))
        self.layer = getattr(self.module, pair.layer)(self.config, LAYER).train()
        ours, theirs = dict(np.load(weights)), dict(self.layer.named_parameters())
        assert theirs.keys() == pair.names.keys(), theirs.keys() ^ pair.names.keys()
        with torch.no_grad():
            for parameter, names in pair.names.items():
                parts, split = [ours.pop(name) for name in names], self.heads if parameter in pair.by_head else 1
                parts = [part.reshape(*part.shape[:-1], split, -1) for part in parts]
                joined = np.concatenate(parts, axis=-1).reshape(*parts[0].shape[:-2], -1)
                theirs[parameter].copy_(torch.from_numpy(joined.T.copy()).reshape(theirs[parameter].shape))
        assert not ours, ours.keys()

    def _call(self, x: Any, cache: Any = None) -> Any:
        if self.pair.by_head:
            return self.layer(x, None, None, past_key_values=cache)[0]
        return self.layer(x, cache_params=cache)

    def step(self, length: int) -> Any:
        import torch

        x, weight = map(torch.from_numpy, drawn(length, self.width))
        x.requires_grad_(True)

        def run() -> Any:
            self.layer.zero_grad()
            x.grad = None
            y = self._call(x)
            (y * weight).sum().backward()
            return y.detach(), x.grad

        return run

    def decoder(self) -> Any:
        import torch

        x = torch.from_numpy(drawn(64, self.width)[0])
        if self.pair.by_head:
            cache = self.module.MiniMaxCache()
        else:
            cache = importlib.import_module("transformers").DynamicCache(config=self.config)
        self.layer.eval()
        with torch.inference_mode():
            self._call(x, cache)

        def run() -> None:
            with torch.inference_mode():
                for _ in range(self.sizes.decoded):
                    self._call(x[:, :1], cache)

        run()
        return run

    def multiplier(self, rows: int) -> Any:
        import torch

        matrices = [parameter for parameter in self.layer.parameters() if parameter.ndim == 2]
        inputs = {matrix.shape[1]: torch.ones((rows, matrix.shape[1]), requires_grad=rows > 1) for matrix in matrices}

        def run(count: int) -> None:
            for _ in range(count):
                with torch.set_grad_enabled(rows > 1):
                    outputs = [torch.nn.functional.linear(inputs[matrix.shape[1]], matrix) for matrix in matrices]
                if rows > 1:
                    torch.autograd.grad(outputs, [*matrices, *inputs.values()], [output.detach() for output in outputs])

        return run


def difference(pair: list[tuple[np.ndarray, ...]]) -> float:
    """The largest between outputs or gradients, in units of their root mean square."""
    return max(float(np.abs(a - b).max() / np.sqrt(np.mean(np.square(b)))) for a, b in zip(*pair, strict=True))


def compare(sides: dict[str, Process], name: str, sizes: Sizes, weights: Path, tasks: Sequence[str]) -> dict[str, Any]:
    """Rows of one mechanism, printed as they come."""
    for side in sides.values():
        side.prepare(name, sizes, weights)
    found: dict[str, Any] = {"mechanism": name, "rival": PAIRS[name].layer, "rows": []}

    def row(task: str, tokens: int, method: str, *arguments: Any, **more: Any) -> None:
        slices = sizes.slices if tokens < 8192 else min(sizes.slices, 3)
        row = in_turn(sides, slices, lambda side: {"": tokens / side(method, *arguments)})
        row = {"task": task, "tokens": tokens, **row, **more, "target": TARGETS.get(method)}
        found["rows"].append(row)
        cells = [f"{tokens / row[side]['median'] * 1e3:,.2f}" for side in sides]
        cells += [f"**{row['ratio']:.2f}**", f"{row['target'] or ''}"]
        cells += [f"{more[side]:,.0f}" if more.get(side) else "" for side in ("our_mb", "their_mb")]
        print(f"| {name} {task} | {' | '.join(cells)} | {row['others']:.0%} |", flush=True)

    for length in sizes.lengths * ("train" in tasks):
        differs = difference([side("same", length) for side in sides.values()])
        memory = {"our_mb": sides["ours"]("memory", length), "their_mb": sides["theirs"]("memory", length)}
        row(f"train, T {length}", length, "train", length, difference=differs, **memory)
    if "decode" in tasks:
        for side in sides.values():
            side("decode")
        row("decode", 1, "decode")
    for length in (*sizes.lengths, 1) * ("products" in tasks):
        row(f"products, {length} rows", length, "products", length)
    return found


def main() -> int:
    """Runs everything; 1 if something is missing or the two sides do not compute the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=out_file, help="JSON file for the numbers")
    parser.add_argument("--mechanisms", default=",".join(PAIRS), help="some of them")
    parser.add_argument("--tasks", default=",".join(TASKS), help="some of them")
    parser.add_argument("--quick", action="store_true", help="tiny layers, to try the program")
    options = parser.parse_args()
    chosen, tasks = options.mechanisms.split(","), options.tasks.split(",")
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"error: {' and '.join(missing)} missing: pip install -r requirements-test.txt", file=sys.stderr)
        return 1
    if unknown := [name for name in chosen if name not in PAIRS]:
        print(f"error: --mechanisms: {unknown[0]!r} is not one of {', '.join(PAIRS)}", file=sys.stderr)
        return 1
    if unknown := [task for task in tasks if task not in TASKS]:
        print(f"error: --tasks: {unknown[0]!r} is not one of {', '.join(TASKS)}", file=sys.stderr)
        return 1
    # Inherited by the sides; glibc reads it before Python starts.
    os.environ.update(GLIBC_TUNABLES=MALLOC, JAX_PLATFORMS="cpu", HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
    sizes, where = QUICK if options.quick else Sizes(), environment()
    print("| | ours, ms | transformers, ms | ratio | target | ours, MB | its MB | cores taken by others |\n|" + "---|" * 8)
    sides = {"ours": Process(Ours), "theirs": Process(Theirs)}
    with tempfile.TemporaryDirectory() as folder:
        results = [compare(sides, name, sizes, Path(folder, f"{name}.npz"), tasks) for name in chosen]
    for side in sides.values():
        side.pool.shutdown()
    print("", *(f"{key}: {value}" for key, value in where.items()), f"sizes: {sizes}", sep="\n")
    if options.out:
        found = {"environment": where, "sizes": asdict(sizes), "results": results}
        options.out.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    different = [r["mechanism"] for r in results if any(row.get("difference", 0.0) > SAME for row in r["rows"])]
    if different:
        print(f"error: not the same layer on both sides: {', '.join(different)}", file=sys.stderr)
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
