"""A trained model as a model of another mechanism that computes the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from mla import config as configs
from mla import model as models
from mla.attention.softmax import slim
from mla.config import Config
from mla.errors import UserError
from mla.model import Model
from mla.sharding import platform, shardings

# (from, to) -> one layer's parameters as the other mechanism's, and how well that is conditioned.
CONVERSIONS: dict[tuple[str, str], Callable[[dict[str, Any]], tuple[dict[str, Any], float]]] = {
    ("mha", "slim"): slim.from_mha,
}


def check(name: str) -> None:
    """Refuses a mechanism that nothing can be turned into.

    Raises:
      UserError: with what there is.
    """
    if name not in {to for _, to in CONVERSIONS}:
        raise UserError(f"--as_mechanism={name}: nothing can be turned into it; known: {_known()}")


def _known() -> str:
    return ", ".join(f"{a} to {b}" for a, b in CONVERSIONS)


def convert(config: Config, model: Model, vocab_size: int, name: str, mesh: Mesh) -> tuple[Config, Model, dict[str, Any]]:
    """`model` with every layer turned into mechanism `name`.

    Args:
      config, model: a trained model; it is left as it is.
      vocab_size: its tokens.
      name: a mechanism that all its layers can be turned into.
      mesh: where the new parameters go.

    Returns:
      The config and the model, and what eval.json says about it: {from, to, condition_numbers (one a layer)}.

    Raises:
      UserError: no such conversion, or weights that do not allow it.
    """
    layers = configs.layers(config.model)
    source = configs.describe(config.model)
    if any((layer.name, name) not in CONVERSIONS or layer.source is not None for layer in layers):
        raise UserError(f"--as_mechanism={name}: {source} cannot be turned into it; known: {_known()}")
    changed = copy.deepcopy(config)
    changed.name = f"{config.name}-as-{name}"
    changed.model.pattern = tuple(f"{entry.partition('=')[0]}={name}" for entry in config.model.pattern)
    changed.model.mechanism = configs.mechanism_configs(
        changed.model.pattern, {label: configs.to_dict(own) for label, own in config.model.mechanism.items()}
    )
    # The widths are what they are: nothing is matched again.
    changed.model.mlp_width = models.sizes(config, vocab_size).mlp_width
    changed.model.match_parameters = False
    configs.validate(changed)

    parameters, conditions = jax.device_get(models.parameters(model)), []
    for index, layer in enumerate(layers):
        block = parameters["blocks"][str(index)]
        try:
            block["mixer"], condition = CONVERSIONS[layer.name, name](block["mixer"])
        except ValueError as error:
            raise UserError(f"--as_mechanism={name}: layer {index}: {error}") from None
        conditions.append(condition)
    abstract = nnx.eval_shape(lambda: models.create(changed, vocab_size, platform=platform(mesh)))
    placed = jax.device_put(parameters, shardings(parameters, models.axes(abstract), mesh))
    notes = {"from": source, "to": name, "condition_numbers": conditions}
    return changed, models.with_parameters(nnx.graphdef(abstract), placed), notes
