"""Golden files of free answers: VQA accuracy, ANLS, relaxed accuracy, and boxes."""

import contextlib
import io
import random
import sys
from collections.abc import Sequence
from types import SimpleNamespace

from golden_official import Golden, Packages

WORDS = [
    "red", "blue", "two", "dogs", "cat", "the", "a", "an", "left", "right", "none", "yes", "no", "table",
    "man's", "5", "10", "3.5", "12:30", "2,000", "dont", "isn't", "u.s.a",
]  # fmt: skip
MARKS = ["", "", "", ".", ",", "!", "?", " - ", "/", "'s", ": ", "(", ")", '"', "$", "%", "\n", "\t", "  "]


def phrase(rng: random.Random, longest: int = 5, words: Sequence[str] = WORDS) -> str:
    """Some words with marks between them, in mixed case."""
    text = ""
    for _ in range(rng.randint(1, longest)):
        word = rng.choice(words)
        text += rng.choice(["", " ", " ", " "]) + rng.choice([word, word, word.capitalize(), word.upper()])
        text += rng.choice(MARKS)
    return text


def noisy(rng: random.Random, text: str, most: int = 4, by: Sequence[str] = ("", "a", "B", " ", "7", ".")) -> str:
    """The text with up to `most` characters changed."""
    chars = list(text)
    for _ in range(rng.randint(0, most)):
        place = rng.randrange(len(chars) + 1)
        chars[place : place + rng.randint(0, 1)] = rng.choice(by)
    return "".join(chars)


def ten_answers(rng: random.Random) -> tuple[str, list[str]]:
    """A prediction and ten people's answers, of which some agree."""
    pool = [phrase(rng, 3) for _ in range(rng.randint(1, 4))]
    people = [rng.choice(pool) for _ in range(10)]
    if rng.random() < 0.5:
        people = [rng.choice([text, text.lower(), text + ".", "the " + text]) for text in people]
    near = rng.choice(people)
    return rng.choice([near, near, near.lower(), near + "?", "a " + near, phrase(rng, 3)]), people


def vqa(packages: Packages, rng: random.Random) -> Golden:
    """The official class, as OpenFlamingo ported it to Python 3.

    The port normalises every question; the official code leaves the unanimous ones as they are. For those the two
    processing methods are replaced by none, which is all that they differ in.
    """
    official = packages.take("open_flamingo/eval/vqa_metric.py", "VQAEval", sys=sys)
    idle = SimpleNamespace(getQuesIds=list)
    judge = official.VQAEval(idle, idle, n=12)

    def accuracy(prediction: str, people: list[str]) -> float:
        answers = [{"answer": text, "answer_id": i} for i, text in enumerate(people)]
        judge.vqa = SimpleNamespace(qa={0: {"answers": answers, "question_type": ""}})
        judge.vqaRes = SimpleNamespace(qa={0: {"answer": prediction}})
        shadow = {"processPunctuation": lambda text: text, "processDigitArticle": lambda text: text}
        is_unanimous = len({text.replace("\n", " ").replace("\t", " ").strip() for text in people}) == 1
        judge.__dict__.update(shadow if is_unanimous else {})
        with contextlib.redirect_stdout(io.StringIO()):
            judge.evaluate([0])
        for name in shadow:
            judge.__dict__.pop(name, None)
        return judge.evalQA[0] / 100

    texts = [*judge.contractions, *judge.contractions.values(), *judge.manualMap, "." * 40 + "a"]
    texts += [phrase(rng) for _ in range(300)]
    cases = [ten_answers(rng) for _ in range(300)]
    return {
        "source": packages.source("open-flamingo", "open_flamingo.eval.vqa_metric.VQAEval"),
        "normalised": [[text, judge.processDigitArticle(judge.processPunctuation(text))] for text in texts],
        "accuracy": [[prediction, people, accuracy(prediction, people)] for prediction, people in cases],
    }


