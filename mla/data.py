"""From a corpus to batches: read, tokenise once to a memory-mapped file, split by document, window, shuffle.

    data = prepare(config.data)                       # opens at once when it was prepared before
    batches = train_loader(data.split("train").tokens, context=256, batch_size=8, seed=0)
    next(batches)["tokens"]                           # int32 [8, 257]

A prepared corpus is a folder with these files, and is never changed once it is there:

    tokens.bin        the ids (uint16, or uint32 for vocabularies above 65,536): training split, then validation split
    byte_counts.bin   uint16: how many UTF-8 bytes of the original text each id stands for
    tokenizer.json    unless the tokenizer is raw bytes
    meta.json         what it was made from, and the sizes
"""

import codecs
import contextlib
import csv
import dataclasses
import difflib
import errno
import fnmatch
import glob
import gzip
import hashlib
import io
import itertools
import json
import logging
import math
import os
import platform
import re
import shutil
import socket
import sys
import sysconfig
import time
import uuid
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np

from mla import tokenizers
from mla.errors import UserError

# datasets and grain take a second each to import, and a corpus that is already prepared does not need the former:
# both are imported where they are used.
if TYPE_CHECKING:
    import datasets
    import grain

    from mla.config import DataConfig

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "all")
META_FILE = "meta.json"
TOKENS_FILE = "tokens.bin"
BYTE_COUNTS_FILE = "byte_counts.bin"

_FORMAT = 1  # of the prepared folder and of the rules that lead to it; part of every fingerprint
_SPLIT_SEED = 0  # the same for every run, so that all models share one validation split
_BATCH_BYTES = 8 << 20
_RACY_SECONDS = 2.0

_ACCEPTED = (
    "use stdlib, a file, a folder or a glob of text, .jsonl, .json, .csv, .tsv or .parquet, "
    "or the name of a dataset on the hub (org/name[:subset])"
)
_TABLES = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
}
# What counts as text in a folder. A file named on its own, or by a glob, is text unless it is one of _TABLES.
_TEXT_SUFFIXES = frozenset(
    f".{suffix}"
    for suffix in (
        *("txt", "text", "md", "markdown", "rst", "tex", "bib", "org", "adoc", "log", "raw", "tokens", "srt", "vtt"),
        *("html", "htm", "xml", "svg", "css", "scss", "js", "jsx", "mjs", "ts", "tsx", "vue"),
        *("py", "pyi", "pyx", "ipynb", "r", "jl", "lua", "rb", "php", "pl", "pm", "tcl", "sh", "bash", "zsh", "ps1"),
        *("c", "h", "cc", "cpp", "cxx", "hh", "hpp", "cu", "cuh", "m", "mm", "f", "f90", "asm", "s", "v", "vhd"),
        *("java", "kt", "scala", "go", "rs", "swift", "cs", "fs", "dart", "hs", "ml", "mli", "ex", "exs", "erl"),
        *("clj", "lisp", "el", "vim", "sql", "proto", "cmake", "yaml", "yml", "toml", "ini", "cfg"),
    )
)
# Found beside the tables of a downloaded dataset, and no part of its text.
_BESIDE_TABLES = ("readme*", "license*", "licence*", "citation*", "notice*", "changelog*", "dataset_info*.json")
_SEPARATORS = {"csv": ",", "tsv": "\t"}
_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
_SKIPPED_STDLIB = frozenset(("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"))


@dataclasses.dataclass(frozen=True)
class Split:
    """One split of a prepared corpus, as one stream of documents.

    Attributes:
        name: train, validation or all.
        tokens: uint16 or uint32 [num_tokens], memory-mapped read-only; each document ends with the tokenizer's eos_id.
        byte_counts: uint16 [num_tokens], memory-mapped read-only: UTF-8 bytes of the original text a token stands for.
        documents: number of documents.
        num_bytes: bytes of the original text; the sum of `byte_counts`.
    """

    name: str
    tokens: np.ndarray
    byte_counts: np.ndarray
    documents: int
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class TokenData:
    """A prepared corpus.

    Attributes:
        tokenizer: the tokenizer it was made with.
        sha256: hex digest of the contents of its documents, whatever files they came in; results name a corpus by it.
        directory: the prepared folder.
        meta: what meta.json says, with the corpus as it was named by the caller.
    """

    tokenizer: tokenizers.Tokenizer
    sha256: str
    directory: Path
    meta: dict[str, Any]

    @property
    def vocab_size(self) -> int:
        """Number of ids, the end-of-document token included."""
        return self.tokenizer.vocab_size

    def split(self, name: str) -> Split:
        """The split called `name`: train, validation, or all (the training documents, then the validation documents).

        Raises:
            UserError: no such split.
        """
        if name not in SPLITS:
            near = difflib.get_close_matches(name, SPLITS, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"config.eval.split: {name!r} is not one of {', '.join(SPLITS)}{hint}")
        sizes = self.meta["splits"]
        start = sizes["train"]["tokens"] if name == "validation" else 0
        span = slice(start, start + sizes[name]["tokens"])
        return Split(
            name=name,
            tokens=np.memmap(self.directory / TOKENS_FILE, np.dtype(self.meta["dtype"]), mode="r")[span],
            byte_counts=np.memmap(self.directory / BYTE_COUNTS_FILE, np.uint16, mode="r")[span],
            documents=sizes[name]["documents"],
            num_bytes=sizes[name]["bytes"],
        )


