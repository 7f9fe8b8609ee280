"""Tables, reports, plots of rows that are incomplete, broken, extreme or many; no file holds a number that is not finite."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from mla.data.prepared import Split
from mla.errors import UserError
from mla.evaluation import compression, measures, perplexity
from mla.evaluation.contract import Axis, Column, Measure
from mla.evaluation.evaluate import evaluate_model
from mla.report import frontier, grid, plot
from mla.report import text as report
from mla.report.points import points
from mla.report.rows import ConfigFields, EvaluatedRow, TrainedRow, from_json, read_rows
from mla.report.tables import text_table
from mla.strict_json import Count
from mla.training.logs import Logger, read_metrics
from mla.workdir import write_json
from tests.programs import status
from tests.rows import make_row, typed


def evaluated(run: str, family: str, held: float, **more: Any) -> dict[str, Any]:
    """A row of a finished run with a trick on its cache."""
    losses = {"decoded": {"loss": 1.4, "loss_full_cache": 1.3}, "recall": {"accuracy": 0.5}}
    row = make_row(run, family, 1.3, 64, **{"trained": "runs/m"} | losses | more)
    row["cache"] |= {"bytes_after_window": held, "bookkeeping_after_window": 100.0}
    return row


def reading(row: dict[str, Any], most: int) -> dict[str, Any]:
    """The row of a model whose decode step reads at most so many bytes of what it holds."""
    row["cache"]["read_bytes_per_step"] = {length: min(held, most) for length, held in row["cache"]["bytes_at"].items()}
    return row


RATES = [{"config.optimizer.learning_rate": rate} for rate in (1e-3, 2e-3)]
KINDS = {
    "plain": [
        make_row("a", "x", 1.2, 64, overrides=RATES[0], config={"optimizer": {"learning_rate": 1e-3}}),
        make_row("b", "x", 1.3, 128, overrides=RATES[1]),
        make_row("c", "y", 1.5, 0, 4096),
    ],
    "merging": [make_row("d", "z", 1.3, 64, 9, compression={"ratio": 2.0, "ratio_mean": 2.1, "bytes_per_token": 20.0})],
    "seeds": [
        make_row(f"{name}-s{seed}", "x", 1.2 + seed / 9, 64, seed=seed) for name in ("mha", "gqa", "b") for seed in (0, 1)
    ],
    "sparse": [reading(make_row("e", "y", 1.3, 64), 4096), reading(make_row("f", "y", 1.2, 128), 10**9)],
    "tricks": [evaluated("m-none", "none", 9000.0), evaluated("m-x", "x", 900.0), make_row("t", "q", 1.4, 32)],
}
ABSENT = object()
VALUES: tuple[Any, ...] = (ABSENT, None, math.nan, math.inf, 900, 1e300, 10**400, 0, -1, "x", True, [], {})


def paths(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Of all fields of a row, groups included."""
    if path:
        yield path
    for key in node if isinstance(node, dict) else ():
        yield from paths(node[key], (*path, key))


