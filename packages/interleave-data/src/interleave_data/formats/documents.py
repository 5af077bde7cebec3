"""Documents of text and pictures in reading order: OBELICS, and the three parts of MINT-1T.

All have `images` and `texts`, two lists of the same length; at each place exactly one of them is set. What differs is
what stands in `images`:

    OBELICS, MINT-1T HTML        the picture's address (or a path, or the picture's bytes)
    MINT-1T PDF and ArXiv        "page_PAGE_image_XREF": a frame of the .tiff member beside the .json

The frame of a name is its place in `image_metadata`, whose entries have `page` and `xref`. Where that list is absent,
frames are taken in the order in which names are first mentioned; that the two agree is not confirmed by the published
documentation, nor is the key `texts` of the PDF and ArXiv parts, nor OBELICS's `metadata` and `general_metadata`,
which are passed over.

A record yields all its pictures, however many, and opens none; where a long document is cut is the encoder's decision.
Texts that follow each other are set apart by a blank line unless white space does so already.

Sources: OBELICS, arXiv:2306.16527; MINT-1T, arXiv:2406.11271.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import msgspec

from ..errors import SkipReason, SkipSample
from ..records import Images, Record
from ..samples import ImagePart, Part, TextPart, Turn
from .pictures import picture_part


class _Document(msgspec.Struct, frozen=True):
    # Pictures may be text, bytes or {"bytes", "path"}, which no one type of msgspec's covers.
    images: list[Any]
    texts: list[str | None]


class _PlacedImage(msgspec.Struct, frozen=True):
    page: int | None = None
    xref: int | None = None


class _ScannedDocument(msgspec.Struct, frozen=True):
    images: list[str | None]
    texts: list[str | None]
    image_metadata: list[_PlacedImage] | None = None


def read_obelics(record: Record, images: Images) -> tuple[Turn, ...]:
    """OBELICS: rows of `images` (address or null), `texts` (text or null).

    Raises:
        SkipSample: if the lists do not fit together, a picture is not there, or there is no text.
    """
    document = record.decode(_Document)
    return _reading_order(document.images, document.texts, lambda image: picture_part(image, images))


def read_mint_html(record: Record, images: Images) -> tuple[Turn, ...]:
    """MINT-1T's HTML part: the same lists as OBELICS.

    Raises:
        SkipSample: as `read_obelics`.
    """
    return read_obelics(record, images)


def read_mint_pdf(record: Record, images: Images) -> tuple[Turn, ...]:
    """MINT-1T's PDF and ArXiv parts: pictures are frames of the tar's .tiff member.

    Raises:
        SkipSample: if the lists do not fit together, there is no .tiff, a name is not in `image_metadata`, or there is
            no text. A frame that the file does not have shows on decoding.
    """
    document = record.decode(_ScannedDocument)
    frames = _frames(document)
    scans = record.picture() if frames else None

    def frame(name: object) -> ImagePart:
        if scans is None:
            raise SkipSample(SkipReason.MISSING_MEMBER, f"expected a .tiff member with {name}, got none")
        number = frames.get(str(name))
        if number is None:
            raise SkipSample(SkipReason.BAD_RECORD, f"expected {name} in `image_metadata`, got {len(frames)} others")
        return replace(scans, frame=number, key=f"{scans.key}#{number}" if scans.key else "")

    return _reading_order(document.images, document.texts, frame)


def _frames(document: _ScannedDocument) -> dict[str, int]:
    """Name → number of its frame."""
    if document.image_metadata:
        names = [f"page_{image.page}_image_{image.xref}" for image in document.image_metadata]
    else:
        names = list(dict.fromkeys(name for name in document.images if name is not None))
    # One picture may stand on a page twice; either frame shows it.
    return {name: number for number, name in enumerate(names)}


def _reading_order(
    images: Sequence[object], texts: Sequence[str | None], part: Callable[[object], ImagePart]
) -> tuple[Turn]:
    """Merge the two lists into one turn."""
    if len(images) != len(texts):
        detail = f"expected as many images as texts, got {len(images)} and {len(texts)}"
        raise SkipSample(SkipReason.BAD_RECORD, detail)
    parts: list[Part] = []
    for place, (image, text) in enumerate(zip(images, texts, strict=True)):
        if (image is None) == (text is None):
            both = "both" if text is not None else "neither"
            raise SkipSample(SkipReason.BAD_RECORD, f"expected an image or a text at {place}, got {both}")
        if text is None:
            parts.append(part(image))
        elif text:
            before = parts[-1] if parts else None
            if isinstance(before, TextPart):
                apart = "" if before.text[-1].isspace() or text[0].isspace() else "\n\n"
                parts[-1] = TextPart(f"{before.text}{apart}{text}")
            else:
                parts.append(TextPart(text))
    if not any(isinstance(part, TextPart) and part.text.strip() for part in parts):
        raise SkipSample(SkipReason.EMPTY_TEXT, "expected some text to predict, got none")
    return (Turn("document", tuple(parts)),)
