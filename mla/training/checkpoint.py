"""Checkpoints: parameters, optimizer state and the position in the data, saved in the background, restored onto any mesh.

A checkpoint is one folder `checkpoints/STEP` with four items, so that evaluation reads the parameters alone:

    params      the fp32 master parameters (nested dict)
    optimizer   {opt_state, step}
    position    the data iterator's state: batches consumed when STEP steps were taken
    progress    {tokens, elapsed_seconds, vocab_size}, and of a task whose target ended training, its accuracy

orbax writes to a temporary folder and renames it when it is whole: a killed process leaves no half checkpoint behind.
What happens to the files later is found out by their checksums, kept beside the items.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import hashlib
import json
import os
import re
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh

from mla import model as models
from mla import processes, sharding
from mla.config import Config
from mla.errors import DISK_ERRORS, UserError
from mla.training.step import TrainState
from mla.workdir import read_config, write_json

T = TypeVar("T")

FOLDER = "checkpoints"
UNREADABLE = "unreadable_checkpoints"
CHECKSUMS_FILE = "checksums.json"
ITEMS = ("params", "optimizer", "position", "progress")


@dataclasses.dataclass(frozen=True)
class Restored:
    """A training run as it stood after `step` steps.

    Attributes:
      state: on the devices of the abstract state it was restored into.
      step: steps taken.
      position: for the data iterator's `set_state`.
      progress: {tokens, elapsed_seconds, vocab_size}.
    """

    state: TrainState
    step: int
    position: dict[str, Any]
    progress: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A trained model.

    Attributes:
      config: of its run.
      model: the module with its parameters.
      params: the parameters alone, a nested dict.
      step: training steps it has seen.
      progress: {tokens, elapsed_seconds, vocab_size} of its training.
      position: of its data iterator.
    """

    config: Config
    model: models.Model
    params: dict[str, Any]
    step: int
    progress: dict[str, Any]
    position: dict[str, Any]

    @property
    def vocab_size(self) -> int:
        return int(self.progress["vocab_size"])


class Checkpoints:
    """Saves a run's checkpoints. A context manager: leaving it waits for the last one, and raises what went wrong with it.

    Args:
      workdir: of the run; `checkpoints/` in it is made if needed, and cleared of what a killed process left unfinished.
      keep: newest checkpoints that stay.
      always: steps whose checkpoints stay as well.
    """

    def __init__(self, workdir: Path, keep: int, always: Sequence[int] = ()):
        self.folder = workdir.absolute() / FOLDER
        self._saving = 0
        policies = ocp.checkpoint_managers
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), policies.CustomSteps(always)]),
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_checksums),
        )
        self._manager = _manager(self.folder, options)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None:
            self.wait()
            self._manager.close()
        elif not processes.several():  # what stopped the run matters more than what may go wrong now
            with contextlib.suppress(Exception):
                self._manager.close()
            self._remove_unfinished()
        # Other processes may never come to close it with this one.

    def save(self, step: int, state: TrainState, position: dict[str, Any], progress: dict[str, Any]) -> None:
        """Starts to save; the arrays may be donated to the next step at once.

        Raises:
          UserError: the disk is full or read-only, found now or while the previous checkpoint was being written.
        """
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            optimizer=ocp.args.StandardSave({"opt_state": state.opt_state, "step": state.step}),
            position=ocp.args.JsonSave(position),
            progress=ocp.args.JsonSave(progress),
        )
        self.wait()
        self._saving = step
        with self._disk_errors():
            if not self._manager.save(step, args=items):
                raise RuntimeError(f"{self.folder}: a checkpoint of step {step} or later is there already")

    def poll(self) -> None:
        """Raises, as `save` does, what has gone wrong in the background so far."""
        with self._disk_errors():
            self._manager.check_for_errors()

    def wait(self) -> None:
        """Returns when the last checkpoint is whole. Raises as `save` does."""
        with self._disk_errors():
            self._manager.wait_until_finished()

    def _write_checksums(self) -> None:
        # Called in orbax's thread when all items are written, before the temporary folder gets its name.
        if processes.primary():
            for unfinished in self.folder.glob(f"{self._saving}.orbax-checkpoint-tmp*"):
                write_json(unfinished / CHECKSUMS_FILE, _checksums(unfinished))

    def _remove_unfinished(self) -> None:
        # Abandoned writes may still be under way and make the folder anew; what escapes here is removed at the next start.
        if processes.several():  # others may be about to finish it
            return
        for _ in range(20):
            for unfinished in self.folder.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(unfinished, ignore_errors=True)
            time.sleep(0.02)
            if not any(self.folder.glob("*.orbax-checkpoint-tmp*")):
                return

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            reason = _disk_reason(error)
            if reason is None:
                raise
            self._remove_unfinished()
            whole = steps_in(self.folder.parent)
            kept = f"the checkpoint of step {whole[-1]} is intact" if whole else "there is no earlier one"
            raise UserError(
                f"{self.folder}: the checkpoint of step {self._saving} could not be written: {reason}; {kept}; make room and"
                " run the same command again"
            ) from error


