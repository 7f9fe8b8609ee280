"""FLOPs by formula: those of the products that a program has, for every mechanism, and of a textbook's model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matrix
import pytest
from flax import nnx
from matrix import D_MODEL, Row

from mla import flops, model
from mla.attention.contract import Mixer
from mla.compilation.count import matmul_flops
from mla.errors import UserError
from mla.training.logs import read_metrics
from mla.training.loop import train

LENGTHS = {"chunked": 950}  # in which the last chunk is whole
LENGTH = 960  # tokens: whole chunks, blocks and windows of the others
# What may stand beside a formula: scores of the block that is not finished, sums written as products; and room for the
# columns of blocks that are not there yet.
SMALL = {"block_mixture": 0.01, "native_sparse": 0.01, "fixed_columns": 0.05}


def twice(kernel: Any) -> float:
    """A product that a layer has written down twice; of a compiled program it is one."""
    return 2.0 * float(kernel.size)


def biases(mixer: Any, decode: bool) -> float:
    """Those of latents, each the weight of a channel that is always 1, where heads attend to latents."""
    if not (mixer.config.latent_bias and mixer.absorbs(1 if decode else LENGTH, LENGTH)):
        return 0.0
    maps = mixer.num_heads * mixer.readers
    return 2.0 * maps * (2 * mixer.seen(LENGTH) + mixer.nope_dim + mixer.v_dim)


def elementwise(mixer: Any, decode: bool) -> float:
    """Of factors a, which weigh logits and values without a product of matrices."""
    absorbs = mixer.absorbs(1 if decode else LENGTH, LENGTH)
    return -(2.0 * mixer.ranks[1] + mixer.ranks[2]) * mixer.num_heads * LENGTH * absorbs


def at_once(mixer: Any, decode: bool) -> float:
    """A segment's groups, which one decode step in so many compresses, and the room for them."""
    if not decode:
        return 0.0
    channels, closing = mixer.key.kernel.shape, mixer.config.segment // mixer.config.rate
    projected = 4.0 * channels[0] * channels[1] + mixer.pair_flops()
    return 2.0 * (mixer.config.segment - 1) * channels[0] ** 2 + closing * projected


def indexer(mixer: Any, decode: bool) -> float:
    """Its query's latent, which is the layer's; nothing of it where all entries are read."""
    if mixer.windows(LENGTH) > mixer.config.top_k:
        return twice(mixer.query.down.kernel)
    return -twice(mixer.index_query.kernel) - twice(mixer.index_weight.kernel)


# What programs have beside the formula, FLOPs a token, by mixer's name.
BESIDE: dict[str, Callable[[Any, bool], float]] = {
    "tensor_product": elementwise,
    "compressive": at_once,
    "compressed_sparse": indexer,
    "dmc": lambda mixer, decode: twice(mixer.query.kernel),
    "deepseek_sparse": lambda mixer, decode: twice(mixer.query.down.kernel) if mixer.config.q_lora_rank else 0.0,
    **dict.fromkeys(("mla", "grouped_latent", "low_rank_blocks", "temporal_latent"), biases),
}


def abstract(row: Row, **changes: Any) -> Mixer:
    backend = {"backend": "gather,reference", "recurrence_backend": "auto", "context": LENGTH}
    config, around = row.config(), row.around(**backend | changes)
    return nnx.eval_shape(lambda: row.of[1](config, around, rngs=nnx.Rngs(0)))


def counted(mixer: Mixer, length: int, decode: bool) -> float:
    """FLOPs of products in the program of one token after so many, or a token's share of those of all of a text."""
    graph, state = nnx.split(mixer)
    shape = jax.ShapeDtypeStruct((1, 1 if decode else length, D_MODEL), mixer.around.dtype)
    if not decode:
        return matmul_flops(jax.make_jaxpr(lambda state, x: nnx.merge(graph, state)(x))(state, shape)) / length
    cache = jax.eval_shape(lambda: mixer.init_cache(1, length, mixer.around.dtype))
    at = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    program = jax.make_jaxpr(lambda state, *given: nnx.merge(graph, state).extend(*given))
    return matmul_flops(program(state, shape, at, cache))


