"""Text from a prompt, through the cache.

Legend: B rows (samples, rounded up to the devices that a batch is split over), V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mla.cache.plan import WHOLE, CachePlan
from mla.cache.stores import ModelCache
from mla.config import LARGEST, SEEDS, TINIEST
from mla.data.tokenizers import Tokenizer
from mla.errors import UserError
from mla.evaluation.decoding import Decoder, batch_multiple, positions, round_up
from mla.model import Model

BROKEN = "\N{REPLACEMENT CHARACTER}"  # what decoders make of bytes that are no character


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: temperature first, then top-k, then top-p of what is left.

    Attributes:
      tokens: at most so many a sample; it ends earlier where the model ends the document.
      samples: texts, each with random numbers of its own: the first is the same however many are drawn.
      seed: of these random numbers.
      temperature: logits are divided by it; 0, or what fp32 cannot tell from 0, takes the likeliest token.
      top_k: only so many of the likeliest tokens can be drawn; 0: all.
      top_p: only the fewest of the likeliest tokens whose probabilities reach this sum can be drawn; 1: all.
    """

    tokens: int = 200
    samples: int = 1
    seed: int = 0
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0

    def check(self) -> None:
        """Refuses, by the name of its flag, what cannot be meant. Raises UserError."""

        def need(condition: bool, flag: str, message: str) -> None:
            if not condition:
                raise UserError(f"--{flag}: {message}")

        for flag, count in (("sample_tokens", self.tokens), ("num_samples", self.samples)):
            need(1 <= count < 2**31, flag, f"{count} is not a positive number that 32 bits can count")
        need(0 <= self.seed < SEEDS, "seed", f"{self.seed} is not from 0 to {SEEDS - 1}: random numbers start from 32 bits")
        said = f"{self.temperature} is not a number from 0 up; 0 takes the likeliest token"
        need(0 <= self.temperature < math.inf, "temperature", said)
        need(self.temperature <= LARGEST, "temperature", f"{self.temperature} is more than 32-bit floats can hold")
        need(self.top_k >= 0, "top_k", f"{self.top_k} is negative; 0 draws from all tokens")
        need(0 < self.top_p <= 1, "top_p", f"{self.top_p} is not above 0 and up to 1; 1 draws from all tokens")


def candidates(logits: jax.Array, how: Sampling) -> jax.Array:
    """fp32 [B, V] -> the logits to draw by: divided by the temperature, -inf where a token cannot be drawn.

    Of equal logits the one with the smaller id counts as likelier, so that top-k leaves exactly k. With top-p a token stays
    if the likelier ones together have less than p: at least one stays. Sums are taken in fp32.
    """
    count = logits.shape[-1]
    top = jnp.max(logits, axis=-1, keepdims=True)
    if how.temperature < TINIEST:
        return jnp.where(jnp.arange(count) == jnp.argmax(logits, axis=-1, keepdims=True), 0.0, -jnp.inf)
    scaled = (logits - top) / how.temperature  # 0 at most: a small temperature cannot overflow
    if how.top_k in range(1, count) or how.top_p < 1:
        order = jnp.argsort(-scaled, axis=-1, stable=True)
        rank = jnp.argsort(order, axis=-1)
        if how.top_k:
            scaled = jnp.where(rank < how.top_k, scaled, -jnp.inf)
        if how.top_p < 1:
            likeliest_first = jax.nn.softmax(jnp.take_along_axis(scaled, order, axis=-1), axis=-1)
            before = jnp.cumsum(likeliest_first, axis=-1) - likeliest_first
            stays = (before < how.top_p).at[..., 0].set(True)
            scaled = jnp.where(jnp.take_along_axis(stays, rank, axis=-1), scaled, -jnp.inf)
    return scaled


