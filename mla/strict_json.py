"""JSON whose numbers are all finite, and objects of it as frozen dataclasses.

NaN and infinities are no JSON and no figures, and are refused where one is written.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from mla.errors import UserError

T = TypeVar("T")
# Kinds of fields beside dataclasses, str, int and Mapping; the texts say in an error line what would be right.
Number = Annotated[float, "a number"]
Count = Annotated[float, "a number from 0 to 1e18"]


def not_finite(value: Any, path: str = "") -> str:
    """The first number of nested dicts and lists that is not finite, as 'cache.bytes_at.8192 is nan'; '' if all are."""
    if isinstance(value, int | float) and not abs(value) <= sys.float_info.max:  # NaN is not; nor is 10 ** 400
        return f"{path or 'it'} is {value:.3g}" if isinstance(value, float) else f"{path} is too large"
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return next(filter(None, (not_finite(v, f"{path}.{k}" if path else str(k)) for k, v in items)), "")


def dumps(value: Any, where: str, indent: int | None = None) -> str:
    """The text of a value.

    Args:
      value: nested dicts and lists of plain Python values.
      where: the file that is to be written and what of it, for the error line.
      indent: spaces a level; None: one line.

    Raises:
      UserError: a number that is not finite, with its place.
    """
    wrong = not_finite(value)
    if wrong:
        raise UserError(f"{where}: {wrong}, not a finite number; it was not written")
    return json.dumps(value, indent=indent, allow_nan=False)


def read(cls: type[T], value: Any, where: str, path: str = "", **given: Any) -> T:
    """A frozen dataclass from an object of JSON; keys that it has no field for are left out.

    Args:
      cls: its fields are dataclasses, str, bool, int, Number, Count or Mapping[str, ..] or Sequence of these, or `| None`.
        Those with a default may be missing.
      value: what was read.
      where, path: the file, and the keys down to this object, for the error line.
      given: fields whose values are known and are not looked for.

    Raises:
      UserError: one line with the first field that is missing or of another kind.
    """
    if not isinstance(value, dict):
        raise UserError(f"{where}: {path or 'it'} is {str(value)[:40]!r}, not an object")
    fields = dict(given)
    for field in (field for field in dataclasses.fields(cls) if field.name not in given):  # type: ignore[arg-type]
        inner = f"{path}.{field.name}" if path else field.name
        if value.get(field.name) is not None:
            fields[field.name] = _read(_kinds(cls)[field.name], value[field.name], where, inner)  # type: ignore[arg-type]
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(f"{where}: {inner} is missing")
    return cls(**fields)


@functools.cache
def _kinds(cls: Any) -> dict[str, Any]:
    return get_type_hints(cls, include_extras=True)


def _read(kind: Any, value: Any, where: str, path: str) -> Any:
    """A value of a kind of field, see `read`."""
    if get_origin(kind) in (Union, types.UnionType):
        (kind,) = (option for option in get_args(kind) if option is not type(None))
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return read(kind, value, where, path)
    inside: Any = None
    if get_origin(kind) is Mapping:
        inside = get_args(kind)[1]
        fits, wanted = isinstance(value, dict), "an object"
    elif get_origin(kind) is Sequence:
        if isinstance(value, list | tuple):
            return tuple(_read(get_args(kind)[0], item, where, f"{path}.{number}") for number, item in enumerate(value))
        fits, wanted = False, "a list"
    elif kind is str:
        fits, wanted = isinstance(value, str), "a text"
    elif kind is bool:
        fits, wanted = isinstance(value, bool), "true or false"
    elif kind is int:
        fits, wanted = isinstance(value, int) and not isinstance(value, bool), "a whole number"
    else:
        fits, wanted = isinstance(value, int | float) and not isinstance(value, bool), kind.__metadata__[0]
        fits = fits and (kind is Number or 0 <= value <= 1e18)
    if not fits:
        raise UserError(f"{where}: {path} is {str(value)[:40]!r}, not {wanted}")
    if inside not in (None, Any):
        return {key: _read(inside, item, where, f"{path}.{key}") for key, item in value.items()}
    return value
