import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from interleave_data import ImagePart, RecordSource, ShardError, SkipReason, SkipSample, TextPart
from interleave_data.formats import FORMATS

NUM_SAMPLES = 6


def picture(number: int, fmt: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (9, 9 + number, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, fmt)
    return buffer.getvalue()


def members(count: int = NUM_SAMPLES) -> list[tuple[str, bytes]]:
    """What a whole shard holds."""
    return [
        entry
        for number in range(count)
        for entry in [
            (f"{number:06}.jpg", picture(number)),
            (f"{number:06}.txt", f" Picture {number}.\n".encode()),
            (f"{number:06}.json", json.dumps({"caption": f"json {number}", "n": number}).encode()),
        ]
    ]


def write(path, entries, fmt=tarfile.USTAR_FORMAT):
    with tarfile.open(path, "w", format=fmt) as tar:
        for name, data in entries:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def shard(tmp_path):
    return write(tmp_path / "000000.tar", members())


def tars(paths, caption: str = "txt") -> RecordSource:
    reader = FORMATS["caption-tars"].reader(caption=caption)
    return RecordSource([str(path) for path in paths], reader, name="pairs", settings={"caption": caption})


def skip_of(source, index=0) -> SkipSample:
    with pytest.raises(SkipSample) as caught:
        source[index]
    return caught.value


@pytest.mark.parametrize("fmt", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_pairs_of_several_shards(tmp_path, fmt):
    shards = [write(tmp_path / "0.tar", members(), fmt), write(tmp_path / "1.tar", members(2), fmt)]
    source = tars(shards)
    assert len(source) == NUM_SAMPLES + 2
    assert [source[index].id for index in (0, 5, 6, 7)] == [
        "0.tar:000000",
        "0.tar:000005",
        "1.tar:000000",
        "1.tar:000001",
    ]
    turn = source[5].turns[0]
    image, text = turn.parts
    assert (turn.role, text) == ("document", TextPart("Picture 5."))
    assert isinstance(image, ImagePart)
    assert image.read() == picture(5)
    assert image.decode().size == (14, 9)


def test_caption_from_a_json_key(shard):
    source = tars([shard], caption="json:caption")
    assert source[3].turns[0].parts[1] == TextPart("json 3")
    assert skip_of(tars([shard], caption="json:absent")).reason == SkipReason.BAD_RECORD
    assert skip_of(tars([shard], caption="json:n")).reason == SkipReason.BAD_RECORD


def test_long_and_strange_names_are_only_keys(tmp_path):
    """(T25)"""
    names = ["a/" * 200 + "x", "../../evil", "/etc/passwd", "é" * 120, "x" * 10_000]
    entries = [
        (f"{name}.{suffix}", data) for name in names for suffix, data in [("png", picture(1, "PNG")), ("txt", b"t")]
    ]
    source = tars([write(tmp_path / "0.tar", entries, tarfile.PAX_FORMAT)])
    assert [source[index].id for index in range(len(source))] == [f"0.tar:{name}" for name in names]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.tar", "0.tar.index"]


def test_ids_are_printable_and_tell_names_apart_that_are_no_utf_8(tmp_path):
    names = ["a\udcff", "a\\udcff", "b\n"]
    entries = [
        (f"{name}.{suffix}", data) for name in names for suffix, data in [("png", picture(1, "PNG")), ("txt", b"t")]
    ]
    source = tars([write(tmp_path / "x\udcfe.tar", entries, tarfile.GNU_FORMAT)])
    ids = [source[index].id for index in range(3)]
    assert ids == [r"x\udcfe.tar:a\udcff", r"x\udcfe.tar:a\\udcff", r"x\udcfe.tar:b\n"]
    assert source[0].images()[0].key == f"{ids[0]}.png"


def test_shards_of_one_name_in_two_folders_have_ids_of_their_own(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    shards = [write(path, members(1)) for path in (tmp_path / "a/0.tar", tmp_path / "b/0.tar", tmp_path / "b/1.tar")]
    source = tars(shards)
    assert [source[index].id for index in range(3)] == ["0/0.tar:000000", "1/0.tar:000000", "1.tar:000000"]


def test_huge_caption_is_skipped_unread(tmp_path):
    size = 1 << 22
    for number, (more, suffix) in enumerate([(0, "txt"), (1, "txt"), (1, "json")]):
        entries = [("1.jpg", picture(1)), (f"1.{suffix}", b"a" * (size + more))]
        source = tars([write(tmp_path / f"{number}.tar", entries)], caption="json:a" if number == 2 else "txt")
        if more:
            assert skip_of(source).reason == SkipReason.TOO_MANY_BYTES
            assert skip_of(source).where == f"{number}.tar:1"
        else:
            assert source[0].turns[0].parts[1] == TextPart("a" * size)


def test_deeply_nested_caption_record_is_skipped(tmp_path):
    deep = "[" * 100_000 + "]" * 100_000
    entries = [("1.jpg", picture(1)), ("1.json", f'{{"caption": "a", "b": {deep}}}'.encode())]
    source = tars([write(tmp_path / "0.tar", entries)], caption="json:caption")
    assert skip_of(source).reason == SkipReason.BAD_RECORD


def test_suffixes_in_any_case_and_unknown_ones(tmp_path):
    """(T10)"""
    entries = [
        ("1.JPG", picture(1)),
        ("1.TXT", b"one"),
        ("1.pkl", b"cos\nsystem\n"),
        ("1.seg.png", b""),
        ("README", b""),
    ]
    source = tars([write(tmp_path / "0.tar", entries)])
    assert len(source) == 1
    assert source[0].turns[0].parts[1] == TextPart("one")


def test_links_devices_and_folders_are_passed_over(tmp_path):
    entries = []
    for name, kind in [
        ("1.jpg", tarfile.SYMTYPE),
        ("1.txt", tarfile.LNKTYPE),
        ("2.jpg", tarfile.CHRTYPE),
        ("3.txt", tarfile.DIRTYPE),
    ]:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, "/etc/passwd"
        entries.append((info, b""))
    assert len(tars([write(tmp_path / "0.tar", [*entries, ("4.txt", b"t"), ("4.png", picture(1, "PNG"))])])) == 1


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ([("1.json", b"{}"), ("1.txt", b"t")], SkipReason.MISSING_MEMBER),
        ([("1.jpg", b"x")], SkipReason.MISSING_MEMBER),
        ([("1.jpg", b"x"), ("1.txt", b" \n")], SkipReason.EMPTY_TEXT),
        ([("1.jpg", b"x"), ("1.txt", b"\xff\xfe")], SkipReason.BAD_RECORD),
    ],
)
def test_incomplete_samples_are_skipped_with_shard_and_key(tmp_path, entries, reason):
    """(T10): a record without its picture, too"""
    source = tars([write(tmp_path / "7.tar", [*entries, ("2.jpg", picture(1)), ("2.txt", b"good")])])
    assert len(source) == 2
    assert skip_of(source).reason == reason
    assert skip_of(source).where == "7.tar:1"
    assert source[1].turns[0].parts[1] == TextPart("good")


def test_cut_at_every_block_border_and_between_is_an_error(tmp_path, shard):
    """(T9): of a shard that was never indexed whole"""
    data = shard.read_bytes()
    end = 512 * sum(1 + -(-len(content) // 512) for _, content in members())
    assert data[end:] == bytes(len(data) - end)
    cut = tmp_path / "cut.tar"
    offsets = sorted({*range(0, end + 1024, 512), *range(0, end + 1024, 389)})
    for offset in offsets:
        cut.write_bytes(data[:offset])
        with pytest.raises(ShardError, match=r"cut\.tar: expected a whole tar archive"):
            tars([cut])
    cut.write_bytes(data[: end + 1024])
    assert len(tars([cut])) == NUM_SAMPLES


def test_flipped_byte_in_any_header_is_an_error(tmp_path, shard):
    """(T10)"""
    data = shard.read_bytes()
    with tarfile.open(shard) as tar:
        headers = [member.offset for member in tar.getmembers()]
    bad = tmp_path / "bad.tar"
    num_silent = 0
    for header in headers:
        # In the name, the size and the checksum.
        for place in (0, 130, 150):
            changed = bytearray(data)
            changed[header + place] ^= 0x15
            bad.write_bytes(changed)
            with pytest.raises(ShardError, match=r"bad\.tar"):
                tars([bad])
        # The control: `tarfile` ends quietly where a header behind the first is damaged.
        if header > 0:
            with tarfile.open(bad) as tar:
                num_silent += len(tar.getmembers()) < len(headers)
    assert num_silent == len(headers) - 1


def test_error_says_how_far_the_shard_is_sound(tmp_path, shard):
    with tarfile.open(shard) as tar:
        seventh = tar.getmembers()[7]
    cut = tmp_path / "cut.tar"
    cut.write_bytes(shard.read_bytes()[: seventh.offset])
    with pytest.raises(ShardError, match=f"got 7 members up to byte {seventh.offset} of {seventh.offset}"):
        tars([cut])


def test_negative_size_does_not_send_the_walk_round_in_circles(tmp_path):
    info = tarfile.TarInfo("1.txt")
    info.size = -2048
    header = info.tobuf(tarfile.GNU_FORMAT)
    path = tmp_path / "loop.tar"
    path.write_bytes(tarfile.TarInfo("0.bin").tobuf() * 4 + header + bytes(10_240))
    with pytest.raises(ShardError, match=r"loop\.tar: expected a whole tar archive"):
        tars([path])


@pytest.mark.parametrize(
    ("entries", "match"),
    [
        ([("1.jpg", b""), ("1.txt", b"a"), ("1.txt", b"b")], "each member once"),
        ([("1.jpg", b""), ("2.jpg", b""), ("1.txt", b"b")], "side by side"),
    ],
)
def test_repeated_members_are_an_error(tmp_path, entries, match):
    """(T10)"""
    with pytest.raises(ShardError, match=match):
        tars([write(tmp_path / "0.tar", entries)])


def test_empty_shards_and_no_shards(tmp_path, shard):
    """(T10)"""
    assert len(tars([write(tmp_path / "empty.tar", []), shard])) == NUM_SAMPLES
    with pytest.raises(ValueError, match="at least one shard"):
        tars([])
    (tmp_path / "zero.tar").write_bytes(b"")
    with pytest.raises(ShardError, match=r"zero\.tar"):
        tars([tmp_path / "zero.tar"])


def test_compressed_shards_are_refused(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("1.txt"))
    with pytest.raises(ShardError, match=r"0\.tar"):
        tars([tmp_path / "0.tar"])


def test_shard_that_shrinks_while_it_is_read_is_a_skip(shard):
    source = tars([shard])
    assert source[3]
    shard.write_bytes(shard.read_bytes()[:512])
    assert skip_of(source, 3).reason == SkipReason.UNREADABLE_FILE


def test_fingerprint_tells_shards_and_settings(tmp_path, shard):
    first = tars([shard]).fingerprint
    assert tars([shard]).fingerprint == first
    assert tars([shard], caption="json:caption").fingerprint != first
    assert tars([shard, write(tmp_path / "1.tar", members(1))]).fingerprint != first
