"""What a sample takes up, told without its pixels, and samples that are cut to fit."""

from io import BytesIO

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from blip3_lite import EncodedSample, Processor, collate
from blip3_lite.presets import xgen_mm_config
from interleave_data import ImagePart, PreferenceSample, Sample, Size, SkipReason, SkipSample, TextPart, Turn

ANY = 1 << 30
CHANGES = [
    {},
    {"kind": "base"},
    {"kind": "anyres_fixed"},
    {"image_separator": "\n", "system_prompt": "be red"},
    {"chat": "plain", "has_leading_space": False},
    {"chat": "chatml", "kind": "anyres_fixed", "image_separator": "\n"},
]


def picture(size_px: tuple[int, int]) -> ImagePart:
    buffer = BytesIO()
    Image.fromarray(np.zeros((size_px[1], size_px[0], 3), dtype=np.uint8)).save(buffer, "BMP")
    return ImagePart(buffer.getvalue())


@pytest.fixture(scope="module", params=CHANGES, ids=str)
def processor(request, tiny_config, tiny_tokenizer) -> Processor:
    """Processors of each tiling, chat format and separator."""
    changes = dict(request.param)
    kind = changes.pop("kind", "anyres")
    tiling = msgspec.structs.replace(tiny_config.tiling, kind=kind)
    tokenizer = tiny_tokenizer.with_control_tokens(["<|im_start|>", "<|im_end|>"])
    lm = msgspec.structs.replace(tiny_config.lm, vocab_size=310)
    return Processor(msgspec.structs.replace(tiny_config, tiling=tiling, lm=lm, **changes), tokenizer)


TEXTS = st.text(alphabet="red blue?\n <|>é", max_size=12)
# Plain data, as the shape checker draws random numbers, which hypothesis has not in its strategies.
PARTS = st.lists(st.one_of(TEXTS, st.tuples(st.integers(1, 60), st.integers(1, 60))), max_size=4)
TURNS = st.one_of(PARTS.map(lambda parts: [parts]), st.lists(st.tuples(PARTS, TEXTS), min_size=1, max_size=3))


def built(turns: list) -> Sample:
    """A document of one list of parts, or a conversation of (parts, answer)."""

    def made(parts) -> tuple:
        return tuple(TextPart(part) if isinstance(part, str) else picture(part) for part in parts)

    if isinstance(turns[0], list):
        return Sample("x", "t", (Turn("document", made(turns[0])),))
    both = [(Turn("user", made(parts)), Turn("assistant", (TextPart(answer),))) for parts, answer in turns]
    return Sample("x", "t", tuple(turn for pair in both for turn in pair))


def outcome(call, *arguments) -> Size | EncodedSample | SkipReason:
    """What a call returns, or why it leaves the sample out."""
    try:
        return call(*arguments)
    except SkipSample as skip:
        return skip.reason


