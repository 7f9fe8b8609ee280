"""The frontier as a picture: perplexity over cache bytes per token, readable in black and white."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter

from mla.evaluation.cache_bytes import of_row, reads_less, step_reads
from mla.evaluation.contract import Axis
from mla.evaluation.measures import REGISTRY
from mla.report import break_even, positions
from mla.report.points import Point, points
from mla.report.rows import Row

# Colours of Okabe and Ito (2008), told apart with any colour vision; marker and line tell families apart in print.
STYLES = (
    ("#0072B2", "o", "-"),
    ("#D55E00", "s", "--"),
    ("#009E73", "^", "-."),
    ("#CC79A7", "D", ":"),
    ("#56B4E9", "v", "-"),
    ("#E69F00", "P", "--"),
    ("#5A5A5A", "X", "-."),
    ("#B8A800", "*", ":"),
)
ROUNDS = 6  # in which names make room for each other, at most
FEW = 24  # points that fit a figure of the usual size; more get a larger one, and smaller names
COVERED, CROSSED = 100.0, 5.0  # cost of covering or being covered, and of a line that goes through
FAR = 15  # typographic points: a name further from its point gets a line to it
LOG_RATIO = 4  # perplexities that span more than this factor get a log axis


class Abscissa(NamedTuple):
    """What stands on an x axis: its label, and the bytes a token of a point."""

    label: str
    value: Callable[[Point], float]


HELD = Abscissa(
    "KV-cache bytes per token (content, all layers, one sequence; read off the live arrays)",
    lambda point: point.cache_bytes,
)
READ = Abscissa(
    "bytes that a decode step reads per token of the context (content, all layers, one sequence)",
    lambda point: point.mean(step_reads) or 0.0,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Mark:
    """A point as it is drawn: where it stands, and the heights one standard error below and above."""

    point: Point
    x: float
    y: float
    bounds: tuple[float, float]


def marks_of(compared: Sequence[Point], axis: Axis, abscissa: Abscissa = HELD) -> list[Mark]:
    """Points on a y axis, all of which have its figure; no bytes at all stand at the left edge."""
    edge = left_edge(map(abscissa.value, compared))
    marks = []
    for point in compared:
        mean, error = point.mean(axis.value) or 0.0, point.error_of(axis.value) or 0.0
        low, y, high = (axis.shown(value) for value in (mean - error, mean, mean + error))
        marks.append(Mark(point, max(abscissa.value(point), edge), y, (low, high)))
    return marks


@rc_context({"text.parse_math": False})  # a name may hold a $
def draw(rows: Sequence[Row], path: str | os.PathLike[str]) -> None:
    """Saves the plot as PNG: a panel for each axis of a measure that all rows have the figure of, and where a decode step of
    some row reads less than is held, for each axis a second panel below it, over the bytes that are read. Then, where rows
    have it, loss by position (`positions.draw`), and bytes over length where states or windows meet caches that grow
    (`break_even.draw`).

    x, log: measured content bytes a token adds to the cache, all layers, one sequence; hollow where they are amortised
    (see `Point`). y: the axis' figure, with one standard error where a point has several seeds. A line joins a family that
    has one point at each size.
    """
    compared = points(rows)
    every = [axis for measure in REGISTRY.values() for axis in measure.axes]
    shown = [axis for axis in every if all(point.mean(axis.value) is not None for point in compared)]
    over = (HELD, READ) if any(map(reads_less, rows)) and all(step_reads(row) is not None for row in rows) else (HELD,)
    panels = list(itertools.product(shown, over))
    larger = min(max(len(compared) / FEW, 1.0), 6.0) ** 0.5
    wanted = ((positions.draw, positions.streamed(compared)), (break_even.draw, all(break_even.compared_lengths(compared))))
    further = [draw_panel for draw_panel, there in wanted if there]
    count = len(panels) + len(further)
    figure = Figure(figsize=(8.0 * larger, 5.6 * larger * count), dpi=160, layout="constrained")
    canvas = FigureCanvasAgg(figure)  # no display, whatever backend the process uses otherwise
    subplots = figure.subplots(count, squeeze=False)[:, 0]
    drawn = [(axes, marks_of(compared, *panel)) for axes, panel in zip(subplots, panels, strict=False)]
    for draw_panel, axes in zip(further, subplots[len(panels) :], strict=True):
        draw_panel(axes, compared)
    families = list(dict.fromkeys(point.family for point in sorted(compared, key=lambda p: -p.cache_bytes)))
    for (axes, marks), (axis, abscissa) in zip(drawn, panels, strict=True):
        for index, family in enumerate(families):
            _draw_family(axes, family, [mark for mark in marks if mark.point.family == family], index)
        _scales(axes, marks)
        axes.set_xlabel(abscissa.label)
        axes.set_ylabel(_y_label(axis, rows))
    for axes in subplots:
        axes.grid(True, which="major", color="#DDDDDD", linewidth=0.6)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    _head(drawn[0][0], f"{shown[0].label.capitalize()} against KV-cache bytes per token", rows, len(families) > 1)
    figure.supxlabel(_footnotes(rows, compared), fontsize=7.5, color="#444444", x=0.01, ha="left")
    figure.draw_without_rendering()
    for axes, marks in drawn:
        _place_labels(canvas, axes, marks, {f: STYLES[i % len(STYLES)][0] for i, f in enumerate(families)})
    figure.savefig(path, format="png")


def _head(axes: Axes, title: str, rows: Sequence[Row], legend: bool) -> None:
    """Title, what the models have in common, and the legend, at the uppermost panel."""
    axes.set_title(title, fontsize=12, fontweight="bold", loc="left", pad=24)
    axes.annotate(
        _subtitle(rows),
        (0, 1),
        (0, 7),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=8,
        color="#444444",
    )
    if legend:
        axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0), handlelength=3)


def _draw_family(axes: Axes, family: str, marks: Sequence[Mark], index: int) -> None:
    """The points of one family with their error bars, the line that joins them, and what stands for it in the legend."""
    colour, marker, line = STYLES[index % len(STYLES)]
    style: dict[str, Any] = {"color": colour, "zorder": 3}
    # Points of equal bytes are alternatives, no curve.
    curve = len(marks) > 1 and len({mark.x for mark in marks}) == len(marks)
    if curve:
        axes.plot([m.x for m in marks], [m.y for m in marks], linestyle=line, linewidth=1.4, alpha=0.8, **style)
    for mark in marks:
        if mark.point.error is not None:
            low, high = mark.bounds
            axes.errorbar(mark.x, mark.y, [[mark.y - low], [high - mark.y]], capsize=3, linewidth=1.2, **style)
        axes.plot(
            mark.x,
            mark.y,
            marker=marker,
            markersize=8,
            markerfacecolor="white" if mark.point.amortised else colour,
            markeredgecolor=colour,
            markeredgewidth=1.6,
            linestyle="none",
            zorder=4,
        )
    axes.plot(
        [],
        [],
        color=colour,
        marker=marker,
        markersize=7,
        markerfacecolor="white" if all(mark.point.amortised for mark in marks) else colour,
        linestyle=line if curve else "none",
        label=family,
    )


def left_edge(held: Iterable[float]) -> float:
    """Where no bytes at all stand on a log axis: an octave below the least that is more."""
    return min((value for value in held if value > 0), default=2.0) / 2


def _scales(axes: Axes, marks: Sequence[Mark]) -> None:
    """A log axis in octaves with room for labels at the sides; heights on a log axis only where they span a lot."""
    low, high = np.log2(min(mark.x for mark in marks)), np.log2(max(mark.x for mark in marks))
    margin = max(0.12 * (high - low), 0.5)
    axes.set_xscale("log", base=2)
    axes.set_xlim(2 ** (low - margin), 2 ** (high + margin))
    ticks = np.arange(np.ceil(low - margin), np.floor(high + margin) + 1)
    axes.xaxis.set_major_locator(FixedLocator((2.0 ** ticks[:: -(-len(ticks) // 10)]).tolist()))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.10g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())

    bounds = [bound for mark in marks for bound in mark.bounds]
    least, most = min(bounds), max(bounds)
    if most > LOG_RATIO * least > 0:
        axes.set_yscale("log")
        axes.set_ylim(least / (most / least) ** 0.1, most * (most / least) ** 0.1)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.4g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        room = max(0.12 * (most - least), 0.002 * abs(most)) or 1.0
        axes.set_ylim(least - room, most + room)
        axes.yaxis.set_major_locator(MaxNLocator(8))


def _y_label(axis: Axis, rows: Sequence[Row]) -> str:
    """With the unit of text, where the figure is that of a token, and the split."""
    texts = [row.corpus for row in rows if row.corpus]
    tokenizers, splits = (sorted({getattr(text, key) for text in texts} - {""}) for key in ("tokenizer", "split"))
    unit = {"bytes": "byte"}.get("".join(tokenizers), f"token of {', '.join(tokenizers)}" if tokenizers else "token")
    label = f"{axis.label} per {unit}" if axis.per_token else axis.label
    return f"{label} ({', '.join(splits)} split)" if splits else label


def _subtitle(rows: Sequence[Row]) -> str:
    """What the models have in common, in one line."""

    def spread(values: list[Any], form: str) -> str:
        known = [value for value in values if value is not None]
        if not known:
            return ""
        low, high = min(known), max(known)
        return form.format(low) if low == high else f"{form.format(low)} to {form.format(high)}"

    parts = [
        (spread([row.params.total for row in rows], "{:,}"), "{} parameters"),
        (spread([row.train_tokens for row in rows], "{:,}"), "{} training tokens"),
        (spread([row.context for row in rows], "{:,}"), "context {}"),
        (", ".join(sorted({of_row(row).dtype for row in rows} - {""})), "cache in {}"),
        (", ".join(sorted({str(row.environment.get("device_kind") or "") for row in rows})), "on {}"),
    ]
    return " · ".join(form.format(value) for value, form in parts if value)


def _footnotes(rows: Sequence[Row], compared: Sequence[Point]) -> str:
    notes = "".join(f"{note}\n" for note in dict.fromkeys(row.place.note for row in rows) if note)
    if any(point.cache_bytes == 0 for point in compared):
        notes += "At the left edge: no bytes at all.\n"
    seeds = [len(point.rows) for point in compared]
    if max(seeds) == 1:
        notes += "One seed a point: no error bars."
    else:
        count = f"{min(seeds)}" if min(seeds) == max(seeds) else f"{min(seeds)} to {max(seeds)}"
        notes += f"Mean over {count} seeds a point; bars: one standard error."
    baselines = {value for row in rows if (value := row.baseline.unigram_perplexity) is not None}
    if len(baselines) == 1:
        notes += f" Unigram perplexity of this corpus: {baselines.pop():.4g}."
    return notes


def _place_labels(canvas: FigureCanvasAgg, axes: Axes, marks: Sequence[Mark], colours: dict[str, str]) -> None:
    """Writes each point's name where it covers no marker, line, error bar or other name.

    Each name takes, of positions around its point, the one that costs least, near ones before far ones; in further rounds
    it moves again, now that the others stand. A thin line leads back from a far one.

    Args:
      canvas: of the figure, laid out.
      axes: what the points were drawn into, with its final limits.
      marks: at least one.
      colours: of the families.
    """
    renderer = canvas.get_renderer()
    scale = canvas.figure.dpi / 72  # pixels a typographic point
    texts = [_text(axes, mark, 8.5 if len(marks) <= FEW else 7.0) for mark in marks]
    sizes = np.array([text.get_window_extent(renderer).size for text in texts])
    where = axes.transData.transform([(mark.x, mark.y) for mark in marks])
    bars = axes.transData.transform([(mark.x, bound) for mark in marks for bound in mark.bounds])[:, 1].reshape(-1, 2)
    low, high = np.minimum(bars[:, 0], where[:, 1] - 5 * scale), np.maximum(bars[:, 1], where[:, 1] + 5 * scale)
    covers = np.stack([where[:, 0] - 5 * scale, low, where[:, 0] + 5 * scale, high], axis=1)
    families = [[i for i, mark in enumerate(marks) if mark.point.family == family] for family in colours]
    pairs = [pair for members in families for pair in itertools.pairwise(members)]
    lines = np.array([(where[a], where[b]) for a, b in pairs]).reshape(-1, 2, 2)
    inside = np.array(axes.get_window_extent(renderer).extents)

    options = [_options(size[0], size[1], scale) for size in sizes]
    gaps = options[0][1]
    boxes = np.stack(
        [np.concatenate([w + at, w + at + size], axis=1) for w, (at, _), size in zip(where, options, sizes, strict=True)]
    )
    chosen = _choose(boxes, where, covers, lines, inside, gaps, scale)
    for index, (text, option) in enumerate(zip(texts, chosen, strict=True)):
        text.set_position(tuple(options[index][0][option] / scale))
        if gaps[option] > FAR:
            ends = axes.transData.inverted().transform([where[index], _nearest(boxes[index, option], where[index])])
            axes.plot(*ends.T, color=colours[marks[index].point.family], linewidth=0.6, alpha=0.7, zorder=2)


def _text(axes: Axes, mark: Mark, size: float) -> Annotation:
    text = axes.annotate(
        mark.point.label,
        (mark.x, mark.y),
        (0, 0),
        textcoords="offset points",
        va="bottom",
        fontsize=size,
        color="#111111",
        zorder=5,
    )
    text.set_path_effects([withStroke(linewidth=1.5, foreground="white")])
    text.set_in_layout(False)
    return text


def _options(width: float, height: float, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Where a name of this size may stand: its lower left corners from its point in pixels [C, 2], and how far away each
    is in typographic points [C]. Beside, above, below and diagonally, at growing distances."""
    corners, gaps = [], []
    for gap in (7.0, 13.0, 20.0, 30.0, 42.0, 56.0, 72.0, 90.0):
        for x, y in itertools.product((-1, -0.5, 0, 0.5, 1), repeat=2):
            beside = max(abs(x), abs(y)) == 1
            if beside and (gap > FAR or 0.5 not in (abs(x), abs(y))):
                reach = gap * scale * (1 if 0 in (x, y) else 0.7)
                corners.append((x * reach + (x - 1) / 2 * width, y * reach + (y - 1) / 2 * height))
                gaps.append(gap + (0 not in (x, y)))
    return np.array(corners), np.array(gaps)


