"""Which implementation of an op runs: on each platform, by name, and what each refuses."""

from __future__ import annotations

import dataclasses
import functools
import re
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import EXACT, close, contiguous_mask, relative_norm
from jax.sharding import Mesh
from matrix import rows_of

from mla import config as configs
from mla import model as models
from mla.attention.contract import Surroundings
from mla.attention.recurrent.base import RecurrentMixer
from mla.attention.softmax.base import SoftmaxMixer
from mla.errors import UserError
from mla.layers.mlp import mlp
from mla.ops.attention import BACKENDS, softmax_attention
from mla.ops.dispatch import Backend, dispatch, watched
from mla.ops.mask import Mask
from mla.ops.recurrence import linear_recurrence
from mla.sharding import AXES
from mla.sharding import platform as platform_of

PLATFORMS = ("cpu", "cuda", "tpu")


@pytest.fixture(autouse=True)
def no_look_at_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What devices this process has says nothing about where a program will run."""

    def refuse(*_: Any) -> Any:
        raise AssertionError("the default backend of this process was asked for")

    monkeypatch.setattr(jax, "default_backend", refuse)


def call(queries: int, entries: int, key_heads: int = 4, contiguous: bool = False, **options: Any) -> jax.Array:
    q, k = jnp.ones((1, queries, 4, 8)), jnp.ones((1, entries, key_heads, 8))
    at = [jnp.broadcast_to(jnp.arange(n), (1, n)) for n in (queries, entries)]
    return softmax_attention((q,), (k,), k, Mask(*at, contiguous=contiguous), scale=1.0, **options)


@pytest.mark.parametrize(
    "queries,entries,contiguous,chosen",
    [(64, 64, True, "cpu"), (1, 64, False, "decode"), (64, 64, False, "blocked")],
)
def test_auto_chooses_by_platform(queries: int, entries: int, contiguous: bool, chosen: str) -> None:
    for platform in PLATFORMS:
        with watched() as ran:
            jax.eval_shape(lambda p=platform: call(queries, entries, contiguous=contiguous, platform=p))
        assert ran == {"attention": {chosen if platform == "cpu" else "blocked"}}, platform


def lowered(function: Any, platform: str, *arguments: Any) -> str:
    return jax.export.export(jax.jit(function), platforms=[platform])(*arguments).mlir_module()


@pytest.mark.parametrize("queries,contiguous", [(64, True), (1, False)])
def test_lowered_for_another_platform_it_is_that_platform_s_implementation(queries: int, contiguous: bool) -> None:
    """Where nobody says the platform, the program lowered for each is that of the implementation named for it."""
    names = {"cpu": "cpu" if contiguous else "decode", "cuda": "blocked", "tpu": "blocked"}
    draw = np.random.default_rng(0)
    q, k, v = (jnp.asarray(draw.standard_normal((1, n, 4, 8)), jnp.float32) for n in (queries, 64, 64))
    mask = Mask(*(jnp.broadcast_to(jnp.arange(n), (1, n)) for n in (queries, 64)), contiguous=contiguous)

    def gradient(backend: str) -> Any:
        def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return jnp.sum(softmax_attention((q,), (k,), v, mask, scale=0.3, backend=backend) ** 2)

        return jax.grad(loss, (0, 1, 2))

    def operations(text: str) -> list[str]:
        """Kinds of the matmuls and loops of a program, without names and places."""
        kinds = "dot_general|while|exponential"
        return sorted(re.sub(r"%[\w#]+", "%", line) for line in re.findall(rf"stablehlo\.(?:{kinds})[^(]*", text))

    counted = {name: operations(lowered(gradient(name), "cpu", q, k, v)) for name in set(names.values())}
    assert len({str(c) for c in counted.values()}) == len(counted), "the implementations cannot be told apart"
    for platform, name in names.items():
        assert operations(lowered(gradient("auto"), platform, q, k, v)) == counted[name], platform
    for one, other in zip(jax.jit(gradient("auto"))(q, k, v), gradient("reference")(q, k, v), strict=True):
        close(one, other, 1e-5)


@pytest.mark.parametrize("row", [rows_of(SoftmaxMixer)[0], rows_of(RecurrentMixer)[0]], ids=lambda row: row.name)
def test_a_mixer_lowers_for_every_platform(row: Any) -> None:
    mixer, x = row.mixer(jnp.float32, platform=None), jnp.zeros((1, 24, 32), jnp.float32)
    for platform in PLATFORMS:
        assert "stablehlo" in lowered(lambda x: jax.grad(lambda x: jnp.sum(mixer(x) ** 2))(x), platform, x)


def limited(**changes: Any) -> Mask:
    """A contiguous mask of 12 tokens with something in it that not every backend knows."""
    return dataclasses.replace(contiguous_mask(1, 12), **changes)


LIFETIME = jnp.arange(12, dtype=jnp.int32)[None]
EXTRAS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "until": ({"until": LIFETIME + 3}, {}, "without lifetimes"),
    "since": ({"since": LIFETIME + 1}, {}, "without lifetimes"),
    "entries of each head": ({"entry_positions": jnp.stack([LIFETIME] * 4, axis=2)}, {}, "that all key heads share"),
    "a cache": ({"contiguous": False}, {}, "a contiguous mask"),
    "chunk": ({"chunk": 4}, {}, "without chunks"),
    "soft cap": ({}, {"soft_cap": 2.0}, "no soft_cap"),
    "sink": ({}, {"sink": jnp.ones(4)}, "no sink"),
    "fp32": ({}, {}, "bf16 or fp16"),
    "platform": ({}, {"platform": "cpu"}, "a cuda device"),
}
KNOWS = {"cpu": {"chunk", "soft cap", "sink", "fp32", "platform"}, "cudnn": set()}


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("backend", ["cpu", "cudnn"])
def test_a_backend_refuses_what_it_cannot_honour(backend: str, extra: str) -> None:
    """It names itself and the reason; `auto`, and an order of preference that ends in it, take one that can."""
    changes, options, reason = EXTRAS[extra]
    draw = np.random.default_rng(0)
    q, k, v = (jnp.asarray(draw.standard_normal((1, 12, 4, 8)), jnp.float32) for _ in range(3))
    arguments, given = ((q,), (k,), v, limited(**changes)), {"scale": 0.3, "platform": "cuda"} | options
    want = softmax_attention(*arguments, **given, backend="reference")
    if extra in KNOWS[backend]:
        close(softmax_attention(*arguments, **given, backend=backend), want, 1e-5)
    else:
        with pytest.raises(UserError, match=f"attention backend '{backend}' cannot serve this call, it needs .*{reason}"):
            softmax_attention(*arguments, **given, backend=backend)
    for names in ("auto", f"{backend},auto", f"{backend},blocked"):
        close(softmax_attention(*arguments, **given, backend=names), want, 1e-5)


def test_a_lifetime_changes_the_result() -> None:
    """What the tests above compare is seen."""
    base = call(12, 12, contiguous=True)
    assert base.shape == (1, 12, 4, 8)
    draw = np.random.default_rng(0)
    q, k, v = (jnp.asarray(draw.standard_normal((1, 12, 4, 8)), jnp.float32) for _ in range(3))
    plain = softmax_attention((q,), (k,), v, limited(), scale=0.3)
    for changes in (EXTRAS["until"][0], EXTRAS["since"][0], EXTRAS["chunk"][0]):
        assert np.abs(plain - softmax_attention((q,), (k,), v, limited(**changes), scale=0.3)).max() > 0.1


def test_a_kernel_that_needs_its_device_is_chosen_where_that_is_known() -> None:
    """In bf16 under a training mask cuDNN can serve: on a GPU alone, and only where somebody says so."""
    q = jnp.ones((1, 16, 4, 8), jnp.bfloat16)
    mask = contiguous_mask(1, 16)
    for platform, names in {"cuda": {"cudnn"}, "cpu": {"cpu"}, "tpu": {"blocked"}, None: {"blocked"}}.items():
        with pytest.MonkeyPatch.context() as patch, watched() as ran:
            patch.setitem(BACKENDS, "cudnn", dataclasses.replace(BACKENDS["cudnn"], run=BACKENDS["blocked"].run))
            softmax_attention((q,), (q,), q, mask, scale=1.0, platform=platform)
        assert ran == {"attention": names}, platform
    with pytest.raises(UserError, match=r"'cudnn' cannot serve this call, it needs a cuda device: choose 'auto'$"):
        softmax_attention((q,), (q,), q, mask, scale=1.0, backend="cudnn")


def cudnn_or_blocked(heads: int, key_heads: int, width: int, backend: str = "auto") -> set[str]:
    q, k = (jnp.ones((1, 16, n, width), jnp.bfloat16) for n in (heads, key_heads))
    with pytest.MonkeyPatch.context() as patch, watched() as ran:
        patch.setitem(BACKENDS, "cudnn", dataclasses.replace(BACKENDS["cudnn"], run=BACKENDS["blocked"].run))
        softmax_attention((q,), (k,), k, contiguous_mask(1, 16), scale=1.0, platform="cuda", backend=backend)
    return ran["attention"]


@pytest.mark.parametrize("width", [12, 36, 64, 128, 136, 320])
def test_cudnn_takes_no_width_that_it_would_refuse(width: int) -> None:
    """Multiples of 8 up to 128; wider heads would need to know the GPU."""
    serves = width in (64, 128)
    assert cudnn_or_blocked(4, 4, width) == {"cudnn" if serves else "blocked"}
    if not serves:
        with pytest.raises(UserError, match="it needs a head width that is a multiple of 8 and at most 128: choose 'auto'"):
            cudnn_or_blocked(4, 4, width, "cudnn")


def test_cudnn_takes_grouped_heads_where_it_is_named_only() -> None:
    """Over a tensor axis that does not divide the key heads, its partitioning fails, and an op knows no mesh."""
    for key_heads in (1, 2):
        assert cudnn_or_blocked(4, key_heads, 64) == {"blocked"}
        assert cudnn_or_blocked(4, key_heads, 64, "cudnn") == cudnn_or_blocked(4, key_heads, 64, "cudnn,auto") == {"cudnn"}


def test_cudnn_is_given_parts_side_by_side_and_values_filled_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLA's keys in two parts, wider than its values: jax's own implementation of that call, in cuDNN's place."""
    plain, draw = jax.nn.dot_product_attention, np.random.default_rng(0)

    def in_its_place(query: Any, key: Any, value: Any, *, implementation: str, **options: Any) -> jax.Array:
        assert implementation == "cudnn" and query.shape == key.shape == value.shape == (2, 24, 4, 24)
        return plain(query, key, value, implementation="xla", **options)

    def made(heads: int, width: int) -> jax.Array:
        return jnp.asarray(draw.standard_normal((2, 24, heads, width)), jnp.bfloat16)

    monkeypatch.setattr(jax.nn, "dot_product_attention", in_its_place)
    given = (made(4, 16), made(4, 8)), (made(4, 16), made(1, 8)), made(4, 12)
    for window in (None, 5):
        call = functools.partial(softmax_attention, mask=contiguous_mask(2, 24, window), scale=0.3)
        with watched() as ran:
            ours = call(*given, platform="cuda")
        assert ran == {"attention": {"cudnn"}}
        exact = call(*jax.tree.map(lambda a: a.astype(jnp.float32), given), backend="reference")
        assert relative_norm(ours, exact) < 2 * relative_norm(call(*given, backend="reference"), exact)


