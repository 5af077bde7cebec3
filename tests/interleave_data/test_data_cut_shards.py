"""A shard that was cut is never silent (T9): an error with its name and counts, or a loss that is counted."""

import io
import json
import pickle
import random
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import msgspec
import pytest
from PIL import Image

from interleave_data import (
    Encoder,
    ImagePart,
    PlanConfig,
    ShardError,
    Size,
    SkipCounter,
    SkipLimits,
    SkipReason,
    SkipSample,
    SourceConfig,
    Stream,
    TooManySkips,
    open_source,
)

NUM_SAMPLES = 5


class Item:
    length = 1


class Decoding(Encoder):
    """One token a sample, whose pictures are read and decoded only when it is encoded."""

    def measure(self, sample, limit=None, /) -> Size:
        return Size(1, len(sample.images()))

    def encode(self, sample, limit=None, /) -> Item:
        for image in sample.images():
            assert isinstance(image, ImagePart)
            image.decode()
        return Item()

    def collate(self, items, ids, /) -> None:
        return None


def jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = bytes(random.Random(seed).randrange(256) for _ in range(8 * 8 * 3))
    Image.frombytes("RGB", (8, 8), pixels).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    """Five pairs, each of a picture, its caption, and a record that nobody reads; indexed."""
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as writer:
        for number in range(NUM_SAMPLES):
            for suffix, data in (("jpg", jpeg(number)), ("txt", b"words"), ("json", b"{}" * 260)):
                info = tarfile.TarInfo(f"{number:02}.{suffix}")
                info.size = len(data)
                writer.addfile(info, io.BytesIO(data))
    captions(path)
    return path


def captions(path: Path, **more):
    return open_source(SourceConfig(name="pairs", format="caption-tars", path=str(path), **more))


def ends_of(path: Path, *suffixes: str) -> list[int]:
    """Where the last of a sample's members with these suffixes ends, sample by sample, as `tarfile` sees it."""
    ends: dict[str, int] = {}
    with tarfile.open(path) as tar:
        for member in tar.getmembers():
            key, _, suffix = member.name.partition(".")
            if suffix in suffixes:
                ends[key] = max(ends.get(key, 0), member.offset_data + member.size)
    return list(ends.values())


def read_epoch(source, max_share: float = 1.0) -> tuple[list[str], SkipCounter]:
    """Ids of an epoch, and what was counted."""
    skips = SkipCounter(SkipLimits(max_share=max_share, max_consecutive=1000, min_seen=1))
    stream = Stream([source], Decoding(), PlanConfig(max_tokens=3, epochs=(1,)), skips=skips)
    return [name for batch in stream for name in batch.ids], skips


def cut_places(num_bytes: int) -> list[int]:
    """Every border of a block, and forty places drawn at random."""
    return sorted({*range(0, num_bytes, 512), *random.Random(9).sample(range(num_bytes), 40)})


def check_refused(path: Path, whole_bytes: int, num_whole: int) -> None:
    with pytest.raises(ShardError) as caught:
        captions(path)
    expected = f"{path}: expected {whole_bytes} bytes with {NUM_SAMPLES} samples as indexed, "
    assert f"{expected}got {path.stat().st_size} bytes with {num_whole} of them whole; " in str(caught.value)