def _choose(
    boxes: np.ndarray,
    where: np.ndarray,
    markers: np.ndarray,
    lines: np.ndarray,
    inside: np.ndarray,
    gaps: np.ndarray,
    scale: float,
) -> np.ndarray:
    """The option that each of N names takes, int [N].

    Args:
      boxes: what each name covers at each option, pixels [N, C, 4] as (x0, y0, x1, y1).
      where, markers: the points [N, 2] and what is drawn of them [N, 4].
      lines: curves, [L, 2, 2].
      inside: the axes, [4].
      gaps: how far each option is from its point, [C].
      scale: pixels a typographic point.
    """
    count, pad = len(boxes), 1.5 * scale * np.array([-1, -1, 1, 1])
    leads = np.stack([np.broadcast_to(where[:, None], boxes[..., :2].shape), _nearest(boxes, where[:, None])], axis=2)
    far = gaps > FAR
    reach = np.concatenate([boxes[..., :2].min(axis=1), boxes[..., 2:].max(axis=1)], axis=1) + pad
    costs = np.empty(boxes.shape[:2])
    for i in range(count):
        others = markers[(_shared(reach[i], markers) > 0) & (np.arange(count) != i)]
        curves = lines[_crosses(reach[i], lines)]
        costs[i] = gaps / 10 + COVERED * _shared(boxes[i][:, None], others).sum(axis=1)
        costs[i] += 2 * COVERED * (1 - _shared(boxes[i], inside))
        costs[i] += CROSSED * _crosses((boxes[i] + pad)[:, None], curves).sum(axis=1)
        costs[i] += CROSSED * far * _crosses(others, leads[i][:, None]).sum(axis=1)
        distances = np.linalg.norm(_nearest(boxes[i][:, None], where) - where, axis=-1)  # [C, N]
        costs[i] += 2 * CROSSED * ~far * (distances.argmin(axis=1) != i)  # would be read as another point's

    near = [np.flatnonzero((_shared(reach[i], reach) > 0) & (np.arange(count) != i)) for i in range(count)]
    chosen = np.full(count, -1)
    for _ in range(ROUNDS):
        before = chosen.copy()
        for i in range(count):
            placed = near[i][chosen[near[i]] >= 0]
            there = boxes[placed, chosen[placed]]
            shared = _shared((boxes[i] + pad)[:, None], there)
            cost = costs[i] + COVERED * (shared + (shared > 0)).sum(axis=1)
            cost += CROSSED * far * _crosses(there, leads[i][:, None]).sum(axis=1)
            led = placed[far[chosen[placed]]]
            cost += CROSSED * _crosses((boxes[i] + pad)[:, None], leads[led, chosen[led]]).sum(axis=1)
            chosen[i] = np.argmin(cost)
        if np.array_equal(chosen, before):
            break
    return chosen


