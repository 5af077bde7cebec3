"""CIDEr-D of captions."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from .ptb import tokenise_caption


class DocumentFrequencies(NamedTuple):
    """In how many images' references each n-gram (of 1 to 4 words) stands."""

    counts: Mapping[tuple[str, ...], int]
    num_images: int


class CiderScores(NamedTuple):
    """CIDEr-D; papers print a hundred times the mean."""

    mean: float
    per_image: list[float]


def document_frequencies(
    references: Sequence[Sequence[str]], *, tokenise: Callable[[str], list[str]] = tokenise_caption
) -> DocumentFrequencies:
    """Count n-grams over images."""
    raise NotImplementedError


def cider_d(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    frequencies: DocumentFrequencies | None = None,
    tokenise: Callable[[str], list[str]] = tokenise_caption,
) -> CiderScores:
    """Score one caption for each image against the image's references."""
    raise NotImplementedError
