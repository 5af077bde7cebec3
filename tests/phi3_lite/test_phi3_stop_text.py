"""Stop sequences: found in the text, however it was cut into pieces."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phi3_lite import (
    FINISHED,
    GenerationStep,
    Phi3,
    Phi3Config,
    SamplingConfig,
    StopCutter,
    StopTexts,
    StreamDecoder,
    collect,
    cut_at_stop,
    generate,
    stream_text,
    train_tokenizer,
)


def _stream(pieces: list[str], stop_texts: list[str]) -> list[str]:
    cutter = StopCutter(stop_texts)
    return [*(cutter.push(piece) for piece in pieces), cutter.finish()]


def test_stop_text_that_straddles_pieces_is_cut_with_all_behind_it() -> None:
    assert _stream(["a cir", "cle\n", "User", ": b"], ["\nUser:"]) == ["a cir", "cle", "", "", ""]


def test_what_does_not_become_a_stop_text_comes_out_late() -> None:
    assert _stream(["1<", "<", "e", "2<<"], ["<<end"]) == ["1", "", "", "<<e2", "<<"]


def test_text_that_could_be_the_stop_text_is_not_held_longer_than_it_could() -> None:
    # of "abab" only the last two characters can begin "abc"
    assert _stream(["abab"], ["abc"]) == ["ab", "ab"]


def test_stop_text_that_is_complete_first_counts() -> None:
    assert cut_at_stop("xabc", ["abc", "b"]) == "xa"
    assert cut_at_stop("xabc", ["bc", "abc"]) == "x"


def test_no_stop_text_passes_everything_at_once() -> None:
    assert _stream(["a", "<"], []) == ["a", "<", ""]


@settings(max_examples=100, deadline=None, database=None, derandomize=True)
@given(
    pieces=st.lists(st.text("ab<", max_size=4), max_size=8),
    stop_texts=st.lists(st.text("ab<", min_size=1, max_size=4), max_size=3),
)
def test_cut_does_not_depend_on_the_pieces(pieces: list[str], stop_texts: list[str]) -> None:
    text = "".join(pieces)
    ends = [text.find(stop) + len(stop) for stop in stop_texts if stop in text]
    expected = text
    if ends:
        # of those that are complete first, the longest
        expected = text[: min(ends) - max(len(s) for s in stop_texts if text[: min(ends)].endswith(s))]
    assert "".join(_stream(pieces, stop_texts)) == expected == cut_at_stop(text, stop_texts)


@pytest.mark.parametrize("stop_texts", ["stop", ["a", ""]])
def test_stop_texts_that_are_no_list_of_strings_raise(stop_texts: object) -> None:
    with pytest.raises(ValueError, match="stop_texts: expected strings"):
        StopCutter(stop_texts)  # pyright: ignore[reportArgumentType]


def test_generation_ends_each_row_at_its_stop_text() -> None:
    tokenizer = train_tokenizer(["a b c d e f g h i j"] * 3, 300)
    cfg = Phi3Config(vocab_size=300, width=16, num_layers=1, num_heads=2, num_kv_heads=1, mlp_width=20, init_std=0.6)
    model = Phi3(cfg, generator=torch.Generator().manual_seed(3))
    inputs, bounds = torch.randn(6, 16), torch.tensor([0, 1, 3, 6], dtype=torch.int32)
    sampling = SamplingConfig(max_new_tokens=12)
    free = collect(generate(model, inputs, bounds, sampling))
    texts = [tokenizer.decode(row) for row in free]
    # bytes of the second row's tokens 3 and 4, across their border, so that it ends with the latter
    stop = next(
        text[at - 1 : at + 1]
        for text, at in ((texts[1], at) for at in range(2, len(texts[1])))
        if text[at - 1 : at + 1].isascii() and text.find(text[at - 1 : at + 1]) == at - 1
    )
    steps = generate(model, inputs, bounds, sampling, ends=StopTexts(tokenizer, [stop], 3))
    found = collect(steps)
    for row, tokens in enumerate(found):
        decoder, said = StreamDecoder(tokenizer), ""
        num_needed = len(free[row])
        for index, token in enumerate(free[row]):
            said += decoder.push(token)
            if stop in said:
                num_needed = index + 1
                break
        assert tokens == free[row][:num_needed]
    assert len(found[1]) < 12
    assert FINISHED not in found[1]
    assert cut_at_stop(tokenizer.decode(found[1]), [stop]) == texts[1][: texts[1].index(stop)]


def test_stream_text_stops_at_the_text_and_asks_for_no_more_tokens() -> None:
    tokenizer = train_tokenizer(["plain"], 280)
    left = iter([*tokenizer.encode("é a\nUser:bc"), tokenizer.token_id("<|end|>")])
    steps = (GenerationStep(torch.tensor([token]), torch.tensor([False])) for token in left)
    assert "".join(stream_text(steps, tokenizer, [tokenizer.token_id("<|end|>")], ["\nUser:"])) == "é a"
    assert tokenizer.decode(left) == "bc"


def test_stream_text_leaves_the_stop_token_out_and_gives_what_was_held_back() -> None:
    tokenizer = train_tokenizer(["plain"], 280)
    end = tokenizer.token_id("<|end|>")
    ids = [*tokenizer.encode("a\nUse"), end]
    steps = (GenerationStep(torch.tensor([token]), torch.tensor([token == end])) for token in ids)
    assert "".join(stream_text(steps, tokenizer, [end], ["\nUser:"])) == "a\nUse"
