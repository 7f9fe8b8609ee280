"""From documents to batches: tokenise once to a memory-mapped file, split by document, window, shuffle.

    data = prepare(config.data)                       # tokenises only what was not prepared before
    batches = train_loader(data.split("train").tokens, context=256, batch_size=8, seed=0)
    next(batches).tokens                              # int32 [8, 256]

A prepared corpus is a folder with these files, and is never changed once it is there:

    tokens.bin        the ids (uint16, or uint32 for vocabularies above 65,536): training split, then validation split
    byte_counts.bin   uint32: how many UTF-8 bytes of the original text each id stands for
    tokenizer.json    unless the tokenizer is raw bytes; tokenizer_config.json beside it names the end token if that was told
    meta.json         what it was made from, and the sizes
"""

import dataclasses
import hashlib
import json
import math
import os
import shutil
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import filelock
import numpy as np
from tqdm import tqdm

from mla import paths
from mla.config import DataConfig
from mla.data import corpora, tasks, tokenizers
from mla.data.batch import Batch
from mla.data.tasks.batches import TaskBatches
from mla.errors import UserError

if TYPE_CHECKING:  # it takes a second to import, and evaluation does not need it
    import grain

_FORMAT = 3  # of the prepared folder and of the rules that lead to it; part of every fingerprint
_BATCH_BYTES = 8 << 20
_DEFAULT_ROOT = "~/.cache/mla"


@dataclasses.dataclass(frozen=True)
class Split:
    """One split of a prepared corpus, as one stream of documents; `len` is its number of tokens.

    Attributes:
        name: train, validation or all.
        tokens: uint16 or uint32 [num_tokens], memory-mapped read-only; each document ends with the tokenizer's eos_id.
        byte_counts: uint32 [num_tokens], memory-mapped read-only: UTF-8 bytes of the original text a token stands for.
        documents: number of documents.
        num_bytes: bytes of the original text; the sum of `byte_counts`.
        weights: fp32 [num_tokens] from 0 up, how much it counts to predict a token; None: all count alike. A corpus has
            none: a task sets them that scores some positions only.
    """

    name: str
    tokens: np.ndarray
    byte_counts: np.ndarray
    documents: int
    num_bytes: int
    weights: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.tokens)


@dataclasses.dataclass(frozen=True)
class TokenData:
    """A prepared corpus.

    Attributes:
        tokenizer: the tokenizer it was made with.
        sha256: hex digest of the contents of its documents, whatever files they came in; results name a corpus by it.
        directory: the prepared folder; of a task, which has no documents, one that is never made.
        meta: what meta.json says.
        task: what episodes are drawn from, where the corpus is a synthetic task and there are no documents.
    """

    tokenizer: tokenizers.Tokenizer
    sha256: str
    directory: Path
    meta: dict[str, Any]
    task: tasks.Mixture | None = None

    @property
    def vocab_size(self) -> int:
        """Number of ids, the end-of-document token included."""
        return self.tokenizer.vocab_size

    def batches(self, context: int, batch_size: int, seed: int) -> Any:
        """An endless iterator over `Batch`es to train on, with `get_state` and `set_state`.

        Of text, see `train_loader`; of a task, see `mla.data.tasks.batches.TaskBatches`. Raises UserError.
        """
        if self.task is not None:
            return TaskBatches(self.task, context, batch_size, seed)
        split = self.split("train")
        return train_loader(split.tokens, context, batch_size, seed, split.weights)

    def split(self, name: str) -> Split:
        """The split called `name`: train, validation, or all (the training documents, then the validation documents)."""
        train, validation = self.meta["splits"]["train"], self.meta["splits"]["validation"]
        sizes = {"train": train, "validation": validation, "all": {key: train[key] + validation[key] for key in train}}[name]
        start = train["tokens"] if name == "validation" else 0
        span = slice(start, start + sizes["tokens"])
        tokens = np.memmap(self.directory / "tokens.bin", self.meta["dtype"], mode="r")[span]
        byte_counts = np.memmap(self.directory / "byte_counts.bin", np.uint32, mode="r")[span]
        return Split(name, tokens, byte_counts, sizes["documents"], sizes["bytes"])


class EvaluationBatch(NamedTuple):
    """Windows of a stream, in order.

    Attributes:
        tokens: int32 [batch, context + 1]; 0 where there is nothing to predict.
        weights: float32 [batch, context]: how much the prediction of `tokens[:, 1:]` counts, 0 for padding.
        predicted: where in the stream the predicted tokens are; `byte_counts[predicted].sum()` is their bytes.
    """

    tokens: np.ndarray
    weights: np.ndarray
    predicted: slice


