import itertools
import json
from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interleave_data import EpochOrder, InMemory, Mixture, Sample, WindowOrder


def sources(**sizes: int) -> list[InMemory]:
    return [InMemory(name, [Sample(f"{n}", name, ()) for n in range(size)]) for name, size in sizes.items()]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 64, 97, 257])
def test_epoch_order_is_a_permutation(size):
    for seed, epoch in [(0, 0), (0, 1), (7, 123)]:
        order = EpochOrder(size, seed)
        assert sorted(order.index(epoch, position) for position in range(size)) == list(range(size))


def test_epoch_order_changes_with_seed_epoch_and_name():
    def first(order, epoch):
        return tuple(order.index(epoch, position) for position in range(50))

    orders = {
        first(EpochOrder(50, 0), 0),
        first(EpochOrder(50, 1), 0),
        first(EpochOrder(50, 0), 1),
        first(EpochOrder(50, 0, "captions"), 0),
    }
    assert len(orders) == 4


def test_epoch_order_is_a_pure_function():
    order = EpochOrder(1000, 3)
    forwards = [order.index(epoch, 17) for epoch in range(20)]
    backwards = [order.index(epoch, 17) for epoch in reversed(range(20))]
    assert forwards == backwards[::-1] == [EpochOrder(1000, 3).index(epoch, 17) for epoch in range(20)]


def test_epoch_order_is_the_same_on_every_machine():
    # Written down once: a change of these changes the order of every saved run.
    assert [EpochOrder(10, 0, "a").index(0, position) for position in range(10)] == GOLDEN_10
    assert [EpochOrder(10**12, 42).index(5, position) for position in range(3)] == GOLDEN_BIG


GOLDEN_10 = [9, 1, 7, 8, 0, 6, 3, 4, 2, 5]
GOLDEN_BIG = [767453296271, 684321316304, 329120641739]


@pytest.mark.parametrize("size", [3, 5])
def test_epoch_order_favours_no_place(size):
    order = EpochOrder(size, 0)
    epochs = 64 * size
    places = Counter(order.index(epoch, epoch % size) for epoch in range(epochs))
    # 64 are expected everywhere, give or take 8; 4 standard deviations.
    assert all(32 < places[index] < 96 for index in range(size))
    followers = Counter((order.index(epoch, 1) - order.index(epoch, 0)) % size for epoch in range(epochs))
    assert followers[0] == 0
    expected = epochs / (size - 1)
    assert all(abs(followers[step] - expected) < 5 * expected**0.5 for step in range(1, size))


@pytest.mark.parametrize(("position", "size"), [(-1, 5), (5, 5)])
def test_epoch_order_refuses_positions_outside(position, size):
    with pytest.raises(ValueError, match="position"):
        EpochOrder(size, 0).index(0, position)


def test_epoch_order_refuses_no_samples():
    with pytest.raises(ValueError, match="captions: expected at least one sample"):
        EpochOrder(0, 0, "captions")


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=6), st.integers(1, 200), st.integers(0, 300))
@settings(max_examples=30, deadline=None)
def test_mixture_keeps_ratios_over_any_stretch(ratios, length, skip):
    mixture = Mixture(sources(**{f"s{n}": 3 for n in range(len(ratios))}), ratios)
    draws = [next(mixture).source for _ in range(skip + length)]
    for source, ratio in enumerate(ratios):
        share = ratio / sum(ratios)
        # Never further than a draw or two from the exact share since the start, so at most twice that in a stretch.
        assert abs(draws.count(source) - share * len(draws)) < 2
        assert abs(draws[skip:].count(source) - share * length) < 4


def test_mixture_by_hand():
    mixture = Mixture(sources(a=10, b=10, c=10), [2, 1, 1])
    assert [next(mixture).source for _ in range(8)] == [0, 1, 2, 0, 0, 1, 2, 0]


def test_mixture_reads_each_sample_once_an_epoch():
    mixture = Mixture(sources(a=7, b=3), [1, 3])
    seen = {0: [], 1: []}
    for _ in range(28 * 3):
        draw = next(mixture)
        seen[draw.source].append(mixture.index(draw))
    for source, size in [(0, 7), (1, 3)]:
        for start in range(0, len(seen[source]), size):
            assert sorted(seen[source][start : start + size]) == list(range(size))
    assert mixture.epochs() == {"a": 3.0, "b": 21.0}


