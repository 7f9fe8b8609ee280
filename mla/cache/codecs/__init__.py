"""How streams are stored: one small file a codec, chosen by a specification such as `int4` or `key=int4,value=int8`.

    SPEC     = none | CODEC | STREAM=CODEC[,STREAM=CODEC ...]     streams that are not named stay as they are
    CODEC    = [hadamard+]NAME[:GROUP]                            int4:64 has one scale for 64 channels

`latent_fp8` alone is FlashMLA's layout: the latent in fp8, the rotary key in bf16. Adding a codec is one file with a `Codec`
and one line in REGISTRY.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

from mla.cache.codecs.contract import Codec
from mla.cache.codecs.rotated import Rotated
from mla.errors import UserError, nearest

# name -> where its class stands, and the arguments that make it this one.
REGISTRY: dict[str, tuple[str, dict[str, Any]]] = {
    "bf16": ("mla.cache.codecs.cast:Cast", {}),
    "fp8": ("mla.cache.codecs.fp8:Fp8", {"group": 128}),
    "latent_fp8": ("mla.cache.codecs.fp8:Fp8", {"group": 128, "power_of_two": True}),
    "int8": ("mla.cache.codecs.integers:Integers", {"bits": 8, "symmetric": True}),
    "int4": ("mla.cache.codecs.integers:Integers", {"bits": 4, "group": 32}),
    "int2": ("mla.cache.codecs.integers:Integers", {"bits": 2, "group": 32}),
}
FIELD = "config.eval.cache.codec"
LAYOUTS = {"latent_fp8": "c_kv=latent_fp8,k_rope=bf16"}


def codec(text: str) -> Codec | None:
    """The codec of `[hadamard+]NAME[:GROUP]`; None for `none`.

    Raises:
      UserError: an unknown name, with the nearest match, or a group that is no number.
    """
    rotation, _, rest = text.rpartition("+")
    name, colon, group = rest.partition(":")
    if name == "none" and not rotation and not colon:
        return None
    if name not in REGISTRY or rotation not in ("", "hadamard"):
        wrong = name if name not in REGISTRY else rotation
        raise UserError(f"{FIELD}: {wrong!r} is not known; {nearest(wrong, [*REGISTRY, 'none', 'hadamard'])}")
    where, arguments = REGISTRY[name]
    if colon:
        if not group.isdigit() or int(group) < 1 or "group" not in arguments:
            takes = f"{group!r} is no number of channels" if "group" in arguments else f"{name} has no groups"
            raise UserError(f"{FIELD}: {text!r}: {takes}; write NAME or, for {_grouped()}, NAME:CHANNELS")
        arguments = arguments | {"group": int(group), "strict": True}
    module, cls = where.split(":")
    made: Codec = getattr(importlib.import_module(module), cls)(**arguments)
    return Rotated(inner=made) if rotation else made


def codecs(spec: str, streams: Iterable[str]) -> dict[str, Codec | None]:
    """The codec of each of a cache's streams.

    Raises:
      UserError: what `codec` refuses, or a stream that the cache does not have.
    """
    streams = list(streams)
    spec = LAYOUTS.get(spec, spec)
    if "=" not in spec:
        made = codec(spec)
        return dict.fromkeys(streams, made)
    chosen: dict[str, Codec | None] = dict.fromkeys(streams)
    for entry in spec.split(","):
        stream, equals, name = entry.strip().partition("=")
        if not equals or stream not in chosen:
            raise UserError(f"{FIELD}: {entry!r}: no stream {stream!r} in this cache; {nearest(stream, streams)}")
        chosen[stream] = codec(name)
    return chosen


def check(spec: str) -> None:
    """Refuses what no cache could store.

    Raises:
      UserError: as `codec`.
    """
    for entry in LAYOUTS.get(spec, spec).split(","):
        codec(entry.strip().rpartition("=")[2])


def _grouped() -> str:
    return ", ".join(name for name, (_, arguments) in REGISTRY.items() if "group" in arguments)


__all__ = ["Codec", "check", "codec", "codecs"]