def steps_in(workdir: str | os.PathLike[str]) -> list[int]:
    """Steps of the committed checkpoints of a run, oldest first; they may still turn out to be unreadable."""
    folder = Path(workdir) / FOLDER
    there = folder.iterdir() if os.path.isdir(folder) else ()
    return sorted(int(p.name) for p in there if p.name.isdigit() and p.is_dir())


def identity(workdir: str | os.PathLike[str], step: int | None = None) -> dict[str, Any] | None:
    """What tells the parameters of a checkpoint from others, wherever its files are copied: {step, sha256}.

    Args:
      workdir: of the run.
      step: of the checkpoint; None: the newest one.

    Returns:
      The step, and a hash of names, sizes and checksums of the files with the parameters; None where there is no checkpoint.
    """
    steps = steps_in(workdir) if step is None else [step]
    if not steps:
        return None
    checkpoint = Path(workdir) / FOLDER / str(steps[-1])
    try:
        sums = json.loads((checkpoint / CHECKSUMS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # of an earlier version, or damaged
        sums = _checksums(checkpoint, ITEMS[:1])
    params = {name: value for name, value in sorted(sums.items()) if name.startswith(f"{ITEMS[0]}/")}
    return {"step": steps[-1], "sha256": hashlib.sha256(json.dumps(params).encode()).hexdigest()}


def restore_latest(workdir: str | os.PathLike[str], abstract_state: TrainState) -> Restored | None:
    """The newest checkpoint that can be read, placed as the abstract state says; None where a run has none.

    Newer ones that cannot be read are moved to `unreadable_checkpoints/`, with one line on stderr each.

    Args:
      workdir: of the run.
      abstract_state: shapes with shardings, such as `Trainer.abstract_state`; the mesh may differ from the saved one.

    Raises:
      UserError: parameters of another shape or structure, or checkpoints of which none can be read.
    """
    if not processes.from_primary(steps_in(workdir)):
        return None

    def load(manager: ocp.CheckpointManager, step: int) -> Restored:
        _require_fit(manager, step, abstract_state.params)
        optimizer = {"opt_state": abstract_state.opt_state, "step": abstract_state.step}
        items = ocp.args.Composite(
            params=ocp.args.StandardRestore(abstract_state.params),
            optimizer=ocp.args.StandardRestore(optimizer),
            position=ocp.args.JsonRestore(),
            progress=ocp.args.JsonRestore(),
        )
        found = manager.restore(step, args=items)
        state = TrainState(found.params, found.optimizer["opt_state"], found.optimizer["step"])
        return Restored(state, step, found.position, found.progress)

    restored, unreadable = _newest(workdir, load)
    for step in unreadable:
        aside = _move_aside(Path(workdir), step)
        _say(f"checkpoint of step {step} cannot be read; moved to {aside}, going on from step {restored.step}")
    return restored


def load_params(workdir: str | os.PathLike[str], abstract_params: Any, may_lack: Any = None) -> Any:
    """Only the parameters of a run's newest readable checkpoint, placed as the abstract ones say.

    Args:
      workdir: of the run.
      abstract_params: shapes with shardings.
      may_lack: truth values in their shape: which of them may be absent there, and then are in what is returned; None:
        none may.

    Raises:
      UserError: no run or no checkpoint there, none that can be read, or parameters of another shape or structure.
    """
    read_config(workdir)

    def load(manager: ocp.CheckpointManager, step: int) -> Any:
        wanted = abstract_params
        if may_lack is not None:
            there = _named(manager.item_metadata(step).params.tree)
            lacking = {name for name, may in _named(may_lack).items() if may and name not in there}
            wanted = _without(wanted, lacking)
        _require_fit(manager, step, wanted)
        return manager.restore(step, args=ocp.args.Composite(params=ocp.args.StandardRestore(wanted))).params

    params, unreadable = _newest(workdir, load)
    _report(workdir, unreadable)
    return params


def completed(params: Any, fresh: Any) -> tuple[Any, list[str]]:
    """Parameters of which `load_params` left some out, with those of `fresh` in their places; and the paths of these."""
    there, added = _named(params), list[str]()

    def chosen(path: Any, value: Any) -> Any:
        name = sharding.path_name(path)
        if name not in there:
            added.append(name)
        return there.get(name, value)

    return jax.tree.map_with_path(chosen, fresh), added


def load_model(workdir: str | os.PathLike[str], mesh: Mesh | None = None, built_from: Config | None = None) -> Loaded:
    """The model of a run's newest readable checkpoint; changes nothing in the folder.

    Args:
      workdir: of the run.
      mesh: where its parameters go, by the rules of training; None: one device.
      built_from: a config whose model takes the same parameters and is otherwise another; None: the run's.

    Raises:
      UserError: as `load_params`.
    """
    config = read_config(workdir)
    mesh = mesh or Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1, 1), sharding.AXES)

    def load(manager: ocp.CheckpointManager, step: int) -> Loaded:
        items = ocp.args.Composite(progress=ocp.args.JsonRestore(), position=ocp.args.JsonRestore())
        told = manager.restore(step, args=items)
        vocab_size = int(told.progress["vocab_size"])
        abstract = nnx.eval_shape(lambda: models.create(built_from or config, vocab_size, mesh=mesh))
        shapes = models.parameters(abstract)
        where = sharding.shardings(shapes, models.axes(abstract), mesh)
        placed = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, where)
        _require_fit(manager, step, placed)
        params = manager.restore(step, args=ocp.args.Composite(params=ocp.args.StandardRestore(placed))).params
        model = models.with_parameters(nnx.graphdef(abstract), params)
        return Loaded(config, model, params, step, told.progress, told.position)

    loaded, unreadable = _newest(workdir, load)
    _report(workdir, unreadable)
    return loaded


