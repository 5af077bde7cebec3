"""The golden file of known faults: what other code gives where vlm-metrics means to differ."""

import contextlib
import copy
import io
import random
import sys
from collections import defaultdict
from types import SimpleNamespace

from golden_captions import java_words
from golden_official import Golden, Packages


def faults(packages: Packages, rng: random.Random) -> Golden:
    """What other code gives where we mean to differ; the tests say what we give on the same inputs."""
    del rng  # These inputs are chosen, not drawn.
    given: Golden = {}

    def vqa_of(path: str, prediction: str, answers: list[Golden]) -> float:
        official = packages.take(path, "VQAEval", sys=sys)
        question = {"answers": answers, "question_type": "", "answer_type": ""}
        vqa = SimpleNamespace(getQuesIds=list, qa={0: question})
        judge = official.VQAEval(vqa, SimpleNamespace(getQuesIds=list, qa={0: {"answer": prediction}}), n=12)
        with contextlib.redirect_stdout(io.StringIO()):
            judge.evaluate([0])
        return judge.evalQA[0] / 100

    given["vqa: unanimous answers are normalised"] = [
        packages.source("open-flamingo", "VQAEval"),
        vqa_of("open_flamingo/eval/vqa_metric.py", "Red", [{"answer": "red", "answer_id": i} for i in range(10)]),
    ]
    given["vqa: people without an id who agree are one"] = [
        packages.source("open-flamingo", "VQAEval"),
        vqa_of("open_flamingo/eval/vqa_metric.py", "red", [{"answer": text} for text in ["red"] * 4 + ["blue"]]),
    ]
    given["vqa: people's number words stay"] = [
        packages.source("salesforce-lavis", "VQAEval"),
        vqa_of(
            "lavis/common/vqa_tools/vqa_eval.py",
            "two dogs",
            [{"answer": text, "answer_id": i} for i, text in enumerate(["two dogs"] * 9 + ["cat"])],
        ),
    ]
    given["vqa: a stop behind a digit stays"] = [
        packages.source("ms-vlmeval", "process_punctuation"),
        packages.take("vlmeval/smp/misc.py", "process_punctuation").process_punctuation("5."),
    ]
    mmmu = packages.take(
        "lmms_eval/tasks/_task_utils/mmmu_mcq_utils.py", "parse_mmmu_multi_choice_response"
    ).parse_mmmu_multi_choice_response
    given["mmmu: a capital that ends a word is an option"] = [
        packages.source("lmms-eval", "parse_mmmu_multi_choice_response"),
        mmmu("It is PAC man", list("ABCD"), dict(zip("ABCD", ["red", "green", "blue", "grey"], strict=True))),
    ]
    ratio = packages.take("lmms_eval/tasks/pope/utils.py", "pope_aggregate_yes_ratio").pope_aggregate_yes_ratio
    labels = ["yes", "yes", "no", "no"]
    given["pope: yes-ratio of the labels"] = [
        packages.source("lmms-eval", "pope_aggregate_yes_ratio"),
        ratio([{"ground_truth": label, "prediction": "yes"} for label in labels]),
    ]
    given["pope: an answer of more than one word is no answer"] = [
        packages.source("lmms-eval", "pope_process_results"),
        packages.take("lmms_eval/tasks/pope/utils.py", "pope_process_results").pope_process_results(
            {"answer": "yes", "question_id": 0}, ["Yes."]
        )["pope_accuracy"]["score"],
    ]
    hallusion = packages.take(
        "lmms_eval/tasks/hallusion_bench/evaluate_hb.py", "hb_aggregation_result_intern"
    ).hb_aggregation_result_intern
    rows = [
        {"category": "VS", "subcategory": "map", "set_id": 0, "figure_id": figure, "question_id": 0}
        | {"model_prediction": text, "gt_answer": "1"}
        for figure, text in enumerate(["no", "yes"])
    ]
    given["hallusion: no figure counts as a figure"] = [
        packages.source("lmms-eval", "hb_aggregation_result_intern"),
        hallusion(rows, "fAcc"),
    ]
    given["hallusion: yes is found within words"] = [
        packages.source("lmms-eval", "hb_aggregation_result_intern"),
        hallusion([rows[0] | {"model_prediction": "No, it was yesterday"}], "aAcc"),
    ]
    scorer = packages.take(
        "pycocoevalcap/cider/cider_scorer.py",
        *("precook", "cook_refs", "cook_test", "CiderScorer"),
        copy=copy,
        defaultdict=defaultdict,
    ).CiderScorer()
    for image in ("a cat", "a dog", "two red buses", "two red buses"):
        scorer += (image, [image])
    scorer.compute_score()
    # Frequencies are added up again; enough images share nothing, or the code would stop on its own assertion.
    given["cider: a second call changes the score"] = [
        packages.source("pycocoevalcap", "CiderScorer"),
        [float(score) for score in scorer.compute_score()[1]],
    ]
    given["ptb: words hang on the caption that follows"] = [
        packages.source("pycocoevalcap", "PTBTokenizer"),
        [java_words(packages, ["plan B.", after])[0] for after in ("A man", "a man")],
    ]
    return given
