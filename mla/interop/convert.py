"""A trained model as a model of another mechanism that computes the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from mla import config as configs
from mla import model as models
from mla import workdir as folder
from mla.attention.softmax import slim
from mla.config import Config
from mla.errors import UserError
from mla.model import Model
from mla.sharding import make_mesh, prepare_devices, require_whole_heads, shardings
from mla.training.checkpoint import Checkpoints, load_model
from mla.training.step import TrainState, make_optimizer

# One layer's parameters -> those of the other mechanism, and the condition number of what was solved (1: nothing was).
Conversion = Callable[[dict[str, Any]], tuple[dict[str, Any], float]]

# (trained as, turned into). Settings that both mechanisms have stay what they are.
CONVERSIONS: dict[tuple[str, str], Conversion] = {
    ("mha", "slim"): slim.from_mha,
    ("slim", "mha"): slim.to_mha,
}
FILE = "conversion.json"  # in the folder of a converted run: what it was


def check(name: str) -> None:
    """Refuses a mechanism that nothing can be turned into.

    Raises:
      UserError: with what there is.
    """
    if name not in {to for _, to in CONVERSIONS}:
        raise UserError(f"--as_mechanism={name}: nothing can be turned into it; known: {known()}")


def known() -> str:
    """The conversions there are, for help and error lines."""
    return ", ".join(f"{a} to {b}" for a, b in CONVERSIONS)


def convert(workdir: str, name: str, out: str, config: Config) -> None:
    """Turns every layer of a trained run into mechanism `name`, as a run of its own in the folder `out`.

    That run stands where the other one does, at the same step, tokens and position in the data, so that it can be evaluated,
    trained for longer and converted like any other. Its optimizer has no moments yet. `out` is either whole or not there.

    Args:
      workdir: of the run; its newest checkpoint is read.
      name: a mechanism that all its layers can be turned into.
      out: a folder that is not there yet, or is empty.
      config: the run's own, perhaps with another mesh.

    Raises:
      UserError: no such run or conversion, weights that do not allow it, a folder that holds anything.
    """
    check(name)
    with folder.making(Path(out), "--out") as made:
        prepare_devices(config.mesh)
        mesh = make_mesh(config.mesh)
        require_whole_heads(config, mesh)
        loaded = load_model(workdir, mesh)
        changed, model, notes = converted(loaded.config, loaded.model, loaded.vocab_size, name, mesh)
        params, step = models.parameters(model), jnp.asarray(loaded.step, jnp.int32)
        optimizer = make_optimizer(changed.optimizer, changed.steps, models.decays(model))
        opt_state = optax.tree_utils.tree_set(optimizer.init(params), count=step)  # the schedule goes on where it was
        sha256 = folder.known_corpus(loaded.config, workdir) or None
        folder.write(changed, made, folder.environment(corpus_sha256=sha256, command=folder.command()))
        folder.write_tokenizer(made, Path(workdir))
        folder.write_json(made / FILE, {"workdir": workdir, "step": loaded.step, **notes})
        with Checkpoints(made, keep=1) as checkpoints:
            checkpoints.save(loaded.step, TrainState(params, opt_state, step), loaded.position, loaded.progress)
    print(f"{out}: {workdir} at step {loaded.step}, as {name}; {told(notes)}")


def told(notes: dict[str, Any]) -> str:
    """How well the conversion with these notes is conditioned, for the terminal."""
    return f"largest condition number of a layer {max(notes['condition_numbers']):.3g}"


def converted(config: Config, model: Model, vocab_size: int, name: str, mesh: Mesh) -> tuple[Config, Model, dict[str, Any]]:
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
        raise UserError(f"--as_mechanism={name}: {source} cannot be turned into it; known: {known()}")
    changed = _converted_config(config, name)
    changed.model.solved_mlp_width = models.sizes(config, vocab_size).mlp_width  # the MLPs stay as they are
    configs.validate(changed)

    parameters, conditions = jax.device_get(models.parameters(model)), []
    for index, layer in enumerate(layers):
        block = parameters["blocks"][str(index)]
        try:
            block["mixer"], condition = CONVERSIONS[layer.name, name](block["mixer"])
        except ValueError as error:
            raise UserError(f"--as_mechanism={name}: layer {index}: {error}") from None
        conditions.append(condition)
    built = configs.for_evaluation(changed)  # what `model` was built from too, where it is evaluated
    abstract = nnx.eval_shape(lambda: models.create(built, vocab_size, mesh=mesh))
    placed = jax.device_put(parameters, shardings(parameters, models.axes(abstract), mesh))
    notes = {"from": source, "to": name, "condition_numbers": conditions}
    return changed, models.with_parameters(nnx.graphdef(abstract), placed), notes


def _converted_config(config: Config, name: str) -> Config:
    """`config` with mechanism `name` under every label; a lone label that was the mechanism's name is the new one's."""
    changed, model = copy.deepcopy(config), config.model
    changed.name = f"{config.name}-as-{name}"
    renamed = {label: name if len(model.mechanism) == 1 and label in model.pattern else label for label in model.mechanism}
    changed.model.pattern = tuple(
        name if renamed[label] == name else f"{label}={name}" for label, _, _ in map(configs.parse, model.pattern)
    )
    fresh = configs.mechanism_configs(changed.model.pattern)
    settings = {renamed[label]: configs.to_dict(own) for label, own in model.mechanism.items()}
    shared = {
        label: {field: value for field, value in settings[label].items() if hasattr(fresh[label], field)} for label in fresh
    }
    changed.model.mechanism = configs.mechanism_configs(changed.model.pattern, shared)
    return changed
