"""Indexes beside shards: what they hold, that they are whole or absent, and that a changed shard is noticed."""

import errno
import fcntl
import io
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from interleave_data import (
    Mixture,
    RecordSource,
    ShardError,
    SkipReason,
    SkipSample,
    SourceConfig,
    TextPart,
    open_source,
    shard_changes,
)
from interleave_data import containers as containers_module
from interleave_data.containers import make_index, open_shard
from interleave_data.formats import FORMATS
from interleave_data.images import open_image
from interleave_data.index_file import Lengths, ShardIndex, fresh_header, map_arrays, read_metadata, write_arrays
from interleave_data.samples import Size


def png(width: int, height: int, seed: int = 0, fmt: str = "PNG", **more) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, fmt, **more)
    return buffer.getvalue()


def write_tar(path: Path, entries) -> Path:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in entries:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def pair_shard(path: Path, count: int = 3, seed: int = 0) -> Path:
    entries = []
    for n in range(count):
        entries += [(f"{n}.png", png(5 + n, 4, seed + n)), (f"{n}.txt", f"caption {seed + n}".encode())]
    return write_tar(path, entries)


def pairs(paths, **more) -> RecordSource:
    reader = FORMATS["captions"].reader(caption="txt")
    return RecordSource([str(path) for path in paths], reader, name="pairs", settings={"caption": "txt"}, **more)


def texts(path: Path, lines) -> Path:
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


def documents(paths, **more) -> RecordSource:
    return RecordSource([str(path) for path in paths], FORMATS["text"].reader(), name="texts", **more)


def said(source, index: int) -> str:
    return source[index].turns[0].parts[-1].text


def skip_of(source, index: int) -> SkipSample:
    with pytest.raises(SkipSample) as caught:
        source[index]
    return caught.value


def test_arrays_file_is_read_by_safetensors_and_gives_back_what_was_written(tmp_path):
    from safetensors.numpy import load_file

    arrays = {
        "a": np.arange(7, dtype=np.int64),
        "none": np.empty((0, 2), np.int32),
        "b": np.array([[1, -2]], np.int32),
        "c": np.array([3], np.uint8),
    }
    path = str(tmp_path / "x.index")
    write_arrays(path, {"version": "é"}, arrays)
    assert read_metadata(path) == {"version": "é"}
    for found in (map_arrays(path), load_file(path)):
        assert {name: (array.dtype, array.tolist()) for name, array in found.items()} == {
            name: (array.dtype, array.tolist()) for name, array in arrays.items()
        }
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.index"]


def test_damaged_arrays_file_is_refused_wherever_it_is_cut(tmp_path):
    path = tmp_path / "x.index"
    write_arrays(str(path), {}, {"a": np.arange(5, dtype=np.int64), "b": np.arange(3, dtype=np.uint8)})
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ShardError, match=r"x\.index: expected a whole index"):
            map_arrays(str(path))
    path.write_bytes(whole + b"\0")
    with pytest.raises(ShardError, match="whole index"):
        map_arrays(str(path))
    for old, new in [(b"I64", b"I63"), (b'"shape":[5]', b'"shape":[6]'), (b"[0,40]", b"[8,48]"), (b"[5]", b"[-5]")]:
        path.write_bytes(whole.replace(old, new))
        with pytest.raises(ShardError, match="whole index"):
            map_arrays(str(path))
    path.write_bytes(whole)
    assert map_arrays(str(path))["a"].tolist() == [0, 1, 2, 3, 4]


def test_writer_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "x.index"
    write_arrays(str(path), {}, {"a": np.arange(5)})
    before = path.read_bytes()

    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        write_arrays(str(path), {}, {"a": np.arange(9)})
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.index"]


