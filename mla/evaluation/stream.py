"""Loss on whole documents, each from its first token to its last through one cache, by position.

A document goes through the cache in pieces, whatever its length: what keeps a window or a state needs no more memory for a
million tokens than for a thousand. Its first token is not predicted, since nothing is before it. Documents do not see one
another.

Legend: B documents at once, P tokens of a piece.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from mla import memory, processes
from mla.cache.plan import WHOLE, CachePlan
from mla.cache.stores import ModelCache
from mla.config import Config
from mla.data.prepared import Split
from mla.errors import UserError
from mla.evaluation import perplexity
from mla.evaluation.cache_bytes import abstract_bytes_at, read_bytes_per_step
from mla.evaluation.contract import Column, Measure, MeasuredRow, Section, Subject
from mla.evaluation.decoding import Decoder, batch_multiple, round_up
from mla.model import Model
from mla.strict_json import Count, Number

FIRST_BIN = 64  # positions; each further bin ends at twice the position
EDGES = (0, 64, 256, 1024, 4096, 16384, 65536)  # of the columns of a report


class Streamed(NamedTuple):
    """What a model makes of documents.

    Attributes:
      nats: float64, by position: summed over the documents that reach it; [0] is of the second token of each.
      counts: int64, by position: how many do.
      documents: float64 [N, 2], of each the predicted tokens and the sum of their nats.
    """

    nats: np.ndarray
    counts: np.ndarray
    documents: np.ndarray

    @property
    def loss(self) -> float:
        """Mean nats of a predicted token."""
        return float(self.nats.sum() / self.counts.sum())


def documents(split: Split, end_id: int, limit_tokens: int = 0) -> list[slice]:
    """Where the documents of a split stand that have a token to predict: the first so many predicted tokens; 0: all.

    Raises:
      UserError: there are none.
    """
    ends = np.flatnonzero(np.asarray(split.tokens) == end_id) + 1
    starts = [0, *ends.tolist()]
    stops = [*ends.tolist(), len(split.tokens)]
    spans, left = [], limit_tokens or len(split.tokens)
    for start, stop in zip(starts, stops, strict=True):
        stop = min(stop, start + 1 + left)
        if stop - start > 1 and left:
            spans.append(slice(start, stop))
            left -= stop - start - 1
    if not spans:
        raise UserError(f"config.eval.split: {split.name} has no document of two tokens or more, so nothing to predict")
    return spans


def bins(longest: int) -> list[tuple[int, int]]:
    """[start, stop) of the positions that share a figure, for documents of up to so many predicted tokens."""
    edges = [0, FIRST_BIN]
    while edges[-1] < longest:
        edges.append(2 * edges[-1])
    return list(itertools.pairwise([*edges[:-1], longest]))


def stream(
    model: Model,
    mesh: Mesh,
    texts: Sequence[np.ndarray],
    piece: int,
    batch: int,
    chunk_tokens: int,
    plan: CachePlan = WHOLE,
    bar: Any = None,
) -> Streamed:
    """Documents through the cache.

    Args:
      model, mesh: the model with its parameters, and where they live.
      texts: ids of each document, two or more.
      piece: P.
      batch: documents at once; those of like length go together.
      chunk_tokens: tokens whose logits exist at once.
      plan: how the cache stores entries.
      bar: is told of predicted tokens by `update`.
    """
    longest = max(map(len, texts)) - 1
    piece = min(piece, longest)
    batch = round_up(min(batch, len(texts)), batch_multiple(mesh))
    order = sorted(range(len(texts)), key=lambda index: -len(texts[index]))
    nats, counts, sums = np.zeros(longest), np.zeros(longest, np.int64), np.zeros((len(texts), 2))
    decoders: dict[int, tuple[Decoder, Any]] = {}

    def losses(model: Model, cache: ModelCache, tokens: jax.Array, where: jax.Array) -> tuple[jax.Array, ModelCache]:
        hidden, cache = model.extend_hidden(tokens[:, :-1], where, cache)
        return perplexity.token_losses(model, hidden, tokens[:, 1:], chunk_tokens), cache

    for first in range(0, len(texts), batch):
        rows = order[first : first + batch]
        lengths = [len(texts[row]) - 1 for row in rows]
        capacity = piece * 2 ** math.ceil(math.log2(-(-lengths[0] // piece)))  # few programs for many lengths
        if capacity not in decoders:
            decoder = Decoder(model, batch, capacity, mesh, plan)
            decoders[capacity] = decoder, decoder.compiled(losses)
        decoder, step = decoders[capacity]
        cache = decoder.empty()
        for start, tokens, where in _pieces([texts[row] for row in rows], piece, batch):
            each, cache = step(cache, tokens, where)
            each = np.asarray(each, np.float64)
            for place, row in enumerate(rows):
                here = each[place][where[place] >= 0]
                nats[start : start + len(here)] += here
                counts[start : start + len(here)] += 1
                sums[row] += len(here), here.sum()
                if bar is not None:
                    bar.update(len(here))
    return Streamed(nats, counts, sums)


def _pieces(texts: Sequence[np.ndarray], piece: int, batch: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """A piece's first position, its ids int32 [B, P + 1] and their positions int32 [B, P]: -1, on the left, is padding."""
    for start in range(0, max(map(len, texts)) - 1, piece):
        tokens, where = np.zeros((batch, piece + 1), np.int32), np.full((batch, piece), -1, np.int32)
        for row, text in enumerate(texts):
            part = text[start : start + piece + 1]
            if (size := len(part) - 1) > 0:
                tokens[row, -size - 1 :] = part
                where[row, -size:] = np.arange(start, start + size)
        yield start, tokens, where


