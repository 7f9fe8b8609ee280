"""What dynamic memory compression saves on text, read off live caches: how much is merged depends on what the text says."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mla import config as configs
from mla.cache.meter import content_bytes, tree_bytes
from mla.cache.plan import WHOLE, CachePlan
from mla.cache.stores import ModelCache
from mla.cache.tokens import TokenCache
from mla.config import Config
from mla.data.prepared import Split, evaluation_windows
from mla.evaluation.contract import Column, Measure, MeasuredRow, Section, Subject, XPosition
from mla.evaluation.decoding import Decoder, batch_multiple, positions, round_up
from mla.model import Model
from mla.strict_json import Count

NOTE = "Hollow: live slots that the text needed, an array a head, over its tokens."
SEQUENCES = 32  # windows, from the beginning of the split


def measure(config: Config, model: Model, mesh: Mesh, split: Split, plan: CachePlan = WHOLE) -> dict[str, Any]:
    """The `compression` object of eval.json, over whole windows of `config.evaluated_context`; empty where there are none.

    A batch has `eval.decode_batch` sequences, or one for each device. A layer's array is rectangular: the longest head of
    any of its rows decides. Layers that do not merge do not count.

    Keys:
      tokens, sequences: of a window, and windows measured.
      slots_longest, slots_mean: of the longest and of the average head, means over layers, and over batches and sequences.
      ratio: bytes that grouped_query takes for the same tokens in the same dtype, over those of the live arrays cut to the
        longest head, fp32 state included.
      ratio_mean: the same of live arrays that each hold one head, cut to its longest row.
      bytes_per_token: live bytes of one sequence after a window, over its tokens: the latter arrays, and other layers'.
    """
    tokens, around, itemsize = config.evaluated_context, configs.around(config), jnp.dtype(config.model.dtype).itemsize
    batch = round_up(config.eval.decode_batch, batch_multiple(mesh))
    decoder = Decoder(model, batch, tokens, mesh, plan)

    def fill(model: Model, cache: ModelCache, text: jax.Array, where: jax.Array) -> tuple[jax.Array, ModelCache]:
        return model.extend(text, where, cache, last_only=True)

    step = decoder.compiled(fill)
    longest: list[int] = []
    means: list[float] = []
    plain, live, ragged, others, sequences = 0, 0, 0, 0, 0
    for window in evaluation_windows(split.tokens, tokens, batch, SEQUENCES * tokens):
        rows = int(window.weights.all(axis=1).sum())  # whole windows come first; the others are not measured
        if not rows:
            break
        sequences += rows
        _, cache = step(decoder.empty(), window.tokens[:, :-1], positions(batch, 0, tokens))
        cache = cache if rows == batch else jax.tree.map(lambda a, rows=rows: a[:rows], cache)
        for layer, entry in zip(cache.layers, configs.layers(config.model), strict=True):
            merging = any(_merges(store) for store in layer.stores) if layer else False
            for store in layer.stores if layer else ():
                if not _merges(store):
                    held = content_bytes(store)
                    live, ragged, others = (live + held, ragged + held, others) if merging else (live, ragged, others + held)
                    continue
                used, arrays = np.asarray(store.slots.lengths), jax.tree.leaves(store.streams)
                longest.append(int(used.max()))
                means += used.mean(axis=1).tolist()
                plain += entry.config.elements(around) * itemsize * tokens * rows
                live += tree_bytes([a[:, : longest[-1]] for a in arrays])
                ragged += tree_bytes([a[:, :n, head] for head, n in enumerate(used.max(axis=0)) for a in arrays])
    if not longest:
        return {}
    return {
        "tokens": tokens,
        "sequences": sequences,
        "slots_longest": float(np.mean(longest)),
        "slots_mean": float(np.mean(means)),
        "ratio": plain / live,
        "ratio_mean": plain / ragged,
        "bytes_per_token": (ragged + others) / (tokens * sequences),
    }


def _merges(store: Any) -> bool:
    """Whether its key heads decide by the text when an entry begins."""
    return isinstance(store, TokenCache) and store.clock.heads > 0


@dataclasses.dataclass(frozen=True)
class Figures:
    """Compression in an eval.json; see `measure`."""

    bytes_per_token: Count
    ratio: Count | None = None
    ratio_mean: Count | None = None


def of_row(row: MeasuredRow, field: str) -> float | None:
    """One of the figures of a row; None where nothing merges."""
    return getattr(row.figures(Figures), field, None)


class Compression(Measure):
    """Bytes that merging tokens saves on the text, of models that are trained to."""

    schema: ClassVar = {"compression": Figures}
    section: ClassVar = Section(
        """## Learned compression

Bytes that the same heads would take without merging, over those of the live arrays after a window, fp32
state included: cut to an array a head, or to a layer's longest head. The table above has what is allocated for a text
of which nothing can be merged.""",
        (
            Column("live B/token", lambda row: of_row(row, "bytes_per_token"), ",.1f"),
            Column("by head", lambda row: of_row(row, "ratio_mean"), "{:.2f}x".format),
            Column("by longest head", lambda row: of_row(row, "ratio"), "{:.2f}x".format),
        ),
    )

    def applies(self, subject: Subject) -> bool:
        layers = zip(subject.model.blocks, subject.model.sources, strict=True)
        return subject.is_text and any(block.mixer.compresses for block, source in layers if source is None)

    def measure(self, subject: Subject) -> dict[str, Any]:
        found = measure(subject.config, subject.model, subject.mesh, subject.split, subject.plan)
        return {"compression": found} if found else {}

    def said(self, figures: dict[str, Any], config: Config) -> str:
        found = figures["compression"]
        return f"{found['ratio']:.2f} times smaller by its longest heads, {found['ratio_mean']:.2f} by the average head"

    def place(self, row: MeasuredRow) -> XPosition | None:
        """What the text needed, not what is allocated for the worst of texts."""
        found = row.figures(Figures)
        return XPosition(found.bytes_per_token, NOTE) if found else None
