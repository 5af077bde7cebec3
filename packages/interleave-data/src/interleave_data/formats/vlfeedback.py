"""VLFeedback: four answers to a prompt about a picture, each rated by GPT-4V in three respects.

`{"id", "prompt", "img_path", "completions"}`; a completion is `{"annotations": {aspect: {"Rating", "Rationale"}},
"model", "response"}`, the aspects being Helpfulness, Visual Faithfulness and Ethical Considerations. `completions` is
a list of these, or, as the hub's parquet has it, one object of three lists. `image` is read for `img_path`.

There are two rules for the pairs:

    best-worst   one pair a record, by xGen-MM's rule (arXiv:2408.08872v1): the answer with the highest mean rating is
                 preferred to the one with the lowest, and a record whose best answer is rated low is left out. Below
                 which mean that is was not published. Of several answers with the same mean, the first is taken.
    i-j          the pair of the i-th and the j-th of the four answers, the one with the higher mean first; ties are
                 left out. The six of them together (`all` in a data file) are all pairs of a record, the rule of
                 VLFeedback's own authors (github.com/vlf-silkie/VLFeedback, run_dpo.py).

Ratings are texts, and some are no number ("N/A"). Such a rating does not count in the first rule's means, nor does an
answer without any number; in the second rule an answer with such a rating is in no pair.

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
BEST_WORST, ALL_PAIRS = "best-worst", "all"
PAIRS = ("1-2", "1-3", "1-4", "2-3", "2-4", "3-4")


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


def vlfeedback(floor: float = DEFAULT_FLOOR, pairs: str = BEST_WORST) -> Callable[[Record, Images], PreferenceBody]:
    """A reader of one pair a record: `pairs` is `best-worst`, or one of `PAIRS`.

    With best-worst, records whose best answer has a mean rating below `floor` are left out.

    Raises:
        ValueError: if the floor is no number to compare with, or there is no such rule.
    """
    if not isfinite(floor):
        raise ValueError(f"floor: expected a finite number, got {floor}; 1 leaves no record out")
    if pairs not in (BEST_WORST, *PAIRS):
        raise ValueError(f"pairs: expected {BEST_WORST} or one of {', '.join(PAIRS)}, got {pairs}; use one of them")

    def read_vlfeedback(record: Record, images: Images) -> PreferenceBody:
        row = record.decode(_Row)
        if not row.prompt.strip():
            raise SkipSample(SkipReason.EMPTY_TEXT, "expected a prompt with some text, got none")
        if pairs == BEST_WORST:
            chosen, rejected = _best_and_worst(row.completions, floor)
        else:
            chosen, rejected = _one_pair(row.completions, *(int(place) - 1 for place in pairs.split("-")))
        if not chosen.strip() or not rejected.strip():
            raise SkipSample(SkipReason.EMPTY_ANSWER, "expected answers with some text, got none")
        if IMAGE_MARK in chosen or IMAGE_MARK in rejected:
            raise SkipSample(SkipReason.IMAGE_MARKS, f"expected no {IMAGE_MARK} in an answer, got one")
        picture = lone_picture(record, images, (row.image, row.img_path))
        return PreferenceBody(place_images([Speech("user", row.prompt)], [picture]), chosen, rejected)

    return read_vlfeedback


def _best_and_worst(completions: list[_Completion] | _Columns, floor: float) -> tuple[str, str]:
    means = [(_mean(ratings), answer) for ratings, answer in _rated(completions)]
    rated = [(mean, answer) for mean, answer in means if mean is not None]
    if len(rated) < 2:
        raise SkipSample(SkipReason.BAD_RECORD, f"expected two answers with ratings, got {len(rated)}")
    best, chosen = max(rated, key=lambda pair: pair[0])
    worst, rejected = min(rated, key=lambda pair: pair[0])
    if best < floor:
        raise SkipSample(SkipReason.UNWANTED, f"expected a best rating of at least {floor:g}, got {best:.3g}")
    if best == worst or chosen == rejected:
        raise SkipSample(SkipReason.UNWANTED, f"expected answers of different worth, got {best:.3g} for all")
    return chosen, rejected


def _one_pair(completions: list[_Completion] | _Columns, first: int, second: int) -> tuple[str, str]:
    rated = _rated(completions)
    if second >= len(rated):
        raise SkipSample(SkipReason.UNWANTED, f"expected an answer number {second + 1}, got {len(rated)} answers")
    (one_ratings, one), (other_ratings, other) = rated[first], rated[second]
    if None in one_ratings or None in other_ratings:
        raise SkipSample(SkipReason.UNWANTED, "expected numbers for the ratings of both answers, got others")
    one_mean, other_mean = _mean(one_ratings), _mean(other_ratings)
    if one_mean is None or other_mean is None:
        raise SkipSample(SkipReason.BAD_RECORD, "expected ratings of both answers, got none")
    if one_mean == other_mean or one == other:
        raise SkipSample(SkipReason.UNWANTED, f"expected answers of different worth, got {one_mean:.3g} for both")
    return (one, other) if one_mean > other_mean else (other, one)


def _rated(completions: list[_Completion] | _Columns) -> list[tuple[list[float | None], str]]:
    """Each answer with its ratings, None for what is no number."""
    if isinstance(completions, _Columns):
        if len(completions.annotations) != len(completions.response):
            got = f"{len(completions.annotations)} and {len(completions.response)}"
            raise SkipSample(SkipReason.BAD_RECORD, f"expected as many annotations as responses, got {got}")
        pairs = list(zip(completions.annotations, completions.response, strict=True))
    else:
        pairs = [(completion.annotations, completion.response) for completion in completions]
    return [
        ([None if aspect is None else _number(aspect.Rating) for aspect in annotations.values()], response)
        for annotations, response in pairs
    ]


def _mean(ratings: list[float | None]) -> float | None:
    known = [rating for rating in ratings if rating is not None]
    return sum(known) / len(known) if known else None


def _number(rating: str | int | float | None) -> float | None:
    try:
        value = float(rating) if rating is not None else None
    except (ValueError, OverflowError):
        return None
    return value if value is not None and isfinite(value) else None
