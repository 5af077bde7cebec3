"""Golden files of yes/no questions: how answers are read, POPE, MME, HallusionBench."""

import contextlib
import io
import json
import random
import tempfile
from collections import defaultdict
from types import SimpleNamespace

from golden_captions import NOUNS
from golden_official import Golden, Packages

YES_NO = [
    "Yes", "No", "yes", "no", "NO", "Yes, there is a {w}.", "No, there isn't.", "There is no {w}.", "not sure", "nope",
    "There isn't a {w}", "Yes. But no {w}.", "I do not think so", "It is, yes!", "no-one", "Y", "n", "y.", "know",
    "yes/no", "The image shows a {w}. No {w}", "{w}", " Yes", "\nno", "", "yesterday", "...no", "Not at all",
    "Yes and no", "no,{w}",
]  # fmt: skip


def yes_no(rng: random.Random) -> str:
    """An answer to a yes/no question."""
    text = rng.choice(YES_NO).format(w=rng.choice(NOUNS))
    return rng.choice([text, text, text.lower(), text + ".", text + ", " + rng.choice(YES_NO).format(w="bus")])


def pope(packages: Packages, rng: random.Random) -> Golden:
    """POPE: sets of answers, what each was read as, and the figures."""
    official = packages.take("llava/eval/eval_pope.py", "eval_pope", json=json)
    sets: list[Golden] = []
    for _ in range(20):
        texts = [yes_no(rng) for _ in range(20)] + ["Yes"]
        labels = [rng.choice(["yes", "no"]) for _ in range(20)] + ["yes"]
        answers = [{"text": text} for text in texts]
        with (
            tempfile.NamedTemporaryFile("w", suffix=".json") as file,
            contextlib.redirect_stdout(io.StringIO()) as said,
        ):
            file.writelines(json.dumps({"label": label}) + "\n" for label in labels)
            file.flush()
            official.eval_pope(answers, file.name)
        figures = [float(line.split(": ")[1]) for line in said.getvalue().splitlines() if ": " in line]
        sets.append({"texts": texts, "labels": labels, "read": [row["text"] for row in answers], "figures": figures})
    return {
        "source": packages.source("llava-torch", "llava.eval.eval_pope.eval_pope"),
        "order": ["accuracy", "precision", "recall", "f1", "yes_ratio"],
        "sets": sets,
    }


def reading(packages: Packages, rng: random.Random) -> Golden:
    """Yes or no by VLMEvalKit, and by MME's rule."""
    kit = packages.take("vlmeval/smp/misc.py", "process_punctuation")
    extract = packages.take(
        "vlmeval/dataset/utils/yorn.py", "YOrN_Extraction", process_punctuation=kit.process_punctuation
    ).YOrN_Extraction
    mme = packages.take("lmms_eval/tasks/mme/utils.py", "parse_pred_ans").parse_pred_ans
    texts = sorted({yes_no(rng) for _ in range(900)})
    read = {"Yes": "yes", "No": "no", "Unknown": None, "yes": "yes", "no": "no", "other": None}
    return {
        "source": packages.source("ms-vlmeval", "vlmeval.dataset.utils.yorn.YOrN_Extraction"),
        "source_mme": packages.source("lmms-eval", "lmms_eval.tasks.mme.utils.parse_pred_ans"),
        "cases": [[text, read[extract(text)], read[mme(text)]] for text in texts],
    }


def mme(packages: Packages, rng: random.Random) -> Golden:
    """MME's sums."""
    official = packages.take(
        "lmms_eval/tasks/mme/utils.py",
        "mme_aggregate_results",
        defaultdict=defaultdict,
        eval_logger=SimpleNamespace(info=lambda text: None),
    )
    tasks = packages.take("lmms_eval/tasks/mme/utils.py", "eval_type_dict").eval_type_dict
    cases: list[list[object]] = []
    for _ in range(200):
        rows = [
            [subtask, str(image), rng.random() < 0.7]
            for subtask in rng.sample(sorted(tasks["Perception"] + tasks["Cognition"]), rng.randint(1, 4))
            for image in range(rng.randint(1, 3))
            for _ in range(2)
        ]
        sums = [
            official.mme_aggregate_results(
                [{"category": s, "question_id": i, "score": float(right)} for s, i, right in rows if s in names]
            )
            for names in (tasks["Perception"], tasks["Cognition"])
        ]
        cases.append([[[subtask, image, int(right)] for subtask, image, right in rows], *sums])
    return {"source": packages.source("lmms-eval", "lmms_eval.tasks.mme.utils.mme_aggregate_results"), "cases": cases}


def hallusion(packages: Packages, rng: random.Random) -> Golden:
    """HallusionBench's three accuracies."""
    path = "lmms_eval/tasks/hallusion_bench/utils.py"
    official = packages.take(path, "get_eval_all", "get_eval_fig", "get_eval_pair_all")
    cases: list[list[object]] = []
    for _ in range(200):
        rows = [
            [category, "chart", str(group), str(figure), str(question), int(rng.random() < 0.8)]
            for category in ("VD", "VS")
            for group in range(rng.randint(1, 2))
            for figure in range(2)
            for question in range(rng.randint(1, 2))
        ]
        names = ("category", "subcategory", "set_id", "figure_id", "question_id", "correct")
        data = [dict(zip(names, row, strict=True)) | {"check": row[-1], "visual_input": "1"} for row in rows]
        stats = [
            official.get_eval_all(data, "check"),
            official.get_eval_pair_all(data, "check"),
            official.get_eval_fig(data),
        ]
        cases.append([rows, *(stat["correct"] / stat["total"] for stat in stats)])
    return {
        "source": packages.source("lmms-eval", "get_eval_all, get_eval_pair_all, get_eval_fig of " + path),
        "cases": cases,
    }
