"""A comparison as one page: report.html, which needs no network and no other file.

Quality over cache bytes with what each point is on hover; a choice of what stands on both axes and of the length of the
text; families by a click in the legend; the table, sorted by a click; training curves where the runs are at hand. Drawn by
Vega, whose bundle stands in the file.
"""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import altair
import vl_convert

from mla.evaluation.cache_bytes import of_row
from mla.evaluation.measures import REGISTRY
from mla.report.compute import curves
from mla.report.points import Point, compared_rows, points
from mla.report.rows import Row
from mla.report.tables import lines

X_CHOICES = ("bytes held, per token of the text", "bytes held in all", "bytes a decode step reads")
CURVE_STEPS = 120  # of a training curve that are drawn, at most
FIRST_Y = "perplexity"
SAID_OTHERWISE = ("config.optimizer.learning_rate", "config.seed")  # of what a sweep sets
LABELLED = 24  # points whose names stand beside them, at most
HEIGHT = 420  # of the picture, pixels

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; margin: 0 auto; padding: 0 1rem 2rem; max-width: 72rem; }}
h1 {{ font-size: 1.4rem; }} h2 {{ font-size: 1.1rem; margin-top: 2rem; }}
.chart {{ width: 100%; }}
.vega-bind {{ display: block; margin: .25rem 0; }}
.vega-bind-name {{ display: inline-block; min-width: 6rem; }}
select, input[type=range] {{ max-width: 60vw; }}
.table {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 13px; }}
th, td {{ padding: .2rem .6rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }}
th {{ cursor: pointer; position: sticky; top: 0; background: #fff; }}
th:nth-child(-n+2), td:nth-child(-n+2) {{ text-align: left; }}
pre {{ white-space: pre-wrap; font: inherit; }}
</style>
<script>
{bundle}
</script>
</head>
<body>
<h1>{title}</h1>
<p>{summary}</p>
{frontier}
{curves}
<h2>All points</h2>
<p>A click on a header sorts.</p>
<div class="table">{table}</div>
<h2>How the numbers were measured</h2>
<pre>{measured}</pre>
<script>
const charts = {charts};
for (const [id, spec] of Object.entries(charts)) {{
  vegaEmbed("#" + id, spec, {{ mode: "vega-lite", renderer: "svg", actions: false }});
}}
for (const th of document.querySelectorAll("th")) {{
  th.onclick = () => {{
    const body = th.closest("table").tBodies[0], column = th.cellIndex, up = th.dataset.up !== "1";
    const number = (row) => Number.parseFloat(row.cells[column].textContent.replace(/[,+%]/g, ""));
    const text = (row) => row.cells[column].textContent;
    const rows = [...body.rows].sort((a, b) => {{
      const x = number(a), y = number(b);
      const order = Number.isNaN(x) || Number.isNaN(y) ? text(a).localeCompare(text(b)) : x - y;
      return up ? order : -order;
    }});
    th.dataset.up = up ? "1" : "0";
    body.append(...rows);
  }};
}}
</script>
</body>
</html>
"""


def write(
    rows: Sequence[Row], path: str | os.PathLike[str], title: str, measured: str, places: Sequence[str | os.PathLike[str]]
) -> None:
    """Writes the page.

    Args:
      rows: of trained models, at least one.
      path: of the file.
      title: its heading.
      measured: how the numbers came about, in Markdown.
      places: where the folders of runs may be, see `mla.report.compute.folder_of`.
    """
    rows = compared_rows(rows)
    compared = points(rows)
    charts = {"frontier": frontier(compared)} if lengths(compared) else {}
    if trained := training(compared, places):
        charts["training"] = trained
    tokens = [row.train_tokens for row in rows if row.train_tokens]
    summary = f"{len(compared)} points, {len(rows)} runs" + (
        f", {max(tokens):,.0f} training tokens each at most" if tokens else ""
    )
    curve = '<h2>Training</h2>\n<div id="training" class="chart"></div>' if trained else ""
    page = PAGE.format(
        title=html.escape(title),
        bundle=vl_convert.javascript_bundle(None),  # type: ignore[arg-type]
        summary=html.escape(summary),
        frontier='<div id="frontier" class="chart"></div>' if "frontier" in charts else "",
        curves=curve,
        table=_table(compared),
        measured=html.escape(measured.replace("**", "")),
        charts=json.dumps(charts).replace("</", "<\\/"),  # a name may hold the end of a script
    )
    with open(path, "w", encoding="utf-8") as file:
        file.write(page)


def qualities(compared: Sequence[Point]) -> dict[str, Callable[[Row], float | None]]:
    """What may stand on the y axis: figures that some point has, by their name."""
    choices: dict[str, Callable[[Row], float | None]] = {}
    for measure in REGISTRY.values():
        for axis in measure.axes:
            choices[axis.label] = _shown(axis.value, axis.shown)
        if measure is not REGISTRY["cache"]:
            choices |= {c.title: c.value for c in measure.columns if isinstance(c.show, str) and c.title not in choices}
    return {name: value for name, value in choices.items() if any(point.mean(value) is not None for point in compared)}


def _shown(value: Callable[[Row], float | None], shown: Callable[[float], float]) -> Callable[[Row], float | None]:
    def drawn(row: Row) -> float | None:
        figure = value(row)
        return None if figure is None else shown(figure)

    return drawn


def lengths(compared: Sequence[Point]) -> list[int]:
    """Tokens of a text at which all points say what they hold."""
    shared = set.intersection(*(set(of_row(row).bytes_at) for point in compared for row in point.rows))
    return sorted(int(length) for length in shared if length.isdecimal())


def records(compared: Sequence[Point]) -> list[dict[str, Any]]:
    """One object a point and length, as the picture takes them: a figure that is missing is absent."""
    made = []
    for point in compared:
        row, figures = point.rows[0], of_row(point.rows[0])
        set_by_sweep = {key: str(value) for key, value in row.overrides.items() if key not in SAID_OTHERWISE}
        shared: dict[str, Any] = {
            "point": point.label,
            "family": point.family or row.mechanism,
            "mechanism": row.mechanism,
            "parameters": point.mean(lambda row: row.params.total),
            "seeds": len(point.rows),
            "learning rate": row.config.optimizer.learning_rate,
            **set_by_sweep,
        }
        for name, value in qualities(compared).items():
            mean, error = point.mean(value), point.error_of(value) or 0.0
            if mean is not None:
                shared |= {name: mean, f"{name} low": mean - error, f"{name} high": mean + error}
        for stop, length in enumerate(lengths(compared)):
            held = figures.bytes_at[str(length)]
            read = figures.read_bytes_per_step.get(str(length), held)
            each = dict(zip(X_CHOICES, (max(held / length, 1e-3), max(held, 1), max(read, 1)), strict=True))
            made.append({k: v for k, v in shared.items() if v is not None} | {"stop": stop, "tokens": length} | each)
    return made


def frontier(compared: Sequence[Point]) -> dict[str, Any]:
    """The picture as a Vega-Lite specification."""
    choices, stops = list(qualities(compared)), lengths(compared)
    y = altair.param("quality", FIRST_Y if FIRST_Y in choices else choices[0], bind=_select(choices, "y: "))
    x = altair.param("bytes", X_CHOICES[0], bind=_select(list(X_CHOICES), "x: "))
    slider = altair.binding_range(min=0, max=len(stops) - 1, step=1, name="length of the text: ")
    length = altair.param("stop_shown", 0, bind=slider)
    family = altair.selection_point(fields=["family"], bind="legend", toggle="true")
    data, legend = records(compared), altair.Legend(orient="bottom", columns=3)
    told = [key for key in dict.fromkeys(key for record in data for key in record) if not key.endswith((" low", " high"))]
    base = (
        altair.Chart(altair.Data(values=data))
        .transform_filter("datum.stop == stop_shown && isValid(datum[quality])")
        .transform_calculate(
            x="datum[bytes]", y="datum[quality]", low="datum[quality + ' low']", high="datum[quality + ' high']"
        )
        .encode(
            x=altair.X("x:Q", scale=altair.Scale(type="log", base=2, nice=False, padding=30), title="bytes", axis=_bytes()),
            color=altair.Color("family:N", title="family (a click shows it alone)", legend=legend),
            opacity=altair.when(family).then(altair.value(1.0)).otherwise(altair.value(0.08)),
        )
    )
    scale = altair.Scale(zero=False, padding=20)
    dots = base.mark_point(filled=True, size=90).encode(
        y=altair.Y("y:Q", scale=scale, title=None),
        shape=altair.Shape("family:N", legend=None),
        tooltip=[altair.Tooltip(f"{_field(key)}:{_kind(data, key)}", title=key) for key in told if key != "stop"],
    )
    errors = base.mark_rule().encode(y=altair.Y("low:Q", scale=scale, title=None), y2="high:Q")
    layers = [errors, dots.add_params(y, x, length, family)]
    if len(compared) <= LABELLED:
        layers.append(base.mark_text(dy=-11, fontSize=10).encode(y="y:Q", text="point:N"))
    stop = altair.Chart(altair.Data(values=[{"stop": i, "said": f"after {n:,} tokens"} for i, n in enumerate(stops)]))
    layers.append(
        stop.transform_filter("datum.stop == stop_shown")
        .mark_text(align="left", baseline="top", fontSize=12, fontWeight="bold")
        .encode(x=altair.value(4), y=altair.value(4), text="said:N")
    )
    chart = altair.layer(*layers).properties(width="container", height=HEIGHT)
    made: dict[str, Any] = chart.to_dict()
    return made


def training(compared: Sequence[Point], places: Sequence[str | os.PathLike[str]]) -> dict[str, Any] | None:
    """Smoothed training losses over tokens, of the points whose runs are in `places`; None where none are."""
    values = []
    for point in compared:
        for row, curve in zip(point.rows, curves(point, places), strict=False):
            stride = -(-len(curve.tokens) // CURVE_STEPS)
            pairs = zip(curve.tokens[::stride].tolist(), curve.losses[::stride].tolist(), strict=True)
            values += [{"point": point.label, "run": row.run, "tokens": t, "loss": round(loss, 4)} for t, loss in pairs]
    if not values:
        return None
    picked = altair.selection_point(fields=["point"], bind="legend", toggle="true")
    chart = (
        altair.Chart(altair.Data(values=values))
        .mark_line(strokeWidth=1.2)
        .encode(
            x=altair.X("tokens:Q", title="training tokens"),
            y=altair.Y("loss:Q", title="training loss, nats a token, smoothed", scale=altair.Scale(zero=False)),
            color=altair.Color("point:N", legend=altair.Legend(orient="bottom", columns=4, title=None)),
            detail="run:N",
            opacity=altair.when(picked).then(altair.value(1.0)).otherwise(altair.value(0.06)),
            tooltip=["run:N", "tokens:Q", "loss:Q"],
        )
        .add_params(picked)
        .properties(width="container", height=320)
    )
    made: dict[str, Any] = chart.to_dict()
    return made


def _select(options: Sequence[str], name: str) -> Any:
    return altair.binding_select(options=list(options), name=name)


def _bytes() -> Any:
    return altair.Axis(format=",.4~r", labelOverlap=True)


def _field(key: str) -> str:
    """A field's name as Vega-Lite takes it: dots are no paths into objects."""
    return re.sub(r"([\\.\[\]:])", r"\\\1", key)


def _kind(data: Sequence[dict[str, Any]], key: str) -> str:
    return "N" if any(isinstance(record.get(key), str) for record in data) else "Q"


def _table(compared: Sequence[Point]) -> str:
    def line(texts: Sequence[str], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{html.escape(text)}</{tag}>' for text in texts)}</tr>"

    header, *body = lines(compared)
    inner = "\n".join(line(texts, "td") for texts in body)
    return f"<table><thead>{line(header, 'th')}</thead><tbody>\n{inner}\n</tbody></table>"