def measure(
    config: Config, model: Model, mesh: Mesh, split: Split, end_id: int, plan: CachePlan = WHOLE
) -> tuple[Streamed, list[slice]]:
    """The documents of a split, by `config.eval.tokens` and `.piece`; and where they stand.

    Raises:
      UserError: nothing to predict, or a loss that is not finite.
    """
    spans = documents(split, end_id, config.eval.tokens)
    texts = [np.asarray(split.tokens[span], np.int32) for span in spans]
    with contextlib.ExitStack() as stack:
        if config.model.dtype == "float32":
            stack.enter_context(jax.default_matmul_precision("highest"))
        total = sum(map(len, texts)) - len(texts)
        shown: dict[str, Any] = {"desc": "streaming", "unit": "token", "unit_scale": True, "disable": processes.hidden()}
        bar = stack.enter_context(tqdm(total=total, **shown))
        piece = config.eval.piece or config.evaluated_context
        found = stream(model, mesh, texts, piece, config.eval.batch_size, config.loss_chunk_tokens, plan, bar)
    perplexity.require_working(found.loss, "through the cache, on documents of this length, this model does not work")
    return found, spans


def summary(found: Streamed, model: Model, plan: CachePlan, piece: int) -> dict[str, Any]:
    """The `stream` object of eval.json.

    documents, longest (tokens of it), piece (tokens), peak_memory (bytes, `memory.peak_bytes`), and `by_position`: the
    position before which some end -> their first, `start`, the mean `loss`, the `tokens` it is the mean of, and the content
    bytes of one sequence that are held and that a decode step reads when the last of them is through.
    """
    each = {}
    for start, stop in bins(len(found.nats)):
        tokens = int(found.counts[start:stop].sum())
        each[str(stop)] = {
            "start": start,
            "loss": float(found.nats[start:stop].sum()) / tokens,
            "tokens": tokens,
            "bytes_held": abstract_bytes_at(model, stop, plan),
            "bytes_read": read_bytes_per_step(model, stop, plan),
        }
    return {
        "documents": len(found.documents),
        "longest": len(found.nats) + 1,
        "piece": piece,
        "peak_memory": memory.peak_bytes(),
        "by_position": each,
    }


