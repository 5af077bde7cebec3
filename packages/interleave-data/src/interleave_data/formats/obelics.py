"""Interleaved documents in the shape of OBELICS.

`images` and `texts` are lists of the same length; at each index exactly one of them is set. Images are paths under the
image root, or web addresses whose pictures lie there (see `Images.part`). (OBELICS, arXiv:2306.16527.)
"""

import msgspec

from ..errors import SkipReason, SkipSample
from ..records import Body, Images, Record
from ..samples import Part, TextPart, Turn


class _Fields(msgspec.Struct, frozen=True):
    images: list[str | None]
    texts: list[str | None]


def read_obelics(record: Record, images: Images) -> Body:
    """Read one document of text and images; the whole text is to be predicted.

    Raises:
        SkipSample: if the lists do not fit together, a path leads out of the image root, or there is no text.
    """
    fields = record.decode(_Fields)
    if len(fields.images) != len(fields.texts):
        detail = f"expected as many images as texts, got {len(fields.images)} and {len(fields.texts)}"
        raise SkipSample(SkipReason.BAD_RECORD, detail)
    parts: list[Part] = []
    for place, (image, text) in enumerate(zip(fields.images, fields.texts, strict=True)):
        if image is not None and text is None:
            parts.append(images.part(image))
        elif text is not None and image is None:
            # An empty stretch of text says nothing, and would only be an empty part.
            parts.extend([TextPart(text)] if text else [])
        else:
            both = "both" if text is not None else "neither"
            raise SkipSample(SkipReason.BAD_RECORD, f"expected an image or a text at {place}, got {both}")
    if not any(isinstance(part, TextPart) and part.text.strip() for part in parts):
        raise SkipSample(SkipReason.EMPTY_TEXT, "expected some text to predict, got none")
    return (Turn("document", tuple(parts)),)
