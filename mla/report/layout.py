"""Lines of cells as a table: in columns for a terminal, or in Markdown. The first line is the header."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """In columns, the first two to the left; a rule under the header."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]

    def line(values: Sequence[str]) -> str:
        padded = [v.ljust(w) if i < 2 else v.rjust(w) for i, (v, w) in enumerate(zip(values, widths, strict=True))]
        return "  ".join(padded).rstrip()

    return "\n".join([line(lines[0]), "  ".join("-" * width for width in widths), *map(line, lines[1:])])


def markdown(lines: Sequence[Sequence[str]], names: int = 2) -> str:
    """A table of Markdown, all but the first `names` columns to the right."""
    rule = ["---"] * names + ["---:"] * (len(lines[0]) - names)
    return "\n".join("| " + " | ".join(line) + " |" for line in (lines[0], rule, *lines[1:]))
