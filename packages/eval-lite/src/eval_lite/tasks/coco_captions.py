"""COCO captions: {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}, five captions a picture.

Source: cocodataset.org, captions_val2014.json (or another split's); NoCaps and TextCaps come in the same form.
"""

from pathlib import Path

import msgspec

from ..prediction import EvalItem
from . import captioning
from .files import check_pairs, find_file, picture, question, read_rows
from .task import Task


class _Image(msgspec.Struct):
    id: int | str
    file_name: str


class _Caption(msgspec.Struct):
    image_id: int | str
    caption: str


def _read(folder: Path) -> list[EvalItem]:
    path = find_file(folder, "captions_*.json", "annotations/captions_*.json", "*.json")
    captions: dict[int | str, list[str]] = {}
    for row in read_rows(path, _Caption, "annotations"):
        captions.setdefault(row.image_id, []).append(row.caption)
    images = read_rows(path, _Image, "images")
    check_pairs(path, path, [image.id for image in images if image.id not in captions])
    items: list[EvalItem] = []
    for number, image in enumerate(images, 1):
        split = path.stem.removeprefix("captions_")
        names = [f"{place}{image.file_name}" for place in (f"{split}/", "images/", "")]
        prompt = question(str(image.id), [picture(folder, names, path, number)], "", "coco-captions")
        references = captions[image.id]
        items.append(EvalItem(group="captions", prompt=prompt, answer=references[0], references=tuple(references)))
    return items


TASKS = {
    "coco-captions": Task(
        name="coco-captions",
        files="captions_*.json, the pictures below SPLIT/ or images/",
        read=_read,
        score=captioning.score,
        measure=captioning.measure,
        wording=captioning.WORDING,
        max_new_tokens=40,
    )
}
