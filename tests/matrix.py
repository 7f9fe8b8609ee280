"""The one list of mechanisms that every shared test runs over. A new mechanism adds a row (or a few, for its forms)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import toys
from flax import nnx

from mla.attention.contract import Mixer, Surroundings, mechanism
from mla.config import build
from mla.model import parameters, with_parameters

D_MODEL, HEADS = 32, 4


@dataclasses.dataclass(frozen=True)
class Row:
    """A mechanism with settings small enough for a CPU and odd enough to catch swapped dimensions."""

    name: str
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    qk_norm: bool = False
    reach: Callable[[int], int] = lambda t: t + 1  # tokens that the query at position t sees, its own included
    reads: Callable[[int], set[int]] | None = None  # of those within reach, what it reads by where they stand; None: all
    shift: int | None = 41  # added to all positions, it changes nothing; None: absolute positions matter
    classes: tuple[Any, Any] | None = None  # config and mixer; by default those registered under the name
    # of the tokens within reach a query reads those it chooses, by what is in them: those "only", or True: others as well
    chooses: bool | str = False
    entry: int = 1  # tokens of an entry that it chooses
    order_only: bool = False  # how far apart tokens stand changes nothing either
    maps: int = 1  # attention maps a head, whose outputs are added and divided by the root of their number
    flat: str = ""  # a pattern of the parameters on which no output depends
    long: bool = False  # tested past 256 tokens, two tiles of the attention op, where the others take a few dozen

    @property
    def id(self) -> str:
        words = [f"{k}={v}" for k, v in self.settings.items() if k != "yarn"] + ["yarn"] * ("yarn" in self.settings)
        return "-".join([self.name, *words, *["qk_norm"] * self.qk_norm])

    @property
    def of(self) -> tuple[Any, Any]:
        """The config class and the mixer class."""
        return self.classes or mechanism(self.name)

    def around(self, dtype: Any = None, **changes: Any) -> Surroundings:
        dtype = dtype or jnp.zeros(()).dtype
        values = {"d_model": D_MODEL, "num_heads": HEADS, "context": 512, "dtype": dtype, "qk_norm": self.qk_norm}
        values["platform"] = jax.devices()[0].platform  # as training and evaluation say it; one implementation to trace
        return Surroundings(**values | changes)

    def config(self) -> Any:
        return build(self.of[0], self.settings, "config.model.mechanism")

    def mixer(self, dtype: Any = None, seed: int = 0, **changes: Any) -> Mixer:
        """A mixer whose weights are large enough that attention is far from uniform. Compiles nothing.

        Matrices have gain 1.5, norms' gains, biases and the like stand apart from 1 and 0: a forgotten norm or a swapped
        weight shows. Parameters are fp32 numbers whatever the dtype, so that mixers of two dtypes compute the same thing;
        they are stored as float64 where the dtype is. No dtype: float64 under `jax.enable_x64`, otherwise float32.
        """
        dtype = dtype or jnp.zeros(()).dtype
        config, around = self.config(), self.around(dtype, **changes)
        config.validate(around)
        empty = nnx.eval_shape(lambda: self.of[1](config, around, rngs=nnx.Rngs(0)))
        draw = np.random.default_rng(seed)

        def drawn(path: Any, shape: Any) -> jax.Array:
            noise = draw.normal(size=shape.shape)
            centre = 1.0 if path[-1].key == "scale" else 0.0
            value = noise * 1.5 / shape.shape[0] ** 0.5 if noise.ndim > 1 else centre + 0.3 * noise
            return jnp.asarray(value.astype(np.float32), jnp.promote_types(dtype, jnp.float32))

        return with_parameters(nnx.graphdef(empty), jax.tree_util.tree_map_with_path(drawn, parameters(empty)))


YARN = {"factor": 4.0, "original_context": 64, "mscale": 0.707, "mscale_all_dim": 0.707}

INDEX = {"index_heads": 3, "index_head_dim": 6}
V4 = {"window": 9, "head_dim": 10, "qk_rope_head_dim": 4, "out_groups": 2, "out_rank": 6}
LATENT = {"kv_lora_rank": 20, "qk_rope_head_dim": 4}


def window(size: int) -> Callable[[int], int]:
    """The reach of a sliding window."""
    return lambda t: min(t + 1, size)


def compressed_reach(segment: int, memory: int, compressed: int) -> Callable[[int], int]:
    """The reach of a segment with so many tokens of memory and of compressed memory before it."""
    return lambda t: t + 1 - max(0, t // segment * segment - memory - compressed)


def strided(stride: int) -> Callable[[int], set[int]]:
    return lambda t: {s for s in range(t + 1) if t - s <= stride or (t - s) % stride == 0}


def columns(stride: int, kept: int) -> Callable[[int], set[int]]:
    return lambda t: {s for s in range(t + 1) if s // stride == t // stride or s % stride >= stride - kept}


def dilated(tokens: int, dilation: int) -> Callable[[int], set[int]]:
    return lambda t: {t - i * dilation for i in range(tokens) if i * dilation <= t}


NATIVE = {"pool_block": 8, "pool_stride": 4, "block": 12, "top_k": 4, "near": 9}

BIRD = {"block": 4, "global_blocks": 1, "window_blocks": 2, "random_blocks": 2}

ROWS = [
    Row("mha", long=True),
    Row("mha", qk_norm=True),
    Row("mha", {"rope_fraction": 0.0, "sink": True}, order_only=True),
    Row("mqa"),
    Row("mqa", {"q_lora_rank": 20, "value_norm": True, "scale": 0.5}),
    Row("gqa", {"num_kv_heads": 2, "head_dim": 6}),
    Row("gqa", {"rope_fraction": 0.5, "soft_cap": 2.0, "output_gate": True}, qk_norm=True),
    Row("mla", LATENT, long=True),
    Row("mla", {"kv_lora_rank": 12, "qk_rope_head_dim": 4, "attend": "absorbed"}),
    Row("mla", LATENT | {"attend": "expanded"}),
    Row("mla", {"kv_lora_rank": 12, "q_lora_rank": 24, "qk_rope_head_dim": 6, "v_head_dim": 10, "latent_scale": "sqrt"}),
    Row("mla", {"kv_lora_rank": 20, "qk_rope_head_dim": 8, "rope_interleaved": False, "yarn": YARN}),
    Row("mla", {"kv_lora_rank": 20, "qk_rope_head_dim": 0}, order_only=True),
    Row("mla", LATENT | {"rope": False}, order_only=True),
    Row("mla", LATENT | {"q_lora_rank": 24, "latent_bias": True, "sink": True, "soft_cap": 3.0, "output_gate": True}),
    Row("mla", LATENT | {"window": 50}, reach=window(50)),
    Row("grouped_latent", {"qk_rope_head_dim": 4}),
    Row(
        *("grouped_latent", LATENT | {"q_lora_rank": 12, "group_queries": True, "latent_bias": True, "num_latents": 4}),
        flat="key_up.*bias",  # it adds one number to all logits of a query, which a softmax without cap or sink does not see
    ),
    Row("low_rank_blocks", LATENT, maps=4),
    Row("low_rank_blocks", LATENT | {"branches": 2, "q_lora_rank": 12, "output_gate": True, "attend": "absorbed"}, maps=2),
    Row("temporal_latent", LATENT | {"stride": 4}, shift=None, long=True),
    Row("temporal_latent", LATENT | {"stride": 3, "q_lora_rank": 24, "latent_bias": True, "sink": True}, shift=None),
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
    Row("sliding_window", {"window": 50}, reach=window(50), long=True),
    Row("sliding_window", {"window": 9, "num_kv_heads": 1}, reach=window(9)),
    Row("chunked", {"chunk": 50}, reach=lambda t: t % 50 + 1, shift=100),
    Row("chunked_global", {"temperature_floor": 40}, shift=None),
    Row("compressed", V4 | {"stride": 5, "sink": False}, shift=40),
    Row("compressed", V4 | {"stride": 8, "window": 20, "q_lora_rank": 9, "output_gate": True}, shift=40),
    Row("compressed", V4 | {"stride": 0, "window": 20}, reach=window(20)),
    Row(
        "compressive",
        {"segment": 8, "memory": 12, "compressed_memory": 3, "rate": 4},
        reach=compressed_reach(8, 12, 12),
        shift=None,
    ),
    Row(
        "compressive",
        {"segment": 6, "memory": 6, "compressed_memory": 5, "rate": 2, "head_dim": 6, "sink": True, "output_gate": True},
        qk_norm=True,
        reach=compressed_reach(6, 6, 10),
        shift=None,
    ),
    Row("block_mixture", {"block": 8, "top_k": 3}, shift=40, chooses="only"),
    Row("block_mixture", {"block": 5, "top_k": 20, "num_kv_heads": 4, "sink": True}, qk_norm=True, shift=40),
    Row("deepseek_sparse", LATENT | {"top_k": 12, "index_head_dim": 10}, chooses="only", flat="index_"),
    Row(
        "deepseek_sparse",
        LATENT | {"top_k": 15, "q_lora_rank": 24, "index_heads": 3, "sink": True, "attend": "expanded", "window": 40},
        reach=window(40),
        chooses="only",
        flat="index_",
    ),
    Row("native_sparse", NATIVE, shift=None, chooses=True),
    Row(
        "native_sparse",
        {
            "pool_block": 6,
            "pool_stride": 3,
            "block": 6,
            "top_k": 4,
            "near": 5,
            "num_kv_heads": 1,
            "head_dim": 6,
            "sink": True,
        },
        qk_norm=True,
        shift=None,
        chooses=True,
    ),
    Row("strided", {"stride": 7}, reads=strided(7)),
    Row("strided", {"stride": 12, "num_kv_heads": 4, "sink": True, "soft_cap": 3.0}, qk_norm=True, reads=strided(12)),
    Row("fixed_columns", {"stride": 8, "columns": 3}, shift=40, reads=columns(8, 3), long=True),
    Row("fixed_columns", {"stride": 10, "columns": 10, "num_kv_heads": 1}, shift=40),
    Row("dilated", {"tokens_read": 5, "dilation": 3}, reads=dilated(5, 3)),
    Row("dilated", {"tokens_read": 9, "dilated_heads": 1}, reads=lambda t: dilated(9, 2)(t) | dilated(9, 1)(t)),
    Row("big_bird", BIRD, shift=None, chooses=True, long=True),
    Row("big_bird", BIRD | {"block": 3, "num_kv_heads": 4, "global_blocks": 0, "sink": True}, shift=None, chooses=True),
    Row(
        "compressed_sparse",
        V4 | INDEX | {"stride": 3, "top_k": 5, "window": 10},
        shift=42,
        chooses=True,
        entry=3,
        flat="index_",
    ),
    Row("compressed_sparse", V4 | INDEX | {"stride": 4, "top_k": 90, "output_gate": True}, shift=40, flat="index_"),
    Row("linear", {"chunk": 32}, long=True, order_only=True),
    Row("linear", {"head_dim": 6}, qk_norm=True, order_only=True),
    Row("linear", {"head_dim": 6, "normalise": "rmsnorm", "chunk": 8}, order_only=True),
    Row("retention", {"num_heads": 3, "head_dim": 6, "v_head_dim": 10, "chunk": 24}, long=True),
    Row("lightning", {"head_dim": 6, "chunk": 16}, order_only=True),
    Row(
        "gated_linear", {"head_dim": 6, "v_head_dim": 10, "gate_rank": 5, "gate_divisor": 4.0, "chunk": 16}, order_only=True
    ),
    Row("mamba2", {"head_dim": 16, "state_size": 6, "n_groups": 2, "chunk": 16}, order_only=True),
    Row("mamba2", {"num_heads": 8, "state_size": 10, "expand": 3, "conv_taps": 3, "chunk": 8}, order_only=True),
    Row("delta", {"head_dim": 6, "v_head_dim": 10, "chunk": 24, "negative_eigenvalues": True}, order_only=True),
    Row("delta", {"conv_taps": 0, "chunk": 16}, order_only=True),
    Row("gated_delta", {"head_dim": 6, "num_key_heads": 2, "chunk": 16, "conv_taps": 2}, order_only=True),
    Row("kimi_delta", {"head_dim": 12, "v_head_dim": 10, "chunk": 32}, long=True, order_only=True),
    Row("kimi_delta", {"head_dim": 10, "gate_bound": 1.0, "gate_rank": 5, "chunk": 8}, order_only=True),
    Row("gated_delta_2", {"v_head_dim": 10, "chunk": 16, "negative_eigenvalues": True}, order_only=True),
    Row("short_convolution", {"taps": 4}, order_only=True, reach=lambda t: min(t + 1, 4)),
]

POOLED = toys.PooledConfig, toys.Pooled
TOYS = [
    Row("convolved", classes=(toys.ConvolvedConfig, toys.Convolved), long=True, order_only=True),
    Row("pooled", classes=POOLED, shift=40, long=True),
    Row("pooled", {"held": 3}, reach=lambda t: (t + 1) % 4 + 4 * min((t + 1) // 4, 3), classes=POOLED, shift=40),
    Row("three_stores", {"stride": 3, "near": 9}, classes=POOLED, shift=42),
]


def rows_of(base: type) -> list[Row]:
    """Those whose mixer inherits from `base`: it has what that class has."""
    return [row for row in ROWS if issubclass(row.of[1], base)]


every_row = {"argvalues": ROWS, "ids": [row.id for row in ROWS]}
