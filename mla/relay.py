"""What one of several processes writes to stderr from C++, without what jax's coordination service has to say of a process
that is gone: lines and a stack trace in every other one. One line stands for them.

A script of its own, reading stdin: the library ends its process at once, and only another can then still speak.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator

FATAL = "Terminating process because the JAX distributed service detected fatal errors"
LOST = (
    "error: another process of this run is not there or does not answer, so this one ends too; once all have, start all"
    " again, to go on from the last checkpoint"
)
SERVICE = re.compile(r"^[IWE]\d{4} .*\b(coordination_service\w*|preemption_sync_manager|distributed_runtime\w*)\.cc:")
LOGGED = re.compile(r"^[IWEF]\d{4} ")


def relayed(lines: Iterable[str]) -> Iterator[str]:
    """Lines as they come, but for those of the service, of which the first fatal one becomes `LOST`, the last of all."""
    dropping = False
    for line in lines:
        if FATAL in line:
            yield LOST + "\n"
            return
        dropping = bool(SERVICE.match(line)) or (dropping and not LOGGED.match(line))
        if not dropping:
            yield line


if __name__ == "__main__":
    for line in relayed(iter(sys.stdin.readline, "")):
        sys.stderr.write(line)
        sys.stderr.flush()
    while sys.stdin.read(1 << 16):  # of a process that still writes its stack trace
        pass
