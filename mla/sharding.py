"""Where arrays live: one rule table from path to PartitionSpec over the mesh axes ('data', 'fsdp', 'tensor').

The model and its caches never name an axis. What a rule cannot split evenly (MQA's one key head, MLA's one latent) is
replicated along that axis, and the measured bytes per device say so.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mla.config import Config, MeshConfig, around, layers
from mla.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")

STREAMS = re.compile(r"(^|/)streams(/|$)")

# First match wins. Paths look like blocks/0/mixer/key_up/kernel, and 1/0/mu/blocks/.. inside an optimizer's state.
RULES: tuple[tuple[str, P], ...] = (
    (r"(^|/)embedding$", P("tensor", "fsdp")),  # [V, D]
    (r"mixer/(\w+_)?out/kernel$", P("tensor", "fsdp")),  # [heads * d, D]
    (r"mixer/(\w+/|\w+_)down/kernel$", P("fsdp", None)),  # [D, rank]: a latent belongs to all heads
    (r"mixer/b_\w+/project/kernel$", P("fsdp", None)),  # [D, rank * d]: so does a factor
    (r"mixer/[\w/]+/kernel$", P("fsdp", "tensor")),  # [D or rank, heads * d]
    (r"mixer/\w+/constant$", P()),  # a few rows
    (r"mlp/down/kernel$", P("tensor", "fsdp")),  # [F, D]
    (r"mlp/\w+/kernel$", P("fsdp", "tensor")),  # [D, F]
    (r"(^|/)head/kernel$", P("fsdp", "tensor")),  # [D, V]
    (r"(^|/)streams(/|$)", P(BATCH, None, "tensor")),  # [B, C, heads, d]
    (r"(^|/)state(/|$)", P(BATCH, "tensor")),  # [B, heads, ..]
    (r"(^|/)(slots|scores|memo|texts)(/|$)", P(BATCH)),  # [B, ..]
    (r"", P()),
)


def spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """The first matching rule, without the axes that do not divide their dimension."""
    rule = next(rule for pattern, rule in RULES if re.search(pattern, path))

    def fits(size: int, axes: Any) -> Any:
        parts = math.prod(mesh.shape[a] for a in ((axes,) if isinstance(axes, str) else axes or ()))
        return axes if size % parts == 0 else None

    return P(*(fits(size, axes) for size, axes in zip(shape, rule, strict=False)))


def require_rules(parameters: Any) -> None:
    """Checks that a rule speaks of every matrix among a model's parameters: what none knows would be replicated in silence.

    Raises:
      TypeError: with the path of one that has no rule. Add a line to RULES.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(parameters):
        name = path_name(path)
        if len(leaf.shape) > 1 and not any(re.search(pattern, name) for pattern, _ in RULES[:-1]):
            raise TypeError(f"no sharding rule knows the parameter {name} of shape {tuple(leaf.shape)}; add one to RULES")


def path_name(path: Any) -> str:
    """A pytree key path as `a/b/0/c`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def placement(path: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """`spec`, but heads of a cache that a longer tensor axis cannot split evenly are split as far as they go.

    Two latents over four devices: two devices hold each. Their mesh has the same devices in the same order, its tensor
    axis cut in two.
    """
    split, size = mesh.shape["tensor"], shape[2] if STREAMS.search(path) else 1
    groups = math.gcd(size, split)
    if groups in (1, split):
        return NamedSharding(mesh, spec(path, shape, mesh))
    devices = mesh.devices.reshape(*mesh.devices.shape[:2], groups, split // groups)
    finer = Mesh(devices, (*AXES, "replica"), axis_types=(AxisType.Auto,) * 4)
    return NamedSharding(finer, spec(path, shape, finer))


def shardings(tree: Any, mesh: Mesh) -> Any:
    """A NamedSharding for every array (or shape) of a pytree: parameters, optimizer state or caches."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: placement(path_name(path), tuple(leaf.shape), mesh), tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """For arrays [B, ...]: the batch is split over the data and fsdp axes."""
    return NamedSharding(mesh, P(BATCH))


def prepare_devices(config: MeshConfig) -> None:
    """Settings that must precede the first use of a device. Call once, before `make_mesh`."""
    if config.distributed:
        try:
            jax.distributed.initialize()
        except (ValueError, RuntimeError) as error:
            raise UserError(f"config.mesh.distributed: no cluster was found to join ({error})") from error
    if config.host_devices:
        # Devices that exist already stay as many as they are; make_mesh then says whether that fits.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", config.host_devices)


def make_mesh(config: MeshConfig) -> Mesh:
    """The mesh over all devices.

    Raises:
      UserError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices()
    shape = [getattr(config, axis) for axis in AXES]
    known = math.prod(size for size in shape if size != -1)
    if shape.count(-1) > 1:
        raise UserError("config.mesh: only one axis may be -1 (what is left of the devices)")
    if -1 in shape and len(devices) % known == 0:
        shape[shape.index(-1)] = len(devices) // known
    if math.prod(shape) != len(devices):
        asked = " x ".join(f"{axis}={size}" for axis, size in zip(AXES, shape, strict=True))
        hint = " (on a CPU, mesh.host_devices sets their number)" if devices[0].platform == "cpu" else ""
        raise UserError(
            f"config.mesh: {asked} does not fit {len(devices)} {devices[0].platform} device(s); the product of the axes must"
            f" be {len(devices)}{hint}"
        )
    return Mesh(np.asarray(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def require_whole_heads(config: Config, mesh: Mesh) -> None:
    """Refuses a tensor axis that would cut through a head.

    Not only slow: XLA's partitioner has been seen to return wrong gradients for such kernels, with right losses.

    Raises:
      UserError: `mesh.tensor` does not divide the query heads of some layer.
    """
    for layer in layers(config.model):
        heads = layer.config.heads(around(config))
        if heads % mesh.shape["tensor"]:
            raise UserError(f"config.mesh.tensor: {mesh.shape['tensor']} does not divide the {heads} heads of {layer.name}")


def in_turn(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """A compiled function, waiting for its result where several CPU devices share one thread pool.

    There, calls that pile up can deadlock: the collectives of one hold the threads that another needs to reach its own.
    """
    if mesh.size == 1 or mesh.devices.flat[0].platform != "cpu":
        return function
    return lambda *arguments: jax.block_until_ready(function(*arguments))
