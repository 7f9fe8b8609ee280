"""Runs a program in place of itself, which gets SIGTERM when the process that started it is gone.

    python -IS launcher.py PARENT PROGRAM ARGUMENT ...

A killed worker of a scheduler would leave its program running, beside that of the next try and on the same device. On Linux;
elsewhere the next try waits for the program (`mla.claims`). A script of its own, since nothing may run between fork and exec
of a process that has threads. It imports nothing of the package, so that it takes milliseconds.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(parent: int, command: list[str]) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it was killed before that
            sys.exit(128 + signal.SIGTERM)
    # Schedulers send it to all processes of a job that is out of time; what started this one then stops it in good order.
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    os.execv(command[0], command)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
