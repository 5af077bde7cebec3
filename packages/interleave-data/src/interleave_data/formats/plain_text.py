"""Plain text: `{"text": str}`, all of it to be predicted, exactly as it stands."""

import msgspec

from ..errors import SkipReason, SkipSample
from ..records import Images, Record
from ..samples import TextPart, Turn


class _Text(msgspec.Struct, frozen=True):
    text: str


def read_text(record: Record, images: Images) -> tuple[Turn, ...]:
    """Read one text; it has no pictures.

    Raises:
        SkipSample: if there is no text.
    """
    text = record.decode(_Text).text
    if not text.strip():
        raise SkipSample(SkipReason.EMPTY_TEXT, "expected some text to predict, got none")
    return (Turn("document", (TextPart(text),)),)
