"""report.md: the table, how each number came about, and what the run can and cannot tell."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

from mla.attention.contract import BASELINES
from mla.evaluation.cache_bytes import of_row
from mla.evaluation.measures import REGISTRY
from mla.evaluation.perplexity import of_row as quality_of
from mla.evaluation.speed import Figures as Speed
from mla.report import break_even, compute, differences, grid, rates
from mla.report.layout import markdown
from mla.report.points import Point, compared_rows, points
from mla.report.rows import PLOT_FILE, Row, TrainedRow
from mla.report.tables import markdown_table, measured

TITLE = "# Perplexity against KV-cache bytes"  # first line of the report
SEED_NOISE = 0.01  # nats: what another seed alone changes at these sizes
ENOUGH_TOKENS = 20  # training tokens per parameter, Hoffmann et al. (2203.15556)
ENOUGH_SEEDS = 3
MOST_TIES = 8  # named in the text
LARGE_MISMATCH = 0.005  # of parameters, relative


def report(
    rows: Sequence[Row],
    *,
    command: str = "",
    redraw: str = "",
    against: Sequence[str] = BASELINES,
    places: Sequence[str | os.PathLike[str]] = (),
) -> str:
    """The whole text.

    Args:
      rows: at least one.
      command: what made the results.
      redraw: what draws table and plot again from the results file.
      against: labels of the points that others are compared with.
      places: where the folders of the runs may be, for training curves and logs; see `compute.folder_of`.
    """
    searched, rows = rows, compared_rows(rows)
    compared = points(rows)
    again = ["## Where", _where(rows), "## Again", _again(command, redraw)]
    if grid.is_grid(rows):
        others = [row for row in rows if isinstance(row, TrainedRow)]
        table = f"**others**, trained by this sweep\n\n{markdown_table(others)}" if others else ""
        return "\n\n".join(part for part in (grid.section(rows), table, *again) if part) + "\n"
    sections = [
        TITLE,
        f"![perplexity over cache bytes per token]({PLOT_FILE})",
        markdown_table(rows),
        _baseline(rows),
        differences.section(compared, against, places),
        compute.section(compared, places, against),
        break_even.section(compared),
        rates.section(searched),
        *_sections(compared),
        "## What this run can and cannot tell",
        *_verdict(compared),
        "## How the numbers were measured",
        measured_how(rows),
        *again,
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _sections(compared: Sequence[Point]) -> list[str]:
    """What measures say of the points that have their figures."""
    parts = []
    for section in (measure.section for measure in REGISTRY.values() if measure.section):
        there = [point for point in compared if point.mean(section.columns[0].value) is not None]
        lines = [[point.label, f"{point.loss:.4f}", *measured(point, section.columns)] for point in there]
        if lines:
            header = ["point", "loss", *(column.title for column in section.columns)]
            parts.append(f"{section.text}\n\n{markdown([header, *lines], names=1)}")
    return parts


def _baseline(rows: Sequence[Row]) -> str:
    lines = []
    for value in sorted({value for row in rows if (value := row.baseline.unigram_perplexity) is not None}):
        there = [row for row in rows if row.baseline.unigram_perplexity == value]
        worse = [row.point for row in there if (quality_of(row).perplexity or math.exp(row.loss)) >= value]
        verdict = f"NOT below it, so nothing learnt from context: {', '.join(worse)}" if worse else "every model is below it"
        lines.append(f"Baseline: unigram perplexity of the corpus {value:.4f} (token frequencies alone); {verdict}.")
    return "\n".join(lines)


def _verdict(compared: Sequence[Point]) -> list[str]:
    rows = [row for point in compared for row in point.rows]
    return [
        "**It can tell** " + _certain(rows),
        "**It cannot tell** " + _uncertain(compared, rows),
        "**Order.** " + _order(compared),
    ]


def _certain(rows: Sequence[Row]) -> str:
    compared = [cache for cache in map(of_row, rows) if cache.bytes_per_token_formula is not None]
    equal = [cache.bytes_per_token == cache.bytes_per_token_formula for cache in compared]
    text = "how many bytes each cache takes: they were read off live arrays, and "
    if all(equal) and len(equal) == len(rows):
        text += f"equal the published formula in all {len(rows)} rows."
    elif all(equal):
        text += f"equal the published formula in the {len(equal)} of {len(rows)} rows that say what it gives."
    else:
        text += f"DIFFER from the formula in {equal.count(False)} of {len(rows)} rows: do not use these."
    gaps = [abs(cached - row.loss) for row in rows if (cached := quality_of(row).loss_cached) is not None]
    if gaps:
        text += (
            " And that the caches hold what the models need: the loss computed through the cache differs from the parallel"
            f" form's by at most {max(gaps):.1e} nats."
        )
    return text


def _uncertain(compared: Sequence[Point], rows: Sequence[Row]) -> str:
    parts = []
    ratios = [row.train_tokens / row.params.total for row in rows if row.train_tokens and row.params.total]
    if ratios and min(ratios) < ENOUGH_TOKENS:
        parts.append(
            f"which mechanism is better when trained well: these models saw {_span(ratios, '.2g')} tokens per parameter,"
            f" about {ENOUGH_TOKENS} are usual. Minutes of training show the machinery and the bytes; models overtake each"
            " other later."
        )
    elif ratios:
        parts.append(f"what other sizes would show: these models saw {_span(ratios, '.2g')} tokens per parameter.")
    else:
        parts.append("how well these models were trained: the rows do not say on how many tokens.")
    used = {rate for row in rows if (rate := row.config.optimizer.learning_rate) is not None}
    if len(used) == 1 and len(compared) > 1:
        parts.append(f"Nor what each would reach with its own learning rate: all were trained at {used.pop():g}.")
    mismatch = max((abs(row.params.mismatch or 0) for row in rows), default=0)
    if mismatch > LARGE_MISMATCH:
        parts.append(f"Parameters differ by up to {mismatch:.1%} from the MHA model's, which counts too.")
    contexts = [row.context for row in rows if row.context]
    if contexts:
        text = f"Nothing was asked beyond {_span(contexts, ',')} tokens"
        if any(point.amortised for point in compared):
            text += ", where a window or a state of fixed size has least to forget"
        parts.append(text + ".")
    if any(row.environment.get("device_kind") == "cpu" for row in rows):
        parts.append("Decode speeds are a CPU's and carry over to no accelerator.")
    return " ".join(parts)


def _order(compared: Sequence[Point]) -> str:
    """Which differences of the losses mean something, given the seeds there are."""
    seeds = min(len(point.rows) for point in compared)
    neighbours = list(itertools.pairwise(sorted(compared, key=lambda point: point.loss)))
    if seeds == 1:
        text = (
            "At least one point has a single seed, so there is no standard error. Another seed alone changes such losses by"
            f" about {SEED_NOISE} nats: smaller differences mean nothing. It takes {ENOUGH_SEEDS} seeds or more, and more"
            " tokens, before a winner is named."
        )
        limits = [SEED_NOISE for _ in neighbours]
    else:
        text = f"Losses are means over at least {seeds} seeds with their standard error; less than two of these is a tie."
        if seeds < ENOUGH_SEEDS:
            text += f" {seeds} seeds estimate it poorly: take {ENOUGH_SEEDS} or more."
        limits = [2 * math.hypot(a.error or 0, b.error or 0) for a, b in neighbours]
    close = [f"{a.label} and {b.label}" for (a, b), near in zip(neighbours, limits, strict=True) if b.loss - a.loss < near]
    if close:
        more = f"; and {len(close) - MOST_TIES} more" if len(close) > MOST_TIES else ""
        text += f" Ties here, between neighbours in loss: {'; '.join(close[:MOST_TIES])}{more}."
    elif neighbours:
        text += " No neighbours in loss are that close here."
    return text


def measured_how(rows: Sequence[Row]) -> str:
    """How the numbers of a comparison came about, as a list in Markdown."""

    def speed(row: Row) -> Speed:
        return row.figures(Speed) or Speed()

    def each(value: Callable[[Row], Any]) -> str:
        values = map(value, rows)
        return ", ".join(dict.fromkeys(f"{v:,}" if isinstance(v, int) else str(v) for v in values if v is not None))

    dtype = each(lambda row: of_row(row).dtype)
    tokens, split = each(lambda row: quality_of(row).eval_tokens), each(lambda row: row.corpus and row.corpus.split)
    batch, context = each(lambda row: speed(row).batch), each(lambda row: speed(row).context)
    speeds = (
        f"""
