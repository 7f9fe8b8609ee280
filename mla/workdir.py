"""The folder of a run: config.json says what it is, environment.json where it ran. Read by training and evaluation."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax
import jax

from mla import claims, paths, strict_json
from mla import config as configs
from mla.config import Config, DataConfig
from mla.data import tokenizers
from mla.errors import UserError

CONFIG_FILE = "config.json"
ENVIRONMENT_FILE = "environment.json"
EVAL_FILE = "eval.json"
TOKENIZER_FILE = "tokenizer.json"
HISTORY = "history"
LOCK_FILE = ".lock"

# Groups and fields that change neither the model nor its data: a run may go on with others than it began with.
FREE = ("mesh", "checkpoint", "log", "eval", "data.cache_dir", "model.attention_backend", "model.recurrence_backend")


def read_config(workdir: str | os.PathLike[str]) -> Config:
    """The config of the run in `workdir`.

    Raises:
      UserError: no run there, or a config.json that this version cannot read.
    """
    path = Path(workdir) / CONFIG_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{workdir}: holds no training run ({CONFIG_FILE} is missing)") from None
    except NotADirectoryError:
        raise UserError(f"{workdir}: is a file, not the folder of a run") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is damaged ({error})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        return configs.from_dict(values)
    except (UserError, TypeError, AttributeError, KeyError) as error:
        raise UserError(f"{path}: was written by another version: {error}") from error


def continued(config: Config, workdir: Path) -> Config:
    """`config` with the restarts of the run in a folder, and with one more where `steps` is beyond what that was to take.

    So the command that raised `steps` resumes the run as well. Other restarts that `config` names are left as they are.
    """
    if not has_checkpoints(workdir) or not (workdir / CONFIG_FILE).is_file():
        return config
    there = read_config(workdir)
    if config.optimizer.restart.at not in ((), there.optimizer.restart.at):
        return config
    restarts = there.optimizer.restart.at + ((there.steps,) if config.steps > there.steps else ())
    config = copy.deepcopy(config)
    config.optimizer.restart.at = restarts if config.steps >= there.steps else ()
    return config


def _extends(there: Config, here: Config) -> bool:
    """Whether `here` is the config of the run of `there` made longer: it restarts where that one ends."""
    return there.steps < here.steps and here.optimizer.restart.at == (*there.optimizer.restart.at, there.steps)


def has_checkpoints(workdir: Path) -> bool:
    """Whether the run in a folder has saved a step."""
    folder = workdir / "checkpoints"
    return os.path.isdir(folder) and any(folder.glob("[0-9]*"))


def standing(workdir: Path, remedy: str = "choose another --workdir") -> Path:
    """The folder `workdir`, or the nearest one above it that is there.

    Raises:
      UserError: one of them is a file, or `workdir` is no path that a folder can have.
    """
    nearest = next(p for p in (workdir, *workdir.absolute().parents) if os.path.lexists(p))
    if not os.path.isdir(nearest):
        raise UserError(f"{nearest}: is a file, not a folder" if os.path.exists(nearest) else f"{nearest}: leads nowhere")
    longest = os.pathconf(nearest, "PC_NAME_MAX")
    try:
        with contextlib.suppress(FileNotFoundError):
            os.lstat(workdir)
    except OSError as error:
        raise UserError(f"{workdir}: {error.strerror}; {remedy}") from error
    if any(len(os.fsencode(part)) > longest for part in workdir.parts):
        raise UserError(f"{workdir}: File name too long; {remedy}")
    return nearest


def check(config: Config, workdir: Path) -> None:
    """Refuses a folder that is not this run's, nor that of the run which this one continues (`continued`); reads only.

    Raises:
      UserError: the folder holds a run with another config (names the first field that differs, and both values), or
        files that are no run at all, or is a file.
    """
    if standing(workdir) != workdir:
        return
    if not (workdir / CONFIG_FILE).exists():
        # Of a run that was killed before it could say what it is.
        own = rf"\.?{re.escape(LOCK_FILE)}(\.\w+)*|\.{re.escape(CONFIG_FILE)}(\.\w+)?\.tmp"
        foreign = sorted(p.name for p in workdir.iterdir() if not re.fullmatch(own, p.name))
        if foreign:
            raise UserError(f"{workdir}: holds {foreign[0]!r} but no {CONFIG_FILE}: it is no run; choose another --workdir")
        return
    there = read_config(workdir)
    if not has_checkpoints(workdir):
        return  # a run that stopped before its first checkpoint leaves nothing that another config could spoil
    free = list(FREE)
    if _extends(there, config):
        # What a restart does is not yet settled before the first one.
        free += ["steps", "optimizer.restart.at" if there.optimizer.restart.at else "optimizer.restart"]
    for field, old, new in differences(configs.to_dict(there), configs.to_dict(config)):
        if not any(field == group or field.startswith(f"{group}.") for group in free):
            raise UserError(
                f"{workdir}: holds another config: config.{field} is {_shown(old)} there and {_shown(new)} here; choose"
                " another --workdir"
            )


def differences(old: Any, new: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(path, old value, new value) of every leaf that differs between two nested dicts; absent values are None."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from differences(old.get(key), new.get(key), f"{prefix}{key}.")
    elif json.dumps(old) != json.dumps(new):  # a tuple and the list it was written as are the same
        yield prefix.rstrip("."), old, new


def _shown(value: Any) -> str:
    return "absent" if value is None else json.dumps(value)


def make(workdir: Path, remedy: str = "choose another --workdir") -> None:
    """Makes a folder, and those above it, unless they are there. Raises UserError where that cannot be done."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{workdir}: cannot be made ({error.strerror}); {remedy}") from error


