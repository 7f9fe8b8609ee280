"""Who works on what, where several machines see one folder: nobody twice, and nothing waits for one that is gone."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mla import claims
from mla.errors import UserError
from mla.sweep import status
from mla.sweep.executors.contract import Command, Job, carry_out, claim_of

HOLDS = """
import sys, time
from pathlib import Path
from mla import claims
held = claims.Claim(Path(sys.argv[1]), "training")
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(claims, "PATIENCE_SECONDS", 1.0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.claim"


@pytest.fixture
def elsewhere(path: Path) -> Iterator[Any]:
    """A holder on another host, which counts from `start()` to `stop()`."""
    ended = threading.Event()
    holder = claims.Holder("t", "far", os.getpid(), 0, "2026-01-01T00:00:00+00:00", "training")

    def write(count: int) -> None:
        temporary = path.with_name("far.tmp")
        temporary.write_text(json.dumps(dataclasses.asdict(dataclasses.replace(holder, count=count))))
        os.replace(temporary, path)

    def counts() -> None:
        number = 0
        while not ended.wait(0.05):
            number += 1
            write(number)

    thread = threading.Thread(target=counts)

    class Elsewhere:
        start = staticmethod(thread.start)

        @staticmethod
        def stop() -> None:
            ended.set()
            if thread.ident:
                thread.join()

    write(0)
    yield Elsewhere
    Elsewhere.stop()


def test_one_at_a_time_and_it_says_who(path: Path) -> None:
    with claims.claim(path, "starting") as held:
        with pytest.raises(UserError, match=f"^process {os.getpid()} on .* since 20"):
            claims.Claim(path, "training")
        held.say("evaluating")
        before = claims.read(path)
        assert before is not None and before.doing == "evaluating" and claims.lives(path, before)
        deadline = time.monotonic() + 20
        while claims.read(path) == before and time.monotonic() < deadline:
            time.sleep(0.02)
        after = claims.read(path)
        assert after is not None and after.count > before.count and after.token == before.token
        held.require()
    assert not list(path.parent.iterdir())
    with claims.claim(path, "again"):
        pass


def test_the_place_of_a_killed_process_is_free_at_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "PATIENCE_SECONDS", 600.0)
    child = subprocess.Popen([sys.executable, "-c", HOLDS, str(path)], stdout=subprocess.PIPE, text=True, cwd=os.getcwd())
    assert child.stdout is not None and child.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"process {child.pid} on"):
        claims.Claim(path, "training")
    child.kill()
    child.wait()
    with claims.claim(path, "training"):
        pass


def test_another_host_holds_it_as_long_as_it_counts(path: Path, elsewhere: Any) -> None:
    elsewhere.start()
    with pytest.raises(UserError, match="on far since 2026-01-01"):
        claims.Claim(path, "training")
    elsewhere.stop()
    start = time.monotonic()
    with claims.claim(path, "training"):
        assert time.monotonic() - start >= 0.9


