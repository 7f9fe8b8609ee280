"""What a compiled program needs of each device and what bounds it: figures, their roofline, and both in words."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator
from typing import Any

import jax

from mla.compilation.collectives import KINDS, collectives
from mla.compilation.count import inner_jaxprs, matmul_flops
from mla.compilation.targets import Chip

LEVELS = ("UNKNOWN", "O0", "O1", "O2", "O3")  # of jax_optimization_level
LINKS = 2  # that a ring uses at once: one direction of each of two neighbours


@dataclasses.dataclass(frozen=True)
class Figures:
    """Of one program on one device of a mesh.

    Attributes:
      step: which of a run's programs.
      devices: of the mesh.
      compile_seconds, trace_seconds: on this machine.
      memory: bytes; `arguments` are there before, `outputs` after it where they do not take the place of arguments,
        `temporaries` in between, `peak` all of them together. Of a program that is not compiled, arguments alone.
      flops: of its products of matrices, an equal share of all devices' (`matmul_flops`).
      flops_formula: by `mla.flops`, an equal share too: without what is masked away or computed again.
      flops_compiled: as the compiler counts all operations; the body of a loop once. It, what is accessed and seconds of
        compilation are nan where there was none, and `collectives` is empty.
      bytes_accessed: from and to memory, as the compiler counts them; the body of a loop once.
      collectives: kind -> {"count", "bytes", "moved"} of a run, see `collectives.Collective`.
      kernels: names of custom kernels in the program, sorted.
    """

    step: str
    devices: int
    trace_seconds: float
    compile_seconds: float
    memory: dict[str, int]
    flops: float
    flops_formula: float
    flops_compiled: float
    bytes_accessed: float
    collectives: dict[str, dict[str, float]]
    kernels: list[str]

    def roofline(self, chip: Chip) -> dict[str, float]:
        """Seconds a step takes at least, by each of a chip's limits.

        Memory: arguments read and outputs written once, and temporaries written and read once. Interconnect: what reaches a
        device, over the two links of a ring.
        """
        touched = self.memory["arguments"] + self.memory.get("outputs", 0) + 2 * self.memory.get("temporaries", 0)
        moved = sum(each["moved"] for each in self.collectives.values())
        limits = {"compute": self.flops / chip.flops, "memory": touched / chip.bandwidth}
        return limits | ({"interconnect": moved / (LINKS * chip.link)} if self.compiled else {})

    @property
    def compiled(self) -> bool:
        """Whether there is a compiled program behind it."""
        return "peak" in self.memory


def compiled(
    step: str,
    program: Any,
    arguments: tuple[Any, ...],
    devices: int,
    formula: float = math.nan,
    level: str = "UNKNOWN",
) -> Figures:
    """Compiles a jitted function for the devices of its arguments' shardings, and reads its figures off the result.

    Args:
      step: its name.
      program, arguments: the function, and what it is called with, as shapes.
      devices: of the mesh.
      formula: FLOPs of all devices together by `mla.flops`; nan: there is none for it.
      level: of optimisation, one of `LEVELS`; what runs are compiled with is UNKNOWN. At O0 and O1 compilation is several
        times as fast, programs are slower, and they may need more memory.
    """
    start = time.monotonic()
    traced = program.trace(*arguments)
    lowered = traced.lower()
    between = time.monotonic()
    with _settings(level):
        made = lowered.compile()
    seconds = time.monotonic() - between
    stats, cost, text = made.memory_analysis(), made.cost_analysis() or {}, made.as_text()
    kept = stats.output_size_in_bytes - stats.alias_size_in_bytes
    memory = {
        "arguments": stats.argument_size_in_bytes,
        "outputs": kept,
        "temporaries": stats.temp_size_in_bytes,
        "peak": stats.argument_size_in_bytes + kept + stats.temp_size_in_bytes,
    }
    sums: dict[str, dict[str, float]] = {}
    for each in collectives(text):
        total = sums.setdefault(each.kind, {"count": 0, "bytes": 0, "moved": 0})
        for name, value in (("count", each.times), ("bytes", each.size * each.times), ("moved", each.moved)):
            total[name] += value
    return Figures(
        step=step,
        devices=devices,
        trace_seconds=between - start,
        compile_seconds=seconds,
        memory=memory,
        flops=matmul_flops(traced.jaxpr) / devices,
        flops_formula=formula / devices,
        flops_compiled=float(cost.get("flops", math.nan)),
        bytes_accessed=float(cost.get("bytes accessed", math.nan)),
        collectives={kind: sums[kind] for kind in KINDS if kind in sums},
        kernels=kernels(traced.jaxpr),
    )


def lowered(step: str, program: Any, arguments: tuple[Any, ...], devices: int, formula: float = math.nan) -> Figures:
    """Lowers a jitted function for CUDA, which needs no GPU, and says what can be read off that. Arguments as `compiled`."""
    start = time.monotonic()
    traced = program.trace(*arguments)
    traced.lower(lowering_platforms=("cuda",))
    shares = [(a.sharding.shard_shape(a.shape), a.dtype.itemsize) for a in jax.tree.leaves(arguments)]
    return Figures(
        step=step,
        devices=devices,
        trace_seconds=time.monotonic() - start,
        compile_seconds=math.nan,
        memory={"arguments": sum(math.prod(shape) * itemsize for shape, itemsize in shares)},
        flops=matmul_flops(traced.jaxpr) / devices,
        flops_formula=formula / devices,
        flops_compiled=math.nan,
        bytes_accessed=math.nan,
        collectives={},
        kernels=kernels(traced.jaxpr),
    )


@contextlib.contextmanager
def _settings(level: str) -> Iterator[None]:
    """Inside, programs are compiled at this level, and not written to the compilation cache: those for absent devices
    cannot be read back."""
    wanted = {"jax_persistent_cache_min_compile_time_secs": 1e9, "jax_optimization_level": level}
    kept = {name: getattr(jax.config, name) for name in wanted}
    try:
        for name, value in wanted.items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in kept.items():
            jax.config.update(name, value)


def kernels(jaxpr: Any) -> list[str]:
    """Names of the Pallas kernels in a jaxpr, sorted."""
    names: set[str] = set()

    def walk(jaxpr: Any) -> None:
        for equation in jaxpr.eqns:
            if equation.primitive.name == "pallas_call":
                said = getattr(equation.params.get("name_and_src_info"), "name", None)  # of earlier versions of jax
                names.add(str(equation.params.get("name") or said or "pallas"))
                continue
            for inner in inner_jaxprs(equation.params):
                walk(getattr(inner, "jaxpr", inner))

    walk(jaxpr.jaxpr)
    return sorted(names)


def said(figures: Figures, chip: Chip) -> str:
    """Figures of a step in lines for a terminal."""
    memory, roofline = figures.memory, figures.roofline(chip)
    limit = max(roofline, key=lambda name: roofline[name])
    products = f"{figures.flops:.4g} a device in products, {figures.flops / figures.flops_formula:.3f} of the formula's"
    if figures.compiled:
        fits = "fits" if memory["peak"] <= chip.memory else "does not fit"
        sizes = ", ".join(f"{_size(memory[name])} {name}" for name in ("arguments", "temporaries", "outputs"))
        lines = [
            f"{figures.step}: compiled in {figures.compile_seconds:.1f} s (traced in {figures.trace_seconds:.1f} s)",
            f"  memory      {_size(memory['peak'])} a device, {fits} in {_size(chip.memory)}: {sizes}",
            f"  FLOPs       {products}; the compiler counts {figures.flops_compiled:.4g} in all (loop bodies once)",
            f"  accessed    {_size(figures.bytes_accessed)} as the compiler counts (loop bodies once)",
        ]
    else:
        lines = [
            f"{figures.step}: lowered for CUDA in {figures.trace_seconds:.1f} s; what a compiler adds needs a GPU",
            f"  memory      {_size(memory['arguments'])} a device of {_size(chip.memory)} for arguments alone",
            f"  FLOPs       {products}",
        ]
    for kind, each in figures.collectives.items():
        lines.append(
            f"  {kind:18} {each['count']:,.0f} times, {_size(each['bytes'])}, {_size(each['moved'])} reach a device"
        )
    if figures.kernels:
        lines.append(f"  kernels     {', '.join(figures.kernels)}")
    bounds = ", ".join(f"{name} {1e3 * seconds:.3g} ms" for name, seconds in roofline.items())
    lines.append(f"  at least    {1e3 * roofline[limit]:.3g} ms, bound by {limit} ({bounds})")
    return "\n".join(lines)


def as_json(figures: Figures, chip: Chip) -> dict[str, Any]:
    """Figures and roofline as JSON takes them; a figure that the compiler does not give is absent."""
    plain = {name: value for name, value in dataclasses.asdict(figures).items() if value == value}
    return plain | {"roofline_seconds": figures.roofline(chip)}


def _size(count: float) -> str:
    """Bytes in the unit that leaves the number short."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000 or unit == "GB":
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    raise AssertionError