# -------------------------------------------------------------------------------------------------------------- details


def _manager(folder: Path, options: ocp.CheckpointManagerOptions) -> ocp.CheckpointManager:
    handlers: dict[str, Any] = {name: ocp.StandardCheckpointHandler() for name in ITEMS[:2]}
    handlers |= {name: ocp.JsonCheckpointHandler() for name in ITEMS[2:]}
    return ocp.CheckpointManager(folder, options=options, item_handlers=handlers)


def _newest(workdir: str | os.PathLike[str], load: Callable[[ocp.CheckpointManager, int], T]) -> tuple[T, list[int]]:
    """What `load` makes of the newest checkpoint that it can read, and the newer steps that it could not."""
    steps: list[int] = processes.from_primary(steps_in(workdir))
    unreadable: list[int] = []
    folder = Path(workdir).absolute() / FOLDER
    if not steps:
        raise UserError(f"{workdir}: has no checkpoint yet")
    with _silenced(), _manager(folder, ocp.CheckpointManagerOptions(read_only=True)) as manager:
        for step in reversed(steps):
            try:
                if not processes.from_primary(not processes.primary() or _is_whole(folder / str(step))):
                    raise ValueError(f"{folder / str(step)}: is not what was written")
                return load(manager, step), unreadable
            except (UserError, MemoryError, PermissionError, jax.errors.JaxRuntimeError):
                raise  # nothing that another checkpoint would mend
            except Exception:
                unreadable.append(step)
    listed = ", ".join(map(str, steps))
    raise UserError(
        f"{folder}: no checkpoint can be read (steps {listed}; truncated or damaged); move the folder away to start anew"
    )


