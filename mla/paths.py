"""Paths as people write them, made into paths that files can be opened by: the one place where `~` is expanded.

Also where this code is: a checkout or an installed package, and the config files that come with it.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from mla.errors import UserError

_PACKAGE = Path(__file__).resolve().parent
_INSTALLED = (_PACKAGE / "configs").is_dir()  # a wheel has them inside the package
CHECKOUT = None if _INSTALLED else _PACKAGE.parent  # the folder of train.py, eval.py and sweep.py; None once installed
SHIPPED = (_PACKAGE if CHECKOUT is None else CHECKOUT) / "configs"  # the config files that come with this code


def temporary(path: Path) -> Path:
    """A file or folder beside `path` to write, for a rename or a link afterwards: a name that no other process chooses, and
    that is not too long where the file's own is not."""
    return path.with_name(f".{path.name[:50]}.{secrets.token_hex(8)}.tmp")


def expand(text: str, field: str) -> str:
    """`text` with `~` or `~name` at its start replaced by that home folder; a folder called so is written `./~`.

    Args:
      text: as it was given; '' stays ''.
      field: what a refusal names, such as `--out` or `config.init_from`.

    Raises:
      UserError: nobody knows that home folder.
    """
    if not text.startswith("~"):
        return text
    user = text.partition("/")[0][1:]
    expanded = os.path.expanduser(text)
    if expanded == text or (not user and os.environ.get("HOME") == ""):
        who = f"no user {user!r} is known here" if user else "HOME is not set and this user has no home folder"
        raise UserError(f"{field}: {text}: {who}; write the path in full")
    return expanded


def absolute(text: str, field: str) -> str:
    """`expand`, from the root: for what is stored and read again from elsewhere; '' stays ''."""
    return os.path.abspath(expand(text, field)) if text else text