def changed(rows: list[dict[str, Any]], path: tuple[str, ...], value: Any) -> list[dict[str, Any]]:
    """The rows with another value in the first one."""
    rows = copy.deepcopy(rows)
    node = rows[0]
    for key in path[:-1]:
        node = node[key]
    if value is ABSENT:
        del node[path[-1]]
    else:
        node[path[-1]] = value
    return rows


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    read = typed(rows)
    (grid if grid.is_grid(read) else plot).draw(read, path)


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_a_field_holds_there_is_a_report_or_one_line(kind: str, tmp_path: Path) -> None:
    path, refused = tmp_path / "results.jsonl", 0
    for field in paths(KINDS[kind][0]):
        for value in VALUES:
            rows = changed(KINDS[kind], field, value)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            try:
                read = read_rows(path)
                text = text_table(read) + report.report(read)
                assert not any(word in text for word in (" nan", " inf")), (field, value)
            except UserError as error:
                assert "\n" not in str(error)
                refused += 1
                if isinstance(value, float) and not math.isfinite(value):
                    assert str(error).startswith(f"{path}: run ") or field == ("run",)
                    assert f"{'.'.join(field)} is {value}, not a finite number" in str(error)
            else:
                assert value not in (math.nan, math.inf), field
    assert refused > 50


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        ("plain", ("loss",), 99.0),
        ("plain", ("loss",), -1e-9),
        ("plain", ("cache", "bytes_per_token"), 0),
        ("plain", ("cache", "dtype"), ABSENT),
        ("merging", ("compression", "bytes_per_token"), 0),
        ("tricks", ("cache", "bytes_after_window"), 0),
        ("sparse", ("cache", "read_bytes_per_step", "256"), 0),
        ("tricks", ("recall",), ABSENT),
    ],
)
def test_extremes_are_drawn(kind: str, field: tuple[str, ...], value: Any, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(changed(KINDS[kind], field, value), tmp_path / "plot.png")
    assert matplotlib.image.imread(tmp_path / "plot.png").std() > 0.02


@pytest.mark.parametrize(
    "rows",
    [
        [make_row("alone$^$", "x$_$", 1.2, 64), make_row("other", "y", 1.2, 64)],
        [evaluated("m-$^$", "x$_$", 900.0), evaluated("m-other", "y", 900.0)],
        [make_row("alone", "x", 1.2, 64)],
        [make_row(name, "x", 1.2, 64) for name in "abc"],
        [make_row(name, "x", 1.2, 0) for name in "ab"],
        [evaluated("m-none", "none", 900.0)],
        [evaluated(f"m-{name}", name, 0.0) for name in "ab"],
    ],
    ids=[
        "signs of formulas",
        "tricks with signs of formulas",
        "one",
        "equal",
        "no bytes",
        "one trick",
        "no bytes with tricks",
    ],
)
def test_few_and_equal_points_are_drawn(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frontier.write(typed(rows), tmp_path)
    assert matplotlib.image.imread(tmp_path / "frontier.png").std() > 0.02
    assert all(row["run"].removeprefix("m-") in text_table(typed(rows)) for row in rows)


def test_what_reads_less_than_it_holds_is_shown_over_what_it_reads(tmp_path: Path) -> None:
    """A second panel, and a section with the bytes; without such a row, neither."""
    dense = [reading(row, 10**12) for row in (make_row("a", "x", 1.2, 64), make_row("b", "y", 1.3, 128))]
    frontier.write(typed(dense), tmp_path)
    height = matplotlib.image.imread(tmp_path / "frontier.png").shape[0]
    assert "Bytes held and bytes read" not in (tmp_path / "report.md").read_text()
    frontier.write(typed([*dense, reading(make_row("c", "z", 1.4, 64), 4096)]), tmp_path)
    assert matplotlib.image.imread(tmp_path / "frontier.png").shape[0] == 2 * height
    section = (tmp_path / "report.md").read_text().split("## Bytes held and bytes read")[1].split("##")[0]
    assert [line for line in section.splitlines() if line.startswith("| ")][2:] == [
        "| c | 1.4000 | 16,384 | 4,096 | 524,288 | 4,096 |"
    ]
    rows = typed([*dense, reading(make_row("c", "z", 1.4, 64), 4096)])
    assert [mark.x for mark in plot.marks_of(points(rows), perplexity.Quality.axes[0], plot.READ)] == [64, 16, 128]


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        (("loss",), 900.0, "run 'a': loss is 900 nats a token: no working model has that; evaluate it again"),
        (("loss",), math.nan, "run 'a': loss is nan, not a finite number; evaluate it again"),
        (("loss",), "1.2", "run 'a': loss is '1.2', not a number"),
        (("loss",), -3, "run 'a': loss is -3 nats a token"),
        (("cache", "bytes_per_token"), ABSENT, "run 'a': cache.bytes_per_token is missing"),
        (("cache", "bytes_at", "8192"), -math.inf, "run 'a': cache.bytes_at.8192 is -inf, not a finite number"),
        (("context",), -1, "run 'a': context is '-1', not a number from 0"),
        (("seed",), "first", "run 'a': seed is 'first', not a whole number"),
        (("corpus", "split"), 3, "run 'a': corpus.split is '3', not a text"),
        (("schema",), 2, "run 'a': schema is 2, and this version reads 1"),
    ],
)
def test_a_row_that_cannot_be_is_one_line(field: tuple[str, ...], value: Any, said: str) -> None:
    (row, *_) = changed(KINDS["plain"], field, value)
    with pytest.raises(UserError) as error:
        from_json(row, "results.jsonl")
    assert str(error.value).startswith(f"results.jsonl: {said}") and "\n" not in str(error.value)


