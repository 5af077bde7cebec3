"""Data that are not what they were when a state was saved: refused by the shard's name, or begun anew (T7)."""

import json
import os
from itertools import islice
from pathlib import Path

import pytest

from interleave_data import (
    Encoder,
    PlanConfig,
    RecordSource,
    Size,
    SkipCounter,
    SkipLimits,
    SourceConfig,
    Stream,
    TextPart,
    open_source,
)
from interleave_data.changes import shard_changes, source_changes


class Letters(Encoder):
    """One token a letter of a document's text."""

    def measure(self, sample, limit=None, /) -> Size:
        return Size(len(_text(sample)), 0)

    def encode(self, sample, limit=None, /):
        return Item(_text(sample))

    def collate(self, items, ids, /) -> tuple:
        return tuple(item.text for item in items)


class Item:
    def __init__(self, text: str) -> None:
        self.text, self.length = text, len(text)


def _text(sample) -> str:
    return "".join(part.text for turn in sample.turns for part in turn.parts if isinstance(part, TextPart))


def write(path: Path, *texts: str) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    # As a later write would be, without waiting for the clock.
    count = len(list(path.parent.iterdir()))
    os.utime(path, ns=(count, path.stat().st_mtime_ns + count * 10**9))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A folder of three shards of five documents each; a second source lies beside it."""
    folder = tmp_path / "many"
    folder.mkdir()
    for shard in range(3):
        write(folder / f"{shard}.jsonl", *(f"document {shard} {n}" for n in range(5)))
    write(tmp_path / "other.jsonl", *(f"other {n}" for n in range(7)))
    return folder


def sources(shards: Path) -> list[RecordSource]:
    many = SourceConfig(name="many", format="text", path=str(shards / "*.jsonl"))
    other = SourceConfig(name="other", format="text", path=str(shards.parent / "other.jsonl"))
    return [open_source(many), open_source(other)]


def stream(opened: list[RecordSource]) -> Stream:
    cfg = PlanConfig(max_tokens=40, look_ahead=4, seed=3)
    return Stream(opened, Letters(), cfg, skips=SkipCounter(SkipLimits(max_share=0.5)))


def saved_after(data: Stream, num_batches: int) -> dict:
    list(islice(data, num_batches))
    # What a checkpoint gives back.
    return json.loads(json.dumps(data.state_dict()))


def remove(shards: Path) -> None:
    (shards / "1.jsonl").unlink()


def add(shards: Path) -> None:
    write(shards / "3.jsonl", "one more")


def edit(shards: Path) -> None:
    write(shards / "1.jsonl", *(f"document 1 {n}" for n in (0, 1, 7, 3, 4)))


def reorder(shards: Path) -> None:
    for name, target in (("0.jsonl", "3.jsonl"), ("0.jsonl.index", "3.jsonl.index")):
        (shards / name).rename(shards / target)


CHANGES = [
    (remove, "many (removed: 1.jsonl)"),
    (add, "many (added: 3.jsonl)"),
    (edit, "many (changed: 1.jsonl)"),
    (reorder, "many (removed: 0.jsonl; added: 3.jsonl)"),
]


def check_refused_by_name(state: dict, shards: Path, words: str) -> None:
    changed = stream(sources(shards))
    assert changed.changes(state) == [words]
    with pytest.raises(ValueError, match="got others or changed ones") as caught:
        changed.load_state_dict(state)
    assert f": {words}; restore the files" in str(caught.value)


@pytest.mark.parametrize(("change", "words"), CHANGES)
def test_a_changed_shard_is_refused_by_its_name(shards, change, words):
    """(T7)"""
    state = saved_after(stream(sources(shards)), 3)
    assert stream(sources(shards)).changes(state) == []
    stream(sources(shards)).load_state_dict(state)
    # The control: of data that have not changed, the check finds no refusal.
    with pytest.raises(AssertionError):
        check_refused_by_name(state, shards, words)
    change(shards)
    check_refused_by_name(state, shards, words)


@pytest.mark.parametrize(("change", "words"), CHANGES)
def test_a_changed_shard_begins_its_source_anew_where_that_is_accepted(shards, change, words):
    """(T7): that source alone; what is different is told."""
    state = saved_after(stream(sources(shards)), 5)
    change(shards)
    data = stream(sources(shards))
    assert data.load_state_dict(state, accept_data_change=True) == {"many": words[len("many (") : -1]}
    drawn = state["plan"]["mixture"]["drawn"]
    after = json.loads(json.dumps(data.state_dict()))
    assert after["plan"]["mixture"]["drawn"] == [0, drawn[1]]
    assert {source for (source, *_), *_ in after["plan"]["packer"]["waiting"]} <= {1}
    list(islice(data, 9))
    # And it goes on from there like any other: the new state is that of the new data.
    stream(sources(shards)).load_state_dict(json.loads(json.dumps(data.state_dict())))


def test_shards_listed_in_another_order_are_told_as_such(shards):
    """(T7): for whoever lists paths instead of giving a pattern."""
    paths = [str(shards / f"{n}.jsonl") for n in range(3)]
    layout = sources(shards)[0]
    before, after = (RecordSource(order, layout._read, name="many") for order in (paths, paths[::-1]))
    state = saved_after(stream([before]), 2)
    assert stream([after]).changes(state) == ["many (in another order: 2.jsonl, 1.jsonl, 0.jsonl)"]


def test_sources_listed_in_another_order_are_told_as_such(shards):
    """(T7)"""
    state = saved_after(stream(sources(shards)), 2)
    turned = stream(sources(shards)[::-1])
    assert turned.changes(state) == ["the sources in another order (other, many)"]
    with pytest.raises(ValueError, match=r"mixture state: expected sources \['other', 'many'\]"):
        turned.load_state_dict(state)
    # No sample of either is another one, so nothing begins anew.
    assert turned.load_state_dict(state, accept_data_change=True) == {}


def test_sources_that_came_or_went_or_have_other_settings_are_told_as_such(shards):
    many, other = sources(shards)
    saved = {"many": many.fingerprint, "gone": "1", "unknown": "2"}
    kept = {"many": many.shards, "other": other.shards}
    reader = many._read
    resettled = RecordSource([str(shards / f"{n}.jsonl") for n in range(3)], reader, name="many", settings={"x": 1})
    assert source_changes(saved, kept, [resettled, other]) == {
        "gone": "the source is gone",
        "many": "other settings of its format",
        "other": "a new source",
        "unknown": "the source is gone",
    }
    # A state from before shards were kept.
    assert source_changes({"other": "0"}, {}, [other]) == {"other": "other contents or settings"}


def test_many_changed_shards_are_told_in_few_words():
    saved = {f"{n}.tar": "a" for n in range(9)}
    assert shard_changes(saved, {}) == "removed: 0.tar, 1.tar, 2.tar, 3.tar, 4.tar and 4 more"
