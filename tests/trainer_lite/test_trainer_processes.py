"""Who is said to be lost, by what ranks have told the store; with real processes: `test_trainer_ranks.py`."""

import time

import pytest
import torch.distributed as dist

from trainer_lite.processes import rank_and_count
from trainer_lite.watchman import Watchman

TIMEOUT_S = 5.0


def pair() -> tuple[Watchman, Watchman]:
    """Two ranks' watchmen, who have seen each other's signs; nothing runs by itself."""
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    first, second = (Watchman(store, rank, 2, TIMEOUT_S) for rank in range(2))
    return first, second


def look(watchman: Watchman, other: Watchman, later_s: float) -> str:
    """What it finds so many seconds after both have last moved, both alive."""
    other._tell(1)
    watchman.read_signs()
    sign, _, _ = watchman._seen[other.rank]
    now_s = time.monotonic()
    watchman._answered_s = now_s
    watchman._moved_s = now_s - later_s
    watchman._seen[other.rank] = sign, now_s, now_s - later_s
    return watchman._look()


def test_a_rank_that_others_wait_for_in_an_exchange_is_behind_them() -> None:
    """Both are at the same place, one in its data and the other in the exchange behind them."""
    first, second = pair()
    for watchman in (first, second):
        watchman.at("step 3, data", False)
    first.go_on()
    assert look(first, second, TIMEOUT_S - 2) == ""
    assert "rank 1 (" in look(first, second, TIMEOUT_S + 1)
    assert "last seen at step 3, data, alive but without progress for 6.0 s" in look(first, second, TIMEOUT_S + 1)
    assert look(second, first, TIMEOUT_S + 1) == ""


@pytest.mark.parametrize(("is_bounded", "is_found"), [(True, True), (False, False)])
def test_ranks_that_stand_at_one_place_hang_where_that_is_bounded(is_bounded: bool, is_found: bool) -> None:
    """A batch is; loading a model, or writing a checkpoint, takes as long as it takes."""
    first, second = pair()
    for watchman in (first, second):
        watchman.at("step 3, batch 2", is_bounded)
    assert look(first, second, TIMEOUT_S - 2) == ""
    found = look(first, second, TIMEOUT_S + 1)
    assert ("step 3, batch 2, where rank 0 is too, both without progress for 6.0 s" in found) is is_found
    # Behind the batch it waits for the other.
    first.go_on()
    assert "alive but without progress" in look(first, second, TIMEOUT_S + 1)


def test_a_rank_that_says_nothing_is_not_called_alive() -> None:
    """Stopped as a whole: its last move lies behind its last sign, and so its hang would be found first."""
    first, second = pair()
    for watchman in (first, second):
        watchman.at("step 3, data", False)
    first.go_on()
    look(first, second, 0)
    now_s = time.monotonic()
    first._answered_s, first._moved_s = now_s, now_s - TIMEOUT_S
    sign, _, _ = first._seen[second.rank]
    first._seen[second.rank] = sign, now_s - TIMEOUT_S / 2, now_s - TIMEOUT_S
    assert first._look() == ""
    first._seen[second.rank] = sign, now_s - TIMEOUT_S, now_s - TIMEOUT_S
    assert "no sign of life for 5." in first._look()


def test_an_error_that_names_a_file_in_no_utf8_reaches_the_others() -> None:
    first, second = pair()
    assert first.explain(ValueError("a\udcff.tar is bad\nmore")) is None
    second.read_signs()
    assert second._look().startswith("rank 0: ended with ValueError: a\\udcff.tar is bad; all ranks end")


@pytest.mark.parametrize(("rank", "count"), [("one", "2"), ("2", "2"), ("0", "0"), ("-1", "2"), ("0", "")])
def test_an_environment_that_makes_no_sense_is_named(monkeypatch, rank: str, count: str) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", count)
    with pytest.raises(ValueError, match=rf"RANK, WORLD_SIZE: expected .*, got '{rank}' and '{count}'; start with"):
        rank_and_count()
