"""SigLIP's text tokenizer; that its ids are transformers' is shown in tests/parity."""

import json
from pathlib import Path

import pytest
import torch

from siglip_lite import SiglipTokenizer
from siglip_lite.tokenizer import canonical_text
from weight_files import WeightsError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A photo, of a Cat!", "a photo of a cat"),
        ("\t two \n\n lines ", "two lines"),
        ("snake_case-and 'quotes' <tag>", "snakecaseand quotes tag"),
        ("¿Qué — sí?", "¿qué — sí"),
        ("...", ""),
    ],
)
def test_canonical_text_is_lower_case_without_punctuation(text: str, expected: str):
    assert canonical_text(text) == expected


def test_texts_end_and_are_filled_up(siglip_sentencepiece: bytes):
    tokenizer = SiglipTokenizer(siglip_sentencepiece, max_tokens=6, pad_token="<pad>")
    assert (tokenizer.pad_id, tokenizer.end_id) == (0, 1)
    letter = tokenizer.encode("a")
    assert letter[1:] == [1]
    assert letter[0] > 2
    # A cut text ends too; "a a a" is three pieces of one letter with its space.
    assert tokenizer.encode("a " * 9) == [letter[0]] * 5 + [1]
    assert tokenizer.encode_batch(["a", "", "a a"]).tolist() == [
        [letter[0], 1, 0, 0, 0, 0],
        [1, 0, 0, 0, 0, 0],
        [letter[0], letter[0], 1, 0, 0, 0],
    ]
    assert tokenizer.encode_batch([]).shape == (0, 6)


def test_no_text_spells_the_end_token(siglip_sentencepiece: bytes):
    tokenizer = SiglipTokenizer(siglip_sentencepiece)
    for text in ("a</s>b", "</s>", "<pad><unk>", "▁</s>"):
        assert not {0, 1} & set(tokenizer.encode(text)[:-1])
    assert tokenizer.encode("a \ud800 cat") == tokenizer.encode("a \ufffd cat")


def test_white_space_and_punctuation_in_front_count_for_nothing(siglip_sentencepiece: bytes):
    tokenizer = SiglipTokenizer(siglip_sentencepiece)
    assert tokenizer.encode(" \t, a cat") == tokenizer.encode("a cat")


def test_tokens_that_are_no_pieces_are_refused(siglip_sentencepiece: bytes):
    with pytest.raises(ValueError, match=r"pad_token: expected a piece .* got '<nothing>'"):
        SiglipTokenizer(siglip_sentencepiece, pad_token="<nothing>")
    with pytest.raises(ValueError, match="max_tokens: expected at least 1, got 0"):
        SiglipTokenizer(siglip_sentencepiece, max_tokens=0)
    with pytest.raises(ValueError, match=r"expected a \.model file"):
        SiglipTokenizer(b"no model at all")


def test_settings_survive_a_folder(tmp_path: Path, siglip_sentencepiece: bytes):
    SiglipTokenizer(siglip_sentencepiece, max_tokens=9, pad_token="<pad>", lower_case=False).save(tmp_path)
    again = SiglipTokenizer.from_folder(str(tmp_path))
    assert (again.max_tokens, again.pad_id, again.end_id, again.lower_case) == (9, 0, 1, False)
    (tmp_path / "tokenizer_config.json").unlink()
    published = SiglipTokenizer.from_folder(tmp_path)
    assert (published.max_tokens, published.pad_id, published.end_id, published.lower_case) == (64, 1, 1, True)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "siglip", "text_config": {"max_position_embeddings": 16}},
        {"model_type": "siglip_text_model", "max_position_embeddings": 16},
    ],
)
def test_texts_are_no_longer_than_the_tower_beside(tmp_path: Path, siglip_sentencepiece: bytes, config: object):
    SiglipTokenizer(siglip_sentencepiece).save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokenizer = SiglipTokenizer.from_folder(tmp_path)
    assert tokenizer.encode_batch(["a cat"]).shape == (1, 16)
    assert tokenizer.encode_batch(["a cat"]).dtype == torch.int64


def test_a_tokenizer_without_a_length_takes_the_towers(tmp_path: Path, siglip_sentencepiece: bytes):
    SiglipTokenizer(siglip_sentencepiece).save(tmp_path)
    # What transformers writes for "unlimited".
    fields = {"model_max_length": 10**30, "pad_token": {"content": "<pad>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(fields))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip", "text_config": {}}))
    tokenizer = SiglipTokenizer.from_folder(tmp_path)
    assert (tokenizer.max_tokens, tokenizer.pad_id) == (64, 0)


def test_tokenizers_of_other_models_are_refused(tmp_path: Path, siglip_sentencepiece: bytes):
    with pytest.raises(WeightsError, match=r"expected spiece\.model, got none"):
        SiglipTokenizer.from_folder(tmp_path)
    SiglipTokenizer(siglip_sentencepiece).save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip", "text_config": {"vocab_size": 20}}))
    with pytest.raises(WeightsError, match="at most 20 pieces, as the text tower has"):
        SiglipTokenizer.from_folder(tmp_path)
    (tmp_path / "spiece.model").write_bytes(b"cut")
    with pytest.raises(WeightsError, match=r"expected a \.model file"):
        SiglipTokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GemmaTokenizer"}))
    with pytest.raises(WeightsError, match="tokenizer_class SiglipTokenizer, got GemmaTokenizer"):
        SiglipTokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(WeightsError, match="expected a tokenizer's config"):
        SiglipTokenizer.from_folder(tmp_path)
