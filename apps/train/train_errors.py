"""How a run ends before its time: the exit statuses, and the line between what a user can mend and a fault of ours."""

from collections.abc import Generator
from contextlib import contextmanager

BAD_INPUT = 2
TOO_MUCH_BAD_DATA = 3
NOT_SAVED = 4
NOT_FINITE = 5
INTERRUPTED = 130
TERMINATED = 143


class BadInputError(Exception):
    """A setting, file or checkpoint that cannot be used, found before the training that needs it."""


@contextmanager
def checking_input() -> Generator[None]:
    """Turn what set-up raises about its input into `BadInputError`; the loop runs outside, so its bugs stay visible."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise BadInputError(str(error)) from error
