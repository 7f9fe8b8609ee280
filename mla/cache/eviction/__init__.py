"""Which entries leave a cache: one small file a policy, chosen by a specification: `snapkv` or `snapkv:window=16,pool=max`.

A policy gives every candidate a priority; the budget's worth of highest ones stay, in the order of the text, and the others
leave the arrays. Adding a policy is one file with a `Policy` and one line in REGISTRY.
"""

from __future__ import annotations

from typing import Any

from mla.cache.eviction.contract import FIELD, Policy
from mla.registry import specified

# name -> where its class stands.
REGISTRY = {
    "streaming": "mla.cache.eviction.streaming:Streaming",
    "heavy_hitter": "mla.cache.eviction.heavy_hitter:HeavyHitter",
    "tova": "mla.cache.eviction.tova:Tova",
    "snapkv": "mla.cache.eviction.snapkv:SnapKV",
    "pyramid": "mla.cache.eviction.snapkv:Pyramid",
    "l2_norm": "mla.cache.eviction.l2_norm:L2Norm",
    "value_aware": "mla.cache.eviction.heavy_hitter:ValueAware",
    "fastgen": "mla.cache.eviction.fastgen:FastGen",
    "expected_attention": "mla.cache.eviction.expected_attention:ExpectedAttention",
    "random": "mla.cache.eviction.random:Random",
    "cam": "mla.cache.eviction.cam:CaM",
}
WHEN = ("prefill", "decode", "both")


def policy(spec: str) -> Policy | None:
    """The policy of `NAME[:setting=value,...]`; None for `none`."""
    found: Policy | None = parse(spec, REGISTRY, FIELD)
    return found


def parse(spec: str, registry: dict[str, str], field: str) -> Any:
    """The dataclass of `registry` that `NAME[:setting=value,...]` makes; None for `none`.

    Raises:
      UserError: an unknown name or setting, with the nearest match, or a value of the wrong type, naming `field`.
    """
    return None if spec == "none" else specified(spec, registry, field, ("none",))


__all__ = ["Policy", "parse", "policy"]
