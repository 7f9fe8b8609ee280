"""Statistics of comparisons: against scipy's tests, by hand, by simulation, and the tables of a protocol."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from mla.errors import UserError
from mla.report import budgets, compute, differences, failures, statistics
from mla.report import text as report
from mla.report.points import points
from mla.training.loop import _require_finite
from tests.programs import status
from tests.rows import make_row, typed

close = np.testing.assert_allclose


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


# -------------------------------------------------------------------------------------------------------------- intervals


@pytest.mark.parametrize("runs", [2, 3, 5, 8])
def test_intervals_are_those_of_scipy(runs: int) -> None:
    a, b = 2 + drawn(runs), 1.5 + 3 * drawn(runs, seed=1)
    ours, theirs = statistics.mean(a), stats.ttest_1samp(a, 0.0)
    close((ours.low, ours.high, ours.p), (*theirs.confidence_interval(), theirs.pvalue), rtol=1e-9)
    ours, theirs = statistics.paired(a, b), stats.ttest_rel(a, b)
    close((ours.low, ours.high, ours.p), (*theirs.confidence_interval(), theirs.pvalue), rtol=1e-9)
    close(ours.rho, stats.pearsonr(a, b).statistic, rtol=1e-9)
    other = np.append(b, [0.0, 9.0])
    ours, theirs = statistics.unpaired(a, other, 0.9), stats.ttest_ind(a, other, equal_var=False)
    close((ours.low, ours.high, ours.p), (*theirs.confidence_interval(0.9), theirs.pvalue), rtol=1e-9)


def test_an_interval_by_hand() -> None:
    ours = statistics.paired([3.0, 4.0, 5.0], [2.0, 2.0, 2.0])  # differences 1, 2, 3
    close((ours.value, ours.error, ours.half), (2.0, 3**-0.5, 4.30265 * 3**-0.5), rtol=1e-5)
    assert ours.rho is None and ours.runs == 3
    for runs, times in ((3, 4.30), (5, 2.78), (8, 2.36)):
        interval = statistics.mean(drawn(runs))
        assert round(interval.half / interval.error, 2) == times


def test_concordance_is_that_of_friedman() -> None:
    for models, seeds in ((3, 2), (5, 3), (7, 6)):
        losses = drawn(models, seeds)
        close(statistics.concordance(losses), stats.friedmanchisquare(*losses).statistic / (seeds * (models - 1)), 1e-12)
    tied = np.round(drawn(6, 4), 0)
    close(statistics.concordance(tied), stats.friedmanchisquare(*tied).statistic / (4 * 5), 1e-12)
    assert statistics.concordance([[1, 2], [3, 4], [5, 6]]) == 1 and statistics.concordance([[1, 2], [2, 1]]) == 0
    assert math.isnan(statistics.concordance([[1, 1], [1, 1]]))


def test_identical_runs_have_no_error_and_no_difference() -> None:
    for compare in (statistics.paired, statistics.unpaired):
        same = compare([1.5, 1.5], [1.5, 1.5])
        assert (same.value, same.error, same.p) == (0.0, 0.0, 1.0)
    runs = drawn(4)
    same = statistics.paired(runs, runs)
    assert (same.error, same.low, same.high, same.p) == (0.0, 0.0, 0.0, 1.0) and same.within(0.0)
    close(same.rho, 1.0)
    for wrong in ([1.0], [[1.0, 2.0]]):
        with pytest.raises(ValueError, match="at least 2"):
            statistics.mean(wrong)
    with pytest.raises(ValueError, match="a has 2 runs and b 3"):
        statistics.paired([1, 2], [1, 2, 3])


def test_pairs_gain_what_their_correlation_says() -> None:
    """1 / sqrt(2 (1 - rho)) in the standard error, over that of one run."""
    shared, rho = drawn(200_000), 0.8
    a, b = (rho**0.5 * shared + (1 - rho) ** 0.5 * drawn(200_000, seed=seed) for seed in (1, 2))
    ours = statistics.paired(a, b)
    close((ours.rho, statistics.mean(a).error / ours.error), (rho, (2 * (1 - rho)) ** -0.5), rtol=1e-2)


def test_holm_by_hand() -> None:
    close(statistics.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.9, 0.6]) == [1.0, 1.0] and statistics.holm([]) == []


def test_holm_rejects_any_true_hypothesis_as_rarely_as_it_says() -> None:
    rng = np.random.default_rng(0)
    times = [min(statistics.holm([*rng.uniform(size=8), 1e-6])[:8]) < 0.05 for _ in range(4000)]
    assert 0.04 < np.mean(times) < 0.056  # 8 true ones at .05 / 8 each: .049


# ----------------------------------------------------------------------------------------------------- documents resampled


def test_resampled_documents_give_the_interval_of_scipy() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(50, 5000, 30).astype(float)
    sums = np.stack([tokens * rng.normal(mean, 0.2, 30) for mean in (1.8, 1.7)])

    def difference(a: Any, b: Any, count: Any, axis: int = -1) -> Any:
        return (a.sum(axis) - b.sum(axis)) / count.sum(axis)

    theirs = stats.bootstrap(
        (*sums, tokens), difference, paired=True, method="percentile", n_resamples=10_000, vectorized=True, rng=1
    ).confidence_interval
    ratios = statistics.resampled_ratios(sums, tokens)
    assert ratios.shape == (10_000, 2)
    low, high = statistics.percentiles(ratios[:, 0] - ratios[:, 1])
    close((low, high), theirs, atol=0.03 * (high - low))


def test_all_models_have_the_same_documents_in_a_resample() -> None:
    tokens, nats = np.array([10.0, 400.0, 30.0]), np.array([20.0, 700.0, 10.0])
    ratios = statistics.resampled_ratios([nats, nats + 0.1 * tokens], tokens, 500)
    close(ratios[:, 1] - ratios[:, 0], 0.1, rtol=1e-9)
    assert len(np.unique(ratios[:, 0].round(9))) == 10  # 3 of 3 documents, in any order
    in_bytes = statistics.resampled_ratios([nats, nats], [tokens, 2 * tokens], 50)
    close(in_bytes[:, 0], 2 * in_bytes[:, 1])


def test_resamples_of_one_and_of_two_documents() -> None:
    assert set(statistics.resampled_ratios([[30.0]], [10.0], 20).ravel()) == {3.0}
    ratios = statistics.resampled_ratios([[1.0, 9.0]], [1.0, 3.0], 40_000).ravel()
    values, times = np.unique(ratios, return_counts=True)
    close(values, [1.0, 2.5, 3.0])
    close(times / 40_000, [0.25, 0.5, 0.25], atol=0.01)
    assert statistics.percentiles(ratios) == (1.0, 3.0)


def test_large_resamples_are_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    sums, tokens = np.abs(drawn(2, 7)), np.full(7, 2.0)
    monkeypatch.setattr(statistics, "_PART", 21)  # three resamples at once
    ratios = statistics.resampled_ratios(sums, tokens, 2000)
    assert ratios.shape == (2000, 2) and len(np.unique(ratios[:, 0])) > 500
    close(ratios.mean(0), sums.sum(1) / 14, rtol=0.02)


# ----------------------------------------------------------------------------------------------------------------- planning


def test_the_best_of_equal_runs_is_better_than_they_are() -> None:
    """.85, 1.03, 1.16, 1.35 deviations, as the protocol has it, by closed forms and as simulated."""
    assert [round(statistics.best_of_bias(k), 2) for k in (3, 4, 5, 7)] == [0.85, 1.03, 1.16, 1.35]
    close([statistics.best_of_bias(k) for k in (1, 2, 3)], [0.0, math.pi**-0.5, 1.5 * math.pi**-0.5], atol=1e-6)
    for runs in (4, 7):
        close(statistics.best_of_bias(runs), -drawn(200_000, runs).min(axis=1).mean(), atol=0.01)


DEVIATIONS = (0.003, 0.004, 0.005, 0.007, 0.010, 0.015, 0.020)


@pytest.mark.parametrize(
    ("how", "seeds"),
    [
        ({}, (3, 4, 6, 9, 17, 37, 64)),
        ({"rho": 0.5}, (3, 4, 5, 7, 10, 20, 34)),
        ({"rho": 0.8}, (3, 3, 4, 4, 6, 10, 15)),
        ({"comparisons": 10}, (5, 7, 9, 16, 29, 62, 109)),
    ],
    ids=["unpaired", "rho .5", "rho .8", "10 comparisons"],
)
def test_seeds_for_a_hundredth_of_a_nat(how: dict[str, Any], seeds: tuple[int, ...]) -> None:
    assert tuple(statistics.seeds_needed(0.01, sd, **how) for sd in DEVIATIONS) == seeds


def test_smallest_effects() -> None:
    """In deviations of a run, or of the differences: the protocol's, to the digit it has."""
    assert [round(statistics.smallest_effect(n), 1) for n in (2, 3, 5, 8)] == [5.7, 3.1, 2.0, 1.5]
    assert [round(statistics.smallest_effect(n, pairs=True), 1) for n in (3, 5, 8)] == [3.3, 1.7, 1.2]


