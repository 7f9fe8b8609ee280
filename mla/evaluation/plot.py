"""The frontier as a picture: perplexity over cache bytes per token, readable in black and white."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter
from matplotlib.transforms import Bbox

from mla.evaluation.frontier import Point, Row, get, points

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
ROUNDS = 4  # in which names make room for each other
FAR = 15  # typographic points: a name further from its point gets a line to it
LOG_RATIO = 4  # perplexities that span more than this factor get a log axis


def draw(rows: Sequence[Row], path: str | os.PathLike[str]) -> None:
    """Saves the plot as PNG.

    x, log: measured content bytes a token adds to the cache, all layers, one sequence; hollow where they are amortised
    (see `Point`). y: perplexity, with one standard error where a point has several seeds. A line joins a family that has one
    point at each size.
    """
    found = points(rows)
    figure = Figure(figsize=(8.0, 5.6), dpi=160, layout="constrained")
    canvas = FigureCanvasAgg(figure)  # no display, whatever backend the process uses otherwise
    axes = figure.subplots()
    families = list(dict.fromkeys(point.family for point in sorted(found, key=lambda p: -p.cache_bytes)))
    for index, family in enumerate(families):
        colour, marker, line = STYLES[index % len(STYLES)]
        members = [point for point in found if point.family == family]
        style: dict[str, Any] = {"color": colour, "zorder": 3}
        # Points of equal bytes are alternatives, no curve.
        curve = len(members) > 1 and len({point.cache_bytes for point in members}) == len(members)
        if curve:
            axes.plot(
                *zip(*((p.cache_bytes, p.perplexity) for p in members), strict=True),
                linestyle=line,
                linewidth=1.4,
                alpha=0.8,
                **style,
            )
        for point in members:
            low, high = point.bounds
            if point.error is not None:
                error = [[point.perplexity - low], [high - point.perplexity]]
                axes.errorbar(point.cache_bytes, point.perplexity, error, capsize=3, linewidth=1.2, **style)
            face = "white" if point.amortised else colour
            axes.plot(
                point.cache_bytes,
                point.perplexity,
                marker=marker,
                markersize=8,
                markerfacecolor=face,
                markeredgecolor=colour,
                markeredgewidth=1.6,
                linestyle="none",
                zorder=4,
            )
        axes.plot(  # what stands for the family in the legend
            [],
            [],
            color=colour,
            marker=marker,
            markersize=7,
            markerfacecolor="white" if all(point.amortised for point in members) else colour,
            linestyle=line if curve else "none",
            label=family,
        )
    _scales(axes, found)
    axes.grid(True, which="major", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.set_xlabel("KV-cache bytes per token (content, all layers, one sequence; read off the live arrays)")
    axes.set_ylabel(_y_label(rows))
    axes.set_title("Perplexity against KV-cache bytes per token", fontsize=12, fontweight="bold", loc="left", pad=24)
    axes.annotate(
        _subtitle(rows),
        (0, 1),
        (0, 7),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=8,
        color="#444444",
    )
    if len(families) > 1:
        axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0), handlelength=3)
    figure.supxlabel(_footnotes(rows, found), fontsize=7.5, color="#444444", x=0.01, ha="left")
    figure.draw_without_rendering()
    _place_labels(canvas, axes, found, {f: STYLES[i % len(STYLES)][0] for i, f in enumerate(families)})
    figure.savefig(path, format="png")


def _scales(axes: Axes, found: Sequence[Point]) -> None:
    """A log axis in octaves with room for labels at the sides; perplexity on a log axis only where it spans a lot."""
    xs = [max(point.cache_bytes, 1.0) for point in found]
    low, high = np.log2(min(xs)), np.log2(max(xs))
    margin = max(0.12 * (high - low), 0.5)
    axes.set_xscale("log", base=2)
    axes.set_xlim(2 ** (low - margin), 2 ** (high + margin))
    ticks = np.arange(np.ceil(low - margin), np.floor(high + margin) + 1)
    axes.xaxis.set_major_locator(FixedLocator((2.0 ** ticks[:: -(-len(ticks) // 10)]).tolist()))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.10g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())

    bounds = [bound for point in found for bound in point.bounds]
    least, most = min(bounds), max(bounds)
    if most > LOG_RATIO * least:
        axes.set_yscale("log")
        axes.set_ylim(least / (most / least) ** 0.1, most * (most / least) ** 0.1)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.4g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        room = max(0.12 * (most - least), 0.002 * most)
        axes.set_ylim(least - room, most + room)
        axes.yaxis.set_major_locator(MaxNLocator(8))


def _y_label(rows: Sequence[Row]) -> str:
    tokenizers = sorted({str(get(row, "corpus", "tokenizer")) for row in rows} - {"None"})
    splits = sorted({str(get(row, "corpus", "split")) for row in rows} - {"None"})
    unit = {"bytes": "byte"}.get("".join(tokenizers), f"token of {', '.join(tokenizers)}" if tokenizers else "token")
    return f"perplexity per {unit}{' (' + ', '.join(splits) + ' split)' if splits else ''}"


def _subtitle(rows: Sequence[Row]) -> str:
    """What the models have in common, in one line."""

    def spread(values: list[Any], form: str) -> str:
        known = [value for value in values if value is not None]
        if not known:
            return ""
        low, high = min(known), max(known)
        return form.format(low) if low == high else f"{form.format(low)} to {form.format(high)}"

    parts = [
        (spread([get(row, "params", "total") for row in rows], "{:,}"), "{} parameters"),
        (spread([row.get("train_tokens") for row in rows], "{:,}"), "{} training tokens"),
        (spread([row.get("context") for row in rows], "{:,}"), "context {}"),
        (", ".join(sorted({str(row["cache"]["dtype"]) for row in rows})), "cache in {}"),
        (", ".join(sorted({str(get(row, "environment", "device_kind") or "") for row in rows})), "on {}"),
    ]
    return " · ".join(form.format(value) for value, form in parts if value)


def _footnotes(rows: Sequence[Row], found: Sequence[Point]) -> str:
    notes = ""
    if any("compression" in row for row in rows):
        notes = "Hollow: live slots that the text needed, an array a head, over its tokens.\n"
    elif any(point.amortised for point in found):
        notes = (
            "Hollow: a window or a state is held whatever the length, so bytes per token has no meaning; shown are the\n"
            "bytes held at the evaluation context divided by the context. Longer contexts move these points left.\n"
        )
    seeds = [len(point.rows) for point in found]
    if max(seeds) == 1:
        notes += "One seed a point: no error bars."
    else:
        count = f"{min(seeds)}" if min(seeds) == max(seeds) else f"{min(seeds)} to {max(seeds)}"
        notes += f"Mean over {count} seeds a point; bars: one standard error."
    baselines = {get(row, "baseline", "unigram_perplexity") for row in rows} - {None}
    if len(baselines) == 1:
        notes += f" Unigram perplexity of this corpus: {baselines.pop():.4g}."
    return notes


def _place_labels(canvas: FigureCanvasAgg, axes: Axes, found: Sequence[Point], colours: dict[str, str]) -> None:
    """Writes each point's name where it covers no marker, line, error bar or other name.

    Each name takes, of positions around its point, the one that covers least, near ones before far ones; a few rounds let
    it move again after the others have. A thin line leads back from a far one.
    """
    renderer = canvas.get_renderer()
    scale = canvas.figure.dpi / 72  # pixels a typographic point
    inside = axes.get_window_extent(renderer)
    where = {point: axes.transData.transform((point.cache_bytes, point.perplexity)) for point in found}
    markers = {}
    for point, (x, y) in where.items():
        low, high = (axes.transData.transform((point.cache_bytes, bound))[1] for bound in point.bounds)
        bottom, top = min(low, y - 5 * scale), max(high, y + 5 * scale)
        markers[point] = Bbox.from_extents(x - 5 * scale, bottom, x + 5 * scale, top)
    lines = [
        (where[a], where[b])
        for family in colours
        for a, b in itertools.pairwise(point for point in found if point.family == family)
    ]
    texts = {point: _text(axes, point) for point in found}
    sizes = {point: text.get_window_extent(renderer) for point, text in texts.items()}

    placed: dict[Point, Candidate] = {}
    boxes: dict[Point, Bbox] = {}
    for _ in range(ROUNDS):
        for point in found:
            leads = [_lead(boxes[p], where[p]) for p in placed if p is not point and placed[p].gap > FAR]
            others = [box for known in (markers, boxes) for p, box in known.items() if p is not point]
            options = _candidates(sizes[point].width / scale, sizes[point].height / scale)
            found_boxes = [_box(option, sizes[point], where[point], scale) for option in options]
            costs = []
            for option, box in zip(options, found_boxes, strict=True):
                cost = _cost(box, inside, others, lines + leads, pad=1.5 * scale) + option.gap / 10
                if option.gap > FAR:
                    cost += 5 * sum(_crosses(other, *_lead(box, where[point])) for other in others)
                costs.append(cost)
            best = int(np.argmin(costs))
            placed[point], boxes[point] = options[best], found_boxes[best]
    for point, candidate in placed.items():
        texts[point].set_position((candidate.x, candidate.y))
        if candidate.gap > FAR:
            ends = axes.transData.inverted().transform(_lead(boxes[point], where[point]))
            axes.plot(*ends.T, color=colours[point.family], linewidth=0.6, alpha=0.7, zorder=2)


def _text(axes: Axes, point: Point) -> Annotation:
    text = axes.annotate(
        point.label,
        (point.cache_bytes, point.perplexity),
        (0, 0),
        textcoords="offset points",
        va="bottom",
        fontsize=8.5,
        color="#111111",
        zorder=5,
    )
    text.set_in_layout(False)
    return text


class Candidate(NamedTuple):
    """Where a name may stand: its lower left corner from its point, and how far away that is; typographic points."""

    x: float
    y: float
    gap: float


def _candidates(width: float, height: float) -> list[Candidate]:
    """Beside, above, below and diagonally, at growing distances."""
    found = []
    for gap in (7.0, 13.0, 20.0, 30.0, 42.0):
        left, right, centre = -gap - width, gap, -width / 2
        below, above, middle = -gap - height, gap, -height / 2
        near = 0.7 * gap
        found += [Candidate(x, y, gap) for x, y in ((right, middle), (left, middle), (centre, above), (centre, below))]
        corners = [(near, near), (near, -near - height), (-near - width, near), (-near - width, -near - height)]
        found += [Candidate(x, y, gap + 1) for x, y in corners]
    return found


def _box(candidate: Candidate, size: Bbox, origin: np.ndarray, scale: float) -> Bbox:
    """What a name covers there, in pixels."""
    x, y = origin[0] + candidate.x * scale, origin[1] + candidate.y * scale
    return Bbox.from_bounds(x, y, size.width, size.height)


def _cost(box: Bbox, inside: Bbox, others: Sequence[Bbox], lines: Sequence[Any], pad: float) -> float:
    """How bad it is to write there: covered area counts most, being outside the axes yet more."""
    covered = sum(_shared(box, other) for other in others)
    outside = 1 - _shared(box, inside)
    crossed = sum(_crosses(box.padded(pad), a, b) for a, b in lines)
    return 100 * covered + 200 * outside + 5 * crossed


def _shared(box: Bbox, other: Bbox) -> float:
    """The fraction of a box that another one covers."""
    both = Bbox.intersection(box, other)
    return both.width * both.height / (box.width * box.height) if both is not None else 0.0


def _crosses(box: Bbox, a: np.ndarray, b: np.ndarray) -> bool:
    """Whether the segment ab enters the box."""
    x, y = (np.linspace(0, 1, 100)[:, None] * (b - a) + a).T
    return bool(np.any((x > box.x0) & (x < box.x1) & (y > box.y0) & (y < box.y1)))


def _lead(box: Bbox, origin: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the line from a point to its far name, in pixels."""
    return origin, np.clip(origin, (box.x0, box.y0), (box.x1, box.y1))
