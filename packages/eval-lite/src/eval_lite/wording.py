"""How a question is put to a model: as a user's turn to one that was taught to answer, or among worked examples.

    instruct   the model's chat format; worked examples are earlier turns
    base       <image>Question: WHAT? Short answer: red          (worked examples in the same form, then the question)

A base model with the format `plain` has its own mark behind each worked example (`<|endofchunk|>`, as OpenFlamingo
puts it); for any other the examples and the question are one document, a line each, as Idefics is asked.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from interleave_data import ImagePart, Part, Sample, TextPart, Turn

from .prediction import EvalItem

Manner = Literal["instruct", "base"]
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ANSWER_SHORTLY = "Answer the question using a single word or phrase."
ANSWER_BY_LETTER = "Answer with the option's letter from the given choices directly."


@dataclass(frozen=True, kw_only=True)
class Wording:
    """What stands around a question."""

    instruction: str = ""
    """Behind the question, for a model that was taught to answer; behind choices it is `ANSWER_BY_LETTER`."""
    before: str = "Question: "
    """In front of the question, behind its pictures, for a base model."""
    after: str = " Short answer:"
    """Behind the question, for a base model."""
    stops: tuple[str, ...] = ("\n", "Question", "Answer", "Short")
    """What ends a base model's answer: it goes on to the next example by itself."""
    between: str = "\n"
    """Behind each worked example of a document."""


def question_parts(item: EvalItem, *, lists_choices: bool = True) -> tuple[Part, ...]:
    """What is asked, pictures included; with the choices below it, if there are any and they are wanted."""
    parts = item.prompt.turns[-1].parts
    if not item.choices or not lists_choices:
        return parts
    listed = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, item.choices, strict=False))
    return (*parts, TextPart(listed))


def put(
    item: EvalItem,
    wording: Wording,
    manner: Manner,
    *,
    is_plain: bool = False,
    shots: Sequence[EvalItem] = (),
    lists_choices: bool = True,
    shows_pictures: bool = True,
) -> Sample:
    """The prompt: worked examples (`shots`), then the question.

    is_plain: whether the model's chat format is `plain`. shows_pictures: whether the examples come with theirs.
    """
    turns: list[Turn] = []
    for one in (*shots, item):
        parts = question_parts(one, lists_choices=lists_choices)
        if not shows_pictures and one is not item:
            parts = tuple(part for part in parts if not isinstance(part, ImagePart))
        instruction = wording.instruction if not one.choices else ANSWER_BY_LETTER if lists_choices else ""
        asked = _with_instruction(parts, instruction) if manner == "instruct" else _with_marks(parts, wording)
        turns.append(Turn(role="user", parts=asked))
        if one is not item:
            answer = one.answer if lists_choices or not one.choices else one.choices[LETTERS.index(one.answer)]
            turns.append(Turn(role="assistant", parts=(TextPart(answer),)))
    if manner == "base" and not is_plain:
        turns = [_as_document(turns, wording)]
    return Sample(id=item.prompt.id, source=item.prompt.source, turns=tuple(turns))


def with_answer(prompt: Sample, answer: str) -> Sample:
    """The prompt with an answer behind it, laid out as a worked example is."""
    last = prompt.turns[-1]
    if last.role == "document":
        turns = (*prompt.turns[:-1], Turn(role="document", parts=(*last.parts, TextPart(_spaced(last.parts, answer)))))
    else:
        turns = (*prompt.turns, Turn(role="assistant", parts=(TextPart(answer),)))
    return Sample(id=prompt.id, source=prompt.source, turns=turns)


def _with_instruction(parts: tuple[Part, ...], instruction: str) -> tuple[Part, ...]:
    """Put the instruction on a line of its own behind a question, or in its place."""
    if not instruction:
        return parts
    is_behind_text = bool(parts) and isinstance(parts[-1], TextPart)
    return (*parts, TextPart(f"\n{instruction}" if is_behind_text else instruction))


def _with_marks(parts: Sequence[Part], wording: Wording) -> tuple[Part, ...]:
    """Put the wording around the question, behind the pictures that come first."""
    first = next((index for index, part in enumerate(parts) if isinstance(part, TextPart)), len(parts))
    marked = (*parts[:first], TextPart(wording.before), *parts[first:], TextPart(wording.after))
    return tuple(part for part in marked if not isinstance(part, TextPart) or part.text)


def _as_document(turns: Sequence[Turn], wording: Wording) -> Turn:
    parts: list[Part] = []
    for turn in turns:
        if turn.role == "assistant":
            answer = "".join(part.text for part in turn.parts if isinstance(part, TextPart))
            parts.append(TextPart(_spaced(parts, answer) + wording.between))
        else:
            parts += turn.parts
    return Turn(role="document", parts=tuple(parts))


def _spaced(parts: Sequence[Part], answer: str) -> str:
    """The answer as it goes on from what is before it: words are a space apart, a picture needs none."""
    return f" {answer}" if parts and isinstance(parts[-1], TextPart) else answer
