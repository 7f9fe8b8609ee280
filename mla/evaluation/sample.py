"""Text from a prompt, through the cache."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mla.errors import UserError
from mla.evaluation.decoding import Decoder, batch_multiple, positions
from mla.model import Model, ModelCache
from mla.tokenizers import Tokenizer


def sample(
    model: Model,
    tokenizer: Tokenizer,
    mesh: Mesh,
    prompt: str,
    *,
    tokens: int = 200,
    temperature: float = 0.8,
    seed: int = 0,
) -> str:
    """What the model writes after `prompt`, without the prompt. Stops early at the end of a document.

    Args:
      prompt: empty: a new document.
      tokens: at most so many.
      temperature: of the softmax; 0 takes the likeliest token.
      seed: the same seed gives the same text.

    Raises:
      UserError: a number out of range, or a model that does not belong to the tokenizer.
    """
    if tokens < 1:
        raise UserError(f"--sample_tokens: {tokens} is not a positive number of tokens")
    if not temperature >= 0:
        raise UserError(f"--temperature: {temperature} is negative; 0 takes the likeliest token")
    if model.vocab_size != tokenizer.vocab_size:
        raise UserError(f"--prompt: the model has {model.vocab_size} tokens, {tokenizer.name} {tokenizer.vocab_size}")
    ids = tokenizer.encode(prompt) or [tokenizer.eos_id]
    batch = batch_multiple(mesh)  # a mesh that splits the batch needs a row a device; all are the same
    decoder = Decoder(model, batch, len(ids) + tokens, mesh, prompt=len(ids))

    def step(
        model: Model, cache: ModelCache, ids: jax.Array, where: jax.Array, key: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array, jax.Array], ModelCache]:
        logits, cache = model.extend(ids, where, cache, last_only=True)
        key, now = jax.random.split(key)
        chosen = jax.random.categorical(now, logits[:1] / temperature) if temperature else jnp.argmax(logits[:1], -1)
        return (jnp.broadcast_to(chosen.astype(jnp.int32), (batch, 1)), where[:, -1:] + 1, key), cache

    compiled = decoder.compiled(step)
    prompt_ids = np.tile(np.asarray(ids, np.int32), (batch, 1))
    following, cache = compiled(decoder.empty(), prompt_ids, positions(batch, 0, len(ids)), jax.random.key(seed))
    written: list[int] = []
    while True:
        written.append(int(following[0][0, 0]))
        if written[-1] == tokenizer.eos_id or len(written) == tokens:
            return tokenizer.decode(written)
        following, cache = compiled(cache, *following)
