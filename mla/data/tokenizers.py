"""Tokenizers: raw bytes, a byte-level BPE trained on the corpus, or any `tokenizer.json`.

Every tokenizer also says how many UTF-8 bytes of the original text each of its tokens stands for, because bits per
byte is the only loss that can be compared across tokenizers.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers as library

from mla import paths
from mla.data import pieces
from mla.errors import UserError, nearest

# How published tokenizers name the token that ends a document, asked in this order; the first is our own.
_KNOWN_ENDS = (
    *("<|endoftext|>", "<|end_of_text|>", "</s>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "<eos>", "[EOS]", "<EOS>"),
    *("<EOS_TOKEN>", "<|return|>", "<|end|>", "<|eot_id|>", "<|im_end|>", "[SEP]"),
)
CONFIG_FILE = "tokenizer_config.json"
# Files beside a tokenizer.json that say which token ends a text, and where in them; asked in this order.
_DECLARED_ENDS = {
    CONFIG_FILE: "eos_token",
    "special_tokens_map.json": "eos_token",
    "generation_config.json": "eos_token_id",
}
_MOST_IDS = 2**31 - 1  # batches hold ids as int32
_RULES = "2"  # how a file's tokenizer is applied; part of its fingerprint
# Long documents are encoded in pieces of about so many characters, some at once, in parallel; see `mla.data.pieces`.
_PIECE_CHARS = 1 << 18
_PIECES_AT_ONCE = 16
Part = tuple[int, str | None]  # characters left out before it, and a piece of a document, or None where one ends


class ByteTokenizer:
    """One id per byte, 0 to 255, and 256 for the end of a document.

    Attributes:
        name: as in the config: `bytes`, `bpe:8192` or the path it came from.
        vocab_size: number of ids, `eos_id` included; ids are 0 .. vocab_size - 1.
        eos_id: the id that ends every document; it decodes to nothing.
        end_token: what `config.data.end_token` may call `eos_id`; empty where there is no choice.
        fingerprint: sha256 (hex) of everything that decides which ids a text gets.
    """

    name = "bytes"
    end_token = ""
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


class IdTokenizer:
    """Ids that stand for no text, as the tokens of a synthetic task; attributes as of `ByteTokenizer`.

    Args:
        size: number of ids.
    """

    end_token = ""
    eos_id = 0

    def __init__(self, size: int):
        self.vocab_size, self.name = size, f"ids:{size}"
        self.fingerprint = hashlib.sha256(self.name.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Raises UserError: there is no text in these ids."""
        raise UserError(f"config.data.tokenizer: {self.name}: ids of a task stand for no text")

    def decode(self, ids: Iterable[int]) -> str:
        """The ids as numbers."""
        return " ".join(str(int(i)) for i in ids)

    def encode_documents(self, documents: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Raises UserError: a text cannot become such ids."""
        raise UserError(f"config.data.tokenizer: {self.name} is for tasks, and config.data.corpus is text; take another")


class FileTokenizer:
    """A `tokenizer.json` of the Hugging Face `tokenizers` library; attributes and methods are those of `ByteTokenizer`.

    Truncation, padding, post-processing and dropout that the file may ask for are left out: every byte of a document must
    be tokenised once, and the same text must get the same ids. Special tokens in a text are text, and none of it becomes
    the token that ends documents, whatever the model would make of that token's name.

    Args:
        text: contents of the file.
        name: what to call it, in results and in error messages.
        end_token: the token that ends a document; empty: the first that is there of the names in common use, or else one id
            appended to the vocabulary.

    Attributes:
        end_token: as given.

    Raises:
        UserError: `text` is not a tokenizer.json, or has no such end token.
    """

    def __init__(self, text: str, name: str, end_token: str = ""):
        try:
            plain = json.loads(text) | {"truncation": None, "padding": None, "post_processor": None}
            if plain["model"].get("dropout"):
                plain["model"]["dropout"] = None
            ids = _vocabulary(plain)
            end = end_token or next((token for token in _KNOWN_ENDS if token in ids), "")
            if end in ids:
                _rename(plain, end, f"<end-of-document-{hashlib.sha256(text.encode()).hexdigest()}>")
            self._tokenizer = library.Tokenizer.from_str(json.dumps(plain))
            self._cuts = pieces.cuts(plain)
        except Exception as error:  # the library raises plain Exception, json ValueError, a list TypeError
            raise UserError(f"config.data.tokenizer: {name} is not a readable tokenizer.json ({error})") from error
        if end_token and (end_token not in ids or len(end_token) == 1):
            why = "stands for text" if end_token in ids else f"is no token of {name}; {nearest(end_token, ids)[:200]}"
            raise UserError(f"config.data.end_token: {end_token!r} {why}")
        # A document that quotes a special token does not contain it.
        self._tokenizer.encode_special_tokens = True
        self.name, self.text, self.end_token = name, text, end_token
        size = max(ids.values(), default=-1) + 1
        self.eos_id = ids.get(end, size)
        self.vocab_size = max(size, self.eos_id + 1)
        if self.vocab_size > _MOST_IDS:
            raise UserError(f"config.data.tokenizer: {name} has an id {size - 1}; ids are to stay below {_MOST_IDS - 1}")
        self.fingerprint = hashlib.sha256("\0".join([_RULES, end, text]).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without an end token. Raises UserError where the text has none."""
        texts = [piece for _, piece in self._cuts.pieces(text, _PIECE_CHARS)]
        try:
            return [i for piece in texts for i in self._tokenizer.encode(piece, add_special_tokens=False).ids]
        except Exception as error:  # of no kind of its own
            raise self._unknown(texts, error) from error

    def ids(self) -> dict[str, int]:
        """The id of each token of the file; the token that ends documents has the name it has there."""
        return _vocabulary(json.loads(self.text))

    def _unknown(self, texts: list[str], error: Exception) -> UserError:
        """The refusal of texts that the library cannot encode; names the first word that has no id."""
        text = next(filter(self._lacks, texts), "")
        lacking = next(filter(self._lacks, text.split()), text)
        return UserError(
            f"config.data.tokenizer: {self.name} has no id for {lacking[:40]!r}, and no token for what is unknown"
            f" ({error}); choose another tokenizer, or add that token to it"
        )

    def _lacks(self, text: str) -> bool:
        """Whether the library has no ids for a text."""
        try:
            self._tokenizer.encode(text, add_special_tokens=False)
        except Exception:
            return True
        return False

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids."""
        return self._tokenizer.decode([int(i) for i in ids if i != self.eos_id], skip_special_tokens=False)

    def encode_documents(self, documents: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """(ids, byte_counts) of documents in one stream, uint32, each document followed by `eos_id`.

        A token counts from the end of the token before it to its own end, so that bytes which the tokenizer drops or
        splits a character over are still counted once. Raises UserError where a document has no ids.
        """
        ids: list[np.ndarray] = []
        ends: list[np.ndarray] = []  # bytes from the start of the first document to where each token ends
        position = 0
        for parts in _together(self._parts(documents), _PIECE_CHARS * _PIECES_AT_ONCE):
            texts = [piece or "" for _, piece in parts]
            try:
                encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
            except Exception as error:  # of no kind of its own
                raise self._unknown(texts, error) from error
            for (skipped, piece), encoding in zip(parts, encodings, strict=True):
                if piece is None:
                    ids.append(np.array([self.eos_id], np.uint32))
                    ends.append(np.array([position]))
                else:
                    char_ends = position + skipped + _char_ends(piece)  # what is skipped is a space, of one byte
                    ids.append(np.array(encoding.ids, np.uint32))
                    ends.append(char_ends[[end for _, end in encoding.offsets]])
                    position = char_ends[-1]
        byte_counts = np.diff(np.maximum.accumulate(np.concatenate(ends)), prepend=0)
        return np.concatenate(ids), byte_counts.astype(np.uint32)

    def _parts(self, documents: Sequence[bytes]) -> Iterator[Part]:
        for document in documents:
            yield from self._cuts.pieces(document.decode(), _PIECE_CHARS)
            yield 0, None


Tokenizer = ByteTokenizer | FileTokenizer | IdTokenizer


def same_ids(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether the ids of two tokenizers stand for the same, whichever of them ends a document."""
    if isinstance(one, FileTokenizer) and isinstance(other, FileTokenizer):
        return one.text == other.text or one.ids() == other.ids()
    return one.fingerprint == other.fingerprint


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
    tokenizer.train_from_iterator((piece for text in texts for _, piece in pieces.LINES.pieces(text, _PIECE_CHARS)), trainer)
    tokenizer.add_special_tokens([_KNOWN_ENDS[0]])
    return FileTokenizer(tokenizer.to_str(), name=f"bpe:{vocab_size}")


def parse(name: str, end_token: str = "") -> Tokenizer | int:
    """Tokenizer that `config.data.tokenizer` names, or the size of a BPE that has yet to be trained.

    Args:
        name: `bytes`, `bpe:SIZE`, `ids:SIZE` for a task, or a path to a tokenizer.json or to the folder it is in.
        end_token: of a tokenizer.json: the token that ends a document. Empty: what tokenizer_config.json or
            generation_config.json beside it say, or else one of the names in common use.

    Raises:
        UserError: none of these, a size without a merge, a file that is no tokenizer.json, or an end token that it lacks.
    """
    if end_token and (name == ByteTokenizer.name or name.startswith(("bpe:", "ids:"))):
        raise UserError(f"config.data.end_token: {end_token!r}: {name} has an end of its own; leave it out")
    if name == ByteTokenizer.name:
        return ByteTokenizer()
    if name.startswith("bpe:"):
        if not re.fullmatch(r"\d{3,7}", name[4:]) or int(name[4:]) < 258:
            raise UserError(f"config.data.tokenizer: {name!r}: the size is a number from 258 on (bytes, an end, a merge)")
        return int(name[4:])
    if name.startswith("ids:"):
        if not re.fullmatch(r"\d{1,9}", name[4:]) or int(name[4:]) < 2:
            raise UserError(f"config.data.tokenizer: {name!r}: write ids:SIZE, with the number of ids that the task has")
        return IdTokenizer(int(name[4:]))
    path = Path(paths.expand(name, "config.data.tokenizer"))
    try:
        path = path / "tokenizer.json" if path.is_dir() else path
        there = path.is_file()
    except OSError as error:
        raise UserError(f"config.data.tokenizer: {name} cannot be read ({error.strerror})") from error
    if not there:
        known = nearest(name, ("bytes", "bpe:8192", "a path to a tokenizer.json"))
        raise UserError(f"config.data.tokenizer: unknown tokenizer {name!r}, no file at {path.absolute()}; {known}")
    return read(path, name, end_token)


def read(path: Path, name: str, end_token: str = "") -> FileTokenizer:
    """The tokenizer in a file, called `name`; its end token as for `parse`. Raises UserError."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"config.data.tokenizer: {path} cannot be read ({error.strerror})") from error
    return FileTokenizer(text, name, end_token or _declared_end(path.parent, text))


def _declared_end(folder: Path, text: str) -> str:
    """The end token that the files beside a tokenizer.json declare and that it has, or ''."""
    found = [(folder / file, field) for file, field in _DECLARED_ENDS.items() if (folder / file).is_file()]
    for path, field in found:
        try:
            declared = json.loads(path.read_text(encoding="utf-8")).get(field)
            ids = _vocabulary(json.loads(text))
        except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
            raise UserError(f"config.data.tokenizer: {path}, beside the tokenizer, cannot be read ({error})") from error
        names = {number: token for token, number in ids.items()}
        for entry in declared if isinstance(declared, list) else [declared]:
            entry = entry.get("content") if isinstance(entry, dict) else entry
            token = names.get(entry) if isinstance(entry, int) else entry
            if isinstance(token, str) and token in ids:
                if len(token) == 1:
                    raise UserError(
                        f"config.data.end_token: {token!r}, which {path} declares, stands for text; name another token"
                    )
                return token
    return ""


def _vocabulary(plain: dict[str, Any]) -> dict[str, int]:
    """Ids of all tokens in the content of a tokenizer.json."""
    held = plain["model"]["vocab"]
    ids = dict(held) if isinstance(held, dict) else {piece: number for number, (piece, _) in enumerate(held)}
    return {**ids, **{token["content"]: token["id"] for token in plain.get("added_tokens") or []}}


def _rename(plain: dict[str, Any], token: str, to: str) -> None:
    """Calls a token of a tokenizer.json's content otherwise, in place, so that no text becomes it; its id stays.

    Merges that would make it are left out.
    """
    model = plain["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {to if name == token else name: number for name, number in model["vocab"].items()}
    else:
        model["vocab"] = [[to if name == token else name, score] for name, score in model["vocab"]]
    if model.get("unk_token") == token:
        model["unk_token"] = to
    for added in plain.get("added_tokens") or []:
        if added["content"] == token:
            added |= {"content": to, "special": True}
    pairs = [(merge, merge.split(" ") if isinstance(merge, str) else merge) for merge in model.get("merges", [])]
    if "merges" in model:
        model["merges"] = [merge for merge, pair in pairs if token not in (*pair, "".join(pair))]


def _together(parts: Iterable[Part], chars: int) -> Iterator[list[Part]]:
    """Lists of successive parts, each of about so many characters in all; a longer part ends its list."""
    some, size = [], 0
    for part in parts:
        some.append(part)
        size += len(part[1] or "")
        if size >= chars:
            yield some
            some, size = [], 0
    if some:
        yield some


def _char_ends(text: str) -> np.ndarray:
    """Bytes before each character and, last, of all of them: int64 [len(text) + 1]."""
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    return np.concatenate([[0], np.cumsum(1 + (points > 0x7F) + (points > 0x7FF) + (points > 0xFFFF))])