def test_tar_index_equals_a_walk_by_tarfile(tmp_path):
    entries = [
        ("d/a.jpg", png(8, 6, 1, "JPEG")),
        ("d/a.0.PNG", png(3, 2)),
        ("d/a.json", b"{}"),
        ("d/a.seg.png", b"passed over"),
        ("b.txt", b"t"),
        ("b.tiff", png(7, 5, 2, "TIFF", save_all=True, append_images=[Image.new("RGB", (2, 9))])),
        ("c.webp", b"no picture"),
        ("README", b""),
    ]
    path = write_tar(tmp_path / "0.tar", entries)
    with tarfile.open(path) as tar:
        walked = [(m.name, m.offset_data, m.size) for m in tar if not m.name.endswith(("README", "seg.png"))]
    index = make_index(str(path))
    columns = [index.arrays[name].tolist() for name in ("offset", "size", "crc32")]
    assert list(zip(*columns, strict=True)) == [
        (offset, size, zlib.crc32(path.read_bytes()[offset : offset + size])) for _, offset, size in walked
    ]
    assert index.num_samples == 3
    assert index.arrays["first_member"].tolist() == [0, 3, 5, 6]
    shard = open_shard(str(path), "0.tar", index)
    records = [shard.record(row) for row in range(3)]
    assert [record.where for record in records] == ["0.tar:d/a", "0.tar:b", "0.tar:c"]
    assert [record.image_sizes() for record in records] == [[(8, 6), (3, 2)], [(7, 5), (2, 9)], [(0, 0)]]
    assert [part.decode().size for part in records[0].pictures()] == [(8, 6), (3, 2)]
    assert [part.decode().size for part in records[1].pictures()] == [(7, 5), (2, 9)]
    assert records[0].member("d/a.0.PNG") == records[0].pictures()[1]
    assert [records[0].member(name) for name in ("d/a.1.png", "d/a.json", "b.tiff", "../d/a.jpg", "d/a.")] == [None] * 5


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "TIFF"])
def test_image_sizes_are_those_of_the_gate(tmp_path, fmt, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = png(9, 4, 0, fmt, exif=exif)
    path = write_tar(tmp_path / "0.tar", [(f"a.{fmt.lower()}".replace("jpeg", "jpg"), data), ("a.txt", b"t")])
    assert pairs([path]).image_sizes(0) == [open_image(data).size]


def test_random_access_equals_sequential_over_shards_of_all_containers(tmp_path):
    import pyarrow
    from pyarrow import parquet

    lines = [f"text {n}" for n in range(23)]
    table = pyarrow.table({"text": lines[10:], "more": list(range(13))})
    parquet.write_table(table, tmp_path / "b.parquet", row_group_size=5)
    paths = [
        texts(tmp_path / "a.jsonl", lines[:10]),
        tmp_path / "b.parquet",
        write_tar(tmp_path / "c.tar", [(f"{n}.json", json.dumps({"text": f"tar {n}"}).encode()) for n in range(3)]),
        write_tar(tmp_path / "d.tar", []),
    ]
    source = documents(paths)
    expected = [*lines, "tar 0", "tar 1", "tar 2"]
    assert [said(source, index) for index in range(len(source))] == expected
    order = np.random.default_rng(0).permutation(len(expected)).tolist()
    again = documents(paths)
    assert [said(again, index) for index in order] == [expected[index] for index in order]
    assert [source[index].id for index in (9, 10, 22, 23)] == ["a.jsonl:9", "b.parquet:0", "b.parquet:12", "c.tar:0"]
    for index in (-1, len(expected)):
        with pytest.raises(IndexError, match="expected an index from 0 to 25"):
            source[index]


def test_parquet_rows_equal_pyarrow_s_own_reading(tmp_path):
    import msgspec
    import pyarrow
    from pyarrow import parquet

    rows = [
        {"text": f"t{n}", "image": {"bytes": bytes([n]), "path": None}, "tags": [n, None], "n": n, "null": None}
        for n in range(11)
    ]
    path = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=4, compression="zstd")
    shard = open_shard(str(path), "x.parquet", make_index(str(path)))
    assert len(shard) == 11
    theirs = parquet.read_table(path).to_pylist()
    assert [shard.record(row).decode(dict) for row in range(11)] == theirs == rows

    class Some(msgspec.Struct):
        number: int = msgspec.field(name="n")
        absent: str = "default"

    assert [shard.record(row).decode(Some) for row in (10, 3, 4)] == [Some(10), Some(3), Some(4)]

    class Wrong(msgspec.Struct):
        text: int

    with pytest.raises(SkipSample, match=r"x\.parquet:2: bad_record: Expected `int`, got `str`"):
        shard.record(2).decode(Wrong)


