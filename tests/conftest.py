"""Eight CPU devices, a compilation cache shared with subprocesses, and a tiny corpus and model."""

from __future__ import annotations

import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from flags import XLA_FLAGS  # noqa: E402

# Before jax is imported; subprocesses inherit it. Most of a small test's time is compilation.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests of what XLA makes of a program ask for its defaults (`helpers.optimized`), and so do fp32 runs of every mechanism.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {XLA_FLAGS}"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / f"mla-tests-xla-{os.getuid()}"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")  # to keep a smaller one costs as much as it
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

from jaxtyping import install_import_hook  # noqa: E402

# Before anything imports the ops: whatever a test calls, the shapes that they declare are checked.
install_import_hook("mla.ops", "beartype.beartype")

import helpers  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
# Its oracle has no release for older Pythons.
collect_ignore = ["test_tokamax.py"] if sys.version_info < (3, 12) else []

from mla.config import Config, create, labels, parse_pattern  # noqa: E402

SENTENCE = "the cache keeps one latent vector per token and every head reads it again"
SETTINGS = {
    "gqa": {"num_kv_heads": 1},
    "mla": {"kv_lora_rank": 8, "qk_rope_head_dim": 4},
    "grouped_latent": {"qk_rope_head_dim": 4, "q_lora_rank": 8, "group_queries": True},
    "low_rank_blocks": {"kv_lora_rank": 8, "qk_rope_head_dim": 4, "branches": 2},
    "temporal_latent": {"kv_lora_rank": 8, "qk_rope_head_dim": 4, "stride": 4},
    "grouped_tied": {"num_kv_heads": 2},
    "tensor_product": {"factor_init": "unit"},
    "sliding_window": {"window": 6},
    "chunked": {"chunk": 6},
    "compressed": {"window": 4, "stride": 4, "head_dim": 8, "qk_rope_head_dim": 4, "out_groups": 2},
    "compressed_sparse": {"window": 4, "head_dim": 8, "qk_rope_head_dim": 4, "out_groups": 2, "top_k": 3},
    "compressive": {"segment": 4, "memory": 4, "compressed_memory": 2, "rate": 2},
    "block_mixture": {"block": 4, "top_k": 2},
    "deepseek_sparse": {"kv_lora_rank": 8, "qk_rope_head_dim": 4, "top_k": 6, "index_head_dim": 8, "dense_steps": 0.2},
    "native_sparse": {"pool_block": 4, "pool_stride": 2, "block": 4, "top_k": 3, "near": 4},
    "strided": {"stride": 4},
    "fixed_columns": {"stride": 4, "columns": 2},
    "dilated": {"tokens_read": 3},
    "big_bird": {"block": 2, "window_blocks": 2, "global_blocks": 1, "random_blocks": 1},
    **{name: {"chunk": 4} for name in ("linear", "retention", "lightning", "gated_linear")},
    **{name: {"chunk": 4} for name in ("delta", "gated_delta", "kimi_delta", "gated_delta_2")},
    "mamba2": {"chunk": 4, "state_size": 8},
}


