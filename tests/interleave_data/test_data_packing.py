import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interleave_data import Packer, SkipReason, SkipSample, pack

LENGTHS = st.lists(st.integers(1, 20), max_size=80)


def test_pack_by_hand():
    # 5 opens the first pack, 4 is the longest that fits beside it, then 1; then 3 opens, 6 fits and one 1 more.
    assert pack([5, 3, 6, 4, 1, 1], 10) == [[0, 3, 4], [1, 2, 5]]


def test_pack_window_of_one_takes_samples_as_they_come():
    assert pack([6, 5, 4, 2, 2], 10, look_ahead=1) == [[0], [1, 2], [3, 4]]


def test_pack_of_short_samples_is_filled_beyond_the_window():
    # A window of two would end each pack at two samples; a third and fourth are looked at while all fit.
    assert pack([1] * 9 + [4], 4, look_ahead=2) == [[0, 1, 2, 3], [4, 5, 6, 7], [8], [9]]
    bounded = Packer(9, max_tiles=2, look_ahead=1)
    assert list(bounded.packs((number, 1) for number in range(3))) == [[0, 1, 2]]
    for number in range(3):
        bounded.push(number, 1, tiles=1)
    assert bounded.is_ready


@given(LENGTHS, st.integers(20, 60), st.integers(1, 16))
@settings(max_examples=60, deadline=None)
def test_pack_loses_nothing_and_keeps_the_budget(lengths, max_tokens, look_ahead):
    packs = pack(lengths, max_tokens, look_ahead=look_ahead)
    assert sorted(index for indices in packs for index in indices) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in indices) <= max_tokens for indices in packs)
    # The first of a pack is the oldest that waited, so nobody is overtaken for ever.
    firsts = [indices[0] for indices in packs]
    left = set(range(len(lengths)))
    for first, indices in zip(firsts, packs, strict=True):
        assert first == min(left)
        left -= set(indices)


def test_packer_keeps_a_budget_of_tiles_beside_that_of_tokens():
    packer = Packer(10, max_tiles=4, look_ahead=5)
    for name, size in {"a": (4, 2), "b": (5, 3), "c": (3, 2), "d": (3, 0), "e": (1, 1)}.items():
        packer.push(name, *size)
    # b would fill the tokens best, but not beside a's tiles; c does, and takes the last tile, so that e must wait.
    assert [packer.pop(), packer.pop()] == [["a", "c", "d"], ["b", "e"]]
    with pytest.raises(SkipSample, match="expected at most 4 tiles, got 5"):
        packer.push("f", 1, 5)


def test_packer_groups_samples_of_like_length():
    packer = Packer(12, look_ahead=6, group_by_length=True)
    for length in (3, 9, 4, 8, 2, 3):
        packer.push(length, length)
    assert [packer.pop(), packer.pop(), packer.pop()] == [[3, 3, 4, 2], [9], [8]]


def test_pack_fills_well():
    rng = random.Random(0)
    lengths = [min(2048, int(rng.lognormvariate(5.5, 0.8))) + 1 for _ in range(2000)]
    packs = pack(lengths, 4096)
    # The last few packs are made from what is left over, so they are not judged.
    full = packs[:-5]
    assert sum(lengths[index] for indices in full for index in indices) / (4096 * len(full)) > 0.99


def test_packer_max_samples_closes_a_pack():
    packer = Packer(100, look_ahead=3, max_samples=3)
    packs = list(packer.packs((number, number % 5 + 1) for number in range(7)))
    assert [sorted(numbers) for numbers in packs] == [[0, 1, 2], [3, 4, 5], [6]]


@given(LENGTHS, st.integers(0, 80))
@settings(max_examples=40, deadline=None)
def test_packer_continues_from_its_state(lengths, cut):
    def run(packer, items):
        packs = []
        for item in items:
            packer.push(item, lengths[item])
            if packer.is_ready:
                packs.append(packer.pop())
        return packs

    cut = min(cut, len(lengths))
    expected = run(Packer(25, look_ahead=4), range(len(lengths)))
    before = Packer(25, look_ahead=4)
    packs = run(before, range(cut))
    after = Packer(25, look_ahead=4)
    after.load_state_dict(before.state_dict(lambda item: item), lambda item, _size: item)
    assert packs + run(after, range(cut, len(lengths))) == expected


def test_packer_refuses_what_fits_no_pack():
    packer = Packer(10)
    packer.push("just fits", 10)
    for length in (11, 100):
        with pytest.raises(SkipSample) as caught:
            packer.push("too long", length)
        assert caught.value.reason == SkipReason.TOO_LONG
    with pytest.raises(ValueError, match="length"):
        packer.push("empty", 0)
    assert len(packer) == 1
    assert packer.pop() == ["just fits"]
    with pytest.raises(ValueError, match="got none"):
        packer.pop()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1, "look_ahead": 0}, "look_ahead"),
        ({"max_tokens": 1, "look_ahead": 129}, "look_ahead"),
        ({"max_tokens": 1, "look_ahead": 4, "max_samples": 5}, "max_samples"),
        ({"max_tokens": 1, "max_samples": 0}, "max_samples"),
        ({"max_tokens": 1, "max_tiles": 0}, "max_tiles"),
    ],
)
def test_packer_refuses(options, match):
    with pytest.raises(ValueError, match=match):
        Packer(**options)
