"""The accuracy at which training on a synthetic task may end. Legend: B sequences, T tokens, D width, V vocabulary."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mla.config import Config
from mla.data.batch import Batch
from mla.data.tasks.mixture import Mixture
from mla.sharding import batch_sharding, in_turn
from mla.training.step import Trainer


class Target:
    """Accuracy on episodes that were never trained on, for `config.target_accuracy`.

    Args:
      config: of the run.
      trainer: of the run.
      mixture: what the run is trained on.
    """

    def __init__(self, config: Config, trainer: Trainer, mixture: Mixture):
        self._config, self._mixture, self._mesh = config, mixture, trainer.mesh
        count = jax.jit(functools.partial(correct, trainer, config.loss_chunk_tokens))
        self._count = in_turn(count, trainer.mesh)

    def accuracy(self, params: Any, step: int) -> float:
        """The mean over the levels of the share of right answers in a batch of each, by the parallel form.

        Args:
          params: of the model.
          step: steps taken; another step draws other episodes.
        """
        size, placed, shares = self._config.batch_size, batch_sharding(self._mesh), []
        for task in self._mixture.tasks:
            drawn = task.draw(size, self._config.seed, start=step * size, split="validation")
            short = ((0, 0), (0, self._config.context - drawn.tokens.shape[1]))
            batch = Batch(*(np.pad(part, short) for part in (drawn.tokens, drawn.targets, drawn.weights)))
            batch = jax.tree.map(lambda a: jax.make_array_from_callback(a.shape, placed, a.__getitem__), batch)
            right, asked = self._count(params, batch)
            shares.append(float(right) / float(asked))
        return float(np.mean(shares))


def correct(trainer: Trainer, chunk_tokens: int, params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Right answers and answers of a batch, fp32 (): those with a weight.

    Args:
      trainer: whose model it is.
      chunk_tokens: tokens, of all rows together, whose logits exist at once.
      params: of the model.
      batch: [B, T].
    """
    assert batch.weights is not None
    model = trainer.model(params)
    hidden = model.hidden(batch.tokens)
    size, length, width = hidden.shape
    parts = min(length, -(-size * length // chunk_tokens))
    cut = -(-length // parts)
    padded = jnp.pad(hidden, ((0, 0), (0, parts * cut - length), (0, 0)))
    pieces = padded.reshape(size, parts, cut, width).swapaxes(0, 1)
    said = jax.lax.map(lambda piece: model.logits(piece).argmax(-1), pieces)  # along T: the batch stays split over devices
    said = said.swapaxes(0, 1).reshape(size, parts * cut)[:, :length]
    asked = (batch.weights > 0).astype(jnp.float32)
    return jnp.sum(asked * (said == batch.targets)), jnp.sum(asked)