def test_parquet_that_is_cut_or_changed_is_noticed(tmp_path):
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "x.parquet"
    table = pyarrow.table({"text": [f"t{n}" * 20 for n in range(9)]})
    parquet.write_table(table, path, row_group_size=3, compression="none", use_dictionary=False)
    whole = path.read_bytes()
    for size in range(0, len(whole), 17):
        path.write_bytes(whole[:size])
        with pytest.raises(ShardError, match=r"x\.parquet: expected a whole parquet file"):
            make_index(str(path))
    path.write_bytes(whole)
    index = make_index(str(path))
    shard = open_shard(str(path), "x.parquet", index)
    changed = bytearray(whole)
    changed[whole.index(b"t4t4")] ^= 1
    path.write_bytes(changed)
    for row, is_good in [(2, True), (3, False), (5, False), (6, True)]:
        if is_good:
            assert shard.record(row).decode(dict)["text"] == f"t{row}" * 20
        else:
            with pytest.raises(SkipSample, match=r"checksum: expected row group 1 with CRC-32") as caught:
                shard.record(row).decode(dict)
            assert caught.value.where == f"x.parquet:{row}"
    changed = bytearray(whole)
    changed[-20] ^= 1
    path.write_bytes(changed)
    with pytest.raises(SkipSample, match="checksum: expected footer"):
        open_shard(str(path), "x.parquet", index).record(0).decode(dict)


@pytest.mark.parametrize("what", [".png", ".txt"])
def test_changed_byte_of_a_member_is_a_counted_skip(tmp_path, what):
    path = pair_shard(tmp_path / "0.tar")
    source = pairs([path])
    with tarfile.open(path) as tar:
        place = tar.getmember(f"1{what}").offset_data
    data = bytearray(path.read_bytes())
    data[place + 3] ^= 1
    path.write_bytes(data)
    if what == ".txt":
        assert skip_of(source, 1).reason == SkipReason.CHECKSUM
        assert skip_of(source, 1).where == "0.tar:1"
    else:
        with pytest.raises(SkipSample, match="checksum"):
            source[1].images()[0].read()
    for index in (0, 2):
        assert source[index].images()[0].decode().size == (5 + index, 4)


def test_changed_byte_of_a_line_is_a_counted_skip(tmp_path):
    path = texts(tmp_path / "a.jsonl", ["one", "two", "three"])
    source = documents([path])
    assert said(source, 1) == "two"
    path.write_bytes(path.read_bytes().replace(b"two", b"tow"))
    assert skip_of(source, 1).reason == SkipReason.CHECKSUM
    assert (said(source, 0), said(source, 2)) == ("one", "three")


def test_shard_of_another_size_than_indexed_is_refused_by_name_and_counts(tmp_path):
    path = texts(tmp_path / "a.jsonl", ["one", "two", "three"])
    documents([path])
    whole = path.read_bytes()
    # At a line's end nothing but the index could tell.
    path.write_bytes(whole[: whole.index(b"\n") + 1])
    with pytest.raises(ShardError, match=rf"a\.jsonl: expected {len(whole)} bytes with 3 samples as indexed, got 16"):
        documents([path])
    path.with_name("a.jsonl.index").unlink()
    assert len(documents([path])) == 1  # the negative control: without its index the cut is not seen


def test_tar_cut_anywhere_is_never_silent(tmp_path):
    """(T9)"""
    path = pair_shard(tmp_path / "0.tar", 12)
    pairs([path])
    whole = path.read_bytes()
    borders = range(0, len(whole), 512)
    offsets = sorted({*borders, *np.random.default_rng(0).integers(0, len(whole), 40).tolist()})
    for offset in offsets:
        path.write_bytes(whole[:offset])
        with pytest.raises(ShardError, match=rf"0\.tar: expected {len(whole)} bytes with 12 samples"):
            pairs([path])
    # The negative control: the standard library ends quietly at a border.
    path.write_bytes(whole[: 512 * 4])
    with tarfile.open(path) as tar:
        assert len(tar.getmembers()) == 2


def test_fingerprint_tells_what_happened_to_the_shards(tmp_path):
    """(T7)"""
    paths = [pair_shard(tmp_path / f"{n}.tar", seed=10 * n) for n in range(3)]
    before = pairs(paths)
    assert pairs(paths).fingerprint == before.fingerprint

    def change(source) -> str:
        assert source.fingerprint != before.fingerprint
        return shard_changes(before.shards, source.shards)

    assert change(pairs(paths[1:])) == "removed: 0.tar"
    assert change(pairs([*paths, pair_shard(tmp_path / "3.tar")])) == "added: 3.tar"
    assert change(pairs([paths[1], paths[0], paths[2]])) == "in another order: 1.tar, 0.tar, 2.tar"
    edited = paths[1].read_bytes().replace(b"caption 11", b"caption 99")
    paths[1].write_bytes(edited)
    os.utime(paths[1], ns=(1, os.stat(paths[1]).st_mtime_ns + 10**9))
    assert change(pairs(paths)) == "changed: 1.tar"
    assert said(pairs(paths), 4) == "caption 99"
    assert shard_changes(before.shards, before.shards) == ""


