"""JSON whose numbers are all finite: NaN and infinities are no JSON and no figures, and are refused where one is written."""

from __future__ import annotations

import json
import sys
from typing import Any

from mla.errors import UserError


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
