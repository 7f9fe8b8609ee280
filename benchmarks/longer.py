"""A finished run trained for as long again, beside one run that was planned so long: what the warm restart does.

    python benchmarks/longer.py --workdir=runs/longer [--config=configs/quick.py:mla] [--steps=150] [--out=results/longer]

Trains a run, evaluates it, raises its steps to twice as many, stops that half-way by SIGTERM and resumes it; and trains
another run of twice the steps at once. Writes longer.png (learning rate and loss over steps) and results.json (evaluations
and logged steps) into OUT. What is finished is not done again. About ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mla import paths  # noqa: E402
from mla.errors import UserError  # noqa: E402
from mla.training.checkpoint import steps_in  # noqa: E402
from mla.training.logs import read_metrics  # noqa: E402

Steps = list[dict[str, Any]]
COLOURS = ("#0072B2", "#D55E00")
AVERAGED = 5  # logged steps behind a point of the smooth line


def train(config: str, workdir: Path, steps: int, stop_after: int = 0) -> None:
    """Trains to `steps`; with `stop_after` it is stopped by SIGTERM at the first logged step beyond that."""
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        f"--config={config}",
        f"--workdir={workdir}",
        f"--config.steps={steps}",
    ]
    process = subprocess.Popen(command, cwd=ROOT)
    while stop_after and process.poll() is None:
        if any(line["step"] > stop_after for line in read_metrics(workdir)):
            process.send_signal(signal.SIGTERM)
            break
        time.sleep(0.1)
    if process.wait() not in ((0, 128 + signal.SIGTERM) if stop_after else (0,)):
        raise SystemExit(f"{' '.join(command)} failed")


def evaluate(workdir: Path) -> dict[str, Any]:
    subprocess.run([sys.executable, str(ROOT / "eval.py"), f"--workdir={workdir}"], cwd=ROOT, check=True)
    return read(workdir / "eval.json")


def read(path: Path) -> dict[str, Any]:
    """What counts of one evaluation."""
    row = json.loads(path.read_text())
    return {key: row[key] for key in ("name", "loss", "perplexity", "train_tokens", "eval_tokens")}


def measure(config: str, workdir: Path, steps: int) -> dict[str, Any]:
    """Trains and evaluates all of it."""
    restarted, planned = workdir / "restarted", workdir / "planned"
    if steps_in(restarted)[-1:] != [2 * steps]:
        if not steps_in(restarted):
            train(config, restarted, steps)
            evaluate(restarted)
            train(config, restarted, 2 * steps, stop_after=steps + steps // 2)
        train(config, restarted, 2 * steps)
    train(config, planned, 2 * steps)
    environment = json.loads((restarted / "environment.json").read_text())
    return {
        "steps": steps,
        "environment": {key: value for key, value in environment.items() if key not in ("command", "git_commit")},
        "evaluations": {
            "before the restart": read(restarted / "history" / str(steps) / "eval.json"),
            "restarted": evaluate(restarted),
            "planned": evaluate(planned),
        },
        "metrics": {name: read_metrics(workdir / name) for name in ("restarted", "planned")},
    }


def draw(results: dict[str, Any], path: Path) -> None:
    """Learning rate above, loss below, of both runs; evaluations as points."""
    figure = Figure(figsize=(7.5, 6), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    rates, losses = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2))
    for colour, (name, lines) in zip(COLOURS, results["metrics"].items(), strict=True):
        steps = [line["step"] for line in lines]
        rates.plot(steps, [line["learning_rate"] for line in lines], color=colour)
        loss = [line["loss"] for line in lines]
        smooth = [sum(part) / len(part) for part in (loss[max(0, i + 1 - AVERAGED) : i + 1] for i in range(len(loss)))]
        losses.plot(steps, loss, color=colour, alpha=0.25, linewidth=0.8)
        losses.plot(steps, smooth, color=colour, label=f"{name}, training loss (mean of {AVERAGED} logged steps)")
    places = {"before the restart": (results["steps"], 0), "restarted": (2 * results["steps"], 0)}
    for name, row in results["evaluations"].items():
        step, number = places.get(name, (2 * results["steps"], 1))
        label = f"{name}: validation loss {row['loss']:.4f}"
        losses.plot(step, row["loss"], "os"[number], color=COLOURS[number], markeredgecolor="black", label=label, zorder=3)
    for axes, label in ((rates, "learning rate"), (losses, "nats a token")):
        axes.axvline(results["steps"], color="#888888", linewidth=0.8, linestyle=":")
        axes.set_ylabel(label)
        axes.grid(True, color="#DDDDDD", linewidth=0.6)
    losses.set_xlabel("step")
    losses.legend(fontsize=7.5, frameon=False)
    figure.savefig(path, format="png")


def folder(text: str) -> Path:
    """A path from the root, `~` expanded, for `argparse`."""
    try:
        return Path(paths.absolute(text, "folder"))
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quick.py:mla")
    parser.add_argument("--steps", type=int, default=150, help="before the restart, and again after it")
    parser.add_argument("--workdir", type=folder, required=True)
    parser.add_argument("--out", type=folder, default="results/longer")
    options = parser.parse_args()
    results = measure(options.config, options.workdir, options.steps)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(results, options.out / "longer.png")
    for name, row in results["evaluations"].items():
        print(f"{name}: loss {row['loss']:.4f} after {row['train_tokens']:,} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
