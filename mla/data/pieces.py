"""Where a long text can be cut so that its pieces, tokenised one by one, give the ids of the whole text.

The library holds about 150 bytes a character while it encodes, so a long text goes through in pieces. A cut is harmless
where the tokenizer never lets the two characters beside it meet. What is known of `tokenizer.json` components decides:

word   between a letter and the single space before the next word, `cat| sat`: GPT-2's and GPT-4's kind of regular
       expressions, Metaspace, BERT and whitespace splitting all begin a new word there. The right piece begins with its own
       space, so what puts a space before a text (`add_prefix_space`, Metaspace) finds one and adds none.
line   also between a letter or Chinese character and the line feed after it, for those that put no space before a text.
joint  for BPE without words (Llama 2, Mistral, Gemma): as `word`, provided that no token of the vocabulary joins a letter
       with a space to its right; then no merge crosses. With the normalizer `Prepend` the right piece leaves out the
       space, which `Prepend` writes again.

Everything else (unknown expressions, normalizers that look at the ends of a text, Unigram without words, added tokens that
reach across a space, ..) is encoded whole: the ids are right, and memory grows with the longest document.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

_WORD = re.compile(r"[A-Za-z](?= [A-Za-z])")
_LINE = re.compile(r"[A-Za-z](?= [A-Za-z])|[A-Za-z\u4e00-\u9fa5](?=\n)")

# Normalizers that change characters, or a character with its combining marks, and look no further.
_LOCAL = ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Nmt", "BertNormalizer", "Precompiled")
# Pre-tokenizers that begin a new piece at every whitespace; and those that split at digits and punctuation alone.
_AT_SPACES = ("Whitespace", "WhitespaceSplit", "BertPreTokenizer")
_NEUTRAL = ("Digits", "Punctuation")
_NEUTRAL_PATTERNS = (r"\p{N}{1,3}", r"[一-龥぀-ゟ゠-ヿ]+", r"[0-9][0-9][0-9]")

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_OTHER = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"


def _cased(upper: str, lower: str, contraction: str) -> str:
    start = r"[^\r\n\p{L}\p{N}]?"
    return f"{start}[{upper}]*[{lower}]+{contraction}|{start}[{upper}]+[{lower}]*{contraction}"


_HAN = r"&&[^\p{Han}]"
_DEEPSEEK = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+"""
# Regular expressions of published tokenizers, read one by one: each matches from left to right and never looks back, ends
# a word before a space or a line feed, and lets a single space, or none, begin the next word.
_WORD_PATTERNS = {
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",  # GPT-2
    *(  # GPT-4, Llama 3, Qwen 2 and 3
        rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}|{_OTHER}"
        for digits in (r"\p{N}", r"\p{N}{1,3}", r"\p{N}+")
    ),
    *(
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
        for digits in (r"\p{N}", r"\p{N}{1,3}")
    ),
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+",
    *(  # GPT-4o and gpt-oss, and without contractions
        rf"{_cased(_UPPER, _LOWER, contraction)}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        for contraction in (f"{_CONTRACTION}?", "")
        for digits in (r"\p{N}", r"\p{N}{1,3}")
    ),
    rf"[\p{{Han}}]+|{_cased(_UPPER + _HAN, _LOWER + _HAN, f'{_CONTRACTION}?')}|\p{{N}}{{1,3}}|{_OTHER}",  # Kimi
    _DEEPSEEK + r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    _DEEPSEEK + r"|[\r\n]|\s+(?!\S)|\s+",
    r" ?[^(\s|[.,!?…。，、।۔،])]+",  # BLOOM
}


@dataclasses.dataclass(frozen=True)
class Cuts:
    """Where texts of one tokenizer may be cut.

    Attributes:
        pattern: a text may be cut where a match ends; None: nowhere.
        skip: characters left out after a cut because the tokenizer writes them anew.
    """

    pattern: re.Pattern[str] | None
    skip: int = 0

    def pieces(self, text: str, size: int) -> Iterator[tuple[int, str]]:
        """(characters left out before it, piece) of about `size` characters each, longer where there is no cut before."""
        start = skipped = 0
        while self.pattern is not None and len(text) - start > size:
            stop = self._last(text, start, start + size)
            if stop is None:
                match = self.pattern.search(text, start + size)
                if match is None:
                    break
                stop = match.end()
            yield skipped, text[start:stop]
            start, skipped = stop + self.skip, self.skip
        yield skipped, text[start:]

    def _last(self, text: str, start: int, stop: int) -> int | None:
        """The last cut in a stretch of text, which is searched from its end in longer and longer parts."""
        assert self.pattern is not None
        for reach in (1 << 10, 1 << 14, stop - start):
            ends = [match.end() for match in self.pattern.finditer(text, max(start, stop - reach), stop + 2)]
            ends = [end for end in ends if start < end <= stop]
            if ends:
                return ends[-1]
        return None


