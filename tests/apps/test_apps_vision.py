"""The warm-up of tower and connector: image tokens drawn towards the words of a language model."""

from pathlib import Path

import pytest
import torch

from phi3_lite import Phi3, Phi3Config, train_tokenizer
from scene_world import COLOUR_NAMES, FORMS, SYMBOLS, UNKNOWN


@pytest.fixture
def vision(repo_root: Path, monkeypatch: pytest.MonkeyPatch):
    """The app's module, which stands outside every package."""
    monkeypatch.syspath_prepend(str(repo_root / "apps" / "train"))
    import train_vision

    return train_vision


def test_targets_of_a_cell_are_the_words_drawn_there(vision) -> None:
    """Four patches a cell, by hand: a red thing in two, a symbol beside something red, print that cannot be read."""
    blank, red, blue, round_, square, sign = torch.eye(6)
    targets = vision.WordTargets(
        vision.Words((torch.stack((red, blue)), torch.stack((round_, square)), sign[None]), blank)
    )
    assert targets.scale == 1.0
    labels = torch.zeros(1, 3, 16, dtype=torch.long)
    labels[0, 0, [0, 1]], labels[0, 1, [0, 1]] = 1, 2  # first cell: red square in its upper half
    labels[0, 0, 2], labels[0, 1, 2], labels[0, 2, 3] = 2, 1, 1  # second: blue circle over a symbol's column
    labels[0, 2, 8] = UNKNOWN  # third: nothing that can be told
    found, num_labelled = targets(labels, 2)
    assert num_labelled.tolist() == [[2, 2, 0, 0]]
    expected = [
        (red, square),
        ((blue + blank) / 2, (round_ + sign) / 2),
        (blank, blank),
        (blank, blank),
    ]
    torch.testing.assert_close(found[0], torch.stack([torch.stack(pair) for pair in expected]))
    found[0, 1] = torch.stack((red, round_ + 0.1 * sign))
    assert targets.shares(found, labels) == {"colour": pytest.approx(2 / 3), "form": 1.0, "symbol": 1.0}


def test_words_of_labels_are_the_models_embeddings_behind_a_space(vision) -> None:
    tokenizer = train_tokenizer([f"{name} " * 20 for name in (*COLOUR_NAMES, *FORMS[1:], *SYMBOLS)], 900)
    torch.manual_seed(0)
    lm = Phi3(Phi3Config(vocab_size=1000, width=16, num_layers=1, num_heads=2, num_kv_heads=1, mlp_width=16))
    words = vision.label_words(lm, tokenizer)
    colours, forms, symbols = words.kinds
    assert (len(colours), len(forms), len(symbols)) == (len(COLOUR_NAMES), len(FORMS) - 1, len(SYMBOLS))
    bare, spaced = tokenizer.encode("red"), tokenizer.encode(" red")
    assert bare != spaced
    table = lm.model.embed_tokens.weight
    torch.testing.assert_close(colours[COLOUR_NAMES.index("red")], table[spaced].mean(0))
    torch.testing.assert_close(words.blank, table[tokenizer.encode(",")].mean(0))
