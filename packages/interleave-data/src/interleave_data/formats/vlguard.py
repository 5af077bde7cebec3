"""VLGuard: pictures with a harmful or harmless instruction and the answer that is wanted.

`{"id", "image", "safe", "instr-resp": [pair, …]}`. An unsafe picture has one pair, `{"instruction", "response"}`; a
safe one has two, `{"safe_instruction", "response"}` and `{"unsafe_instruction", "response"}`.

A record is one sample, so its pairs become the turns of one conversation, in the published order, with the picture
before the first. The refusal is then learnt after a helpful answer to the same picture. For evaluation the pairs are
wanted apart, as the set's authors count them: `subset` takes those of one kind alone, and leaves out other records.

    unsafes        the pair of an unsafe picture, to be refused
    safe_unsafes   the unsafe instruction about a safe picture, to be refused
    safe_safes     the safe instruction about a safe picture, to be answered

Source: arXiv:2402.02207, github.com/ys-zong/VLGuard.
"""

from collections.abc import Callable
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


_FIELDS = {"unsafes": "instruction", "safe_unsafes": "unsafe_instruction", "safe_safes": "safe_instruction"}


def vlguard(subset: str = "all") -> Callable[[Record, Images], tuple[Turn, ...]]:
    """A reader of all pairs of a record, or of the one of a subset.

    Raises:
        ValueError: if there is no such subset.
    """
    if subset != "all" and subset not in _FIELDS:
        raise ValueError(f"subset: expected all, {', '.join(_FIELDS)}, got {subset}; use one of them")

    def read_vlguard(record: Record, images: Images) -> tuple[Turn, ...]:
        row = record.decode(_Row)
        if not row.pairs:
            raise SkipSample(SkipReason.BAD_RECORD, "expected a pair in `instr-resp`, got none")
        both = [(pair, _speeches(pair)) for pair in row.pairs]
        kept = [speeches for pair, speeches in both if subset == "all" or getattr(pair, _FIELDS[subset]) is not None]
        if not kept:
            raise SkipSample(SkipReason.UNWANTED, f"expected a pair of {subset}, got another kind")
        speeches = [speech for pair in kept for speech in pair]
        return place_images(speeches, [lone_picture(record, images, [row.image])])

    return read_vlguard


def _speeches(pair: _Pair) -> tuple[Speech, Speech]:
    given = [text for text in (pair.instruction, pair.safe_instruction, pair.unsafe_instruction) if text is not None]
    if len(given) != 1:
        raise SkipSample(SkipReason.BAD_RECORD, f"expected one instruction in a pair, got {len(given)}")
    if not given[0].strip():
        raise SkipSample(SkipReason.EMPTY_TEXT, "expected an instruction with some text, got none")
    if not pair.response.strip():
        raise SkipSample(SkipReason.EMPTY_ANSWER, "expected a response with some text, got none")
    return Speech("user", given[0]), Speech("assistant", pair.response)
