"""Tokenizers: published vectors, control tokens that text cannot reach, streaming."""

import json
from functools import cache
from pathlib import Path
from typing import cast

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from phi3_lite import CONTROL_TOKENS, HFTokenizer, SentencePieceTokenizer, StreamDecoder, Tokenizer, train_tokenizer
from phi3_lite.tokenizer import split_at_control

KINDS = ["json", "sentencepiece", "trained"]
XGEN_EXTRA = ["<pad>", "<image>", "<image placeholder>", "<|endofchunk|>"]
TEXTS = [
    "the red circle is left of the blue square, 12 of 34",
    "what does the sign say? KX7Q",
    "<image> <|end|> <|end|> <|end|> and other marks spelt out <image>",
] * 20


@cache
def _load(kind: str, folder: Path) -> Tokenizer:
    if kind == "trained":
        return train_tokenizer(TEXTS, 330, spelled="[0-9A-Z]")
    if kind == "json":
        return HFTokenizer.from_file(folder / "phi-3-mini" / "tokenizer.json")
    return SentencePieceTokenizer.from_file(folder / "llama-sentencepiece" / "tokenizer.model")


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """Each kind of tokenizer; those that need the sample data are skipped without."""
    folder = Path() if request.param == "trained" else request.getfixturevalue("shared_data") / "tokenizers"
    return _load(request.param, folder)


@pytest.fixture(params=KINDS[:2])
def published(request: pytest.FixtureRequest, shared_data: Path) -> Tokenizer:
    """Phi-3-mini's tokenizer, by either library."""
    return _load(request.param, shared_data / "tokenizers")


def _vectors(shared_data: Path) -> list[dict]:
    return [json.loads(line) for line in (shared_data / "tokenizers" / "vectors.jsonl").read_text().splitlines()]


def test_raw_vectors_encode_and_decode_as_published(published: Tokenizer, shared_data: Path) -> None:
    raw = _vectors(shared_data)[:-1]
    assert len(raw) == 24
    for vector in raw:
        assert published.encode(vector["text"]) == vector["ids"], vector["text"]
        assert published.encode_with_control(vector["text"]) == vector["ids"], vector["text"]
        assert published.decode(vector["ids"]) == vector["text"]


def test_chat_vector_encodes_with_control_as_published(published: Tokenizer, shared_data: Path) -> None:
    vector = _vectors(shared_data)[-1]
    assert published.encode_with_control(vector["text"]) == vector["ids"]
    assert published.decode(vector["ids"], keep_control=True) == vector["text"].replace(">\n", ">")
    assert published.control_ids.keys().isdisjoint(published.decode(vector["ids"]).split())


def test_both_libraries_know_the_same_control_tokens(shared_data: Path) -> None:
    by_json, by_sentencepiece = (_load(kind, shared_data / "tokenizers") for kind in KINDS[:2])
    assert by_json.control_ids == by_sentencepiece.control_ids
    assert by_json.strips_right == by_sentencepiece.strips_right
    assert by_json.vocab_size == by_sentencepiece.vocab_size == 32_011
    assert all(by_json.token_bytes(token) == by_sentencepiece.token_bytes(token) for token in range(32_100))


def test_decode_equals_the_librarys_own(shared_data: Path) -> None:
    path = shared_data / "tokenizers" / "phi-3-mini" / "tokenizer.json"
    ours, theirs = HFTokenizer.from_file(path), Backend.from_file(str(path))
    ids = [token for token in range(3, 32_000, 7) if ours.token_bytes(token).isascii()]
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False)


def test_no_control_token_can_be_spelt(tokenizer: Tokenizer) -> None:
    """(T17)"""
    assert tokenizer.control_ids
    control = set(tokenizer.control_ids.values())
    for name in tokenizer.control_ids:
        for text in (name, f" {name} ", f"a{name}b", f"{name}{name}\n{name}", name[:-1], name.replace("<", "<<")):
            ids = tokenizer.encode(text)
            assert control.isdisjoint(ids), text
            assert tokenizer.decode(ids) == text


def test_no_piece_spelt_out_yields_a_control_id(tokenizer: Tokenizer) -> None:
    """(T17): over the whole vocabulary."""
    control = set(tokenizer.control_ids.values())
    pieces = [tokenizer.token_bytes(token).decode("utf-8", "replace") for token in range(tokenizer.vocab_size)]
    for start in range(0, len(pieces), 1000):
        assert control.isdisjoint(tokenizer.encode("".join(pieces[start : start + 1000])))


