import random
from math import exp, log, sqrt

import pytest

from vlm_metrics import DocumentFrequencies, cider_d, document_frequencies, tokenise_caption

PREDICTIONS = ["a cat sits on a mat", "a dog runs in the park", "a man riding a wave"]
REFERENCES = [
    ["a cat sits on the mat", "a cat is sitting on a mat"],
    ["a dog is running in the park", "the dog runs through a park"],
    ["a man riding a wave on a surfboard", "a surfer rides a wave"],
]


def test_cider_d_golden_values() -> None:
    scores = cider_d(PREDICTIONS, REFERENCES)
    assert scores.per_image == pytest.approx([4.759003, 3.068352, 4.036977], abs=1e-6)
    assert scores.mean == pytest.approx(3.954777, abs=1e-6)
    firsts = cider_d([texts[0] for texts in REFERENCES], REFERENCES)
    assert firsts.per_image == pytest.approx([6.047995, 5.626446, 5.535817], abs=1e-6)
    assert firsts.mean == pytest.approx(5.736753, abs=1e-6)


def test_cider_d_by_hand_of_one_word_in_two_images() -> None:
    # "cat" stands in one of two images: weight log 2. Of the n-grams only those of one word exist; lengths agree.
    assert cider_d(["cat", "dog"], [["cat"], ["dog"]]).per_image == pytest.approx([10 / 4, 10 / 4])
    # Said three times against once: clipped to one, over a norm of three; two bigrams more.
    thrice = 10 * (log(2) ** 2 / (3 * log(2) * log(2))) / 4 * exp(-(2**2) / 72)
    assert cider_d(["cat cat cat", "dog"], [["cat"], ["dog"]]).per_image[0] == pytest.approx(thrice)


def test_cider_d_of_one_image_is_zero() -> None:
    assert cider_d(["a cat"], [["a cat"]]).mean == 0


def test_cider_d_with_given_frequencies_scores_a_part_as_in_the_whole() -> None:
    whole = cider_d(PREDICTIONS, REFERENCES)
    known = document_frequencies(REFERENCES)
    assert known.num_images == 3
    assert known.counts[("a", "cat")] == 1
    assert known.counts[("a",)] == 3
    for i in range(3):
        part = cider_d(PREDICTIONS[i : i + 1], REFERENCES[i : i + 1], frequencies=known)
        assert part.per_image == pytest.approx(whole.per_image[i : i + 1])
    # Officially a second call counts the references again.
    assert cider_d(PREDICTIONS, REFERENCES) == whole


def test_cider_d_order_of_references_is_no_matter() -> None:
    swapped = cider_d(PREDICTIONS, [texts[::-1] for texts in REFERENCES])
    assert swapped.per_image == pytest.approx(cider_d(PREDICTIONS, REFERENCES).per_image)


def test_cider_d_equals_its_formula_written_as_vectors() -> None:
    # Independent: sums over the whole vocabulary, one n at a time.
    rng = random.Random(3)
    references = [[" ".join(rng.choices("abcde", k=rng.randint(1, 9))) for _ in range(3)] for _ in range(7)]
    predictions = [" ".join(rng.choices("abcdef", k=rng.randint(1, 9))) for _ in range(7)]

    def grams(text: str, n: int) -> list[str]:
        words = text.split()
        return [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]

    def score(prediction: str, reference: str) -> float:
        total = 0.0
        for n in (1, 2, 3, 4):
            vocabulary = {g for texts in (*references, [prediction]) for text in texts for g in grams(text, n)}
            idf = {
                g: log(7) - log(max(1, sum(any(g in grams(text, n) for text in texts) for texts in references)))
                for g in vocabulary
            }
            c = {g: grams(prediction, n).count(g) * idf[g] for g in vocabulary}
            r = {g: grams(reference, n).count(g) * idf[g] for g in vocabulary}
            norms = sqrt(sum(x * x for x in c.values())) * sqrt(sum(x * x for x in r.values()))
            total += sum(min(c[g], r[g]) * r[g] for g in vocabulary) / norms if norms else 0.0
        gap = len(grams(prediction, 2)) - len(grams(reference, 2))
        return 10 * total / 4 * exp(-gap * gap / 72)

    expected = [sum(score(p, r) for r in texts) / 3 for p, texts in zip(predictions, references, strict=True)]
    assert cider_d(predictions, references, tokenise=str.split).per_image == pytest.approx(expected)


@pytest.mark.parametrize(
    ("predictions", "references"), [(["a"], []), (["a"], [["a"], ["b"]]), ([], []), (["a", "b"], [["a"], []])]
)
def test_cider_d_of_what_does_not_pair_raises(predictions: list[str], references: list[list[str]]) -> None:
    with pytest.raises(ValueError, match="for each image"):
        cider_d(predictions, references, frequencies=DocumentFrequencies({}, 1))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A dog's bowl isn't red.", "a dog 's bowl is n't red"),
        ("black-and-white t-shirt, 3.5 x 2,000", "black-and-white t-shirt 3.5 x 2,000"),
        ("Mr. Smith of the U.S. at 5 p.m.", "mr. smith of the u.s. at 5 p.m."),
        ("cannot; gonna - we're -- they've ... 'stop'!", "can not gon na we 're they 've stop"),
        # Officially brackets would be dropped, but the list has them in capitals and the words are in lower case.
        ("two men (one old)", "two men -lrb- one old -rrb-"),
        # Officially the last stop of "plan b." goes if the next caption of the file starts with "A".
        ("This is plan B.", "this is plan b"),
        ("$5, 50% & #1", "$ 5 50 % & # 1"),
        ("", ""),
    ],
)
def test_tokenise_caption_by_hand(text: str, words: str) -> None:
    assert tokenise_caption(text) == words.split()
