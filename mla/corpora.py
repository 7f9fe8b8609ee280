"""Where a corpus lies and how it becomes documents, read through Hugging Face `datasets`.

stdlib                     the library sources of the running Python; one document a file
recall[:PAIRS]             associative recall, see `recall_episodes`: one document an episode, and a validation split
a file, a folder, a glob   .jsonl, .json, .csv and .parquet: one document a row; everything else is text, one a file
org/name[:subset]          a dataset on the hub: one document a row, and its own validation split if it has one
"""

import csv
import dataclasses
import functools
import glob
import hashlib
import logging
import os
import re
import sys
import sysconfig
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mla.errors import UserError

if TYPE_CHECKING:  # it takes a second to import, and a corpus that is already prepared does not need it
    import datasets

_KINDS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_OPTIONS: dict[str, dict[str, Any]] = {
    "json": {"parse_agent_traces": False},  # of rows with certain columns it would make other rows
    "csv": {"keep_default_na": False, "na_filter": False},  # a document may well read "NA"
    "parquet": {"batch_size": 256},
}
_ROWS = 256  # read at a time
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
        UserError: there is no such file, folder or hub dataset, or files of several kinds.
    """
    path = Path(name).expanduser()
    if name.partition(":")[0] == "recall":
        return _recall(name)
    if name == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        files = [file for file in _walk(root, without=_NOT_LIBRARY) if file.suffix == ".py"]
    elif path.is_file():
        files = [path]
    elif name and path.is_dir():
        files = _walk(path)
    elif glob.has_magic(name):
        files = sorted(filter(Path.is_file, map(Path, glob.glob(str(path), recursive=True))), key=Path.as_posix)
    elif re.fullmatch(r"([\w-][\w.-]*/)?[\w-][\w.-]*(:[\w.+-]+)?", name) and path.suffix not in (*_KINDS, ".txt"):
        return _hub(name, text_field)
    else:
        use = (
            "stdlib, recall, a text, .jsonl, .csv or .parquet file, folder or glob of them, or a hub name org/name[:subset]"
        )
        raise UserError(f"config.data.corpus: no file or folder at {name!r}; use {use}")
    if not files:
        raise UserError(f"config.data.corpus: {name} holds no files")
    return _local(name, files, text_field)


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
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in without and not name.startswith(".")]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(filter(Path.is_file, found), key=Path.as_posix)


def _local(name: str, files: list[Path], text_field: str) -> Corpus:
    kinds = {_KINDS.get(file.suffix.lower(), "text") for file in files}
    if len(kinds) > 1:
        found = " and ".join(sorted(kinds))
        raise UserError(f"config.data.corpus: {name} mixes {found} files; name one kind by a glob such as 'folder/*.jsonl'")
    kind = kinds.pop()
    digest = hashlib.sha256(f"{kind} {text_field}".encode())
    for file in files:
        with open(file, "rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())

    def documents() -> Iterator[bytes]:
        if kind == "text":
            yield from _column(lambda: _texts(files), "text", name)
            return
        for file in files:
            if file.stat().st_size:  # the readers fail on an empty file
                yield from _column(functools.partial(_table, file, kind, text_field), text_field, str(file))

    return Corpus(name, digest.hexdigest(), {"train": documents})


def _hub(name: str, text_field: str) -> Corpus:
    datasets = _library()
    repository, _, subset = name.partition(":")
    try:
        found = datasets.load_dataset(repository, subset or None)
    except Exception as error:  # of many kinds: no such dataset, no network, no such subset, a full disk
        raise UserError(
            f"config.data.corpus: {name!r} is no path here, and cannot be loaded from the hub ({_reason(error)}); check "
            "org/name:subset, the network and HF_HUB_OFFLINE (a private dataset needs HF_TOKEN), or give a local file"
        ) from error
    if "train" not in found:
        raise UserError(f"config.data.corpus: hub dataset {name!r} has no train split, only {', '.join(found)}")
    kept = {split: found[split] for split in ("train", "validation") if split in found}
    # The library's own fingerprint covers the revision and how it was read.
    key = hashlib.sha256(" ".join([text_field, *(part._fingerprint for part in kept.values())]).encode()).hexdigest()

    def reader(split: str) -> Callable[[], Iterator[bytes]]:
        return lambda: _column(lambda: kept[split], text_field, name)

    return Corpus(name, key, {split: reader(split) for split in kept})


def _texts(files: list[Path]) -> "datasets.IterableDataset":
    """One document a file. The library's own reader of text would turn CRLF into LF, and bytes would not be true."""
    datasets = _library()

    def rows(paths: list[Path]) -> Iterator[dict[str, str]]:
        for path in paths:
            try:
                yield {"text": path.read_bytes().decode()}
            except UnicodeDecodeError as error:
                raise UserError(
                    f"config.data.corpus: {path} is not UTF-8 text ({error}); convert it or leave it out"
                ) from error

    features = datasets.Features({"text": datasets.Value("large_string")})
    return datasets.IterableDataset.from_generator(rows, features=features, gen_kwargs={"paths": files})


def _table(file: Path, kind: str, text_field: str) -> "datasets.IterableDataset":
    datasets = _library()
    options = _OPTIONS[kind]
    if kind == "csv":
        with open(file, encoding="utf-8-sig", newline="") as lines:
            columns = next(csv.reader(lines), [])
        if text_field not in columns:
            raise UserError(_no_column(text_field, str(file), columns))
        options = {**options, "usecols": [text_field], "converters": {text_field: str}}
    return datasets.load_dataset(kind, data_files=[str(file)], split="train", streaming=True, **options)


def _column(load: Callable[[], Any], text_field: str, name: str) -> Iterator[bytes]:
    """The documents in one column of a dataset, read a few rows at a time."""
    import pyarrow

    try:
        for table in load().with_format("arrow").iter(_ROWS):
            if text_field not in table.column_names:
                raise UserError(_no_column(text_field, name, table.column_names))
            held = table.schema.field(text_field).type
            if held not in (pyarrow.string(), pyarrow.large_string(), pyarrow.null()):
                raise UserError(f"config.data.text_field: column {text_field!r} of {name} holds {held}, not text")
            yield from (text.encode() for text in table[text_field].to_pylist() if text)
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


def _no_column(text_field: str, name: str, columns: list[str]) -> str:
    has = ", ".join(map(repr, columns))
    return f"config.data.text_field: {name} has no column {text_field!r}; it has {has}: name the one that holds the text"


def _reason(error: Exception) -> str:
    """What went wrong, in one line; `datasets` wraps what readers raise into an error that says nothing."""
    return " ".join(str(error.__cause__ or error).split())[:300]
