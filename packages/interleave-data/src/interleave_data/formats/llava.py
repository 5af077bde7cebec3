"""Conversations about images in LLaVA's JSON layout, and the few spellings of it that are about, MANTIS's among them.

A record is `{"id", "image", "conversations": [{"from", "value"}]}`. Also read: `images` for `image`; `conversation`
or `messages` for `conversations`; `role` and `content` for `from` and `value`; user/assistant for human/gpt; and
`{"question_id", "image", "question", "answer"}` as one question with its answer. An image is a path, or bytes or
`{"bytes", "path"}` in parquet rows; of several there is a list. MANTIS (arXiv:2405.01483) has `images`, `conversation`,
`role` and `content`.

Where `<image>` stands, an image goes. A record with exactly one image but no mark, or several, gets LLaVA's rule: the
image moves to the front of the first human turn. Any other disagreement between marks and images is a bad record. A
newline beside a mark belongs to the mark and is left out: how images are set apart from text is the model's template's
business, so that training and chat agree.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from ..errors import SkipReason, SkipSample
from ..records import Images, Record
from ..samples import ImagePart, Part, Role, TextPart, Turn
from .pictures import picture_parts

IMAGE_MARK = "<image>"
_ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


class _Message(msgspec.Struct, frozen=True):
    # Foreign data carry keys of their own, so unknown ones pass here.
    from_: str | None = msgspec.field(default=None, name="from")
    value: str | None = None
    role: str | None = None
    content: str | None = None


class _Fields(msgspec.Struct, frozen=True):
    image: Any = None
    images: Any = None
    conversations: list[_Message] | None = None
    conversation: list[_Message] | None = None
    messages: list[_Message] | None = None
    question: str | None = None
    answer: str | None = None


class Speech(NamedTuple):
    """One turn before its marks have become images."""

    role: Role
    text: str


def read_llava(record: Record, images: Images) -> tuple[Turn, ...]:
    """Read one conversation over one image, several or none.

    Raises:
        SkipSample: if the record is not as the module says, has an empty answer, or its marks and images disagree.
    """
    fields = record.decode(_Fields)
    named = fields.image if fields.image is not None else fields.images
    return place_images(_speeches(fields), picture_parts(named, images))


def place_images(speeches: Sequence[Speech], images: Sequence[ImagePart]) -> tuple[Turn, ...]:
    """Put images where the marks stand, in order; a lone image without a mark of its own goes to the front.

    Raises:
        SkipSample: if marks and images disagree otherwise, or a mark stands in an answer.
    """
    if any(IMAGE_MARK in speech.text for speech in speeches if speech.role == "assistant"):
        raise SkipSample(SkipReason.IMAGE_MARKS, f"expected no {IMAGE_MARK} in an answer, got one")
    num_marks = sum(speech.text.count(IMAGE_MARK) for speech in speeches)
    if len(images) == 1 and num_marks != 1:
        speeches = _mark_front(speeches)
    elif num_marks != len(images):
        detail = f"expected as many {IMAGE_MARK} marks as images, got {num_marks} marks and {len(images)} images"
        raise SkipSample(SkipReason.IMAGE_MARKS, detail)
    waiting = iter(images)
    turns: list[Turn] = []
    for speech in speeches:
        parts: list[Part] = []
        stretches = speech.text.split(IMAGE_MARK)
        for index, text in enumerate(stretches):
            if index > 0:
                parts.append(next(waiting))
                text = text.removeprefix("\n")
            if index + 1 < len(stretches):
                text = text.removesuffix("\n")
            if text:
                parts.append(TextPart(text))
        turns.append(Turn(speech.role, tuple(parts)))
    return tuple(turns)


def _mark_front(speeches: Sequence[Speech]) -> list[Speech]:
    """Apply LLaVA's rule: take all marks out and set one before the first human turn."""
    bare = [
        Speech(speech.role, speech.text.replace(IMAGE_MARK, "").strip()) if IMAGE_MARK in speech.text else speech
        for speech in speeches
    ]
    first = next(index for index, speech in enumerate(bare) if speech.role == "user")
    bare[first] = Speech("user", f"{IMAGE_MARK}{bare[first].text}")
    return bare


def _speeches(record: _Fields) -> list[Speech]:
    """Read the turns of a record and check their order: perhaps a system turn, then user and assistant by turns."""
    messages = record.conversations or record.conversation or record.messages
    if messages is None and record.question is not None and record.answer is not None:
        messages = [_Message(role="user", content=record.question), _Message(role="assistant", content=record.answer)]
    if not messages:
        raise SkipSample(SkipReason.BAD_RECORD, "expected `conversations` with turns, got none")
    speeches = [_speech(message) for message in messages]
    talk = speeches[1:] if speeches[0].role == "system" else speeches
    wanted: list[Role] = ["user", "assistant"]
    roles = [speech.role for speech in talk]
    if not talk or roles != wanted * (len(talk) // 2):
        order = ", ".join(speech.role for speech in speeches)
        raise SkipSample(SkipReason.BAD_RECORD, f"expected user and assistant by turns, got {order}")
    return speeches


def _speech(message: _Message) -> Speech:
    speaker = message.from_ if message.from_ is not None else message.role
    text = message.value if message.value is not None else message.content
    if speaker not in _ROLES or text is None:
        raise SkipSample(SkipReason.BAD_RECORD, f"expected a known speaker and a text, got {speaker!r} and {text!r}")
    role = _ROLES[speaker]
    if not text.strip():
        reason = SkipReason.EMPTY_ANSWER if role == "assistant" else SkipReason.EMPTY_TEXT
        raise SkipSample(reason, f"expected some text of the {role}, got none")
    return Speech(role, text)
