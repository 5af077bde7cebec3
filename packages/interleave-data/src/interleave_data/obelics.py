"""Interleaved documents in the shape of OBELICS, one JSON object a line.

`images` and `texts` are lists of the same length; at each index exactly one of them is set. Images are paths under
the image root, never addresses to fetch. (OBELICS, arXiv:2306.16527.)
"""

from pathlib import Path

import msgspec

from .errors import SkipReason, SkipSample
from .samples import Part, Sample, TextPart, Turn
from .sources import RecordFile, fingerprint, image_inside, unique_id


class _Record(msgspec.Struct, frozen=True):
    images: list[str | None]
    texts: list[str | None]
    id: str | int | None = None
    general_metadata: str | None = None


class _GeneralMetadata(msgspec.Struct, frozen=True):
    id: str | int | None = None


class ObelicsJsonl:
    """Documents of text and images; the whole text is to be predicted."""

    def __init__(self, path: str | Path, *, image_root: str | Path | None = None, name: str = "obelics") -> None:
        self.name = name
        self._image_root = str(Path(path).parent if image_root is None else image_root)
        self._records = RecordFile(path)
        self.fingerprint = fingerprint("obelics-jsonl", [str(path)])

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Sample:
        """Read one document.

        Raises:
            SkipSample: if the lists do not fit together, a path leads out of the image root, or there is no text.
        """
        record = self._records.decode(index, _Record)
        if len(record.images) != len(record.texts):
            detail = f"expected as many images as texts, got {len(record.images)} and {len(record.texts)}"
            raise SkipSample(SkipReason.BAD_RECORD, detail)
        parts: list[Part] = []
        for place, (image, text) in enumerate(zip(record.images, record.texts, strict=True)):
            if image is not None and text is None:
                parts.append(image_inside(self._image_root, image))
            elif text is not None and image is None:
                # An empty stretch of text says nothing, and would only be an empty part.
                parts.extend([TextPart(text)] if text else [])
            else:
                both = "both" if text is not None else "neither"
                raise SkipSample(SkipReason.BAD_RECORD, f"expected an image or a text at {place}, got {both}")
        if not any(isinstance(part, TextPart) and part.text.strip() for part in parts):
            raise SkipSample(SkipReason.EMPTY_TEXT, "expected some text to predict, got none")
        return Sample(
            id=unique_id(self.name, index, _identity(record)),
            source=self.name,
            turns=(Turn("document", tuple(parts)),),
        )


def _identity(record: _Record) -> str | int | None:
    """Take the record's own id, or that in `general_metadata`, which OBELICS keeps as JSON in a string."""
    if record.id is not None:
        return record.id
    try:
        metadata = msgspec.json.decode(record.general_metadata or "{}", type=_GeneralMetadata)
    except (msgspec.DecodeError, RecursionError):
        # Metadata name a document, they do not make it: a document with broken ones is still good.
        return None
    return metadata.id
