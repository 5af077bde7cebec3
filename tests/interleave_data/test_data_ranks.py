"""Ranks that tell each other what they left out: one order, one count, one state, for any number of them."""

import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from random import Random
from typing import Any

import pytest

from interleave_data import (
    Batch,
    DataError,
    Encoder,
    InMemory,
    PlanConfig,
    Sample,
    Size,
    SkipCounter,
    SkipLimits,
    SkipReason,
    SkipSample,
    Stream,
    TextPart,
    TooManySkips,
    Turn,
)


class Item:
    def __init__(self, length: int) -> None:
        self.length = length


class Words(Encoder[Item, list[str]]):
    """A sample of "pictures" is bad every fifth time, which only its decoding tells."""

    def measure(self, sample: Any, limit: Size | None = None, /) -> Size:
        return Size(Random(sample.id).randint(1, 16), 0)

    def encode(self, sample: Any, limit: Size | None = None, /) -> Item:
        if sample.id.startswith("pictures") and Random(f"bad {sample.id}").random() < 0.2:
            raise SkipSample(SkipReason.BROKEN_IMAGE, "drawn to be bad")
        return Item(self.measure(sample).tokens)

    def collate(self, items: Sequence[Item], ids: Sequence[str], /) -> list[str]:
        return list(ids)


class Meeting:
    """Threads in the place of processes."""

    def __init__(self, count: int) -> None:
        self.barrier, self.said = threading.Barrier(count, timeout=20), [b""] * count

    def exchange(self, rank: int, content: bytes) -> list[bytes]:
        self.said[rank] = content
        self.barrier.wait()
        heard = list(self.said)
        self.barrier.wait()
        return heard


class Far(InMemory):
    """Reads something again for each pack."""

    num_again = 0

    def read_ahead(self, indices: Iterable[int]) -> None:
        object.__setattr__(self, "num_again", self.num_again + 1)

    def take_retries(self) -> tuple[int, str]:
        taken = self.num_again
        object.__setattr__(self, "num_again", 0)
        return taken, "a cut"


def stream(
    rank: int = 0,
    count: int = 1,
    meeting: Meeting | None = None,
    max_share: float = 0.5,
    encoder: Encoder[Item, list[str]] | None = None,
) -> Stream[Any, Any]:
    sources = [
        Far(name, [Sample(f"{name}{i}", name, (Turn("assistant", (TextPart(name),)),)) for i in range(size)])
        for name, size in (("pictures", 90), ("text", 41))
    ]
    cfg = PlanConfig(ratios=(2, 1), max_tokens=16, look_ahead=8, seed=3, group_by_length=True, epochs=(1, 1))
    return Stream(
        sources,
        encoder or Words(),
        cfg,
        rank=rank,
        num_ranks=count,
        skips=SkipCounter(SkipLimits(max_share=max_share, min_seen=10)),
        exchange=None if meeting is None else lambda content: meeting.exchange(rank, content),
        keep_empty=True,
    )


def together(count: int, max_share: float = 0.5, retries: list[dict[str, int]] | None = None) -> list[Any]:
    """Each rank's batches and states, or its error. `retries`: gets what each counts as read again."""
    meeting, retries = Meeting(count), [] if retries is None else retries
    ended: list[Any] = [None] * count

    def run(rank: int) -> None:
        made = stream(rank, count, meeting, max_share)
        retries.append(made.skips.retries)
        batches: list[tuple[Batch[Any], dict[str, object]]] = []
        try:
            for batch in made:
                batches.append((batch, made.state_dict()))
            ended[rank] = batches
        except TooManySkips as error:
            ended[rank] = str(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ended


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_ranks_have_every_sample_once_in_the_order_of_one(count: int) -> None:
    """(T28), with (T13): bad samples among them, and packs in which nothing is left."""
    alone = stream()
    expected = [batch.ids for batch in alone]
    assert () in expected
    ended = together(count)
    got = [one[0].ids for turn in zip_longest(*ended) for one in turn]
    # The last round is filled up with packs of nothing.
    assert got[: len(expected)] == expected
    assert not any(got[len(expected) :])
    ids = [name for batch in got for name in batch]
    assert len(ids) == len(set(ids)) == 131 - alone.skips.by_reason()["broken_image"]
    for rank in ended:
        assert rank[-1][1]["skips"] == alone.state_dict()["skips"]
        assert [state for _, state in rank] == [state for _, state in ended[0]]


@pytest.mark.parametrize("count", [2, 4])
def test_what_any_rank_read_again_is_counted_on_each_and_logged_by_one(count: int, caplog) -> None:
    retries: list[dict[str, int]] = []
    num_packs = sum(len(batches) for batches in together(count, retries=retries))
    assert num_packs > 20
    assert retries == [{"pictures": num_packs, "text": num_packs}] * count
    # Each time that the number of a source has doubled.
    assert len(caplog.records) <= 2 * num_packs.bit_length()


def test_a_sample_that_one_rank_alone_cannot_read_ends_all_ranks() -> None:
    """Else that rank's packs would be others from there on: samples doubled here and lost there."""

    class Damaged(Words):
        def measure(self, sample: Any, limit: Size | None = None, /) -> Size:
            if sample.id == "text17":
                raise SkipSample(SkipReason.UNREADABLE_FILE, "on this host alone")
            return super().measure(sample, limit)

    meeting = Meeting(2)

    def run(rank: int) -> list[Any]:
        made = stream(rank, 2, meeting, encoder=Words() if rank == 0 else Damaged())
        batches: list[Any] = []
        with pytest.raises(DataError, match="same plan on all ranks, got another on 1 than on 0"):
            batches.extend(batch.ids for batch in made)
        return batches

    with ThreadPoolExecutor(2) as threads:
        ended = list(threads.map(run, range(2)))
    assert len(ended[0]) == len(ended[1])
    # Nothing came behind the difference.
    expected = [batch.ids for batch in stream()]
    assert [one for turn in zip(*ended, strict=True) for one in turn] == expected[: 2 * len(ended[0])]


@pytest.mark.parametrize("count", [2, 4])
def test_too_many_skips_end_all_ranks_with_the_same_words(count: int) -> None:
    words = set(together(count, max_share=0.05))
    assert len(words) == 1
    assert "expected at most 5.00% bad samples" in words.pop()


def test_a_state_of_two_ranks_is_gone_on_with_by_one() -> None:
    expected = [batch.ids for batch in stream()]
    _, state = together(2)[1][9]
    again = stream()
    again.load_state_dict(state)
    assert [batch.ids for batch in again] == expected[20:]
