"""Registries map names to where code stands, `module:Name[:Name ..]`, which is imported when a name is used."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from mla.errors import UserError, nearest


def load(place: str) -> tuple[Any, ...]:
    """The objects of a module that `module:Name[:Name ..]` names."""
    module, *names = place.split(":")
    imported = importlib.import_module(module)
    return tuple(getattr(imported, name) for name in names)


def specified(spec: str, registry: Mapping[str, str], field: str, also: Sequence[str] = ()) -> Any:
    """The dataclass of `registry` that `NAME[:setting=value,...]` makes, each value of the type of the field's default.

    Args:
      spec: what a user wrote.
      registry: name -> where its dataclass stands, whose fields all have defaults. Those with metadata are no settings.
      field: what errors name.
      also: words that stand beside the registry's names, for the list of what is known.

    Raises:
      UserError: an unknown name or setting, with the nearest match, or a value of the wrong type, naming `field`.
    """
    name, _, settings = spec.partition(":")
    if name not in registry:
        raise UserError(f"{field}: {name!r} is not known; {nearest(name, [*registry, *also])}")
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