@pytest.mark.parametrize(("runs", "pairs", "effect"), [(9, False, 10 / 7), (3, True, 3.3), (8, True, 0.0)])
def test_power_is_how_often_a_test_resolves(runs: int, pairs: bool, effect: float) -> None:
    a, b = drawn(40_000, runs) + effect, drawn(40_000, runs, seed=1)
    p = stats.ttest_1samp(a, 0.0, axis=1).pvalue if pairs else stats.ttest_ind(a, b, axis=1).pvalue
    close(statistics.power(effect, 1.0, runs, pairs), np.mean(p < 0.05), atol=0.008)


def test_a_large_effect_takes_two_seeds_and_a_tiny_one_is_refused() -> None:
    assert statistics.seeds_needed(1.0, 1e-3) == 2 and statistics.power(40.0, 1.0, 3) == 1.0
    with pytest.raises(ValueError, match="seeds at a deviation of 10"):
        statistics.seeds_needed(0.01, 10.0)


# ------------------------------------------------------------------------------------------------------------------ budgets

SIZES, LOSSES = [256, 64, 512], [1.5, 2.0, 1.8]


def test_the_lowest_loss_within_a_budget_by_hand() -> None:
    budget = [[32, 64, 100], [256, 511, 4096]]
    close(budgets.lowest(SIZES, LOSSES, budget, 3.0), [[3.0, 2.0, 2.0], [1.5, 1.5, 1.5]])
    close(budgets.lowest([], [], budget, 3.0), 3.0)
    # one octave of the reference, two of 2.0, three of 1.5
    close(budgets.average(SIZES, LOSSES, 32, 2048, 3.0), (3.0 + 2 * 2.0 + 3 * 1.5) / 6)
    close(budgets.hypervolume(SIZES, LOSSES, 32, 2048, 3.0), 2 * 1.0 + 3 * 1.5)
    close(budgets.hypervolume(SIZES, LOSSES, 32, 2048, 1.75), 3 * 0.25)  # 2.0 is worse than that reference
    assert [budgets.bytes_for(SIZES, LOSSES, loss) for loss in (2.5, 2.0, 1.9, 1.5, 1.4)] == [64, 64, 256, 256, None]
    for low, high in ((0, 64), (64, 64)):
        with pytest.raises(ValueError, match="there are no octaves"):
            budgets.average(SIZES, LOSSES, low, high, 3.0)


