"""How a run ends before its time: the exit statuses, and the line between what a user can mend and a fault of ours."""

from collections.abc import Generator
from contextlib import contextmanager

FINISHED = 0
BAD_INPUT = 2
"""The command line, a file it names or a checkpoint cannot be used; nothing has been trained."""
TOO_MUCH_BAD_DATA = 3
"""More samples are bad than the data file's limits allow, or a shard is not what it was when the run began."""
NOT_SAVED = 4
"""A checkpoint or log could not be written; the checkpoints that are there are whole."""
NOT_FINITE = 5
"""Too many steps in a row had a loss or gradient that is not finite."""
RANK_LOST = 6
"""Another process of the run has ended, hangs or cannot be reached; it is named."""
INTERRUPTED = 130
"""Ctrl-C: after a checkpoint, or at once if pressed twice."""
TERMINATED = 143
"""SIGTERM: after a checkpoint, or at once if sent twice."""


class BadInputError(Exception):
    """A setting, file or checkpoint that cannot be used, found before the training that needs it."""


@contextmanager
def checking_input() -> Generator[None]:
    """Turn what set-up raises about its input into `BadInputError`; the loop runs outside, so its bugs stay visible."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise BadInputError(str(error)) from error
