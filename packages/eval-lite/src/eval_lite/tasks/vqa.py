"""VQAv2 and OKVQA: the VQA format, questions and annotations in two JSON files, pictures of COCO.

    *questions.json      {"questions": [{"question_id", "image_id", "question"}], "data_subtype": "val2014"}
    *annotations.json    {"annotations": [{"question_id", "answers": [{"answer"}, … ten], "answer_type"}]}
    val2014/COCO_val2014_000000000042.jpg, or the same below images/

Source: visualqa.org (download page); okvqa.allenai.org, whose version 1.1 has stemmed answers in `answer`. OKVQA's own
score stems predictions too, in some harnesses (OpenFlamingo); here, as in lmms-eval, it does not.
"""

from pathlib import Path

import msgspec

from vlm_metrics import vqa_accuracy

from ..prediction import EvalItem
from ..wording import ANSWER_SHORTLY, Wording
from .files import check_pairs, find_file, picture, question, read_json, read_rows, refuse
from .task import Task, mean_score


class _Question(msgspec.Struct):
    question_id: int | str
    image_id: int
    question: str


class _Subset(msgspec.Struct):
    data_subtype: str = "val2014"


class _Answer(msgspec.Struct):
    answer: str


class _Annotation(msgspec.Struct):
    question_id: int | str
    answers: list[_Answer]
    answer_type: str = "other"


def read(folder: Path) -> list[EvalItem]:
    """Questions in their file's order, by type of answer."""
    asked, answered = find_file(folder, "*questions*.json"), find_file(folder, "*annotations*.json")
    subset = read_json(asked, _Subset).data_subtype
    annotations = {row.question_id: row for row in read_rows(answered, _Annotation, "annotations")}
    rows = read_rows(asked, _Question, "questions")
    check_pairs(asked, answered, [row.question_id for row in rows if row.question_id not in annotations])
    items: list[EvalItem] = []
    for number, row in enumerate(rows, 1):
        note = annotations[row.question_id]
        answers = tuple(one.answer for one in note.answers)
        if len(answers) < 4:
            raise refuse(answered, number, "ten answers", len(answers), "take the file of a split that has them")
        name = f"COCO_{subset}_{row.image_id:012d}.jpg"
        names = (f"{subset}/{name}", f"images/{name}", f"images/{subset}/{name}", name)
        image = picture(folder, names, asked, number)
        items.append(
            EvalItem(
                group=note.answer_type,
                prompt=question(str(row.question_id), [image], row.question, folder.name),
                # What most people said: a worked example shows it.
                answer=max(answers, key=answers.count),
                references=answers,
            )
        )
    return items


def score(item: EvalItem, said: str) -> float:
    """Agreement with the ten people."""
    return vqa_accuracy(said, item.references)


TASKS = {
    name: Task(
        name=name,
        files="*questions.json, *annotations.json, val2014/COCO_val2014_*.jpg",
        read=read,
        score=score,
        measure=mean_score(score, "accuracy"),
        wording=Wording(instruction=ANSWER_SHORTLY),
    )
    for name in ("vqav2", "okvqa")
}
