"""Pictures with captions, each a document of the picture and then its caption.

The caption is the .txt member of a tar's sample (`txt`), or a text under a key of the record (`json:KEY`): of the .json
member, the JSON object or the row. The picture lies in the record, or the record names it: `image`, a path or an
address, or an object with `bytes` or a `path`, as parquet files of pictures have it; or `url`.
"""

from functools import cache
from typing import cast

import msgspec

from ..errors import SkipReason, SkipSample
from ..records import Body, Images, Record
from ..samples import ImagePart, TextPart, Turn


class _Fields(msgspec.Struct, frozen=True):
    caption: str
    image: object = None
    url: str | None = None


@cache
def _fields(key: str) -> type[_Fields]:
    """The fields of a record whose caption stands under this key."""
    if key in ("image", "url"):
        raise ValueError(f"caption: expected the key of a text, got json:{key}, which names the picture; change it")
    renamed = [("caption", str, msgspec.field(name=key))]
    return cast(type[_Fields], msgspec.defstruct("_Fields", renamed, bases=(_Fields,), frozen=True))


def read_captions(record: Record, images: Images, *, caption: str = "txt") -> Body:
    """Read one pair.

    Raises:
        SkipSample: if the picture or the caption is absent, or the caption is empty, no text, or beyond 4 MiB.
    """
    picture = record.picture()
    if caption == "txt":
        text = record.text("txt")
    else:
        fields = record.decode(_fields(caption.removeprefix("json:")))
        text = fields.caption.strip()
        picture = picture or _named_picture(fields, images)
    if picture is None:
        raise SkipSample(SkipReason.MISSING_MEMBER, "expected a picture, got none")
    if not text:
        raise SkipSample(SkipReason.EMPTY_TEXT, "expected a caption with some text, got none")
    return (Turn("document", (picture, TextPart(text))),)


def _named_picture(fields: _Fields, images: Images) -> ImagePart | None:
    image = fields.image
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    image = image if image is not None else fields.url
    if image is None:
        return None
    if not isinstance(image, str | bytes):
        raise SkipSample(SkipReason.BAD_RECORD, f"expected a picture's path, address or bytes, got {type(image)}")
    return images.part(image)
