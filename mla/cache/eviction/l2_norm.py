"""Low L2 norm (2406.11430): keys of small norm get attention, so the entries of largest ||k||_2 leave.

Norms do not change by rotation. An MLA latent is normed itself and would rank nothing: keys are taken as the heads see them,
[k_nope; k_rope], and the mean over the heads that share an entry decides. Models trained with qk_norm have keys of nearly
one norm: there it says little.
"""

from __future__ import annotations

import dataclasses

from mla.cache.eviction.contract import Choice, Evidence, Policy
from mla.cache.finite import norm, saturate


@dataclasses.dataclass(frozen=True)
class L2Norm(Policy):
    """Keys of small norm (2406.11430)."""

    skip_layers: int = 0  # lowest layers that keep everything; the paper's language models: 2
    highest: bool = False  # keep the largest norms instead: the paper's control, worse than random

    def choose(self, seen: Evidence, budget: int) -> Choice:
        norms = saturate(seen.pool(norm(seen.keys())))
        return Choice(norms if self.highest else -norms)

    def layer_budgets(self, budget: int, layers: int, prompt: int, capacity: int) -> list[int]:
        skipped = min(self.skip_layers, layers)
        return [max(budget, capacity)] * skipped + [budget] * (layers - skipped)
