"""Child processes of a sweep: one at a time, with a log each, stopped in good order."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

GRACE_SECONDS = 60  # for a stopped child to save its checkpoint


def environment(workdir: Path) -> dict[str, str]:
    """Variables that children get beside this process's own; what is set already stays.

    Huge pages make training on a CPU a quarter faster. The children of a sweep share compiled programs.
    """
    found = {
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
        "JAX_COMPILATION_CACHE_DIR": str((workdir / ".compilation_cache").absolute()),
    }
    return {key: os.environ.get(key, value) for key, value in found.items()}


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Inside, SIGTERM is KeyboardInterrupt too: job schedulers send it before they kill."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, interrupt) if main else None
    try:
        yield
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)


def program(name: str, root: Path | None) -> list[str]:
    """What Python runs as `mla NAME`.

    Args:
      name: `train` or `eval`.
      root: the folder of the scripts; None: the installed package, whatever the current folder holds.
    """
    return ["-P", "-m", "mla", name] if root is None else [str(root / f"{name}.py")]


def run(command: Sequence[str], log: Path, variables: dict[str, str]) -> str:
    """Runs a program to its end, its output appended to a log.

    KeyboardInterrupt stops the child with SIGTERM, so that it saves its checkpoint, waits for it, and is raised again; a
    second one kills it.

    Args:
      command: `program` and its arguments.
      log: file; the command line is written to it first.
      variables: added to the environment.

    Returns:
      '' if it succeeded, otherwise its last line or the signal that ended it.
    """
    with open(log, "ab") as output:
        output.write(f"$ python {shlex.join(command)}\n".encode())
        output.flush()
        start = output.tell()
        # In a session of its own, so that Ctrl-C on the terminal reaches this process only.
        child = subprocess.Popen(
            [sys.executable, "-u", *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **variables},
            start_new_session=True,
        )
        try:
            status = child.wait()
        except BaseException:
            _stop(child)
            raise
    if status == 0:
        return ""
    script = f"mla {command[3]}" if command[:3] == ["-P", "-m", "mla"] else Path(command[0]).name
    if status < 0:
        return f"{script} was ended by {signal.Signals(-status).name}"
    with open(log, "rb") as written:
        written.seek(start)
        lines = [line.strip() for line in written.read().decode(errors="replace").splitlines() if line.strip()]
    return f"{script}: {lines[-1].removeprefix('error: ')}" if lines else f"{script} ended with status {status}"


def _stop(child: subprocess.Popen[bytes]) -> None:
    try:
        child.terminate()
        child.wait(GRACE_SECONDS)
    except (KeyboardInterrupt, subprocess.TimeoutExpired):
        child.kill()
        child.wait()
