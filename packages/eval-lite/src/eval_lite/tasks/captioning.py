"""What the captioning tasks share: the request, and CIDEr-D over all that was asked.

CIDEr-D weighs words by how many of the asked pictures' references have them, so a figure of a part of a benchmark is
not the benchmark's. The interval draws pictures with those weights as they are.
"""

from collections.abc import Sequence

from vlm_metrics import cider_d

from ..measures import Measure, mean_of
from ..prediction import EvalItem
from ..wording import Wording
from .task import Asked

WORDING = Wording(
    instruction="Provide a one-sentence caption for the provided image.",
    before="Output:",
    after="",
    stops=("\n", "Output"),
)


def measure(asked: Sequence[Asked]) -> dict[str, Measure]:
    """CIDEr-D, a hundred times its mean as papers print it."""
    scores = cider_d([one.answer.text for one in asked], [one.item.references for one in asked])
    return {"cider_d": mean_of(scores.per_image, scale=100.0)}


def score(item: EvalItem, said: str) -> float:
    """Of words that a reference has too, the larger of the shares over references: for the report's order alone."""
    words = set(said.lower().split())
    shares = [
        len(words & set(text.lower().split())) / max(1, len(words | set(text.lower().split())))
        for text in item.references
    ]
    return max(shares, default=0.0)
