"""Shapes that the ops declare are checked in every test: a call that breaks one is refused, with its argument."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from helpers import contiguous_mask
from jaxtyping import TypeCheckError

from mla.ops.attention import attention_columns, attention_weights, selected_attention, softmax_attention
from mla.ops.mask import Mask
from mla.ops.recurrence import linear_recurrence
from mla.ops.rope import frequencies, rotate

B, S, C, H, G, N, D = 2, 3, 5, 4, 1, 2, 8
QUERIES, KEYS, VALUES = jnp.ones((B, S, H, D)), jnp.ones((B, C, 2, D)), jnp.ones((B, C, 2, 6))
INDICES, SINK, LOGITS = jnp.zeros((B, S, G, N), jnp.int32), jnp.ones(H), jnp.ones((B, S, H, C))
MASK = Mask(jnp.zeros((B, S), jnp.int32), jnp.zeros((B, C), jnp.int32))
STATE, TOKENS = jnp.ones((B, H, D, 6)), jnp.ones((B, S, H, 6))
POSITIONS = jnp.zeros((B, S), jnp.int32)


def call(op: str, **given: Any) -> Any:
    """One right call of an op, with some arguments replaced."""
    q, k, v = ((given.pop(name, (default,))) for name, default in (("queries", QUERIES), ("keys", KEYS), ("values", VALUES)))
    v = v[0] if isinstance(v, tuple) else v
    modifiers: dict[str, Any] = {"scale": 1.0, "sink": given.pop("sink", SINK)}
    if op == "softmax_attention":
        return softmax_attention(q, k, v, MASK, **modifiers)
    if op == "selected_attention":
        return selected_attention(q, k, v, given.pop("indices", INDICES), MASK, **modifiers)
    if op == "attention_columns":
        return attention_columns(q, k, MASK, **modifiers)
    if op == "attention_weights":
        return attention_weights(given.pop("logits", LOGITS), MASK, sink=modifiers["sink"])
    if op == "recurrence":
        return linear_recurrence(QUERIES, QUERIES, given.pop("tokens", TOKENS), given.pop("state", STATE))
    return rotate(QUERIES, given.pop("positions", POSITIONS), 10_000.0)


OPS = ("softmax_attention", "selected_attention", "attention_columns", "attention_weights", "recurrence", "rotate")
WRONG: list[tuple[str, dict[str, Any]]] = [
    ("softmax_attention", {"queries": (jnp.ones((B, S, H)),)}),
    ("softmax_attention", {"keys": (jnp.ones((B, C + 1, 2, D)),)}),
    ("softmax_attention", {"keys": (jnp.ones((B, C, 2, D), jnp.int32),)}),
    ("softmax_attention", {"values": jnp.ones((B + 1, C, 2, 6))}),
    ("softmax_attention", {"sink": jnp.ones(H + 1)}),
    ("selected_attention", {"indices": jnp.zeros((B, S, N), jnp.int32)}),
    ("selected_attention", {"indices": jnp.zeros((B, S, G, N))}),
    ("selected_attention", {"indices": jnp.zeros((B, S + 1, G, N), jnp.int32)}),
    ("attention_columns", {"sink": jnp.ones((1, H))}),
    ("attention_weights", {"logits": jnp.ones((B, S, H + 1, C))}),
    ("recurrence", {"tokens": jnp.ones((B, S, H, 5))}),
    ("recurrence", {"state": jnp.ones((B, H, 6, D))}),
    ("rotate", {"positions": jnp.zeros((B + 1, S), jnp.int32)}),
    ("rotate", {"positions": jnp.zeros((B, S))}),
]


@pytest.mark.parametrize("op", OPS)
def test_a_right_call_passes(op: str) -> None:
    jax.eval_shape(lambda: call(op))


@pytest.mark.parametrize("op,given", WRONG, ids=[f"{op}-{next(iter(given))}-{i}" for i, (op, given) in enumerate(WRONG)])
def test_a_shape_that_does_not_fit_is_refused(op: str, given: dict[str, Any]) -> None:
    with pytest.raises(TypeCheckError, match=next(iter(given)).replace("tokens", "values")):
        jax.eval_shape(lambda: call(op, **given))


def test_a_mask_s_own_arrays_fit_each_other() -> None:
    mask = contiguous_mask(B, C)
    assert mask.visible().shape == (B, C, C)
    for wrong in (
        {"since": jnp.zeros((B, C + 1), jnp.int32)},
        {"until": jnp.zeros((B, C, 2), jnp.int32)},
        {"entry_positions": jnp.zeros((B + 1, C), jnp.int32)},
        {"query_positions": jnp.zeros((B, C))},
    ):
        with pytest.raises(TypeCheckError, match=next(iter(wrong))):
            dataclasses.replace(mask, **wrong)


def test_a_mask_passes_through_compiled_functions() -> None:
    mask = contiguous_mask(B, C)
    assert jax.jit(lambda m: dataclasses.replace(m, contiguous=False))(mask).query_positions.shape == (B, C)
    assert frequencies(D, 10_000.0).shape == (D // 2,)
