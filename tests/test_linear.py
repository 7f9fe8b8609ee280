"""Linear attention against the recurrence of its paper, in float64 numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import EXACT, close
from matrix import Row

from mla.model import parameters
from mla.ops.recurrence import linear_recurrence

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize("chunk", [1, 7, 32, 512])
def test_equals_the_recurrence_of_the_paper(chunk):
    """Equations 16 to 20 of 2006.16236, one token and head at a time."""
    mixer = Row("linear", {"chunk": chunk}).mixer()
    x = jax.random.normal(jax.random.key(0), (1, 60, 32))
    w = jax.tree.map(lambda a: np.asarray(a, np.float64), parameters(mixer))
    expected = np.zeros((60, 32))
    for head in range(4):
        columns = slice(8 * head, 8 * head + 8)
        s, z = np.zeros((8, 8)), np.zeros(8)
        for t, token in enumerate(np.asarray(x[0], np.float64)):
            q, k, v = (token @ w[name]["kernel"][:, columns] for name in ("query", "key", "value"))
            phi_q, phi_k = (np.where(u > 0, u + 1, np.exp(u)) for u in (q, k))
            s, z = s + np.outer(phi_k, v), z + phi_k
            expected[t] += (phi_q @ s / (phi_q @ z)) @ w["out"]["kernel"][columns]
    close(jax.jit(mixer)(x)[0], expected, EXACT, unit=True)


def test_state_does_not_grow():
    mixer = Row("linear").mixer()
    shapes = {jax.tree.leaves(mixer.init_cache(1, capacity, jnp.bfloat16))[0].shape for capacity in (1, 10**6)}
    assert shapes == {(1, 4, 8, 9)}


def test_the_recurrence_carries_any_state():
    """Two halves, the second from the first's state, equal the whole."""
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (2, 50, 3, n)) for key, n in zip(keys, (4, 4, 6), strict=True))
    zero = jnp.zeros((2, 3, 4, 6))
    whole, last = linear_recurrence(q, k, v, zero, chunk=16)
    first, middle = linear_recurrence(q[:, :23], k[:, :23], v[:, :23], zero, chunk=16)
    second, end = linear_recurrence(q[:, 23:], k[:, 23:], v[:, 23:], middle, chunk=16)
    close(jnp.concatenate([first, second], 1), whole, EXACT, unit=True)
    close(end, last, EXACT, unit=True)
