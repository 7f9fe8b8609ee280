"""Prefill and decode speed of a model through its cache, on the devices in use."""

from __future__ import annotations

import dataclasses
import statistics
import time
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mla.cache.plan import WHOLE, CachePlan
from mla.cache.stores import ModelCache
from mla.config import Config
from mla.evaluation.contract import Column, Measure, MeasuredRow, Subject
from mla.evaluation.decoding import Decoder, batch_multiple, positions, round_up
from mla.model import Model
from mla.strict_json import Count

REPEATS = 5  # timed rounds, after one that compiles


def greedy(
    model: Model, cache: ModelCache, tokens: jax.Array, where: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], ModelCache]:
    """Tokens and positions int32 [B, S] -> the likeliest next token and its position [B, 1], and the cache."""
    logits, cache = model.extend(tokens, where, cache, last_only=True)
    return (jnp.argmax(logits, axis=-1).astype(jnp.int32), where[:, -1:] + 1), cache


def decoder(config: Config, model: Model, mesh: Mesh, plan: CachePlan = WHOLE) -> Decoder:
    """For `eval.decode_batch` sequences, rounded up to the devices a batch is split over, of all tokens that are decoded.

    Raises:
      UserError: their cache is too large.
    """
    batch = round_up(config.eval.decode_batch, batch_multiple(mesh))
    context, count = config.evaluated_context, config.eval.decode_tokens
    lower = "config.eval.decode_batch or config.eval.decode_tokens"
    return Decoder(model, batch, context + count, mesh, plan, prompt=context, fields=lower)


def measure(config: Config, model: Model, mesh: Mesh, plan: CachePlan = WHOLE) -> dict[str, Any]:
    """The `decode` object of eval.json: tokens per second of all sequences together, medians of wall-clock time.

    A prompt of `config.evaluated_context` tokens in one piece, then `eval.decode_tokens` greedy tokens one by one, each fed
    back without leaving the device. As many sequences as `decoder` says.
    """
    made = decoder(config, model, mesh, plan)
    batch, context, count = made.batch, config.evaluated_context, config.eval.decode_tokens
    step = made.compiled(greedy)
    prompt = np.random.default_rng(0).integers(0, model.vocab_size, (batch, context), dtype=np.int32)
    tokens, where = jax.device_put((prompt, np.asarray(positions(batch, 0, context))))

    prefills, decodes = [], []
    for _ in range(1 + REPEATS):
        cache = jax.block_until_ready(made.empty())
        start = time.perf_counter()
        following, cache = jax.block_until_ready(step(cache, tokens, where))
        middle = time.perf_counter()
        for _ in range(count):
            following, cache = step(cache, *following)
        jax.block_until_ready(following)
        prefills.append(middle - start)
        decodes.append(time.perf_counter() - middle)
    return {
        "batch": batch,
        "context": context,
        "prefill_tokens_per_second": batch * context / statistics.median(prefills[1:]),
        "tokens_per_second": batch * count / statistics.median(decodes[1:]),
    }


@dataclasses.dataclass(frozen=True)
class Figures:
    """Speed in an eval.json; see `measure`."""

    batch: Count | None = None
    context: Count | None = None
    tokens_per_second: Count | None = None


def decoded_per_second(row: MeasuredRow) -> float | None:
    """Tokens of greedy decoding, of all sequences together."""
    figures = row.figures(Figures)
    return figures.tokens_per_second if figures else None


class Speed(Measure):
    """Tokens a second of prefill and of greedy decoding, where the config asks for decoded tokens."""

    schema: ClassVar = {"decode": Figures}
    columns: ClassVar = (Column("decode tok/s", decoded_per_second, ",.0f"),)

    def applies(self, subject: Subject) -> bool:
        return bool(subject.config.eval.decode_tokens)

    def require(self, subject: Subject) -> None:
        decoder(subject.config, subject.model, subject.mesh, subject.plan)  # refuses a cache that is too large

    def measure(self, subject: Subject) -> dict[str, Any]:
        return {"decode": measure(subject.config, subject.model, subject.mesh, subject.plan)}

    def said(self, figures: dict[str, Any], config: Config) -> str:
        decode = figures["decode"]
        return (
            f"prefill {decode['prefill_tokens_per_second']:,.0f} and decode {decode['tokens_per_second']:,.0f} tokens a"
            f" second at batch {decode['batch']}, context {decode['context']}"
        )