- **decode tok/s**: greedy, {batch} sequence(s) after {context} tokens, median of
  repeated runs after a warm-up, on the device below."""
        if batch
        else ""
    )
    return f"""- **loss**: mean nats over {tokens} predicted tokens of the {split} split, in windows of the training
  context, every token but the first once; by the parallel form and again through the cache (prefill, chunks, single
  tokens). **perplexity**: exp(loss). **bits/byte**: over the true bytes of the predicted text.
- **parameters**: all, embeddings included. **vs MHA**: against the MHA model that the MLP width was solved to match.
- **B/token**: growth of the cache's content arrays between two filled caches ({dtype}), all layers, one
  sequence; positions and lengths are counted apart. **formula**: the papers' count of elements times their size.
  **constant B**: held whatever the length. **B at 8,192**: from shapes, checked against the formula.{speeds}
- **±, error bars**: one standard error over seeds."""


def _where(rows: Sequence[Row]) -> str:
    environments = [row.environment for row in rows if row.environment]
    described = (", ".join(f"{key} {environment[key]}" for key in sorted(environment)) for environment in environments)
    lines = [f"- {line}" for line in dict.fromkeys(described)]
    corpora = dict.fromkeys((c.name, c.sha256, c.tokenizer) for c in (row.corpus for row in rows) if c)
    lines += [f"- corpus {name}, sha256 {sha256}, tokenizer {tokenizer}" for name, sha256, tokenizer in corpora]
    if len({sha256 for _, sha256, _ in corpora}) > 1:
        lines.append("- The rows were made from DIFFERENT corpora: their losses must not be compared.")
    return "\n".join(lines)


def _again(command: str, redraw: str) -> str:
    parts = []
    if command:
        parts.append(f"Made by\n\n    {command}")
    if redraw:
        parts.append(f"Table and plot are redrawn from the results file by\n\n    {redraw}")
    return "\n\n".join(parts)


def _span(values: Sequence[Any], form: str) -> str:
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} to {high}"