def prepare(
    config: DataConfig,
    progress: bool | None = None,
    tokenizer: tokenizers.Tokenizer | None = None,
    sha256: str = "",
) -> TokenData:
    """Tokenise a corpus into a folder named by its fingerprint, or open that folder when it is there already.

    The fingerprint covers the contents of the files, the tokenizer and how documents are split. Safe when several
    processes prepare the same corpus at once: one works, the others wait for it. A folder that is there is only read.

    Args:
        config: what to read and how: `config.data`. A validation_fraction of 0 leaves all documents in the training split.
        progress: show a progress bar while tokenising; None shows it on a terminal only.
        tokenizer: to use instead of reading or training the one that `config.tokenizer` names, as of a run that has its own.
        sha256: of the documents, as `TokenData` has it, where it is known which they must be. Where the corpus or the
            tokenizer cannot be read any more, the tokens prepared from these documents are used.

    Raises:
        UserError: anything a user can cause: a path or hub name that is not there, an unknown tokenizer, text that is
            not UTF-8, a missing column, an empty corpus, a cache folder that cannot be written.
    """
    root = _root(config)
    if tasks.is_task(config.corpus):
        return _of_task(config, root)
    try:
        chosen = tokenizer or tokenizers.parse(config.tokenizer, config.end_token)
        corpora.require_apart(config.corpus, root, "config.data.cache_dir" if config.cache_dir else "MLA_DATA_DIR")
        corpus = corpora.find(config.corpus, config.text_field)
    except UserError as error:
        kept = _kept(config, root, sha256, tokenizer) if sha256 else []
        if len(kept) != 1:
            several = f"{len(kept)} differing ones were" if kept else "none were"
            looked = f"; of its tokens (documents' sha256 {sha256[:12]}) {several} found in {root}" if sha256 else ""
            raise UserError(f"{error}{looked}") from error
        _say(f"{error}; using its tokens, prepared before in {kept[0].directory}")
        return kept[0]
    if tokenizer and config.tokenizer.startswith("bpe:"):  # it may be the one that was trained when these were prepared
        try:
            found = open_prepared(root / _made_from(config, corpus, "")["fingerprint"][:16])
            if found.tokenizer.fingerprint == tokenizer.fingerprint:
                return found
        except UserError:
            pass  # not there, or damaged
    meta = _made_from(config, corpus, "" if isinstance(chosen, int) else chosen.fingerprint)
    directory = root / meta["fingerprint"][:16]
    try:
        return open_prepared(directory)  # no lock: it never changes, and may lie where nothing can be written
    except UserError:
        pass  # not there, or damaged
    try:
        root.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{directory}.lock"):
            _make(directory, meta, lambda work: _write(corpus, chosen, config.validation_fraction, work, progress))
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"config.data.cache_dir: {root} cannot be written ({why}); set it to a folder that can") from error
    return open_prepared(directory)


def _of_task(config: DataConfig, root: Path) -> TokenData:
    """The task that a config names; its episodes are drawn as they are needed."""
    mixture = tasks.parse(config.corpus, "config.data.corpus")
    wanted, sha256 = f"ids:{mixture.vocab_size}", hashlib.sha256(tasks.told(mixture).encode()).hexdigest()
    if config.tokenizer != wanted:
        raise UserError(f"config.data.tokenizer: {config.tokenizer!r}: {config.corpus} is made of ids; set it to {wanted}")
    return TokenData(tokenizers.IdTokenizer(mixture.vocab_size), sha256, root / sha256[:16], {}, mixture)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _made_from(config: DataConfig, corpus: corpora.Corpus, tokenizer: str) -> dict[str, Any]:
    """The part of meta.json known before tokenising; `tokenizer` is its fingerprint, empty before it is trained."""
    made_from = {
        "format": _FORMAT,
        "corpus": corpus.key,
        "tokenizer": [config.tokenizer, tokenizer],
        "validation_fraction": config.validation_fraction,
    }
    fingerprint = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()
    return {"corpus": config.corpus, "fingerprint": fingerprint, "made_from": made_from}


def _root(config: DataConfig) -> Path:
    """The folder of prepared corpora: config.data.cache_dir, $MLA_DATA_DIR or ~/.cache/mla."""
    if config.cache_dir:
        return Path(paths.expand(config.cache_dir, "config.data.cache_dir"))
    named = os.environ.get("MLA_DATA_DIR")
    return Path(paths.expand(named, "MLA_DATA_DIR") if named else paths.expand(_DEFAULT_ROOT, "config.data.cache_dir"))


