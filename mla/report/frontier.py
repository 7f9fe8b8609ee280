"""Quality against cache bytes in files: report.md, frontier.png and report.html of rows that are there.

mla report DIR        # redraws them in the folder of a sweep or a run, and prints the table; see `redraw`
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from mla import paths
from mla import workdir as workdirs
from mla.attention.contract import BASELINES
from mla.errors import UserError, nearest
from mla.report import grid, page, plot, rates
from mla.report.points import compared_rows, points
from mla.report.rows import PAGE_FILE, PLOT_FILE, RATES_FILE, REPORT_FILE, RESULTS_FILE, Row, gather
from mla.report.tables import text_table
from mla.report.text import TITLE, measured_how, report

PROGRAM = ("python", "-m", "mla", "report")  # in a checkout and where the package is installed


def write(
    rows: Sequence[Row],
    directory: str | os.PathLike[str],
    command: str = "",
    redraw: str | None = None,
    against: Sequence[str] = BASELINES,
    places: Sequence[str | os.PathLike[str]] = (),
) -> Path:
    """Writes report.md, frontier.png and, where models were trained, report.html into a folder, each whole or not at all.

    Where learning rates were compared, learning_rates.png too.

    Args:
      rows: at least one.
      command: what made the results; the report quotes it.
      redraw: what draws both files again; by default `mla report` on the folder's results.
      against: labels of the points that others are compared with.
      places: where the folders of the runs may be; by default in that folder.

    Returns:
      The path of the plot.
    """
    folder = Path(directory)
    picture, text = folder / PLOT_FILE, folder / REPORT_FILE
    if redraw is None:
        redraw = shlex.join([*PROGRAM, str(folder / RESULTS_FILE)])
    with workdirs.replacing(picture) as temporary:
        (grid if grid.is_grid(rows) else plot).draw(rows, temporary)
        there = report(rows, command=command, redraw=redraw, against=against, places=places or [folder])
        workdirs.write_text(text, there)
    if not grid.is_grid(rows):
        with workdirs.replacing(folder / PAGE_FILE) as temporary:
            page.write(rows, temporary, TITLE.lstrip("# "), measured_how(compared_rows(rows)), places or [folder])
    if not grid.is_grid(rows) and rates.curves(rates.tried(rows)):
        with workdirs.replacing(folder / RATES_FILE) as temporary:
            rates.draw(rows, temporary)
    return picture


def require_own(folder: Path, remedy: str) -> None:
    """Refuses a folder with a report.md, frontier.png or report.html of somebody else's, which `write` would replace.

    Raises:
      UserError: a report.md that does not begin as this program's do, or one of the others without it.
    """
    text, picture = folder / REPORT_FILE, folder / PLOT_FILE
    if os.path.lexists(text):
        with contextlib.suppress(OSError):
            if text.read_text(encoding="utf-8", errors="replace").startswith((TITLE, grid.TITLE)):
                return
    for path in (text, picture, folder / PAGE_FILE, folder / RATES_FILE):
        if os.path.lexists(path):
            raise UserError(f"{path}: is there and was not written by this program; move it away or {remedy}")


def redraw(places: Sequence[str], out: str = "", against: Sequence[str] = ()) -> None:
    """Prints the table of what is there, and writes report.md and frontier.png.

    Args:
      places: at least one path as `gather` takes it.
      out: folder for both files, made if it is not there; '': the folder of the one place.
      against: labels of the points that others are compared with; by default `BASELINES`, where they are there.

    Raises:
      UserError: no place, several of them without `out`, an `out` with results of its own or a report of somebody else's,
        what `gather` refuses, rows that cannot stand in one table, or an `against` that is no point.
    """
    if not places:
        raise UserError("a PATH is missing: the folder of a sweep or a run, or its results.jsonl or eval.json")
    if len(places) > 1 and not out:
        raise UserError("--out is missing: which folder receives the report of several paths")
    given = [paths.expand(place, "PATH") for place in places]
    rows = [row for place in given for row in gather(place)]
    labels = [point.label for point in points(rows)]
    if unknown := next((name for name in against if name not in labels), ""):
        raise UserError(f"--against: {unknown!r} is no point; {nearest(unknown, labels)}")
    if against and grid.is_grid(rows):
        raise UserError("--against: has no effect on tricks, which are compared with their model as it is; leave it out")
    named = [f"--against={','.join(against)}"] if against else []
    first = Path(given[0])
    folder = Path(out) if out else first if os.path.isdir(first) else first.parent
    results = folder / RESULTS_FILE
    if os.path.exists(results) and len(given) == 1 and first.resolve() in (folder.resolve(), results.resolve()):
        again = shlex.join([*PROGRAM, str(results), *named]) if named else None
    elif os.path.exists(results):
        raise UserError(f"--out={folder}: the report there is of its {RESULTS_FILE}; choose another folder")
    else:
        again = shlex.join([*PROGRAM, *places, *([f"--out={out}"] if out else []), *named])
        require_own(folder, "choose another --out")
    workdirs.standing(folder, "choose another --out")
    workdirs.make(folder, "choose another --out")
    old = folder / REPORT_FILE
    before = old.read_text(encoding="utf-8", errors="replace") if os.path.exists(old) else ""
    made = re.search(r"^Made by\n\n    (.+)$", before, re.MULTILINE)  # a redrawn report still says where it is from
    picture = write(rows, folder, made[1] if made else "", again, against or BASELINES, given)
    print(text_table(rows))
    print(f"plot: {picture}")
