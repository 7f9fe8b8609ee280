"""Tokenizers: raw bytes, a byte-level BPE trained on the corpus, or any `tokenizer.json`.

Every tokenizer also says how many UTF-8 bytes of the original text each of its tokens stands for, because bits per
byte is the only loss that can be compared across tokenizers.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import tokenizers as library

from mla.errors import UserError, nearest

# How published tokenizers name the token that ends a document, asked in this order; the first is our own.
_KNOWN_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<|end▁of▁sentence|>", "<eos>", "[EOS]", "<|im_end|>", "[SEP]")
# The library holds about a hundred bytes a token while it encodes: long documents go through it in pieces, some at once.
_PIECE_CHARS = 1 << 18
_PIECES_AT_ONCE = 64


class ByteTokenizer:
    """One id per byte, 0 to 255, and 256 for the end of a document.

    Attributes:
        name: as in the config: `bytes`, `bpe:8192` or the path it came from.
        vocab_size: number of ids, `eos_id` included; ids are 0 .. vocab_size - 1.
        eos_id: the id that ends every document; it decodes to nothing.
        fingerprint: sha256 (hex) of everything that decides which ids a text gets.
    """

    name = "bytes"
    vocab_size = 257
    eos_id = 256
    fingerprint = hashlib.sha256(b"bytes 256 + end of document").hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without an end-of-document token. Text that looks like a special token stays text."""
        return list(text.encode())

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; end-of-document tokens vanish and broken UTF-8 becomes U+FFFD."""
        return bytes(int(i) for i in ids if i != self.eos_id).decode(errors="replace")

    def encode_documents(self, documents: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of at least one document in one stream, each document followed by `eos_id`.

        Args:
            documents: UTF-8 text, each valid on its own.

        Returns:
            `(ids, byte_counts)`, both uint32, 1-D and equally long; byte_counts says how many bytes of the original text
            each id stands for, so that its sum over a document, its end token included, is the document's length in
            bytes. The end token stands for 0 bytes unless the tokenizer drops the end of the text.
        """
        ids = np.frombuffer(b"\0".join(documents) + b"\0", np.uint8).astype(np.uint32)
        ends = np.cumsum([len(document) + 1 for document in documents]) - 1
        ids[ends] = self.eos_id
        byte_counts = np.ones(len(ids), np.uint32)
        byte_counts[ends] = 0
        return ids, byte_counts


class FileTokenizer:
    """A `tokenizer.json` of the Hugging Face `tokenizers` library; attributes and methods are those of `ByteTokenizer`.

    Truncation, padding and post-processing that the file may ask for are left out: every byte of a document must be
    tokenised once. The end of a document is the file's own token for it, or one id appended to the vocabulary where
    the file has none.

    Args:
        text: contents of the file.
        name: what to call it, in results and in error messages.

    Raises:
        UserError: `text` is not a tokenizer.json.
    """

    def __init__(self, text: str, name: str):
        try:
            plain = json.loads(text) | {"truncation": None, "padding": None, "post_processor": None}
            self._tokenizer = library.Tokenizer.from_str(json.dumps(plain))
        except Exception as error:  # the library raises plain Exception, json ValueError, a list TypeError
            raise UserError(f"config.data.tokenizer: {name} is not a readable tokenizer.json ({error})") from error
        # A document that quotes an end-of-document token must not end there.
        self._tokenizer.encode_special_tokens = True
        self.name = name
        self.text = text
        ids = self._tokenizer.get_vocab()
        size = max(ids.values(), default=-1) + 1
        self.eos_id = next((ids[token] for token in _KNOWN_ENDS if token in ids), size)
        self.vocab_size = max(size, self.eos_id + 1)
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """See `ByteTokenizer.encode`."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """See `ByteTokenizer.decode`."""
        return self._tokenizer.decode([int(i) for i in ids if i != self.eos_id], skip_special_tokens=False)

    def encode_documents(self, documents: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """See `ByteTokenizer.encode_documents`.

        A token counts from the end of the token before it to its own end, so that bytes which the tokenizer drops or
        splits a character over are still counted once.
        """
        pieces: list[str | None] = []
        for document in documents:
            pieces += [*_pieces(document.decode()), None]  # None: the document ends
        ids: list[np.ndarray] = []
        ends: list[np.ndarray] = []  # bytes from the start of the first document to where each token ends
        position = 0
        for start in range(0, len(pieces), _PIECES_AT_ONCE):
            some = pieces[start : start + _PIECES_AT_ONCE]
            encodings = self._tokenizer.encode_batch([piece or "" for piece in some], add_special_tokens=False)
            for piece, encoding in zip(some, encodings, strict=True):
                if piece is None:
                    ids.append(np.array([self.eos_id], np.uint32))
                    ends.append(np.array([position]))
                else:
                    char_ends = position + _char_ends(piece)
                    ids.append(np.array(encoding.ids, np.uint32))
                    ends.append(char_ends[[end for _, end in encoding.offsets]])
                    position = char_ends[-1]
        byte_counts = np.diff(np.maximum.accumulate(np.concatenate(ends)), prepend=0)
        return np.concatenate(ids), byte_counts.astype(np.uint32)


Tokenizer = ByteTokenizer | FileTokenizer


def train_bpe(texts: Iterable[str], vocab_size: int) -> FileTokenizer:
    """Train a byte-level BPE (GPT-2's pre-tokenisation); the same texts give the same tokenizer.

    Args:
        texts: training documents.
        vocab_size: ids in all, of which 256 are bytes and the last ends a document. A small corpus may hold fewer
            different pairs than that; the tokenizer then has fewer ids.
    """
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    trainer = library.trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator((piece for text in texts for piece in _pieces(text)), trainer)
    tokenizer.add_special_tokens([_KNOWN_ENDS[0]])
    return FileTokenizer(tokenizer.to_str(), name=f"bpe:{vocab_size}")


def parse(name: str) -> Tokenizer | int:
    """Tokenizer that `config.data.tokenizer` names, or the size of a BPE that has yet to be trained.

    Args:
        name: `bytes`, `bpe:SIZE`, or a path to a tokenizer.json.

    Raises:
        UserError: none of these, a size without a merge, or a file that is no tokenizer.json.
    """
    if name == ByteTokenizer.name:
        return ByteTokenizer()
    if name.startswith("bpe:"):
        if not re.fullmatch(r"\d{3,7}", name[4:]) or int(name[4:]) < 258:
            raise UserError(f"config.data.tokenizer: {name!r}: the size is a number from 258 on (bytes, an end, a merge)")
        return int(name[4:])
    path = Path(name).expanduser()
    if path.is_file():
        return FileTokenizer(path.read_text(encoding="utf-8", errors="replace"), name)
    known = nearest(name, ("bytes", "bpe:8192", "a path to a tokenizer.json"))
    raise UserError(f"config.data.tokenizer: unknown tokenizer {name!r}; {known}")


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > _PIECE_CHARS:
        stop = text.rfind("\n", start, start + _PIECE_CHARS) + 1 or start + _PIECE_CHARS
        yield text[start:stop]
        start = stop
    yield text[start:]


def _char_ends(text: str) -> np.ndarray:
    """Bytes before each character and, last, of all of them: int64 [len(text) + 1]."""
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    return np.concatenate([[0], np.cumsum(1 + (points > 0x7F) + (points > 0x7FF) + (points > 0xFFFF))])
