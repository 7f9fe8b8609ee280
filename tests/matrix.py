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
    reach: int | None = None  # tokens that the query at position 57 sees, its own included; None: all before it
    shift: int | None = 41  # added to all positions, it changes nothing; None: absolute positions matter

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

LATENT = {"kv_lora_rank": 20, "qk_rope_head_dim": 4}

ROWS = [
    Row("mha"),
    Row("mha", qk_norm=True),
    Row("mha", {"rope_fraction": 0.0, "sink": True}),
    Row("mqa"),
    Row("mqa", {"q_lora_rank": 20, "value_norm": True, "scale": 0.5}),
    Row("gqa", {"num_kv_heads": 2, "head_dim": 6}),
    Row("gqa", {"rope_fraction": 0.5, "soft_cap": 2.0, "output_gate": True}, qk_norm=True),
    Row("mla", LATENT),
    Row("mla", {"kv_lora_rank": 12, "qk_rope_head_dim": 4, "attend": "absorbed"}),
    Row("mla", LATENT | {"attend": "expanded"}),
    Row("mla", {"kv_lora_rank": 12, "q_lora_rank": 24, "qk_rope_head_dim": 6, "v_head_dim": 10, "latent_scale": "sqrt"}),
    Row("mla", {"kv_lora_rank": 20, "qk_rope_head_dim": 8, "rope_interleaved": False, "yarn": YARN}),
    Row("mla", {"kv_lora_rank": 20, "qk_rope_head_dim": 0}),
    Row("mla", LATENT | {"q_lora_rank": 24, "latent_bias": True, "sink": True, "soft_cap": 3.0, "output_gate": True}),
    Row("mla", LATENT | {"window": 50}, reach=50),
    Row("grouped_latent", {"qk_rope_head_dim": 4}),
    Row("grouped_latent", LATENT | {"q_lora_rank": 12, "group_queries": True, "latent_bias": True, "num_latents": 4}),
    Row("low_rank_blocks", LATENT),
    Row("low_rank_blocks", LATENT | {"branches": 2, "q_lora_rank": 12, "output_gate": True, "attend": "absorbed"}),
    Row("grouped_tied", {"head_dim": 10, "qk_rope_head_dim": 4, "sink": True}),
    Row("tensor_product", {"rank_q": 3, "factor_init": "unit"}),
    Row("tensor_product", {"rank_q": 0, "rank_k": 3, "head_dim": 6, "soft_cap": 3.0, "sink": True, "attend": "absorbed"}),
    Row("tensor_product", {"contextual_a": False, "factor_init": "unit"}),
    Row("tensor_product", {"contextual_b": False, "factor_init": "paper"}),
    Row("multi_matrix", {"head_dim": 10}),
    Row("multi_matrix_kr", {"head_dim": 12, "attend": "absorbed"}),
    Row("dmc", {"offset": 0.0}),
    Row("dmc", {"offset": 0.5, "segment": 4, "num_kv_heads": 4, "rope_fraction": 0.5, "sink": True, "output_gate": True}),
    Row("slim", {"head_dim": 12}),
    Row("slim", {"head_dim": 10, "rope_fraction": 0.4, "attend": "absorbed"}, qk_norm=True),
    Row("sliding_window", {"window": 50}, reach=50),
    Row("sliding_window", {"window": 9, "num_kv_heads": 1}, reach=9),
    Row("chunked", {"chunk": 50}, reach=8, shift=100),
    Row("chunked_global", {"temperature_floor": 40}, shift=None),
    Row("linear", {"chunk": 32}),
    Row("linear", {"head_dim": 6}, qk_norm=True),
]

every_row = {"argvalues": ROWS, "ids": [row.id for row in ROWS]}
