"""Layers of one kind as one scan: what repeats, and that nothing but the length of the program depends on it."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SETTINGS
from flax import nnx
from helpers import EXACT, close

from mla import config as configs
from mla import model as models
from mla.attention.contract import Step
from mla.scan import Unit, units

VOCAB = 31


@pytest.mark.parametrize(
    ("kinds", "sources", "expected"),
    [
        ("aaaa", [None] * 4, [(0, 1, 4)]),
        ("aaabaaab", [None] * 8, [(0, 4, 2)]),
        ("aabbbb", [None] * 6, [(0, 1, 2), (2, 1, 4)]),
        ("abc", [None] * 3, [(0, 1, 1), (1, 1, 1), (2, 1, 1)]),
        ("abababc", [None] * 7, [(0, 2, 3), (6, 1, 1)]),
        # Each second layer reads the one below it.
        ("abab", [None, 0, None, 2], [(0, 2, 2)]),
        # All of the upper half read layer 2, which is in no scan; or each another one.
        ("aabccc", [None, None, None, 2, 2, 2], [(0, 1, 2), (2, 1, 1), (3, 1, 3)]),
        ("aaacc", [None, None, None, 0, 1], [(0, 1, 1), (1, 1, 1), (2, 1, 1), (3, 1, 1), (4, 1, 1)]),
    ],
)
def test_what_repeats(kinds: str, sources: list[int | None], expected: list[tuple[int, int, int]]) -> None:
    assert units(kinds, sources) == tuple(Unit(*each) for each in expected)


def built(variant: str, scan_layers: str, layers: int, **model: Any) -> models.Model:
    names = configs.labels(configs.parse_pattern(variant))
    own = {label: SETTINGS.get(name, {}) for label, name in names.items()}
    settings = own if len(names) > 1 else next(iter(own.values()), {})
    shape = {"d_model": 16, "num_heads": 2, "num_layers": layers, "mlp_multiple": 1, "match_parameters": False}
    config = configs.create(variant, settings, context=12, model=shape | {"scan_layers": scan_layers} | model)
    configs.validate(config)
    config.model.dtype = "float64"
    return models.create(config, VOCAB)


MOE = {"mlp": "moe", "mlp_fields": {"num_experts": 3, "experts_per_token": 2}}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("variant", "layers", "model", "expected"),
    [
        ("mla", 3, {"remat": "all_but_matmuls", "qk_norm": False}, [(0, 1, 3)]),
        ("gated_delta,gated_delta,gqa", 6, {"remat": "block"}, [(0, 3, 2)]),
        ("gqa/2", 4, {}, [(0, 2, 2)]),
        ("yoco", 8, {}, [(0, 1, 4), (4, 1, 1), (5, 1, 3)]),
        ("lightning", 2, {}, [(0, 1, 2)]),  # decays by the number of the layer
        ("big_bird", 2, {}, [(0, 1, 2)]),  # blocks drawn by it
        ("deepseek_sparse", 2, {}, [(0, 1, 2)]),  # a loss and metrics
        ("dmc", 2, {}, [(0, 1, 2)]),  # draws by the step's key
        ("mha", 2, MOE, [(0, 1, 2)]),
    ],
)
def test_a_scan_changes_nothing(variant: str, layers: int, model: dict[str, Any], expected: Any) -> None:
    """Hidden states, losses and metrics of layers, and gradients of all of them."""
    scanned, plain = (built(variant, choice, layers, **model) for choice in ("on", "off"))
    assert scanned.units == tuple(Unit(*each) for each in expected)
    assert plain.units == tuple(Unit(index, 1, 1) for index in range(layers))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, (2, 12)), jnp.int32)
    now = Step(jnp.asarray(0.4), jnp.asarray(0.3), jax.random.key(1))

    def objective(model: models.Model, params: Any) -> Any:
        built = models.with_parameters(nnx.graphdef(model), params)
        hidden, said = built.forward(tokens, step=now)
        added = sum(owner.total(words) for owner, words in built.by_owner(said.losses).items())
        metrics = [owner.logged(words) for owner, words in built.by_owner(said.metrics).items()]
        return jnp.sum(jnp.sin(hidden)) + added, (hidden, metrics)

    params = models.parameters(plain)
    ours, theirs = (
        jax.jit(jax.grad(functools.partial(objective, model), has_aux=True))(params) for model in (scanned, plain)
    )
    paths = jax.tree_util.tree_leaves_with_path(theirs)
    assert len(paths) == len(jax.tree.leaves(ours))
    for (path, expected_leaf), leaf in zip(paths, jax.tree.leaves(ours), strict=True):
        close(leaf, expected_leaf, EXACT, jax.tree_util.keystr(path), relative=EXACT)
