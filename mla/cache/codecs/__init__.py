"""How streams are stored: one small file a codec, chosen by a specification such as `int4` or `key=int4,value=int8`.

    SPEC     = none | CODEC | STREAM=CODEC[,STREAM=CODEC ...]     streams that are not named stay as they are
    STREAM   = of entries, such as key, value, c_kv; or a state: state=int8. CODEC alone means all streams of entries
    CODEC    = [hadamard+]NAME[:SIZE]        int4:64 has one scale for 64 channels, kivi2:64 blocks and a window of 64 tokens

`kivi4`, `kivi2`, `kvquant4` and `kvquant2` have two forms (see `kivi`): streams whose names end in "value" are coded per
token, all others, latents too, per channel. `kivi2_channel` and `kivi2_token` name one. `latent_fp8` alone is FlashMLA's
layout: the latent in fp8, the rotary key in bf16. Adding a codec is one file with a `Codec` and one line in REGISTRY.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mla.cache.codecs.contract import FIELD, Codec
from mla.cache.codecs.rotated import Rotated
from mla.errors import UserError, nearest
from mla.registry import load

# name -> where its class stands, and the arguments that make it this one.
REGISTRY: dict[str, tuple[str, dict[str, Any]]] = {
    "bf16": ("mla.cache.codecs.cast:Cast", {}),
    "fp8": ("mla.cache.codecs.fp8:Fp8", {"group": 128}),
    "latent_fp8": ("mla.cache.codecs.fp8:Fp8", {"group": 128, "power_of_two": True}),
    "int8": ("mla.cache.codecs.integers:Integers", {"bits": 8, "symmetric": True}),
    "int4": ("mla.cache.codecs.integers:Integers", {"bits": 4, "group": 32}),
    "int2": ("mla.cache.codecs.integers:Integers", {"bits": 2, "group": 32}),
    "kivi4_channel": ("mla.cache.codecs.kivi:PerChannel", {"bits": 4, "group": 32, "unit": 128}),
    "kivi2_channel": ("mla.cache.codecs.kivi:PerChannel", {"bits": 2, "group": 32, "unit": 128}),
    "kivi4_token": ("mla.cache.codecs.integers:Integers", {"bits": 4, "group": 32, "lag": 128}),
    "kivi2_token": ("mla.cache.codecs.integers:Integers", {"bits": 2, "group": 32, "lag": 128}),
    "kvquant4_channel": ("mla.cache.codecs.kivi:PerChannel", {"bits": 4, "group": 32, "unit": 128, "unrotated": True}),
    "kvquant2_channel": ("mla.cache.codecs.kivi:PerChannel", {"bits": 2, "group": 32, "unit": 128, "unrotated": True}),
}
# name -> what it is for keys and latents, and for streams whose names end in "value".
BY_STREAM = {
    "kivi4": ("kivi4_channel", "kivi4_token"),
    "kivi2": ("kivi2_channel", "kivi2_token"),
    "kvquant4": ("kvquant4_channel", "kivi4_token"),
    "kvquant2": ("kvquant2_channel", "kivi2_token"),
}
SIZES = {"unit": "tokens", "lag": "tokens", "group": "channels"}  # what :SIZE sets, the first that a codec has
LAYOUTS = {"latent_fp8": "c_kv=latent_fp8,k_rope=bf16"}


def codec(text: str, stream: str = "") -> Codec | None:
    """The codec that `[hadamard+]NAME[:SIZE]` is for a stream; None for `none`.

    Raises:
      UserError: an unknown name, with the nearest match, or a size that is no number or does not fit.
    """
    rotation, _, rest = text.rpartition("+")
    asked, colon, size = rest.partition(":")
    if asked == "none" and not rotation and not colon:
        return None
    name = BY_STREAM[asked][stream.endswith("value")] if asked in BY_STREAM else asked
    if name not in REGISTRY or rotation not in ("", "hadamard"):
        wrong = asked if name not in REGISTRY else rotation
        raise UserError(f"{FIELD}: {wrong!r} is not known; {nearest(wrong, [*REGISTRY, *BY_STREAM, 'none', 'hadamard'])}")
    where, arguments = REGISTRY[name]
    if colon:
        sets = _sets(arguments)
        if not _is_size(size) or not sets:
            takes = f"{size!r} is no number of {SIZES[sets]}" if sets else f"{name} has no groups"
            write = f"or {asked}:TOKENS" if SIZES.get(sets) == "tokens" else f"or, for {_grouped()}, NAME:CHANNELS"
            raise UserError(f"{FIELD}: {text!r}: {takes}; write NAME {write}")
        arguments = arguments | {sets: int(size), "strict": sets == "group"}
    (cls,) = load(where)
    made: Codec = cls(**arguments)
    return Rotated.before(made) if rotation else made


def codecs(
    spec: str, streams: Iterable[str], states: Iterable[str] = (), elsewhere: bool = False
) -> dict[str, Codec | None]:
    """The codec of each of a cache's streams and states.

    Args:
      spec: the specification.
      streams: of entries.
      states: names of states, which a codec without a name does not mean.
      elsewhere: other caches may have what is named and not here.

    Raises:
      UserError: what `codec` refuses, a stream that is not there, one that is named twice, or a codec without a name where
        there are states alone.
    """
    streams, states = list(streams), list(states)
    spec = LAYOUTS.get(spec, spec)
    chosen: dict[str, Codec | None] = dict.fromkeys([*streams, *states])
    if "=" not in spec:
        if spec != "none" and not streams and not elsewhere:
            named = f"name it, {states[0]}={spec}, or set it to none" if states else "set it to none"
            raise UserError(f"{FIELD}: {spec!r}: this model keeps a state and no entries of tokens; {named}")
        return chosen | {stream: codec(spec, stream) for stream in streams}
    for entry in _entries(spec):
        stream, equals, name = entry.partition("=")
        if equals and stream in chosen:
            chosen[stream] = codec(name, stream)
        elif not elsewhere:
            raise UserError(f"{FIELD}: {entry!r}: no stream {stream!r} in this cache; {nearest(stream, chosen)}")
    return chosen


def check(spec: str) -> None:
    """Refuses what no cache could store.

    Raises:
      UserError: as `codec`, or a stream that is named twice.
    """
    for entry in _entries(LAYOUTS.get(spec, spec)):
        codec(entry.rpartition("=")[2])


def _entries(spec: str) -> list[str]:
    """The parts between commas; refuses a stream that two of them name."""
    entries = [entry.strip() for entry in spec.split(",")]
    streams = [entry.partition("=")[0] for entry in entries if "=" in entry]
    for stream in streams:
        if streams.count(stream) > 1:
            raise UserError(f"{FIELD}: {spec!r}: {stream} is given twice; leave one of them out")
    return entries


def _is_size(text: str) -> bool:
    """Whether it is a number of channels or tokens, in digits."""
    return text.isascii() and text.isdigit() and len(text) < 10 and int(text) > 0


def _sets(arguments: dict[str, Any]) -> str:
    """The argument that :SIZE sets."""
    return next((argument for argument in SIZES if argument in arguments), "")


def _grouped() -> str:
    return ", ".join(name for name, (_, arguments) in REGISTRY.items() if _sets(arguments) == "group")


__all__ = ["FIELD", "Codec", "check", "codec", "codecs"]
