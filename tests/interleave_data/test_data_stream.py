import json
from dataclasses import dataclass
from itertools import islice

import pytest

from interleave_data import (
    InMemory,
    Sample,
    SkipCounter,
    SkipLimits,
    SkipReason,
    SkipSample,
    Stream,
    TextPart,
    TooManySkips,
    Turn,
    samples_digest,
)

LENIENT = SkipLimits(max_share=0.9)


@dataclass(frozen=True)
class Encoded:
    text: str
    length: int


def source(name: str, size: int, version: str = "") -> InMemory:
    texts = [f"{name} {number} " + "x" * (number * 37 % 23) for number in range(size)]
    samples = [Sample(str(number), name, (Turn("document", (TextPart(text),)),)) for number, text in enumerate(texts)]
    return InMemory(name, samples, version=version)


def encode(sample) -> Encoded:
    """One token a letter; every seventh sample is bad."""
    if int(sample.id) % 7 == 3:
        raise SkipSample(SkipReason.BROKEN_IMAGE, "made up")
    text = sample.turns[0].parts[0].text
    return Encoded(text, len(text))


def stream(**options) -> Stream[Encoded]:
    settings = {"ratios": [2, 1], "max_tokens": 90, "seed": 5, "look_ahead": 6, "skips": SkipCounter(LENIENT)}
    return Stream([source("long", 40), source("short", 9)], encode, **(settings | options))


def outline(batch) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return batch.ids, tuple(item.text for item in batch.items)


def test_batches_hold_whole_samples_within_the_budget():
    for batch in islice(stream(), 50):
        assert batch.num_tokens == sum(len(item.text) for item in batch.items) <= 90
        for name, item in zip(batch.ids, batch.items, strict=True):
            assert item.text.startswith(name.replace("/", " ") + " ")
        assert batch.digest == samples_digest(batch.ids)


def test_every_good_sample_comes_once_an_epoch():
    seen = []
    data = stream(ratios=[40, 9])
    # 49 draws are one epoch of both; a few more fill the window that is still waiting.
    while data.mixture.epochs()["long"] < 3:
        seen.extend(next(data).ids)
    good = [f"long/{n}" for n in range(40) if n % 7 != 3] + [f"short/{n}" for n in range(9) if n % 7 != 3]
    assert {name: min(seen.count(name), 2) for name in good} == dict.fromkeys(good, 2)
    assert set(seen) == set(good)


def test_same_seed_same_stream_and_other_seed_other_stream():
    first, again, other = ([outline(b) for b in islice(stream(seed=seed), 20)] for seed in (5, 5, 6))
    assert first == again != other


@pytest.mark.parametrize("cut", [0, 1, 2, 7, 19])
def test_stream_continues_exactly_from_its_state(cut):
    whole = stream()
    expected = [(outline(batch), dict(whole.skips.by_reason())) for batch in islice(whole, 40)]
    before = stream()
    for _ in range(cut):
        next(before)
    state = json.dumps(before.state_dict())
    # What the first stream does afterwards must not matter.
    next(before)
    after = stream()
    after.load_state_dict(json.loads(state))
    assert [(outline(batch), dict(after.skips.by_reason())) for batch in islice(after, 40 - cut)] == expected[cut:]
    assert after.state_dict() != json.loads(state)


def test_state_survives_two_cuts_and_saving_at_once():
    whole = [outline(batch) for batch in islice(stream(), 12)]
    got, state = [], stream().state_dict()
    for _ in range(12):
        data = stream()
        data.load_state_dict(json.loads(json.dumps(state)))
        assert json.loads(json.dumps(data.state_dict())) == json.loads(json.dumps(state))
        got.append(outline(next(data)))
        state = data.state_dict()
    assert got == whole


def test_state_is_small():
    data = stream()
    for _ in range(60):
        next(data)
    assert len(json.dumps(data.state_dict())) < 1000


@pytest.mark.parametrize("forgotten", ["packer", "mixture"])
def test_a_state_with_a_part_left_out_does_not_continue_the_stream(forgotten):
    # The comparison above must be able to fail.
    whole = [outline(batch) for batch in islice(stream(), 20)]
    before, fresh, after = stream(), stream(), stream()
    for _ in range(5):
        next(before)
    after.load_state_dict(before.state_dict() | {forgotten: fresh.state_dict()[forgotten]})
    assert [outline(batch) for batch in islice(after, 15)] != whole[5:]


def test_state_of_other_sources_is_refused_by_name():
    state = stream().state_dict()
    changed = Stream([source("long", 40), source("short", 9, "new")], encode, ratios=[2, 1], max_tokens=90, seed=5)
    with pytest.raises(ValueError, match="got others or changed ones: short;"):
        changed.load_state_dict(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratios": [1, 1]}, r"mixture state: expected shares \[0.5, 0.5\], got"),
        ({"max_tokens": 91}, "packer state: expected max_tokens 91, got max_tokens 90"),
        ({"look_ahead": 5}, "packer state: expected look_ahead 5, got look_ahead 6"),
        ({"max_samples": 2}, "packer state: expected max_samples 2, got max_samples None"),
    ],
)
def test_state_of_other_settings_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        stream(**change).load_state_dict(stream().state_dict())