def test_a_row_is_a_type_that_keeps_what_it_does_not_know() -> None:
    told = make_row("mla-s3", "latents", 1.2, 64, seed=3, later={"version": 9})
    row = from_json(told)
    assert isinstance(row, TrainedRow) and (row.run, row.point, row.seed) == ("mla-s3", "mla", 3)
    assert row.json == told and row.config == ConfigFields() and row.figures(compression.Figures) is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        row.run = "another"  # type: ignore[misc]
    named = from_json(told | {"run": "best", "point": "mla"})
    assert named.point == "mla"  # a sweep says it; what another version wrote has it at the end of the name

    trick = from_json(evaluated("m-x", "x", 900.0))
    assert isinstance(trick, EvaluatedRow) and trick.trained == "runs/m" and trick.place.bytes == 900 / 256
    for path in (("cache", "bytes_after_window"), ("decoded",), ("family",), ("context",)):
        (wrong,) = changed([evaluated("m-x", "x", 900.0)], path, ABSENT)
        with pytest.raises(UserError, match=rf"^run 'm-x': {'.'.join(path)} is missing$"):
            from_json(wrong)


@dataclasses.dataclass(frozen=True)
class Wit:
    """Figures of a measure that there is not."""

    jokes: Count


class Wits(Measure):
    schema: ClassVar = {"wit": Wit}
    columns: ClassVar = (Column("jokes", lambda row: getattr(row.figures(Wit), "jokes", None), ".1f", spread=True),)
    trick_columns: ClassVar = columns
    axes: ClassVar = (Axis("jokes a minute", lambda row: getattr(row.figures(Wit), "jokes", None)),)
    trick_axes: ClassVar = axes

    def applies(self, subject: Any) -> bool:
        return subject.config.model.num_layers == 1

    def measure(self, subject: Any) -> dict[str, Any]:
        return {"wit": {"jokes": 3.0, "laughs": 0}, "cache": {"dtype": "wood"}}

    def said(self, figures: dict[str, Any], config: Any) -> str:
        return f"{figures['wit']['jokes']} jokes"


