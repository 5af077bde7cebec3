"""Golden files of choice questions: options read out of responses, MMMU, circular choice."""

import copy
import logging
import random
import string
from collections.abc import Sequence
from types import SimpleNamespace

from golden_official import Golden, Packages

OPTIONS = [
    "a red apple",
    "green",
    "Blue car",
    "two",
    "the dog on the left",
    "None of these",
    "A cat",
    "3",
    "yellow bus",
]
SAYINGS = [
    "{l}", "{l}.", "({l})", "{l}. {o}", "{l}: {o}", "The answer is {l}.", "The answer is ({l})", "Answer: {l}", "{o}",
    "I think it is {o} because of its shape and what is near it", "{l} or {m}", "({l}) or ({m}), hence ({l})", "{k}",
    "A picture of {o}", "Option {l} is right as the others are not what is seen here", "Z", "not sure", "",
    "It is {o}, not {p}, as one can see in the picture", "both {l} and {m} but {m} more", "{l},{m}", "**{l}**", "{l})",
    "Sorry, I can't help with images of people yet.", "Of {o} and {p} it must be the former I believe: {l}", "'{l}'",
]  # fmt: skip


def saying(rng: random.Random, options: Sequence[str]) -> str:
    """A response to a choice question."""
    i, j = rng.randrange(len(options)), rng.randrange(len(options))
    letters = string.ascii_uppercase
    return rng.choice(SAYINGS).format(l=letters[i], m=letters[j], k=letters[i].lower(), o=options[i], p=options[j])


def choices(packages: Packages, rng: random.Random) -> Golden:
    """Option from a response by VLMEvalKit, and ScienceQA's rule of lmms-eval."""
    official = packages.take(
        "vlmeval/utils/matching_util.py",
        "can_infer",
        "can_infer_option",
        "can_infer_text",
        cp=copy,
        logger=logging.getLogger(),
    )
    match = packages.take(
        "lmms_eval/tasks/scienceqa/utils.py", "sqa_process_results", sqa_doc_to_target=lambda doc: doc
    )
    parsed: list[list[object]] = []
    for _ in range(500):
        options = rng.sample(OPTIONS, rng.randint(2, 5))
        response = saying(rng, options)
        found = official.can_infer(response, dict(zip(string.ascii_uppercase, options, strict=False)))
        parsed.append([response, options, found if found and found != "Z" else None])
    matched: list[list[object]] = []
    for _ in range(300):
        response, letter = saying(rng, OPTIONS[:4]), rng.choice("ABCD")
        matched.append([response, letter, match.sqa_process_results(letter, [response])["exact_match"] == 1.0])
    return {
        "source": packages.source("ms-vlmeval", "vlmeval.utils.matching_util.can_infer"),
        "source_matched": packages.source("lmms-eval", "lmms_eval.tasks.scienceqa.utils.sqa_process_results"),
        "parsed": parsed,
        "matched": matched,
    }


OPEN = [
    "The answer is {n}", "So x = {n}", "{n}", "It could be {w} or {n}.",
    "First it is {m}.\nTherefore the result is {n}",
    "{w}", "Thus {w}. So {n} {w}", "answer {n}", "is \nfinal answer: {w}", "x={m}+{n}={w}", "We get {n} and {m}",
    ".{n}.",
    "The final answer is {w}.", "result : {w}\n\n", "is", "so so so is", "{n}{w}", "The total is {n} {w}s.\n(see {m})",
]  # fmt: skip


def mmmu(packages: Packages, rng: random.Random) -> Golden:
    """MMMU: choice questions and open ones.

    lmms-eval changed the official reading of letters. The copy in VMCBench's task differs from the official text
    (MMMU-Benchmark/MMMU 51ce7f3) by one condition, which is taken out here. Guesses are None.
    """
    guess = SimpleNamespace(choice=lambda letters: None)
    reading = packages.take(
        "vlmeval/dataset/utils/vmcbench.py",
        "parse_multi_choice_response",
        edit=(" or f'{choice}. ' in response", ""),
        random=guess,
    )
    official = packages.take(
        "lmms_eval/tasks/mmmu/utils.py",
        *(
            "parse_open_response",
            "extract_numbers",
            "normalize_str",
            "check_is_number",
            "eval_open",
            "eval_multi_choice",
        ),
    )
    parsed: list[list[object]] = []
    for _ in range(500):
        options = rng.sample(OPTIONS, rng.randint(2, 5))
        letters = string.ascii_uppercase[: len(options)]
        response = saying(rng, options)
        found = reading.parse_multi_choice_response(response, list(letters), dict(zip(letters, options, strict=True)))
        parsed.append([response, options, found])
    opened: list[list[object]] = []
    for _ in range(400):
        numbers = [
            rng.choice(["{:.0f}", "{:.3f}", "{:,.2f}", "{:e}", "-{:.1f}", "{:,.0f}", "{:.2f}%", "${:.0f}"]).format(
                rng.choice([rng.uniform(0, 9), rng.uniform(0, 9e5), rng.randint(0, 20)])
            )
            for _ in range(2)
        ]
        word = rng.choice(["ohm", "Newton", "x", "velocity", "A", "3 m/s", "north-west"])
        response = rng.choice(OPEN).format(n=numbers[0], m=numbers[1], w=word)
        answer = rng.choice([numbers[0], numbers[1].replace(",", ""), word, "Ohm", [word, numbers[0]], "5"])
        meant = official.parse_open_response(response)
        opened.append([response, sorted(meant, key=str), answer, official.eval_open(answer, meant)])
    return {
        "source": packages.source(
            "ms-vlmeval", "parse_multi_choice_response of vlmeval/dataset/utils/vmcbench.py, less an 'or'"
        ),
        "source_open": packages.source("lmms-eval", "lmms_eval.tasks.mmmu.utils.parse_open_response and eval_open"),
        "parsed": parsed,
        "open": opened,
    }


def circular(packages: Packages, rng: random.Random) -> Golden:
    """MMBench: whether a question counts, by its rotations."""
    official = packages.take(
        "lmms_eval/tasks/mmbench/mmbench_evals.py",
        "MMBench_Evaluator",
        pd=SimpleNamespace(isna=lambda value: value is None),
        eval_logger=SimpleNamespace(info=lambda text: None),
    )
    judge = official.MMBench_Evaluator()

    class Rows(list[Golden]):
        iloc = property(lambda self: self)

    cases: list[list[object]] = []
    for question in range(250):
        answers = [rng.choice("ABCD") for _ in range(rng.randint(2, 4))]
        named = [answer if rng.random() < 0.8 else rng.choice("ABCD") for answer in answers]
        rows = Rows(
            {"index": question + i * 10**6, "prediction": letter, "A": "dog", "B": "cat", "C": "bus", "D": "car"}
            for i, letter in enumerate(named)
        )
        truth = {row["index"]: answer for row, answer in zip(rows, answers, strict=True)}
        cases.append(
            [[row["index"] for row in rows], named, answers, judge.eval_sub_data(rows, truth, static_only=True)]
        )
    return {
        "source": packages.source("lmms-eval", "lmms_eval.tasks.mmbench.mmbench_evals.MMBench_Evaluator.eval_sub_data"),
        "cases": cases,
    }