@given(turns=TURNS, data=st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_measured_is_encoded_whole_and_cut(processor, turns, data):
    sample = built(turns)
    size, encoded = outcome(processor.measure, sample), outcome(processor.encode, sample)
    if isinstance(size, SkipReason):
        assert encoded is size
        return
    assert isinstance(encoded, EncodedSample)
    assert isinstance(size, Size)
    whole = encoded
    assert Size(whole.length, len(whole.tiles)) == size
    limit = Size(data.draw(st.integers(1, size.tokens + 2)), data.draw(st.integers(0, size.tiles + 1)))
    cut_size, cut = outcome(processor.measure, sample, limit), outcome(processor.encode, sample, limit)
    if isinstance(cut_size, SkipReason):
        # Nothing could have been learnt of what is left.
        assert cut_size is cut is SkipReason.TOO_LONG
        return
    assert isinstance(cut, EncodedSample)
    assert Size(cut.length, len(cut.tiles)) == cut_size
    assert cut.length <= limit.tokens
    assert len(cut.tiles) <= limit.tiles
    # A prefix of the whole, in all its parts, that ends inside no image, and at the limit unless an image is why.
    assert torch.equal(cut.ids, whole.ids[: cut.length])
    assert torch.equal(cut.targets[:-1], whole.targets[: cut.length - 1])
    assert cut.num_targets > 0
    assert cut.tiles_per_image == whole.tiles_per_image[: len(cut.tiles_per_image)]
    assert torch.equal(cut.tiles, whole.tiles[: len(cut.tiles)])
    assert torch.equal(cut.image_index, whole.image_index[: len(cut.image_index)])
    counts = [processor.cfg.num_image_tokens(count) for count in cut.tiles_per_image]
    assert len(cut.image_index) == sum(counts)
    if cut.length < min(limit.tokens, whole.length):
        assert cut.length in whole.image_index.tolist()


def chat(*parts, answer="red") -> Sample:
    return Sample("x", "t", (Turn("user", parts), Turn("assistant", (TextPart(answer),))))


@pytest.mark.parametrize("times", [1, 10])
def test_a_sample_beyond_the_window_is_cut_at_its_end(tiny_model, tiny_processor, times):
    """(T18): longer than the window by one, and ten times as long."""
    sample = Sample("d", "t", (Turn("document", (picture((16, 16)), TextPart("red blue green " * 40))),))
    whole = tiny_processor.encode(sample)
    limit = Size(whole.length - 1 if times == 1 else whole.length // 10, ANY)
    cut = tiny_processor.encode(sample, limit)
    assert cut.length == limit.tokens
    assert torch.equal(cut.ids, whole.ids[: limit.tokens])
    # The token behind the cut is not there to be learnt; all others are.
    assert cut.targets[-1] == -100
    assert cut.num_targets == limit.tokens - len(cut.image_index)
    assert tiny_model.loss_sum(collate([cut])).isfinite()


@pytest.mark.parametrize("size_px", [(1, 1), (1, 100_000), (100_000, 1), (3000, 2)])
def test_a_sliver_takes_what_was_told_and_is_finite(tiny_model, tiny_processor, size_px):
    """(T14): the control of what was told is `measure` of another shape."""
    sample, other = (chat(picture(size), TextPart("what?")) for size in (size_px, (16, 40)))
    encoded = tiny_processor.encode(sample)
    assert tiny_processor.measure(sample) == (encoded.length, len(encoded.tiles))
    assert tiny_processor.cfg.num_image_tokens(len(encoded.tiles)) == len(encoded.image_index)
    assert tiny_processor.measure(sample) != tiny_processor.measure(other) or size_px == (1, 1)
    with torch.no_grad():
        assert tiny_model(collate([encoded])).isfinite().all()
        assert tiny_model.loss_sum(collate([encoded])).isfinite()


def check_no_image_is_cut(processor: Processor) -> None:
    parts = (TextPart("red red"), picture((16, 16)), TextPart("blue"), picture((40, 16)), TextPart("green"))
    sample = Sample("d", "t", (Turn("document", parts),))
    whole = processor.encode(sample)
    # 16 × 16 fits 1 × 2, so three tiles of three latents; 40 × 16 fits 3 × 1, so four.
    first, second = (int(whole.image_index[start]) for start in (0, 9))
    for tokens in range(second, second + 12):
        cut = processor.encode(sample, Size(tokens, ANY))
        assert (cut.length, cut.tiles_per_image) == (second, (3,))
    whole_second = processor.encode(sample, Size(second + 12, ANY))
    assert (whole_second.length, whole_second.tiles_per_image) == (second + 12, (3, 4))
    # The same border where tiles run out; without a tile, what is before the first image is left.
    assert processor.encode(sample, Size(ANY, 6)).length == second
    assert processor.encode(sample, Size(ANY, 2)).length == first


def check_two_hundred_images(processor: Processor) -> None:
    parts = tuple(part for _ in range(200) for part in (TextPart("red"), picture((16, 16))))
    sample = Sample("d", "t", (Turn("document", parts),))
    assert processor.measure(sample).tiles == 600
    cut = processor.encode(sample, Size(ANY, 32))
    assert (len(cut.tiles), len(cut.tiles_per_image)) == (30, 10)
    assert cut.length == int(processor.encode(sample).image_index[90])


def test_an_image_at_the_cut_goes_with_everything_behind_it(tiny_processor):
    """(T18, T16)"""
    check_no_image_is_cut(tiny_processor)


def test_of_two_hundred_images_as_many_are_kept_as_tiles_allow(tiny_processor):
    """(T16): that the cut is counted is in tests/interleave_data/test_data_stream.py, `check_too_long_is_counted`."""
    check_two_hundred_images(tiny_processor)


def test_a_cut_within_an_image_or_beyond_the_tiles_shows(tiny_processor, monkeypatch):
    """(T16, T18): the controls, a processor that cuts where the tokens end, and one that takes no heed of tiles."""
    cut = Processor._cut

    def at_the_token(self, encoded, counts, limit) -> tuple[int, int]:
        return limit.tokens, cut(self, encoded, counts, limit)[1]

    def whatever_the_tiles(self, encoded, counts, limit) -> tuple[int, int]:
        return cut(self, encoded, counts, Size(limit.tokens, ANY))

    for broken, checks in (
        (at_the_token, [check_no_image_is_cut]),
        (whatever_the_tiles, [check_no_image_is_cut, check_two_hundred_images]),
    ):
        monkeypatch.setattr(Processor, "_cut", broken)
        for check in checks:
            with pytest.raises(AssertionError):
                check(tiny_processor)


def test_an_answer_that_is_cut_away_leaves_nothing_to_learn(tiny_processor):
    sample = chat(TextPart("what colour is the square? " * 10))
    for call in (tiny_processor.measure, tiny_processor.encode):
        with pytest.raises(SkipSample, match="too_long: expected something to learn in the first 20 tokens"):
            call(sample, Size(20, ANY))


def test_pictures_behind_the_cut_are_not_decoded(tiny_processor):
    read = []

    def lazily(name: str, content: ImagePart) -> ImagePart:
        def read_it() -> bytes:
            read.append(name)
            return content.read()

        return ImagePart(read_it, size_px=(16, 16))

    parts = (lazily("a", picture((16, 16))), TextPart("red blue"), lazily("b", picture((16, 16))), TextPart("green"))
    tiny_processor.encode(Sample("d", "t", (Turn("document", parts),)), Size(12, ANY))
    assert read == ["a"]


def test_a_preference_pair_is_measured_with_both_answers_and_never_cut(tiny_processor):
    turns = (Turn("user", (picture((40, 16)), TextPart("what?"))),)
    sample = PreferenceSample("p", "t", turns, chosen="red", rejected="green blue")
    both = tiny_processor.encode_preference(sample)
    assert tiny_processor.measure(sample) == (sum(one.length for one in both), sum(len(one.tiles) for one in both))
    with pytest.raises(SkipSample, match=r"too_long: .* a preference pair is not cut"):
        tiny_processor.measure(sample, Size(10, ANY))


def test_text_that_was_measured_is_not_tokenised_again(tiny_processor, monkeypatch):
    sample = chat(TextPart("what?"))
    whole = tiny_processor.encode(sample)
    tiny_processor.measure(sample)
    monkeypatch.setattr(tiny_processor.template, "encode", None)
    assert torch.equal(tiny_processor.encode(sample).ids, whole.ids)
    # Once: what was kept is gone, so that nothing piles up.
    with pytest.raises(TypeError):
        tiny_processor.encode(sample)


def test_texts_are_kept_for_few_samples_and_only_while_these_live(tiny_config, tiny_tokenizer):
    processor = Processor(tiny_config, tiny_tokenizer)
    alive = [chat(TextPart(f"{n}")) for n in range(300)]
    for sample in alive:
        processor.measure(sample)
    assert len(processor._texts) == 256
    # A new sample may get the place in memory of one that is gone: it is recognised as another.
    for n in range(50):
        processor.measure(chat(TextPart(f"{n}" * 5)))
        other = chat(TextPart("what?"))
        assert processor.encode(other).length == processor.measure(other).tokens


def test_size_fingerprint_changes_with_all_that_sizes_depend_on(tiny_config, tiny_tokenizer):
    def fingerprint(tokenizer=tiny_tokenizer, **changes):
        return Processor(msgspec.structs.replace(tiny_config, **changes), tokenizer).size_fingerprint

    tiling = msgspec.structs.replace(tiny_config.tiling, kind="base")
    prints = [
        fingerprint(),
        fingerprint(tiling=tiling),
        fingerprint(image_separator="\n"),
        fingerprint(system_prompt="be red"),
        fingerprint(chat="plain"),
        fingerprint(has_leading_space=False),
        fingerprint(lm=msgspec.structs.replace(tiny_config.lm, vocab_size=310),
                    tokenizer=tiny_tokenizer.with_control_tokens(["<|new|>"])),
    ]  # fmt: skip
    assert len(set(prints)) == len(prints)
    assert fingerprint() == prints[0]


def test_a_processor_can_be_handed_to_another_process(tiny_processor):
    import pickle

    sample = chat(picture((40, 16)), TextPart("what?"))
    copy = pickle.loads(pickle.dumps(tiny_processor))
    assert torch.equal(copy.encode(sample).ids, tiny_processor.encode(sample).ids)
    assert copy.size_fingerprint == tiny_processor.size_fingerprint


def test_batches_travel_as_arrays(tiny_processor):
    from blip3_lite import PackedBatch, collate

    sample = tiny_processor.encode(chat(picture((40, 16)), TextPart("what?")))
    for value in (sample, collate([sample, sample])):
        arrays = value.to_arrays()
        assert not any(isinstance(part, torch.Tensor) for part in arrays.values())
        plain = {name: list(part) if isinstance(part, tuple) else part for name, part in arrays.items()}
        back = (EncodedSample if value is sample else PackedBatch).from_arrays(plain)
        for name in arrays:
            mine, theirs = getattr(value, name), getattr(back, name)
            if isinstance(mine, torch.Tensor):
                assert torch.equal(mine, theirs)
                assert mine.dtype == theirs.dtype
            else:
                assert mine == theirs


def test_base_views_of_a_model_with_bands_are_one_tile_an_image():
    cfg = xgen_mm_config("interleave").with_base_views()
    assert (cfg.tiling.kind, cfg.tile_grouping) == ("base", "tiles")
    assert cfg.num_image_tokens(1) == 128