def test_waiting_sample_that_has_become_too_long_is_an_error():
    data = stream()
    for _ in range(4):
        next(data)

    def grown(sample):
        return Encoded("", 91)

    sources = [source("long", 40), source("short", 9)]
    after = Stream(sources, grown, ratios=[2, 1], max_tokens=90, seed=5, look_ahead=6)
    with pytest.raises(ValueError, match=r"waiting sample .*: expected at most 90 tokens, got 91"):
        after.load_state_dict(data.state_dict())


def test_waiting_sample_that_is_gone_on_resume_is_an_error():
    data = stream()
    for _ in range(4):
        next(data)

    def spoilt(sample):
        raise SkipSample(SkipReason.UNREADABLE_FILE, "gone")

    sources = [source("long", 40), source("short", 9)]
    after = Stream(sources, spoilt, ratios=[2, 1], max_tokens=90, seed=5, look_ahead=6)
    with pytest.raises(ValueError, match="expected the sample that waited when saved"):
        after.load_state_dict(data.state_dict())


def test_skips_are_counted_by_source_and_reason():
    data = stream()
    for _ in range(30):
        next(data)
    table = data.skips.table()
    assert set(table) == {"long", "short"}
    assert data.skips.by_reason() == {"broken_image": sum(row["broken_image"] for row in table.values())}
    epochs = data.mixture.epochs()
    assert (data.skips.num_seen("long"), data.skips.num_seen("short")) == (40 * epochs["long"], 9 * epochs["short"])


def test_too_long_is_counted_or_an_error():
    skips = SkipCounter(LENIENT)
    data = stream(max_tokens=20, skips=skips)
    for batch in islice(data, 5):
        assert batch.num_tokens <= 20
    assert skips.by_reason()["too_long"] > 0
    with pytest.raises(ValueError, match=r"long/\d+: expected at most 20 tokens"):
        list(islice(stream(max_tokens=20, too_long="error"), 50))


def test_errors_of_the_program_are_not_skipped():
    def broken(sample):
        raise KeyError("oops")

    with pytest.raises(KeyError, match="oops"):
        next(Stream([source("a", 3)], broken, max_tokens=10))


def test_a_source_without_any_good_sample_ends_the_run():
    def spoilt(sample):
        raise SkipSample(SkipReason.NOT_AN_IMAGE, "html")

    counter = SkipCounter(SkipLimits(max_share=1.0, max_consecutive=100))
    with pytest.raises(
        TooManySkips, match=r"a: expected fewer than 100 .* got 100 \(not_an_image 100\).*a:\d: not_an"
    ) as error:
        next(Stream([source("a", 3)], spoilt, max_tokens=10, skips=counter))
    assert isinstance(error.value.__cause__, SkipSample)


def test_share_of_skips_is_bounded_for_each_source():
    counter = SkipCounter(SkipLimits(max_share=0.01, max_consecutive=100, min_seen=1000))
    bad = SkipSample(SkipReason.BAD_RECORD, "x")
    for number in range(5000):
        counter.keep("good")
        # Exactly one in a hundred is still allowed.
        counter.skip("small", bad) if number % 100 == 99 else counter.keep("small")
    with pytest.raises(TooManySkips, match=r"small: expected at most 1\.00% bad samples, got 51 of 5001"):
        counter.skip("small", bad)


def test_first_skips_are_judged_on_a_thousand():
    counter = SkipCounter(SkipLimits(max_share=0.01, max_consecutive=100, min_seen=1000))
    bad = SkipSample(SkipReason.BAD_RECORD, "x")
    for _ in range(10):
        counter.skip("a", bad)
        counter.keep("a")
    with pytest.raises(TooManySkips, match="got 11 of 21"):
        counter.skip("a", bad)


def test_counter_continues_from_its_state():
    counter = SkipCounter(SkipLimits(max_share=1.0, max_consecutive=3))
    bad = SkipSample(SkipReason.TOO_LONG, "x")
    counter.keep("a")
    counter.skip("a", bad)
    counter.skip("a", bad)
    other = SkipCounter(SkipLimits(max_share=1.0, max_consecutive=3))
    other.load_state_dict(json.loads(json.dumps(counter.state_dict())))
    assert (other.table(), other.num_seen("a"), other.num_seen("b")) == ({"a": {"too_long": 2}}, 3, 0)
    with pytest.raises(TooManySkips, match="3 bad samples in a row"):
        other.skip("a", bad)
