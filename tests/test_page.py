"""The page of a comparison: what stands in the file, and what a browser makes of it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from rows import make_row, typed

from mla.report import frontier, page
from mla.report.points import points
from mla.report.rows import PAGE_FILE

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LARGEST = 1_500_000  # bytes of a page
QUIET = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync")
OFFLINE = ("--disable-background-networking", "--disable-component-update", "--enable-logging=stderr")
WIDTH = "<script>setTimeout(() => document.title = innerWidth + ' ' + document.documentElement.scrollWidth, 3000)</script>"


def rows() -> list[Any]:
    """A point of two seeds, a window, one whose name is hostile, and one whose decode step reads less than is held."""
    reads = {"256": 4096, "1024": 8192, "8192": 16384, "131072": 32768}
    few = make_row("few", "sparse", 2.2, 64)
    few["cache"]["read_bytes_per_step"] = reads
    return [
        make_row("two-s0", "latents", 2.0, 128, point="two"),
        make_row("two-s1", "latents", 2.1, 128, point="two") | {"seed": 1},
        make_row("window", "window", 2.3, 0, constant=65536),
        make_row("</script><b>$&", "latents", 2.5, 32),
        few,
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("page")
    frontier.write(typed(rows()), made)
    return made


def test_the_file_needs_no_other(folder: Path) -> None:
    text = (folder / PAGE_FILE).read_text()
    assert len(text.encode()) < LARGEST
    body = text.rsplit("</head>", 1)[1]
    assert not re.search(r"<(script|img|iframe)[^>]*\ssrc=|<link", body)
    assert "</script><b>" not in body and body.count("<tr>") == 1 + 4
    assert "two (2 seeds)" in body and "growth of the cache" in body.split("<pre>")[1] and "**" not in body


def test_records_are_the_figures_of_the_rows() -> None:
    compared = points(typed(rows()))
    assert page.lengths(compared) == [256, 1024, 8192, 131072]
    assert set(page.qualities(compared)) == {"loss", "perplexity", "bits/byte", "decode tok/s"}
    by_place = {(record["point"], record["tokens"]): record for record in page.records(compared)}
    assert len(by_place) == 4 * 4
    assert by_place["two", 256]["loss"] == pytest.approx(2.05)
    assert by_place["two", 256]["loss high"] - by_place["two", 256]["loss"] == pytest.approx(0.05)  # sd / sqrt 2
    assert by_place["two", 8192]["bytes held in all"] == 8192 * 128
    assert by_place["window", 8192]["bytes held, per token of the text"] == 8.0
    assert by_place["window", 256]["bytes held, per token of the text"] == 256.0
    assert by_place["few", 8192]["bytes a decode step reads"] == 16384


def test_rows_that_say_no_lengths_have_a_table_alone(tmp_path: Path) -> None:
    row = make_row("bare", "latents", 2.0, 128)
    row["cache"]["bytes_at"] = {}
    frontier.write(typed([row]), tmp_path)
    text = (tmp_path / PAGE_FILE).read_text()
    assert 'id="frontier"' not in text and "<td>bare</td>" in text


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_draws_every_point(width: int, folder: Path, tmp_path: Path) -> None:
    """No error in the console, a mark for each point with its values, and nothing wider than the window."""
    head, tail = (folder / PAGE_FILE).read_text().rsplit("</body>", 1)
    copy = tmp_path / "page.html"
    copy.write_text(f"{head}{WIDTH}</body>{tail}")
    flags = [*QUIET, *OFFLINE, f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900"]
    command = [str(BROWSER), *flags, "--virtual-time-budget=8000", "--dump-dom", copy.as_uri()]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in ran.stderr, [line for line in ran.stderr.splitlines() if "CONSOLE" in line]
    marks = [label for label in re.findall(r'aria-label="([^"]*)"', ran.stdout) if "; parameters: " in label]
    assert len(marks) == 4
    two = next(label for label in marks if "point: two;" in label)
    assert "bytes: 128;" in two and re.search(r"perplexity: 7\.7[67]", two)  # the mean of exp(2) and exp(2.1), exp(2.05)
    assert any("point: &lt;/script&gt;&lt;b&gt;$&amp;;" in label for label in marks)
    inner, content = map(int, re.findall(r"<title>(\d+) (\d+)", ran.stdout)[0])
    assert content <= inner
    assert ran.stdout.count("<option") == 4 + 3 and 'type="range"' in ran.stdout