class EvaluationBatch(NamedTuple):
    """Windows of a stream, in order.

    Attributes:
        tokens: int32 [batch, context + 1]; 0 where there is nothing to predict.
        weights: float32 [batch, context]: 1 where `tokens[:, 1:]` is predicted, 0 for padding.
        predicted: where in the stream the predicted tokens are; `byte_counts[predicted].sum()` is their bytes.
    """

    tokens: np.ndarray
    weights: np.ndarray
    predicted: slice


# ------------------------------------------------------------------------------------------------------------ preparing


def prepare(config: "DataConfig", progress: bool | None = None) -> TokenData:
    """Tokenise a corpus into a folder named by its fingerprint, or open that folder when it is there already.

    Changed files are noticed: a local corpus is known by the sizes and times of its files and, where those are new,
    by the contents of its documents. A hub corpus is looked up once; from then on the prepared copy is used. Safe
    when several processes prepare the same corpus at once: one works, the others wait for it.

    Args:
        config: what to read and how: `config.data`.
        progress: show a progress bar while tokenising; None shows it on a terminal only.

    Raises:
        UserError: anything a user can cause: a path or hub name that is not there, an unknown tokenizer, text that is
            not UTF-8, a missing column, an empty corpus, a cache folder that is full or cannot be written.
    """
    if not 0 < config.validation_fraction < 1:
        raise UserError(f"config.data.validation_fraction: {config.validation_fraction} is not between 0 and 1")
    tokenizer = tokenizers.parse(config.tokenizer)
    root = cache_root(config)
    source = _find(config.corpus)
    request = _digest(
        {
            "format": _FORMAT,
            "source": source.key(),
            "field": None if source.kind == "text" else config.text_field,
            "tokenizer": config.tokenizer if isinstance(tokenizer, int) else tokenizer.fingerprint,
            "fraction": config.validation_fraction,
        }
    )
    index = root / "index" / f"{request}.json"

    def recall() -> TokenData | None:
        try:
            directory = root / "prepared" / json.loads(index.read_text(encoding="utf-8"))["prepared"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return _open_if_whole(directory, config)

    found = recall()
    if found is not None:
        return found
    with _explained(root), _locked(root, request) as alone:
        found = recall()  # another process may have made it while this one waited
        if found is not None:
            return found
        # The lock makes this name ours: what a killed process left there is of no use to anybody.
        work = root / "tmp" / f"{request[:16]}-{socket.gethostname()}{'' if alone else f'-{uuid.uuid4().hex[:8]}'}"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        try:
            started = time.time()
            corpus = _survey(source, config, root, work, show=_shown(progress))
            data = _open_or_write(corpus, config, tokenizer, root, work, show=_shown(progress))
            if source.newest() < started - _RACY_SECONDS:
                # A file changed twice within one tick of its clock looks unchanged, so that a fresh one is read again.
                index.parent.mkdir(parents=True, exist_ok=True)
                _write_json(work / "index.json", {"prepared": data.directory.name})
                os.replace(work / "index.json", index)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return data


def open_prepared(directory: str | os.PathLike[str]) -> TokenData:
    """Open the folder of a prepared corpus.

    Raises:
        UserError: it is not there, was made by another version, or is damaged; the message says which.
    """
    directory = Path(directory)
    try:
        meta = json.loads((directory / META_FILE).read_text(encoding="utf-8"))
        if meta["format"] != _FORMAT:
            raise UserError(f"{directory}: prepared in format {meta['format']}, not {_FORMAT}; delete it")
        num_tokens = meta["splits"]["all"]["tokens"]
        for name, dtype in ((TOKENS_FILE, np.dtype(meta["dtype"])), (BYTE_COUNTS_FILE, np.dtype(np.uint16))):
            expected, found = num_tokens * dtype.itemsize, (directory / name).stat().st_size
            if expected != found:
                raise UserError(f"{directory}: damaged ({name} has {found:,} bytes instead of {expected:,}); delete it")
        tokenizer = tokenizers.load(directory, meta["tokenizer"], meta["eos_id"])
        if tokenizer.fingerprint != meta["tokenizer_fingerprint"]:
            raise UserError(f"{directory}: damaged ({tokenizers.TOKENIZER_FILE} was changed); delete it")
        return TokenData(tokenizer, meta["sha256"], directory, meta)
    except FileNotFoundError as error:
        raise UserError(f"{directory}: not a prepared corpus ({Path(error.filename).name} is missing)") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{directory}: damaged ({META_FILE} or a file beside it is unreadable); delete it") from error


def cache_root(config: "DataConfig") -> Path:
    """Folder under which everything prepared, downloaded or temporary is kept."""
    name = config.cache_dir or os.environ.get("MLA_DATA_DIR") or os.path.join("~", ".cache", "mla")
    return Path(os.path.abspath(os.path.expanduser(name)))


# -------------------------------------------------------------------------------------------------------------- batches


def require_length(split: Split, context: int, batch_size: int = 1) -> None:
    """Check that a split is long enough to train on.

    Args:
        split: the split.
        context: predicted tokens a window; a window has one more.
        batch_size: windows a batch.

    Raises:
        UserError: the split has fewer than `batch_size` windows.
    """
    _require_windows(len(split.tokens), context, batch_size, f"the {split.name} split")


def train_loader(
    tokens: np.ndarray, context: int, batch_size: int, seed: int
) -> "grain.DatasetIterator[dict[str, np.ndarray]]":
    """Endless batches of windows in an order drawn anew each epoch.

    Windows have `context + 1` tokens and step by `context`; a tail shorter than a window is left out. Where an epoch
    does not divide into batches, its last windows share a batch with the first of the next epoch.

    Args:
        tokens: ids [num_tokens]; a read-only memory map will do.
        context: predicted tokens a window.
        batch_size: windows a batch.
        seed: of the order; any integer.

    Returns:
        A grain iterator over `{"tokens": int32 [batch_size, context + 1]}`. `get_state()` gives a small dict that json
        can write, and an iterator made with the same arguments goes on bit-equal after `set_state()`. It starts
        neither threads nor processes.

    Raises:
        UserError: there are fewer than `batch_size` windows.
    """
    import grain

    _require_windows(len(tokens), context, batch_size, "the corpus")
    # Epoch e is shuffled with seed + e: nearby seeds would share their orders if they were not scattered first.
    scattered = int.from_bytes(hashlib.sha256(f"data order {seed}".encode()).digest()[:4], "big")
    dataset = (
        grain.MapDataset.source(_Windows(tokens, context))
        .shuffle(seed=scattered)
        .repeat()
        .batch(batch_size, drop_remainder=True)
    )
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


def evaluation_windows(
    tokens: np.ndarray, context: int, batch_size: int, limit_tokens: int = 0
) -> Iterator[EvaluationBatch]:
    """Batches of fixed shape in which every token but the first of the stream is predicted exactly once, in order.

    Windows have `context + 1` tokens and step by `context`. The last one may be shorter, and the last batch may have
    fewer windows: both are padded, with weight 0.

    Args:
        tokens: ids [num_tokens]; a read-only memory map will do.
        context: predicted tokens a window.
        batch_size: windows a batch.
        limit_tokens: predict no more than the first so many; 0 for all.

    Raises:
        UserError: there is no token to predict, or an argument is out of range.
    """
    num_predicted = predicted_tokens(len(tokens), limit_tokens)
    _require_positive("config.context", context)
    _require_positive("config.eval.batch_size", batch_size)

    def batches() -> Iterator[EvaluationBatch]:
        for first in range(0, num_predicted, context * batch_size):
            last = min(first + context * batch_size, num_predicted)
            windows = np.zeros((batch_size, context + 1), np.int32)
            weights = np.zeros((batch_size, context), np.float32)
            for row, start in enumerate(range(first, last, context)):
                stop = min(start + context, num_predicted)
                windows[row, : stop - start + 1] = tokens[start : stop + 1]
                weights[row, : stop - start] = 1
            yield EvaluationBatch(windows, weights, slice(first + 1, last + 1))

    return batches()


def predicted_tokens(num_tokens: int, limit_tokens: int = 0) -> int:
    """How many tokens `evaluation_windows` predicts of a stream of `num_tokens`: positions 1 to this number.

    Raises:
        UserError: none, or the limit is negative.
    """
    if limit_tokens < 0:
        raise UserError(f"config.eval.tokens: {limit_tokens} is negative; 0 means all tokens of the split")
    if num_tokens < 2:
        raise UserError(f"config.data.corpus: {num_tokens} tokens are too few to evaluate on: at least 2 are needed")
    return min(num_tokens - 1, limit_tokens or num_tokens - 1)


def unigram_perplexity(data: TokenData) -> float:
    """Perplexity per token on the validation split of the token frequencies of the training split.

    Counts are smoothed by adding one. Like a model's, the figure covers every token but the first.
    """
    train = _histogram(data.split("train").tokens, data.vocab_size)
    validation = data.split("validation").tokens
    predicted = predicted_tokens(len(validation))
    counts = _histogram(validation[1:], data.vocab_size)
    log_probabilities = np.log(train + 1.0) - math.log(train.sum() + data.vocab_size)
    return math.exp(-float(counts @ log_probabilities) / predicted)


class _Windows:
    """Windows of `context + 1` tokens stepping by `context`, for grain."""

    def __init__(self, tokens: np.ndarray, context: int):
        self._tokens = tokens
        self._context = context

    def __len__(self) -> int:
        return _num_windows(len(self._tokens), self._context)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        start = int(index) * self._context
        return {"tokens": np.array(self._tokens[start : start + self._context + 1], np.int32)}


def _num_windows(num_tokens: int, context: int) -> int:
    return max(num_tokens - 1, 0) // context


def _require_windows(num_tokens: int, context: int, batch_size: int, what: str) -> None:
    _require_positive("config.context", context)
    _require_positive("config.batch_size", batch_size)
    windows = _num_windows(num_tokens, context)
    if windows < batch_size:
        raise UserError(
            f"config.data.corpus: too short: {what} has {num_tokens:,} tokens, {windows:,} windows of context "
            f"{context:,}, and a batch takes {batch_size:,}; give more text, or lower config.context or "
            "config.batch_size"
        )


def _require_positive(field: str, value: int) -> None:
    if value < 1:
        raise UserError(f"{field}: {value} is not a positive number")


def _histogram(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    counts = np.zeros(vocab_size, np.int64)
    for start in range(0, len(tokens), _BATCH_BYTES):  # bincount makes 8 bytes of every token it looks at
        counts += np.bincount(tokens[start : start + _BATCH_BYTES], minlength=vocab_size)
    return counts


# -------------------------------------------------------------------------------------------------- where the text lies


@dataclasses.dataclass(frozen=True)
class _Source:
    """Where a corpus lies: files by split ('train', and 'validation' if the corpus has its own), or a hub name."""

    name: str  # as the user wrote it
    kind: str  # text | json | csv | tsv | parquet | hub
    files: dict[str, list[Path]]
    stamps: tuple[tuple[str, int, int, int], ...] = ()  # path, size, times of modification and of change (ns), by file
    notes: tuple[str, ...] = ()

    def key(self) -> Any:
        """What is known about the contents without reading them; changes when a file does."""
        if self.kind == "hub":
            return ["hub", self.name]
        return [self.kind, {split: len(files) for split, files in self.files.items()}, self.stamps]

    def newest(self) -> float:
        """When a file was last changed, in seconds since the epoch."""
        return max((max(modified, changed) for *_, modified, changed in self.stamps), default=0) / 1e9


def _find(corpus: str) -> _Source:
    if corpus == "stdlib":
        return _stamped("stdlib", "text", {"train": _stdlib_files()})
    path = Path(os.path.expanduser(corpus))
    try:
        if corpus and path.is_file():
            return _stamped(corpus, _kind(path, in_folder=False) or "text", {"train": [path]})
        if corpus and path.is_dir():
            files = [file for file in _walk(path) if _kind(file, in_folder=True)]
            if not files:
                raise UserError(
                    f"config.data.corpus: the folder {corpus} holds no text, .jsonl, .json, .csv, .tsv or .parquet file"
                )
            return _grouped(corpus, files, path)
        if glob.has_magic(corpus):
            matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True) if os.path.isfile(match))
            if not matches:
                raise UserError(f"config.data.corpus: no file matches {corpus}; {_ACCEPTED}")
            return _grouped(corpus, matches, Path(os.path.commonpath([match.parent for match in matches])))
    except OSError as error:
        raise UserError(f"config.data.corpus: {corpus} cannot be read: {error.strerror}") from error
    # A missing data/corpus.txt is a missing file, while a subset may well be called 20231101.pl.
    is_name = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(:[\w.+-]+)?", corpus)
    if is_name and not _kind(Path(corpus.partition(":")[0]), in_folder=True):
        return _Source(corpus, "hub", {})
    near = difflib.get_close_matches(corpus.lower(), ("stdlib",), n=1)
    hint = "did you mean stdlib? " if near else ""
    raise UserError(f"config.data.corpus: no file or folder at {corpus!r}; {hint}{_ACCEPTED}")


