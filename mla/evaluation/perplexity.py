"""Loss on a token stream, twice: by the parallel form, and through the cache as a decoder would see the same tokens.

Legend: B batch of windows, T context, S tokens of one piece, D model width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from mla import processes
from mla.cache import meter
from mla.cache.plan import WHOLE, CachePlan
from mla.cache.stores import ModelCache
from mla.config import Config
from mla.data.prepared import Split, evaluation_windows, predicted_tokens
from mla.errors import UserError
from mla.evaluation.contract import Axis, Column, Measure, MeasuredRow, Subject
from mla.evaluation.decoding import Decoder, batch_multiple, compiled, positions, round_up
from mla.model import Model
from mla.sharding import batch_sharding
from mla.strict_json import Count, Number

MOST_NATS = 100.0  # losses of working models are below: guessing among the 256,000 ids of a large tokenizer is 12.5
BF16_TOLERANCE = 1e-2  # nats; rounding alone reaches a tenth of it
MOST_DOCUMENTS = 256  # that are told apart in eval.json; neighbours among more of them stand together
TOKEN_FACTOR = 10  # one token may differ by this many tolerances on average, the mean loss by one


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """What a model makes of a token stream.

    Attributes:
      loss, loss_cached: mean nats per predicted token, by the parallel form and through the cache; where tokens have weights
        (`Split`), weighted means.
      token_difference: mean over tokens of |difference| between the two, nats.
      tokens, num_bytes: predicted tokens that count, whatever their weights, and the bytes of text they stand for.
      decoded, decoded_cached: the losses of the `decoded_tokens` that come after each window's prompt.
      held: bytes_after_window and bookkeeping_after_window of one sequence's live cache, content and where it stands.
      documents: float64 [3, N], of each document, in order, the sum of weights (1 a token where there are none), and of
        weighted nats by the parallel form and through the cache; N 0 where nobody asked.
    """

    loss: float
    loss_cached: float
    token_difference: float
    tokens: int
    num_bytes: int
    decoded: float = math.nan
    decoded_cached: float = math.nan
    decoded_tokens: int = 0
    held: dict[str, float] = dataclasses.field(default_factory=dict)
    documents: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((3, 0)))

    @property
    def perplexity(self) -> float:
        """exp(loss), per token."""
        return math.exp(self.loss)

    @property
    def bits_per_byte(self) -> float | None:
        """Total bits over total bytes; None where the predicted tokens stand for no text."""
        return self.loss * self.tokens / math.log(2) / self.num_bytes if self.num_bytes else None


def pieces(context: int, chunked: bool = True, prompt: bool = True) -> list[tuple[int, int]]:
    """How a window goes through the cache: [start, stop) of a prefill, of some chunks, then of single tokens.

    The last quarter is decoded token by token, the quarter before it in chunks of a 16th (`chunked`) or token by token too,
    what is left comes first in one piece, the prompt (about half the window), or without `prompt` token by token.
    """
    singles = max(1, context // 4)
    chunk = max(2, context // 16)
    chunks = (context - context // 2 - singles) // chunk
    start = context - singles - chunks * chunk
    parts = [(0, start)] if start else []
    if not prompt:
        parts = [(t, t + 1) for t in range(start)]
    if chunked:
        parts += [(start + i * chunk, start + (i + 1) * chunk) for i in range(chunks)]
        start = context - singles
    return parts + [(t, t + 1) for t in range(start, context)]


def token_losses(model: Model, hidden: jax.Array, targets: jax.Array, chunk_tokens: int) -> jax.Array:
    """-log p of each target, in nats.

    Args:
      hidden: [B, T, D], normed.
      targets: int32 [B, T].
      chunk_tokens: tokens, of all rows together, whose logits exist at once.

    Returns:
      fp32 [B, T].
    """
    batch, length, width = hidden.shape
    parts = min(length, -(-batch * length // chunk_tokens))
    size = -(-length // parts)

    def losses(part: tuple[jax.Array, jax.Array]) -> jax.Array:
        logits = model.logits(part[0])
        chosen = jnp.take_along_axis(logits, part[1][..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - chosen

    if parts == 1:
        return losses((hidden, targets))
    padding = ((0, 0), (0, parts * size - length))
    cut = (  # along T, so that the batch stays split over the devices as it is
        jnp.pad(hidden, (*padding, (0, 0))).reshape(batch, parts, size, width).swapaxes(0, 1),
        jnp.pad(targets, padding).reshape(batch, parts, size).swapaxes(0, 1),
    )
    return jax.lax.map(losses, cut).swapaxes(0, 1).reshape(batch, parts * size)[:, :length]


class Losses:
    """Both ways to compute the losses of a batch of windows.

    Args:
      model, mesh: the model with its parameters, and where they live.
      batch: windows, a multiple of the devices a batch is split over.
      context: predicted tokens a window.
      chunk_tokens: tokens whose logits exist at once.
      plan: what the cache does beside storing entries.

    Attributes:
      prompt: tokens of a window that count as its prompt, and but for coded states go through the cache in one piece.
      held: see `Perplexity`, when the last batch was through.
    """

    def __init__(self, model: Model, mesh: Mesh, batch: int, context: int, chunk_tokens: int, plan: CachePlan = WHOLE):
        self._sharding = batch_sharding(mesh)
        # Policies and merging act after each call: as published, after a prompt and after each token; and of pages, calls of
        # one token alone choose. A state is coded after
        # each call: of the sizes that a call may have, one token is the one that every decoder has.
        alone = plan.eviction is None and plan.merge is None and plan.read is None
        whole_prompt = not (alone and model.codes_states(plan.codec))
        self._batch, self._pieces = batch, pieces(context, chunked=alone and whole_prompt, prompt=whole_prompt)
        self.prompt, self.held = pieces(context)[0][1], dict[str, float]()
        self._decoder = Decoder(model, batch, context, mesh, plan, prompt=self.prompt)

        def whole(model: Model, tokens: jax.Array) -> jax.Array:
            return token_losses(model, model.hidden(tokens[:, :-1]), tokens[:, 1:], chunk_tokens)

        def piece(model: Model, cache: ModelCache, tokens: jax.Array, where: jax.Array) -> tuple[jax.Array, ModelCache]:
            hidden, cache = model.extend_hidden(tokens[:, :-1], where, cache)
            return token_losses(model, hidden, tokens[:, 1:], chunk_tokens), cache

        def single(model: Model, cache: ModelCache, tokens: jax.Array, where: jax.Array) -> tuple[jax.Array, ModelCache]:
            logits, cache = model.extend(tokens[:, :1], where, cache)
            chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
            return jax.nn.logsumexp(logits, axis=-1) - chosen, cache

        self._whole = compiled(model, mesh, whole)
        self._piece, self._single = self._decoder.compiled(piece), self._decoder.compiled(single)

    def parallel(self, tokens: np.ndarray) -> np.ndarray:
        """Windows int32 [B, T + 1] -> nats, fp32 [B, T]."""
        return np.asarray(self._whole(jax.device_put(tokens, self._sharding)))

    def cached(self, tokens: np.ndarray) -> np.ndarray:
        """Windows int32 [B, T + 1] -> nats, fp32 [B, T], through the model's cache in the pieces of `pieces`."""
        cache, losses_of_pieces = self._decoder.empty(), []
        for start, stop in self._pieces:
            step = self._single if stop - start == 1 else self._piece
            losses, cache = step(cache, tokens[:, start : stop + 1], positions(self._batch, start, stop))
            losses_of_pieces.append(losses)
        self.held = {
            "bytes_after_window": meter.content_bytes(cache) / self._batch,
            "bookkeeping_after_window": meter.bookkeeping_bytes(cache) / self._batch,
        }
        return np.concatenate([np.asarray(losses) for losses in losses_of_pieces], axis=1)


