"""Golden files of captions: the tokenizer and CIDEr-D, both of which need java."""

import copy
import random
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Sequence

from golden_answers import noisy
from golden_official import Golden, Packages

NOUNS = [
    "dog", "cat", "man", "woman", "child", "train", "bus", "stop", "sign", "kitchen", "plate", "pizza",
    "surfboard", "wave", "tennis", "racket", "street", "horse",
]  # fmt: skip
ODD = [
    "dog's", "don't", "isn't", "black-and-white", "t-shirt", "(really)", "'stop'", '"exit"', "U.S.", "St.",
    "Mr.", "10:30", "a.m.", "2,000", "3.5", "#1", "$5", "50%", "and/or", "they're", "cannot", "o'clock", "80's",
    "dogs'", "&", "...", "-", "–", "it’s", "“no”", "12-year-old", "AT&T", "24x36", "gonna", "no. 5", "!!",
    "café", "J. Smith", "e-mail",
]  # fmt: skip
SCENES = ["a {} and a {} in front of a {}", "the {} is next to the {} with a {}", "two {}s near a {}, and one {}"]


def caption(rng: random.Random) -> str:
    """A sentence about a picture, sometimes with what is hard to part into words."""
    words = rng.choice(SCENES).format(*(rng.choice(NOUNS) for _ in range(3))).split()
    for _ in range(rng.choice([0, 0, 1, 2])):
        words.insert(rng.randrange(len(words) + 1), rng.choice(ODD))
    text = " ".join(words)
    return text[0].upper() + text[1:] + rng.choice([".", "", " .", "!", "?"])


def java_words(packages: Packages, texts: Sequence[str]) -> list[str]:
    """Words by Stanford's tokenizer, parted by spaces, as the COCO evaluation has them."""
    official = packages.take(
        "pycocoevalcap/tokenizer/ptbtokenizer.py",
        "PTBTokenizer",
        "STANFORD_CORENLP_3_4_1_JAR",
        "PUNCTUATIONS",
        subprocess=subprocess,
        tempfile=tempfile,
        __file__=str(packages.folder / "pycocoevalcap/tokenizer/ptbtokenizer.py"),
    )
    done = official.PTBTokenizer().tokenize({i: [{"caption": text}] for i, text in enumerate(texts)})
    return [done[i][0] for i in range(len(texts))]


def ptb(packages: Packages, rng: random.Random) -> Golden:
    """Words of captions."""
    texts = [caption(rng) for _ in range(500)]
    return {
        "source": packages.source(
            "pycocoevalcap", "pycocoevalcap.tokenizer.ptbtokenizer.PTBTokenizer (Stanford 3.4.1)"
        ),
        "cases": [list(pair) for pair in zip(texts, java_words(packages, texts), strict=True)],
    }


def cider(packages: Packages, rng: random.Random) -> Golden:
    """CIDEr-D with its tokenizer: one set of images, per image and mean."""
    official = packages.take(
        "pycocoevalcap/cider/cider_scorer.py",
        "precook",
        "cook_refs",
        "cook_test",
        "CiderScorer",
        copy=copy,
        defaultdict=defaultdict,
    )
    references = [[caption(rng) for _ in range(rng.randint(1, 5))] for _ in range(250)]
    # Near a reference, or one of another picture, or nothing.
    predictions = [
        rng.choice([noisy(rng, texts[0], by="ab "), " ".join(texts[-1].split()[2:]), caption(rng), texts[0], ""])
        for texts in references
    ]
    flat = java_words(packages, [text for texts in references for text in texts] + predictions)
    words = iter(flat)
    scorer = official.CiderScorer()
    parted = [[next(words) for _ in texts] for texts in references]
    for texts, prediction in zip(parted, words, strict=True):
        scorer += (prediction, texts)
    mean, per_image = scorer.compute_score()
    return {
        "source": packages.source("pycocoevalcap", "pycocoevalcap.cider.cider_scorer.CiderScorer after PTBTokenizer"),
        "predictions": predictions,
        "references": references,
        "mean": float(mean),
        "per_image": [float(score) for score in per_image],
    }