def _make(directory: Path, meta: dict[str, Any], write: Callable[[Path], dict[str, Any]]) -> None:
    """Make the folder of a prepared corpus, unless another process just did."""
    if directory.exists():
        try:
            open_prepared(directory)
            return
        except UserError as error:
            _say(f"{error}; preparing it anew")
            shutil.rmtree(directory)
    work = directory.with_name(f"{directory.name}.partial")
    shutil.rmtree(work, ignore_errors=True)  # a killed process left it
    work.mkdir()
    try:
        (work / "meta.json").write_text(json.dumps(meta | write(work), indent=2) + "\n", encoding="utf-8")
        work.rename(directory)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _kept(config: DataConfig, root: Path, sha256: str, tokenizer: tokenizers.Tokenizer | None) -> list[TokenData]:
    """The corpora prepared from the documents with this sha256 as a config asks for, one for each tokenizer it may mean.

    Where the tokenizer is given, it is the only one.
    """
    found: dict[tuple[str, int], TokenData] = {}
    for path in sorted(root.glob("*/meta.json"), key=os.path.getmtime):
        try:
            meta = json.loads(path.read_text(encoding="utf-8"))
            if (meta["sha256"], meta["made_from"]["validation_fraction"]) != (sha256, config.validation_fraction):
                continue
            held = open_prepared(path.parent)
            names = [os.path.abspath(name) for name in (config.tokenizer, meta["made_from"]["tokenizer"][0])]
        except (UserError, OSError, ValueError, LookupError, TypeError):
            continue
        meant = names[0] == names[1] and config.end_token in ("", meta.get("end_token", ""))
        if meant if tokenizer is None else held.tokenizer.fingerprint == tokenizer.fingerprint:
            found[getattr(held.tokenizer, "text", ""), held.tokenizer.eos_id] = held
    return list(found.values())


def open_prepared(directory: str | os.PathLike[str]) -> TokenData:
    """Open the folder of a prepared corpus.

    Raises:
        UserError: it is not there, or damaged.
    """
    directory = Path(directory)
    try:
        meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
        num_tokens = sum(split["tokens"] for split in meta["splits"].values())
        for name, dtype in (("tokens.bin", meta["dtype"]), ("byte_counts.bin", "uint32")):
            if (directory / name).stat().st_size != num_tokens * np.dtype(dtype).itemsize:
                raise ValueError(f"{name} does not have {num_tokens:,} tokens")
        tokenizer: tokenizers.Tokenizer = tokenizers.ByteTokenizer()
        if meta["tokenizer"] != tokenizer.name:
            text = (directory / "tokenizer.json").read_text(encoding="utf-8")
            tokenizer = tokenizers.FileTokenizer(text, meta["tokenizer"], meta.get("end_token", ""))
        if np.memmap(directory / "tokens.bin", meta["dtype"], mode="r")[-1] != tokenizer.eos_id:
            raise ValueError("tokens.bin does not end with the end of a document")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, UserError) as error:
        raise UserError(f"{directory}: not a prepared corpus, or damaged ({error})") from error
    return TokenData(tokenizer, meta["sha256"], directory, meta)


def _write(
    corpus: corpora.Corpus, tokenizer: tokenizers.Tokenizer | int, fraction: float, directory: Path, progress: bool | None
) -> dict[str, Any]:
    """Write the files of a prepared folder but meta.json, and give what that says of them.

    The documents are read once for their sizes, which decide the split, once to train a BPE, and once for each split.
    """
    hidden = None if progress is None else not progress  # None: where it is not a terminal
    digest = hashlib.sha256()
    sizes: dict[str, array[int]] = {}
    for name, documents in corpus.splits.items():
        sizes[name] = array("q")
        for document in documents():
            sizes[name].append(len(document))
            digest.update(hashlib.sha256(document).digest())
        if not sizes[name]:
            raise UserError(f"config.data.corpus: the {name} split of {corpus.name} is empty: there is no text in it")
    splits = corpus.splits if "validation" in sizes else _split(corpus, np.array(sizes["train"]), fraction)

    if isinstance(tokenizer, int):
        texts = tqdm(splits["train"](), desc="reading text for the tokenizer", unit=" documents", disable=hidden)
        tokenizer = tokenizers.train_bpe((document.decode() for document in texts), tokenizer)
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    counts = {name: {"documents": 0, "tokens": 0, "bytes": 0} for name in splits}
    with (
        open(directory / "tokens.bin", "wb") as tokens_file,
        open(directory / "byte_counts.bin", "wb") as byte_counts_file,
        tqdm(total=sum(map(sum, sizes.values())), desc="tokenising", unit="B", unit_scale=True, disable=hidden) as bar,
    ):
        for name, documents in splits.items():
            for batch in _batches(documents()):
                ids, byte_counts = tokenizer.encode_documents(batch)
                _require_ends(ids, len(batch), tokenizer)
                tokens_file.write(ids.astype(dtype).tobytes())
                byte_counts_file.write(byte_counts.tobytes())
                counts[name]["documents"] += len(batch)
                counts[name]["tokens"] += len(ids)
                counts[name]["bytes"] += int(byte_counts.sum(dtype=np.int64))
                bar.update(sum(map(len, batch)))
    if isinstance(tokenizer, tokenizers.FileTokenizer):
        (directory / "tokenizer.json").write_text(tokenizer.text, encoding="utf-8")
        if tokenizer.end_token:  # wherever both files are copied to, they say the same
            declared = json.dumps({"eos_token": tokenizer.end_token}) + "\n"
            (directory / "tokenizer_config.json").write_text(declared, encoding="utf-8")
    made = {"sha256": digest.hexdigest(), "tokenizer": tokenizer.name, "end_token": tokenizer.end_token}
    return {**made, "dtype": dtype.name, "splits": counts}


