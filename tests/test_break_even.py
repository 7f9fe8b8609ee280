"""Break-even lengths of states against caches that grow."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib.image
import pytest
from matplotlib.figure import Figure
from matrix import Row
from rows import make_row, typed

from mla.report import plot
from mla.report.break_even import draw, length, section
from mla.report.points import points

GROWTH = {"gqa": 2 * 4 * 64, "mla": 256 + 32}  # elements a token at d_model 768: four heads of keys and values, a latent


@pytest.mark.parametrize(
    ("name", "heads", "tokens"),
    [
        ("linear", 12, (98, 174)),
        ("lightning", 12, (96, 171)),
        ("gated_linear", 4, (144, 256)),
        ("kimi_delta", 6, (206, 366)),
        ("gated_delta", 6, (230, 408)),
        ("mamba2", 24, (395, 702)),
        ("retention", 3, (768, 1366)),
    ],
)
def test_lengths_are_those_of_the_papers_sizes(name: str, heads: int, tokens: tuple[int, int]) -> None:
    """In elements, counted by hand; in bytes an fp32 state beside a bf16 cache takes twice as long, its tail does not."""
    row = Row(name, {"num_heads": heads})
    terms = row.config().cache_formula(row.around(d_model=768, num_heads=12))
    elements, held = sum(term.elements for term in terms), sum(term.bytes_at(1, 2) for term in terms)
    assert tuple(length(elements, 0, growth) for growth in GROWTH.values()) == tokens
    tail = sum(term.elements for term in terms[1:])
    assert held == 4 * (elements - tail) + 2 * tail
    assert length(held, 0, 2 * GROWTH["gqa"]) == math.ceil((2 * elements - tail) / GROWTH["gqa"])


def test_the_table_has_states_and_hybrids_against_what_grows() -> None:
    rows = [
        make_row("mla", "latents", 1.5, 100),
        make_row("gqa", "heads", 1.4, 400),
        make_row("state", "states", 1.6, 0, 1000),
        make_row("hybrid", "states", 1.5, 100, 750),
    ]
    lines = section(points(typed(rows))).splitlines()
    assert lines[2] == "| tokens from which no more bytes are held than by | mla | gqa |"
    assert sorted(lines[4:]) == ["| hybrid | never | 3 |", "| state | 10 | 3 |"]
    assert section(points(typed(rows[:2]))) == "" == section(points(typed(rows[2:3])))


def test_the_picture_has_bytes_over_length_of_what_the_table_compares(tmp_path: Path) -> None:
    """States flat, caches rising, by the bytes that were measured; without either, no panel."""
    rows = [make_row("gqa", "heads", 1.4, 400), make_row("state", "states", 1.6, 0, 1000)]
    axes = Figure().subplots()
    draw(axes, points(typed(rows)))
    held = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert held["state"] == [[tokens, 1000] for tokens in (256, 1024, 8192, 131072)]
    assert held["gqa"] == [[tokens, 400 * tokens] for tokens in (256, 1024, 8192, 131072)]
    heights = []
    for count in (1, 2):
        plot.draw(typed(rows[:count]), tmp_path / "plot.png")
        heights.append(matplotlib.image.imread(tmp_path / "plot.png").shape[0])
    assert heights[1] == 2 * heights[0]


def test_many_caches_are_shown_by_a_few() -> None:
    rows = [make_row(f"g{n}", "heads", 1.5, 10 * n) for n in range(1, 31)] + [make_row("state", "states", 1.6, 0, 1000)]
    header = section(points(typed(rows))).splitlines()[2].split(" | ")[1:]
    assert len(header) == 8 and header[0] == "g1" and header[-1].startswith("g30")
