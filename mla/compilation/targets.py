"""Devices that are not here: those of a TPU topology, for which any machine can compile, and what their chips can do."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
from typing import Any

import jax

from mla.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published limits of one chip.

    Attributes:
      memory: bytes of HBM.
      flops: a second, of dense bf16 products.
      bandwidth: bytes a second from and to HBM.
      link: bytes a second over one link to another chip, in one direction.
      example: the name of a small topology.
    """

    memory: float
    flops: float
    bandwidth: float
    link: float
    example: str


# Memory, FLOPs, HBM: cloud.google.com/tpu/docs, one page a version. Links: jax-ml.github.io/scaling-book, "TPUs". Versions
# whose chips are two devices, as v4, are left out: these limits are a device's.
CHIPS = {
    "v5e": Chip(16e9, 197e12, 819e9, 45e9, "v5e:2x2"),
    "v5p": Chip(95e9, 459e12, 2765e9, 90e9, "v5p:2x2x1"),
    "v6e": Chip(32e9, 918e12, 1640e9, 90e9, "v6e:2x2"),
}
# SXM modules, by NVIDIA's data sheets; a link is NVLink, all of it, in one direction.
GPUS = {
    "a100": Chip(80e9, 312e12, 2039e9, 300e9, "a100:4"),
    "h100": Chip(80e9, 989e12, 3350e9, 450e9, "h100:8"),
    "h200": Chip(141e9, 989e12, 4800e9, 450e9, "h200:8"),
}


def prepare() -> None:
    """Has programs be traced on a CPU. Call before the first use of a device."""
    with contextlib.suppress(RuntimeError):  # devices are there already
        jax.config.update("jax_platforms", "cpu")


def chip(topology: str) -> Chip:
    """The chip of a topology named as VERSION:SHAPE, such as v5e:2x2, or of so many GPUs, such as h100:8.

    Raises:
      UserError: an unknown version.
    """
    version = topology.partition(":")[0]
    known = CHIPS | GPUS
    if version not in known:
        raise UserError(f"--topology: {topology!r} is of no chip that is known here: {nearest(version, known)}")
    return known[version]


def gpus(topology: str) -> int:
    """How many GPUs a topology has; 0: it is one of TPUs.

    Raises:
      UserError: a topology of GPUs that does not say it.
    """
    version, _, count = topology.partition(":")
    if version not in GPUS:
        return 0
    if not count.isdecimal() or not int(count):
        raise UserError(f"--topology: {topology!r} does not say how many: {GPUS[version].example}")
    return int(count)


def devices(topology: str) -> list[Any]:
    """The devices of a TPU topology, for which programs can be compiled; none of them has to exist.

    Raises:
      UserError: a topology that does not exist, or no compiler for TPUs here.
    """
    of = chip(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("the compiler for TPUs is not installed: pip install 'jax[tpu]'")
    from jax.experimental import topologies

    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except Exception as error:  # of whatever class the plugin's errors are
        said = str(error).partition("\n")[0].strip().rstrip(".")
        raise UserError(f"--topology: {topology!r} does not exist ({said}); one that does is {of.example}") from error
    return list(described.devices)
