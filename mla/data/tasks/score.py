"""How well episodes were answered. Legend: N episodes, T tokens of each, Q answers of each."""

from __future__ import annotations

from typing import TypedDict

import numpy as np

from mla.data.tasks.contract import Episodes


class Part(TypedDict):
    """Some of the answers: the share that was right, and how many there are."""

    accuracy: float
    answers: int


class Score(TypedDict):
    """Plain numbers, ready for JSON.

    Attributes:
      accuracy: share of all answers that was right.
      exact: share of episodes all of whose answers were right.
      answers, episodes: how many there are; episodes without a question are left out.
      by_distance: largest distance of a part, a power of two, -> that part; each begins where the one below ends.
      by_answer: the first answers of all episodes, the second ones, and so on, as far as any episode goes.
    """

    accuracy: float
    exact: float
    answers: int
    episodes: int
    by_distance: dict[str, Part]
    by_answer: list[Part]


def score(episodes: Episodes, predicted: np.ndarray) -> Score:
    """The score of ids int [N, T], of which only those at questions are looked at.

    Raises:
      ValueError: no question is asked in any of the episodes.
    """
    asked = episodes.weights > 0
    if not asked.any():
        raise ValueError("no answer to score")
    wrong = asked & (predicted != episodes.targets)
    right = ~wrong[asked]
    with_questions = asked.any(axis=1)
    edges = 2 ** np.ceil(np.log2(np.maximum(episodes.distances[asked], 1))).astype(int)
    turns = (np.cumsum(asked, axis=1) - 1)[asked]
    return Score(
        accuracy=float(right.mean()),
        exact=float(1 - wrong.any(axis=1)[with_questions].mean()),
        answers=int(asked.sum()),
        episodes=int(with_questions.sum()),
        by_distance={str(edge): _part(right[edges == edge]) for edge in np.unique(edges).tolist()},
        by_answer=[_part(right[turns == turn]) for turn in range(int(turns.max()) + 1)],
    )


def _part(right: np.ndarray) -> Part:
    return Part(accuracy=float(right.mean()), answers=right.size)


def reach(episodes: Episodes, window: int) -> float:
    """The share of answers that can be read from a token and the `window` before it: the ceiling of a sliding window.

    Layers of windows pass on what they see: L of them reach as far as one of L times their size.
    """
    return float((episodes.distances[episodes.weights > 0] <= window).mean())
