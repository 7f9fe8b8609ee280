"""Tokenizers: raw bytes, a byte-level BPE trained on the corpus, or any `tokenizer.json`.

Every tokenizer also says how many UTF-8 bytes of the original text each of its tokens stands for, because bits per
byte is the only loss that can be compared across tokenizers.
"""

import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from mla.errors import UserError

if TYPE_CHECKING:  # the compiled library is imported where it is used: raw bytes do not need it
    import tokenizers

END_OF_DOCUMENT = "<|endoftext|>"
TOKENIZER_FILE = "tokenizer.json"

# How published tokenizers name the token that ends a document, asked in this order.
_KNOWN_ENDS = (
    END_OF_DOCUMENT,
    "<|end_of_text|>",
    "</s>",
    "<|end▁of▁sentence|>",
    "<eos>",
    "[EOS]",
    "<|im_end|>",
    "[SEP]",
)
_FORMS = "bytes, bpe:8192 (any size), or a path to a tokenizer.json"
_PIECE_CHARS = 1 << 20
_MAX_TOKEN_BYTES = np.iinfo(np.uint16).max
_MAX_BPE_SIZE = 1 << 20


class Tokenizer(Protocol):
    """What the data pipeline, the trainer and the sampler need of a tokenizer.

    Attributes:
        name: as in the config: `bytes`, `bpe:8192` or the path it came from.
        vocab_size: number of ids, `eos_id` included; ids are 0 .. vocab_size - 1.
        eos_id: the id that ends every document; it stands for 0 bytes and decodes to nothing.
        fingerprint: sha256 (hex) of everything that decides which ids a text gets.
    """

    name: str
    vocab_size: int
    eos_id: int
    fingerprint: str

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without an end-of-document token. Text that looks like a special token stays text."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; end-of-document tokens vanish and broken UTF-8 becomes U+FFFD."""
        ...

    def encode_documents(self, documents: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of many documents in one stream, each document followed by `eos_id`.

        Args:
            documents: UTF-8 text, each valid on its own.

        Returns:
            `(ids, byte_counts)`, both 1-D and equally long; byte_counts (uint16) says how many bytes of the original
            text each id stands for, so that its sum over a document is the document's length in bytes.
        """
        ...

    def save(self, directory: Path) -> None:
        """Write what `load` needs into `directory`; nothing for raw bytes."""
        ...


class ByteTokenizer:
    """One id per byte, 0 to 255, and 256 for the end of a document."""

    name = "bytes"
    vocab_size = 257
    eos_id = 256
    fingerprint = hashlib.sha256(b"bytes 256 + end of document").hexdigest()

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer.encode`."""
        return list(text.encode("utf-8"))

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer.decode`."""
        return bytes(i for i in map(int, ids) if 0 <= i < 256).decode("utf-8", errors="replace")

    def encode_documents(self, documents: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """See `Tokenizer.encode_documents`; ids are uint16."""
        if not documents:
            return np.zeros(0, np.uint16), np.zeros(0, np.uint16)
        ids = np.frombuffer(b"\0".join(documents) + b"\0", np.uint8).astype(np.uint16)
        ends = np.cumsum([len(document) + 1 for document in documents]) - 1
        ids[ends] = self.eos_id
        byte_counts = np.ones(len(ids), np.uint16)
        byte_counts[ends] = 0
        return ids, byte_counts

    def save(self, directory: Path) -> None:
        """Raw bytes need no file."""


class FileTokenizer:
    """A `tokenizer.json` of the Hugging Face `tokenizers` library.

    Truncation, padding and post-processing that the file may ask for are left out: every byte of a document must be
    tokenised once. The end of a document is the file's own token for it, or one id appended to the vocabulary where
    the file has none.

    Args:
        text: contents of the file.
        name: what to call it, in results and in error messages.
        eos_id: the id that ends a document; None chooses it as said above.
        eos_token: the end token that a `tokenizer_config.json` beside the file names, if any.

    Raises:
        UserError: `text` is not a tokenizer.json.
    """

    def __init__(self, text: str, name: str, eos_id: int | None = None, eos_token: str | None = None):
        from tokenizers import Tokenizer as LibraryTokenizer

        try:
            plain = json.loads(text) | {"truncation": None, "padding": None, "post_processor": None}
            self._tokenizer = LibraryTokenizer.from_str(json.dumps(plain))
        except Exception as error:  # the library raises plain Exception, json ValueError, a list TypeError
            reason = " ".join(str(error).split())
            raise UserError(f"config.data.tokenizer: {name} is not a readable tokenizer.json ({reason})") from error
        # A document that quotes an end-of-document token must not end there.
        self._tokenizer.encode_special_tokens = True
        self._text = text
        self._library_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        if eos_id is None:
            known = (self._tokenizer.token_to_id(token) for token in (eos_token, *_KNOWN_ENDS) if token)
            eos_id = next((i for i in known if i is not None), self._library_size)
        self.name = name
        self.eos_id = eos_id
        self.vocab_size = max(self._library_size, eos_id + 1)
        self.fingerprint = hashlib.sha256(f"{eos_id}\n{text}".encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer.encode`."""
        pieces = self._tokenizer.encode_batch(list(_pieces(text)), add_special_tokens=False)
        return [i for piece in pieces for i in piece.ids]

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer.decode`."""
        kept = [i for i in map(int, ids) if i != self.eos_id and 0 <= i < self._library_size]
        return self._tokenizer.decode(kept, skip_special_tokens=False)

    def encode_documents(self, documents: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """See `Tokenizer.encode_documents`; ids are uint32.

        A token counts from the end of the token before it to its own end, so that bytes which the tokenizer drops or
        splits a character over are still counted once.

        Raises:
            UserError: one token stands for more than 65,535 bytes.
        """
        texts = [list(_pieces(document.decode("utf-8"))) for document in documents]
        flat = [piece for pieces in texts for piece in pieces]
        encodings = iter(self._tokenizer.encode_batch(flat, add_special_tokens=False))
        ids: list[np.ndarray] = []
        counts: list[np.ndarray] = []
        for pieces in texts:
            dropped, in_document = 0, []
            for piece in pieces:
                encoding = next(encodings)
                ends, num_bytes = _byte_ends(piece, encoding)
                if not len(ends):
                    dropped += num_bytes  # the next token's, or the last one's
                    continue
                ends += dropped
                ends[-1] = dropped + num_bytes
                dropped = 0
                in_document.append(np.diff(ends, prepend=0))
                ids.append(np.asarray(encoding.ids, np.uint32))
            if in_document:
                in_document[-1][-1] += dropped
                dropped = 0
            ids.append(np.asarray([self.eos_id], np.uint32))
            # Only in a document without any token does its end stand for bytes.
            counts += [*in_document, np.asarray([dropped])]
        if not ids:
            return np.zeros(0, np.uint32), np.zeros(0, np.uint16)
        byte_counts = np.concatenate(counts)
        if byte_counts.max() > _MAX_TOKEN_BYTES:
            raise UserError(
                f"config.data.tokenizer: {self.name} turns {byte_counts.max():,} bytes into one token; bits per byte "
                "would mean nothing: use a byte-level tokenizer such as bytes or bpe:8192"
            )
        return np.concatenate(ids), byte_counts.astype(np.uint16)

    def save(self, directory: Path) -> None:
        """Write tokenizer.json, as it was read, into `directory`."""
        (directory / TOKENIZER_FILE).write_text(self._text, encoding="utf-8")


def train_bpe(texts: Iterable[str], vocab_size: int) -> FileTokenizer:
    """Train a byte-level BPE (GPT-2's pre-tokenisation); the same texts give the same tokenizer.

    Args:
        texts: training documents.
        vocab_size: ids in all, of which 256 are bytes and the last ends a document. A small corpus may hold fewer
            different pairs than that; the tokenizer then has fewer ids.
    """
    from tokenizers import Tokenizer as LibraryTokenizer
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = LibraryTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator((piece for text in texts for piece in _pieces(text)), trainer)
    tokenizer.add_special_tokens([END_OF_DOCUMENT])
    return FileTokenizer(tokenizer.to_str(), name=f"bpe:{vocab_size}")


def parse(name: str) -> Tokenizer | int:
    """Tokenizer that `config.data.tokenizer` names, or the size of a BPE that has yet to be trained.

    Args:
        name: `bytes`, `bpe:SIZE`, or a path to a tokenizer.json or to the folder that holds one.

    Raises:
        UserError: none of these, a size out of range, or a file that is missing or not a tokenizer.json.
    """
    if name == ByteTokenizer.name:
        return ByteTokenizer()
    if name == "bpe" or name.startswith("bpe:"):
        return _bpe_size(name)
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        path = path / TOKENIZER_FILE
    if path.is_file():
        return _read(path, name)
    if name.endswith(".json") or os.sep in name:
        raise UserError(f"config.data.tokenizer: no file at {path}; use {_FORMS}")
    near = difflib.get_close_matches(name.lower(), ("bytes", "bpe:8192"), n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(f"config.data.tokenizer: unknown tokenizer {name!r}; {hint}use {_FORMS}")


def load(directory: Path, name: str, eos_id: int) -> Tokenizer:
    """Tokenizer that `save` wrote into `directory`."""
    if name == ByteTokenizer.name:
        return ByteTokenizer()
    return FileTokenizer((directory / TOKENIZER_FILE).read_text(encoding="utf-8"), name, eos_id=eos_id)


def _bpe_size(name: str) -> int:
    match = re.fullmatch(r"bpe:(\d{1,9})", name)
    size = int(match.group(1)) if match else 0
    if not ByteTokenizer.vocab_size < size <= _MAX_BPE_SIZE:
        raise UserError(
            f"config.data.tokenizer: {name!r} is not bpe:SIZE with a size from {ByteTokenizer.vocab_size + 1} "
            f"(256 bytes, the end of a document and one merge) to {_MAX_BPE_SIZE}; for example bpe:8192"
        )
    return size


def _read(path: Path, name: str) -> FileTokenizer:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config.data.tokenizer: {path} cannot be read: {error}") from error
    eos_token = None
    try:
        settings = json.loads((path.parent / "tokenizer_config.json").read_text(encoding="utf-8"))
        eos_token = settings.get("eos_token")
        eos_token = eos_token.get("content") if isinstance(eos_token, dict) else eos_token
    except (OSError, ValueError, AttributeError):
        pass  # the file beside it is optional, and only a hint
    return FileTokenizer(text, name, eos_token=eos_token if isinstance(eos_token, str) else None)


def _pieces(text: str) -> Iterator[str]:
    """Cut a very long text at line ends: the library holds about a hundred bytes a token while it encodes."""
    start = 0
    while len(text) - start > _PIECE_CHARS:
        stop = text.rfind("\n", start, start + _PIECE_CHARS) + 1
        if stop <= start:
            stop = start + _PIECE_CHARS
        yield text[start:stop]
        start = stop
    yield text[start:] if start else text


def _byte_ends(text: str, encoding: "tokenizers.Encoding") -> tuple[np.ndarray, int]:
    """Byte position where each token ends, never decreasing, and the length of `text` in bytes."""
    ends = np.fromiter((end for _, end in encoding.offsets), np.int64, len(encoding))
    if text.isascii():
        num_bytes = len(text)
    else:
        points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        lengths = 1 + (points > 0x7F) + (points > 0x7FF) + (points > 0xFFFF)
        starts = np.concatenate([[0], np.cumsum(lengths)])
        ends = starts[ends]
        num_bytes = int(starts[-1])
    return np.maximum.accumulate(ends) if len(ends) else ends, num_bytes