def test_a_cut_shard_is_refused_with_its_name_and_counts(tar):
    """(T9)"""
    whole, ends = tar.read_bytes(), ends_of(tar, "jpg", "txt", "json")
    for place in cut_places(len(whole)):
        tar.write_bytes(whole[:place])
        check_refused(tar, len(whole), sum(end <= place for end in ends))
    # The controls: `tarfile` alone is silent at a border between members, and the check fails on a whole shard.
    tar.write_bytes(whole[: -(-ends[1] // 512) * 512])
    with tarfile.open(tar) as reader:
        assert len(reader.getmembers()) == 6
    tar.write_bytes(whole)
    with pytest.raises(pytest.fail.Exception):
        check_refused(tar, len(whole), NUM_SAMPLES)


def lost_of(source) -> set[int]:
    """The samples that cannot be read."""
    lost = set()
    for index in range(len(source)):
        try:
            source[index].images()[0].decode()
        except SkipSample:
            lost.add(index)
    return lost


def check_loss(path: Path, whole_ids: list[str], needed: list[int], *, source=None) -> None:
    """All that is whole is given out at its place in the order, all else is counted, each once."""
    place = path.stat().st_size
    ids, skips = read_epoch(source or captions(path, cut_shards="skip"))
    is_kept = {f"pairs/0.tar:{number:02}": end <= place for number, end in enumerate(needed)}
    assert ids == [name for name in whole_ids if is_kept[name]]
    num_lost = sum(not kept for kept in is_kept.values())
    assert Counter(skips.by_reason()) == Counter({"unreadable_file": num_lost} if num_lost else {})
    assert skips.num_seen("pairs") == NUM_SAMPLES


def test_what_a_cut_shard_lost_is_counted_exactly_where_that_is_asked_for(tar, caplog):
    """(T9): tolerant mode."""
    whole, needed = tar.read_bytes(), ends_of(tar, "jpg", "txt")
    fingerprint = captions(tar).fingerprint
    whole_ids, _ = read_epoch(captions(tar))
    assert len(whole_ids) == NUM_SAMPLES
    for number, place in enumerate(cut_places(len(whole))):
        tar.write_bytes(whole[:place])
        assert lost_of(captions(tar, cut_shards="skip")) == {row for row, end in enumerate(needed) if end > place}
        if number % 9 == 0:
            check_loss(tar, whole_ids, needed)
    # It is the source that it was, so a run that was saved before goes on in it; and the log tells.
    assert captions(tar, cut_shards="skip").fingerprint == fingerprint
    tar.write_bytes(whole[: needed[1]])
    caplog.clear()
    source = captions(tar, cut_shards="skip")
    # As it goes to a worker.
    assert lost_of(pickle.loads(pickle.dumps(source))) == lost_of(source) == {2, 3, 4}
    # The record behind them is lost too, which nobody reads.
    assert "0.tar is cut: 4 of its 5 samples are not whole; what cannot be read is skipped" in caplog.text


def test_a_loss_that_is_not_counted_is_seen(tar, monkeypatch):
    """(T9): the control of the test above, with a counter that forgets and a reader that is silent."""
    whole, needed = tar.read_bytes(), ends_of(tar, "jpg", "txt")
    whole_ids, _ = read_epoch(captions(tar))
    tar.write_bytes(whole[: -(-ends_of(tar, "json")[1] // 512) * 512])
    with monkeypatch.context() as patched:
        patched.setattr(SkipCounter, "skip", lambda *_: None)
        with pytest.raises(AssertionError):
            check_loss(tar, whole_ids, needed)
    # As readers do that end quietly at a cut: what is left, indexed as if it were all.
    with tarfile.open(tar) as reader, tarfile.open(tar.with_name("1.tar"), "w") as writer:
        for member in reader.getmembers():
            writer.addfile(member, reader.extractfile(member))
    tar.with_name("1.tar").replace(tar)
    tar.with_name("0.tar.index").unlink()
    with pytest.raises(AssertionError):
        check_loss(tar, whole_ids, needed, source=captions(tar))


def test_the_limits_on_skips_hold_for_what_was_cut_off(tar):
    whole = tar.read_bytes()
    tar.write_bytes(whole[: len(whole) // 3])
    with pytest.raises(TooManySkips, match=r"expected at most 1\.00% bad samples.*unreadable_file"):
        read_epoch(captions(tar, cut_shards="skip"), max_share=0.01)


def test_only_a_shard_that_was_indexed_whole_and_is_shorter_now_is_tolerated(tar):
    whole = tar.read_bytes()
    tar.write_bytes(whole + bytes(512))
    with pytest.raises(ShardError, match="5 of them whole"):
        captions(tar, cut_shards="skip")
    # Nobody knows how much was in it.
    tar.with_name("0.tar.index").unlink()
    tar.write_bytes(whole[: len(whole) // 3])
    with pytest.raises(ShardError, match=r"expected a whole tar archive, got \d+ members up to byte"):
        captions(tar, cut_shards="skip")


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_rows_that_were_cut_off_are_counted(tmp_path, suffix):
    """(T9): other containers; of parquet nothing is left, as what says how to read it is at its end."""
    path = tmp_path / f"0.{suffix}"
    rows = [{"text": f"text {number}"} for number in range(5)]
    if suffix == "parquet":
        arrow = pytest.importorskip("pyarrow")
        arrow.parquet = pytest.importorskip("pyarrow.parquet")
        arrow.parquet.write_table(arrow.Table.from_pylist(rows), path, row_group_size=1)
    elif suffix == "json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = SourceConfig(name="texts", format="text", path=str(path))
    open_source(cfg)
    whole = path.read_bytes()
    place = whole.index(b"text 3") if suffix != "parquet" else len(whole) - 4
    path.write_bytes(whole[:place])
    num_whole = 0 if suffix == "parquet" else 3
    with pytest.raises(ShardError, match=rf"with 5 samples as indexed, got {place} bytes with {num_whole} of them"):
        open_source(cfg)
    ids, skips = read_epoch(open_source(msgspec.structs.replace(cfg, cut_shards="skip")))
    assert sorted(ids) == [f"texts/0.{suffix}:{row}" for row in range(num_whole)]
    assert skips.by_reason() == {"unreadable_file": 5 - num_whole}


def test_a_real_shard_that_was_cut_loses_what_is_counted(tmp_path, shared_data):
    """(T9): a published kind of shard."""
    path = tmp_path / "0.tar"
    shutil.copy(shared_data / "captions/000001.tar", path)
    whole_bytes, num_samples = path.stat().st_size, len(captions(path))
    ends = ends_of(path, "jpg", "txt")
    assert len(ends) == num_samples
    place = whole_bytes // 3
    with path.open("r+b") as file:
        file.truncate(place)
    with pytest.raises(ShardError, match=rf"with {num_samples} samples as indexed, got {place} bytes"):
        captions(path)
    source = captions(path, cut_shards="skip")
    reasons = Counter()
    for index in range(num_samples):
        try:
            source[index].images()[0].read()
        except SkipSample as skip:
            reasons[skip.reason] += 1
    assert reasons == {SkipReason.UNREADABLE_FILE: sum(end > place for end in ends)}