@pytest.mark.parametrize("links", [True, False])
def test_of_many_that_want_the_place_of_one_that_is_gone_one_gets_it(
    links: bool, path: Path, elsewhere: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On file systems with links and without."""

    def refuse(*_: Any) -> None:
        raise OSError(1, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    got: list[claims.Claim] = []
    refused: list[str] = []

    def take() -> None:
        try:
            got.append(claims.Claim(path, "training"))
        except UserError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1 and len(refused) == 7
    got[0].require()
    got[0].release()
    assert not list(path.parent.glob("*"))


def test_what_has_been_taken_over_is_neither_used_nor_removed(path: Path, elsewhere: Any) -> None:
    path.unlink()
    held = claims.Claim(path, "training")
    elsewhere.start()
    deadline = time.monotonic() + 20
    while (holder := claims.read(path)) and holder.host != "far" and time.monotonic() < deadline:
        time.sleep(0.02)
    with pytest.raises(UserError, match="another process has taken over while this one did not answer"):
        held.require()
    held.release()
    holder = claims.read(path)
    assert holder is not None and holder.host == "far"


def test_what_cannot_be_read_is_nobody_s(path: Path) -> None:
    for text in ("", "{", '{"host": 1}'):
        path.write_text(text)
        with claims.claim(path, "training"):
            pass


def test_a_job_runs_once_though_two_sweeps_want_it(tmp_path: Path) -> None:
    command = Command("done", ("-c", "import time; time.sleep(1.5)"), "training")
    job = Job("a", (command,), tmp_path / "a.log", {}, str(tmp_path))
    ended: list[Any] = []
    first = threading.Thread(target=lambda: ended.append(carry_out(job)))
    first.start()
    while not (holder := claims.read(claim_of(job.log))) or holder.doing != "training":
        time.sleep(0.02)
    second = carry_out(dataclasses.replace(job, token="of another sweep"))
    assert second.failure.startswith(f"is run elsewhere: process {os.getpid()} on") and not second.seconds
    first.join()
    assert ended[0].failure == "" and not claim_of(job.log).exists()


def test_another_try_of_a_job_waits_for_the_first_one(tmp_path: Path) -> None:
    """As where a scheduler has given up a node that lives on."""
    log = tmp_path / "a.log"
    command = Command("done", ("-c", "import time; print('begins'); time.sleep(1); print('ends')"), "training")
    job = Job("a", (command,), log, {}, str(tmp_path))
    ended: list[Any] = []
    tries = [threading.Thread(target=lambda: ended.append(carry_out(job))) for _ in range(2)]
    for thread in tries:
        thread.start()
    for thread in tries:
        thread.join()
    assert [one.failure for one in ended] == ["", ""]
    assert [line for line in log.read_text().splitlines() if line in ("begins", "ends")] == ["begins", "ends"] * 2


def test_a_program_waits_for_what_an_earlier_try_has_left(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = subprocess.Popen(
        [sys.executable, "-c", HOLDS.replace("600", "2"), str(path)],
        env=os.environ | {claims.JOB_VARIABLE: "job"},
        stdout=subprocess.PIPE,
    )
    assert left.stdout is not None and left.stdout.readline()
    with pytest.raises(UserError, match=f"process {left.pid}"):
        claims.Claim(path, "training")
    monkeypatch.setenv(claims.JOB_VARIABLE, "job")
    with claims.claim(path, "training"):
        assert left.wait(5) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="by a call of Linux")
def test_a_program_ends_with_what_started_it(tmp_path: Path) -> None:
    log = tmp_path / "log"
    child = "import os, time; print('pid', os.getpid()); time.sleep(600)"
    code = "import sys; from pathlib import Path; from mla.sweep.executors.process import run; "
    code += "run(('-c', sys.argv[1]), Path(sys.argv[2]), {})"
    parent = subprocess.Popen([sys.executable, "-c", code, child, str(log)])
    deadline = time.monotonic() + 60
    while not log.exists() or not (said := log.read_text().rpartition("pid ")[2]).endswith("\n") or "'" in said:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    pid = int(said)
    assert claims._born(pid)
    parent.kill()
    parent.wait()
    while claims._born(pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.skipif(sys.platform != "linux", reason="seen in /proc")
def test_a_holder_that_nobody_waited_for_is_gone(path: Path) -> None:
    """As one is whose parent was killed, in a container whose first process reaps nothing."""
    holder = subprocess.Popen([sys.executable, "-c", HOLDS, str(path)], stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline()
    holder.kill()
    os.waitid(
        os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT
    )  # its files are closed before it is a zombie, so they tell too little
    with claims.claim(path, "training"):
        pass
    holder.wait()


def test_the_status_of_a_sweep(config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec, work = tmp_path / "sweep.py", tmp_path / "work"
    spec.write_text(
        "from mla.sweep.runs import Training\n\n\ndef get_runs(variant=''):\n"
        f"    for name in 'abc':\n        yield Training(name, '{config_file}:mha', {{}}, 'mha')\n"
        f"    yield Training('d', '{config_file}:mha', {{'config.model.num_heads': 3}}, 'mha')\n"
    )
    (work / "a").mkdir(parents=True)
    line = {"step": 3, "loss": 1.0, "tokens_per_second": 64.0, "elapsed_seconds": 9.0}
    (work / "a" / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    before = sorted(work.rglob("*"))
    with claims.claim(claim_of(work / "a.log"), "training") as held:
        assert status.status(str(spec), str(work)) == 0
        said = [words.split() for words in capsys.readouterr().out.splitlines()]
        assert said[2][:3] == ["a", "training", "3/6"] and said[2][-2:] == ["process", str(os.getpid())]
        # 3 steps of 8 texts of 16 tokens at 64 tokens a second.
        assert " ".join(said[2][5:7]) == "6 s" and said[3] == ["b", "waiting", "0/6"] and said[5][:2] == ["d", "refused"]
        assert " ".join(said[6]) == "4 runs: 1 training, 2 waiting, 1 refused"
        held.say("evaluating")
        assert status.status(str(spec), str(work)) == 0
        assert capsys.readouterr().out.splitlines()[2].split()[:2] == ["a", "evaluating"]
    assert sorted(work.rglob("*")) == before
