"""What a run says about itself: metrics.jsonl is the truth; TensorBoard, W&B and the terminal show the same numbers."""

from __future__ import annotations

import datetime
import hashlib
import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from mla import config as configs
from mla import strict_json
from mla.config import Config
from mla.errors import UserError
from mla.workdir import write_text

METRICS_FILE = "metrics.jsonl"


def require_wandb(config: Config) -> None:
    """Raises UserError where W&B is asked for and not installed."""
    if config.log.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError("config.log.wandb: the wandb package is not installed; pip install wandb, or set it to false")


def read_metrics(workdir: str | os.PathLike[str], until: int | None = None) -> list[dict[str, Any]]:
    """The logged steps of a run, in order; a line that a killed process left half-written is no step.

    Args:
      workdir: of the run.
      until: the last step wanted; None: all.

    Raises:
      UserError: a wanted step with a number that is not finite.
    """
    path = Path(workdir) / METRICS_FILE
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if not isinstance(values, dict) or not isinstance(values.get("step"), int):
            continue
        if until is None or values["step"] <= until:
            if wrong := strict_json.not_finite(values):
                raise UserError(f"{path}: step {values['step']}: {wrong}, not a finite number; remove that line")
            lines.append(values)
    return lines


class Logger:
    """Receives the metrics of every step and writes those of every `log.every_steps`-th, of the last and before restarts.

    A logged step is {step, tokens, loss, grad_norm, learning_rate, tokens_per_second, elapsed_seconds}: tokens trained on
    since step 0; tokens per second since the step logged before, without the compilation before a process's first step
    (unless that step is itself logged); seconds of training, those before a resume included. Where a peak of FLOPs is known
    there is also mfu, the share of it that this rate makes use of by formula (PaLM 2204.02311, appendix B).

    Args:
      workdir: of the run. Lines of metrics.jsonl beyond `step` are dropped: those steps are about to be taken again.
      config: of the run.
      step: steps taken before.
      elapsed: seconds of training before.
      active: whether this process writes (one of several does).
      token_seconds: what a trained token would take at the peak of all devices; None: their peak is not known.
    """

    def __init__(
        self,
        workdir: Path,
        config: Config,
        step: int,
        elapsed: float,
        active: bool = True,
        token_seconds: float | None = None,
    ):
        self._token_seconds = token_seconds
        self._every, self._total, self._active = config.log.every_steps, config.steps, active
        self._ends = {config.steps, *config.optimizer.restart.at}
        self._step_tokens = config.batch_size * config.context
        self._start, self._before = time.monotonic(), elapsed
        self._first, self._mark = step + 1, (step, self._start)
        self._sinks: list[Any] = []
        self._workdir = workdir
        if not active:
            return
        self._sinks.append(_Metrics(workdir, step))
        if config.log.tensorboard:
            self._sinks.append(_TensorBoard(workdir, step))
        if config.log.wandb:
            self._sinks.append(_WandB(workdir, config))
        self._terminal = _Bar(step, self._total) if sys.stderr.isatty() else _Lines(self._total)

    def __enter__(self) -> Logger:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if self._active:
            self._terminal.close()
        for sink in self._sinks:
            try:
                sink.close()
            except OSError:  # the same disk that stopped the run
                if error is None:
                    raise

    @property
    def elapsed(self) -> float:
        """Seconds of training so far, those before a resume included."""
        return self._before + time.monotonic() - self._start

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """The metrics of one step (loss, grad_norm, learning_rate), called once a step and in order."""
        now = time.monotonic()
        since, then = self._mark
        rate = (step - since) * self._step_tokens / max(now - then, 1e-9)
        due = step % self._every == 0 or step in self._ends
        if due or step == self._first:
            self._mark = (step, now)
        if not self._active:
            return
        if due:
            line = {
                "step": step,
                "tokens": step * self._step_tokens,
                "loss": metrics["loss"],
                "grad_norm": metrics["grad_norm"],
                "learning_rate": metrics["learning_rate"],
                "tokens_per_second": round(rate, 1),
                "elapsed_seconds": round(self.elapsed, 3),
            }
            if self._token_seconds is not None:
                line["mfu"] = round(rate * self._token_seconds, 4)
            line |= {name: value for name, value in metrics.items() if name not in line}  # what a mechanism adds
            try:
                for sink in self._sinks:
                    sink.write(line)
            except OSError as error:
                raise UserError(f"{self._workdir}: step {step} could not be logged: {error.strerror or error}") from error
        self._terminal.show(step, metrics["loss"], rate, (self._total - step) * self._step_tokens / rate, due)


class _Metrics:
    def __init__(self, workdir: Path, step: int):
        path = workdir / METRICS_FILE
        if path.exists():
            kept = "".join(json.dumps(line) + "\n" for line in read_metrics(workdir, step))
            if kept != path.read_text(encoding="utf-8", errors="replace"):
                write_text(path, kept)
        self._file = path.open("a", encoding="utf-8")

    def write(self, line: dict[str, Any]) -> None:
        self._file.write(strict_json.dumps(line, f"{self._file.name}: step {line['step']}") + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class _TensorBoard:
    # The event file is written here and now: tensorboardX's SummaryWriter does it in a thread, which a full disk kills
    # unnoticed.
    def __init__(self, workdir: Path, step: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.proto.summary_pb2 import Summary

        self._event, self._summary = Event, Summary
        self._writer = EventsWriter(str(workdir / "events"), f".{os.getpid()}")
        if step:  # TensorBoard then hides what an earlier process wrote beyond this step
            start = SessionLog(status=SessionLog.START)
            self._writer.write_event(Event(wall_time=time.time(), step=step + 1, session_log=start))

    def write(self, line: dict[str, Any]) -> None:
        values = [self._summary.Value(tag=key, simple_value=line[key]) for key in line if key != "step"]
        event = self._event(wall_time=time.time(), step=line["step"], summary=self._summary(value=values))
        self._writer.write_event(event)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, workdir: Path, config: Config):
        import wandb

        # The same folder is the same run, so that a resumed one goes on where it was.
        identity = hashlib.sha256(str(workdir.absolute()).encode()).hexdigest()[:16]
        self._run = wandb.init(
            project=config.log.wandb_project,
            name=config.name,
            id=identity,
            resume="allow",
            dir=str(workdir),
            config=configs.to_dict(config),
        )

    def write(self, line: dict[str, Any]) -> None:
        self._run.log({key: value for key, value in line.items() if key != "step"}, step=line["step"])

    def close(self) -> None:
        self._run.finish()


class _Bar:
    """A progress bar on stderr."""

    def __init__(self, step: int, total: int):
        from tqdm import tqdm

        self._bar = tqdm(total=total, initial=step, unit="step", dynamic_ncols=True)

    def show(self, step: int, loss: float, rate: float, remaining: float, due: bool) -> None:
        self._bar.update(step - self._bar.n)
        if due:
            self._bar.set_postfix_str(f"loss {loss:.4f}, {rate:,.0f} tok/s")

    def close(self) -> None:
        self._bar.close()


class _Lines:
    """One line on stdout a logged step."""

    def __init__(self, total: int):
        self._total = total

    def show(self, step: int, loss: float, rate: float, remaining: float, due: bool) -> None:
        if due:
            eta = datetime.timedelta(seconds=round(remaining))
            print(f"step {step}/{self._total}  loss {loss:.4f}  {rate:,.0f} tok/s  ETA {eta}", flush=True)

    def close(self) -> None:
        pass