def evalai(packages: Packages, rng: random.Random) -> Golden:
    """TextVQA's evaluation as LLaVA has it."""
    official = packages.take(
        "llava/eval/m4c_evaluator.py", "EvalAIAnswerProcessor", "TextVQAAccuracyEvaluator", tqdm=lambda rows: rows
    )
    judge = official.TextVQAAccuracyEvaluator()
    cases = [ten_answers(rng) for _ in range(300)]
    return {
        "source": packages.source("llava-torch", "llava.eval.m4c_evaluator.TextVQAAccuracyEvaluator"),
        "normalised": [[text, judge.answer_processor(text)] for text in (phrase(rng) for _ in range(300))],
        "accuracy": [
            [text, people, judge.eval_pred_list([{"pred_answer": text, "gt_answers": people}])]
            for text, people in cases
        ],
    }


def anls(packages: Packages, rng: random.Random) -> Golden:
    """ANLS as lmms-eval has it for DocVQA."""
    official = packages.take("lmms_eval/api/metrics.py", "anls", "levenshtein_distance")
    cases: list[list[object]] = [["", [""], 1.0]]
    for _ in range(400):
        answers = [phrase(rng, 3).strip() or "a" for _ in range(rng.randint(1, 3))]
        prediction = noisy(rng, rng.choice(answers), 8)
        cases.append([prediction, answers, official.anls(answers, [prediction])["anls"]])
    return {"source": packages.source("lmms-eval", "lmms_eval.api.metrics.anls"), "cases": cases}


def relaxed(packages: Packages, rng: random.Random) -> Golden:
    """ChartQA's relaxed correctness as lmms-eval has it."""
    official = packages.take("lmms_eval/tasks/chartqa/utils.py", "relaxed_correctness")
    cases: list[list[object]] = []
    for _ in range(400):
        value = rng.choice([0.0, rng.uniform(-200, 200), float(rng.randint(-50, 50)), rng.uniform(0, 1)])
        answer = rng.choice(["{:.2f}", "{:.0f}", "{:g}", "{:.1f}%", "{:,.1f}", "${:.2f}"]).format(value)
        scale = rng.choice([1, 1.04, 1.05, 1.06, 0.95, 0.94, 0.96, -1, 100, 0.01])
        prediction = rng.choice(["{:.3f}", "{:.0f}", "{:g}", "{:.2f}%", "{:,.1f}", "${:.2f}", "{:e}"]).format(
            value * scale
        )
        if rng.random() < 0.2:
            answer, prediction = (
                rng.choice(["Yes", "yes", "USA", "usa", "nan", "inf", "1_0", "%", "5 %"]) for _ in "ab"
            )
        cases.append([prediction, answer, official.relaxed_correctness(prediction, answer)])
    return {"source": packages.source("lmms-eval", "lmms_eval.tasks.chartqa.utils.relaxed_correctness"), "cases": cases}


def grounding(packages: Packages, rng: random.Random) -> Golden:
    """IoU and Acc@0.5 of RefCOCO."""
    official = packages.take("lmms_eval/tasks/refcoco/utils_rec.py", "compute_iou", "compute_accuracy")

    def box(near: list[float] | None = None) -> list[float]:
        x, y, w, h = near or (rng.uniform(0, 0.7), rng.uniform(0, 0.7), rng.uniform(0.05, 0.3), rng.uniform(0.05, 0.3))
        return [round(value, 3) for value in (x, y, x + w, y + h)]

    cases: list[list[object]] = [[[0, 0, 2, 2], [0, 0, 2, 1], 0.5, True]]
    for _ in range(300):
        answer = box()
        x, y, right, below = answer
        near = [x + rng.uniform(-0.05, 0.05), y + rng.uniform(-0.05, 0.05), right - x, below - y]
        predicted = box(near) if rng.random() < 0.8 else box()
        iou = official.compute_iou(predicted, answer)
        cases.append([predicted, answer, iou, bool(official.compute_accuracy(predicted, answer))])
    return {"source": packages.source("lmms-eval", "lmms_eval.tasks.refcoco.utils_rec.compute_iou"), "cases": cases}