def _check_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert set(tokenizer.control_ids.values()).isdisjoint(ids)
    assert tokenizer.decode(ids) == text
    stream = StreamDecoder(tokenizer)
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.finish() == text


NAMES = [*CONTROL_TOKENS, "<s>", "</s>", "<unk>", "<|placeholder1|>", "<0x0A>", "<", "|", ">", "end", "\n", " "]
# U+2581 is SentencePiece's own sign for a space, so it comes back as one
WRITTEN = st.characters(exclude_categories=["Cs"], exclude_characters="▁")
TEXT = st.lists(st.one_of(st.sampled_from(NAMES), st.text(WRITTEN, max_size=8)), max_size=6).map("".join)


@settings(max_examples=150, deadline=None, database=None, derandomize=True)
@example("</s>")
@example(" leading and trailing ")
@example("é🦙\x00\u200d")
@given(text=TEXT)
def test_any_text_of_trained_tokenizer_round_trips_without_control_ids(text: str) -> None:
    """(T17)"""
    _check_text(_load("trained", Path()), text)


@pytest.mark.parametrize("kind", KINDS[:2])
def test_any_text_of_published_tokenizer_round_trips_without_control_ids(kind: str, shared_data: Path) -> None:
    tokenizer = _load(kind, shared_data / "tokenizers")

    @settings(max_examples=150, deadline=None, database=None, derandomize=True)
    @example("</s>")
    @example("  two spaces\n\nand lines ")
    @given(text=TEXT)
    def check(text: str) -> None:
        _check_text(tokenizer, text)

    check()


def test_a_tokenizer_that_reads_control_names_in_text_shows(tokenizer: Tokenizer) -> None:
    """(T17): the control, every name of a control token by the encoding that is for templates."""

    class Naive:
        control_ids = tokenizer.control_ids
        encode = staticmethod(tokenizer.encode_with_control)

    for name in tokenizer.control_ids:
        with pytest.raises(AssertionError):
            _check_text(cast(Tokenizer, Naive()), f"a {name} b")


@pytest.mark.parametrize("kind", KINDS[:2])
def test_text_between_control_tokens_is_encoded_as_if_alone(kind: str, shared_data: Path) -> None:
    tokenizer = _load(kind, shared_data / "tokenizers")
    written = "<|user|>\n \u3000\n <s> a<|end|>b<|endoftext|>\n c</s>  d"
    expected: list[int] = []
    for span, is_name in [
        ("<|user|>", True), ("<s>", True), (" a", False), ("<|end|>", True), ("b", False), ("<|endoftext|>", True),
        ("\n c", False), ("</s>", True), ("d", False),
    ]:  # fmt: skip
        expected += [tokenizer.token_id(span)] if is_name else tokenizer.encode(span)
    assert tokenizer.encode_with_control(written) == expected


def test_longer_control_names_win() -> None:
    assert split_at_control("<a><ab>x", ["<a", "<ab>", "<a>"], frozenset()) == [
        ("<a>", True),
        ("<ab>", True),
        ("x", False),
    ]


