"""A string is read and said again: backwards, forwards, or from an n-gram on. What should have been said is read.

    palindrome      s SEP reversed(s)
    copy            BEGIN s SEP s END
    ngram_lookup    BEGIN s SEP g answer      or, the n-gram first:      BEGIN g SEP s SEP answer

Legend: N episodes, T tokens of each, n letters of s.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from mla.data.tasks.contract import Episodes, Reading, Task
from mla.errors import nearest


@dataclasses.dataclass(frozen=True)
class Palindrome(Task):
    """The string before the separator, backwards. T = 2n + 1; an even T has a blank at its end.

    Floor: n x log2(alphabet) bits
    Window: a share of window / 2n, the end of the string; all from 2n - 1 on
    Source: Kimi Linear, 2510.26692; its alphabet is not given
    """

    name: ClassVar[str] = "palindrome"

    alphabet: int = 64  # letters, ids from 0; SEP and BLANK follow

    @property
    def vocab_size(self) -> int:
        return self.alphabet + 2

    @property
    def answers(self) -> range:
        return range(self.alphabet)

    @property
    def letters(self) -> int:
        """n."""
        return (self.length - 1) // 2

    def check(self) -> None:
        self.need_at_least(3, "length")
        self.need_at_least(2, "alphabet")

    def floor_bytes(self) -> float:
        return self.letters * math.log2(self.alphabet) / 8

    def generate(self, random: np.random.Generator, count: int) -> Episodes:
        n = self.letters
        string = random.integers(self.alphabet, size=(count, n))
        tokens = np.full((count, self.length), self.alphabet + 1)
        tokens[:, :n], tokens[:, n], tokens[:, n + 1 : 2 * n + 1] = string, self.alphabet, string[:, ::-1]
        return Episodes.asked(tokens, np.arange(n, 2 * n), string[:, ::-1], np.arange(n)[::-1])

    def read(self, tokens: Sequence[int]) -> Mapping[int, Reading]:
        n = tokens.index(self.alphabet)
        return {n + j: Reading(tokens[n - 1 - j], n - 1 - j) for j in range(n)}


@dataclasses.dataclass(frozen=True)
class Copy(Task):
    """The string before the separator, and the mark of its end. The longest string has (T - 2) / 2 letters; padding follows.

    Floor: n x log2(alphabet) bits of the longest string
    Window: nothing below the length of the string, everything from there on
    Source: 2402.01032, as its code evaluates: one string an episode
    """

    name: ClassVar[str] = "copy"

    alphabet: int = 26  # letters, ids from 0; END, BEGIN, SEP and PAD follow
    shortest: int = 0  # letters, lengths are uniform from here to the longest; 0: all are the longest

    @property
    def vocab_size(self) -> int:
        return self.alphabet + 4

    @property
    def answers(self) -> range:
        return range(self.alphabet + 1)

    @property
    def longest(self) -> int:
        """The letters of the longest string."""
        return (self.length - 2) // 2

    def check(self) -> None:
        self.need_at_least(4, "length")
        self.need_at_least(2, "alphabet")
        self.need(
            self.shortest <= self.longest,
            f"shortest={self.shortest} is more than the {self.longest} letters for which length={self.length} has room",
        )

    def floor_bytes(self) -> float:
        return self.longest * math.log2(self.alphabet) / 8

    def generate(self, random: np.random.Generator, count: int) -> Episodes:
        end, begin, separator, pad = range(self.alphabet, self.alphabet + 4)
        string = random.integers(self.alphabet, size=(count, self.longest))
        n = random.integers(self.shortest or self.longest, self.longest + 1, size=(count, 1))
        place = np.broadcast_to(np.arange(self.length + 1), (count, self.length + 1))
        # place within the string, of its first and then of its second writing
        letter = np.where(place <= n, place - 1, place - n - 2)
        inside = (letter >= 0) & (letter < n)
        whole = np.where(inside, np.take_along_axis(string, np.clip(letter, 0, self.longest - 1), 1), pad)
        whole[:, 0] = begin
        for mark, where in ((separator, n + 1), (end, 2 * n + 2)):
            np.put_along_axis(whole, where, mark, 1)
        positions = place[:, :-1]
        asked = (positions > n) & (positions <= 2 * n + 1)
        return Episodes.asked(whole[:, :-1], positions, whole[:, 1:], positions - n, asked)

    def read(self, tokens: Sequence[int]) -> Mapping[int, Reading]:
        n = tokens.index(self.alphabet + 2) - 1
        said = {n + 1 + j: Reading(tokens[1 + j], 1 + j) for j in range(n)}
        return said | {2 * n + 1: Reading(self.alphabet, n + 1)}


@dataclasses.dataclass(frozen=True)
class NgramLookup(Task):
    """What follows an n-gram that occurs once in a string. `suffix`: it is asked after the string, `prefix`: before it.

    Floor: suffix: n x log2(alphabet) bits; prefix: answer x log2(alphabet) bits
    Window: suffix: n-grams near the end of the string
    Source: 2402.01032; with a fixed number of letters and no mark of the end
    """

    name: ClassVar[str] = "ngram_lookup"

    alphabet: int = 26  # letters, ids from 0; SEP and BEGIN follow
    ngram: int = 3  # letters that are asked for
    answer: int = 8  # letters that follow
    form: str = "suffix"

    @property
    def vocab_size(self) -> int:
        return self.alphabet + 2

    @property
    def answers(self) -> range:
        return range(self.alphabet)

    @property
    def letters(self) -> int:
        """n."""
        return self.length - self.ngram - self.answer - (2 if self.form == "prefix" else 1)

    def check(self) -> None:
        forms = ("suffix", "prefix")
        self.need(self.form in forms, f"form={self.form!r} is not known; {nearest(self.form, forms)}")
        self.need_at_least(2, "alphabet")
        self.need_at_least(1, "ngram", "answer")
        self.need(
            self.ngram * math.log2(self.alphabet) < 63,
            f"ngram={self.ngram} is too large for alphabet={self.alphabet}: there must be less than 2**63 of them",
        )
        least = self.length - self.letters + self.ngram + self.answer
        self.need(
            self.letters >= self.ngram + self.answer,
            f"length={self.length} has no room for ngram={self.ngram} and answer={self.answer}; it must be at least {least}",
        )
        self.need(
            self.letters <= self.alphabet**self.ngram,
            f"ngram={self.ngram} is too small: few are unique in {self.letters} letters of alphabet={self.alphabet}",
        )

    def floor_bytes(self) -> float:
        return (self.answer if self.form == "prefix" else self.letters) * math.log2(self.alphabet) / 8

    def generate(self, random: np.random.Generator, count: int) -> Episodes:
        string, start = self._strings(random, count)
        separator, begin = (np.full((count, 1), self.alphabet + mark) for mark in range(2))
        ngram = np.take_along_axis(string, start + np.arange(self.ngram), 1)
        following = start + self.ngram + np.arange(self.answer)
        answer = np.take_along_axis(string, following, 1)
        if self.form == "prefix":
            parts, before = [begin, ngram, separator, string, separator, answer], self.ngram + 2
        else:
            parts, before = [begin, string, separator, ngram, answer], 1
        positions = np.arange(self.length - self.answer, self.length)
        return Episodes.asked(np.concatenate(parts, 1)[:, :-1], positions, answer, before + following)

    def _strings(self, random: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Strings [N, n], and where a unique n-gram starts in each that leaves room for an answer, [N, 1]."""
        string = random.integers(self.alphabet, size=(count, self.letters))
        grams = np.lib.stride_tricks.sliding_window_view(string, self.ngram, axis=1)
        codes = grams @ self.alphabet ** np.arange(self.ngram)
        order = np.argsort(codes, axis=1)
        equal = np.diff(np.take_along_axis(codes, order, 1), axis=1) == 0
        edge = np.zeros((count, 1), bool)
        unique = np.empty(codes.shape, bool)
        np.put_along_axis(unique, order, ~(np.hstack([edge, equal]) | np.hstack([equal, edge])), 1)
        free = unique[:, : self.letters - self.ngram - self.answer + 1]
        start = np.argmax(free * (1 + random.random(free.shape)), axis=1)[:, None]
        if (none := ~free.any(axis=1)).any():
            string[none], start[none] = self._strings(random, int(none.sum()))
        return string, start

    def read(self, tokens: Sequence[int]) -> Mapping[int, Reading]:
        separator, asked = self.alphabet, self.length - self.answer  # the first answer follows this position
        if self.form == "prefix":
            first = self.ngram + 2
            wanted, last = tokens[1 : first - 1], asked
        else:
            first, last = 1, tokens.index(separator)
            wanted = tokens[last + 1 : last + 1 + self.ngram]
        at = next(i for i in range(first, last) if tokens[i : i + self.ngram] == wanted) + self.ngram
        return {asked + j: Reading(tokens[at + j], at + j) for j in range(self.answer)}