def test_the_platform_of_a_gpu_is_that_of_its_maker() -> None:
    for version, name in (("cuda 12090", "cuda"), ("rocm 60300", "rocm"), ("PJRT C API\nROCm 70100", "rocm")):
        device = SimpleNamespace(platform="gpu", client=SimpleNamespace(platform_version=version))
        mesh: Any = SimpleNamespace(devices=np.array([device]))
        assert platform_of(mesh) == name
    assert platform_of(Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), AXES)) == "cpu"


def test_experts_are_dispatched_too() -> None:
    config, module = mlp("moe")
    for where, name in {"cpu": "by_all", "cuda": "by_choice", "tpu": "by_choice", None: "by_choice"}.items():
        around = Surroundings(d_model=8, num_heads=2, platform=where)
        with watched() as ran:
            jax.eval_shape(lambda a=around: module(config(), a, 16, rngs=nnx.Rngs(0))(jnp.ones((1, 4, 8))))
        assert ran == {"experts": {name}}, where


def test_a_config_names_the_backend_of_recurrences() -> None:
    def ran(names: str) -> set[str]:
        config = configs.create(
            "linear", model={"d_model": 16, "num_layers": 1, "num_heads": 2, "recurrence_backend": names}
        )
        configs.validate(config)
        with watched() as chosen:
            jax.eval_shape(lambda: models.create(config, 31)(jnp.ones((1, 1), jnp.int32)))
        return chosen["recurrence"]

    assert (ran("auto"), ran("scan"), ran("scan,auto")) == ({"step"}, {"scan"}, {"scan"})
    with pytest.raises(UserError, match=r"^config\.model\.recurrence_backend: 'scam': did you mean 'scan'\?$"):
        ran("auto,scam")