class Lines:
    """Cuts after a line's end, wherever it is: good enough to train a tokenizer by, where a few words do not matter."""

    def pieces(self, text: str, size: int) -> Iterator[tuple[int, str]]:
        """See `Cuts.pieces`."""
        start = 0
        while len(text) - start > size:
            stop = text.rfind("\n", start, start + size) + 1 or start + size
            yield 0, text[start:stop]
            start = stop
        yield 0, text[start:]


NOWHERE = Cuts(None)
LINES = Lines()


def cuts(tokenizer: dict[str, Any]) -> Cuts:
    """Where a text may be cut for the content of a tokenizer.json, whose special tokens are read as text."""
    space, prefix = " ", ""
    for node in _sequence(tokenizer.get("normalizer"), "normalizers"):
        kind, pattern = node.get("type"), node.get("pattern", {})
        literal = pattern.get("String", "")
        if kind == "Prepend" and space == " " and not prefix:
            prefix = node["prepend"]
        elif kind == "Replace" and literal == " " and len(node["content"]) == 1:
            space = node["content"]
        elif kind == "Replace" and (pattern.get("Regex") == " {2,}" or re.fullmatch(r"[^A-Za-z\s\u4e00-\u9fa5]+", literal)):
            pass
        elif kind not in _LOCAL and not (kind == "Strip" and not node["strip_left"]):
            return NOWHERE
    words = _splits(_sequence(tokenizer.get("pre_tokenizer"), "pretokenizers"), space)
    found = words if isinstance(words, Cuts) else _joint(tokenizer["model"], words, prefix)
    if prefix and not found.skip:
        return NOWHERE
    added = [token for token in tokenizer.get("added_tokens") or [] if not token["special"]]
    reaches = any(
        token["lstrip"] or token["rstrip"] or re.search(r"[A-Za-z\u4e00-\u9fa5][ \n▁]", token["content"]) for token in added
    )
    return NOWHERE if reaches or (found.skip and added) else found


def _sequence(node: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, nested ones in one list."""
    if node is None:
        return []
    return [step for part in node[key] for step in _sequence(part, key)] if node.get("type") == "Sequence" else [node]


def _splits(steps: list[dict[str, Any]], space: str) -> Cuts | str:
    """Cuts where the pre-tokenizer splits by itself; or else the character that stands for a space, '' if unknown."""
    for step in steps:
        kind, pattern = step.get("type"), step.get("pattern", {})
        regex = pattern.get("Regex", "").replace("\r", r"\r").replace("\n", r"\n")
        if kind == "Metaspace" and space == " ":
            if step.get("split", True):
                return Cuts(_WORD)
            space = step["replacement"]
        elif kind in _NEUTRAL or (kind == "Split" and regex in _NEUTRAL_PATTERNS):
            continue
        elif kind == "Split" and space != " " and " " in (regex, pattern.get("String")):
            continue  # no space is left to split at
        elif space != " ":
            return ""
        elif kind in _AT_SPACES or (kind == "ByteLevel" and step.get("use_regex", True)):
            return Cuts(_WORD if step.get("add_prefix_space") else _LINE)
        elif kind == "Split" and regex in _WORD_PATTERNS:
            whole = (step["behavior"], step["invert"]) in (("Isolated", False), ("Removed", True))
            return Cuts(_LINE) if whole else ""
        else:
            return ""
    return space


def _joint(model: dict[str, Any], space: str, prefix: str) -> Cuts:
    """Cuts for a model that gets text with spaces inside, where `space` stands for one."""
    vocabulary = model.get("vocab", {})
    if "merges" not in model or not space or space not in vocabulary:  # only BPE has merges
        return NOWHERE
    if any(model.get(field) for field in ("ignore_merges", "continuing_subword_prefix", "end_of_word_suffix")):
        return NOWHERE
    if any(re.search(f"[A-Za-z]{re.escape(space)}", token) for token in vocabulary):
        return NOWHERE
    if prefix:
        return Cuts(_WORD, skip=1) if prefix == space else NOWHERE
    return Cuts(_WORD)
