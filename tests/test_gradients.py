"""Gradients against finite differences in float64, for every mechanism and every one of its parameters."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import close
from matrix import D_MODEL, every_row

from mla.model import parameters, with_parameters

STEP = 1e-5
LENGTH = 60  # past the short window and one chunk of the matrix


@pytest.mark.parametrize("row", **every_row)
def test_gradients_are_finite_differences(row):
    """Along a random direction of each array, one after the other, the input included: 1e-6 of the gradient's length."""
    with jax.enable_x64(True):
        mixer = row.mixer(jnp.float64)
        graph = nnx.graphdef(mixer)
        draw = np.random.default_rng(0)
        inputs = jnp.asarray(draw.standard_normal((1, LENGTH, D_MODEL)))
        weights = jnp.asarray(draw.standard_normal((1, LENGTH, D_MODEL)) / LENGTH)
        point = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), {"x": inputs, "mixer": parameters(mixer)})

        @jax.jit  # once for both: compiling takes longer than anything here
        @jax.value_and_grad
        def differentiated(point):
            return jnp.sum(with_parameters(graph, point["mixer"])(point["x"]) * weights)

        _, gradient = differentiated(point)
        leaves, structure = jax.tree.flatten(point)
        for index, (path, exact) in enumerate(jax.tree_util.tree_leaves_with_path(gradient)):
            assert exact.dtype == jnp.float64
            direction = jnp.asarray(draw.standard_normal(exact.shape))

            def at(step, index=index, direction=direction):
                moved = [*leaves[:index], leaves[index] + step * direction, *leaves[index + 1 :]]
                return float(differentiated(jax.tree.unflatten(structure, moved))[0])

            slope, length = (at(STEP) - at(-STEP)) / (2 * STEP), float(jnp.linalg.norm(exact))
            name = jax.tree_util.keystr(path)
            flat = bool(row.flat and re.search(row.flat, name))
            assert (length > 1e-6) != flat, f"{name} has a gradient of length {length}"
            close(slope, float(jnp.vdot(exact, direction)), 1e-6 * max(length, 1.0), name)