def test_lone_surrogates_become_replacement_characters(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\ud83eb")) == "a\ufffdb"


def test_stream_holds_back_characters_until_they_are_whole(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a🦙b")
    llama = next(i for i, token in enumerate(ids) if tokenizer.token_bytes(token) == b"\xf0")
    stream = StreamDecoder(tokenizer)
    pieces = [stream.push(token) for token in ids]
    assert pieces[llama : llama + 4] == ["", "", "", "🦙"]
    assert "".join(pieces) == "a🦙b"
    assert stream.push(ids[llama]) == ""
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""


def test_stream_shows_control_tokens_only_if_asked(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("a b"), tokenizer.token_id("<|end|>"), *tokenizer.encode("c")]
    for keep_control, expected in ((False, "a bc"), (True, "a b<|end|>c")):
        stream = StreamDecoder(tokenizer, keep_control=keep_control)
        assert "".join([stream.push(token) for token in ids]) + stream.finish() == expected
        assert tokenizer.decode(ids, keep_control=keep_control) == expected


def test_ids_beyond_the_vocabulary_decode_to_nothing(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([tokenizer.vocab_size, *tokenizer.encode("a"), 10**6]) == "a"


def test_unknown_control_name_raises_with_the_known_ones(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"<\|end\|>.*got '<\|stop\|>'"):
        tokenizer.token_id("<|stop|>")


def test_added_control_tokens_take_the_ids_of_xgen_mm(shared_data: Path) -> None:
    tokenizer = _load("json", shared_data / "tokenizers")
    assert isinstance(tokenizer, HFTokenizer)
    extended = tokenizer.with_control_tokens(XGEN_EXTRA)
    assert [extended.token_id(name) for name in XGEN_EXTRA] == [32_011, 32_012, 32_013, 32_014]
    assert extended.vocab_size == 32_015
    assert extended.encode("<image>\nwhat?") == tokenizer.encode("<image>\nwhat?")
    # <image> does not swallow the line break behind it
    assert extended.encode_with_control("<image>\nwhat?") == [32_012, *tokenizer.encode("\nwhat?")]
    assert "<image>" not in tokenizer.control_ids


def test_trained_tokenizer_is_saved_as_tokenizer_json_and_read_back(tmp_path: Path) -> None:
    trained = train_tokenizer(TEXTS, 330, path=tmp_path / "tokenizer.json", spelled="[0-9A-Z]")
    again = HFTokenizer.from_file(tmp_path / "tokenizer.json")
    text = TEXTS[0] + " ✓ KX <|end|>"
    assert again.encode(text) == trained.encode(text)
    assert again.control_ids == trained.control_ids
    assert again.to_json() == trained.to_json()
    # any other program of the library reads the same ids
    assert Backend.from_file(str(tmp_path / "tokenizer.json")).encode(TEXTS[0]).ids == trained.encode(TEXTS[0])


def test_training_twice_gives_the_same_tokenizer() -> None:
    assert train_tokenizer(TEXTS, 330).to_json() == train_tokenizer(iter(TEXTS), 330).to_json()


def test_trained_ids_are_control_then_bytes_then_merges() -> None:
    trained = train_tokenizer(TEXTS, 330)
    assert list(trained.control_ids) == list(CONTROL_TOKENS)
    assert list(trained.control_ids.values()) == list(range(8))
    assert sorted(trained.token_bytes(token) for token in range(8, 264)) == [bytes([byte]) for byte in range(256)]
    assert all(len(trained.token_bytes(token)) > 1 for token in range(264, trained.vocab_size))
    assert trained.vocab_size <= 330


def test_a_word_has_the_same_tokens_at_the_start_and_inside() -> None:
    trained = train_tokenizer(TEXTS, 330)
    assert trained.encode("the red circle")[-1:] == trained.encode("circle")


def test_spelled_characters_stand_alone_even_where_the_text_repeats_them() -> None:
    trained = train_tokenizer(["sign KX7Q", "sign KX7Q 1234"] * 50, 300, spelled="[0-9A-Z]")
    pieces = [trained.token_bytes(token) for token in trained.encode("sign KX7Q 12")]
    assert pieces == [b" sign", b" ", b"K", b"X", b"7", b"Q", b" ", b"1", b"2"]
    merged = train_tokenizer(["sign KX7Q", "sign KX7Q 1234"] * 50, 300, spelled=r"\d")
    assert b"KX" in b"|".join(merged.token_bytes(token) for token in merged.encode("sign KX7Q"))


@pytest.mark.parametrize("length", [1, 2, 3, 5])
def test_max_token_length_bounds_merges(length: int) -> None:
    trained = train_tokenizer(TEXTS, 330, max_token_length=length)
    assert max(len(trained.token_bytes(token)) for token in range(trained.vocab_size)) == length


def test_control_names_in_the_training_text_do_not_become_reachable() -> None:
    # the trainer gives a merge that spells a control token that token's id; a name of letters only can be merged whole
    trained = train_tokenizer(["(stop)(stop)(end)"] * 60, 400, ["<|end|>", "stop"])
    merges = {"".join(pair) for pair in json.loads(trained.to_json())["model"]["merges"]}
    assert {"stop", "end"} <= merges, "the texts no longer provoke such a merge"
    assert trained.token_id("stop") == 1
    assert 1 not in trained.encode("(stop)")
    assert trained.decode(trained.encode("(stop)")) == "(stop)"
    assert trained.encode_with_control("(stop)") == [*trained.encode("("), 1, *trained.encode(")")]


def test_vocabulary_that_reaches_a_control_id_in_another_way_is_refused() -> None:
    spec = json.loads(train_tokenizer(TEXTS, 330).to_json())
    # a single character cannot be cut out of the merges
    spec["added_tokens"].append({**spec["added_tokens"][0], "content": "q", "id": spec["model"]["vocab"]["q"]})
    with pytest.raises(ValueError, match=r"expected no control token from plain text, got \['q'\]"):
        HFTokenizer(json.dumps(spec))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"type": "WordPiece", "vocab": {}}}, "expected a BPE model, got WordPiece"),
        ({"decoder": {"type": "WordPiece"}}, "expected a ByteLevel or a ByteFallback decoder"),
        ({"decoder": None}, "expected a ByteLevel or a ByteFallback decoder"),
    ],
    ids=["model", "decoder", "no decoder"],
)
def test_unhandled_tokenizer_files_raise(change: dict, message: str) -> None:
    spec = json.loads(train_tokenizer(TEXTS, 300).to_json())
    with pytest.raises(ValueError, match=message):
        HFTokenizer(json.dumps({**spec, **change}))


