"""Claims: which process works on something in a folder that several machines may see.

A claim is a small file that says who holds it and, while they do, counts up. Of the file system it asks two things that
shared ones give too: a link to a name fails where the name is taken, and a rename replaces in one go. It asks for no locks,
which may end at a host's border, and for no times of files, since clocks differ. Whether a holder still is, shows on its own
host by its process, and from another host by its count, which is watched for a while.

A claim may be held on behalf of a job, which a scheduler starts again where it believes the first try to be lost. Then what
is left of that try is waited for, and not refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mla import paths
from mla.errors import UserError

BEAT_SECONDS = 5.0  # between two counts
PATIENCE_SECONDS = 30.0  # in which a live holder has counted, whatever its disk and network do
POLL_SECONDS = 0.5  # between looks at an earlier try
JOB_VARIABLE = "MLA_JOB"  # of the environment: the job that a process works for


@dataclasses.dataclass(frozen=True)
class Holder:
    """Who holds a claim.

    Attributes:
      token: random; no two claims have the same.
      host, process: where it lives; `born`: when its process began as the host's system counts it, 0 if that is not known.
      since: when it took the claim, by its own clock, to the second, in UTC.
      doing: what it does.
      count: goes up while it lives.
      job: on whose behalf, a random word that all tries of a job have; '': of none.
    """

    token: str
    host: str
    process: int
    born: int
    since: str
    doing: str
    count: int = 0
    job: str = ""

    def __str__(self) -> str:
        return f"process {self.process} on {self.host} since {self.since}"

    @property
    def here(self) -> bool:
        """Whether it lives, or lived, on this host."""
        return self.host == socket.gethostname()

    @property
    def gone(self) -> bool:
        """Whether its process is known to have ended: it was on this host."""
        return self.here and (not _runs(self.process) or _born(self.process) != self.born)


class Claim:
    """A claim that this process holds, counting in a thread of its own.

    Args:
      path: the file, whose folder is there.
      doing: what the holder does.
      job: on whose behalf; None: what `JOB_VARIABLE` says. Another holder of the same job is waited for.

    Raises:
      UserError: another process holds it; its words are who.
    """

    def __init__(self, path: Path, doing: str, job: str | None = None):
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        process = os.getpid()
        self._path, self._ended, self._lost = path, threading.Event(), False
        job = os.environ.get(JOB_VARIABLE, "") if job is None else job
        self._holder = Holder(secrets.token_hex(8), socket.gethostname(), process, _born(process), now, doing, job=job)
        self._guard = threading.Lock()
        self._take()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def say(self, doing: str) -> None:
        """What the holder does from now on."""
        self._write(doing=doing)

    def require(self) -> None:
        """Raises UserError where another process has taken it over: this one did not count for too long."""
        if self._lost or not self._is_mine():
            raise UserError(f"{self._path}: another process has taken over while this one did not answer")

    def release(self) -> None:
        self._ended.set()
        self._thread.join()
        if self._is_mine():
            self._path.unlink(missing_ok=True)

    def _take(self) -> None:
        """Raises UserError where somebody else holds it."""
        while True:
            with _written(self._path, self._holder) as temporary:
                with contextlib.suppress(FileExistsError):
                    _link(temporary, self._path)
                    return
                holder = read(self._path)
                if holder is not None and lives(self._path, holder):
                    if not holder.job or holder.job != self._holder.job:
                        raise UserError(str(holder))
                    time.sleep(POLL_SECONDS)
                    continue
                # Of several that want the place of one that is gone, the one that makes this file first has it.
                token = "unreadable" if holder is None else holder.token
                place = self._path.with_name(f"{self._path.name}.{token}")
                try:
                    _link(temporary, place)
                except FileExistsError:
                    time.sleep(0.1)
                    if not (winner := read(place)) or winner.gone:
                        place.unlink(missing_ok=True)
                    continue
                try:
                    if read(self._path) == holder:
                        os.replace(temporary, self._path)
                        return
                finally:
                    place.unlink(missing_ok=True)

    def _is_mine(self) -> bool:
        holder = read(self._path)
        return holder is not None and holder.token == self._holder.token

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # a disk that is full, a network that is away: the next count may be written
                self._write()

    def _write(self, **changes: Any) -> None:
        with self._guard:
            if self._lost or not self._is_mine():
                self._lost = True
                return
            self._holder = dataclasses.replace(self._holder, count=self._holder.count + 1, **changes)
            with _written(self._path, self._holder) as temporary:
                os.replace(temporary, self._path)


@contextlib.contextmanager
def claim(path: Path, doing: str, job: str | None = None) -> Iterator[Claim]:
    """Holds a claim until the block ends or this process does. Arguments and errors: see `Claim`."""
    held = Claim(path, doing, job)
    try:
        yield held
    finally:
        held.release()


def read(path: Path) -> Holder | None:
    """Who holds a claim; None: nobody, or the file says nothing that can be read."""
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def lives(path: Path, holder: Holder) -> bool:
    """Whether a holder that was read from a claim still is; takes `PATIENCE_SECONDS` for one on another host that is not."""
    if holder.here:
        return not holder.gone
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        if (now := read(path)) != holder:  # it has counted, or let go, or somebody else has it
            return now is not None
        time.sleep(min(0.5, PATIENCE_SECONDS / 10))
    return False


@contextlib.contextmanager
def _written(path: Path, holder: Holder) -> Iterator[Path]:
    """A file beside a claim with this holder in it, for a link or a rename; it is gone afterwards."""
    temporary = paths.temporary(path)
    try:
        temporary.write_text(json.dumps(dataclasses.asdict(holder)) + "\n", encoding="utf-8")
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _link(there: Path, path: Path) -> None:
    """Gives a file another name. Raises FileExistsError where that is taken."""
    try:
        os.link(there, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        with path.open("x", encoding="utf-8") as file:
            file.write(there.read_text(encoding="utf-8"))


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        return True
    return True


def _born(process: int) -> int:
    """When a process began, in the system's ticks; 0 where there is no /proc, and of a zombie, which has ended."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return 0 if fields[0] in ("Z", "X") else int(fields[19])
    except (OSError, ValueError, IndexError):
        return 0
