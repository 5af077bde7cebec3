"""Shards that mean harm, or are odd: nothing is written but an index, memory stays bounded, nothing is silent."""

import io
import os
import subprocess
import sys
import tarfile
import tracemalloc
from pathlib import Path

import pytest

from interleave_data import RecordSource, ShardError, SkipReason, SkipSample
from interleave_data.containers import make_index, open_shard
from interleave_data.formats import FORMATS


def header(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, link: str = "") -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, link
    return info.tobuf(tarfile.GNU_FORMAT)


def member(name: str, data: bytes) -> bytes:
    return header(name, size=len(data)) + data + bytes(-len(data) % 512)


END = bytes(1024)


def records_of(path: Path):
    shard = open_shard(str(path), path.name, make_index(str(path)))
    return [shard.record(row) for row in range(len(shard))]


@pytest.fixture
def shard(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    return folder / "0.tar"


NAMES = [
    "../up",
    "../../../../../../evil",
    "/etc/evil",
    "a/../../b",
    "C:\\evil",
    "x" * 10_000,
    "a\0b",
    "~",
    "con",
    "-rf",
]


@pytest.mark.parametrize("fmt", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_are_data_and_nothing_is_written(tmp_path, shard, fmt):
    """(T25)"""
    with tarfile.open(shard, "w", format=fmt) as tar:
        for name in NAMES:
            info = tarfile.TarInfo(f"{name}.txt")
            info.size = 1
            if fmt == tarfile.PAX_FORMAT:
                info.pax_headers = {"path": info.name}
            tar.addfile(info, io.BytesIO(b"t"))
    reader = FORMATS["captions"].reader(caption="txt")
    source = RecordSource([str(shard)], reader, name="s")
    # A plain header ends a name at its first NUL, so that one has no suffix any more.
    expected = [name for name in NAMES if fmt == tarfile.PAX_FORMAT or "\0" not in name]
    records = [source.record(index) for index in range(len(source))]
    assert [record.text("txt") for record in records] == ["t"] * len(expected)
    written = [name.replace("\0", "\\x00").replace("\\e", "\\\\e") for name in expected]
    assert [record.where for record in records] == [f"0.tar:{name}" for name in written]
    for index in range(len(source)):
        with pytest.raises(SkipSample, match="missing_member"):
            source[index]
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "data",
        "data/0.tar",
        "data/0.tar.index",
    ]
    # The negative control: the standard library's own extraction refuses some of these only when asked to.
    with tarfile.open(shard) as tar, pytest.raises(tarfile.FilterError):
        tar.extractall(tmp_path / "out", filter="data")


def test_links_devices_pipes_and_folders_are_passed_over(shard):
    """(T25)"""
    odd = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE]
    shard.write_bytes(
        b"".join(header(f"{place}.txt", kind, link="/etc/passwd") for place, kind in enumerate(odd))
        + member("last.txt", b"t")
        + END
    )
    assert [record.where for record in records_of(shard)] == ["0.tar:last"]


def test_a_member_that_claims_a_terabyte_is_an_error(shard):
    """(T25)"""
    for kind in (tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE, b"Z"):
        shard.write_bytes(member("0.txt", b"t") + header("1.txt", kind, 1 << 40) + bytes(4096))
        with pytest.raises(ShardError, match=r"0\.tar: expected a whole tar archive, got 1 members up to byte 1024"):
            make_index(str(shard))


def test_a_terabyte_of_holes_is_neither_read_nor_shown(shard):
    """(T25)"""
    size = 1 << 40
    with shard.open("wb") as file:
        file.write(header("0.jpg", size=size))
        file.seek(size, os.SEEK_CUR)
        file.write(member("0.txt", b"t") + END)
    (record,) = records_of(shard)
    assert record.text("txt") == "t"
    with pytest.raises(SkipSample) as caught:
        record.picture()
    assert caught.value.reason == SkipReason.TOO_MANY_BYTES


def test_sparse_member_is_passed_over(shard):
    """(T25)"""
    sparse = bytearray(header("0.txt", tarfile.GNUTYPE_SPARSE, 512))
    sparse[386:410] = b"00000000000\0" + b"00000001000\0"
    sparse[483:495] = b"77777777777\0"  # its real size
    sparse[148:156] = b"%06o\0 " % (256 + sum(sparse[:148]) + sum(sparse[156:512]))
    shard.write_bytes(bytes(sparse) + bytes(512) + member("1.txt", b"t") + END)
    assert [record.where for record in records_of(shard)] == ["0.tar:1"]


