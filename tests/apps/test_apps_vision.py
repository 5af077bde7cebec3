"""The warm-up of tower and connector: image tokens drawn towards the words of a language model."""

from pathlib import Path

import pytest
import torch

from phi3_lite import Phi3, Phi3Config, train_tokenizer
from scene_world import COLOUR_NAMES, FORMS, SYMBOLS


@pytest.fixture
def vision(repo_root: Path, monkeypatch: pytest.MonkeyPatch):
    """The app's module, which stands outside every package."""
    monkeypatch.syspath_prepend(str(repo_root / "apps" / "train"))
    import train_vision

    return train_vision


def test_a_token_scores_highest_for_the_word_that_it_is_and_nothing_scores_zero(vision) -> None:
    words = torch.eye(5) * 3
    scores = vision.WordScores([words[:2], words[2:3], words[3:]])
    token = (words[1] + words[3])[None, None]
    colour, form, symbol = (kind[0, 0].tolist() for kind in scores(token))
    assert (colour, form, symbol) == ([0.0, 0.0, 10.0], [0.0, 0.0], [0.0, 10.0, 0.0])


def test_words_of_labels_are_the_models_embeddings_with_and_without_a_space(vision) -> None:
    tokenizer = train_tokenizer([f"{name} " * 20 for name in (*COLOUR_NAMES, *FORMS[1:], *SYMBOLS)], 900)
    torch.manual_seed(0)
    lm = Phi3(Phi3Config(vocab_size=1000, width=16, num_layers=1, num_heads=2, num_kv_heads=1, mlp_width=16))
    colours, forms, symbols = vision.label_words(lm, tokenizer)
    assert (len(colours), len(forms), len(symbols)) == (len(COLOUR_NAMES), len(FORMS) - 1, len(SYMBOLS))
    bare, spaced = tokenizer.encode("red"), tokenizer.encode(" red")
    assert bare != spaced
    table = lm.model.embed_tokens.weight
    expected = (table[bare].mean(0) + table[spaced].mean(0)) / 2
    torch.testing.assert_close(colours[COLOUR_NAMES.index("red")], expected)