@dataclasses.dataclass(frozen=True)
class Bin:
    """Positions of documents; see `summary`."""

    start: Count
    loss: Number
    tokens: Count
    bytes_held: Count | None = None
    bytes_read: Count | None = None


@dataclasses.dataclass(frozen=True)
class Figures:
    """A stream in an eval.json; see `summary`."""

    by_position: Mapping[str, Bin] = dataclasses.field(default_factory=dict)


def of_row(row: MeasuredRow) -> Mapping[str, Bin]:
    """The bins of a row by the position before which they end; empty where it was no stream."""
    figures = row.figures(Figures)
    return figures.by_position if figures else {}


def _between(start: int, stop: int | None) -> Any:
    """Mean nats at positions from `start` on, to before `stop`, of a row."""

    def value(row: MeasuredRow) -> float | None:
        each = [part for part in of_row(row).values() if start <= part.start < (stop or math.inf)]
        tokens = sum(part.tokens for part in each)
        return sum(part.loss * part.tokens for part in each) / tokens if tokens else None

    return value


class Stream(Measure):
    """Loss on whole documents through one cache each, by position, with the bytes held and read there."""

    schema: ClassVar[Mapping[str, type]] = {"stream": Figures}
    section: ClassVar = Section(
        "## Loss by position\n\nNats a token of whole documents, each through one cache: of positions from the one before to"
        " the one named.",
        tuple(
            Column(f"to {stop:,}" if stop else "beyond", _between(start, stop), ".4f")
            for start, stop in zip(EDGES, (*EDGES[1:], None), strict=True)
        ),
    )

    def applies(self, subject: Subject) -> bool:
        return subject.is_text and subject.config.eval.mode == "stream"

    def require(self, subject: Subject) -> None:
        plan, cache = subject.plan, subject.config.eval.cache
        for field, there in (("evict", plan.eviction), ("merge", plan.merge), ("read", plan.read)):
            if there is not None:
                raise UserError(
                    f"config.eval.cache.{field}: {getattr(cache, field)!r} acts after a prompt or a token, and"
                    " eval.mode=stream reads in pieces; set it to none"
                )
        documents(subject.split, subject.data.tokenizer.eos_id, subject.config.eval.tokens)

    def measure(self, subject: Subject) -> dict[str, Any]:
        config, model, split = subject.config, subject.model, subject.split
        found, spans = measure(config, model, subject.mesh, split, subject.data.tokenizer.eos_id, subject.plan)
        tokens = int(found.counts.sum())
        num_bytes = sum(int(split.byte_counts[span][1:].sum(dtype=np.int64)) for span in spans)
        predicted, nats = found.documents.T
        documents = np.stack([predicted, nats, nats])
        quality = perplexity.Perplexity(found.loss, found.loss, 0.0, tokens, num_bytes, documents=documents)
        piece = config.eval.piece or config.evaluated_context
        return perplexity.summary(quality) | {"stream": summary(found, model, subject.plan, piece)}

    def said(self, figures: dict[str, Any], config: Config) -> str:
        streamed = figures["stream"]
        lines = [
            f"loss {figures['loss']:.4f} nats a token, perplexity {figures['perplexity']:.3f}, {figures['eval_tokens']:,}"
            f" tokens of {streamed['documents']:,} documents of split {config.eval.split}, each through one cache;"
            f" at most {streamed['peak_memory'] / 1e6:,.0f} MB of memory"
        ]
        for stop, part in streamed["by_position"].items():
            lines.append(
                f"  {part['start']:>9,} to {int(stop):>9,}: loss {part['loss']:.4f} of {part['tokens']:,} tokens; holds"
                f" {part['bytes_held']:,} bytes, a step reads {part['bytes_read']:,}"
            )
        return "\n".join(lines)