def settings_of(variant: str) -> dict[str, Any]:
    """What fits a tiny model, for every label of a variant."""
    return {label: SETTINGS.get(name, {}) for label, name in labels(parse_pattern(variant)).items()}


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 40 short texts; what is prepared from it lives in a folder of this session."""
    os.environ["MLA_DATA_DIR"] = str(tmp_path_factory.mktemp("data"))
    folder = tmp_path_factory.mktemp("corpus")
    draw = random.Random(0)
    words = SENTENCE.split()
    for number in range(40):
        text = " ".join(draw.choice(words) for _ in range(60))
        (folder / f"{number}.txt").write_text(text + ".\n")
    return folder


@pytest.fixture(scope="session")
def tiny(corpus: Path) -> Any:
    """tiny("mla", steps=5, model={"num_layers": 2}, ...): a config that trains in a second, for eight devices."""

    def make(variant: str = "mla", **fields: Any) -> Config:
        defaults: dict[str, Any] = {
            "steps": 6,
            "batch_size": 8,
            "context": 16,
            "loss_chunk_tokens": 64,
            "data": {"corpus": str(corpus), "validation_fraction": 0.1},
            "model": {"d_model": 16, "num_layers": 1, "num_heads": 2},
            "optimizer": {"warmup_steps": 2, "learning_rate": 3e-3},
            "mesh": {"host_devices": 8},
            "checkpoint": {"every_steps": 2, "keep": 3},
            "log": {"every_steps": 1},
        }
        for name, value in fields.items():
            defaults[name] = defaults[name] | value if isinstance(defaults.get(name), dict) else value
        return create(variant, settings_of(variant), **defaults)

    return make


@pytest.fixture(scope="module")
def trained(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """trained("gqa", steps=5, ...): the config as of `tiny`, and the workdir of its finished run."""
    from mla.training.loop import train

    def run(variant: str, **fields: Any) -> tuple[Config, Path]:
        config, workdir = tiny(variant, **fields), tmp_path_factory.mktemp("runs") / variant.replace("/", "-")
        assert train(config, workdir) == 0
        return config, workdir

    return run


@pytest.fixture(scope="session")
def config_file(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same for a command line: --config=FILE:mla."""
    path = tmp_path_factory.mktemp("configs") / "tiny.py"
    path.write_text(
        f"""
import mla.config
from mla.config import labels, parse_pattern

SETTINGS = {SETTINGS!r}

def get_config(variant="mla"):
    return mla.config.create(
        variant,
        {{label: SETTINGS.get(name, {{}}) for label, name in labels(parse_pattern(variant)).items()}},
        steps=6,
        batch_size=8,
        context=16,
        loss_chunk_tokens=64,
        data={{"corpus": {str(corpus)!r}, "validation_fraction": 0.1}},
        model={{"d_model": 16, "num_layers": 1, "num_heads": 2}},
        optimizer={{"warmup_steps": 2, "learning_rate": 3e-3}},
        mesh={{"host_devices": 8}},
        checkpoint={{"every_steps": 2, "keep": 3}},
        log={{"every_steps": 1}},
    )
"""
    )
    return path


@pytest.fixture(scope="module", autouse=True)
def forget_programs() -> Any:
    """Compiled programs of a finished module are dropped: by the end they would hold gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture
def float64() -> Any:
    """Arrays made without a dtype are float64, and so is what is computed from them: rounding blurs no equality."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True)
def margins(request: pytest.FixtureRequest) -> Any:
    """Hands the comparisons of a test (`helpers.close`) to its report, which xdist carries to the process that prints."""
    helpers.MARGINS.clear()
    yield
    if helpers.MARGINS:
        request.node.user_properties.append(("margins", [len(helpers.MARGINS), *max(helpers.MARGINS, key=lambda m: m[1])]))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """How near comparisons came to their bounds: the nearest, and all that another CPU's rounding could fail."""
    worst: dict[str, Any] = {}
    for outcome in ("", "passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            worst.update((report.nodeid, value) for name, value in report.user_properties if name == "margins")
    if not worst:
        return
    order = sorted(worst, key=lambda test: -worst[test][2])
    total, near = sum(value[0] for value in worst.values()), [test for test in order if worst[test][2] > 1 / 3]
    terminalreporter.section("margins")
    terminalreporter.write_line(f"{total:,} comparisons in {len(worst):,} tests; {len(near)} tests within a factor of 3")
    for test in near or order[:1]:
        _, what, ratio = worst[test]
        terminalreporter.write_line(f"{1 / max(ratio, 1e-99):8.3g} times below its bound: {test} {what}")


@pytest.fixture
def snapshot() -> Any:
    """snapshot(folder): every file with its bytes and every folder, so that 'nothing changed' can be compared."""

    def take(folder: Path) -> dict[str, bytes | None] | None:
        if folder.is_file():
            return {"": folder.read_bytes()}
        if not folder.exists():
            return None
        return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}

    return take
