"""Associative recall through the cache: what eviction destroys and quantisation does not.

An episode of the recall corpus (`mla.data.corpora.recall_episodes`) defines keys, then asks for each. The definitions and
what ends them are the prompt, which goes into the cache in one piece; queries and answers are then decoded one by one, the
true answer following each query. What counts is the first query of each key: later ones can be answered from the first.

Legend: N episodes, B of them at once, T + 1 tokens an episode, P of them prompt, Q queries that count.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mla.cache.plan import WHOLE, CachePlan
from mla.cache.stores import ModelCache
from mla.config import Config
from mla.data.corpora import has_episodes, recall_pairs, recall_prompt
from mla.data.prepared import TokenData
from mla.data.tokenizers import ByteTokenizer
from mla.errors import UserError
from mla.evaluation.contract import Axis, Column, Measure, MeasuredRow, Subject
from mla.evaluation.decoding import Decoder, batch_multiple, positions, round_up
from mla.model import Model
from mla.strict_json import Number

EPISODES = 512  # at most
DEPTHS = 10  # parts of the prompt


def measure(config: Config, model: Model, mesh: Mesh, data: TokenData, plan: CachePlan = WHOLE) -> dict[str, Any]:
    """The `recall` object of eval.json, of at most EPISODES episodes of split `config.eval.split`; see `score`.

    Raises:
      UserError: tokens that are not bytes.
    """
    if not isinstance(data.tokenizer, ByteTokenizer):
        raise UserError(f"config.data.tokenizer: {config.data.tokenizer!r}: corpus recall is made of bytes; set it to bytes")
    pairs = recall_pairs(config.data.corpus)
    stream = np.asarray(data.split(config.eval.split).tokens[: EPISODES * 6 * pairs])
    episodes = stream.reshape(-1, 6 * pairs)[:, :-1].astype(np.int32)  # without the end of each document
    predicted = predict(model, mesh, episodes, recall_prompt(pairs), config.eval.batch_size, plan)
    return score(episodes, predicted, pairs)


def predict(model: Model, mesh: Mesh, tokens: np.ndarray, prompt: int, batch: int, plan: CachePlan = WHOLE) -> np.ndarray:
    """The likeliest token at each place after the prompt, through the cache; the only use of it here.

    Args:
      model, mesh: the model with its parameters, and where they live.
      tokens: int32 [N, T + 1].
      prompt: P, tokens that go through the cache in one piece; all others singly.
      batch: sequences at once; rounded up to the devices a batch is split over.
      plan: what the cache does beside storing entries.

    Returns:
      int32 [N, T + 1 - P], of which [:, i] predicts tokens[:, P + i].
    """
    batch = round_up(min(batch, len(tokens)), batch_multiple(mesh))
    last = tokens.shape[1] - 1
    decoder = Decoder(model, batch, last, mesh, plan, prompt=prompt)

    def likeliest(model: Model, cache: ModelCache, new: jax.Array, where: jax.Array) -> tuple[jax.Array, ModelCache]:
        logits, cache = model.extend(new, where, cache, last_only=True)
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache

    step, columns_of_batches = decoder.compiled(likeliest), []
    for first in range(0, len(tokens), batch):
        rows = tokens[first : first + batch]
        rows = np.concatenate([rows, np.repeat(rows[-1:], batch - len(rows), axis=0)])
        cache, columns = decoder.empty(), []
        for start, stop in [(0, prompt), *((t, t + 1) for t in range(prompt, last))]:
            column, cache = step(cache, rows[:, start:stop], positions(batch, start, stop))
            columns.append(column)
        columns_of_batches.append(np.concatenate([np.asarray(column) for column in columns], axis=1))
    return np.concatenate(columns_of_batches)[: len(tokens)]


def score(episodes: np.ndarray, predicted: np.ndarray, pairs: int) -> dict[str, Any]:
    """How often the value of a key is the likeliest token at the key's first query.

    Args:
      episodes: int32 [N, T + 1], bytes.
      predicted: int32 [N, T + 1 - P], from `predict`.
      pairs: Q, keys an episode.

    Returns:
      accuracy; chance: of a guess among all values (who sees which values an episode has, but not whose they are, can do
      better: 0.3 with 8 pairs); episodes; pairs; prompt_tokens: P; by_depth: accuracy by the tenth of the prompt in which
      the definition stands, first tenth first, None where there is none; queries_by_depth: how many of them.
    """
    prompt = episodes.shape[1] - predicted.shape[1]
    first = episodes[:, prompt : prompt + 2 * pairs]  # round of queries
    asked, hits = first[:, ::2], first[:, 1::2] == predicted[:, 1 : 2 * pairs : 2]
    places = np.argmax(episodes[:, None, :prompt] == asked[..., None], axis=-1)  # [N, Q]
    depths = places * DEPTHS // prompt
    counts = np.bincount(depths.ravel(), minlength=DEPTHS)
    hit = np.bincount(depths.ravel(), weights=hits.ravel(), minlength=DEPTHS)
    return {
        "accuracy": float(hits.mean()),
        "chance": 1 / pairs,
        "episodes": len(episodes),
        "pairs": pairs,
        "prompt_tokens": prompt,
        "by_depth": [float(h / c) if c else None for h, c in zip(hit, counts, strict=True)],
        "queries_by_depth": counts.tolist(),
    }


@dataclasses.dataclass(frozen=True)
class Figures:
    """Recall in an eval.json; see `score`."""

    accuracy: Number | None = None


def accuracy(row: MeasuredRow) -> float | None:
    """How often a key's value is the likeliest token at its first query."""
    figures = row.figures(Figures)
    return figures.accuracy if figures else None


class Recall(Measure):
    """Keys of a prompt that are looked up through the cache, of text that is made of episodes."""

    schema: ClassVar = {"recall": Figures}
    trick_columns: ClassVar = (Column("recall", accuracy, ".4f", always=False),)
    trick_axes: ClassVar = (Axis("recall accuracy", accuracy),)

    def applies(self, subject: Subject) -> bool:
        return has_episodes(subject.config.data.corpus)

    def measure(self, subject: Subject) -> dict[str, Any]:
        return {"recall": measure(subject.config, subject.model, subject.mesh, subject.data, subject.plan)}

    def said(self, figures: dict[str, Any], config: Config) -> str:
        return f"recall {figures['recall']['accuracy']:.4f} (chance {figures['recall']['chance']:.4f})"
