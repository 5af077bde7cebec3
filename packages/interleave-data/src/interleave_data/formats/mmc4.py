"""MMC4: sentences of a page, and pictures that were matched to them afterwards.

`{"text_list": [sentence, …], "image_info": [{"image_name", "raw_url", "matched_text_index"}, …]}`. A picture goes
before the sentence that it is matched to, several in the order of `image_info`; sentences are joined by a space, as
OpenFlamingo does. The picture is `image_name` under the image root, or, where that is null, the file for `raw_url`.
Similarities and all other fields are passed over.

The names of the fields are not from our verified facts, but as public readers of the set use them.

Source: arXiv:2304.06939.
"""

import msgspec

from ..errors import SkipReason, SkipSample
from ..records import Images, Record
from ..samples import ImagePart, Part, TextPart, Turn
from .pictures import picture_part


class _MatchedImage(msgspec.Struct, frozen=True):
    matched_text_index: int
    image_name: str | None = None
    raw_url: str | None = None


class _Document(msgspec.Struct, frozen=True):
    text_list: list[str]
    image_info: list[_MatchedImage]


def read_mmc4(record: Record, images: Images) -> tuple[Turn, ...]:
    """Read one document.

    Raises:
        SkipSample: if a picture is matched to a sentence that is not there, has no name, or there is no text.
    """
    document = record.decode(_Document)
    sentences = document.text_list
    before: list[list[ImagePart]] = [[] for _ in sentences]
    for image in document.image_info:
        if not 0 <= image.matched_text_index < len(sentences):
            detail = f"expected `matched_text_index` of 0 to {len(sentences) - 1}, got {image.matched_text_index}"
            raise SkipSample(SkipReason.BAD_RECORD, detail)
        part = picture_part(image.image_name or image.raw_url, images)
        before[image.matched_text_index].append(part)
    parts: list[Part] = []
    waiting: list[str] = []
    for pictures, sentence in zip(before, sentences, strict=True):
        if pictures and waiting:
            parts.append(TextPart(" ".join(waiting)))
            waiting = []
        parts.extend(pictures)
        if sentence.strip():
            waiting.append(sentence.strip())
    if waiting:
        parts.append(TextPart(" ".join(waiting)))
    if not any(isinstance(part, TextPart) for part in parts):
        raise SkipSample(SkipReason.EMPTY_TEXT, "expected some text to predict, got none")
    return (Turn("document", tuple(parts)),)