def tolerance(config: Config) -> float:
    """Nats by which the two losses may differ: `eval.tolerance`, in bf16 at least what rounding needs."""
    return max(config.eval.tolerance, BF16_TOLERANCE if config.model.dtype == "bfloat16" else 0.0)


def measure(
    config: Config, model: Model, mesh: Mesh, split: Split, plan: CachePlan = WHOLE, end_id: int | None = None
) -> Perplexity:
    """Evaluates `config.eval.tokens` tokens of a split (0: all) in windows of `config.evaluated_context`.

    With `end_id`, the id that ends a document, sums by document too.

    Every token but the first is predicted once: of windows that overlap (`eval.mode=sliding`), by the first that holds it.
    Sums are float64 on the host.

    Raises:
      UserError: nothing to predict, no window of the length that was asked for, a loss that is not finite, or a cache that
        does not say what the parallel form says.
    """
    context, limit, stride = config.evaluated_context, config.eval.tokens, config.evaluated_stride
    total = predicted_tokens(len(split.tokens), limit)
    if total < config.eval.context:
        raise UserError(
            f"config.eval.context: {context} is more than the {total} tokens predicted of split {split.name}; lower it"
        )
    windows = 1 + -(-max(total - context, 0) // stride)
    batch = round_up(min(config.eval.batch_size, windows), batch_multiple(mesh))
    ends = np.flatnonzero(np.asarray(split.tokens[: total + 1]) == end_id) if end_id is not None else np.zeros(0, np.int64)
    by_document = np.zeros((3, len(ends) + 1))
    sums = np.zeros((2, 4))  # of weight times parallel, cached, |difference|, 1: of all tokens; of those after the prompts
    tokens = decoded_tokens = num_bytes = 0
    with contextlib.ExitStack() as stack:
        if config.model.dtype == "float32":
            # Accelerators round fp32 operands of a matmul to fewer bits by default, each form in its own places.
            stack.enter_context(jax.default_matmul_precision("highest"))
        shown: dict[str, Any] = {"desc": "evaluating", "unit": "token", "unit_scale": True, "disable": processes.hidden()}
        bar = stack.enter_context(tqdm(total=total, **shown))
        losses = Losses(model, mesh, batch, context, config.loss_chunk_tokens, plan)
        for window in evaluation_windows(split.tokens, context, batch, limit, split.weights, stride):
            weights = window.weights.astype(np.float64)
            parallel = losses.parallel(window.tokens).astype(np.float64)
            cached = losses.cached(window.tokens).astype(np.float64)
            each, behind = (
                (parallel, cached, np.abs(parallel - cached), np.ones_like(cached)),
                np.arange(context) >= losses.prompt,
            )
            sums += [[np.sum(kind * a) for a in each] for kind in (weights, weights * behind)]
            tokens += int(np.count_nonzero(weights))
            decoded_tokens += int(np.count_nonzero(weights * behind))
            if end_id is not None:
                counted = np.arange(window.predicted.start, window.predicted.stop)
                if split.weights is not None:
                    counted = counted[split.weights[window.predicted] > 0]
                of, is_counted = np.searchsorted(ends, counted), weights > 0
                for line, kind in zip(by_document, (np.ones_like(parallel), parallel, cached), strict=True):
                    line += np.bincount(of, (weights * kind)[is_counted], len(line))
            bytes_of = split.byte_counts[window.predicted]
            if split.weights is not None:
                bytes_of = bytes_of * (split.weights[window.predicted] > 0)
            num_bytes += int(bytes_of.sum(dtype=np.int64))
            bar.update(len(bytes_of))
    if not tokens:
        raise UserError(f"config.eval.split: none of the {total:,} tokens of split {split.name} counts: all weights are 0")
    (loss, loss_cached, difference, _), (later, later_cached, *_) = (sums / (sums[:, 3:] + (sums[:, 3:] == 0))).tolist()
    quality = Perplexity(
        *(loss, loss_cached, difference, tokens, num_bytes),
        *(later, later_cached, decoded_tokens, losses.held),
        documents=by_document[:, by_document[0] > 0],
    )
    require_working(quality.loss, "the parameters of this checkpoint are no working model")
    if plan.exact(context):
        require_agreement(quality, tolerance(config), config)
    require_working(quality.loss_cached, "through the cache as config.eval.cache has it, this model does not work")
    return quality


def require_working(loss: float, why: str) -> None:
    """Raises UserError for a loss that no model has which works, saying why."""
    if not loss < MOST_NATS:  # NaN is not less
        raise UserError(f"eval: the loss is {loss} nats a token: {why}; nothing was written")


def require_agreement(quality: Perplexity, allowed: float, config: Config) -> None:
    """Raises UserError where the two forms differ by more nats than `tolerance` allows."""
    difference = abs(quality.loss_cached - quality.loss)
    # A comparison with NaN is false, so a cache that yields NaN fails too.
    if difference <= allowed and quality.token_difference <= TOKEN_FACTOR * allowed:
        return
    raise UserError(
        f"eval: the loss through the cache is {quality.loss_cached:.6f} nats a token, by the parallel form"
        f" {quality.loss:.6f} (mean difference of a token {quality.token_difference:.2e}); eval.tolerance allows {allowed:g}"
        f" on the mean and {TOKEN_FACTOR * allowed:g} a token in {config.model.dtype}: the cache of this model is broken"
    )


def summary(quality: Perplexity, altered: bool = False) -> dict[str, Any]:
    """The keys of eval.json that come from here.

    Where the cache is `altered` (coded, cut, merged), `loss` is the loss through it, for that is the question, and that of
    the parallel form is `loss_full_cache`. `decoded` has both for the tokens after the windows' prompts: where a prompt is
    cut only when it is through, its own tokens have seen all of it.
    """
    shown = dataclasses.replace(quality, loss=quality.loss_cached) if altered else quality
    row: dict[str, Any] = {
        "loss": shown.loss,
        "loss_cached": shown.loss_cached,
        "perplexity": shown.perplexity,
        "eval_tokens": shown.tokens,
        "eval_bytes": shown.num_bytes,
    }
    if altered:
        row["loss_full_cache"] = quality.loss
    if shown.decoded_tokens:
        losses = {"loss": shown.decoded_cached, "loss_full_cache": shown.decoded}
        row["decoded"] = {"tokens": shown.decoded_tokens, **losses}
    if quality.documents.shape[1] > 1:
        tokens, parallel, cached = grouped(quality.documents)
        nats = cached if altered else parallel
        row["documents"] = {"tokens": tokens.tolist(), "nats": np.round(nats, 3).tolist()}
    if shown.bits_per_byte is not None:
        row["bits_per_byte"] = shown.bits_per_byte
    return row


def grouped(documents: np.ndarray, most: int = MOST_DOCUMENTS) -> np.ndarray:
    """Sums by document, [K, N], with neighbours added up so that no more than so many columns are left."""
    number = documents.shape[1]
    if number <= most:
        return documents
    return np.add.reduceat(documents, np.arange(most) * number // most, axis=1)


@dataclasses.dataclass(frozen=True)
class Documents:
    """Predicted tokens, or their weights, and nats by document, or by group of neighbouring ones."""

    tokens: Sequence[Number]
    nats: Sequence[Number]


@dataclasses.dataclass(frozen=True)
class Decoded:
    """Mean nats of the tokens after the windows' prompts: through the cache as it is, and through the whole, plain one."""

    loss: Number
    loss_full_cache: Number


@dataclasses.dataclass(frozen=True)
class Figures:
    """Quality in an eval.json; see `summary`."""

    loss: Number
    loss_cached: Number | None = None
    perplexity: Number | None = None
    bits_per_byte: Number | None = None
    eval_tokens: Count | None = None
    decoded: Decoded | None = None
    documents: Documents | None = None


def of_row(row: MeasuredRow) -> Figures:
    """The figures of a row: every one has them."""
    figures = row.figures(Figures)
    assert figures is not None
    return figures


def decoded_loss(row: MeasuredRow) -> float | None:
    """Nats a token after the prompts of the windows, through the cache as it is."""
    decoded = of_row(row).decoded
    return decoded.loss if decoded else None


def decoded_change(row: MeasuredRow) -> float | None:
    """Nats a token that a trick on the cache adds to the loss after the windows' prompts: same tokens, same model."""
    decoded = of_row(row).decoded
    return decoded.loss - decoded.loss_full_cache if decoded else None


class Quality(Measure):
    """Loss, by the parallel form and through the cache, perplexity, bits a byte; and the live bytes after a window."""

    schema: ClassVar = {"": Figures}
    columns: ClassVar = (
        Column("loss", lambda row: of_row(row).loss, ".4f", spread=True),
        Column("perplexity", lambda row: of_row(row).loss, lambda nats: perplexity_text(math.exp(nats))),
        Column("bits/byte", lambda row: of_row(row).bits_per_byte, ".4f"),
    )
    always_of_tricks: ClassVar = ("decoded",)
    trick_columns: ClassVar = (
        Column("loss after the prompt", decoded_loss, ".4f"),
        Column("change", decoded_change, "+.4f"),
    )
    axes: ClassVar = (Axis("perplexity", lambda row: of_row(row).loss, math.exp, per_token=True),)
    trick_axes: ClassVar = (
        Axis(
            "change of the loss after the prompt, nats",
            decoded_change,
            signed=True,
            across=Axis("loss, nats", decoded_loss, lowest=True),
        ),
    )

    def applies(self, subject: Subject) -> bool:
        return subject.is_text and subject.config.eval.mode != "stream"

    def measure(self, subject: Subject) -> dict[str, Any]:
        end = subject.data.tokenizer.eos_id
        quality = measure(subject.config, subject.model, subject.mesh, subject.split, subject.plan, end)
        return summary(quality, altered=subject.plan.alters) | {"cache": quality.held}

    def said(self, figures: dict[str, Any], config: Config) -> str:
        loss = figures.get("loss_full_cache", figures["loss"])
        return (
            f"loss {loss:.4f} nats a token (through the cache {figures['loss_cached']:.4f}), perplexity"
            f" {figures['perplexity']:.3f}, {figures['eval_tokens']:,} tokens of split {config.eval.split}"
        )


def perplexity_text(value: float) -> str:
    """As tables show it."""
    return f"{value:,.3f}" if value < 1e9 else f"{value:.4g}"