def _require_ends(ids: np.ndarray, documents: int, tokenizer: tokenizers.Tokenizer) -> None:
    """Check that the end token stands at the ends of documents and nowhere else."""
    ends = int(np.count_nonzero(ids == tokenizer.eos_id))
    if ends != documents:
        raise UserError(
            f"config.data.end_token: {tokenizer.name} gives {documents:,} documents {ends:,} ends (id {tokenizer.eos_id}):"
            " its end token also stands for text, perhaps for unknown characters; name another token"
        )


def _batches(documents: Iterable[bytes]) -> Iterator[list[bytes]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _split(corpus: corpora.Corpus, sizes: np.ndarray, fraction: float) -> dict[str, Callable[[], Iterator[bytes]]]:
    """The documents of a corpus that has no validation split of its own, as two; a lone document is cut."""
    documents = corpus.splits["train"]
    if not fraction:  # to be evaluated whole
        return {"train": documents, "validation": lambda: iter(())}
    if len(sizes) == 1:
        head, tail = _cut(next(documents()).decode(), fraction)
        if not head:
            raise UserError(f"config.data.corpus: {corpus.name} is too short: one document of {sizes[0]} bytes")
        return {"train": lambda: iter([head.encode()]), "validation": lambda: iter([tail.encode()])}
    held_out = _choose_validation(sizes, fraction)

    def those(held: bool) -> Iterator[bytes]:
        return (document for document, own in zip(documents(), held_out, strict=True) if own == held)

    return {"train": lambda: those(False), "validation": lambda: those(True)}


def _choose_validation(sizes: np.ndarray, fraction: float) -> np.ndarray:
    """Documents to hold out, drawn until `fraction` of the bytes is reached: bool [num_documents].

    A document larger than that share would be the whole split by itself, so it stays in training as long as there
    are others. At least one document is held out, and at least one is not.
    """
    target = fraction * sizes.sum()
    # One seed for all runs: models share one validation split. RandomState is frozen: numpy never changes its permutations.
    order = np.random.RandomState(0).permutation(len(sizes))
    order = order[sizes[order] <= target]
    if not len(order):
        order = np.argmin(sizes, keepdims=True)
    enough = int(np.searchsorted(np.cumsum(sizes[order]), target)) + 1
    chosen = np.zeros(len(sizes), bool)
    chosen[order[: min(enough, len(sizes) - 1)]] = True
    return chosen


def _cut(text: str, fraction: float) -> tuple[str, str]:
    """The last `fraction` of a text apart from the rest; a line is not broken if that holds out less than twice as much."""
    held_out = max(1, round(fraction * len(text)))
    at = len(text) - held_out
    at = text.rfind("\n", max(0, at - held_out), at) + 1 or at
    return text[:at], text[at:]


def require_length(tokens: Sized, context: int, batch_size: int = 1) -> None:
    """Check that a split, or its tokens, give at least one batch of windows of `context + 1` tokens.

    Raises:
        UserError: they do not.
    """
    windows = (len(tokens) - 1) // context
    if windows < batch_size:
        raise UserError(
            f"config.data.corpus: too short: {len(tokens):,} training tokens are {windows:,} windows of context {context:,},"
            f" and a batch takes {batch_size:,}; give more text, or lower config.context or config.batch_size"
        )


def train_loader(
    tokens: np.ndarray, context: int, batch_size: int, seed: int, weights: np.ndarray | None = None
) -> "grain.DatasetIterator[Batch]":
    """Endless batches of windows in an order drawn anew each epoch.

    Windows have `context + 1` tokens and step by `context`; a tail shorter than a window is left out. Where an epoch
    does not divide into batches, its last windows share a batch with the first of the next epoch.

    Args:
        tokens: ids [num_tokens]; a read-only memory map will do.
        context: predicted tokens a window.
        batch_size: windows a batch.
        seed: of the order; any integer.
        weights: see `Split`.

    Returns:
        A grain iterator over `Batch`es of int32 [batch_size, context]. `get_state()` gives a small dict that json
        can write; an iterator made with the same arguments goes on bit-equal after `set_state()`.

    Raises:
        UserError: there are fewer than `batch_size` windows.
    """
    import grain

    require_length(tokens, context, batch_size)

    def window(index: int) -> Batch:
        span = slice(index * context, (index + 1) * context + 1)
        counts = None if weights is None else np.array(weights[span][1:], np.float32)
        return Batch.of_windows(np.array(tokens[span], np.int32), counts)

    # Epoch e is shuffled with seed + e: nearby seeds would share their orders if they were not scattered first.
    scattered = int.from_bytes(hashlib.sha256(f"data order {seed}".encode()).digest()[:4], "big")
    windows = grain.MapDataset.range((len(tokens) - 1) // context).shuffle(seed=scattered).map(window).repeat()
    batches = windows.batch(batch_size, drop_remainder=True)
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


def evaluation_windows(
    tokens: np.ndarray,
    context: int,
    batch_size: int,
    limit_tokens: int = 0,
    weights: np.ndarray | None = None,
    stride: int = 0,
) -> Iterator[EvaluationBatch]:
    """Batches of fixed shape in which every token but the first of the stream is predicted exactly once, in order.

    Windows have `context + 1` tokens and step by `stride`: where that is less than the context, a window's first tokens
    were predicted by the ones before it, and have weight 0. The last window may be shorter, and the last batch may have
    fewer windows: both are padded, with weight 0.

    Args:
        tokens: ids [num_tokens]; a read-only memory map will do.
        context: predicted tokens a window.
        batch_size: windows a batch.
        limit_tokens: predict no more than the first so many; 0 for all.
        weights: see `Split`.
        stride: tokens between the starts of two windows, at most the context; 0: the context.

    Raises:
        UserError: there is no token to predict.
    """
    num_predicted, stride = predicted_tokens(len(tokens), limit_tokens), stride or context
    starts = range(0, max(num_predicted - context, 0) + stride, stride)
    done = 0
    for first in range(0, len(starts), batch_size):
        windows = np.zeros((batch_size, context + 1), np.int32)
        counts = np.zeros((batch_size, context), np.float32)
        before = done
        for row, start in enumerate(starts[first : first + batch_size]):
            stop = min(start + context, num_predicted)
            windows[row, : stop - start + 1] = tokens[start : stop + 1]
            counts[row, done - start : stop - start] = 1 if weights is None else weights[done + 1 : stop + 1]
            done = stop
        yield EvaluationBatch(windows, counts, slice(before + 1, done + 1))


def predicted_tokens(num_tokens: int, limit_tokens: int = 0) -> int:
    """How many tokens `evaluation_windows` predicts of a stream of `num_tokens`; a UserError where there are none."""
    if num_tokens < 2:
        raise UserError(f"config.data.corpus: {num_tokens} tokens are too few to evaluate on: at least 2 are needed")
    return min(num_tokens - 1, limit_tokens or num_tokens - 1)


def unigram_perplexity(data: TokenData) -> float:
    """Perplexity per token on the validation split of the token frequencies of the training split.

    Counts are smoothed by adding one. Like a model's, the figure covers every token but the first, and where tokens have
    weights, those of both splits count.
    """
    validation = data.split("validation")
    predicted_tokens(len(validation))
    train, counts = _histogram(data.split("train"), data.vocab_size), _histogram(validation, data.vocab_size, first=1)
    log_probabilities = np.log(train + 1.0) - math.log(train.sum() + data.vocab_size)
    return math.exp(-float(counts @ log_probabilities) / counts.sum())


def _histogram(split: Split, vocab_size: int, first: int = 0) -> np.ndarray:
    """How often each id stands in a split from token `first` on, [vocab_size]: the sum of weights where there are some."""
    counts = np.zeros(vocab_size, np.int64 if split.weights is None else np.float64)
    for start in range(first, len(split), _BATCH_BYTES):  # bincount makes 8 bytes of every token it looks at
        span = slice(start, start + _BATCH_BYTES)
        counts += np.bincount(split.tokens[span], None if split.weights is None else split.weights[span], vocab_size)
    return counts
