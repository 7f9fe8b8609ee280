"""Refuses arrays that no memory of the machine can hold, before they are made."""

from __future__ import annotations

import math
import os
import resource
import sys
from pathlib import Path
from typing import Any

import jax

from mla.errors import UserError

CONTAINER_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # cgroup 2 and 1


def host_bytes() -> int:
    """Bytes of memory that this process may use at most: the machine's, or its container's."""
    found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for path in CONTAINER_LIMITS:
        try:
            found = min(found, int(Path(path).read_text(encoding="ascii")))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return found


def peak_bytes() -> int:
    """The most bytes of memory so far: of this process, where a CPU computes, or else of its fullest device."""
    devices = [device for device in jax.local_devices() if device.platform != "cpu"]
    if devices:
        return max((device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in devices)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def require(shapes: Any, what: str, remedy: str) -> None:
    """Refuses a pytree of `jax.ShapeDtypeStruct` with shardings if some device could not hold its share of it.

    What else will be needed is not known here: what passes may still end in an error of XLA.

    Args:
      shapes: the arrays to be made; those without a sharding are on one device.
      what: names them in the refusal, such as "the cache of 2 sequences of 10 tokens".
      remedy: what would be right, such as "lower config.eval.batch_size".

    Raises:
      UserError: too many bytes.
    """
    needed = 0  # bytes on each device: shardings here are even
    for leaf in jax.tree.leaves(shapes):
        shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding is not None else leaf.shape
        needed += math.prod(shape) * leaf.dtype.itemsize
    device = jax.local_devices()[0]
    if device.platform == "cpu":  # all devices share the memory of the host
        needed, most, where = needed * jax.local_device_count(), host_bytes(), "this machine"
    else:
        most, where = (device.memory_stats() or {}).get("bytes_limit", 0), f"a {device.device_kind}"
    if most and needed > most:
        raise UserError(
            f"not enough memory: {what} takes {needed / 1e9:,.1f} GB, {where} has {most / 1e9:,.1f} GB; {remedy}"
        )
