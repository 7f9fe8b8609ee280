"""Long text: windows that overlap, and whole documents through one cache each, by position."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from rows import make_row, typed

from mla import commands
from mla import config as configs
from mla import model as models
from mla.config import Config
from mla.data.prepared import Split, evaluation_windows, predicted_tokens, prepare
from mla.errors import UserError
from mla.evaluation import stream
from mla.evaluation.cache_bytes import formula_bytes_at
from mla.evaluation.evaluate import evaluate
from mla.report import positions
from mla.report.plot import draw
from mla.report.points import points
from mla.report.text import report
from mla.sharding import make_mesh
from mla.training.checkpoint import load_model

VOCABULARY = 61
END = 60


def other(config: Config, *overrides: str) -> Config:
    return commands.override(config, [f"--config.{o}" for o in overrides], commands.EVALUATION)


def nats(model: models.Model, ids: np.ndarray) -> np.ndarray:
    """Of every token but the first of one text, from the logits of the parallel form, in float64."""
    logits = np.asarray(jax.jit(model.__call__)(jnp.asarray(ids[None, :-1], jnp.int32))[0], np.float64)
    shifted = logits - logits.max(axis=1, keepdims=True)
    return np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(shifted)), ids[1:]]


def split_of(texts: list[np.ndarray]) -> Split:
    tokens = np.concatenate(texts).astype(np.uint16)
    return Split("all", tokens, np.ones(len(tokens), np.uint32), len(texts), len(tokens))


# ------------------------------------------------------------------------------------------------------ windows that overlap


@given(st.integers(2, 300), st.integers(1, 40), st.integers(1, 40), st.integers(1, 9), st.sampled_from([0, 1, 50, 299]))
@settings(deadline=None)
def test_every_token_is_predicted_once_after_what_the_stride_leaves(
    num_tokens: int, context: int, stride: int, batch_size: int, limit: int
) -> None:
    stride, tokens = min(stride, context), np.arange(1, num_tokens + 1)
    predicted, windows_seen, done = predicted_tokens(num_tokens, limit), 0, 0
    for windows, weights, span in evaluation_windows(tokens, context, batch_size, limit, stride=stride):
        rows, columns = np.nonzero(weights)
        np.testing.assert_array_equal(windows[rows, columns + 1], np.arange(done + 2, done + 2 + len(rows)))
        assert span == slice(done + 1, done + 1 + len(rows))
        late = rows + windows_seen > 0
        assert (columns[late] >= context - stride).all()
        done, windows_seen = done + len(rows), windows_seen + len(set(rows))
    assert done == predicted
    assert windows_seen == 1 + -(-max(predicted - context, 0) // stride)


def test_losses_of_windows_that_overlap(trained: Any) -> None:
    """Each token after at least as many as the stride leaves, by numpy; a smaller stride sees more of the text."""
    config, workdir = trained("mla", steps=4, eval={"batch_size": 8, "decode_tokens": 0, "tokens": 70})
    model, whole = load_model(workdir).model, evaluate(workdir, config)
    row = evaluate(workdir, other(config, "eval.mode=sliding", "eval.stride=4"))
    assert row["name"] == "mla-mode=sliding-stride=4"
    ids = np.asarray(prepare(config.data).split("validation").tokens[:71], np.int64)
    sums, done = 0.0, 0
    for start in range(0, 55 + 4, 4):
        stop = min(start + 16, 70)
        each = nats(model, np.pad(ids[start : stop + 1], (0, 16 - (stop - start))))
        sums, done = sums + each[done - start : stop - start].sum(), stop
    assert done == 70
    close(row["loss"], sums / 70, 1e-6, "sliding")
    assert (row["eval_tokens"], row["eval_bytes"]) == (whole["eval_tokens"], whole["eval_bytes"]) == (70, 70)
    assert row["loss"] != whole["loss"]
    assert other(config, "eval.mode=sliding").evaluated_stride == 8


# --------------------------------------------------------------------------------------------------------- whole documents


@pytest.mark.parametrize(
    ("variant", "piece"), [("mla", 5), ("sliding_window", 16), ("gated_delta", 5), ("compressed", 16), ("gqa/2", 7)]
)
def test_documents_through_the_cache_are_those_of_the_parallel_form(
    variant: str, piece: int, tiny: Any, float64: Any
) -> None:
    """Of unequal lengths, beside one another, in pieces that divide nothing; longer than the window and the context."""
    config = tiny(variant, model={"num_layers": 2, "dtype": "float64"})
    model, mesh = models.create(config, VOCABULARY), make_mesh(configs.MeshConfig(data=1), jax.devices()[:1])
    draw = np.random.default_rng(0)
    texts = [np.append(draw.integers(0, END, size), END) for size in (40, 3, 17, 1, 52)]
    found = stream.stream(model, mesh, texts, piece, batch=2, chunk_tokens=64)
    padded = [nats(model, np.pad(text, (0, 53 - len(text))))[: len(text) - 1] for text in texts]
    for index, expected in enumerate(padded):
        assert found.documents[index, 0] == len(expected)
        close(found.documents[index, 1], expected.sum(), 1e-9, f"document {index}")
    by_position = [sum(each[p] for each in padded if p < len(each)) for p in range(52)]
    close(found.nats, by_position, 1e-9, "by position")
    assert found.counts.tolist() == [sum(p < len(each) for each in padded) for p in range(52)]
    assert found.loss == pytest.approx(sum(each.sum() for each in padded) / sum(map(len, padded)), rel=1e-12)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.booleans(), st.integers(0, 30))
@settings(deadline=None)
def test_where_documents_stand(sizes: list[int], cut: bool, limit: int) -> None:
    """Each ends with its mark; what is left after the last mark is one too; those of one token have nothing to predict."""
    texts = [np.append(np.zeros(size, np.int64), END) for size in sizes]
    if cut and sizes[-1]:
        texts[-1] = texts[-1][:-1]
    expected, left = [], limit or 10**9
    for text in texts:
        if len(text) > 1 and left > 0:
            expected.append(text[: left + 1])
            left -= len(expected[-1]) - 1
    split = split_of(texts)
    if not expected:
        with pytest.raises(UserError, match=r"config\.eval\.split: all has no document of two tokens or more"):
            stream.documents(split, END, limit)
        return
    found = [split.tokens[span] for span in stream.documents(split, END, limit)]
    assert [each.tolist() for each in found] == [each.tolist() for each in expected]


def test_positions_share_bins_that_double() -> None:
    assert stream.bins(1) == [(0, 1)] and stream.bins(64) == [(0, 64)]
    assert stream.bins(300) == [(0, 64), (64, 128), (128, 256), (256, 300)]


@pytest.fixture(scope="module")
def window_run(trained: Any) -> tuple[Config, Path]:
    return trained("sliding_window", steps=4, eval={"batch_size": 8, "decode_tokens": 0})  # type: ignore[no-any-return]


def test_the_row_of_a_stream(window_run: tuple[Config, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bins average to the loss; a window's bytes do not grow; a document within one window is what windows say of it."""
    config, workdir = window_run
    (tmp_path / "long.txt").write_text("a cache of latents, " * 60)
    (tmp_path / "short.txt").write_text("fifteen tokens.")
    text = [f"data.corpus={tmp_path / 'long.txt'}", "eval.split=all"]
    row = evaluate(workdir, other(config, "eval.mode=stream", "eval.piece=32", *text))
    bins = row["stream"]["by_position"]
    assert [*bins] == ["64", "128", "256", "512", "1024", "1200"]
    assert sum(part["tokens"] for part in bins.values()) == row["eval_tokens"] == 1200
    assert row["eval_bytes"] == 1199  # the end of the document stands for none
    close(sum(part["loss"] * part["tokens"] for part in bins.values()) / 1200, row["loss"], 1e-12)
    assert {part["bytes_held"] for part in bins.values()} == {formula_bytes_at(config, 64)}
    assert {part["bytes_read"] for part in bins.values()} == {formula_bytes_at(config, 64)}
    assert row["stream"]["peak_memory"] > 1e7 and row["stream"]["documents"] == 1
    assert "64 to       128: loss" in capsys.readouterr().out
    written = json.loads(next(workdir.glob("eval-*stream*.json")).read_text())
    assert written["stream"] == row["stream"]

    short = [f"data.corpus={tmp_path / 'short.txt'}", "eval.split=all"]
    windows, streamed = (evaluate(workdir, other(config, *mode, *short)) for mode in ([], ["eval.mode=stream"]))
    close(streamed["loss"], windows["loss"], 1e-6, "one short document")
    assert streamed["eval_tokens"] == windows["eval_tokens"] == 15  # with the end


