"""VLFeedback: four answers to a prompt about a picture, each rated by GPT-4V in three respects.

`{"id", "prompt", "img_path", "completions"}`; a completion is `{"annotations": {aspect: {"Rating", "Rationale"}},
"model", "response"}`, the aspects being Helpfulness, Visual Faithfulness and Ethical Considerations. `completions` is
a list of these, or, as the hub's parquet has it, one object of three lists. `image` is read for `img_path`.

A record gives one pair, by xGen-MM's rule: the answer with the highest mean rating is preferred to the one with the
lowest, and a record whose best answer is rated low is left out (arXiv:2408.08872v1). Ratings are texts; what is no
number ("N/A") does not count, nor does an answer without any number. Below which mean a best answer is "low" was not
published. Of several answers with the same mean, the first is taken. All pairs of a record, the rule of VLFeedback's
own authors, would be several samples and are not made here.

Source: arXiv:2312.10665.
"""

from collections.abc import Callable
from math import isfinite
from typing import Any

import msgspec

from ..errors import SkipReason, SkipSample
from ..records import Images, PreferenceBody, Record
from .llava import IMAGE_MARK, Speech, place_images
from .pictures import lone_picture

DEFAULT_FLOOR = 4.0
"""Of ratings from 1 to 5; ours."""


class _Aspect(msgspec.Struct, frozen=True):
    Rating: str | int | float | None = None


class _Completion(msgspec.Struct, frozen=True):
    annotations: dict[str, _Aspect | None]
    response: str


class _Columns(msgspec.Struct, frozen=True):
    annotations: list[dict[str, _Aspect | None]]
    response: list[str]


class _Row(msgspec.Struct, frozen=True):
    prompt: str
    completions: list[_Completion] | _Columns
    img_path: str | None = None
    image: Any = None


def vlfeedback(floor: float = DEFAULT_FLOOR) -> Callable[[Record, Images], PreferenceBody]:
    """A reader that leaves out records whose best answer has a mean rating below `floor`.

    Raises:
        ValueError: if the floor is no number to compare with.
    """
    if not isfinite(floor):
        raise ValueError(f"floor: expected a finite number, got {floor}; 1 leaves no record out")

    def read_vlfeedback(record: Record, images: Images) -> PreferenceBody:
        row = record.decode(_Row)
        if not row.prompt.strip():
            raise SkipSample(SkipReason.EMPTY_TEXT, "expected a prompt with some text, got none")
        rated = [(mean, answer) for mean, answer in _rated(row.completions) if mean is not None]
        if len(rated) < 2:
            raise SkipSample(SkipReason.BAD_RECORD, f"expected two answers with ratings, got {len(rated)}")
        best, chosen = max(rated, key=lambda pair: pair[0])
        worst, rejected = min(rated, key=lambda pair: pair[0])
        if best < floor:
            raise SkipSample(SkipReason.UNWANTED, f"expected a best rating of at least {floor:g}, got {best:.3g}")
        if best == worst or chosen == rejected:
            raise SkipSample(SkipReason.UNWANTED, f"expected answers of different worth, got {best:.3g} for all")
        if not chosen.strip() or not rejected.strip():
            raise SkipSample(SkipReason.EMPTY_ANSWER, "expected answers with some text, got none")
        if IMAGE_MARK in chosen or IMAGE_MARK in rejected:
            raise SkipSample(SkipReason.IMAGE_MARKS, f"expected no {IMAGE_MARK} in an answer, got one")
        picture = lone_picture(record, images, (row.image, row.img_path))
        return PreferenceBody(place_images([Speech("user", row.prompt)], [picture]), chosen, rejected)

    return read_vlfeedback


def _rated(completions: list[_Completion] | _Columns) -> list[tuple[float | None, str]]:
    """Each answer with the mean of its numeric ratings."""
    if isinstance(completions, _Columns):
        if len(completions.annotations) != len(completions.response):
            got = f"{len(completions.annotations)} and {len(completions.response)}"
            raise SkipSample(SkipReason.BAD_RECORD, f"expected as many annotations as responses, got {got}")
        pairs = list(zip(completions.annotations, completions.response, strict=True))
    else:
        pairs = [(completion.annotations, completion.response) for completion in completions]
    return [(_mean(annotations), response) for annotations, response in pairs]


def _mean(annotations: dict[str, _Aspect | None]) -> float | None:
    ratings = [_number(aspect.Rating) for aspect in annotations.values() if aspect is not None]
    known = [rating for rating in ratings if rating is not None]
    return sum(known) / len(known) if known else None


def _number(rating: str | int | float | None) -> float | None:
    try:
        value = float(rating) if rating is not None else None
    except (ValueError, OverflowError):
        return None
    return value if value is not None and isfinite(value) else None
