"""Sweeps whose later runs follow from earlier ones, and the one that comes with the project."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from mla.errors import UserError
from mla.report.rows import read_rows
from mla.sweep.runs import Training, load_runs
from mla.sweep.tasks import tasks
from tests.test_sweep import ROOT, Place

RATE = "config.optimizer.learning_rate"
FAIR = "configs/sweeps/fair.py:mechanisms=mha+mla,factors=0.5+1+2,seeds=2"


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def carried_out(spec: str, loss: Callable[[Training], float]) -> list[Training]:
    """All runs of a sweep config whose runs end with a loss that is known."""
    losses: dict[str, float] = {}
    while True:
        runs = [run for run in load_runs(spec, losses) if isinstance(run, Training)]
        if {run.name for run in runs} == set(losses):
            return runs
        losses |= {run.name: loss(run) for run in runs}


def bowl(best: dict[str, float], broken: float = math.inf) -> Callable[[Training], float]:
    """Losses that are lowest at a rate of each mechanism, and infinite from another rate on."""

    def loss(run: Training) -> float:
        rate = run.overrides[RATE]
        return math.inf if rate >= broken else 1 + abs(math.log(rate / best[run.config.split(":")[1]]))

    return loss


def test_fresh_seeds_are_trained_at_the_best_rate_of_a_grid_that_holds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    middle = next(run.overrides[RATE] for run in load_runs(FAIR) if run.name.startswith("mha")) * 2
    runs = carried_out(FAIR, bowl({"mha": middle, "mla": middle * 8}))
    searched = {name: [r.overrides[RATE] / middle for r in runs if r.search and r.family == name] for name in ("mha", "mla")}
    assert searched["mha"] == [0.5, 1, 2] and searched["mla"] == [0.5, 1, 2, 4, 8, 16]
    fresh = [(run.name, run.overrides[RATE] / middle, run.overrides["config.seed"]) for run in runs if not run.search]
    assert fresh == [("mha-s1", 1, 1), ("mha-s2", 1, 2), ("mla-s1", 8, 1), ("mla-s2", 8, 2)]
    assert {run.overrides["config.seed"] for run in runs if run.search} == {0}


def test_a_grid_grows_so_far_and_no_further_and_rates_that_break_training_are_not_chosen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    middle = next(run.overrides[RATE] for run in load_runs(FAIR) if run.name.startswith("mha")) * 2
    best = {"mha": middle / 1024, "mla": middle * 4}
    runs = carried_out(FAIR, bowl(best, broken=2 * middle))
    searched = {name: [r.overrides[RATE] / middle for r in runs if r.search and r.family == name] for name in best}
    assert searched == {"mha": [1 / 32, 1 / 16, 1 / 8, 1 / 4, 0.5, 1, 2], "mla": [0.5, 1, 2]}
    assert {run.overrides[RATE] / middle for run in runs if not run.search} == {1 / 32, 1}
    assert not any(not run.search for run in carried_out(FAIR, lambda run: math.inf))


def test_one_rate_is_no_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match="factors=1: at least two rates make a grid"):
        load_runs("configs/sweeps/fair.py:factors=1")


FOLLOWED = """
from mla.sweep.runs import Training

def get_runs(variant='', losses={{}}):
    yield Training('a', '{base}:mha', {{}}, 'a family', search=True)
    if 'a' in losses:
        yield Training('b', '{base}:mha', {{}}, 'a family')
    if 'b' in losses:
        yield Training('c', '{base}:mha', {{}}, 'a family')
"""


def test_a_sweep_goes_on_with_what_follows(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    place.runs(("a", {}), ("b", {}), ("c", {}))
    Path(place.spec).write_text(FOLLOWED.format(base=place.base))
    (place.root / "fail-b").touch()
    assert place.sweep() == 1
    assert place.calls() == ["train a", "eval a", "train b", "eval b"], "c waits for b"
    assert "1 more follow from what these gave" in capsys.readouterr().out
    (place.root / "fail-b").unlink()
    assert place.sweep() == 0
    assert place.calls() == ["train b", "eval b", "train c", "eval c"], "and a is not trained again"
    rows = read_rows(place.work / "results.jsonl")
    assert [(row.run, row.search) for row in rows] == [("a", True), ("b", False), ("c", False)]
    assert [task.run.name for task in tasks(place.spec, place.work)] == ["a", "b", "c"]
    assert place.sweep() == 0 and place.calls() == []


def test_a_sweep_config_must_not_take_back_what_it_named(place: Place) -> None:
    place.runs(("a", {}), ("b", {}))
    assert place.sweep() == 0
    text = FOLLOWED.format(base=place.base).replace("    yield Training('a'", "    if not losses: yield Training('a'")
    Path(place.spec).write_text(text)
    with pytest.raises(UserError, match=r"named run 'a' and, once others had finished, no longer does"):
        place.sweep()


def test_what_a_run_that_broke_gave_is_infinite(place: Place) -> None:
    place.runs(("a", {}), ("b", {}), ("c", {}))
    Path(place.spec).write_text(FOLLOWED.format(base=place.base))
    place.work.mkdir()
    (place.work / "a.log").write_text("error: step 7: loss is nan, training stops; no checkpoint was saved before it\n")
    assert [task.run.name for task in tasks(place.spec, place.work)] == ["a", "b"]