def test_a_measure_is_a_line_in_the_registry(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is in eval.json, tables, pictures and the refusals of rows, and nothing else knows it."""
    monkeypatch.setitem(measures.REGISTRY, "wit", Wits())
    for name in ("quality", "cache"):
        monkeypatch.setattr(measures.REGISTRY[name], "measure", lambda *_: {"cache": {"bytes_per_token": 1}}, raising=False)
        monkeypatch.setattr(measures.REGISTRY[name], "said", lambda *_: "", raising=False)
    lines: list[str] = []
    for layers in (1, 2):
        config = tiny("mha", model={"num_layers": layers})
        data: Any = SimpleNamespace(vocab_size=257, sha256="", task=None, tokenizer=SimpleNamespace(name="bytes"))
        config.eval.split, config.eval.decode_tokens = "train", 0
        model: Any = SimpleNamespace(blocks=[], sources=[])
        row = evaluate_model(config, model, None, data, 0, lines.append)  # type: ignore[arg-type]
        assert ("wit" in row) == ("3.0 jokes" in lines) == (layers == 1)
        lines.clear()
        assert row["cache"] == ({"bytes_per_token": 1, "dtype": "wood"} if layers == 1 else {"bytes_per_token": 1})

    rows = [make_row(name, "x", 1.2, held, wit={"jokes": jokes}) for name, held, jokes in (("a", 64, 3), ("b", 96, 4))]
    assert text_table(typed(rows)).splitlines()[0].endswith("jokes") and "| 3.0 |" in report.report(typed(rows))
    heights = []
    for drawn in (rows, [*rows, make_row("c", "y", 1.5, 32)]):  # a panel where all rows have the figure
        frontier.write(typed(drawn), tmp_path)
        heights.append(matplotlib.image.imread(tmp_path / "frontier.png").shape[0])
    assert heights[0] == pytest.approx(2 * heights[1], rel=0.1)
    with pytest.raises(UserError, match=r"run 'm-1': wit.jokes is '1', not a number from 0"):
        typed([evaluated("m-1", "1", 900.0, wit={"jokes": "1"})])
    tricks = typed(evaluated(f"m-{n}", n, 900.0, wit={"jokes": float(n)}) for n in "12")
    assert grid.lines(tricks)[1][-1] == "1.0"
    grid.draw(tricks, tmp_path / "grid.png")


def test_labels_of_an_axis_with_both_signs_are_numbers() -> None:
    """They are formulas by default, and a picture whose names may hold a $ shows these as they are written."""
    with matplotlib.rc_context({"text.parse_math": False}):
        axes = Figure().subplots()
        axes.plot([1, 2], [-0.002, 0.05])
        grid._signed(axes)
        axes.figure.draw_without_rendering()
        labels = [label.get_text() for label in axes.get_yticklabels()]
    assert "0.01" in labels and "0" in labels and not any("$" in label for label in labels)


def test_two_rows_of_one_name_and_seed_are_no_two_seeds() -> None:
    with pytest.raises(UserError, match="2 rows are called 'a', not all with a seed of their own"):
        points(typed([make_row("a", "x", 1.2, 64), make_row("a", "x", 1.3, 64)]))
    assert len(points(typed([make_row("a", "x", 1.2, 64), make_row("a", "x", 1.3, 64, seed=1)]))) == 1


def test_rows_that_were_trained_beside_tricks_are_shown_too() -> None:
    assert "t  " in text_table(typed(KINDS["tricks"])).splitlines()[-1]
    assert "| t | q | 1,000,000 |" in report.report(typed(KINDS["tricks"]))


def test_models_whose_folders_are_called_alike_stay_apart(tmp_path: Path) -> None:
    folders = ("runs/A/gqa", "runs/B/gqa", "runs/mla", "runs/mla/", "../A/gqa")
    rows = typed(evaluated(f"{number}-none", "none", 900.0, trained=folder) for number, folder in enumerate(folders))
    names = {"runs/A/gqa": 1, "B/gqa": 1, "mla": 2, "../A/gqa": 1}
    assert {name: len(of_it) for name, of_it in grid.by_model(rows).items()} == names
    assert all(f"**{name}**" in report.report(rows) for name in names)


def test_a_report_of_somebody_else_is_not_replaced(tmp_path: Path, snapshot: Any, capfd: Any) -> None:
    results, mine = tmp_path / "sweep" / "results.jsonl", tmp_path / "mine"
    results.parent.mkdir()
    mine.mkdir()
    results.write_text("".join(json.dumps(row) + "\n" for row in KINDS["plain"]))
    for name in ("report.md", "frontier.png"):
        (mine / name).write_text("# My thesis\n")
        before = snapshot(tmp_path)
        assert status("report", results, f"--out={mine}") == 1
        said = f"error: {mine}/{name}: is there and was not written by this program; move it away or choose another --out\n"
        assert capfd.readouterr().err == said and snapshot(tmp_path) == before
        (mine / name).unlink()
    for _ in range(2):  # its own it replaces
        assert status("report", results, f"--out={mine}") == 0
    quoted = (mine / "report.md").read_text().splitlines()[-1]
    assert quoted == f"    python -m mla report {results} --out={mine}"
    assert status("report", results) == 0  # as that command of the sweep's own report
    assert (results.parent / "report.md").read_text().splitlines()[-1] == f"    python -m mla report {results}"
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_file_that_is_no_text_or_cannot_be_replaced_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results.jsonl"
    path.write_bytes(b"\xff\xfe{}")
    assert status("report", path) == 1
    path.write_text("".join(json.dumps(row) + "\n" for row in KINDS["plain"]))
    (tmp_path / "report.md").write_bytes(b"\xff\xfe")
    assert status("report", path) == 0  # what an earlier report says is no condition
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(30, "Read-only file system", "x.png")))
    capsys.readouterr()
    assert status("report", path) == 1
    assert capsys.readouterr().err == "error: x.png: Read-only file system\n"


# ------------------------------------------------------------------------------------------------------------------ names


def crowd(count: int) -> list[dict[str, Any]]:
    """Ranks and rope widths of a latent, ten points a family."""
    draw, rows = random.Random(0), []
    for family in range(count // 10):
        for rank in range(10):
            held, loss = int(64 * 2 ** (rank * 0.55) * (1 + 0.1 * family)), 1.55 - 0.035 * rank + 0.012 * family
            rows.append(
                make_row(f"mla-r{8 * rank + 8}-p{8 * family}", f"rope {8 * family}", loss + draw.gauss(0, 0.004), held)
            )
    return rows


def test_many_names_are_placed_soon_and_cover_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name among 200 is compared with less than twice as much as one among 60: all pairs would be 3.3 times as much."""
    compared = [_place_names(count, tmp_path, monkeypatch) / count for count in (60, 200)]
    assert compared[1] < 2 * compared[0]


def _place_names(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """How often placing so many names compares a box with a box or a line (a count, since the time of a hundredth of a
    second depends on what else runs); none of the names covers another, a marker or the frame."""
    place = plot._place_labels
    seen: dict[str, Any] = {"compared": 0}

    def counted(compare: Any) -> Any:
        def compare_and_count(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
            result = compare(boxes, others)
            seen["compared"] += result.size
            return result

        return compare_and_count

    def measure(canvas: Any, axes: Any, marks: Any, colours: Any) -> None:
        place(canvas, axes, marks, colours)
        names = {mark.point.label for mark in marks}
        texts = [text for text in axes.texts if text.get_text() in names]
        seen["boxes"] = np.array([text.get_window_extent(canvas.get_renderer()).extents for text in texts])
        centres = axes.transData.transform([(mark.x, mark.y) for mark in marks])
        seen["markers"] = np.concatenate([centres - 5, centres + 5], axis=1)
        seen["inside"] = axes.get_window_extent(canvas.get_renderer())

    with monkeypatch.context() as patch:
        patch.setattr(plot, "_place_labels", measure)
        for name in ("_shared", "_crosses"):
            patch.setattr(plot, name, counted(getattr(plot, name)))
        plot.draw(typed(crowd(count)), tmp_path / "plot.png")
    assert len(seen["boxes"]) == count
    boxes = [Bbox.from_extents(*box) for box in seen["boxes"]]
    assert not [(i, j) for i in range(count) for j in range(i) if boxes[i].overlaps(boxes[j])]
    assert not [i for i, box in enumerate(boxes) if box.count_overlaps([Bbox.from_extents(*m) for m in seen["markers"]])]
    assert all(seen["inside"].x0 <= box.x0 and box.x1 <= seen["inside"].x1 for box in boxes)
    return int(seen["compared"])


def test_segments_and_boxes() -> None:
    box = np.array([0.0, 0.0, 2.0, 1.0])
    crossing = [((-1, 0.5), (3, 0.5)), ((1, -1), (1, 2)), ((0.5, 0.5), (0.6, 0.6)), ((-1, -0.2), (1, 0.5))]
    passing = [((-1, 2), (3, 2)), ((-1, 0.5), (-0.5, 0.5)), ((3, -1), (3, 3)), ((-1, 0.2), (0.2, -1))]
    found = plot._crosses(box, np.array(crossing + passing, float))
    assert found.tolist() == [True] * 4 + [False] * 4
    assert plot._shared(box, np.array([[1.0, 0.0, 9.0, 0.5], [5.0, 5.0, 6.0, 6.0]])).tolist() == [0.25, 0.0]


# ------------------------------------------------------------------------------------------------------------------- JSON


def test_json_with_a_number_that_is_not_finite_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "eval.json"
    write_json(path, {"loss": 1.0})
    before = path.read_bytes()
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(UserError) as error:
            write_json(path, {"cache": [{"x": 1}, {"bytes_at": {"8192": value}}]})
        assert str(error.value) == f"{path}: cache.1.bytes_at.8192 is {value}, not a finite number; it was not written"
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["eval.json"]


def test_a_log_with_a_number_that_is_not_finite_is_neither_written_nor_read(tiny: Any, tmp_path: Path) -> None:
    metrics = {"loss": 1.0, "grad_norm": 1.0, "learning_rate": 0.1}
    with Logger(tmp_path, tiny("mha", log={"tensorboard": False}), 0, 0.0) as logger:
        logger.write(1, metrics)
        with pytest.raises(UserError, match=r"metrics\.jsonl: step 2: compression is inf, not a finite number"):
            logger.write(2, metrics | {"compression": math.inf})
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 2, "loss": math.nan}) + "\n" + json.dumps({"step": "x"}) + "\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl: step 2: loss is nan, not a finite number"):
        read_metrics(tmp_path)
    assert [line["step"] for line in read_metrics(tmp_path, until=1)] == [1]


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize(
    ("parallel", "cached", "said"),
    [
        (math.nan, 1.0, "the loss is nan nats a token: the parameters of this checkpoint"),
        (900.0, 900.0, "the loss is 900.0 nats a token: the parameters of this checkpoint"),
        (1.0, math.nan, "the loss is nan nats a token: through the cache as config.eval.cache has it"),
        (1.0, math.inf, "nats a token: through the cache"),
        (1.0, 900.0, "the loss is 900.0 nats a token: through the cache"),
        (1.0, 1.5, ""),
    ],
)
def test_an_evaluation_that_is_not_finite_fails(
    parallel: float, cached: float, said: str, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Losses:
        prompt, held = 8, dict[str, float]()

        def __init__(self, *_: Any) -> None:
            pass

        def parallel(self, tokens: np.ndarray) -> np.ndarray:
            return np.full((len(tokens), tokens.shape[1] - 1), parallel)

        def cached(self, tokens: np.ndarray) -> np.ndarray:
            return np.full((len(tokens), tokens.shape[1] - 1), cached)

    monkeypatch.setattr(perplexity, "Losses", Losses)
    monkeypatch.setattr(perplexity, "batch_multiple", lambda mesh: 1)
    model: Any = SimpleNamespace()
    plan: Any = SimpleNamespace(exact=lambda tokens: False)
    mesh: Any = None
    split = Split("validation", np.arange(100, dtype=np.uint16), np.ones(100, np.uint32), 1, 100)
    if not said:
        assert perplexity.measure(tiny("mha"), model, mesh, split, plan).loss_cached == cached
        return
    with pytest.raises(UserError) as error:
        perplexity.measure(tiny("mha"), model, mesh, split, plan)
    assert said in str(error.value) and "nothing was written" in str(error.value)