@pytest.mark.parametrize("row", **matrix.every_row)
def test_formula_and_program(row: Row) -> None:
    """Of a decode step, and of a text, of which programs here compute what is masked as well."""
    mixer: Any = abstract(row)
    assert mixer.text_flops(3) == pytest.approx(sum(mixer.mixing_flops(end) for end in (1, 2, 3)) / 3)
    length, recurrent = LENGTHS.get(row.name, LENGTH), not mixer.entry_stores()
    for decode in (True, False):
        formula = mixer.matrix_flops() + BESIDE.get(row.name, lambda *_: 0.0)(mixer, decode)
        formula += mixer.mixing_flops(length, decode)  # of the last token, which sees as much as any
        if decode and recurrent:  # k v^T is written without a product of matrices
            formula -= 2.0 * sum(state.like.size for state in mixer.states().values())
        program = counted(mixer, length, decode)
        whole = recurrent or (mixer.seen(length) == length and not row.chooses and row.reads is None)
        if decode or whole:
            assert program == pytest.approx(formula, rel=SMALL.get(row.name, 1e-9)), decode
        else:
            assert program >= formula


def test_a_text_costs_the_mean_of_its_tokens(tiny: Any) -> None:
    """GPT-2's arithmetic: two FLOPs for each parameter that multiplies, and for each token before and its own 4 D a layer;
    three times that in a training step."""
    config = tiny("mha", model={"d_model": 16, "num_layers": 3, "num_heads": 2, "mlp_width": 40}, context=24)
    abstract = nnx.eval_shape(lambda: model.create(config, 257))
    layer = 4 * 16 * 16 + 3 * 16 * 40
    matrices, pairs = 2 * (3 * layer + 257 * 16), 3 * 4 * 16
    assert flops.forward(abstract, 24) == flops.FLOPs(matrices, pairs * 25 / 2)
    assert flops.forward(abstract, 24, decode=True) == flops.FLOPs(matrices, pairs * 24)
    assert flops.training(abstract, 24) == 3 * (matrices + pairs * 25 / 2)


def test_layers_that_read_others_and_experts(tiny: Any) -> None:
    """A layer that reads another has no products for entries, and an expert's count where a token goes through it."""

    def matrices(variant: str, **fields: Any) -> float:
        config = tiny(variant, model={"num_layers": 2, "mlp_width": 32, "match_parameters": False} | fields)
        return flops.forward(nnx.eval_shape(lambda: model.create(config, 257)), 8).matrices

    assert matrices("mha") - matrices("mha/2") == 2 * 2 * 16 * 16  # W_K and W_V of one layer
    chosen = {"num_experts": 4, "experts_per_token": 1, "shared_experts": 0}
    experts = matrices("mha", mlp="moe", mlp_fields=chosen)
    assert experts - matrices("mha") == 2 * 2 * 16 * 4  # the routers of two layers


def test_the_share_of_a_device_is_logged_where_its_peak_is_known(tiny: Any, tmp_path: Path) -> None:
    assert flops.peak("TPU v5 lite") == 197e12
    config = tiny("mha", log={"peak_flops": 1e9})
    assert train(config, tmp_path / "known") == 0 and train(tiny("mha"), tmp_path / "unknown") == 0
    token = flops.training(nnx.eval_shape(lambda: model.create(config, 257)), config.context)
    known, unknown = (read_metrics(tmp_path / name) for name in ("known", "unknown"))
    assert len(known) == config.steps and not any("mfu" in line for line in unknown)
    for line in known:  # of eight devices
        assert line["mfu"] == pytest.approx(line["tokens_per_second"] * token / 8e9, rel=1e-3, abs=1e-4)
    with pytest.raises(UserError, match=r"config\.log\.peak_flops: -1\.0 is below 0"):
        train(tiny("mha", log={"peak_flops": -1.0}), tmp_path / "wrong")