def _checksums(checkpoint: Path, items: Sequence[str] = ITEMS) -> dict[str, list[int]]:
    """file -> [bytes, CRC-32] of the items of a checkpoint, or of some of them."""

    def of(path: Path) -> list[int]:
        size, crc = 0, 0
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                size, crc = size + len(block), zlib.crc32(block, crc)
        return [size, crc]

    files = (path for item in items for path in sorted((checkpoint / item).rglob("*")) if path.is_file())
    return {p.relative_to(checkpoint).as_posix(): of(p) for p in files}


def _is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint is what its checksums say: a flipped or missing byte would not always stop the reader."""
    try:
        return bool(json.loads((checkpoint / CHECKSUMS_FILE).read_text()) == _checksums(checkpoint))
    except PermissionError:
        raise
    except (OSError, ValueError):
        return False


def _named(tree: Any) -> dict[str, Any]:
    """path -> leaf."""
    return {sharding.path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def _without(tree: dict[str, Any], names: set[str], prefix: str = "") -> dict[str, Any]:
    """A nested dict without the leaves of these paths, and without dicts in which nothing is left."""
    pruned = {
        key: _without(value, names, f"{prefix}{key}/") if isinstance(value, dict) else value
        for key, value in tree.items()
        if f"{prefix}{key}" not in names
    }
    return {key: value for key, value in pruned.items() if value != {}}


def _require_fit(manager: ocp.CheckpointManager, step: int, abstract_params: Any) -> None:
    """Compares names and shapes of the stored parameters with the model's, before any array is read."""

    def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
        return {name: tuple(leaf.shape) for name, leaf in _named(tree).items()}

    there, here = shapes(manager.item_metadata(step).params.tree), shapes(abstract_params)
    for name in [*here, *(name for name in there if name not in here)]:
        if there.get(name) != here.get(name):
            stored, wanted = (str(list(s)) if s is not None else "absent" for s in (there.get(name), here.get(name)))
            raise UserError(
                f"{manager.directory}/{step}: a checkpoint that does not fit: parameter {name} is {stored} there and"
                f" {wanted} in this model"
            )


def _move_aside(workdir: Path, step: int) -> Path:
    """Out of the way of the next checkpoint of that step, and still there for whoever wants to look."""
    aside = workdir / UNREADABLE
    target = next(p for n in range(1, 1_000_000) if not (p := aside / (str(step) if n == 1 else f"{step}-{n}")).exists())
    if processes.primary():
        aside.mkdir(exist_ok=True)
        os.rename(workdir / FOLDER / str(step), target)
    return Path(processes.from_primary(str(target)))


def _report(workdir: str | os.PathLike[str], unreadable: list[int]) -> None:
    for step in unreadable:
        _say(f"{Path(workdir) / FOLDER / str(step)}: cannot be read; an earlier checkpoint is used instead")


def _say(line: str) -> None:
    if processes.primary():
        print(line, file=sys.stderr, flush=True)


def _disk_reason(error: BaseException) -> str | None:
    """What the operating system said about the disk, if that is behind the error."""
    seen: BaseException | None = error
    while seen is not None:
        code = seen.errno if isinstance(seen, OSError) else None
        found = re.search(r"os_error_code='(\d+)'", str(seen))  # how tensorstore reports it
        code = int(found[1]) if found else code
        if code in DISK_ERRORS:
            return os.strerror(code)
        seen = seen.__cause__ or seen.__context__
    return None


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Keeps the coroutines that a failed read abandons from reporting themselves on the terminal."""
    before = sys.unraisablehook
    sys.unraisablehook = lambda _: None
    try:
        yield
    finally:
        gc.collect()
        sys.unraisablehook = before
