import json
import random
from collections import Counter
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import pytest

from interleave_data import (
    DataError,
    Encoder,
    InMemory,
    Packer,
    Plan,
    PlanConfig,
    Sample,
    Size,
    SkipCounter,
    SkipLimits,
    SkipReason,
    SkipSample,
    SourceConfig,
    Stream,
    TextPart,
    TooManySkips,
    Turn,
    open_source,
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


class Letters(Encoder[Encoded, tuple]):
    """One token a letter. Of seven samples one is bad when it is measured, and one when it is encoded."""

    def measure(self, sample, limit=None, /) -> Size:
        if int(sample.id) % 7 == 3:
            raise SkipSample(SkipReason.BAD_RECORD, "made up")
        return Size(len(self._text(sample, limit)), 0)

    def encode(self, sample, limit=None, /) -> Encoded:
        self.measure(sample)
        if int(sample.id) % 7 == 5:
            raise SkipSample(SkipReason.BROKEN_IMAGE, "made up")
        text = self._text(sample, limit)
        return Encoded(text, len(text))

    def collate(self, items, ids, /) -> tuple:
        return tuple(items)

    def _text(self, sample, limit) -> str:
        text = sample.turns[0].parts[0].text
        return text if limit is None else text[: limit.tokens]


class Raising(Letters):
    """Every sample makes trouble when it is measured."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def measure(self, sample, limit=None, /) -> Size:
        raise self.error


PLAN = {"ratios": (2, 1), "max_tokens": 90, "seed": 5, "look_ahead": 6}


def stream(encoder=None, sources=None, ranks=(0, 1), skips=None, **options) -> Stream:
    """The stream of these tests, with other settings of the plan."""
    sources = sources or [source("long", 40), source("short", 9)]
    cfg = PlanConfig(**(PLAN | options))
    skips = skips or SkipCounter(LENIENT)
    return Stream(sources, encoder or Letters(), cfg, rank=ranks[0], num_ranks=ranks[1], skips=skips)


def outline(batch) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return batch.ids, tuple(item.text for item in batch.data)


def is_good(number: int) -> bool:
    return number % 7 not in (3, 5)


def test_batches_hold_whole_samples_within_the_budget():
    for batch in islice(stream(), 50):
        assert batch.num_tokens == sum(len(item.text) for item in batch.data) <= 90
        for name, item in zip(batch.ids, batch.data, strict=True):
            assert item.text.startswith(name.replace("/", " ") + " ")
        assert batch.digest == samples_digest(batch.ids)


class Pictured(Letters):
    """Two of three samples have pictures, of one tile or two."""

    def measure(self, sample, limit=None, /) -> Size:
        return super().measure(sample, limit)._replace(tiles=int(sample.id) % 3)


def check_union_of_ranks(num_ranks: int, group_by_length: bool) -> None:
    options = {"ratios": None, "epochs": (3, 3), "max_tiles": 4, "group_by_length": group_by_length}
    seen, rounds, num_empty = [], [], 0
    for rank in range(num_ranks):
        batches = list(stream(Pictured(), ranks=(rank, num_ranks), **options))
        assert 0 < max(batch.num_tiles for batch in batches) <= 4
        rounds.append(len(batches))
        seen += [name for batch in batches for name in batch.ids]
        num_empty += sum(not batch.ids for batch in batches)
        if num_ranks > 1:
            assert [batch.number for batch in batches] == [rank + num_ranks * turn for turn in range(len(batches))]
    good = [f"long/{n}" for n in range(40) if is_good(n)] + [f"short/{n}" for n in range(9) if is_good(n)]
    assert sorted(seen) == sorted(good * 3)
    # In step, which takes packs of nothing: to leave the last round out would lose what else is in it.
    assert len(set(rounds)) == 1
    assert (num_empty > 0) == (num_ranks == 8) or num_ranks in (2, 4)


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("group_by_length", [False, True])
def test_ranks_together_see_every_good_sample_once_an_epoch(num_ranks, group_by_length):
    """(T28)"""
    check_union_of_ranks(num_ranks, group_by_length)


def test_ranks_that_leave_the_last_round_out_show(monkeypatch):
    """(T28): the control, as samplers do that drop what does not fill a round."""
    next_round = Plan.next_round

    def full_rounds(self, num_ranks):
        packs = next_round(self, num_ranks)
        return packs if all(pack.entries or pack.holes for pack in packs) else []

    monkeypatch.setattr(Plan, "next_round", full_rounds)
    with pytest.raises(AssertionError, match=r"^assert .'long/0'"):
        check_union_of_ranks(8, False)


def test_packs_do_not_depend_on_the_number_of_ranks():
    alone = {batch.number: outline(batch) for batch in islice(stream(), 40)}
    two = [{batch.number: outline(batch) for batch in islice(stream(ranks=(rank, 2)), 10)} for rank in (0, 1)]
    for mine in two:
        assert all(alone.get(number, ((), ())) == outlined for number, outlined in mine.items())
    assert not two[0].keys() & two[1].keys()


def test_state_of_two_ranks_is_continued_by_one_or_four():
    states = []
    for rank in (0, 1):
        data = stream(ranks=(rank, 2))
        for _ in range(5):
            next(data)
        states.append(data.state_dict()["plan"])
    # Taken behind a round, it is the same everywhere.
    assert states[0] == states[1]
    expected = {batch.number: outline(batch) for batch in islice(stream(), 60)}
    got = {}
    for rank in range(4):
        data = stream(ranks=(rank, 4))
        data.load_state_dict({"plan": states[0], "skips": {}})
        got |= {batch.number: outline(batch) for batch in islice(data, 3)}
    assert sorted(got) == list(range(10, 22))
    assert all(got[number] == expected.get(number, ((), ())) for number in got)


def test_same_seed_same_stream_and_other_seed_other_stream():
    first, again, other = ([outline(b) for b in islice(stream(seed=seed), 20)] for seed in (5, 5, 6))
    assert first == again != other


@pytest.mark.parametrize("cut", [0, 1, 2, 7, 19])
def test_stream_continues_exactly_from_its_state(cut):
    """(T2)"""
    whole = stream()
    expected = [(outline(batch), whole.skips.table()) for batch in islice(whole, 40)]
    before = stream()
    for _ in range(cut):
        next(before)
    state = json.dumps(before.state_dict())
    # What the first stream does afterwards must not matter.
    next(before)
    after = stream()
    after.load_state_dict(json.loads(state))
    assert [(outline(batch), after.skips.table()) for batch in islice(after, 40 - cut)] == expected[cut:]
    assert after.state_dict() != json.loads(state)


def test_state_survives_two_cuts_and_saving_at_once():
    """(T2): again and again within an epoch, each time saved at once"""
    whole = [outline(batch) for batch in islice(stream(), 12)]
    got, state = [], stream().state_dict()
    for _ in range(12):
        data = stream()
        data.load_state_dict(json.loads(json.dumps(state)))
        assert json.loads(json.dumps(data.state_dict())) == json.loads(json.dumps(state))
        got.append(outline(next(data)))
        state = data.state_dict()
    assert got == whole


def all_good(**options) -> Stream:
    """A stream of three good samples, one at a time, so that an epoch ends where a batch does."""
    return stream(
        sources=[source("few", 3)], **({"ratios": None, "epochs": (3,), "look_ahead": 1, "max_samples": 1} | options)
    )


@pytest.mark.parametrize("save_at_once", [False, True])
def test_state_at_the_very_end_of_an_epoch_goes_on_with_the_next(save_at_once):
    """(T2): twice, and at the end of the last one, behind which nothing comes and nothing begins anew."""
    whole = [batch.ids for batch in all_good()]
    before, ends = all_good(), []
    for cut in range(10):
        ends.append(before.epochs()["few"])
        after = all_good()
        after.load_state_dict(json.loads(json.dumps(before.state_dict())))
        if save_at_once:
            state, after = after.state_dict(), all_good()
            after.load_state_dict(json.loads(json.dumps(state)))
        assert [batch.ids for batch in after] == whole[cut:]
        list(islice(before, 1))
    assert len(whole) == 9
    assert {1.0, 2.0, 3.0} < set(ends)


def test_a_sampler_that_forgets_the_epoch_shows():
    """(T2): the control, a place within the epoch without the epoch."""
    whole = [batch.ids for batch in all_good()]
    before, after = all_good(), all_good()
    list(islice(before, 3))
    state: Any = json.loads(json.dumps(before.state_dict()))
    assert state["plan"]["mixture"]["drawn"] == [3]
    state["plan"]["mixture"]["drawn"] = [3 % 3]
    after.load_state_dict(state)
    assert [batch.ids for batch in after] != whole[3:]


def test_state_is_small():
    data = stream()
    for _ in range(60):
        next(data)
    assert len(json.dumps(data.state_dict())) < 1200


@pytest.mark.parametrize("forgotten", ["packer", "mixture"])
def test_a_state_with_a_part_left_out_does_not_continue_the_stream(forgotten):
    """(T1, T2): the controls"""
    # The comparison above must be able to fail.
    whole = [outline(batch) for batch in islice(stream(), 20)]
    before, after = stream(), stream()
    fresh: Any = stream().state_dict()["plan"]
    for _ in range(5):
        next(before)
    state: Any = before.state_dict()
    state["plan"] = state["plan"] | {forgotten: fresh[forgotten]}
    after.load_state_dict(state)
    assert [outline(batch) for batch in islice(after, 15)] != whole[5:]


def check_same_samples_when_resumed() -> None:
    rng = random.Random(3)
    whole = Counter(name for batch in stream(epochs=(4, 4)) for name in batch.ids)
    data, seen, num_waited = stream(epochs=(4, 4)), Counter(), 0
    while (batch := next(data, None)) is not None:
        seen.update(batch.ids)
        if rng.random() < 0.4:
            state = json.loads(json.dumps(data.state_dict()))
            num_waited += len(state["plan"]["packer"]["waiting"])
            data = stream(epochs=(4, 4))
            data.load_state_dict(state)
    assert num_waited > 10
    assert seen == whole


def test_packing_resumed_at_random_steps_sees_the_same_samples():
    """(T8): no sample is lost or doubled; that documents do not see each other is in test_blip3_model.py."""
    check_same_samples_when_resumed()


def test_a_packer_that_forgets_what_waits_shows(monkeypatch):
    """(T8): the control."""
    load = Packer.load_state_dict
    monkeypatch.setattr(Packer, "load_state_dict", lambda self, state, make: load(self, {**state, "waiting": []}, make))
    with pytest.raises(AssertionError, match="assert Counter"):
        check_same_samples_when_resumed()


def test_resume_reads_no_sample():
    class Counting(Letters):
        num_measured = 0

        def measure(self, sample, limit=None, /) -> Size:
            Counting.num_measured += 1
            return super().measure(sample, limit)

    data = stream(Counting())
    for _ in range(20):
        next(data)
    state = data.state_dict()
    Counting.num_measured = 0
    stream(Counting()).load_state_dict(state)
    assert Counting.num_measured == 0


def test_state_of_other_sources_is_refused_by_name():
    state = stream().state_dict()
    changed = stream(sources=[source("long", 40), source("short", 9, "new")])
    with pytest.raises(ValueError, match=r"got others or changed ones: short \(other contents or settings\);"):
        changed.load_state_dict(state)


def test_a_changed_source_begins_anew_where_that_is_accepted():
    """(T7): only its own place is lost."""
    before = stream(epochs=None)
    for _ in range(6):
        next(before)
    state = json.loads(json.dumps(before.state_dict()))
    waiting = [name for name, *_ in state["plan"]["packer"]["waiting"]]
    changed = stream(sources=[source("long", 40), source("short", 9, "new")])
    assert changed.load_state_dict(state, accept_data_change=True) == {"short": "other contents or settings"}
    now = json.loads(json.dumps(changed.state_dict()))["plan"]
    assert now["mixture"]["drawn"] == [state["plan"]["mixture"]["drawn"][0], 0]
    assert [name for name, *_ in now["packer"]["waiting"]] == [name for name in waiting if name[0] == 0]
    assert now["number"] == state["plan"]["number"]
    # The others go on as they would have: the samples of the unchanged source come in the same order.
    unbroken = [name for batch in islice(before, 60) for name in batch.ids if name.startswith("long")]
    resumed = [name for batch in islice(changed, 60) for name in batch.ids if name.startswith("long")]
    assert set(unbroken[:20]) & set(resumed[:20])


def test_sources_may_be_added_removed_and_moved_where_that_is_accepted():
    before = stream()
    for _ in range(6):
        next(before)
    state = json.loads(json.dumps(before.state_dict()))
    after = stream(sources=[source("fresh", 5), source("long", 40)])
    with pytest.raises(ValueError, match=r"fresh \(a new source\), short \(the source is gone\)"):
        after.load_state_dict(state)
    assert after.load_state_dict(state, accept_data_change=True) == {"fresh": "a new source"}
    drawn = state["plan"]["mixture"]["drawn"]
    now: Any = after.state_dict()["plan"]
    assert now["mixture"]["drawn"] == [0, drawn[0]]
    assert {name.split("/")[0] for batch in islice(after, 20) for name in batch.ids} == {"fresh", "long"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratios": (1, 1)}, r"mixture state: expected shares \[0.5, 0.5\], got"),
        ({"max_tokens": 91}, "packer state: expected max_tokens 91, got max_tokens 90"),
        ({"look_ahead": 5}, "packer state: expected look_ahead 5, got look_ahead 6"),
        ({"max_samples": 2}, "packer state: expected max_samples 2, got max_samples None"),
        ({"max_tiles": 2}, "packer state: expected max_tiles 2, got max_tiles None"),
        ({"too_long": "error"}, "plan state: expected too_long error, got too_long drop"),
        ({"epochs": (1, None)}, "mixture state: expected limits"),
        ({"ratio_unit": "tokens"}, "mixture state: expected unit tokens"),
    ],
)
def test_state_of_other_settings_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        stream(**change).load_state_dict(stream().state_dict())


def test_a_sample_that_is_not_as_long_as_planned_is_an_error():
    class Grown(Letters):
        def encode(self, sample, limit=None, /) -> Encoded:
            return Encoded("", 91)

    with pytest.raises(ValueError, match=r"\w+:\d+: expected \d+ tokens as planned, got 91"):
        next(stream(Grown()))


def test_skips_are_counted_by_source_and_reason():
    data = stream(ratios=None, epochs=(2, 4))
    list(data)
    # Of 0 to 39, six are 3 modulo 7 and five are 5; of 0 to 8, one and one.
    assert data.skips.table() == {
        "long": {"bad_record": 12, "broken_image": 10},
        "short": {"bad_record": 4, "broken_image": 4},
    }
    assert data.skips.by_reason() == {"bad_record": 16, "broken_image": 14}
    assert (data.skips.num_seen("long"), data.skips.num_seen("short")) == (80, 36)
    assert data.epochs() == {"long": 2.0, "short": 4.0}


class Repaired(Letters):
    """What is bad when it is encoded is good."""

    def encode(self, sample, limit=None, /) -> Encoded:
        text = self._text(sample, limit)
        return Encoded(text, len(text))


def check_bad_samples_shift_nothing(sources=None) -> None:
    for batch, whole in zip(islice(stream(None, sources), 40), islice(stream(Repaired()), 40), strict=True):
        assert list(batch.ids) == [name for name in whole.ids if is_good(int(name.split("/")[1]))]
    drawn = stream()
    for _ in range(100):
        next(drawn)
    first, second = (drawn.skips.num_seen(name) for name in ("long", "short"))
    assert first / (first + second) == pytest.approx(2 / 3, rel=0.01)


def test_bad_samples_shift_nothing():
    """(T13): the places of all others, and the ratios, are what they would be without them."""
    check_bad_samples_shift_nothing()


class Neighbours(InMemory):
    """Gives the next sample for one that is bad, as loaders do that fill a hole."""

    def __getitem__(self, index: int):
        sample = super().__getitem__(index)
        return sample if is_good(int(sample.id)) else self[(index + 1) % len(self)]


def test_a_loader_that_fills_holes_or_does_not_count_them_shows(monkeypatch):
    """(T13): the controls."""
    filled = [Neighbours(one.name, one.samples) for one in (source("long", 40), source("short", 9))]
    with pytest.raises(AssertionError, match="At index"):
        check_bad_samples_shift_nothing(filled)
    counted = SkipCounter.num_seen
    # Bad ones of one source alone.
    monkeypatch.setattr(
        SkipCounter, "num_seen", lambda self, name: counted(self, name) - sum(self.table()["long"].values())
    )
    with pytest.raises(AssertionError, match="comparison failed"):
        check_bad_samples_shift_nothing()


def check_same_skips_when_resumed(num_ranks: int) -> None:
    def run(cut):
        counted, numbers = Counter(), []
        for rank in range(num_ranks):
            data = stream(ranks=(rank, num_ranks), ratios=None, epochs=(3, 3))
            numbers.append([batch.number for batch in islice(data, cut)])
            after = stream(ranks=(rank, num_ranks), ratios=None, epochs=(3, 3))
            after.load_state_dict(json.loads(json.dumps(data.state_dict())))
            numbers[-1] += [batch.number for batch in after]
            counted.update(
                {(name, reason): n for name, row in after.skips.table().items() for reason, n in row.items()}
            )
        return counted, numbers

    whole, resumed = run(0), run(4)
    assert whole == resumed
    assert whole[0] == {
        ("long", "bad_record"): 18,
        ("long", "broken_image"): 15,
        ("short", "bad_record"): 3,
        ("short", "broken_image"): 3,
    }
    assert len({len(numbers) for numbers in whole[1]}) == 1


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_the_same_samples_are_skipped_whether_resumed_or_not(num_ranks):
    """(T13): on ranks, each counts the holes of its own packs, so together they count each hole once, and keep step."""
    check_same_skips_when_resumed(num_ranks)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_skips_that_a_resume_forgets_or_that_every_rank_counts_show(num_ranks, monkeypatch):
    """(T13): the controls."""
    with monkeypatch.context() as patched:
        patched.setattr(SkipCounter, "load_state_dict", lambda *_: None)
        with pytest.raises(AssertionError):
            check_same_skips_when_resumed(num_ranks)
    if num_ranks > 1:
        next_round = Plan.next_round

        def all_holes_for_all(self, num_ranks):
            packs = next_round(self, num_ranks)
            holes = tuple(hole for pack in packs for hole in pack.holes)
            return [replace(pack, holes=holes) for pack in packs]

        monkeypatch.setattr(Plan, "next_round", all_holes_for_all)
        with pytest.raises(AssertionError):
            check_same_skips_when_resumed(num_ranks)


def check_too_long_is_counted() -> None:
    skips = SkipCounter(LENIENT)
    dropping = stream(max_tokens=20, skips=skips, epochs=(1, 1))
    dropped = list(dropping)
    assert all(batch.num_tokens <= 20 for batch in dropped)
    cutting = stream(max_tokens=20, epochs=(1, 1), too_long="truncate-text")
    cut = [item for batch in cutting for item in batch.data]
    assert max(item.length for item in cut) == 20
    assert "too_long" not in cutting.skips.by_reason()
    # What the one leaves out the other cuts, but for those that are bad when they are decoded.
    long = [n for n in range(40) if len(f"long {n} ") + n * 37 % 23 > 20]
    short = [n for n in range(9) if len(f"short {n} ") + n * 37 % 23 > 20]
    assert skips.by_reason()["too_long"] == sum(n % 7 != 3 for n in long + short)
    assert cutting.skips.num_truncated == sum(is_good(n) for n in long + short)
    with pytest.raises(DataError, match=r"long/\d+: expected at most 20 tokens and any number of tiles, got 2\d and 0"):
        list(islice(stream(max_tokens=20, too_long="error"), 50))


def test_too_long_is_counted_cut_or_an_error():
    """(T18): each policy; that no image is cut is in test_blip3_measure.py."""
    check_too_long_is_counted()


def test_a_cut_or_drop_that_is_not_counted_shows(monkeypatch):
    """(T18): the controls."""
    with monkeypatch.context() as patched:
        patched.setattr(SkipCounter, "truncate", lambda *_: None)
        with pytest.raises(AssertionError):
            check_too_long_is_counted()
    skip = SkipCounter.skip
    monkeypatch.setattr(SkipCounter, "skip", lambda self, *what: what[1].reason == "too_long" or skip(self, *what))
    with pytest.raises((AssertionError, KeyError)):
        check_too_long_is_counted()


def test_errors_of_the_program_are_not_skipped():
    with pytest.raises(KeyError, match="oops"):
        next(stream(Raising(KeyError("oops"))))


def test_a_source_without_any_good_sample_ends_the_run():
    """(T12)"""
    counter = SkipCounter(SkipLimits(max_share=1.0, max_consecutive=100))
    spoilt = Raising(SkipSample(SkipReason.NOT_AN_IMAGE, "html"))
    with pytest.raises(
        TooManySkips, match=r"a: expected fewer than 100 .* got 100 \(not_an_image 100\).*was \d: not_an"
    ) as error:
        next(stream(spoilt, [source("a", 3)], ratios=None, skips=counter))
    assert isinstance(error.value.__cause__, SkipSample)


def test_share_of_skips_is_bounded_for_each_source():
    """(T12): the control, a good source and one at its limit, in the same run"""
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


def test_the_time_that_packs_were_waited_for_is_counted_and_what_happens_between_them_is_not(monkeypatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("interleave_data.stream.time.perf_counter", lambda: clock[0])

    class Slow(Letters):
        def collate(self, items, ids, /) -> tuple:
            clock[0] += 2.0
            return tuple(items)

    made = stream(Slow())
    for number in range(1, 4):
        next(made)
        assert made.waited_s == 2.0 * number
        clock[0] += 100.0


def test_a_run_of_skips_ends_with_a_good_sample_that_still_waits():
    """Holes are told with the pack that is being filled: good samples between them are counted later."""

    class EverySecond(Letters):
        def measure(self, sample, limit=None, /) -> Size:
            if int(sample.turns[0].parts[0].text.split()[1]) % 2:
                raise SkipSample(SkipReason.BAD_RECORD, "odd")
            return Size(1, 0)

    made = Plan([source("a", 40)], EverySecond().measure, PlanConfig(max_tokens=64, look_ahead=30))
    counter = SkipCounter(SkipLimits(max_share=1.0, max_consecutive=20))
    holes = [hole for pack in islice(made, 2) for hole in pack.holes]
    assert len(holes) > 20
    for hole in holes:
        counter.skip(hole.source, hole.skip, hole.follows_good)
    assert counter.by_reason() == {"bad_record": len(holes)}
    # Also over a save between them.
    again = Plan([source("a", 40)], EverySecond().measure, PlanConfig(max_tokens=64, look_ahead=30))
    again.load_state_dict(json.loads(json.dumps(made.state_dict())))
    assert [pack.holes for pack in islice(again, 3)] == [pack.holes for pack in islice(made, 3)]


def test_what_is_left_out_for_its_length_is_named_by_shard_and_is_not_bad(tmp_path):
    for shard, words in (("0", ["a", "b"]), ("1", ["c", "d" * 50])):
        (tmp_path / f"{shard}.jsonl").write_text("".join(f'{{"text": "{word}"}}\n' for word in words))
    found = open_source(SourceConfig(name="s", format="text", path=str(tmp_path / "*.jsonl")))
    heard: list[str] = []
    counter = SkipCounter(
        SkipLimits(max_share=0.0, min_seen=1), on_skip=lambda name, skip: heard.append(f"{name}/{skip}")
    )
    plan = Plan([found], lambda sample, _: Size(50 if "dd" in repr(sample) else 1, 0), PlanConfig(max_tokens=20))
    for hole in next(plan).holes[:1]:
        counter.skip(hole.source, hole.skip)
    assert heard == ["s/1.jsonl:1: too_long: expected at most 20 tokens, got 50"]
    with pytest.raises(TooManySkips):
        counter.skip("s", SkipSample(SkipReason.BAD_RECORD, "x"))
