"""VQA accuracy: one answer against ten people's.

Rule of VQAv2, OKVQA and VizWiz: GT-Vision-Lab/VQA, PythonEvaluationTools/vqaEvaluation/vqaEval.py; "VQA: Visual
Question Answering", arXiv:1505.00468. Its quirks are part of the rule, as published scores have them: answers on
which all people agree are compared as they stand, with case; "5." loses its dot, "3.5" keeps it; with a comma between
two digits every mark is removed, where else some would become spaces.
"""

import re
from collections.abc import Sequence

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_NUMBERS = {"none": "0"} | {
    word: str(value)
    for value, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
}
_ARTICLES = {"a", "an", "the"}
_CONTRACTIONS = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've "
    "needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've "
    "somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll "
    "that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've "
    "weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've "
    "why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're "
    "you've"
)


def _misspelt(contractions: str) -> dict[str, str]:
    """Each contraction less one of its apostrophes, to the contraction."""
    table = {
        word[: mark.start()] + word[mark.end() :]: word
        for word in contractions.split()
        for mark in re.finditer("'", word)
    }
    # The one entry of the official table that takes an apostrophe away.
    return table | {"somebody'd": "somebodyd"}


_SPELLING = _misspelt(_CONTRACTIONS)
# The official code hands re.UNICODE, which is 32, to the argument that bounds the number of replacements.
_MAX_PERIODS = 32


def strip_punctuation(text: str) -> str:
    """Take punctuation away as the official code does.

    Each of 21 marks is removed if it stands beside a space somewhere in the text, or if the text has a comma between
    digits; else it becomes a space. Full stops go unless a digit follows.
    """
    has_digit_comma = re.search(r"\d,\d", text) is not None
    bare = text
    for mark in _MARKS:
        is_removed = has_digit_comma or mark + " " in text or " " + mark in text
        bare = bare.replace(mark, "" if is_removed else " ")
    return re.sub(r"\.(?!\d)", "", bare, count=_MAX_PERIODS)


def normalise_vqa(text: str) -> str:
    """Apply the official processing to an answer.

    `strip_punctuation`, then lower case; "none" to "ten" become digits, "a", "an" and "the" go, and contractions that
    lack an apostrophe get it.
    """
    words = [_NUMBERS.get(word, word) for word in strip_punctuation(text).lower().split()]
    return " ".join(_SPELLING.get(word, word) for word in words if word not in _ARTICLES)


def leave_one_out_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Mean over the people of min(1, matches among the others / 3), in [0, 1]; strings are compared as they stand.

    With ten answers, 0 to 4 matches give 0, 0.3, 0.6, 0.9, 1.

    Raises:
        ValueError: fewer than four answers, with which nothing can score 1.
    """
    if len(answers) < 4:
        raise ValueError(
            f"answers: expected those of at least four people (the benchmarks have ten), got {len(answers)}; use "
            "exact_match for a single answer"
        )
    matches = sum(answer == prediction for answer in answers)
    for_matching, for_others = min(1.0, (matches - 1) / 3), min(1.0, matches / 3)
    return (matches * for_matching + (len(answers) - matches) * for_others) / len(answers)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """VQA accuracy of one answer by the official rule, in [0, 1]; the benchmark's score is the mean over questions.

    Where the people disagree, all strings are compared after `normalise_vqa`. Where they are unanimous, they are
    compared as they stand: ten times "red" gives "Red" nothing.

    Raises:
        ValueError: fewer than four answers.
    """
    prediction, *people = (text.replace("\n", " ").replace("\t", " ").strip() for text in (prediction, *answers))
    if len(set(people)) > 1:
        prediction, people = normalise_vqa(prediction), [normalise_vqa(answer) for answer in people]
    return leave_one_out_accuracy(prediction, people)