@contextlib.contextmanager
def hold(workdir: Path) -> Iterator[claims.Claim]:
    """Makes the folder if needed, and keeps other processes, of any host, from training in it. However this one ends, the
    hold ends too.

    Raises:
      UserError: another process trains in it, or it cannot be made.
    """
    make(workdir)
    try:
        held = claims.Claim(workdir / LOCK_FILE, "training")
    except UserError as error:
        raise UserError(f"{workdir}: another process is training in it: {error}") from None
    try:
        yield held
    finally:
        held.release()


def write(config: Config, workdir: Path, environment: dict[str, Any]) -> None:
    """Writes config.json and environment.json.

    Where that makes a run longer, what described it so far goes to history/STEPS first: both files, and its evaluations,
    which are no longer those of the newest checkpoint.
    """
    if has_checkpoints(workdir) and _extends(there := read_config(workdir), config):
        kept = workdir / HISTORY / str(there.steps)
        kept.mkdir(parents=True, exist_ok=True)
        for name in (CONFIG_FILE, ENVIRONMENT_FILE):
            if (workdir / name).exists():
                shutil.copyfile(workdir / name, kept / name)
        for path in workdir.glob("eval*.json"):
            if read_evaluation(path) is not None:
                os.replace(path, kept / path.name)
    write_json(workdir / CONFIG_FILE, configs.to_dict(config))
    write_json(workdir / ENVIRONMENT_FILE, environment)


def write_tokenizer(workdir: Path, prepared: Path) -> None:
    """Copies the tokenizer of a prepared corpus, unless it is raw bytes: the model can then be used without its corpus.

    The copy of a run that has checkpoints stays as it is; what a start before the first of them left is replaced.
    """
    if has_checkpoints(workdir) and (workdir / TOKENIZER_FILE).exists():
        return
    for name in (tokenizers.CONFIG_FILE, TOKENIZER_FILE):
        if (prepared / name).exists():
            with replacing(workdir / name) as temporary:
                shutil.copyfile(prepared / name, temporary)
        else:
            (workdir / name).unlink(missing_ok=True)


def kept_tokenizer(workdir: Path, config: DataConfig) -> tokenizers.Tokenizer | None:
    """The copy of its tokenizer that a run with checkpoints keeps; None for raw bytes and runs of earlier versions.

    Args:
      workdir: of the run, or where there is none yet.
      config: names the tokenizer and its end token, as the run's own config does.

    Raises:
      UserError: the copy is damaged.
    """
    copied = workdir / TOKENIZER_FILE
    if config.tokenizer == tokenizers.ByteTokenizer.name or not has_checkpoints(workdir) or not copied.exists():
        return None
    return tokenizers.read(copied, config.tokenizer, config.end_token)


def read_tokenizer(workdir: Path, config: DataConfig) -> tokenizers.Tokenizer | None:
    """The tokenizer of a run, by the names its config has; None where an earlier version trained one and left no copy."""
    found = kept_tokenizer(workdir, config) or tokenizers.parse(config.tokenizer, config.end_token)
    return None if isinstance(found, int) else found


def require_same_ids(start: str, tokenizer: tokenizers.Tokenizer) -> None:
    """Refuses to start from the parameters of a run whose ids stand for other text than those of `tokenizer`.

    Raises:
      UserError: they do, or there is no such run.
    """
    there = read_config(start).data
    try:
        theirs = read_tokenizer(Path(start), there)
    except UserError:  # a run of an earlier version, whose tokenizer is not there any more
        return
    if theirs is not None and not tokenizers.same_ids(theirs, tokenizer):
        copied = Path(start) / TOKENIZER_FILE
        theirs_is = copied if copied.exists() else there.tokenizer
        raise UserError(
            f"config.init_from: {start}: has another tokenizer, whose ids stand for other text; set config.data.tokenizer"
            f" to {theirs_is}"
        )


