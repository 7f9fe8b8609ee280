"""Processes that are one run: how they come together, which of them writes, what they agree on, how they end.

Each has some of the devices of one mesh and runs the same program; all see the same folder. The primary alone writes to it,
but for its share of a checkpoint, and prints. An array that is needed everywhere comes from a program over the mesh; what a
file or a signal says, from here.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from mla import config as configs
from mla import relay
from mla.config import Config, MeshConfig
from mla.errors import UserError

ADDRESS, COUNT, NUMBER = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
_BLOCK = 4096  # bytes; what is told is filled up to a multiple of it, so that few programs are compiled


def join(config: MeshConfig) -> None:
    """Waits for the other processes of the run, if `mesh.distributed` or the environment says that there are some.

    JAX_COORDINATOR_ADDRESS is HOST:PORT of process 0, JAX_NUM_PROCESSES how many there are and JAX_PROCESS_ID which of them
    this is, from 0. What is not set, a cluster's manager tells that jax knows (Slurm, Open MPI, Kubernetes, TPU pods). Must
    precede the first use of a device.

    Raises:
      UserError: what is set makes no sense, something is missing, or the others do not come.
    """
    count, number, address = _whole(COUNT), _whole(NUMBER), os.environ.get(ADDRESS)
    if not (config.distributed or count is not None or number is not None) or jax.distributed.is_initialized():
        return
    if count is not None and number is not None and not 0 <= number < count:
        raise UserError(f"{NUMBER}: {number} is not from 0 to {count - 1}, as {COUNT}={count} has it")
    if address:
        _require_address(address, served=number == 0)
    _filter_stderr()
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM for itself
    try:
        jax.distributed.initialize(
            num_processes=count,
            process_id=number,
            initialization_timeout=config.join_seconds,
            heartbeat_timeout_seconds=config.silence_seconds,
        )
    except (ValueError, RuntimeError) as error:
        unset = [name for name in (ADDRESS, COUNT, NUMBER) if name not in os.environ]
        if unset:
            why = f"no cluster manager was found that tells of other processes ({_first_line(error)})"
            raise UserError(f"config.mesh.distributed: {why}; set {' and '.join(unset)}, see docs/scale.md") from error
        why = f"the {count} processes do not come together at {address} ({_first_line(error)})"
        raise UserError(f"{ADDRESS}: {why}") from error


def primary() -> bool:
    """Whether this process writes and prints for all; where there is one only, it does."""
    return jax.process_index() == 0


def several() -> bool:
    """Whether the run has more processes than this one."""
    return jax.process_count() > 1


def hidden() -> bool | None:
    """For `tqdm(disable=)`: bars are the primary's, and where it is a terminal."""
    return None if primary() else True


def largest(number: int) -> int:
    """The largest of the numbers that all processes call this with."""
    return int(multihost_utils.process_allgather(np.int32(number)).max()) if several() else number


def from_primary(value: Any) -> Any:
    """What the primary calls this with, in every process: anything that JSON holds."""
    if not several():
        return value
    text = json.dumps(value).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    block = np.zeros(-(-size // _BLOCK) * _BLOCK, np.uint8)
    if primary():
        block[:size] = np.frombuffer(text, np.uint8)
    told: np.ndarray = np.asarray(multihost_utils.broadcast_one_to_all(block))
    return json.loads(told[:size].tobytes())


def require_same(config: Config, corpus_sha256: str = "") -> None:
    """Refuses to go on where processes differ: they would compute different things, or wait for ever.

    Args:
      config: whose fields must be the same, but for where prepared data are.
      corpus_sha256: of the data, which each process has read for itself.

    Raises:
      UserError: in a process that differs from the primary; names the first field.
    """
    if not several():
        return
    settings = {f"config.{field}": value for field, value in configs.leaves(config) if field != "data.cache_dir"}
    here = json.loads(json.dumps(settings | {"the sha256 of config.data.corpus": corpus_sha256}))
    for name, value in from_primary(here).items():
        if here.get(name) != value:
            said = f"is {value!r} in process 0 and {here.get(name)!r} in process {jax.process_index()}"
            raise UserError(f"{name}: {said}; start all alike")


def part() -> None:
    """Waits until all processes are here, after which each may end with a status of its own, or go on alone."""
    if several():
        jax.distributed.shutdown()


def lost(error: BaseException) -> bool:
    """Whether an error is that another process is gone, as collectives and the coordination service tell it."""
    seen: BaseException | None = error
    while seen is not None and several():
        if re.search(r"Gloo|NCCL|CoordinationService|heartbeat|Connection (closed|reset) by peer", str(seen)):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


@contextlib.contextmanager
def ending() -> Iterator[None]:
    """Has this process, where its run has several, wait for no other at its end unless all is well: the others then end too.

    They see its connections close or, where it is gone without a word, miss it for `mesh.silence_seconds`. Each says so in
    one line.
    """
    try:
        yield
    except SystemExit as error:
        if error.code and jax.distributed.is_initialized():
            _end(error.code if isinstance(error.code, int) else 1)
        raise
    except BaseException as error:
        if not jax.distributed.is_initialized():
            raise
        if lost(error):
            os.write(2, f"{relay.FATAL}\n".encode())
        else:
            traceback.print_exc()
        _end(1)


def _end(status: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # what runs at exit otherwise waits for the others


def _whole(variable: str) -> int | None:
    text = os.environ.get(variable)
    if text is not None and not re.fullmatch(r"\d+", text):
        raise UserError(f"{variable}: {text!r} is no whole number")
    return None if text is None else int(text)


def _require_address(address: str, served: bool) -> None:
    """Refuses what is no HOST:PORT, and a port that this process is to serve and cannot, which the library would die of."""
    port = re.fullmatch(r".+:(\d{1,5})", address)
    if port is None:
        raise UserError(f"{ADDRESS}: {address!r} is not HOST:PORT of process 0")
    try:
        if served:
            socket.create_server(("", int(port[1]))).close()
    except (OSError, OverflowError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{ADDRESS}: port {port[1]} cannot be served on this host ({why}); name a free one") from error


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0].rstrip(".")


def _filter_stderr() -> None:
    """Has what libraries in C++ write to stderr pass through `mla.relay`, in a process that outlives this one."""
    stream = os.fdopen(os.dup(2), "w", buffering=1, encoding=sys.stderr.encoding, errors="backslashreplace")
    script = [sys.executable, "-S", "-E", str(Path(relay.__file__))]
    # A session of its own: Ctrl-C and a shell's kill reach those that train, and it ends after them.
    child = subprocess.Popen(script, stdin=subprocess.PIPE, stderr=stream, start_new_session=True)
    assert child.stdin is not None
    sys.stderr.flush()
    os.dup2(child.stdin.fileno(), 2)
    child.stdin.close()
    child.returncode = 0  # nobody waits for it
    sys.stderr = stream
