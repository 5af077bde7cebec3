"""What the choice tasks share: the reading of a letter, and the likelihood of choices."""

from collections.abc import Sequence

from vlm_metrics import parse_choice

from ..answers import likeliest
from ..measures import Measure, mean_of
from ..prediction import EvalItem
from ..wording import LETTERS, Wording
from .task import Asked, mean_score

WORDING = Wording(after=" Answer:")


def score(item: EvalItem, said: str) -> float:
    """Whether the answer names the right choice, by letter or by its text (MMBench's exact matching)."""
    return float(parse_choice(said, item.choices) == item.answer)


def measure(asked: Sequence[Asked]) -> dict[str, Measure]:
    """Accuracy, by group too; by likelihood also that of the choice whose tokens are likeliest on average."""
    return mean_score(score, "accuracy")(asked) | by_token(asked)


def by_token(asked: Sequence[Asked]) -> dict[str, Measure]:
    """Accuracy of the choice with the best mean over its tokens; nothing where likelihood was not asked for."""
    if not any(one.answer.nats for one in asked):
        return {}
    right: list[bool] = []
    for item, answer in asked:
        texts = LETTERS if item.choices else item.candidates
        right.append(bool(answer.nats) and texts[likeliest(answer.nats, answer.num_tokens)] == item.answer)
    return {"accuracy_per_token": mean_of(right)}
