"""What the suite has XLA do otherwise than by default, said before jax is imported.

Most programs of the suite run once, on small arrays: what LLVM would spend on them never comes back, and neither does what
the newer of two code generators for fusions spends, a third of the time of all. Newer versions have no other, and end at
once where they are told of it.
"""

from __future__ import annotations

from importlib.metadata import version

CHANGED: dict[str, int | bool] = {"xla_backend_optimization_level": 0}
DEFAULTS: dict[str, int | bool] = {"xla_backend_optimization_level": 3}
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):
    CHANGED["xla_cpu_use_fusion_emitters"] = False
    DEFAULTS["xla_cpu_use_fusion_emitters"] = True

XLA_FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, value in CHANGED.items())
