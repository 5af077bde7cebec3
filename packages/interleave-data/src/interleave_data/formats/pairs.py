"""Pictures with captions, a row each: any table of pairs, and the three sets of BLIP-3.

    caption rows              one column with the caption, one with the picture
    BLIP3-KALE                `caption`, `url`
    BLIP3-OCR-200M            `captions`: a JSON string, [{"text", "granularity", "include_datacomp_raw_cap"}, …]
    BLIP3-GROUNDING-50M       `captions`: a Python literal, [[text, granularity, include_datacomp_raw_cap], …]

A pair becomes a document: the picture, then the caption. The picture is the tar's member, else the column `image`
(bytes, `{"bytes", "path"}` or a path), else the file for the address in `url`.

The two last sets say the same thing at several granularities, of which one is read; captions that the original
alt-text was mixed into (`include_datacomp_raw_cap`) are not. OCR captions lose the filler "the text" before each quoted
text, as in xGen-MM's pre-training, which used granularity 0, the text without boxes (arXiv:2408.08872).

From memory, not confirmed: KALE's `url`, and its `cogvlm_caption`, the caption before knowledge was added, which
`caption_rows("cogvlm_caption")` reads.
"""

import ast
import re
import warnings
from collections.abc import Callable
from typing import Any, cast

import msgspec

from ..errors import SkipReason, SkipSample
from ..records import Images, Record
from ..samples import ImagePart, TextPart, Turn
from .pictures import lone_picture

PairFormat = Callable[[Record, Images], tuple[Turn, ...]]
"""A `Format` of pairs, which are no preferences."""

_PICTURE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "url", "image_url")
# Parsing takes up to 500 bytes a character (CPython 3.11). Real literals hold a few sentences.
_MAX_LITERAL_CHARS = 1 << 16
_OCR_GRANULARITIES = range(6)
_GROUNDING_GRANULARITIES = range(3)
# Only where a sentence of the set has it, not within the text that was read off the picture.
_FILLER = re.compile(r'(?:(?<=contains )|(?<=, )|(?<=and )|^)the text (?=")')


class _KaleRow(msgspec.Struct, frozen=True):
    caption: str
    url: str | None = None
    image: Any = None


class _CaptionsRow(msgspec.Struct, frozen=True):
    captions: str
    url: str | None = None
    image: Any = None


class _OcrCaption(msgspec.Struct, frozen=True):
    text: str
    granularity: int
    include_datacomp_raw_cap: bool = False


def caption_rows(caption: str = "caption", picture: str | None = None) -> PairFormat:
    """A reader of rows with the caption in the column `caption` and the picture in the column `picture`.

    Without `picture`, the first of the usual columns that is set: image, jpg, jpeg, png, webp, url, image_url.
    """
    columns = _PICTURE_COLUMNS if picture is None else (picture,)

    def read_caption_row(record: Record, images: Images) -> tuple[Turn, ...]:
        row = cast("dict[str, Any]", record.decode(dict))
        text: object = row.get(caption)
        if not isinstance(text, str):
            got = type(text).__name__ if caption in row else f"the columns {', '.join(row)[:200]}"
            raise SkipSample(SkipReason.BAD_RECORD, f"expected a text in the column `{caption}`, got {got}")
        return _pair(lone_picture(record, images, [row.get(column) for column in columns]), text)

    return read_caption_row


def read_kale(record: Record, images: Images) -> tuple[Turn, ...]:
    """BLIP3-KALE: the caption with knowledge added.

    Raises:
        SkipSample: if the caption is absent or empty, or the picture is not there.
    """
    row = record.decode(_KaleRow)
    return _pair(lone_picture(record, images, (row.image, row.url)), row.caption)


def ocr_captions(granularity: int = 0) -> PairFormat:
    """A reader of BLIP3-OCR-200M: 0 text alone, 1 place, 2 and 3 rough and 4 exact position, 5 boxes in tags.

    Raises:
        ValueError: if there is no such granularity.
    """
    _check(granularity, _OCR_GRANULARITIES)

    def read_ocr_captions(record: Record, images: Images) -> tuple[Turn, ...]:
        row = record.decode(_CaptionsRow)
        try:
            captions = msgspec.json.decode(row.captions, type=list[_OcrCaption])
        except (msgspec.DecodeError, RecursionError) as error:
            raise SkipSample(SkipReason.BAD_RECORD, f"captions: {error}") from error
        plain = {caption.granularity: caption.text for caption in captions if not caption.include_datacomp_raw_cap}
        text = _FILLER.sub("", _choose(plain, granularity))
        return _pair(lone_picture(record, images, (row.image, row.url)), text)

    return read_ocr_captions


def grounding_captions(granularity: int = 0) -> PairFormat:
    """A reader of BLIP3-GROUNDING-50M: 0 "in the center", 1 "starts at … and extends up to …", 2 boxes in tags.

    Raises:
        ValueError: if there is no such granularity.
    """
    _check(granularity, _GROUNDING_GRANULARITIES)

    def read_grounding_captions(record: Record, images: Images) -> tuple[Turn, ...]:
        row = record.decode(_CaptionsRow)
        captions = [_grounding_caption(entry) for entry in _literal_list(row.captions)]
        text = _choose({level: text for text, level, has_raw in captions if not has_raw}, granularity)
        return _pair(lone_picture(record, images, (row.image, row.url)), text)

    return read_grounding_captions


def _pair(picture: ImagePart, caption: str) -> tuple[Turn]:
    text = caption.strip()
    if not text:
        raise SkipSample(SkipReason.EMPTY_TEXT, "expected a caption with some text, got none")
    return (Turn("document", (picture, TextPart(text))),)


def _check(granularity: int, known: range) -> None:
    if granularity not in known:
        raise ValueError(f"granularity: expected {known[0]} to {known[-1]}, got {granularity}; 0 is the coarsest")


def _choose(by_granularity: dict[int, str], granularity: int) -> str:
    if granularity not in by_granularity:
        got = ", ".join(map(str, sorted(by_granularity))) or "none"
        raise SkipSample(SkipReason.BAD_RECORD, f"expected a caption of granularity {granularity}, got {got}")
    return by_granularity[granularity]


def _literal_list(text: str) -> list[object]:
    """Read a Python literal from outside: only literals, of bounded size and depth.

    Raises:
        SkipSample: if it is no list, too long, or nested beyond what the parser bears.
    """
    if len(text) > _MAX_LITERAL_CHARS:
        detail = f"captions: expected at most {_MAX_LITERAL_CHARS} characters, got {len(text)}"
        raise SkipSample(SkipReason.TOO_MANY_BYTES, detail)
    try:
        with warnings.catch_warnings():
            # A stray backslash in a caption makes the parser warn; the caption is good all the same.
            warnings.simplefilter("ignore")
            value: object = ast.literal_eval(text)
    # The parser's answers to text that is no literal, and to text that is made to exhaust it.
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        detail = f"captions: expected a Python literal, got {type(error).__name__}: {str(error)[:80]}"
        raise SkipSample(SkipReason.BAD_RECORD, detail) from error
    if not isinstance(value, list | tuple):
        raise SkipSample(SkipReason.BAD_RECORD, f"captions: expected a list, got {type(value).__name__}")
    return list(cast("list[object]", value))


def _grounding_caption(entry: object) -> tuple[str, int, bool]:
    match entry:
        case [str(text), int(level), bool(has_raw)]:
            return text, level, has_raw
        case _:
            shown = repr(entry)[:80]
            raise SkipSample(SkipReason.BAD_RECORD, f"captions: expected [text, granularity, bool], got {shown}")