def test_fingerprint_depends_on_contents_and_settings_and_not_on_folders_or_times(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        pair_shard(tmp_path / folder / "0.tar")
    os.utime(tmp_path / "b/0.tar", (1, 1))
    first, second = (pairs([tmp_path / folder / "0.tar"]) for folder in ("a", "b"))
    assert first.fingerprint == second.fingerprint
    reader = FORMATS["captions"].reader(caption="json:x")
    other = RecordSource([str(tmp_path / "a/0.tar")], reader, name="pairs", settings={"caption": "json:x"})
    assert other.fingerprint != first.fingerprint


def test_edit_that_keeps_size_and_time_is_caught_on_reading(tmp_path):
    path = pair_shard(tmp_path / "0.tar")
    before = pairs([path])
    stamp = os.stat(path)
    path.write_bytes(path.read_bytes().replace(b"caption 1", b"caption 7"))
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    after = pairs([path])
    assert after.fingerprint == before.fingerprint
    assert skip_of(after, 1).reason == SkipReason.CHECKSUM


def test_index_made_anew_while_a_source_is_open_is_not_used(tmp_path):
    path = pair_shard(tmp_path / "0.tar")
    source = pairs([path])
    pair_shard(path, seed=5)
    make_index(str(path)).save(str(path), os.stat(path).st_mtime_ns)
    with pytest.raises(ShardError, match=r"0\.tar: expected the index of when it was opened"):
        source[0]


def test_index_of_another_version_is_made_anew_and_a_damaged_one_refused(tmp_path):
    path = pair_shard(tmp_path / "0.tar")
    index = tmp_path / "0.tar.index"
    pairs([path])
    whole = index.read_bytes()
    index.write_bytes(whole.replace(b'"version":"1"', b'"version":"0"'))
    assert fresh_header(str(path)) is None
    assert len(pairs([path])) == 3
    assert index.read_bytes() == whole
    index.write_bytes(whole[:-1])
    with pytest.raises(ShardError, match=r"0\.tar\.index: expected a whole index"):
        pairs([path])


def test_folder_that_cannot_be_written_to_is_read_from_memory_with_a_warning(tmp_path, monkeypatch, caplog):
    path = pair_shard(tmp_path / "0.tar")

    def refuse(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(ShardIndex, "save", refuse)
    with caplog.at_level(logging.WARNING):
        source = pairs([path])
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: expected to write an index beside it, got Read-only file system; it is kept in memory and made again "
        "on each start"
    ]
    assert [said(source, n) for n in range(3)] == ["caption 0", "caption 1", "caption 2"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["0.tar"]


def test_indexed_only_leaves_out_shards_and_says_how_many(tmp_path, caplog):
    from interleave_data import SourceConfig, open_source

    paths = [pair_shard(tmp_path / f"{n}.tar", seed=10 * n) for n in range(3)]
    pairs([paths[1]])
    cfg = SourceConfig(name="p", format="captions", path=str(tmp_path / "*.tar"), indexed_only=True)
    with caplog.at_level(logging.WARNING):
        source = open_source(cfg)
    assert (len(source), source.num_left_out, list(source.shards)) == (3, 2, ["1.tar"])
    assert "p: 2 of 3 shards have no index yet and are left out" in caplog.text
    assert not (tmp_path / "0.tar.index").exists()


def test_progress_adds_up_to_the_shards(tmp_path):
    paths = [pair_shard(tmp_path / "0.tar"), texts(tmp_path / "a.jsonl", ["x"] * 100)]
    heard: dict[str, list[tuple[int, int]]] = {}
    documents(paths, on_index=lambda path, done, total: heard.setdefault(path, []).append((done, total)))
    assert {path: sum(done for done, _ in steps) for path, steps in heard.items()} == {
        str(path): path.stat().st_size for path in paths
    }
    heard.clear()
    documents(paths, on_index=lambda path, done, total: heard.setdefault(path, []).append((done, total)))
    assert heard == {}


def measured(sample) -> Size:
    """A stand-in for a processor: as many tokens as the caption has letters; one sample is refused."""
    text = sample.turns[0].parts[-1].text
    if text == "caption 11":
        raise SkipSample(SkipReason.TOO_SMALL, "expected more")
    return Size(len(text), int(text[-1]))


def test_lengths_belong_to_a_fingerprint_a_format_and_a_state_of_the_shard(tmp_path):
    paths = [pair_shard(tmp_path / f"{n}.tar", seed=10 * n) for n in range(2)]
    steps = []
    assert pairs(paths[1:]).measure("abc", measured, lambda: steps.append(1)) == 1
    assert len(steps) == 3
    expected = [None, None, None, Size(10, 0), None, Size(10, 2)]
    assert [pairs(paths, lengths="abc").size(n) for n in range(6)] == expected
    for lengths, setting in ((None, "txt"), ("abd", "txt"), ("abc", "json:x")):
        reader = FORMATS["captions"].reader(caption="txt")
        settings = {"caption": setting}
        source = RecordSource([str(paths[1])], reader, name="pairs", settings=settings, lengths=lengths)
        assert source.size(0) is None
    # What is measured already is not measured again.
    assert pairs(paths).measure("abc", measured, lambda: steps.append(1)) == 0
    assert len(steps) == 6
    paths[1].write_bytes(paths[1].read_bytes().replace(b"caption 10", b"caption 77"))
    os.utime(paths[1], ns=(1, os.stat(paths[1]).st_mtime_ns + 10**9))
    assert pairs(paths, lengths="abc").size(3) is None


def test_lengths_of_another_number_of_samples_are_refused(tmp_path):
    path = str(pair_shard(tmp_path / "0.tar"))
    pairs([path])
    header = fresh_header(path)
    assert header is not None
    Lengths(np.array([1, 2], np.int32), np.array([1, 2], np.int32)).save(path, "abc", header.digest)
    with pytest.raises(ShardError, match=r"0\.tar\.lengths-abc: expected a whole index"):
        Lengths.load(path, "abc", header)


def test_source_goes_to_workers_without_its_tables(tmp_path):
    source = pairs([pair_shard(tmp_path / "0.tar", 200)])
    assert said(source, 2) == "caption 2"
    packed = pickle.dumps(source)
    # The offsets alone would be 200 × 2 × 8.
    assert len(packed) < 1500
    assert said(pickle.loads(packed), 3) == "caption 3"


@pytest.mark.parametrize("fmt", FORMATS)
def test_every_format_goes_to_workers_with_its_settings(fmt):
    other = {"caption": "json:alt", "granularity": 2, "floor": 1.5, "pairs": "2-3", "subset": "unsafes"}
    settings = {name: other[name] for name in FORMATS[fmt].settings}
    again = pickle.loads(pickle.dumps(FORMATS[fmt].reader(**settings)))
    assert again._from == (FORMATS[fmt], settings)


def test_least_used_shards_are_let_go(tmp_path, monkeypatch):
    from interleave_data import record_source

    monkeypatch.setattr(record_source, "_MAX_OPEN_SHARDS", 2)
    paths = [pair_shard(tmp_path / f"{n}.tar", 1, seed=n) for n in range(4)]
    source = pairs(paths)
    assert [said(source, n) for n in (0, 1, 0, 2, 0, 3, 1)] == [f"caption {n}" for n in (0, 1, 0, 2, 0, 3, 1)]
    assert len(source._open) == 2


def test_shards_of_equal_contents_have_equal_digests_however_they_were_indexed(tmp_path):
    path = pair_shard(tmp_path / "0.tar")
    first, second = make_index(str(path)), make_index(str(path))
    assert first.digest == second.digest
    first.save(str(path), os.stat(path).st_mtime_ns)
    loaded = ShardIndex.load(str(path))
    again = ShardIndex.of(loaded.kind, loaded.shard_bytes, loaded.num_samples, loaded.arrays)
    assert (loaded.digest, again.digest) == (first.digest, first.digest)


def test_only_known_suffixes_are_shards(tmp_path):
    for name in ("x.pkl", "x.tar.gz", "x", "x.index"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(ShardError, match=r"expected a file with one of \.tar, \.json, \.jsonl, \.parquet"):
            make_index(str(tmp_path / name))
    assert containers_module.shard_kind("X.TAR") == "tar"


@pytest.mark.parametrize(("window", "num_shards"), [(32, 1), (32, 4), (None, 1)])
def test_rows_in_windows_cost_one_reading_of_each_group(tmp_path, monkeypatch, window, num_shards):
    import pyarrow
    from pyarrow import parquet

    from interleave_data.parquet_shards import ParquetShard

    rows = [{"text": f"t{n}"} for n in range(512)]
    for shard in range(num_shards):
        part = rows[shard * 512 // num_shards : (shard + 1) * 512 // num_shards]
        parquet.write_table(pyarrow.Table.from_pylist(part), tmp_path / f"{shard}.parquet", row_group_size=4)
    read: list[object] = []
    one = ParquetShard._read_group
    monkeypatch.setattr(ParquetShard, "_read_group", lambda self, *args: read.append(args) or one(self, *args))
    source = open_source(SourceConfig(name="s", format="text", path=str(tmp_path / "*.parquet"), window=window))
    mixture = Mixture([source], epochs=[1])
    assert {source[mixture.index(draw)].turns[0].parts[0] for draw in mixture} == {
        TextPart(f"t{n}") for n in range(512)
    }
    # Shuffled over all 128 groups, few rows find theirs still there.
    assert len(read) == 128 if window else len(read) > 300


def test_row_groups_that_are_kept_are_bounded_in_number_and_bytes(monkeypatch):
    from interleave_data import parquet_shards

    monkeypatch.setattr(parquet_shards, "_GROUP_BYTES_KEPT", 100)
    groups = parquet_shards.RowGroups()
    reads: list[int] = []

    def get(number: int, num_bytes: int) -> None:
        groups.get(("x", number, None), lambda: reads.append(number) or np.zeros(num_bytes, np.uint8))

    for number, num_bytes in [(0, 40), (1, 40), (0, 40), (2, 40), (0, 40), (1, 40), (3, 500), (3, 500), (0, 40)]:
        get(number, num_bytes)
    # 2 drives out 1, the oldest; 3 alone is more than all may be, and still kept for its next row.
    assert reads == [0, 1, 2, 1, 3, 0]


WRITER = """
import os, signal, sys
from interleave_data.containers import write_index
if __name__ == "__main__":
    path, how = sys.argv[1:]
    def sync(descriptor):
        # All is written and nothing has its name yet.
        if how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        print("here", flush=True)
        sys.stdin.readline()
    os.fsync = sync
    write_index(path)
"""


def indexer(path: Path, how: str) -> subprocess.Popen[str]:
    """A process that is killed while it writes the index of a shard, or waits there for a line."""
    script = path.with_name("writer.py")
    script.write_text(WRITER)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(script), str(path), how]
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_what_a_killed_indexer_left_is_gone_when_the_index_is_next_made(tmp_path):
    shard = texts(tmp_path / "a.jsonl", ["one", "two"])
    for _ in range(2):
        with indexer(shard, "dies") as process:
            assert process.wait(30) == -signal.SIGKILL
        # Something was left, and the second one leaves nothing more.
        assert len(list(tmp_path.glob("a.jsonl.*"))) == 1
        assert not shard.with_name("a.jsonl.index").exists()
    texts(shard, ["three"])
    assert said(documents([shard]), 0) == "three"
    assert [path.name for path in tmp_path.glob("a.jsonl.*")] == ["a.jsonl.index"]
    index = make_index(str(shard))
    assert ShardIndex.load(str(shard)).digest == index.digest


def test_a_living_indexer_is_left_its_file(tmp_path):
    shard = texts(tmp_path / "a.jsonl", ["one", "two"])
    with indexer(shard, "waits") as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        (left,) = (path for path in tmp_path.glob("a.jsonl.*"))
        before = left.read_bytes()
        containers_module.write_index(str(shard))
        assert left.read_bytes() == before
        index_file = shard.with_name("a.jsonl.index")
        assert sorted(tmp_path.glob("a.jsonl.*")) == sorted([index_file, left])
        assert index_file.read_bytes() == before
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.wait(30) == 0
    assert list(tmp_path.glob("a.jsonl.*")) == [index_file]
    assert index_file.read_bytes() == before


def test_a_disk_without_locks_has_an_index_and_nothing_else(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    shard = texts(tmp_path / "a.jsonl", ["one"])
    assert said(documents([shard]), 0) == "one"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "a.jsonl.index"]