def test_what_grows_is_held_as_the_formula_says(tiny: Any) -> None:
    config = tiny("gqa", model={"num_layers": 2})
    model = models.create(config, VOCABULARY)
    found = stream.Streamed(np.ones(300), np.ones(300, np.int64), np.asarray([[300.0, 300.0]]))
    bins = stream.summary(found, model, stream.WHOLE, 16)["by_position"]
    assert {int(stop): part["bytes_held"] for stop, part in bins.items()} == {
        stop: formula_bytes_at(config, stop) for stop in (64, 128, 256, 300)
    }


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["eval.mode=streams"], "config.eval.mode: 'streams': did you mean 'stream'"),
        (
            ["eval.stride=4"],
            "config.eval.stride: 4 has no effect while eval.mode is windows; leave it out or set mode=sliding",
        ),
        (["eval.piece=4"], "config.eval.piece: 4 has no effect while eval.mode is windows; leave it out or set mode=stream"),
        (["eval.mode=sliding", "eval.stride=17"], "config.eval.stride: 17 leaves out tokens between windows of 16"),
        (["eval.mode=sliding", "eval.stride=-1"], "config.eval.stride: -1 is"),
    ],
)
def test_refused(overrides: list[str], message: str, window_run: tuple[Config, Path], snapshot: Any) -> None:
    config, workdir = window_run
    before = snapshot(workdir)
    with pytest.raises(UserError) as error:
        evaluate(workdir, other(config, *overrides))
    assert message in str(error.value)
    assert snapshot(workdir) == before