def _known_sha256(workdir: str | os.PathLike[str]) -> str:
    """The sha256 of a run's documents by its environment.json, or '' where that does not say."""
    try:
        known = json.loads((Path(workdir) / ENVIRONMENT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    found = known.get("corpus_sha256") if isinstance(known, dict) else ""
    return found if isinstance(found, str) else ""


def known_corpus(config: Config, workdir: str | os.PathLike[str]) -> str:
    """The sha256 of the documents of the run in `workdir`, or '' where it is not known or `config` names others."""
    try:
        there = read_config(workdir).data
    except UserError:
        return ""
    return _known_sha256(workdir) if (there.corpus, there.text_field) == (config.data.corpus, config.data.text_field) else ""


def check_corpus(workdir: Path, sha256: str) -> None:
    """Refuses to go on with other data than the run began with.

    Raises:
      UserError: environment.json names another corpus.
    """
    before = _known_sha256(workdir)
    if before and before != sha256:
        raise UserError(
            f"{workdir}: config.data.corpus has changed since this run began (sha256 {before[:12]}, now {sha256[:12]});"
            " choose another --workdir"
        )


def environment(**more: Any) -> dict[str, Any]:
    """Where numbers come from: {jax, flax, device_kind, device_count, python, git_commit} and `more`.

    git_commit is absent outside a git checkout, and ends in -dirty where tracked files were changed.
    """
    found = {
        "jax": jax.__version__,
        "flax": flax.__version__,
        "python": platform.python_version(),
        "device_kind": jax.devices()[0].device_kind,
        "device_count": jax.device_count(),
        "git_commit": git_commit(),
        **more,
    }
    return {key: value for key, value in found.items() if value is not None}


def git_commit() -> str | None:
    """The commit of the code that runs, or None where git does not track it, as in an environment inside a checkout."""

    def git(*arguments: str) -> str:
        where = Path(__file__).parent
        command = ["git", "--no-optional-locks", *arguments]  # one that is killed would leave its lock behind
        return subprocess.run(command, cwd=where, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def command() -> str:
    """How this process was started: `python train.py ...` in a checkout, `mla train ...` where it is installed."""
    name = Path(sys.argv[0]).name
    program = ["python", "-m", "mla"] if name == "__main__.py" else ["python", name] if name.endswith(".py") else [name]
    return shlex.join([*program, *sys.argv[1:]])


def require_writable(path: Path, remedy: str) -> None:
    """Refuses a file that `write_json` could not write, and leaves nothing behind.

    Raises:
      UserError: what the operating system says, and the remedy.
    """
    try:
        with contextlib.suppress(FileNotFoundError):
            os.stat(path)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", suffix=".tmp"):
            pass
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); {remedy}") from error


@contextlib.contextmanager
def making(workdir: Path, flag: str) -> Iterator[Path]:
    """A folder to fill, which becomes `workdir` when the block ends; where that fails, nothing is left of it.

    Raises:
      UserError: `workdir` holds anything, or cannot be made; `flag` is where it can be chosen.
    """
    remedy = f"choose another {flag}"
    if standing(workdir, remedy) == workdir and any(workdir.iterdir()):
        raise UserError(f"{workdir}: is not empty; {remedy}")
    with replacing(workdir.absolute()) as temporary:
        make(temporary, remedy)
        yield temporary


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file or folder to write, which becomes `path` when the block ends; where that fails, `path` is as it was before."""
    temporary = paths.temporary(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # where it is a folder
        with contextlib.suppress(OSError):
            temporary.unlink()


def read_evaluation(path: Path) -> dict[str, Any] | None:
    """The object of an eval.json, not necessarily of this version; None where a file holds anything else.

    A row of a sweep, which says in addition what `run` it is of, is not one: results.jsonl may have a single line.
    """
    try:
        row = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    is_one = isinstance(row, dict) and "run" not in row and {"schema", "mechanism", "loss", "cache"} <= row.keys()
    return row if is_one else None


def write_json(path: Path, value: Any) -> None:
    """Writes a value as JSON; the file is either whole or as it was before.

    Raises:
      UserError: a number in it is not finite.
    """
    write_text(path, strict_json.dumps(value, str(path), indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a file that is either whole or as it was before."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
