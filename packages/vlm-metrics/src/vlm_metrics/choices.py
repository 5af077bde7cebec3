"""Multiple choice: which option does an answer name?"""

from collections.abc import Sequence
from string import ascii_uppercase

_MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
# A letter counts if fewer than this many words follow it.
_NUM_LAST_WORDS = 4
# What some models say instead of answering; the phrases hold words that could be read as options.
_NO_ANSWER = (
    "Failed to obtain answer via API",
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)


def match_letter(prediction: str, answer: str) -> bool:
    """Tell whether a prediction is the answer's letter: alone, in any case, or as a capital with a full stop behind it.

    What follows the full stop is no matter. White space around both is dropped.

    Source: the rule for ScienceQA and AI2D of lmms-eval 75571cf, tasks/scienceqa/utils.py.
    """
    prediction, answer = prediction.strip(), answer.strip().lower()
    if prediction.lower() == answer:
        return True
    return prediction[:1].isupper() and prediction[1:2] == "." and prediction[0].lower() == answer


def parse_choice(response: str, options: Sequence[str]) -> str | None:
    """Letter ("A" for the first option) that a response names, or None; MMBench's exact matching.

    First by letter: punctuation becomes spaces, and exactly one of the options' letters is a word of the response, with
    fewer than four words behind it. Else by text: the response holds exactly one option's text, in any case, and is at
    most twice as long as all options together.

    Source: `can_infer` of VLMEvalKit e8e78f0, vlmeval/utils/matching_util.py, without its judge. An answer "Z" (none)
    and the refusals that it lists are None here.

    Raises:
        ValueError: no options, or more than 26.
    """
    letters = option_letters(options)
    if any(phrase in response for phrase in _NO_ANSWER):
        return None
    words = response.translate(_MARKS).split()
    named = [letter for letter in letters if letter in words]
    if len(named) == 1 and words.index(named[0]) > len(words) - _NUM_LAST_WORDS - 1:
        return named[0]
    if not named and "Z" in words:
        return None
    if len(response) > 2 * sum(map(len, options)):
        return None
    held = [letter for letter, option in zip(letters, options, strict=True) if option.lower() in response.lower()]
    return held[0] if len(held) == 1 else None


def option_letters(options: Sequence[str]) -> str:
    """Letters of the options, "ABCD" for four.

    Raises:
        ValueError: no options, or more than 26.
    """
    if not 1 <= len(options) <= len(ascii_uppercase):
        raise ValueError(
            f"options: expected 1 to {len(ascii_uppercase)}, got {len(options)}; one letter names an option"
        )
    return ascii_uppercase[: len(options)]
