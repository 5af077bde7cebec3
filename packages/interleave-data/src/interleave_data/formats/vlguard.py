"""VLGuard: pictures with a harmful or harmless instruction and the answer that is wanted.

`{"id", "image", "safe", "instr-resp": [pair, …]}`. An unsafe picture has one pair, `{"instruction", "response"}`; a
safe one has two, `{"safe_instruction", "response"}` and `{"unsafe_instruction", "response"}`.

A record is one sample, so its pairs become the turns of one conversation, in the published order, with the picture
before the first. The refusal is then learnt after a helpful answer to the same picture; who wants the pairs apart
splits the records beforehand.

Source: arXiv:2402.02207, github.com/ys-zong/VLGuard.
"""

from typing import Any

import msgspec

from ..errors import SkipReason, SkipSample
from ..records import Images, Record
from ..samples import Turn
from .llava import Speech, place_images
from .pictures import lone_picture


class _Pair(msgspec.Struct, frozen=True):
    response: str
    instruction: str | None = None
    safe_instruction: str | None = None
    unsafe_instruction: str | None = None


class _Row(msgspec.Struct, frozen=True):
    pairs: list[_Pair] = msgspec.field(name="instr-resp")
    image: Any = None


def read_vlguard(record: Record, images: Images) -> tuple[Turn, ...]:
    """Read one picture with its one or two pairs.

    Raises:
        SkipSample: if there is no pair, one has not exactly one instruction or an empty text, or there is no picture.
    """
    row = record.decode(_Row)
    if not row.pairs:
        raise SkipSample(SkipReason.BAD_RECORD, "expected a pair in `instr-resp`, got none")
    speeches = [speech for pair in row.pairs for speech in _speeches(pair)]
    return place_images(speeches, [lone_picture(record, images, [row.image])])


def _speeches(pair: _Pair) -> tuple[Speech, Speech]:
    given = [text for text in (pair.instruction, pair.safe_instruction, pair.unsafe_instruction) if text is not None]
    if len(given) != 1:
        raise SkipSample(SkipReason.BAD_RECORD, f"expected one instruction in a pair, got {len(given)}")
    if not given[0].strip():
        raise SkipSample(SkipReason.EMPTY_TEXT, "expected an instruction with some text, got none")
    if not pair.response.strip():
        raise SkipSample(SkipReason.EMPTY_ANSWER, "expected a response with some text, got none")
    return Speech("user", given[0]), Speech("assistant", pair.response)