def test_mixture_order_of_a_source_ignores_the_others():
    alone, mixed = Mixture(sources(a=50)), Mixture(sources(b=5, a=50), [1, 1])
    mine = [alone.index(next(alone)) for _ in range(60)]
    theirs = [mixed.index(draw) for draw in (next(mixed) for _ in range(120)) if draw.source == 1]
    assert mine == theirs


def test_mixture_continues_from_its_state():
    whole, before = (Mixture(sources(a=7, b=3, c=11), [5, 1, 2], seed=4) for _ in range(2))
    expected = [next(whole) for _ in range(50)]
    assert [next(before) for _ in range(23)] == expected[:23]
    after = Mixture(sources(a=7, b=3, c=11), [5, 1, 2], seed=4)
    after.load_state_dict(json.loads(json.dumps(before.state_dict(), sort_keys=True)))
    assert [next(after) for _ in range(27)] == expected[23:]


def test_mixture_refuses_a_state_of_other_data():
    state = Mixture(sources(a=7, b=3)).state_dict()
    for other, what in [
        (Mixture(sources(a=7, c=3)), "sources"),
        (Mixture(sources(a=7)), "sources"),
        (Mixture(sources(b=3, a=7)), "sources"),
        (Mixture(sources(a=7, b=3), seed=1), "seed 1, got seed 0"),
        (Mixture(sources(a=7, b=3), [2, 1]), "shares"),
    ]:
        with pytest.raises(ValueError, match=f"mixture state: expected {what}"):
            other.load_state_dict(state)


def test_mixture_takes_a_state_of_the_same_ratios_in_other_numbers():
    Mixture(sources(a=7, b=3), [4, 2]).load_state_dict(Mixture(sources(a=7, b=3), [2, 1]).state_dict())


@pytest.mark.parametrize(
    ("sizes", "ratios", "match"),
    [
        ({}, None, "ratios"),
        ({"a": 1}, [1, 2], "ratios"),
        ({"a": 1, "b": 1}, [1, 0], "above 0"),
        ({"a": 1, "b": 1}, [1, float("inf")], "finite"),
        ({"a": 1, "b": 1}, [1, float("nan")], "finite"),
        ({"a": 1, "b": 0}, None, "b: expected at least one sample"),
    ],
)
def test_mixture_refuses(sizes, ratios, match):
    with pytest.raises(ValueError, match=match):
        Mixture(sources(**sizes), ratios)


def test_mixture_refuses_a_name_twice():
    with pytest.raises(ValueError, match="each name once"):
        Mixture([*sources(a=1), *sources(a=2)])


@pytest.mark.parametrize("size", [1, 7, 8, 64, 97, 203])
@pytest.mark.parametrize("window", [8, 24, 64])
def test_window_order_is_a_permutation(size, window):
    for seed, epoch in [(0, 0), (3, 1), (3, 2)]:
        order = WindowOrder(size, seed, window=window)
        assert sorted(order.index(epoch, position) for position in range(size)) == list(range(size))