def _shared(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The fraction of boxes [.., 4] that others [.., 4] cover."""
    low, high = np.maximum(boxes[..., :2], others[..., :2]), np.minimum(boxes[..., 2:], others[..., 2:])
    both, size = np.maximum(high - low, 0), boxes[..., 2:] - boxes[..., :2]
    return both[..., 0] * both[..., 1] / (size[..., 0] * size[..., 1])


def _crosses(boxes: np.ndarray, segments: np.ndarray) -> np.ndarray:
    """Whether segments [.., 2, 2] enter boxes [.., 4]: whether, of the way along one, a part lies between both pairs of
    sides."""
    start, way = segments[..., 0, :], segments[..., 1, :] - segments[..., 0, :]
    way = np.where(way == 0, 1e-9, way)
    one, two = (boxes[..., :2] - start) / way, (boxes[..., 2:] - start) / way
    enters, leaves = np.minimum(one, two), np.maximum(one, two)  # by axis; a reduction over two elements is slow
    return np.maximum(np.maximum(enters[..., 0], enters[..., 1]), 0) < np.minimum(
        np.minimum(leaves[..., 0], leaves[..., 1]), 1
    )


def _nearest(boxes: np.ndarray, origins: np.ndarray) -> np.ndarray:
    """The points of boxes [.., 4] that are nearest to origins [.., 2]."""
    return np.clip(origins, boxes[..., :2], boxes[..., 2:])
