"""The one exception for what a user can cause and mend."""


class UserError(Exception):
    """Bad input. Its message is one line that names the field or file and says what would be right.

    `train.py`, `eval.py` and `sweep.py` print the message without a traceback and exit with status 1.
    """
