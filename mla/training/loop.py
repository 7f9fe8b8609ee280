"""The run: from a config and a folder to a trained model, through restarts."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import jax
from jax.sharding import Mesh

from mla import config as configs
from mla import flops, memory, processes
from mla import model as models
from mla import workdir as folder
from mla.config import Config, need
from mla.data import prepared as data
from mla.data.corpora import require_apart
from mla.errors import UserError
from mla.ops.dispatch import watched
from mla.sharding import AXES, batch_sharding, in_turn, make_mesh, prepare_devices
from mla.training.checkpoint import Checkpoints, Restored, completed, load_params, restore_latest, steps_in
from mla.training.logs import Logger, require_wandb
from mla.training.step import Trainer, TrainState
from mla.training.target import Target


class Stop:
    """Remembers SIGTERM and Ctrl-C until the loop can act on them. Inside `with`, from the main thread.

    Before `defer` is set there is nothing to save: the process exits at once. So it does at a second signal, unless both are
    SIGTERM: a scheduler sends it to every process of a job, and then a parent that stops its child does so too.
    """

    def __init__(self) -> None:
        self.signal = 0
        self.defer = False
        self._agreed = 0
        self._before: dict[int, Any] = {}

    @property
    def status(self) -> int:
        """The exit status that shells give a process ended by this signal: 143 after SIGTERM."""
        return 128 + self.signal

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.defer and not self.signal:
            self.signal = number
        elif self.defer and number == self.signal == signal.SIGTERM:
            pass
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            raise SystemExit(128 + number)

    def asked(self, agree: bool) -> bool:
        """Whether to stop now. Several processes must stop at one step: they compare notes where `agree` says so."""
        if not processes.several():
            return bool(self.signal)
        if agree:
            self._agreed = processes.largest(self.signal)
            self.signal = self.signal or self._agreed
        return bool(self._agreed)


def train(config: Config, workdir: str | os.PathLike[str]) -> int:
    """Trains until `config.steps`, from the folder's last checkpoint if it has one.

    Where the folder's run was to take fewer steps, it goes on from its full state (parameters, moments, position in the
    data), and its schedule restarts where it was to end: see `config.optimizer.restart`.

    Every check precedes the first byte written to the folder.

    Returns:
      0 when the last step is taken and saved; 143 or 130 when SIGTERM or Ctrl-C ended the run after a checkpoint.

    Raises:
      UserError: whatever a user can mend: a config that cannot work, a folder that holds another run, devices that do not
        fit the mesh, missing data, a checkpoint that does not fit, a full disk, a loss that is not finite.
    """
    with Stop() as stop:
        return _train(config, Path(workdir), stop)


def _train(config: Config, workdir: Path, stop: Stop) -> int:
    configs.validate(config)
    config = folder.continued(config, workdir)
    configs.validate(config)
    config.optimizer.restart.require_effect()
    folder.check(config, workdir)
    require_wandb(config)
    prepare_devices(config.mesh)
    mesh = make_mesh(config.mesh)
    require_apart(config.data.corpus, workdir, "--workdir")
    tokenizer = folder.kept_tokenizer(workdir, config.data)
    corpus = data.prepare(config.data, sha256=folder.known_corpus(config, workdir), tokenizer=tokenizer)
    folder.check_corpus(workdir, corpus.sha256)
    batches = corpus.batches(config.context, config.batch_size, config.seed)
    trainer = Trainer(config, corpus.vocab_size, mesh)
    what = f"the state of a model of {trainer.sizes.total:,} parameters and its optimizer"
    memory.require(trainer.abstract_state, what, "lower config.model.d_model or the model's other sizes")

    processes.require_same(config, corpus.sha256)
    primary = processes.primary()

    def say(line: str) -> None:
        if primary:
            print(line, flush=True)

    say(_doctor(config, mesh, corpus, trainer))
    start = None
    if config.init_from and not steps_in(workdir):  # once the run has begun, that folder may be gone
        _require_its_width(trainer, corpus.vocab_size)
        folder.require_same_ids(config.init_from, corpus.tokenizer)
        start = load_params(config.init_from, trainer.abstract_state.params, trainer.additions)
    with contextlib.ExitStack() as cleanup:
        require_held: Callable[[], None] = _nothing
        if primary:  # before the checkpoints are read: another process may be about to add one
            require_held = cleanup.enter_context(folder.hold(workdir)).require
        run = restore_latest(workdir, trainer.abstract_state) or _fresh(start, trainer, batches, corpus.vocab_size, say)
        batches.set_state(run.position)
        if run.step >= config.steps:
            say(f"{workdir}: finished, all {config.steps} steps are done")
            return 0
        if config.target_accuracy and run.progress.get("accuracy", 0.0) >= config.target_accuracy:
            say(f"{workdir}: finished, {_reached(run.step, run.progress['accuracy'])}")
            return 0
        if primary:
            environment = folder.environment(corpus_sha256=corpus.sha256, command=folder.command())
            folder.write(config, workdir, environment)
            folder.write_tokenizer(workdir, corpus.directory)
        for line in _restarts(config, trainer):
            say(f"{workdir}: {line}")
        if run.step:
            say(f"{workdir}: resumed after step {run.step} of {config.steps}")
        checkpoints = Checkpoints(workdir, config.checkpoint.keep, always=config.optimizer.restart.at)
        cleanup.enter_context(checkpoints)
        elapsed, at_peak = run.progress["elapsed_seconds"], _token_seconds(config, mesh, trainer)
        logger = cleanup.enter_context(Logger(workdir, config, run.step, elapsed, primary, at_peak))
        stop.defer = True
        target = Target(config, trainer, corpus.task) if config.target_accuracy and corpus.task else None
        last, accuracy = _steps(config, trainer, batches, run, checkpoints, logger, stop, say, require_held, target)
        checkpoints.wait()
    if accuracy is not None:
        say(f"{workdir}: done, {_reached(last, accuracy)}")
        return 0
    if stop.signal and last < config.steps:
        name = signal.Signals(stop.signal).name
        kept = f"saved step {last}" if last else "before the first step, nothing to save"
        say(f"{name}: {kept}; the same command goes on from there")
        processes.part()
        return stop.status
    say(f"{workdir}: done, {config.steps} steps")
    return 0


def _reached(step: int, accuracy: float) -> str:
    return f"config.target_accuracy is reached after {step} steps: {accuracy:.4f}"


def _nothing() -> None:
    """Of a process that holds nothing."""


def _restarts(config: Config, trainer: Trainer) -> list[str]:
    """What each restart of the schedule does, a line each."""
    said, restart = [], config.optimizer.restart
    for start, end in itertools.pairwise((*restart.at, config.steps)):
        top = start + (restart.warmup_steps or config.optimizer.warmup_steps)
        rates = [f"{float(trainer.schedule(step)):.3g}" for step in (start, top, end)]
        said.append(
            f"warm restart after step {start}, from the full state: the learning rate goes from {rates[0]} to {rates[1]} in"
            f" {top - start} steps and by a cosine to {rates[2]} at step {end}"
        )
    return said


def _require_its_width(trainer: Trainer, vocab_size: int) -> None:
    """Refuses another MLP width than the start's, where additions have left less to the MLPs. Raises UserError."""
    start, solved = trainer.config.init_from, trainer.sizes.mlp_width
    if any(jax.tree.leaves(trainer.additions)):
        width = models.sizes(folder.read_config(start), vocab_size).mlp_width
        said = f"0 solves MLPs of width {solved}, and those of {start} have {width}; set it to {width}"
        need(width == solved, "model.solved_mlp_width", said)