@pytest.mark.parametrize("seed", range(4))
def test_area_and_average_are_integrals(seed: int) -> None:
    """Of the step function, summed over a fine grid of log2; a point more never lowers the area."""
    rng = np.random.default_rng(seed)
    sizes, losses = 2 ** rng.uniform(3, 13, 9), rng.uniform(1.5, 3.2, 9)
    low, high, reference = 40.0, 3000.0, 2.6
    x = np.linspace(math.log2(low), math.log2(high), 200_001)
    values = np.array([min([loss for size, loss in zip(sizes, losses, strict=True) if size <= b], default=reference)
                       for b in 2 ** x[::50]]).repeat(50)[: len(x)]  # fmt: skip
    octaves = math.log2(high / low)
    area, average = (f(sizes, losses, low, high, reference) for f in (budgets.hypervolume, budgets.average))
    close(area, np.maximum(0, reference - values).mean() * octaves, atol=5e-3)
    close(average, values.mean(), atol=2e-3)
    for size, loss in zip(2 ** rng.uniform(3, 13, 20), rng.uniform(1.0, 3.2, 20), strict=True):
        more = budgets.hypervolume([*sizes, size], [*losses, loss], low, high, reference)
        assert more >= area - 1e-12
        if np.any((sizes <= size) & (losses <= loss)):
            close(more, area, rtol=1e-12)
    below = np.minimum(losses, reference)
    area, average = (f(sizes, below, low, high, reference) for f in (budgets.hypervolume, budgets.average))
    close(area, (reference - average) * octaves)