def test_window_order_reads_few_blocks_at_a_time_and_each_once():
    size, window = 1003, 64
    for epoch in range(2):
        order = WindowOrder(size, 7, window=window)
        blocks = [order.index(epoch, position) // 8 for position in range(size)]
        # A reader that keeps what it has until it is through with it never holds more than a window's blocks.
        spans = {block: (blocks.index(block), len(blocks) - blocks[::-1].index(block)) for block in set(blocks)}
        assert max(end - start for start, end in spans.values()) <= window
        # And they are shuffled: neighbours in the order are seldom neighbours in the file, at both scales.
        assert sum(one == other for one, other in itertools.pairwise(blocks)) < size / 3
        assert len({abs(spans[block][0] - block * 8) for block in spans}) > 50


def test_window_order_of_all_samples_would_need_every_block():
    # The bound above must be able to fail.
    order = EpochOrder(1003, 7)
    blocks = [order.index(0, position) // 8 for position in range(1003)]
    assert max(len(blocks) - blocks[::-1].index(block) - blocks.index(block) for block in set(blocks)) > 500


def test_window_order_is_a_pure_function_and_changes_with_the_epoch():
    order = WindowOrder(1003, 3, window=64)
    places = [(epoch, position) for epoch in (0, 1, 2) for position in (0, 5, 501, 1002)]
    forwards = [order.index(*place) for place in places]
    assert [order.index(*place) for place in reversed(places)] == forwards[::-1]
    assert [WindowOrder(1003, 3, window=64).index(*place) for place in places] == forwards
    assert len({tuple(order.index(epoch, position) for position in range(20)) for epoch in range(4)}) == 4


def test_window_order_refuses_windows_of_nothing():
    with pytest.raises(ValueError, match="window: expected at least 8 samples, got 7"):
        WindowOrder(100, 0, window=7)


@dataclass(frozen=True)
class Blocked(InMemory):
    window: int | None = None


def test_mixture_takes_the_window_of_a_source():
    samples = [Sample(f"{n}", "a", ()) for n in range(1000)]
    mixture = Mixture([Blocked("a", samples, window=16)])
    first = [mixture.index(next(mixture)) for _ in range(16)]
    assert len({index // 2 for index in first}) == 8
    with pytest.raises(ValueError, match="windows"):
        Mixture([Blocked("a", samples)]).load_state_dict(mixture.state_dict())


@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=7), st.integers(0, 20_000))
@settings(max_examples=10, deadline=None)
def test_mixture_ratios_hold_within_a_thousandth_over_any_ten_thousand(ratios, skip):
    mixture = Mixture(sources(**{f"s{n}": 3 for n in range(len(ratios))}), ratios)
    for _ in range(skip):
        next(mixture)
    counts = Counter(next(mixture).source for _ in range(10_000))
    assert all(abs(counts[n] / 10_000 - ratio / sum(ratios)) < 0.001 for n, ratio in enumerate(ratios))


def test_random_choice_would_not_hold_the_ratios():
    # The bound above must be able to fail.
    import random

    rng = random.Random(0)
    counts = [sum(rng.random() < 0.5 for _ in range(10_000)) for _ in range(20)]
    assert max(abs(count / 10_000 - 0.5) for count in counts) > 0.005


def test_mixture_counts_ratios_in_tokens():
    # Samples of a are four times as long, so with equal shares of tokens b is drawn four times as often.
    lengths = {0: 40, 1: 10}
    mixture = Mixture(sources(a=10, b=10), [1, 1], unit="tokens")
    tokens, draws = Counter(), Counter()
    for _ in range(1000):
        draw = next(mixture)
        mixture.count_tokens(draw, lengths[draw.source])
        tokens[draw.source] += lengths[draw.source]
        draws[draw.source] += 1
        assert abs(tokens[0] - tokens[1]) <= 40
    assert (draws[0], draws[1]) == (200, 800)


def test_mixture_of_tokens_continues_from_its_state():
    def run(mixture, count):
        draws = []
        for _ in range(count):
            draw = next(mixture)
            mixture.count_tokens(draw, 1 + draw.number * 7 % 13 + 9 * draw.source)
            draws.append(draw)
        return draws

    whole, before, after = (Mixture(sources(a=7, b=3), [2, 3], unit="tokens") for _ in range(3))
    expected = run(whole, 60)
    run(before, 25)
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert run(after, 35) == expected[25:]
    forgetful = Mixture(sources(a=7, b=3), [2, 3], unit="tokens")
    forgetful.load_state_dict(before.state_dict() | {"amounts": [0, 0]})
    assert run(forgetful, 35) != expected[25:]


def test_mixture_leaves_a_source_at_its_bound_and_keeps_the_ratios_of_the_others():
    mixture = Mixture(sources(a=10, b=10, c=10), [2, 4, 1], epochs=[0.5, None, None])
    draws = [next(mixture).source for _ in range(1000)]
    assert draws.count(0) == 5
    behind = draws[draws.index(0) + 100 :]
    assert abs(behind.count(1) / len(behind) - 0.8) < 0.005


def test_mixture_with_bounds_ends_and_its_sources_end_together():
    mixture = Mixture(sources(a=30, b=10), epochs=[1, 2.5])
    draws = list(mixture)
    assert Counter(draw.source for draw in draws) == {0: 30, 1: 25}
    assert {draw.source for draw in draws[-3:]} == {0, 1}
    # Down-sampling keeps the first of the order; up-sampling takes each sample as often.
    assert sorted(mixture.index(draw) for draw in draws if draw.source == 0) == list(range(30))
    assert mixture.epochs() == {"a": 1.0, "b": 2.5}
    with pytest.raises(StopIteration):
        next(mixture)


@pytest.mark.parametrize("epochs", [[0, 1], [1, float("inf")], [1]])
def test_mixture_refuses_bounds(epochs):
    with pytest.raises(ValueError, match=r"epochs|ratios"):
        Mixture(sources(a=1, b=1), epochs=epochs)
