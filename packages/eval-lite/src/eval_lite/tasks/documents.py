"""Perplexity on held-out documents of text and pictures: OBELICS's shape in *.jsonl, or the embedded world's documents.

    {"images": [null, "images/a.jpg", null], "texts": ["before", null, "after"]}

exp of the mean negative log-likelihood a text token, in nats, with the pictures in their places; image tokens are read
and not predicted. A document counts up to the model's window. The interval draws documents.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import msgspec

from interleave_data import Part, Sample, TextPart, Turn
from scene_world import World

from ..measures import Measure
from ..prediction import EvalItem
from ..wording import Wording
from .files import TaskFileError, picture, read_lines, refuse
from .task import Asked, Task
from .world import drawn_part

NUM_DRAWN = 200
_SEED = 1


class _Row(msgspec.Struct):
    images: list[str | None]
    texts: list[str | None]


def _read(folder: Path) -> list[EvalItem]:
    paths = sorted(folder.glob("*.jsonl")) if folder.is_dir() else []
    if not paths:
        raise TaskFileError(f"{folder}: expected *.jsonl, got none; put documents there")
    return [
        _item(f"{path.stem}/{number}", _parts(folder, path, number, row))
        for path in paths
        for number, row in enumerate(read_lines(path, _Row), 1)
    ]


def _parts(folder: Path, path: Path, number: int, row: _Row) -> tuple[Part, ...]:
    if len(row.images) != len(row.texts):
        raise refuse(path, number, "as many images as texts", (len(row.images), len(row.texts)), "correct the row")
    parts: list[Part] = []
    for image, text in zip(row.images, row.texts, strict=True):
        if (image is None) == (text is None):
            raise refuse(path, number, "an image or a text at each place", (image, text), "correct the row")
        parts.append(TextPart(text) if text is not None else picture(folder, (str(image),), path, number))
    return tuple(parts)


def _item(name: str, parts: tuple[Part, ...]) -> EvalItem:
    turn = Turn(role="document", parts=parts)
    return EvalItem(group="documents", prompt=Sample(id=name, source="documents", turns=(turn,)), answer="")


def _draw(limit: int | None) -> list[EvalItem]:
    world = World(_SEED, "heldout")
    items: list[EvalItem] = []
    for index in range(min(NUM_DRAWN, limit or NUM_DRAWN)):
        document = world.document(index)
        parts = tuple(
            TextPart(part) if isinstance(part, str) else drawn_part(part, f"document/heldout {_SEED}/{index}/{place}")
            for place, part in enumerate(document.parts)
        )
        items.append(_item(document.id, parts))
    return items


def _measure(asked: Sequence[Asked]) -> dict[str, Measure]:
    rows = tuple((one.answer.nats[0], float(one.answer.num_tokens[0])) for one in asked if one.answer.nats)
    if not rows:
        raise TaskFileError("documents: expected one that can be read, got none; see why they were left out")
    return {"perplexity": Measure(rows, lambda means: math.exp(means[0] / means[1]))}


def _no_score(item: EvalItem, said: str) -> float:
    return 0.0


TASKS = {
    "documents": Task(
        name="documents",
        files="*.jsonl with images and texts, the pictures below it",
        read=_read,
        score=_no_score,
        measure=_measure,
        wording=Wording(),
        kind="document",
    ),
    "world-documents": Task(
        name="world-documents",
        files="",
        read=lambda folder: _draw(None),
        draw=_draw,
        score=_no_score,
        measure=_measure,
        wording=Wording(),
        kind="document",
    ),
}