def test_dominated_points_by_hand() -> None:
    sizes, losses = [10, 10, 20, 5, 10], [1.0, 1.0, 1.1, 2.0, 1.2]  # two are equal: neither beats the other
    assert budgets.dominated(sizes, losses).tolist() == [False, False, True, False, True]
    runs = np.array([[1.0, 1.2, 1.1], [1.1, 1.31, 1.2], [1.2, 1.19, 1.0]])  # worse by .1 each time; by .03, once better
    assert budgets.dominated([10, 20, 30], runs.mean(axis=1)).tolist() == [False, True, True]
    assert budgets.confidently_dominated([10, 20, 30], runs).tolist() == [False, True, False]
    assert budgets.confidently_dominated([30, 20, 10], runs).tolist() == [False, False, False]


def test_a_number_of_each_seed_then_its_mean() -> None:
    runs = np.array([[1.0, 3.0, 2.0], [2.0, 2.0, 2.0]])
    ours = budgets.over_seeds(runs, min)  # 1, 2, 2, while the least of the means is 2
    close((ours.value, ours.error), (5 / 3, stats.sem([1, 2, 2])))
    alone = budgets.over_seeds(runs[:, :1], min)
    assert alone.value == 1.0 and math.isnan(alone.error) and alone.runs == 1


# ------------------------------------------------------------------------------------------------------------------ compute


def lines(count: int, rate: float, slope: float, noise: float = 0.0, start: float = 3.0) -> list[dict[str, float]]:
    """Logged steps of 1000 tokens, with a loss that falls by `slope` a million tokens."""
    errors = noise * drawn(count)
    return [
        {"step": i, "tokens": 1000 * i, "loss": start - slope * 1e-3 * i + errors[i - 1], "tokens_per_second": rate}
        for i in range(1, count + 1)
    ]


def test_smoothing_does_not_lag_and_is_not_read_beyond_its_ends() -> None:
    curve = compute.smoothed(lines(100, 50.0, 2.0))
    assert curve is not None and curve.rate == 50.0
    close((curve.tokens[0], curve.tokens[-1]), (5500, 95_500))  # means of ten
    for tokens in (5500, 17_250, 95_500):
        close(curve.at(tokens), 3 - 2e-6 * tokens)
    assert curve.at(5000) is None and curve.at(96_000) is None
    noisy = compute.smoothed(lines(1000, 1.0, 0.0, noise=1.0))
    assert noisy is not None and abs(np.std(noisy.losses) - 0.1) < 0.04  # a hundred at once
    assert compute.smoothed(lines(3, 1.0, 1.0)) is None and compute.smoothed([{"step": 1}]) is None
    first_compiles = lines(5, 50.0, 2.0)
    first_compiles[0]["tokens_per_second"] = 1e-3
    compiled = compute.smoothed(first_compiles)
    assert compiled is not None and compiled.rate == 50.0


def test_speedup_by_hand() -> None:
    assert compute.speedup(2.6, 2.6, 0.5) == 0.5
    close(compute.speedup(3.1, 2.6, 2.0, floor=1.6, exponent=0.5), 2 * 1.5**-2)
    close(compute.speedup(3.0, 3.01, 1.0), (1.4 / 1.41) ** (-1 / 0.094))
    assert compute.speedup(1.5, 2.0, 1.0) is None and compute.speedup(2.0, 1.6, 1.0) is None


def trained(tmp_path: Path, tokenizer: str = "bpe:8192") -> list[dict[str, Any]]:
    """Two runs with their folders: `new` learns faster by the token, `mha` takes twice as many tokens a second."""
    corpus = {"name": "c", "sha256": "5ha", "tokenizer": tokenizer, "split": "validation"}
    rows = []
    for name, rate, slope, loss in (("mha", 200.0, 2.0, 2.8), ("new", 100.0, 4.0, 2.6)):
        (tmp_path / name).mkdir(parents=True)
        text = "".join(json.dumps(line) + "\n" for line in lines(100, rate, slope))
        (tmp_path / name / "metrics.jsonl").write_text(text)
        rows.append(make_row(name, name, loss, 64, corpus=corpus))
    return rows


