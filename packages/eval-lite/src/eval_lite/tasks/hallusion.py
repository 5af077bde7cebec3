"""HallusionBench: a JSON list of {"category", "subcategory", "visual_input", "set_id", "figure_id", "question_id",
"question", "gt_answer": "0" or "1", "filename"}; without a figure, `filename` is null.

Source: HallusionBench.json of tianyi-lab/HallusionBench. Answers are read as yes or no, without a judge; what is
neither is wrong.
"""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from vlm_metrics import parse_yes_no

from ..measures import Measure, mean_of
from ..prediction import EvalItem
from ..wording import Wording
from . import yes_no
from .files import find_file, picture, question, read_rows, refuse
from .task import Asked, Task, scores_of

_ANSWERS = {"0": "no", "1": "yes"}
_NAMES = ("category", "subcategory", "set_id", "figure_id", "question_id")


class _Row(msgspec.Struct):
    category: str
    subcategory: str
    set_id: str
    figure_id: str
    question_id: str
    question: str
    gt_answer: str
    filename: str | None = None


def _read(folder: Path) -> list[EvalItem]:
    path = find_file(folder, "HallusionBench*.json", "*.json")
    items: list[EvalItem] = []
    for number, row in enumerate(read_rows(path, _Row), 1):
        if row.gt_answer not in _ANSWERS:
            raise refuse(path, number, "0 or 1 as gt_answer", row.gt_answer, "correct the row")
        images = []
        if row.filename:
            name = row.filename.removeprefix("./")
            images = [picture(folder, (name, name.removeprefix("hallusion_bench/")), path, number)]
        facts = {name: getattr(row, name) for name in _NAMES}
        items.append(
            EvalItem(
                group=f"{row.category} {row.subcategory}",
                prompt=question("/".join(facts.values()), images, row.question, "hallusion"),
                answer=_ANSWERS[row.gt_answer],
                candidates=yes_no.CANDIDATES,
                facts=facts,
            )
        )
    return items


def _score(item: EvalItem, said: str) -> float:
    return float(parse_yes_no(said) == item.answer)


def _measure(asked: Sequence[Asked]) -> dict[str, Measure]:
    """aAcc of questions, fAcc of figures with all of theirs right, qAcc of questions right over all figures."""
    scores = scores_of(asked, _score)
    figures: dict[tuple[str, ...], bool] = {}
    questions: dict[tuple[str, ...], bool] = {}
    for one, value in zip(asked, scores, strict=True):
        category, subcategory, set_id, figure_id, question_id = (one.item.facts[name] for name in _NAMES)
        over_figures = (category, subcategory, set_id, question_id)
        questions[over_figures] = questions.get(over_figures, True) and value == 1
        # There is no figure in it.
        if (category, figure_id) != ("VS", "0"):
            figure = (category, subcategory, set_id, figure_id)
            figures[figure] = figures.get(figure, True) and value == 1
    measures = {"a_acc": mean_of(scores), "q_acc": mean_of(list(questions.values()))}
    return measures | ({"f_acc": mean_of(list(figures.values()))} if figures else {})


TASKS = {
    "hallusion": Task(
        name="hallusion",
        files="HallusionBench.json, hallusion_bench/…",
        read=_read,
        score=_score,
        measure=_measure,
        wording=Wording(instruction="Please answer yes or no.", after=yes_no.WORDING.after),
    )
}
