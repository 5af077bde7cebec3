"""Preference pairs: a prompt, the answer to prefer and the one to avoid.

`{"id", "image": picture | [picture, ...], "prompt": str, "chosen": str, "rejected": str}`; `images` is read for `image`
and `question` for `prompt`. `<image>` marks in the prompt are placed as in LLaVA's layout.
"""

from typing import Any

import msgspec

from ..errors import SkipReason, SkipSample
from ..records import Body, Images, PreferenceBody, Record
from .llava import IMAGE_MARK, Speech, place_images
from .pictures import picture_parts


class _Fields(msgspec.Struct, frozen=True):
    chosen: str
    rejected: str
    image: Any = None
    images: Any = None
    prompt: str | None = None
    question: str | None = None


def read_preferences(record: Record, images: Images) -> Body:
    """Read one pair.

    Raises:
        SkipSample: if the prompt or an answer is absent, both answers are the same, or marks and images disagree.
    """
    fields = record.decode(_Fields)
    prompt = fields.prompt if fields.prompt is not None else fields.question
    if prompt is None or not prompt.strip():
        raise SkipSample(SkipReason.EMPTY_TEXT, "expected a `prompt` or `question` with some text, got none")
    if not fields.chosen.strip() or not fields.rejected.strip():
        raise SkipSample(SkipReason.EMPTY_ANSWER, "expected `chosen` and `rejected` with some text, got none")
    if IMAGE_MARK in fields.chosen or IMAGE_MARK in fields.rejected:
        raise SkipSample(SkipReason.IMAGE_MARKS, f"expected no {IMAGE_MARK} in an answer, got one")
    if fields.chosen == fields.rejected:
        raise SkipSample(SkipReason.BAD_RECORD, "expected two different answers, got the same one twice")
    named = fields.image if fields.image is not None else fields.images
    pictures = picture_parts(named, images)
    return PreferenceBody(place_images([Speech("user", prompt)], pictures), fields.chosen, fields.rejected)