def _fresh(params: Any, trainer: Trainer, batches: Any, vocab_size: int, say: Callable[[str], None]) -> Restored:
    """Step 0: these parameters, those that are not among them as they are drawn; or with None random ones."""
    state = trainer.init()
    if params is not None:
        params, added = completed(params, state.params)
        state = dataclasses.replace(state, params=params)
        if added:
            names = ", ".join(dict.fromkeys(re.sub(r"/\d+/", "/*/", name) for name in added))
            say(f"{trainer.config.init_from}: lacks {len(added)} parameters of this model, which start fresh: {names}")
    return Restored(state, 0, batches.get_state(), {"tokens": 0, "elapsed_seconds": 0.0, "vocab_size": vocab_size})


def _steps(
    config: Config,
    trainer: Trainer,
    batches: Any,
    run: Restored,
    checkpoints: Checkpoints,
    logger: Logger,
    stop: Stop,
    say: Callable[[str], None],
    require_held: Callable[[], None],
    target: Target | None,
) -> tuple[int, float | None]:
    """Takes steps until the last, the target or a signal, and saves where it ends.

    `require_held` refuses to go on where the folder is another process' by now: nothing of that is overwritten.

    Returns:
      the steps taken, and the accuracy that ended training; None where none did.
    """
    placed = batch_sharding(trainer.mesh)
    advance = in_turn(trainer.step, trainer.mesh)
    state: TrainState = run.state
    step, saved, reached = run.step, run.step, None
    unread: dict[str, Any] | None = None  # metrics of the newest step

    def read(number: int) -> None:
        nonlocal unread
        if unread is not None:
            values = {name: float(value) for name, value in unread.items()}
            unread = None
            _require_finite(number, values, saved)
            logger.write(number, values)

    def save() -> None:
        nonlocal saved
        read(step)  # what is saved has been seen to be finite
        require_held()
        progress = {"tokens": step * config.batch_size * config.context, "elapsed_seconds": round(logger.elapsed, 3)}
        progress |= {} if reached is None else {"accuracy": reached}
        checkpoints.save(step, state, batches.get_state(), run.progress | progress)
        saved = step

    while step < config.steps and not stop.asked(agree=step % config.log.every_steps == 0):
        batch = jax.tree.map(lambda a: jax.make_array_from_callback(a.shape, placed, a.__getitem__), next(batches))
        with watched() as backends:
            state, metrics = advance(state, batch)
        if backends:  # the step has been traced
            ran = "; ".join(f"{op} by {', '.join(sorted(names))}" for op, names in backends.items())
            say(f"{trainer.platform}: {ran}")
        read(step)  # of the step before, while this one runs
        step, unread = step + 1, metrics
        if target is not None and step % config.log.every_steps == 0:
            accuracy = target.accuracy(state.params, step)
            unread = {**metrics, "accuracy": accuracy}
            if accuracy >= config.target_accuracy:
                reached = accuracy
                break
        checkpoints.poll()
        if step % config.checkpoint.every_steps == 0 or step in config.optimizer.restart.at:
            save()
    if step != saved:
        save()
    return step, reached


