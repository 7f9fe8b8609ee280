"""A program as a child process: with a log, and stopped in good order."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

LAUNCHER = Path(__file__).with_name("launcher.py")
GRACE_SECONDS = 60  # for a stopped child to save its checkpoint
POLL_SECONDS = 0.2  # between looks at the events


class StopRequest:
    """Asks children of other threads to end.

    Attributes:
      asked: set it, and they get SIGTERM, so that they save their checkpoint; none is started any more.
      at_once: set it too, and they are killed.
    """

    def __init__(self) -> None:
        self.asked, self.at_once = threading.Event(), threading.Event()


def run(
    command: Sequence[str], log: Path, variables: Mapping[str, str], cwd: str = "", stop: StopRequest | None = None
) -> str:
    """Runs a program of this Python to its end, its output appended to a log. Where this process is killed, it gets SIGTERM.

    An exception in this thread, such as KeyboardInterrupt, stops the child as `stop` does, and is raised again.

    Args:
      command: what follows `python -u`.
      log: file; the command line is written to it first.
      variables: added to the environment.
      cwd: the folder it runs in; '': this process's.

    Returns:
      '' if it succeeded, otherwise its last line, the signal that ended it, or that it was not started any more.
    """
    stop = stop or StopRequest()
    if stop.asked.is_set():
        return "was not started: the sweep was interrupted"
    with open(log, "ab") as output:
        output.write(f"$ python {shlex.join(command)}\n".encode())
        output.flush()
        start = output.tell()
        # In a session of its own, so that Ctrl-C on the terminal reaches this process only.
        child = subprocess.Popen(
            [sys.executable, "-IS", str(LAUNCHER), str(os.getpid()), sys.executable, "-u", *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **variables},
            cwd=cwd or None,
            start_new_session=True,
        )
        try:
            while child.poll() is None and not stop.asked.is_set():
                _wait(child, POLL_SECONDS)
        finally:
            _end(child, stop)
    if child.returncode == 0:
        return ""
    script = f"mla {command[3]}" if tuple(command[:3]) == ("-P", "-m", "mla") else Path(command[0]).name
    if child.returncode < 0:
        return f"{script} was ended by {signal.Signals(-child.returncode).name}"
    with open(log, "rb") as written:
        written.seek(start)
        lines = [line.strip() for line in written.read().decode(errors="replace").splitlines() if line.strip()]
    return f"{script}: {lines[-1].removeprefix('error: ')}" if lines else f"{script} ended with status {child.returncode}"


def _wait(child: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether a child has ended, after so many seconds at most."""
    try:
        child.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _end(child: subprocess.Popen[bytes], stop: StopRequest) -> None:
    """Has a child end, if it has not: in good order, unless that takes too long or is cut short."""
    if child.poll() is not None:
        return
    try:
        child.terminate()
        for _ in range(round(GRACE_SECONDS / POLL_SECONDS)):
            if _wait(child, POLL_SECONDS) or stop.at_once.is_set():
                break
    finally:  # a second KeyboardInterrupt comes here too
        if child.poll() is None:
            child.kill()
            child.wait()
