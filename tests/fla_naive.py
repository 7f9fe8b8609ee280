"""Oracles of constant-state mechanisms on a CPU: `fla-core`'s recurrences in torch, layers of `transformers` beside them."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import warnings
from pathlib import Path
from types import ModuleType
from unittest import mock


@functools.cache
def naive(operation: str) -> ModuleType:
    """The module fla/ops/<operation>/naive.py: of gla, delta_rule, kda and others that need torch and einops alone.

    It is loaded from its file, since its package imports every GPU kernel first, and with them triton, which is not among
    the tests' requirements. Kernels that a file itself imports, for what no test calls, are empty there.
    """
    package = importlib.util.find_spec("fla")  # finds, imports nothing
    assert package is not None and package.submodule_search_locations, "fla-core is not installed: make .venv/.test"
    file = Path(package.submodule_search_locations[0]) / "ops" / operation / "naive.py"
    spec = importlib.util.spec_from_file_location(f"fla_naive_{operation}", file)
    assert spec is not None and spec.loader is not None, file
    module = importlib.util.module_from_spec(spec)
    kernels = {name: ModuleType(name) for name in ("fla", "fla.ops", "fla.ops.utils", "fla.ops.utils.pooling")}
    kernels["fla.ops.utils"].prepare_chunk_offsets = None  # type: ignore[attr-defined]
    kernels["fla.ops.utils.pooling"].mean_pooling = None  # type: ignore[attr-defined]
    with mock.patch.dict(sys.modules, kernels), warnings.catch_warnings():
        warnings.simplefilter("ignore", ImportWarning)
        spec.loader.exec_module(module)
    return module


def modeling(family: str) -> ModuleType:
    """The module transformers.models.<family>.modeling_<family>, with its own torch code.

    While it is imported it looks for `fla`, and where triton is installed, as with torch for CUDA, would take GPU kernels
    from there that no CPU runs. Here it finds none.
    """
    hidden = sys.modules.get("fla")
    sys.modules["fla"] = None  # type: ignore[assignment]  # an import of it fails
    try:
        return importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    finally:
        del sys.modules["fla"]
        if hidden is not None:
            sys.modules["fla"] = hidden
