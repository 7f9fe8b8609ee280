"""The one exception for what a user can cause and mend, and what helps to mend it."""

import difflib
import errno
from collections.abc import Iterable

# What a full or forbidden disk says; beside these two, what goes wrong with a file is a defect and keeps its traceback.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
# What a path says that cannot be one: too long, below a file, a folder where a file should be, links in a circle.
PATH_ERRORS = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)


class UserError(Exception):
    """Bad input. Its message is one line that names the field or file and says what would be right.

    `train.py`, `eval.py` and `sweep.py` print the message without a traceback and exit with status 1.
    """


def require(prefix: str, condition: object, field: str, message: str) -> None:
    """Raises UserError, a line that names a field such as `config.model.` `d_model`, unless a condition holds."""
    if not condition:
        raise UserError(f"{prefix}{field}: {message}")


def nearest(word: str, known: Iterable[str]) -> str:
    """'did you mean ..?' or the list of what is known, for error lines."""
    known = list(known)
    near = difflib.get_close_matches(word, known, 1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