@pytest.mark.parametrize("text", ["", "{}", "[1]", "not json", '{"model": 3}'])
def test_files_that_are_no_tokenizer_raise(text: str) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.json: expected a tokenizer description"):
        HFTokenizer(text)
    with pytest.raises(ValueError, match=r"SentencePiece model: expected a \.model file"):
        SentencePieceTokenizer(text.encode())


def _without(spec: dict, *path: str | int) -> dict:
    """Take out the last key of the path."""
    spec = json.loads(json.dumps(spec))
    place = spec
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    return spec


def test_damaged_tokenizer_json_raises_value_error_wherever_it_is_damaged() -> None:
    spec = json.loads(train_tokenizer(TEXTS, 300).to_json())
    paths = [("model", "vocab"), ("model", "merges"), ("added_tokens", 0, "content"), ("added_tokens", 0, "id")]
    damaged = [_without(spec, *path) for path in (*paths, ("decoder", "decoders", 1, "content"), ("decoder", "type"))]
    damaged += [
        {**spec, "model": {**spec["model"], "merges": [["a", "not there"]]}},
        {**spec, "normalizer": {"type": "unheard of"}},
        {**spec, "added_tokens": 3},
        {**spec, "model": {**spec["model"], "vocab": {**spec["model"]["vocab"], "界": 299}}},
    ]
    for change in damaged:
        with pytest.raises(ValueError, match=r"tokenizer\.json: expected"):
            HFTokenizer(json.dumps(change))
    with pytest.raises(ValueError, match=r"tokenizer\.json: expected a tokenizer description"):
        HFTokenizer('{"model": ' + "[" * 100_000 + "]" * 100_000 + "}")


def test_truncation_and_padding_in_the_file_are_switched_off() -> None:
    trained = train_tokenizer(TEXTS, 330)
    backend = Backend.from_str(trained.to_json())
    backend.enable_truncation(4)
    backend.enable_padding(length=50)
    again = HFTokenizer(backend.to_str())
    for text in ("two", TEXTS[0]):
        assert again.encode(text) == trained.encode(text)
        assert again.encode_with_control(text) == trained.encode_with_control(text)
    assert again.to_json() == trained.to_json()


def test_control_id_on_a_piece_of_the_model_raises(shared_data: Path) -> None:
    path = shared_data / "tokenizers" / "llama-sentencepiece" / "tokenizer.model"
    with pytest.raises(ValueError, match=r"got \['<\|end\|>'\]"):
        SentencePieceTokenizer.from_file(path, {"<|end|>": 500})


def test_impossible_training_sizes_raise() -> None:
    with pytest.raises(ValueError, match="vocab_size: expected at least 264"):
        train_tokenizer(TEXTS, 263)
    with pytest.raises(ValueError, match="control_tokens: expected different names"):
        train_tokenizer(TEXTS, 300, ["<a>", "<a>"])


def test_tokenizer_json_is_readable_by_a_strict_reader() -> None:
    assert msgspec.json.decode(train_tokenizer(TEXTS, 300).to_json())["version"] == "1.0"
