import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interleave_data import EpochOrder, InMemory, Mixture, Sample


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
