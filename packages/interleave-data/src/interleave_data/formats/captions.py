"""Pictures with captions, each a document of the picture and then its caption.

The caption is the .txt member of a tar's sample (`txt`), or a text under a key of the record (`json:KEY`): of the .json
member, the JSON object or the row, which may then name the picture too (see `pairs.caption_rows`).
"""

from ..errors import SkipReason, SkipSample
from ..records import Body, Format, Images, Record
from ..samples import TextPart, Turn
from .pairs import caption_rows


def captions(caption: str = "txt") -> Format:
    """A reader of pairs, by where the caption stands."""
    return _read_members if caption == "txt" else caption_rows(caption.removeprefix("json:"))


def _read_members(record: Record, images: Images) -> Body:
    """Read the picture and the .txt member of a tar's sample.

    Raises:
        SkipSample: if one of them is absent, or the caption is empty, no text, or beyond 4 MiB.
    """
    picture = record.picture()
    if picture is None:
        raise SkipSample(SkipReason.MISSING_MEMBER, "expected a picture, got none")
    text = record.text("txt")
    if not text:
        raise SkipSample(SkipReason.EMPTY_TEXT, "expected a caption with some text, got none")
    return (Turn("document", (picture, TextPart(text))),)