def test_headers_that_call_for_headers_without_end_are_an_error(shard):
    chain = header("x", tarfile.GNUTYPE_LONGNAME, 3) + b"abc" + bytes(509)
    shard.write_bytes(chain * 20_000 + member("1.txt", b"t") + END)
    with pytest.raises(ShardError, match="whole tar archive"):
        make_index(str(shard))


def test_more_bytes_behind_the_end_are_passed_over(shard):
    shard.write_bytes(member("1.txt", b"t") + END + member("2.txt", b"hidden") + END)
    assert [record.where for record in records_of(shard)] == ["0.tar:1"]


def test_keys_apart_are_found_among_many_and_near_ones_are_not(shard):
    names = [f"{n}" for n in range(300)]
    shard.write_bytes(b"".join(member(f"{name}.txt", b"t") for name in names) + END)
    assert len(records_of(shard)) == 300
    shard.write_bytes(b"".join(member(f"{name}.txt", b"t") for name in [*names, "17"]) + END)
    with pytest.raises(ShardError, match="expected the members of '17' side by side"):
        make_index(str(shard))


def test_index_that_points_elsewhere_gives_skips_and_reads_no_more_than_it_should(shard):
    import numpy as np

    from interleave_data.index_file import ShardIndex

    shard.write_bytes(member("0.txt", b"t" * 600) + member("0.jpg", b"j" * 600) + END)
    index = make_index(str(shard))
    for name, value in [("offset", -5), ("offset", 1 << 62), ("size", -1), ("size", 1 << 62), ("size", 599)]:
        arrays = {**index.arrays, name: np.full_like(index.arrays[name], value)}
        record = open_shard(str(shard), "s", ShardIndex.of("tar", index.shard_bytes, 1, arrays)).record(0)
        with pytest.raises(SkipSample, match=r"unreadable_file|too_many_bytes|checksum"):
            record.text("txt")
        with pytest.raises(SkipSample, match=r"unreadable_file|too_many_bytes|checksum"):
            record.pictures()[0].read(1 << 20)


MEASURE = """
import resource, sys
from interleave_data.containers import make_index, open_shard
make_index(sys.argv[2])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
index = make_index(sys.argv[1])
shard = open_shard(sys.argv[1], "s", index)
assert shard.record(len(shard) - 1).text("txt") == "t"
print(len(shard), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.parametrize(
    ("num_members", "most_mb"), [(3_000, 6), pytest.param(100_000, 100, marks=pytest.mark.nightly)]
)
def test_many_members_fit_in_little_memory(tmp_path, shard, num_members, most_mb):
    """(T25)"""
    one = bytearray(member("00000.txt", b"t") + member("00000.bmp", b""))
    with shard.open("wb") as file:
        for n in range(num_members // 2):
            for start in (0, 1024):
                one[start : start + 5] = b"%05d" % n
                one[start + 148 : start + 156] = b"        "
                one[start + 148 : start + 156] = b"%06o\0 " % sum(one[start : start + 512])
            file.write(one)
        file.write(END)
    small = tmp_path / "small.tar"
    small.write_bytes(member("0.txt", b"t") + member("0.bmp", b"") + END)
    done = subprocess.run([sys.executable, "-c", MEASURE, shard, small], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    num_samples, used_mb = done.stdout.split()
    assert int(num_samples) == num_members // 2
    assert float(used_mb) < most_mb


def test_opening_keeps_nothing_for_a_sample(tmp_path):
    """What a source holds is the same for three samples and for three thousand."""
    sizes = []
    # What the first opening leaves in caches is no source's.
    for count in (3, 5, 3000):
        path = tmp_path / f"{count}.jsonl"
        path.write_text('{"text": "x"}\n' * count)
        RecordSource([str(path)], FORMATS["text"].reader(), name="s")
        tracemalloc.start()
        source = RecordSource([str(path)], FORMATS["text"].reader(), name="s")
        assert source[count - 1].turns
        sizes.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
    assert abs(sizes[2] - sizes[1]) < 2000
