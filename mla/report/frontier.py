"""Quality against cache bytes in files: report.md and frontier.png of rows that are there.

mla report DIR        # redraws both files in the folder of a sweep or a run, and prints the table; see `redraw`
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from mla import paths
from mla.errors import UserError
from mla.report import grid, plot
from mla.report.points import points
from mla.report.rows import PLOT_FILE, REPORT_FILE, RESULTS_FILE, Row, gather
from mla.report.tables import text_table
from mla.report.text import report


def write(rows: Sequence[Row], directory: str | os.PathLike[str], command: str = "", redraw: str | None = None) -> Path:
    """Writes report.md and frontier.png into a folder, each whole or not at all.

    Args:
      rows: at least one.
      command: what made the results; the report quotes it.
      redraw: what draws both files again; by default `frontier` on the folder's results.

    Returns:
      The path of the plot.
    """
    folder = Path(directory)
    picture, text = folder / PLOT_FILE, folder / REPORT_FILE
    temporary = folder / f".{PLOT_FILE}"
    (grid if grid.is_grid(rows) else plot).draw(rows, temporary)
    os.replace(temporary, picture)
    if redraw is None:
        redraw = f"python -m mla.report.frontier {folder / RESULTS_FILE}"
    temporary = folder / f".{REPORT_FILE}"
    temporary.write_text(report(rows, command=command, redraw=redraw), encoding="utf-8")
    os.replace(temporary, text)
    return picture


def redraw(places: Sequence[str], out: str = "") -> None:
    """Prints the table of what is there, and writes report.md and frontier.png.

    Args:
      places: at least one path as `gather` takes it.
      out: folder for both files, made if it is not there; '': the folder of the one place.

    Raises:
      UserError: no place, several of them without `out`, an `out` with results of its own, what `gather` refuses, or rows
        that cannot stand in one table.
    """
    if not places:
        raise UserError("a PATH is missing: the folder of a sweep or a run, or its results.jsonl or eval.json")
    if len(places) > 1 and not out:
        raise UserError("--out is missing: which folder receives the report of several paths")
    given = [paths.expand(place, "PATH") for place in places]
    rows = [row for place in given for row in gather(place)]
    points(rows)
    first = Path(given[0])
    folder = Path(out) if out else first if first.is_dir() else first.parent
    results = folder / RESULTS_FILE
    if results.exists() and len(given) == 1 and first.resolve() in (folder.resolve(), results.resolve()):
        again = None
    elif results.exists():
        raise UserError(f"--out={folder}: the report there is of its {RESULTS_FILE}; choose another folder")
    else:
        again = shlex.join(["mla", "report", *places, *([f"--out={out}"] if out else [])])
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise UserError(f"--out={folder}: is a file, not a folder") from error
    old = folder / REPORT_FILE
    before = old.read_text(encoding="utf-8", errors="replace") if old.exists() else ""
    made = re.search(r"^Made by\n\n    (.+)$", before, re.MULTILINE)  # a redrawn report still says where it is from
    picture = write(rows, folder, made[1] if made else "", again)
    print(text_table(rows))
    print(f"plot: {picture}")


def main(arguments: Sequence[str]) -> int:
    """See the module's docstring."""
    try:
        if len(arguments) != 1:
            raise UserError("usage: python -m mla.report.frontier DIR/results.jsonl")
        redraw(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