def _stamped(name: str, kind: str, files: dict[str, list[Path]], notes: tuple[str, ...] = ()) -> _Source:
    stamps = []
    for file in (file for group in files.values() for file in group):
        try:
            stat = file.stat()
        except OSError as error:
            raise UserError(f"config.data.corpus: {file} cannot be read: {error.strerror}") from error
        if not os.access(file, os.R_OK):
            raise UserError(f"config.data.corpus: {file} cannot be read: permission denied")
        stamps.append((os.path.abspath(file), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
    return _Source(name, kind, files, tuple(stamps), notes)


def _stdlib_files() -> list[Path]:
    """The library sources of the running Python, without its tests and without what was installed into it."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return [file for file in _walk(root, skip=_SKIPPED_STDLIB) if file.suffix == ".py"]


def _walk(root: Path, skip: Iterable[str] = ("__pycache__",)) -> list[Path]:
    """All files under `root` but hidden ones, sorted by their path inside it, whatever the platform's order."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in skip and not name.startswith(".")]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted((file for file in found if file.is_file()), key=lambda file: file.relative_to(root).as_posix())


def _kind(path: Path, in_folder: bool) -> str | None:
    """How to read a file, by its name; None for a file in a folder that is not known to be text."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    suffix = suffixes[-1] if suffixes else ""
    if suffix in _TABLES:
        return _TABLES[suffix]
    return "text" if not in_folder or suffix in _TEXT_SUFFIXES else None


def _grouped(name: str, files: list[Path], root: Path) -> _Source:
    """Files of one kind, by split where their names say so."""
    kinds = {_kind(file, in_folder=False) or "text" for file in files}
    if len(kinds) > 1:
        proper = [file for file in files if not any(fnmatch.fnmatch(file.name.lower(), p) for p in _BESIDE_TABLES)]
        files = proper or files
        kinds = {_kind(file, in_folder=False) or "text" for file in files}
    if len(kinds) > 1:
        raise UserError(
            f"config.data.corpus: {name} mixes {' and '.join(sorted(kinds))} files; name one kind by a glob such as "
            f"{os.path.join(root, '**', '*' + max(files, key=lambda file: file.suffix in _TABLES).suffix)}"
        )
    splits: dict[str, list[Path]] = {}
    for file in files:
        splits.setdefault(_split_word(file.relative_to(root)), []).append(file)
    # Source code has its train.py and test_x.py: names count only where every file says which split it belongs to.
    if set(splits) not in ({"train", "validation", "test"}, {"train", "validation"}, {"train", "test"}):
        return _stamped(name, kinds.pop(), {"train": files})
    notes = ("its test files are left out",) if "test" in splits else ()
    kept: dict[str, list[Path]] = {split: splits[split] for split in ("train", "validation") if split in splits}
    return _stamped(name, kinds.pop(), kept, notes)


def _split_word(path: Path) -> str:
    """train, validation or test as the outermost part of a path that names a split does, else ''."""
    for part in (*path.parts[:-1], path.name):
        words = {_SPLIT_WORDS[word] for word in re.split(r"[^a-z]+", part.lower()) if word in _SPLIT_WORDS}
        if words:
            return words.pop() if len(words) == 1 else ""
    return ""


# ----------------------------------------------------------------------------------------------------- reading the text


@dataclasses.dataclass(frozen=True)
class _Corpus:
    """The documents of a corpus, read once, and how they are split.

    `in_validation` has an entry for every document that is not empty. `cut` is the byte at which the one document of
    a corpus is cut instead.
    """

    parts: list["datasets.Dataset"]
    field: str
    sizes: np.ndarray
    sha256: str
    in_validation: np.ndarray
    cut: int | None
    rule: str
    notes: list[str]
    revision: str | None

    def documents(self) -> Iterator[tuple[list[bytes], list[bytes], bool]]:
        """Batches of (training documents, validation documents, whether the former end there and are not cut)."""
        position = 0
        for rows in _rows(self.parts, self.field):
            batch = [row for row in rows if row]
            if self.cut is not None and batch:
                yield [batch[0][: self.cut]], [], False
                yield [], [batch[0][self.cut :]], True
                continue
            chosen = self.in_validation[position : position + len(batch)]
            position += len(batch)
            train = [document for document, held_out in zip(batch, chosen, strict=True) if not held_out]
            validation = [document for document, held_out in zip(batch, chosen, strict=True) if held_out]
            yield train, validation, True


def _survey(source: _Source, config: "DataConfig", root: Path, work: Path, show: bool) -> _Corpus:
    """Read every document once: its size, the digest of all, the split."""
    field = "text" if source.kind == "text" else config.text_field
    with _quiet_datasets(bars=show and source.kind == "hub"):
        revision: str | None = None
        if source.kind == "hub":
            repository, _, subset = source.name.partition(":")
            revision = _hub_revision(repository, root / "hub")
            splits, notes = _load_hub(repository, subset, revision, root / "hub")
        else:
            splits, notes = _load_files(source, field, work), list(source.notes)
    parts = [splits[name] for name in ("train", "validation") if name in splits]
    for part in parts:
        _check_column(part, field, source.name)

    sizes, ends, no_text = array("q"), [], 0
    digest = hashlib.sha256()
    for part in parts:
        for rows in _rows([part], field):
            for row in rows:
                if not row:
                    no_text += row is None
                    continue
                _check_utf8(row, source, len(sizes))
                sizes.append(len(row))
                digest.update(hashlib.sha256(row).digest())
        ends.append(len(sizes))
    if no_text:
        notes.append(f"{no_text:,} rows without text in {field!r} are left out")
    if not sizes:
        raise UserError(f"config.data.corpus: {source.name} is empty: there is no text in it")

    in_validation, cut = np.zeros(len(sizes), bool), None
    if len(parts) == 2:
        if not 0 < ends[0] < ends[1]:
            empty = "validation" if ends[0] else "train"
            raise UserError(f"config.data.corpus: the {empty} split of {source.name} is empty: there is no text in it")
        in_validation[ends[0] :] = True
        rule = f"the corpus' own: documents {ends[0]} and on"
    elif len(sizes) == 1:
        document = next(row for rows in _rows(parts, field) for row in rows if row)
        cut = _cut_near_tail(document, config.validation_fraction)
        if cut is None:
            raise UserError(f"config.data.corpus: {source.name} is too short: one document of {sizes[0]} bytes")
        rule = f"the last {config.validation_fraction} of the one document's bytes"
        held_out = sizes[0] - cut
        notes.append(f"it is a single document: its last {held_out:,} of {sizes[0]:,} bytes are the validation split")
    else:
        in_validation = _choose_validation(np.asarray(sizes), config.validation_fraction)
        rule = f"{config.validation_fraction} of the bytes, by document, seed {_SPLIT_SEED}"
        share = np.asarray(sizes)[in_validation].sum() / sum(sizes)
        if share > 2 * config.validation_fraction:
            notes.append(f"documents are few or large: the validation split has {share:.1%} of the bytes")
    for note in notes:
        logger.info("corpus %s: %s", source.name, note)
    return _Corpus(parts, field, np.asarray(sizes), digest.hexdigest(), in_validation, cut, rule, notes, revision)


def _load_files(source: _Source, field: str, work: Path) -> dict[str, "datasets.Dataset"]:
    """Read local files through `datasets`; its copy of them lies in `work` and goes with it."""
    cache = str(work / "datasets")

    def load(split: str, files: Sequence[Path]) -> "datasets.Dataset | None":
        import datasets

        paths = [os.path.abspath(file) for file in files]
        if source.kind == "text":
            # The text builder of datasets would turn \r\n into \n, and bytes would no longer be those of the files.
            return datasets.Dataset.from_generator(
                _read_texts,
                features=datasets.Features({"text": datasets.Value("large_string")}),
                cache_dir=cache,
                gen_kwargs={"paths": paths, "strict": source.name != "stdlib"},
                writer_batch_size=64,
            )
        options: dict[str, Any] = {}
        if source.kind == "json":
            options = {"parse_agent_traces": False}
        elif source.kind in ("csv", "tsv"):
            # A document may well read "NA" or "12", and stays text.
            options = {"usecols": [field], "converters": {field: str}, "keep_default_na": False, "na_filter": False}
            options["sep"] = _SEPARATORS[source.kind]
        elif source.kind == "parquet":
            options = {"columns": [field], "batch_size": 1024}
        kind = "csv" if source.kind == "tsv" else source.kind
        builder = datasets.load_dataset_builder(kind, data_files={split: paths}, cache_dir=cache, **options)
        builder.download_and_prepare()
        # A split without rows cannot be loaded: datasets says that its name "corresponds to no data".
        return builder.as_dataset(split) if builder.info.splits[split].num_examples else None

    def empty(split: str) -> UserError:
        which = "" if len(source.files) == 1 else f"the {split} split of "
        return UserError(f"config.data.corpus: {which}{source.name} is empty: there is no text in it")

    loaded = {}
    for split, group in source.files.items():
        files = [file for file in group if file.stat().st_size]
        if not files:
            raise empty(split)
        for file in files:
            if source.kind not in ("text", "json"):
                columns = _columns(file, source.kind)
                if field not in columns:
                    raise UserError(_missing_column(field, str(file), columns))
        try:
            dataset = load(split, files)
        except Exception as error:
            _raise_known(error)
            culprit, cause = source.name, error
            for file in files if len(files) > 1 else ():
                try:
                    load(split, [file])
                except Exception as own_error:
                    _raise_known(own_error)
                    culprit, cause = str(file), own_error
                    break
            for file in files:
                _check_file_utf8(file)
            reason = _reason(cause)
            raise UserError(f"config.data.corpus: {culprit} cannot be read as {source.kind}: {reason}") from error
        if dataset is None:
            raise empty(split)
        loaded[split] = dataset
    return loaded


def _read_texts(paths: list[str], strict: bool) -> Iterator[dict[str, str]]:
    """One document a file, exactly as it is; a file that is not UTF-8 is an error, or left out if not `strict`."""
    for path in paths:
        try:
            with _open_binary(path) as file:
                yield {"text": file.read().decode("utf-8")}
        except UnicodeDecodeError as error:
            if strict:
                raise UserError(_not_utf8(path, error)) from error
        except (OSError, EOFError) as error:
            raise UserError(f"config.data.corpus: {path} cannot be read: {error}") from error


def _hub_revision(repository: str, cache: Path) -> str | None:
    """Commit of a dataset on the hub; None where the hub cannot be reached but an earlier download is in `cache`."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    remedies = "check the network and HF_HUB_OFFLINE, or give a local file"
    try:
        # Asked first because it answers at once where load_dataset would try for half a minute.
        return huggingface_hub.HfApi().dataset_info(repository, timeout=15).sha
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(
            f"config.data.corpus: {repository!r} is neither a path here nor a dataset on the hub that this machine may "
            "read (a private one needs HF_TOKEN); give a local file or another name"
        ) from error
    except HfHubHTTPError as error:
        raise UserError(f"config.data.corpus: the hub refuses {repository!r} ({_reason(error)}); {remedies}") from error
    except Exception as error:  # the HTTP client's own kinds, which change with its version
        if (cache / repository.replace("/", "___")).is_dir():
            return None
        raise UserError(
            f"config.data.corpus: {repository!r} is not a path here, and the hub cannot be reached; {remedies}"
        ) from error


def _load_hub(
    repository: str, subset: str, revision: str | None, cache: Path
) -> tuple[dict[str, "datasets.Dataset"], list[str]]:
    """Train split, and validation split if there is one, of a dataset on the hub (or of a folder laid out like one)."""
    import datasets

    try:
        found = datasets.load_dataset(repository, subset or None, revision=revision, cache_dir=str(cache))
    except Exception as error:
        _raise_known(error)
        raise UserError(
            f"config.data.corpus: hub dataset {repository!r} cannot be loaded: {_reason(error)}; a subset is named as "
            f"{repository}:subset, and a local file needs no hub"
        ) from error
    splits: dict[str, datasets.Dataset] = {}
    for name, split in found.items():
        word = _SPLIT_WORDS.get(str(name))
        if word in ("train", "validation"):
            splits.setdefault(word, split)
    others = sorted(str(name) for name in found if _SPLIT_WORDS.get(str(name)) not in ("train", "validation"))
    if "train" not in splits:
        if len(found) > 1:
            raise UserError(
                f"config.data.corpus: hub dataset {repository!r} has no train split, only "
                f"{', '.join(map(str, found))}; save the one you want as a local file"
            )
        splits, others = {"train": next(iter(found.values()))}, []
    return splits, [f"its splits left out: {', '.join(others)}"] if others else []


def _rows(parts: Iterable["datasets.Dataset"], field: str) -> Iterator[list[bytes | None]]:
    """The text column as UTF-8 bytes, some megabytes at a time."""
    import pyarrow

    for part in parts:
        if not len(part):
            continue
        column = part.select_columns([field])
        rows = max(1, min(10_000, _BATCH_BYTES * len(column) // max(column.data.nbytes, 1)))
        for table in column.with_format("arrow").iter(rows):
            yield table.column(0).cast(pyarrow.large_binary()).to_pylist()


def _check_column(part: "datasets.Dataset", field: str, name: str) -> None:
    if field not in part.column_names:
        raise UserError(_missing_column(field, name, part.column_names))
    held = getattr(part.features[field], "dtype", None) or type(part.features[field]).__name__
    if held not in ("string", "large_string"):
        raise UserError(f"config.data.text_field: column {field!r} of {name} holds {held}, not text")


def _columns(path: Path, kind: str) -> list[str]:
    """Names of the columns of a csv, tsv or parquet file, without reading its rows."""
    import pyarrow
    import pyarrow.parquet

    try:
        if kind == "parquet":
            return pyarrow.parquet.read_schema(path).names
        with _open_binary(path) as file, io.TextIOWrapper(file, "utf-8-sig", errors="replace", newline="") as lines:
            return next(csv.reader(lines, delimiter=_SEPARATORS[kind]), [])
    except (OSError, EOFError, csv.Error, pyarrow.ArrowException) as error:
        raise UserError(f"config.data.corpus: {path} cannot be read as {kind}: {_reason(error)}") from error


def _missing_column(field: str, name: str, columns: Sequence[str]) -> str:
    return (
        f"config.data.text_field: {name} has no column {field!r}; it has {', '.join(map(repr, columns)) or 'none'}: "
        "name the one that holds the text"
    )


def _check_utf8(document: bytes, source: _Source, number: int) -> None:
    try:
        document.decode("utf-8")
    except UnicodeDecodeError as error:
        for file in (file for group in source.files.values() for file in group):
            _check_file_utf8(file)
        raise UserError(_not_utf8(f"document {number} of {source.name}", error)) from error


def _check_file_utf8(path: Path) -> None:
    """Raise UserError for a file of plain text that is not UTF-8."""
    if _kind(path, in_folder=False) == "parquet":
        return
    decoder = codecs.getincrementaldecoder("utf-8")()
    with contextlib.suppress(OSError, EOFError), _open_binary(path) as file:
        try:
            while chunk := file.read(_BATCH_BYTES):
                decoder.decode(chunk)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            raise UserError(_not_utf8(str(path), error)) from error


def _not_utf8(what: str, error: UnicodeDecodeError) -> str:
    return (
        f"config.data.corpus: {what} is not valid UTF-8 text (byte 0x{error.object[error.start]:02x}); convert it to "
        "UTF-8 or leave it out"
    )


def _open_binary(path: str | Path) -> BinaryIO:
    return gzip.open(path, "rb") if str(path).endswith(".gz") else open(path, "rb")  # type: ignore[return-value]


# ------------------------------------------------------------------------------------------------ splitting and writing


def _choose_validation(sizes: np.ndarray, fraction: float) -> np.ndarray:
    """Documents to hold out, drawn until `fraction` of the bytes is reached: bool [num_documents].

    A document larger than that share would be the whole split by itself, so it stays in training as long as there
    are others. At least one document is held out, and at least one is not.
    """
    target = fraction * sizes.sum()
    # RandomState is frozen: its permutations are the same under every version of numpy.
    order = np.random.RandomState(_SPLIT_SEED).permutation(len(sizes))
    order = order[sizes[order] <= target]
    if not len(order):
        order = np.argmin(sizes, keepdims=True)
    enough = int(np.searchsorted(np.cumsum(sizes[order]), target)) + 1
    chosen = np.zeros(len(sizes), bool)
    chosen[order[: min(enough, len(sizes) - 1)]] = True
    return chosen


def _cut_near_tail(document: bytes, fraction: float) -> int | None:
    """The byte where the validation split of a single document starts: the start of a line if one is near.

    Both sides keep at least one character; None where that cannot be.
    """
    size = len(document)
    held_out = max(1, round(fraction * size))
    target = size - held_out
    line_starts = (document.rfind(b"\n", 0, target) + 1, document.find(b"\n", target) + 1)
    near = [start for start in line_starts if 0 < start < size and abs(start - target) <= held_out // 2]
    if near:
        return min(near, key=lambda start: abs(start - target))
    while target > 0 and document[target] & 0xC0 == 0x80:  # inside a character
        target -= 1
    return target or None


def _open_if_whole(directory: Path, config: "DataConfig") -> TokenData | None:
    """The prepared folder, or None if it is not there or damaged; the latter is said."""
    if not directory.is_dir():
        return None
    try:
        data = open_prepared(directory)
    except UserError as error:
        logger.warning("%s; preparing it anew", error)
        return None
    return _named(data, config)


def _named(data: TokenData, config: "DataConfig") -> TokenData:
    """The same data under the caller's names: equal documents in other files share one folder."""
    data.tokenizer.name = config.tokenizer
    return dataclasses.replace(data, meta={**data.meta, "corpus": config.corpus, "tokenizer": config.tokenizer})


def _open_or_write(
    corpus: _Corpus, config: "DataConfig", tokenizer: tokenizers.Tokenizer | int, root: Path, work: Path, show: bool
) -> TokenData:
    fingerprint = _digest(
        {
            "format": _FORMAT,
            "sha256": corpus.sha256,
            "tokenizer": config.tokenizer if isinstance(tokenizer, int) else tokenizer.fingerprint,
            "validation": corpus.rule,
        }
    )
    slug = re.sub(r"[^\w.-]+", "-", config.tokenizer.rsplit("/", 1)[-1])
    directory = root / "prepared" / f"{slug}-{fingerprint[:16]}"
    data = _open_if_whole(directory, config)
    if data is None:
        made = work / "prepared"
        made.mkdir()
        _write(corpus, config, tokenizer, fingerprint, made, show)
        _publish(made, directory, work)
        data = _named(open_prepared(directory), config)
    return data


def _write(
    corpus: _Corpus,
    config: "DataConfig",
    tokenizer: tokenizers.Tokenizer | int,
    fingerprint: str,
    directory: Path,
    show: bool,
) -> None:
    """Tokenise a corpus into `directory`."""
    from tqdm import tqdm

    notes = list(corpus.notes)
    total = int(corpus.sizes.sum())
    if isinstance(tokenizer, int):
        with tqdm(total=total, desc="training the tokenizer", unit="B", unit_scale=True, disable=not show) as bar:

            def training_texts() -> Iterator[str]:
                for train, validation, _ in corpus.documents():
                    yield from (document.decode("utf-8") for document in train)
                    bar.update(sum(map(len, train)) + sum(map(len, validation)))

            size, tokenizer = tokenizer, tokenizers.train_bpe(training_texts(), tokenizer)
        if tokenizer.vocab_size < size:
            notes.append(f"the corpus has pairs for a vocabulary of {tokenizer.vocab_size:,} only, not {size:,}")
            logger.info("tokenizer %s: %s", tokenizer.name, notes[-1])
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)

    counts = {name: dict.fromkeys(("documents", "tokens", "bytes"), 0) for name in SPLITS}
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=total, desc="tokenising", unit="B", unit_scale=True, disable=not show))
        files = {
            (name, kind): stack.enter_context(open(directory / (kind if name == "train" else f"{kind}.{name}"), "w+b"))
            for name in ("train", "validation")
            for kind in (TOKENS_FILE, BYTE_COUNTS_FILE)
        }
        for train, validation, whole in corpus.documents():
            for name, documents in (("train", train), ("validation", validation)):
                if not documents:
                    continue
                ids, byte_counts = tokenizer.encode_documents(documents)
                if not whole and name == "train":
                    ids, byte_counts = ids[:-1], byte_counts[:-1]  # the document goes on in the validation split
                files[name, TOKENS_FILE].write(ids.astype(dtype).tobytes())
                files[name, BYTE_COUNTS_FILE].write(byte_counts.tobytes())
                counts[name]["documents"] += len(documents)
                counts[name]["tokens"] += len(ids)
                counts[name]["bytes"] += int(byte_counts.sum(dtype=np.int64))
                bar.update(sum(map(len, documents)))
        for kind in (TOKENS_FILE, BYTE_COUNTS_FILE):
            tail = files["validation", kind]
            tail.seek(0)
            shutil.copyfileobj(tail, files["train", kind], _BATCH_BYTES)
            files["train", kind].flush()
            os.fsync(files["train", kind].fileno())
            os.remove(tail.name)
    for key in counts["all"]:
        counts["all"][key] = counts["train"][key] + counts["validation"][key]
    counts["all"]["documents"] = len(corpus.sizes)
    if counts["all"]["bytes"] != total:
        raise RuntimeError(f"{tokenizer.name} accounts for {counts['all']['bytes']} of {total} bytes")

    tokenizer.save(directory)
    meta = {
        "format": _FORMAT,
        "corpus": config.corpus,
        "sha256": corpus.sha256,
        "revision": corpus.revision,
        "fingerprint": fingerprint,
        "tokenizer": tokenizer.name,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "dtype": dtype.name,
        "validation": corpus.rule,
        "splits": counts,
        "notes": notes,
        "python": platform.python_version(),
    }
    _write_json(directory / META_FILE, meta)


def _publish(made: Path, directory: Path, work: Path) -> None:
    """Move a finished folder to its place, in one step."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    for attempt in itertools.count():
        try:
            os.rename(made, directory)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
        try:
            open_prepared(directory)  # another process was first
            return
        except UserError:
            with contextlib.suppress(FileNotFoundError):  # a third one moves it away as well
                os.rename(directory, work / f"damaged-{attempt}")


# ---------------------------------------------------------------------------------------------------------- small tools


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _write_json(path: Path, value: Any) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def _shown(progress: bool | None) -> bool:
    return sys.stderr.isatty() if progress is None else progress


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _reason(error: BaseException) -> str:
    """What went wrong first, in one short line."""
    errors = list(_chain(error))
    # Where arrow could not parse a line, pandas was tried next and says less.
    first = next((cause for cause in errors if type(cause).__name__ == "ArrowInvalid"), errors[-1])
    text = " ".join(str(first).split()) or type(first).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."


def _raise_known(error: BaseException) -> None:
    """Raise again what `datasets` has wrapped into an error of its own: ours, and trouble with the disk."""
    for cause in _chain(error):
        full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if full or isinstance(cause, UserError):
            raise cause


_DISK_ERRORS = {
    errno.ENOSPC: "is full",
    errno.EDQUOT: "is full (quota)",
    errno.EFBIG: "refuses a file this large",
    errno.EACCES: "cannot be written",
    errno.EPERM: "cannot be written",
    errno.EROFS: "cannot be written",
    errno.ENOTDIR: "is not a folder",
    errno.EEXIST: "is not a folder",
}


@contextlib.contextmanager
def _explained(root: Path) -> Iterator[None]:
    """Turn trouble with the disk under `root` into one line."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        raise UserError(
            f"config.data.cache_dir: {root} {_DISK_ERRORS[error.errno]}; free it, or name another folder by "
            "config.data.cache_dir or MLA_DATA_DIR"
        ) from error


@contextlib.contextmanager
def _locked(root: Path, request: str) -> Iterator[bool]:
    """One process at a time prepares a corpus. Gives False where the file system has no locks: the first one wins."""
    import filelock

    path = root / "locks" / f"{request}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path)
    try:
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            logger.info("waiting for another process that prepares the same corpus")
            lock.acquire()
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
    try:
        yield lock.is_locked
    finally:
        lock.release()


@contextlib.contextmanager
def _quiet_datasets(bars: bool) -> Iterator[None]:
    """Keep `datasets` from logging and, but for a download on a terminal, from drawing bars; then put all back."""
    log = logging.getLogger("datasets")
    if log.level == logging.NOTSET:
        log.setLevel(logging.WARNING)  # it lists the frameworks it has found while it is imported
    import datasets

    verbosity = datasets.utils.logging.get_verbosity()
    disabled = datasets.are_progress_bars_disabled()
    hub_logger = logging.getLogger("huggingface_hub")
    hub_level = hub_logger.level
    datasets.utils.logging.set_verbosity(logging.CRITICAL)
    hub_logger.setLevel(logging.CRITICAL)
    if not bars:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.utils.logging.set_verbosity(verbosity)
        hub_logger.setLevel(hub_level)
        if not (bars or disabled):
            datasets.enable_progress_bars()
