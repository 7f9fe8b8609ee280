"""The one list of mechanisms that every shared test runs over. A new mechanism adds a row (or a few, for its forms)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mla.attention.contract import Mixer, Surroundings, mechanism
from mla.config import build

D_MODEL, HEADS = 32, 4


@dataclasses.dataclass(frozen=True)
class Row:
    """A mechanism with settings small enough for a CPU and odd enough to catch swapped dimensions."""

    name: str
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    qk_norm: bool = False
    reach: int | None = None  # tokens a query sees, its own included; None: all before it

    @property
    def id(self) -> str:
        words = [f"{k}={v}" for k, v in self.settings.items() if k != "yarn"] + ["yarn"] * ("yarn" in self.settings)
        return "-".join([self.name, *words, *["qk_norm"] * self.qk_norm])

    def around(self, dtype: Any = jnp.float32, **changes: Any) -> Surroundings:
        values = {"d_model": D_MODEL, "num_heads": HEADS, "context": 512, "dtype": dtype, "qk_norm": self.qk_norm}
        return Surroundings(**values | changes)

    def config(self) -> Any:
        return build(mechanism(self.name)[0], self.settings, "config.model.mechanism")

    def mixer(self, dtype: Any = jnp.float32, seed: int = 0, **changes: Any) -> Mixer:
        """A mixer whose weights are large enough that attention is far from uniform."""
        config, around = self.config(), self.around(dtype, **changes)
        config.validate(around)
        made = mechanism(self.name)[1](config, around, rngs=nnx.Rngs(seed))
        graph, params = nnx.split(made)
        keys = iter(jax.random.split(jax.random.key(seed + 1), len(jax.tree.leaves(params))))
        # Gains away from 1 and matrices above unit gain: a forgotten norm or a swapped weight shows.
        louder = jax.tree.map(
            lambda p: p * 1.5 if p.ndim > 1 else p + 0.3 * jax.random.normal(next(keys), p.shape, p.dtype), params
        )
        return nnx.merge(graph, louder)


YARN = {"factor": 4.0, "original_context": 64, "mscale": 0.707, "mscale_all_dim": 0.707}

ROWS = [
    Row("mha"),
    Row("mha", qk_norm=True),
    Row("mqa"),
    Row("gqa", {"num_kv_heads": 2, "head_dim": 6}),
    Row("mla", {"kv_lora_rank": 20, "qk_rope_head_dim": 4}),
    Row("mla", {"kv_lora_rank": 12, "qk_rope_head_dim": 4, "attend": "absorbed"}),
    Row("mla", {"kv_lora_rank": 20, "qk_rope_head_dim": 4, "attend": "expanded"}),
    Row("mla", {"kv_lora_rank": 12, "q_lora_rank": 24, "qk_rope_head_dim": 6, "v_head_dim": 10, "latent_scale": "sqrt"}),
    Row("mla", {"kv_lora_rank": 20, "qk_rope_head_dim": 8, "rope_interleaved": False, "yarn": YARN}),
    Row("mla", {"kv_lora_rank": 20, "qk_rope_head_dim": 0}),
    Row("sliding_window", {"window": 50}, reach=50),
    Row("sliding_window", {"window": 9, "num_kv_heads": 1}, reach=9),
    Row("linear", {"chunk": 32}),
    Row("linear", {"head_dim": 6}, qk_norm=True),
]

every_row = {"argvalues": ROWS, "ids": [row.id for row in ROWS]}
