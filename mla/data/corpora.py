"""Where a corpus lies and how it becomes documents.

stdlib                     the library sources of the running Python; one document a file
mqar:.. and other tasks    see `mla.data.tasks`; there are no documents
recall[:PAIRS]             associative recall, see `recall_episodes`: one document an episode, and a validation split
a file, a folder, a glob   jsonl, csv, tsv and parquet: one document a row; text, one a file; see `mla.data.tables`
org/name[:subset]          a dataset on the hub: one document a row, and its own validation split if it has one
"""

import dataclasses
import glob
import hashlib
import logging
import os
import re
import sys
import sysconfig
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mla import paths
from mla.data import tables, tasks
from mla.errors import UserError

_ROWS = 256  # of a hub dataset, read at a time
_NOT_LIBRARY = ("__pycache__", "test", "tests", "idle_test", "site-packages", "dist-packages")

RECALL_KEYS, RECALL_VALUES, RECALL_FILLER = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ", b"abcdefghijklmnopqrstuvwxyz", b"..."
_RECALL_EPISODES = {"train": 65_536, "validation": 512}
_RECALL_PAIRS = 8


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Where the documents of a corpus are.

    Attributes:
        name: as in the config.
        key: hex digest that changes whenever the documents may have.
        splits: 'train', and 'validation' where the corpus has its own: each call reads the documents anew, in a fixed
            order, as UTF-8, without empty ones. A UserError names the file that cannot be read and the column that is
            missing.
    """

    name: str
    key: str
    splits: dict[str, Callable[[], Iterator[bytes]]]


def find(name: str, text_field: str) -> Corpus:
    """The corpus that `config.data.corpus` names.

    Args:
        name: see the top of this file.
        text_field: the column that holds the text of a table.

    Raises:
        UserError: there is no such file, folder or hub dataset, it cannot be read, or holds files of several kinds.
    """
    if has_episodes(name):
        return _recall(name)
    try:
        files = _files(name)
        if files is None:
            return _hub(name, text_field)
        if not files:
            raise UserError(f"config.data.corpus: {name} holds no files (looked in {_place(name)})")
        return _local(name, files, text_field)
    except OSError as error:
        raise tables.unreadable(error.filename or name, error) from error


def require_apart(name: str, folder: Path, field: str) -> None:
    """Refuses a corpus that would come to hold what is written into a folder.

    Args:
        name: see the top of this file.
        folder: may not be there yet.
        field: what says where that folder is, such as `--workdir`.

    Raises:
        UserError: it lies in the folder of the corpus, or a pattern of the corpus finds a file of it.
    """
    if name == "stdlib" or has_episodes(name) or tasks.is_task(name):
        return
    place, written = _place(name), folder.resolve()
    if name and os.path.isdir(place):
        root = Path(place).resolve()
        within = written.relative_to(root).parts if written.is_relative_to(root) else ("..",)
        inside = not any(part.startswith(".") or part == "__pycache__" for part in within)  # which `_walk` leaves out
    elif glob.has_magic(name) and not Path(place).is_relative_to(written):
        inside = any(Path(file).resolve().is_relative_to(written) for file in glob.iglob(place, recursive=True))
    else:
        inside = False
    if inside:
        raise UserError(f"{field}: {folder} is part of config.data.corpus {name}, and its files are no text; choose another")


def located(name: str) -> str:
    """The corpus of a config in words that mean the same in every folder: paths from the root, other names as they are."""
    if not name or name == "stdlib" or has_episodes(name) or tasks.is_task(name):
        return name
    path = paths.expand(name, "config.data.corpus")
    here = os.path.join(os.path.curdir, "")
    if (
        os.path.lexists(path)
        or path.startswith((os.path.sep, here, os.path.join(os.path.pardir, "")))
        or _names_a_file(path)
    ):
        return os.path.abspath(path)
    if glob.has_magic(path):
        return os.path.normpath(os.path.join(glob.escape(os.getcwd()), path))
    return name


def _names_a_file(name: str) -> bool:
    return Path(name).suffix.lower() in tables.SUFFIXES and not glob.has_magic(name)


def _place(name: str) -> str:
    return os.path.abspath(paths.expand(name, "config.data.corpus"))


def _files(name: str) -> list[Path] | None:
    """The files of a corpus, in an order that does not depend on the platform; None for a name on the hub."""
    if name == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        return [file for file in _walk(root, without=_NOT_LIBRARY) if file.suffix == ".py"]
    path = Path(paths.expand(name, "config.data.corpus"))
    if os.path.isfile(path):
        return [path]
    if name and os.path.isdir(path):
        return _walk(path)
    if glob.has_magic(name):
        return sorted(filter(Path.is_file, map(Path, glob.glob(str(path), recursive=True))), key=Path.as_posix)
    if re.fullmatch(r"([\w-][\w.-]*/)?[\w-][\w.-]*(:[\w.+-]+)?", name) and not _names_a_file(name):
        return None
    named = ", ".join(["stdlib", "recall", *tasks.REGISTRY])
    use = f"{named}, a text, .jsonl, .csv or .parquet file, folder or glob of them, or a hub name org/name[:subset]"
    raise UserError(f"config.data.corpus: no file or folder at {name!r} (looked for {_place(name)}); use {use}")


def has_episodes(name: str) -> bool:
    """Whether the documents of a corpus are episodes of associative recall, see `recall_episodes`."""
    return name.partition(":")[0] == "recall"


def recall_pairs(name: str) -> int:
    """Keys an episode of the corpus `recall` or `recall:PAIRS` has.

    Raises:
        UserError: too few or too many.
    """
    _, colon, pairs = name.partition(":")
    if not colon:
        return _RECALL_PAIRS
    if not (pairs.isascii() and pairs.isdigit() and 2 <= int(pairs) <= len(RECALL_KEYS)):
        raise UserError(f"config.data.corpus: {name!r}: write recall:PAIRS, with 2 to {len(RECALL_KEYS)} pairs")
    return int(pairs)


def recall_prompt(pairs: int) -> int:
    """Bytes of an episode before its first query."""
    return 2 * pairs + len(RECALL_FILLER)


def recall_episodes(pairs: int, count: int, seed: int) -> np.ndarray:
    """Associative recall in text: `CaAc..` defines keys, `...` ends that, `AcCa..` asks for each key and answers.

    After MQAR (Zoology, 2312.04927), but that the answer follows its query, so that the loss of a language model trains it.
    All of the first PAIRS capitals are keys, in an order drawn for each episode; each value is one of the first PAIRS small
    letters, drawn apart, so that nothing but its definition says anything about it. Two rounds of queries follow, each over
    all keys in an order of its own; the last two queries of the second are cut. With the end-of-document token that is
    6 PAIRS tokens of raw bytes: windows of that context are one episode each.

    Args:
        pairs: keys an episode, 2 to 26.
        count: episodes.
        seed: 0 to 2^32 - 1.

    Returns:
        uint8 [count, 6 pairs - 1].
    """
    draw = np.random.RandomState(seed)  # frozen: numpy never changes what it draws

    def orders() -> np.ndarray:
        return np.argsort(draw.random_sample((count, pairs)), axis=1, kind="stable")

    values = np.frombuffer(RECALL_VALUES, np.uint8)[draw.randint(pairs, size=(count, pairs))]  # of each key, in order

    def written(order: np.ndarray) -> np.ndarray:
        keys = np.frombuffer(RECALL_KEYS, np.uint8)[order]
        return np.stack([keys, np.take_along_axis(values, order, axis=1)], axis=-1).reshape(count, -1)

    filler = np.tile(np.frombuffer(RECALL_FILLER, np.uint8), (count, 1))
    return np.concatenate([written(orders()), filler, written(orders()), written(orders())[:, :-4]], axis=1)


def _recall(name: str) -> Corpus:
    pairs = recall_pairs(name)
    drawn = [recall_episodes(pairs, count, seed) for seed, count in enumerate(_RECALL_EPISODES.values())]

    def reader(episodes: np.ndarray) -> Callable[[], Iterator[bytes]]:
        return lambda: map(bytes, episodes)

    key = hashlib.sha256(b"".join(episodes.tobytes() for episodes in drawn)).hexdigest()
    return Corpus(name, key, dict(zip(_RECALL_EPISODES, map(reader, drawn), strict=True)))


def _walk(root: Path, without: Collection[str] = ("__pycache__",)) -> list[Path]:
    """All files under `root` but hidden ones, in an order that does not depend on the platform."""

    def refuse(error: OSError) -> None:
        raise error  # a folder that cannot be listed would be left out in silence

    found = []
    for folder, folders, names in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if name not in without and not name.startswith(".")]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(filter(Path.is_file, found), key=Path.as_posix)


def _local(name: str, files: list[Path], text_field: str) -> Corpus:
    kinds = {tables.kind(file) for file in files}
    if len(kinds) > 1:
        found = " and ".join(sorted(kinds))
        raise UserError(f"config.data.corpus: {name} mixes {found} files; name one kind by a glob such as 'folder/*.jsonl'")
    (kind,) = kinds
    digest = hashlib.sha256(f"{kind} {text_field}".encode())
    if kind == "text" and any(map(tables.has_mark, files)):  # earlier versions took the mark for text
        digest.update(b"without byte order marks")
    for file in files:
        with open(file, "rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return Corpus(name, digest.hexdigest(), {"train": lambda: _texts(files, text_field)})


def _texts(files: list[Path], text_field: str) -> Iterator[bytes]:
    for file in files:
        yield from tables.documents(file, text_field)


def _hub(name: str, text_field: str) -> Corpus:
    datasets = _library()
    repository, _, subset = name.partition(":")
    try:
        found = datasets.load_dataset(repository, subset or None)
    except Exception as error:  # of many kinds: no such dataset, no network, no such subset, a full disk
        raise UserError(
            f"config.data.corpus: no file or folder at {_place(name)}, and {name!r} cannot be loaded from the hub "
            f"({_reason(error)}); if it is a path, write it from the root; if it is on the hub, check "
            "org/name:subset, the network and HF_HUB_OFFLINE (a private dataset needs HF_TOKEN), or give a local file"
        ) from error
    if "train" not in found:
        raise UserError(f"config.data.corpus: hub dataset {name!r} has no train split, only {', '.join(found)}")
    kept = {split: found[split] for split in ("train", "validation") if split in found}
    # The library's own fingerprint covers the revision and how it was read.
    key = hashlib.sha256(" ".join([text_field, *(part._fingerprint for part in kept.values())]).encode()).hexdigest()

    def reader(split: str) -> Callable[[], Iterator[bytes]]:
        return lambda: _column(kept[split], text_field, name)

    return Corpus(name, key, {split: reader(split) for split in kept})


def _column(dataset: Any, text_field: str, name: str) -> Iterator[bytes]:
    """The documents in one column of a hub dataset, read a few rows at a time."""
    try:
        for table in dataset.with_format("arrow").iter(_ROWS):
            if text_field not in table.column_names:
                raise tables.no_column(text_field, name, table.column_names)
            held = table.schema.field(text_field).type
            if not tables.is_text(held):
                raise tables.no_text(text_field, name, held)
            yield from filter(None, map(tables.utf8, table[text_field].to_pylist()))
    except UserError:
        raise
    except Exception as error:  # each reader raises its own kinds
        raise UserError(f"config.data.corpus: {name} cannot be read ({_reason(error)})") from error


def _library() -> Any:
    """`datasets` without its chatter: what fails arrives as an exception, and importing it sets these levels."""
    import datasets

    for name in ("datasets", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    return datasets


def _reason(error: Exception) -> str:
    """The reason of a failure in one line: of the readers' own errors, which `datasets` wraps into one that says nothing."""
    return " ".join(str(error.__cause__ or error).split())[:300]
