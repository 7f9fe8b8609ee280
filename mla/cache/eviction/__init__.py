"""Which entries leave a cache: one small file a policy, chosen by a specification: `snapkv` or `snapkv:window=16,pool=max`.

A policy gives every candidate a priority; the budget's worth of highest ones stay, in the order of the text, and the others
leave the arrays. Adding a policy is one file with a `Policy` and one line in REGISTRY.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from mla.cache.eviction.contract import FIELD, Policy
from mla.errors import UserError, nearest
from mla.registry import load

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
    name, _, settings = spec.partition(":")
    if spec == "none":
        return None
    if name not in registry:
        raise UserError(f"{field}: {name!r} is not known; {nearest(name, [*registry, 'none'])}")
    (made,) = load(registry[name])
    fields = {field.name: field for field in dataclasses.fields(made) if not field.metadata}
    chosen: dict[str, Any] = {}
    for entry in filter(None, settings.split(",")):
        key, equals, value = entry.strip().partition("=")
        if key not in fields or not equals:
            why = f"no setting {key!r}; {nearest(key, fields)}" if fields else f"{name} has no settings"
            raise UserError(f"{field}: {spec!r}: {why}")
        if key in chosen:
            raise UserError(f"{field}: {spec!r}: {key} is given twice; leave one of them out")
        chosen[key] = _typed(f"{field}: {spec!r}", key, value, fields[key].default)
    return made(**chosen)


def _typed(where: str, key: str, value: str, default: Any) -> Any:
    """`value` as what `default` is."""
    wrong = UserError(f"{where}: {key}={value!r} is no {type(default).__name__}; by default it is {default}")
    if isinstance(default, bool):
        if value not in ("true", "false"):
            raise wrong
        return value == "true"
    try:
        found = type(default)(value)
    except ValueError:
        raise wrong from None
    if not isinstance(found, str) and not 0 <= found < 2**31:
        raise UserError(f"{where}: {key}={value} is not a number from 0 to {2**31 - 1}")
    return found


__all__ = ["Policy", "parse", "policy"]
