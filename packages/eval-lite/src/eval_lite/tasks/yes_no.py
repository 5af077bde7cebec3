"""What the yes-or-no tasks share."""

from ..measures import Measure
from ..wording import ANSWER_SHORTLY, Wording

CANDIDATES = ("yes", "no")
WORDING = Wording(instruction=ANSWER_SHORTLY, after=" Answer:")


def share_of(parts: list[bool], of: list[bool]) -> Measure:
    """Of the units in `of`, those in `parts` too; 0 where there are none, as the benchmarks have it."""
    rows = tuple((float(part and whole), float(whole)) for part, whole in zip(parts, of, strict=True))
    return Measure(rows, lambda means: means[0] / means[1] if means[1] else 0.0)