def test_policies_that_act_after_a_prompt_are_refused_in_a_stream(trained: Any) -> None:
    config, workdir = trained("mha", steps=3)
    for cache in (["evict=streaming", "budget_tokens=8"], ["read=quest:page=4,pages=2,start=0"]):
        changed = other(config, "eval.mode=stream", *(f"eval.cache.{field}" for field in cache))
        with pytest.raises(UserError, match=r"acts after a prompt or a token, and eval\.mode=stream reads in pieces"):
            evaluate(workdir, changed)


def test_losses_by_position_are_drawn_and_tabled(tmp_path: Path) -> None:
    """Means over the seeds; a model without such losses is in the table above alone."""

    def bins(loss: float) -> dict[str, Any]:
        parts = {"64": (0, 64), "128": (64, 64), "256": (128, 100)}
        each = {stop: {"start": start, "tokens": n, "loss": loss + start} for stop, (start, n) in parts.items()}
        return {"stream": {"by_position": each}, "config": {"context": 256}}

    rows = typed(
        [
            make_row("a-s0", "latent", 2.0, 100, point="a", **bins(1.0)),
            make_row("a-s1", "latent", 2.0, 100, point="a", **bins(2.0)) | {"seed": 1},
            make_row("b", "latent", 2.0, 50),
        ]
    )
    compared = points(rows)
    assert [point.label for point in positions.streamed(compared)] == ["a"]
    axes = Figure().subplots()
    positions.draw(axes, compared)
    line, context = axes.lines
    np.testing.assert_allclose(line.get_ydata(), [1.5, 65.5, 129.5])
    np.testing.assert_allclose(line.get_xdata(), [8.0, (64 * 128) ** 0.5, (128 * 256) ** 0.5])
    assert set(context.get_xdata()) == {256}
    written = report(rows)
    heading = written.index("## Loss by position")
    table = written[heading:].split("\n\n")[2].splitlines()
    assert table[0].startswith("| point | loss | to 64 | to 256 |") and len(table) == 3
    assert f"| {(65.5 * 64 + 129.5 * 100) / 164:.4f} |" in table[2]
    draw(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
