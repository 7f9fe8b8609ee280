"""Programs for a TPU that is not there: what they are counted to need, and that steps of a model compile for one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import close
from jax.sharding import Mesh
from programs import status

from mla import flops
from mla import model as models
from mla.commands import load_config
from mla.compilation import figures, targets
from mla.compilation.collectives import Collective, collectives
from mla.compilation.count import matmul_flops
from mla.compilation.programs import PROGRAMS, formula
from mla.errors import UserError
from mla.ops import splash
from mla.sharding import AXES, make_mesh

MODULE = """HloModule step, is_scheduled=true

%body (p: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %p = (s32[], f32[8,16]{1,0}) parameter(0)
  %ag = bf16[8,64]{1,0:T(8,128)(2,1)} all-gather(%x), channel_id=3, replica_groups=mesh['a'=1,'b'=4] {'b'}, dimensions={1}
  %other = bf16[8,64]{1,0} all-gather(%x), channel_id=3, replica_groups=mesh['a'=1,'b'=4] {'b'}, dimensions={1}
}

%condition (p: (s32[], f32[8,16])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%all-reduce-scatter.1 (input: f32[32]) -> f32[8] {
  %all-reduce.7 = f32[32]{0} all-reduce(%b), channel_id=20, replica_groups={{0,1,2,3}}, to_apply=%add
}

ENTRY %main (a: f32[8,16]) -> f32[8,16] {
  %w = (s32[], f32[8,16]{1,0}) while(%t), condition=%condition, body=%body
  %f = f32[8]{0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1
  %s = (f32[10]{0}, f32[6]{0}) all-reduce(%a, %b), channel_id=9, replica_groups=[2,2]<=[4], to_apply=%add
  %rs = f32[3]{0} reduce-scatter(%a), channel_id=10, replica_groups=[2,2]<=[4], dimensions={0}
  %cp = f32[4]{0} collective-permute(%a), channel_id=11, source_target_pairs={{0,1},{1,0}}
  %alone = f32[4]{0} all-reduce(%a), channel_id=12, replica_groups={{0},{1}}, to_apply=%add
  %k = (s32[], pred[2]{0}) while(%t), condition=%c2, body=%b2, backend_config={"known_trip_count":{"n":"7"}}
}

%b2 (p: s32[]) -> s32[] {
  %aa = (f32[2]{0}, f32[8]{0}) all-gather-start(%x), channel_id=13, replica_groups=[1,4]<=[4], dimensions={0}
}
"""


def test_collectives_of_a_module() -> None:
    """Loops multiply, what is spread over fusions is one, sums of two arrays are one exchange, a group of one is none."""
    assert collectives(MODULE) == [
        Collective("all-gather", 2 * 8 * 64, 4, 5),
        Collective("reduce-scatter", 4 * 32, 4, 1),
        Collective("all-reduce", 4 * 16, 2, 1),
        Collective("reduce-scatter", 4 * 6, 2, 1),
        Collective("collective-permute", 16, 2, 1),
        Collective("all-gather", 32, 4, 7),
    ]
    assert [each.moved for each in collectives(MODULE)] == [3840, 96, 64, 12, 16, 168]


def test_products_are_counted_as_often_as_they_run() -> None:
    weights = jnp.zeros((3, 8, 8))

    def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ w @ w, lambda x: x @ w, x), None

    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, w)[0])

    x, one = jnp.zeros((4, 8)), 2 * 4 * 8 * 8
    assert matmul_flops(jax.make_jaxpr(loss)(weights, x)) == 3 * 2 * one
    # Backward: the first of the two products again, and two for each of them.
    gradient = matmul_flops(jax.make_jaxpr(jax.jit(jax.grad(loss)))(weights, x))
    assert 3 * (2 + 1 + 4) * one <= gradient <= 3 * (2 + 2 + 4) * one
    images, kernel = jnp.zeros((2, 5, 9)), jnp.zeros((7, 5, 3))
    convolve = jax.make_jaxpr(lambda a, b: jax.lax.conv_general_dilated(a, b, (1,), "VALID"))(images, kernel)
    assert matmul_flops(convolve) == 2 * (2 * 7 * 7) * 5 * 3


def test_flops_of_a_training_step_are_those_of_the_textbook(tiny: Any) -> None:
    """6 a parameter and token, and attention: for each head 2 T^2 d_h for logits and as many for values, three times."""
    layers, d_model, length, batch, vocab = 2, 16, 16, 8, 61
    config = tiny("mha", model={"num_layers": layers, "attention_backend": "reference", "scan_layers": "on"})
    mesh = Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1, 1), AXES)
    program, arguments = PROGRAMS["train"](config, vocab, mesh)
    state, _ = arguments
    matrices = sum(math.prod(a.shape) for a in jax.tree.leaves(state.params) if a.ndim > 1)
    attention = layers * batch * 4 * length**2 * d_model
    assert (config.context, config.batch_size, config.model.d_model) == (length, batch, d_model)
    counted = matmul_flops(program.trace(*arguments).jaxpr)
    assert counted == 6 * matrices * batch * length + 3 * attention
    causal = 6 * matrices * batch * length + 3 * attention * (length + 1) / (2 * length)
    assert formula("train", config, vocab) == causal


@pytest.mark.parametrize("step", ["train", "prefill", "decode"])
def test_figures_of_programs_for_this_machine(tiny: Any, step: str) -> None:
    """On CPU devices: memory of arguments is that of the shapes on one device, and a mesh exchanges something."""
    config = tiny("mla", model={"num_layers": 2}, eval={"decode_batch": 4})
    mesh = Mesh(np.asarray(jax.devices()[:4]).reshape(1, 4, 1), AXES)
    program, arguments = PROGRAMS[step](config, 61, mesh)
    found = figures.compiled(step, program, arguments, 4, formula(step, config, 61))
    shares = [a.sharding.shard_shape(a.shape) for a in jax.tree.leaves(arguments)]
    sizes = [math.prod(s) * a.dtype.itemsize for s, a in zip(shares, jax.tree.leaves(arguments), strict=True)]
    close(found.memory["arguments"], sum(sizes), 0, relative=0.02)  # arrays are aligned
    assert found.collectives["all-gather"]["moved"] > 0 and found.flops > 0 and found.flops_formula > 0
    if step == "decode":
        close(found.flops, found.flops_formula, 0, relative=1e-9)
    assert "bound by" in figures.said(found, targets.CHIPS["v5e"])
    bound = found.roofline(targets.CHIPS["v5e"])
    close(bound["compute"], found.flops / 197e12, 0, relative=1e-6)


def test_logits_are_not_summed_over_devices(tiny: Any) -> None:
    """Parameters split over their channels are gathered: nothing as large as logits or activations is exchanged."""
    config = tiny("mla", model={"num_layers": 2}, batch_size=16)
    mesh = Mesh(np.asarray(jax.devices()[:4]).reshape(1, 4, 1), AXES)
    program, arguments = PROGRAMS["train"](config, 997, mesh)
    exchanged = collectives(program.lower(*arguments).compile().as_text())
    parameters = sum(4 * math.prod(a.shape) for a in jax.tree.leaves(arguments[0].params))
    sums = sum(each.size for each in exchanged if each.kind in ("all-reduce", "reduce-scatter"))
    assert 0 < sums < 1.2 * parameters  # gradients, once
    assert sum(each.size for each in exchanged) < 4 * parameters


def compiled(config_file: Path, *flags: object) -> int:
    """The exit status of `mla compile` for four chips."""
    return status("compile", f"--config={config_file}:mla", "--config.mesh.host_devices=0", *flags)


def test_the_command_compiles_for_a_tpu(config_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """All three steps, on a mesh of four chips; the figures are in the file too."""
    out = tmp_path / "new" / "plan.json"
    flags = ["--config.mesh.fsdp=4", "--config.eval.decode_batch=4"]
    assert compiled(config_file, "--topology=v5e:2x2", f"--out={out}", *flags) == 0
    said, plan = capfd.readouterr().out, json.loads(out.read_text())
    assert plan["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1} and plan["topology"] == "v5e:2x2"
    assert [step["step"] for step in plan["steps"]] == ["train", "prefill", "decode"]
    for step in plan["steps"]:
        assert step["memory"]["peak"] > 0 and step["flops"] > 0 and step["devices"] == 4
        assert set(step["roofline_seconds"]) == {"compute", "memory", "interconnect"}
        assert f"{step['step']}: compiled in" in said


def test_training_for_a_tpu_runs_the_fused_kernel(config_file: Path, tmp_path: Path) -> None:
    """Forward and backward, on a mesh that splits sequences and heads; a prefill through a cache does not."""
    mesh = ["--config.mesh.fsdp=2", "--config.mesh.tensor=2", "--config.eval.decode_batch=2", "--config.eval.context=128"]
    flags = ["--config.context=128", "--steps=train,prefill", "--level=O0", f"--out={tmp_path / 'plan.json'}", *mesh]
    assert compiled(config_file, *flags) == 0
    train, prefill = json.loads((tmp_path / "plan.json").read_text())["steps"]
    assert len(train["kernels"]) == 3 and all(name.startswith("splash_mha") for name in train["kernels"])
    assert not prefill["kernels"]


@pytest.mark.parametrize("name", ["mha", "gqa", "mla"])
def test_flops_of_training_for_a_tpu_are_those_written_by_hand(name: str) -> None:
    """A model of 124M: matrices three times, and what the fused kernel says of itself. Nothing is compiled."""
    config = load_config(f"configs/small.py:{name}")
    config.mesh.fsdp, vocab_size = 4, 50304
    targets.prepare()
    program, arguments = PROGRAMS["train"](config, vocab_size, make_mesh(config.mesh, targets.devices("v5e:2x2")))
    model = nnx.eval_shape(lambda: models.create(config, vocab_size))
    mixers: list[Any] = [block.mixer for block in model.blocks]
    ups = [getattr(mixer, up) for mixer in mixers for up in mixer.sparing]  # of latents, each of which is used once here
    matrices = flops.forward(model, config.context).matrices + 2 * models.count([nnx.state(up) for up in ups])
    widths = (96, 64) if name == "mla" else (64, 64)
    attended = sum(splash.training_flops(config.context, mixer.num_heads, *widths) for mixer in mixers)
    expected = config.batch_size * (3 * config.context * matrices + attended)
    close(matmul_flops(program.trace(*arguments).jaxpr), expected, 0, relative=1e-3)


def test_for_gpus_programs_are_lowered(config_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """FLOPs are those for other devices, arguments those of one device; nothing is said of what only a compiler knows."""
    out, flags = tmp_path / "plan.json", ["--config.mesh.fsdp=4", "--config.eval.decode_batch=4"]
    assert compiled(config_file, "--topology=h200:8", "--config.mesh.tensor=2", f"--out={out}", *flags) == 0
    said, plan = capfd.readouterr().out, json.loads(out.read_text())
    assert plan["mesh"] == {"data": 1, "fsdp": 4, "tensor": 2} and said.count("lowered for CUDA in") == 3
    train, _, decode = plan["steps"]
    assert train["flops"] >= train["flops_formula"] and decode["flops"] == pytest.approx(decode["flops_formula"])
    assert 3 * 4 * plan["parameters"] / 8 < train["memory"]["arguments"] < 3 * 4 * plan["parameters"]
    for step in plan["steps"]:
        assert set(step["memory"]) == {"arguments"} and set(step["roofline_seconds"]) == {"compute", "memory"}
        assert not {"compile_seconds", "flops_compiled", "bytes_accessed"} & step.keys()


def test_what_nothing_depends_on_is_not_counted() -> None:
    """Neither where it is written, nor within a function, nor as one of several outputs."""
    x = jnp.ones((4, 8))

    @jax.jit
    def two(x: jax.Array) -> Any:
        return x @ x.T, x.T @ x

    def program(x: jax.Array) -> jax.Array:
        jnp.dot(x, x.T)
        return two(x)[0]

    assert matmul_flops(jax.make_jaxpr(program)(x)) == 2 * 4 * 8 * 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--topology=v9z:2x2"], "--topology: 'v9z:2x2' is of no chip that is known here"),
        (["--topology=h100:2x2"], "--topology: 'h100:2x2' does not say how many: h100:8"),
        (
            ["--topology=a100:8", "--config.mesh.fsdp=3"],
            "config.mesh: data=-1 x fsdp=3 x tensor=1 does not fit 8 a100 device(s)",
        ),
        (["--topology=v5e:3x7"], "--topology: 'v5e:3x7' does not exist"),
        (["--steps=train,decod"], "--steps: 'decod': did you mean 'decode'?"),
        (["--config.mesh.fsdp=3"], "config.mesh: data=-1 x fsdp=3 x tensor=1 does not fit 4 tpu device(s)"),
        (["--config.mesh.fsdp=4", "--steps=decode"], "config.eval.decode_batch: 1 does not divide over"),
    ],
)
def test_what_cannot_be_compiled_is_one_line(
    config_file: Path, capfd: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert compiled(config_file, *flags) == 1
    said = capfd.readouterr().err
    assert message in said and len(said.splitlines()) == 1, said


def test_without_the_compiler_the_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"not installed: pip install 'jax\[tpu\]'"):
        targets.devices("v5e:2x2")