def draw(logits: jax.Array, number: jax.Array | int, how: Sampling) -> jax.Array:
    """Token ids int32 [B] for fp32 [B, V]: row r of token `number` has random numbers of its own, whatever B is."""
    weights = candidates(logits, how)

    def one(row: jax.Array, weights: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(how.seed), row), number)
        return jax.random.categorical(key, weights)

    return jax.vmap(one)(jnp.arange(len(logits)), weights).astype(jnp.int32)


def sample(model: Model, tokenizer: Tokenizer, mesh: Mesh, prompt: str, how: Sampling, plan: CachePlan = WHOLE) -> list[str]:
    """The prompt with what the model writes after it, `how.samples` times; see `written_text`.

    The same seed gives the same texts, on any mesh and for any number of samples, as far as rounding lets the model's logits
    be the same.

    Args:
      prompt: empty: a new document.
      plan: what the cache does beside storing entries.

    Raises:
      UserError: a number out of range, a model that does not belong to the tokenizer, or a cache that is too large.
    """
    how.check()
    if model.vocab_size != tokenizer.vocab_size:
        raise UserError(f"--prompt: the model has {model.vocab_size} tokens, {tokenizer.name} {tokenizer.vocab_size}")
    of_prompt = prompt_ids(tokenizer, prompt)
    ids = of_prompt or [tokenizer.eos_id]
    batch = round_up(how.samples, batch_multiple(mesh))
    fields = "--sample_tokens or --num_samples"
    decoder = Decoder(model, batch, len(ids) + how.tokens, mesh, plan, prompt=len(ids), fields=fields)

    def step(
        model: Model, cache: ModelCache, ids: jax.Array, where: jax.Array, number: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array, jax.Array], ModelCache]:
        logits, cache = model.extend(ids, where, cache, last_only=True)
        return (draw(logits[:, -1], number, how)[:, None], where[:, -1:] + 1, number + 1), cache

    compiled = decoder.compiled(step)
    rows = np.tile(np.asarray(ids, np.int32), (batch, 1))
    following, cache = compiled(decoder.empty(), rows, positions(batch, 0, len(ids)), np.int32(0))
    columns: list[np.ndarray] = []
    ended = np.zeros(how.samples, bool)
    while True:
        columns.append(np.asarray(following[0])[: how.samples, 0])
        ended |= columns[-1] == tokenizer.eos_id
        if ended.all() or len(columns) == how.tokens:
            break
        following, cache = compiled(cache, *following)
    texts = []
    for row in np.stack(columns, axis=1).tolist():
        until = row.index(tokenizer.eos_id) if tokenizer.eos_id in row else len(row)
        texts.append(written_text(tokenizer, prompt, of_prompt, row[:until]))
    return texts


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Ids of a prompt. Raises UserError where it has none."""
    try:
        return tokenizer.encode(prompt)
    except UserError as error:
        raise UserError(f"--prompt: {error}") from error


def written_text(tokenizer: Tokenizer, prompt: str, ids: Sequence[int], written: Sequence[int]) -> str:
    """A prompt and what was written after it, decoded as the one text they are.

    Decoders treat the start of a text apart, so that a continuation decoded alone would lose a space. The text begins with
    the prompt as it was given if the tokenizer gives that back, and else with what the tokenizer makes of it, such as lower
    case. A character that the last tokens begin and do not finish is left out: decoders of byte tokens would spoil the whole
    run of bytes it stands in.

    Args:
      ids: of the prompt, by `tokenizer`.
      written: ids, without the end of the document.
    """
    kept, text = written, tokenizer.decode([*ids, *written])
    least = max(0, len(written) - 3) if text.endswith(BROKEN) else len(written)  # a character has up to 4 bytes
    for count in reversed(range(least, len(written))):
        shorter = tokenizer.decode([*ids, *written[:count]])
        if not shorter.endswith(BROKEN):
            kept, text = written[:count], shorter
            break
    if text.startswith(prompt) or tokenizer.decode(ids) != prompt:
        return text
    return prompt + tokenizer.decode(kept)  # wrong bytes within the text have spoilt the prompt's last ones