def _require_finite(step: int, metrics: dict[str, float], saved: int) -> None:
    for name in ("loss", "grad_norm", *metrics):
        if not math.isfinite(metrics[name]):
            kept = f"the checkpoint of step {saved} is the last good one" if saved else "no checkpoint was saved before it"
            raise UserError(
                f"step {step}: {name} is {metrics[name]}, training stops; {kept}; a lower optimizer.learning_rate or a"
                " longer warm-up usually helps"
            )


def _doctor(config: Config, mesh: Mesh, corpus: data.TokenData, trainer: Trainer) -> str:
    """Versions, devices, data and size of the model in one line, for the top of every log."""
    found = folder.environment()
    sizes = trainer.sizes
    axes = " ".join(f"{axis}={mesh.shape[axis]}" for axis in AXES)
    return (
        f"jax {found['jax']}, flax {found['flax']}, python {found['python']};"
        f" {found['device_count']} x {found['device_kind']}, mesh {axes};"
        f" corpus {config.data.corpus} sha256 {corpus.sha256[:12]}, {config.data.tokenizer}, {corpus.vocab_size:,} ids;"
        f" {config.name}: {sizes.total:,} parameters, {sizes.mismatch:+.2%} against the MHA model's {sizes.mha_total:,}"
        f" (MLP width {sizes.mlp_width}), {trainer.token_flops / 1e6:,.4g} MFLOPs a trained token"
    )


def _token_seconds(config: Config, mesh: Mesh, trainer: Trainer) -> float | None:
    """Seconds that a trained token would take at the peak of all devices; None: their peak is not known."""
    peak = config.log.peak_flops or flops.peak(mesh.devices.flat[0].device_kind)
    return trainer.token_flops / (peak * mesh.size) if peak else None