def test_unknown_names_are_refused_wherever_they_stand() -> None:
    for names in ("flash", "cpu,flash", "flash,auto"):
        with pytest.raises(UserError, match="attention backend 'flash' is unknown: choose one of auto, cpu, decode"):
            call(4, 4, backend=names)
    with pytest.raises(UserError, match="recurrence backend 'blocked' is unknown: choose one of auto, step, scan"):
        recurrence(4, "blocked")


def recurrence(length: int, backend: str) -> Any:
    draw = np.random.default_rng(0)
    q, k, v = (jnp.asarray(draw.standard_normal((2, length, 3, 4))) for _ in range(3))
    return linear_recurrence(q, k, v, jnp.ones((2, 3, 4, 4)), backend=backend)


@pytest.mark.usefixtures("float64")
def test_recurrences_are_dispatched_too() -> None:
    for length, name in ((1, "step"), (7, "scan")):
        with watched() as ran:
            recurrence(length, "auto")
        assert ran == {"recurrence": {name}}
        for one, other in zip(recurrence(length, "step"), recurrence(length, "scan"), strict=True):
            close(one, other, EXACT)


def test_the_first_that_can_serve_runs() -> None:
    backends: dict[str, Backend[int]] = {
        "narrow": Backend(lambda x: ("narrow", x), lambda n: "" if n < 3 else "fewer than 3"),
        "gpu": Backend(lambda x: ("gpu", x), best_on=("cuda",)),
        "wide": Backend(lambda x: ("wide", x)),
    }

    def ran(names: str, n: int, platform: str = "cpu") -> str:
        return dispatch("toy", backends, names, n, platform)(0)[0]

    assert [ran("auto", n) for n in (2, 3)] == ["narrow", "wide"] and ran("auto", 3, "cuda") == "gpu"
    assert ran("wide,narrow", 2) == "wide" and ran("narrow,gpu", 3) == "gpu"
    with pytest.raises(UserError, match=r"^toy backend 'narrow' .* it needs fewer than 3: choose 'auto'$"):
        ran("narrow", 3)