def cells(section: str) -> dict[str, list[str]]:
    """The first cell of each line of the tables of a text -> the others."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("|")]
    return {first: others for first, *others in lines}


def test_losses_at_equal_tokens_and_time_are_read_off_the_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = typed(trained(tmp_path))
    table = cells(compute.section(points(rows), [tmp_path], ["mha"]))
    assert table["point"] == ["training MFLOPs/token", "training tok/s", "at 95,500 tokens", "at 478 s", "speedup over mha"]
    # 95,500 tokens are 477.5 s of mha, in which new sees half as many
    assert table["mha"] == ["", "200", f"{3 - 0.191:.4f}", f"{3 - 0.191:.4f}", "1.00"]
    gain = f"{0.5 * (1.0 / 1.2) ** (-1 / 0.094):.2f}"
    assert table["new"] == ["", "100", f"{3 - 0.382:.4f}", f"{3 - 0.191:.4f}", gain]

    monkeypatch.setattr(compute, "training_flops", lambda row: 1e6 if row.run == "mha" else 4e6)
    table = cells(compute.section(points(rows), [tmp_path / "results.jsonl"], ["mha"]))
    assert table["point"][4] == "at 9.55e+10 FLOPs" and table["mha"][4] == f"{3 - 0.191:.4f}"
    assert table["new"][4] == f"{3 - 4e-6 * 95_500 / 4:.4f}" and table["new"][0] == "4"

    assert compute.section(points(rows), [tmp_path / "mha", tmp_path / "new"], []).count("| new |") == 1
    assert compute.section(points(rows), [tmp_path / "mha"], []) == ""  # one curve is no comparison
    text = compute.section(points(typed(trained(tmp_path / "bytes", "bytes"))), [tmp_path / "bytes"], ["mha"])
    assert "| new |" in text and "speedup" not in text.lower()


def test_training_flops_of_a_row_are_those_of_its_config() -> None:
    root = Path(__file__).parent.parent / "results/quick/results.jsonl"
    rows = typed(json.loads(line) for line in root.read_text().splitlines()[:4])
    by_name = {row.run: row for row in rows}
    spent = compute.training_flops(by_name["mha"])
    # parameters of matrices, the embedding as the output matrix; scores and values of 4 layers over half of 256 tokens
    norms = 9 * 128
    total = by_name["mha"].params.total
    assert total is not None
    matrices, mixing = 6 * (total - norms), 3 * 4 * 4 * 128 * (256 + 1) / 2
    close(spent, matrices + mixing, rtol=1e-9)
    (without,) = typed([make_row("a", "x", 1.2, 64)])
    assert compute.training_flops(without) is None


# --------------------------------------------------------------------------------------------------------------- the report

HELD = {"small": 64, "gqa": 128, "mha": 256}
RUNS = {"mha": [1.50, 1.52, 1.47], "gqa": [1.501, 1.5212, 1.4711], "small": [1.70, 1.75, 1.66]}


def rows_of(runs: dict[str, list[float]], **more: Any) -> list[dict[str, Any]]:
    return [
        make_row(f"{name}-s{seed}", "heads", loss, HELD[name], seed=seed, **more)
        for name, losses in runs.items()
        for seed, loss in enumerate(losses)
    ]


def test_differences_of_a_report_are_paired_by_seed() -> None:
    rows = rows_of(RUNS)
    text = report.report(typed(rows[::-1]))
    section = text[text.index("## Differences") : text.index("## Frontier")]
    body = [re.findall(r"[^|]+", line) for line in section.splitlines() if line.startswith("| ")][2:]
    table = {(line[0].strip(), line[1].strip()): [cell.strip() for cell in line[2:-1] + line[-1:]] for line in body}
    assert list(table) == [("small", "mha"), ("gqa", "mha"), ("small", "gqa")]  # each pair once
    p = {pair: stats.ttest_rel(RUNS[pair[0]], RUNS[pair[1]]).pvalue for pair in table}
    adjusted = dict(zip(p, statistics.holm(list(p.values())), strict=True))
    for (a, b), (seeds, value, half, welch, rho, shown, flops, verdict) in table.items():
        pairs, apart = stats.ttest_rel(RUNS[a], RUNS[b]), stats.ttest_ind(RUNS[a], RUNS[b], equal_var=False)
        low, high = pairs.confidence_interval()
        assert (seeds, value, half) == ("3", f"{(low + high) / 2:+.4f}", f"{(high - low) / 2:.4f}")
        assert welch == f"{np.diff(apart.confidence_interval())[0] / 2:.4f}" and flops == ""
        assert rho == f"{np.corrcoef(RUNS[a], RUNS[b])[0, 1]:.2f}" and shown == f"{adjusted[a, b]:.4f}"
        assert verdict == ("worse, by less than 0.01" if a == "gqa" else "worse")
    assert "3 of 3 are resolved" in section and "none of 9 runs" in section


def test_differences_of_a_report_say_what_other_documents_would_change() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(50, 5000, 30).astype(float)

    def row(name: str, seed: int, mean: float) -> dict[str, Any]:
        nats = tokens * rng.normal(mean, 0.2, 30)
        each = {"tokens": tokens.tolist(), "nats": nats.tolist()}
        return make_row(f"{name}-s{seed}", "heads", nats.sum() / tokens.sum(), HELD[name], seed=seed, documents=each)

    rows = [row(name, seed, mean) for name, mean in (("mha", 1.8), ("small", 1.7)) for seed in (1, 2)]
    sums = [
        np.mean([r["documents"]["nats"] for r in rows if r["run"].startswith(name)], axis=0) for name in ("small", "mha")
    ]
    resampled = statistics.resampled_ratios(sums, tokens)
    low, high = statistics.percentiles(resampled[:, 0] - resampled[:, 1])
    text = report.report(typed(rows))
    assert f"| {low:+.4f} to {high:+.4f} |" in text and "10,000 draws of the evaluated documents" in text
    for wrong in ({"tokens": [1.0], "nats": [1.0, 2.0]}, {"tokens": [0.0] * 30, "nats": [1.0] * 30}, None):
        assert "draws of the evaluated" not in report.report(typed([*rows[:3], rows[3] | {"documents": wrong}]))
    with pytest.raises(UserError, match=r"documents\.tokens is '7', not a list"):
        typed([rows[0] | {"documents": {"tokens": 7, "nats": []}}])


def test_verdicts_in_words() -> None:
    unclear = {"mha": [1.5, 1.5, 1.5], "gqa": [1.6, 1.4, 1.5], "small": [1.501, 1.499, 1.5]}
    verdicts = [(c.point.label, c.verdict) for c in differences.comparisons(points(typed(rows_of(unclear))), ["mha"])]
    assert verdicts == [("small", "not resolved, less than 0.01 apart"), ("gqa", "not resolved")]
    better = differences.comparisons(points(typed(rows_of(RUNS))), ["small"])
    assert {c.verdict for c in better} == {"better"}


def test_seeds_and_texts_that_differ_are_not_paired() -> None:
    shifted = rows_of({"mha": RUNS["mha"]}) + [
        make_row(f"gqa-s{seed}", "heads", loss, 128, seed=seed) for seed, loss in enumerate(RUNS["gqa"], 1)
    ]
    (only,) = differences.comparisons(points(typed(shifted)), ["mha"])
    assert only.pairs.runs == 2  # seeds 1 and 2
    close(only.pairs.value, np.mean([1.501 - 1.52, 1.5212 - 1.47]))
    other = {"name": "other", "sha256": "0ther", "tokenizer": "bytes", "split": "validation"}
    apart = points(typed(rows_of({"mha": RUNS["mha"]}) + rows_of({"gqa": RUNS["gqa"]}, corpus=other)))
    assert differences.comparisons(apart, ["mha"]) == []
    text = differences.section(apart, ["mha"])
    assert "No baseline: no point called mha" in text and "--against" in text


def test_a_single_seed_has_no_section() -> None:
    one = [row for row in rows_of(RUNS) if row["seed"] == 0]
    assert "## Differences" not in report.report(typed(one)) and "## Frontier" not in report.report(typed(one))


def test_the_frontier_of_a_report() -> None:
    """F is 1.70, 1.501, and 1.5 only from the end of the range on; seeds by themselves."""
    text = differences.frontier(points(typed(rows_of(RUNS))), ["mha"])
    of_seeds = (np.array(RUNS["small"]) + np.minimum(RUNS["small"], RUNS["gqa"])) / 2
    line = cells(text)["all points"]
    area = 2 * (math.log(27.5) - of_seeds)
    assert line[:2] == ["3", "3"] and line[2] == f"{of_seeds.mean():.4f} ± {stats.sem(of_seeds):.4f}"
    assert line[3] == f"{area.mean():.4f} ± {stats.sem(area):.4f}" and line[4] == "128"
    assert cells(text)["heads"] == line and "64 to 256 B/token as in the picture (2.00 octaves)" in text
    runs = RUNS | {"mha": [1.511, 1.5312, 1.482]}
    assert "excludes 0: mha." in differences.frontier(points(typed(rows_of(runs))), [])
    two = {name: RUNS[name] for name in ("mha", "gqa")}
    assert differences.frontier(points(typed(rows_of(two))), ["mha"]) == ""
    assert differences.frontier(points(typed(rows_of(RUNS, baseline={}))), ["mha"]) == ""


def test_failures_are_counted(tmp_path: Path) -> None:
    runs = RUNS | {"small": [1.70, 3.4, 1.66]}  # ln 27.5 is 3.31
    rows = [row for row in rows_of(runs) if row["run"] not in ("gqa-s1", "mha-s2")]
    compared = points(typed(rows))
    told = failures.told(compared, [tmp_path])
    assert told == (
        "Failures: of 9 runs, 1 diverged (no better than token frequencies alone): small-s1; 2 without a result though other"
        " points have that seed: gqa-s1, mha-s2."
    )
    with pytest.raises(UserError) as error:
        _require_finite(7, {"loss": 1.0, "grad_norm": math.inf}, 0)
    (tmp_path / "gqa-s1.log").write_text(f"step 6\nerror: {error.value}\n")
    (tmp_path / "mha-s0.log").write_text(f"error: {error.value}\n")  # which has a result by now
    (tmp_path / "mha-s2.log").write_text("error: no space left\n")
    told = failures.told(compared, [tmp_path / "results.jsonl"])
    assert told.startswith("Failures: of 9 runs, 1 stopped at a number that is not finite: gqa-s1; 1 diverged")
    assert told.endswith("1 without a result though other points have that seed: mha-s2.")


def test_a_task_that_no_level_of_was_learnt_is_unsolved() -> None:
    def row(seed: int, easy: float) -> dict[str, Any]:
        levels = {"64x4": {"accuracy": easy}, "128x8": {"accuracy": 0.1}}
        return make_row(f"mha-s{seed}", "heads", 1.0, 64, seed=seed, task={"accuracy": (easy + 0.1) / 2, "by_level": levels})

    text = failures.told(points(typed([row(0, 0.9), row(1, 0.49), row(2, 0.5)])), [])
    assert text == "Failures: of 3 runs, 1 unsolved (less than 50% right at the easiest level): mha-s1."


def test_baselines_are_named_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results, out = tmp_path / "results.jsonl", tmp_path / "out"
    results.write_text("".join(json.dumps(row) + "\n" for row in rows_of(RUNS)))
    assert status("report", results, f"--out={out}", "--against=small") == 0
    text = (out / "report.md").read_text()
    assert "| mha | small | 3 |" in text and "| mha | gqa |" not in text
    assert text.splitlines()[-1] == f"    python -m mla report {results} --out={out} --against=small"
    assert status("report", results, "--against=small") == 0
    assert (tmp_path / "report.md").read_text().splitlines()[-1] == f"    python -m mla report {results} --against=small"
    assert status("report", results, f"--out={out}") == 0  # flags of an earlier call are forgotten
    assert "| small | gqa | 3 |" in (out / "report.md").read_text()
    capsys.readouterr()
    assert status("report", results, f"--out={out}", "--against=mha,smal") == 1
    assert capsys.readouterr().err == "error: --against: 'smal' is no point; did you mean 'small'?\n"


def test_runs_whose_losses_do_not_differ_make_a_report() -> None:
    text = report.report(typed(rows_of({name: [1.5, 1.5] for name in HELD})))
    assert "not resolved, less than 0.01 apart" in text and " nan" not in text
