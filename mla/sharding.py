"""Where arrays live: one table from what an axis of an array means to the mesh axes ('data', 'fsdp', 'tensor').

Who makes an array declares what its axes mean and never names a mesh axis. What a mesh cannot split evenly (MQA's one key
head, MLA's one latent) is replicated along that mesh axis, and the measured bytes per device say so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mla import processes
from mla.cache.contract import by_axes
from mla.config import Config, MeshConfig, around, layers
from mla.errors import UserError
from mla.layers.basic import Axes

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")

MEANINGS: dict[str | None, tuple[str, ...]] = {
    None: (),  # on every device
    "batch": BATCH,
    "model": ("fsdp",),  # channels of the residual stream
    "latent": ("fsdp",),  # channels that all heads share
    "head": ("tensor",),  # one index a head
    "head_channels": ("tensor",),  # the channels of all heads side by side
    "ff": ("tensor",),  # channels inside an MLP
    "vocab": ("tensor",),
    "expert": ("tensor",),
    "slot": (),  # of a cache, one index an entry
}


def partition(axes: Axes, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Where an array lives whose axes have these meanings.

    A mesh axis that does not divide its axis of the array is left out, and so is one that an earlier axis of the array
    claims. Heads that a longer tensor axis cannot split evenly are split as far as they go: two latents over four devices
    are held by two devices each, whose mesh has the same devices in the same order, its tensor axis cut in two.

    Raises:
      TypeError: axes that are not those of the shape, or a meaning that is not in `MEANINGS`.
    """
    unknown = [meaning for meaning in axes if meaning not in MEANINGS]
    if unknown or len(axes) != len(shape):
        raise TypeError(f"axes {axes} of an array of shape {shape}: give each one of {', '.join(map(str, MEANINGS))}")
    split = mesh.shape["tensor"]
    groups = math.gcd(shape[axes.index("head")], split) if "head" in axes else 1
    if groups not in (1, split):
        devices = mesh.devices.reshape(*mesh.devices.shape[:2], groups, split // groups)
        mesh = Mesh(devices, (*AXES, "replica"), axis_types=(AxisType.Auto,) * 4)

    entries: list[Any] = []
    claimed: set[str] = set()
    for size, meaning in zip(shape, axes, strict=True):
        over = MEANINGS[meaning]
        free = over and claimed.isdisjoint(over) and size % math.prod(mesh.shape[axis] for axis in over) == 0
        entries.append((over if len(over) > 1 else over[0]) if free else None)
        claimed.update(over)
    return NamedSharding(mesh, P(*entries))


def path_name(path: Any) -> str:
    """The name of a leaf of a pytree, its key path as `a/b/0/c`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def shardings(tree: Any, axes: Any, mesh: Mesh) -> Any:
    """A NamedSharding for every array (or shape) of a pytree.

    Args:
      tree: such as a model's `parameters`.
      axes: the meaning of each array's axes, in the shape of `tree`, such as `mla.model.axes`.
      mesh: over ('data', 'fsdp', 'tensor').

    Raises:
      TypeError: with the path of the array, what `partition` refuses.
    """

    def place(path: Any, leaf: Any, declared: Axes) -> NamedSharding:
        try:
            return partition(declared, tuple(leaf.shape), mesh)
        except TypeError as error:
            raise TypeError(f"{path_name(path)}: {error}") from None

    return jax.tree_util.tree_map_with_path(place, tree, axes)


def put(shapes: Any, placed: Any) -> Any:
    """Shapes with shardings, of a pytree of shapes and one of shardings like it."""
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, placed)


def cache_shardings(cache: Any, mesh: Mesh) -> Any:
    """A NamedSharding for every array (or shape) of a cache, by what its stores say of their axes."""

    def place(names: Axes, leaf: Any) -> NamedSharding:
        axes = (*names, *(None,) * len(leaf.shape))[: len(leaf.shape)]
        return partition(axes, tuple(leaf.shape), mesh)

    return by_axes(place, cache)


def platform(mesh: Mesh | AbstractMesh) -> str | None:
    """The platform of a mesh's devices as `mla.ops.dispatch` names it: cpu, cuda, rocm, tpu; None: there are none."""
    if isinstance(mesh, AbstractMesh):
        return None
    device = mesh.devices.flat[0]
    name: str = device.platform
    if name != "gpu":
        return name
    return "rocm" if "rocm" in device.client.platform_version.lower() else "cuda"


@dataclasses.dataclass(frozen=True)
class Spread:
    """Has a function run on each device of a mesh with its share of arrays: for kernels, which XLA cannot split."""

    mesh: Mesh

    def parts(self, meaning: str) -> int:
        """Into how many parts the mesh splits an axis of this meaning."""
        return math.prod(self.mesh.shape[axis] for axis in MEANINGS[meaning])

    def __call__(self, run: Callable[..., jax.Array], axes: Sequence[Axes], out: Axes, *arrays: jax.Array) -> jax.Array:
        """`run(*arrays)`.

        Args:
          run: gets shares of the arrays, and gives one of the result.
          axes: the meanings of each array's axes; one that the mesh does not split evenly is whole on every device.
          out: those of the result, all of which it splits as far as it does the first array's.
        """
        specs = tuple(partition(names, a.shape, self.mesh).spec for names, a in zip(axes, arrays, strict=True))
        whole: dict[str, Any] = {"mesh": self.mesh, "check_vma": False}
        split: Any = jax.shard_map(run, in_specs=specs, out_specs=partition(out, arrays[0].shape, self.mesh).spec, **whole)
        result: jax.Array = split(*arrays)
        return result


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """For arrays [B, ...]: the batch is split over the data and fsdp axes."""
    return NamedSharding(mesh, P(BATCH))


def prepare_devices(config: MeshConfig) -> None:
    """What must precede the first use of a device: other processes, settings. Call once, before `make_mesh`.

    Raises:
      UserError: what `mla.processes.join` refuses.
    """
    processes.join(config)
    if config.host_devices:
        # Devices that exist already stay as many as they are; make_mesh then says whether that fits.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", config.host_devices)


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over all devices of all processes of the run, or over `devices`, which need not be there.

    Raises:
      UserError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = _mesh_shape(config, len(devices), devices[0].platform)
    return Mesh(np.asarray(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def abstract_mesh(config: MeshConfig, count: int, kind: str) -> AbstractMesh:
    """The mesh over so many devices of a kind that are not there: for programs that are lowered and not compiled.

    Raises:
      UserError: the axes do not multiply to the number of devices.
    """
    return AbstractMesh(_mesh_shape(config, count, kind), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _mesh_shape(config: MeshConfig, count: int, kind: str) -> tuple[int, ...]:
    shape = [getattr(config, axis) for axis in AXES]
    known = math.prod(size for size in shape if size != -1)
    if shape.count(-1) > 1:
        raise UserError("config.mesh: only one axis may be -1 (what is left of the devices)")
    if -1 in shape and count % known == 0:
        shape[shape.index(-1)] = count // known
    if math.prod(shape) != count:
        asked = " x ".join(f"{axis}={size}" for axis, size in zip(AXES, shape, strict=True))
        hint = " (on a CPU, mesh.host_devices sets their number)" if kind == "cpu" else ""
        raise UserError(
            f"config.mesh: {asked} does not fit {count} {kind} device(s); the product of the axes must be {count}{hint}"
        )
    return tuple(shape)


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
