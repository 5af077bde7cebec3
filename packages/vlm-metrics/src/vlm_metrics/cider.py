"""CIDEr-D of captions: how much a caption shares with people's, words that are rare among pictures counting more.

Source: arXiv:1411.5726, as the COCO evaluation implements it (tylin/coco-caption, in Python 3 as
salaniz/pycocoevalcap, cider/cider_scorer.py). Its lengths count bigrams, which differ by as much as words do.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from math import exp, log, sqrt
from statistics import fmean
from typing import NamedTuple

from .ptb import tokenise_caption

_MAX_WORDS = 4
_SIGMA = 6.0
_SCALE = 10.0

NGram = tuple[str, ...]


class DocumentFrequencies(NamedTuple):
    """How common n-grams of one to four words are among images."""

    counts: Mapping[NGram, int]
    """Number of images with the n-gram in at least one reference; 0 is left out."""
    num_images: int


class CiderScores(NamedTuple):
    """CIDEr-D, from 0 to 10; papers print a hundred times the mean."""

    mean: float
    per_image: list[float]


def document_frequencies(
    references: Sequence[Sequence[str]], *, tokenise: Callable[[str], list[str]] = tokenise_caption
) -> DocumentFrequencies:
    """Count in how many images' references each n-gram stands."""
    return _frequencies([[_ngrams(tokenise(text)) for text in texts] for texts in references])


def cider_d(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    frequencies: DocumentFrequencies | None = None,
    tokenise: Callable[[str], list[str]] = tokenise_caption,
) -> CiderScores:
    """Score one caption for each image against the image's references.

    For n from 1 to 4, g(n-gram) = count * (log num_images - log max(1, number of images with it)). With lengths l in
    words, and norms over the n-grams of a caption,

        CIDEr-D_n(c, r) = exp(-(l_c - l_r)² / (2 * 6²)) * sum min(g_c, g_r) * g_r / (|g_c| |g_r|)

    and an image's score is 10 times the mean over its references and over n. Without `frequencies` they are counted in
    `references`, so a score depends on the set it is measured with, and that of one image alone is 0; hand in those of
    the whole set to score a part of it.

    `tokenise` makes words of a text; `str.split` is for texts that are tokenised already.

    Raises:
        ValueError: no images, another number of predictions than of images, or an image without references.
    """
    if len(predictions) != len(references) or not references:
        raise ValueError(
            f"predictions: expected one for each image and at least one, got {len(predictions)} predictions and "
            f"{len(references)} images; pair them first"
        )
    if bare := [i for i, texts in enumerate(references) if not texts]:
        raise ValueError(
            f"references: expected at least one for each image, got none for image {bare[0]}; leave it out"
        )
    counted = [[_ngrams(tokenise(text)) for text in texts] for texts in references]
    known = _frequencies(counted) if frequencies is None else frequencies
    weigh = _Weights(known)
    scores: list[float] = []
    for text, image in zip(predictions, counted, strict=True):
        caption = weigh(_ngrams(tokenise(text)))
        scores.append(_SCALE * fmean(_similarity(caption, weigh(reference)) for reference in image))
    return CiderScores(fmean(scores), scores)


def _ngrams(words: list[str]) -> list[Counter[NGram]]:
    """Counts of the n-grams of 1, 2, 3 and 4 words."""
    return [Counter(zip(*(words[start:] for start in range(n)), strict=False)) for n in range(1, _MAX_WORDS + 1)]


def _frequencies(counted: list[list[list[Counter[NGram]]]]) -> DocumentFrequencies:
    images: Counter[NGram] = Counter()
    for image in counted:
        images.update({ngram for reference in image for ngrams in reference for ngram in ngrams})
    return DocumentFrequencies(images, len(counted))


class _Caption(NamedTuple):
    weights: list[dict[NGram, float]]
    norms: list[float]
    num_words: int


class _Weights:
    """tf-idf of n-grams; what is rare weighs more."""

    def __init__(self, frequencies: DocumentFrequencies) -> None:
        self._log_images = log(max(1, frequencies.num_images))
        self._idf = {ngram: self._log_images - log(max(1, count)) for ngram, count in frequencies.counts.items()}

    def __call__(self, ngrams: list[Counter[NGram]]) -> _Caption:
        weights = [
            {ngram: count * self._idf.get(ngram, self._log_images) for ngram, count in counts.items()}
            for counts in ngrams
        ]
        norms = [sqrt(sum(weight * weight for weight in of_n.values())) for of_n in weights]
        return _Caption(weights, norms, ngrams[0].total())


def _similarity(caption: _Caption, reference: _Caption) -> float:
    """Mean over n of the clipped cosines, less for other lengths."""
    total = 0.0
    for mine, theirs, norm, other in zip(
        caption.weights, reference.weights, caption.norms, reference.norms, strict=True
    ):
        if norm and other:
            shared = sum(
                min(weight, theirs[ngram]) * theirs[ngram] for ngram, weight in mine.items() if ngram in theirs
            )
            total += shared / (norm * other)
    gap = caption.num_words - reference.num_words
    return total / _MAX_WORDS * exp(-(gap**2) / (2 * _SIGMA**2))
