"""Shards that are not on this disk: the same samples in the same order, whatever the network does, or a clear end.

The servers are real (nginx, and an S3 server), on loopback; the harm is done by a proxy of our own in front of them.
"""

import io
import json
import logging
import os
import random
import re
import socket
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from interleave_data import (
    DataFileError,
    PlanConfig,
    RecordSource,
    ShardError,
    SkipCounter,
    SkipLimits,
    SkipSample,
    SourceConfig,
    Stream,
    TextPart,
    containers,
    http_ranges,
    load_data_file,
    open_source,
    open_sources,
    remote,
    stores,
)
from interleave_data.config import RemoteLimits
from interleave_data.http_ranges import Interrupted, Refusal, Target, WrongAnswer, check_answer
from interleave_data.index_file import Version
from interleave_data.places import expand, local_place, shown

PATIENT = RemoteLimits(connect_s=5.0, stall_s=5.0, total_s=30.0)
HASTY = RemoteLimits(connect_s=5.0, stall_s=0.3, total_s=30.0)
KINDS = ("drop", "cut", "shift", "whole", "busy", "short", "long", "stall", "drip")


@pytest.fixture(scope="session")
def parts(repo_root: Path):
    """The modules beside this one: what workers import, and the servers."""
    folder = str(repo_root / "tests" / "interleave_data")
    sys.path.insert(0, folder)
    import remote_servers
    import worker_parts

    yield remote_servers, worker_parts
    sys.path.remove(folder)


def jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = random.Random(seed).randbytes(12 * 12 * 3)
    Image.frombytes("RGB", (12, 12), pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def write_tar(path: Path, first: int, num: int, image: str = "") -> None:
    with tarfile.open(path, "w") as tar:
        for number in range(first, first + num):
            members = [("jpg", jpeg(number)), ("txt", f"caption {number}".encode())]
            if image:
                members.append(("json", json.dumps({"caption": "seen", "image": image}).encode()))
            for suffix, data in members:
                info = tarfile.TarInfo(f"{number:04}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tars of pairs, two files of JSON lines, two of parquet in small row groups."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    root = tmp_path_factory.mktemp("shards")
    for number in range(3):
        write_tar(root / f"pair-{number}.tar", number * 5, 5)
    for number in range(2):
        rows = [{"text": f"line {number}.{row} " + "x" * (row * 13 % 7)} for row in range(7)]
        (root / f"text-{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        pq.write_table(pa.Table.from_pylist(rows), root / f"rows-{number}.parquet", row_group_size=3)
    return root


@pytest.fixture(scope="session")
def nginx(parts, shards: Path, tmp_path_factory: pytest.TempPathFactory):
    with parts[0].nginx(shards, tmp_path_factory.mktemp("nginx")) as server:
        yield server


@pytest.fixture(scope="session")
def s3(parts, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with parts[0].s3(shards, tmp_path_factory.mktemp("s3")) as port:
        yield port


@pytest.fixture
def proxy(parts, nginx):
    """A proxy in front of nginx."""
    with parts[0].proxy(nginx.port) as server:
        yield server


def forget() -> None:
    """Let go of what this process keeps: connections, bytes, stores."""
    for pool in http_ranges._POOLS.values():
        pool.close()
    for kept in (http_ranges._POOLS, remote._PROCESSES, stores._STORES):
        kept.clear()


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache folder of its own, no proxy from outside, no long pauses."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(remote, "_FIRST_PAUSE_S", 0.002)
    monkeypatch.setattr(remote, "_LONGEST_PAUSE_S", 0.02)
    forget()
    yield
    forget()


def use_s3(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    s3fs = pytest.importorskip("s3fs")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "me")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()


FORMATS = {"pair-*.tar": "captions", "text-*.jsonl": "text", "rows-*.parquet": "text"}


def opened(path: str | tuple[str, ...], limits: RemoteLimits = PATIENT, **more) -> RecordSource:
    first = path if isinstance(path, str) else path[0]
    name = first.rpartition("/")[2].partition("?")[0]
    fmt = "captions" if name.endswith("tar") else "text"
    return open_source(SourceConfig(name="far", format=fmt, path=path, **more), remote=limits)


def told(source: RecordSource, index: int) -> tuple:
    """All of a sample, its pictures' bytes too; of one that is skipped, why."""
    try:
        sample = source[index]
        return sample.id, [
            part.text if isinstance(part, TextPart) else (part.key, part.size_px, part.read())
            for part in sample.turns[0].parts
        ]
    except SkipSample as skip:
        return "skipped", skip.reason.value


def dump(source: RecordSource, order: Sequence[int] | None = None) -> list[tuple]:
    return [told(source, index) for index in (order or range(len(source)))]


def batches(source, encoder, num: int, state=None, num_workers: int = 0) -> tuple[list[tuple], Any, SkipCounter]:
    """So many batches, the state behind them, and what was counted."""
    skips = SkipCounter(SkipLimits(max_share=0.9))
    plan = PlanConfig(max_tokens=4, look_ahead=4, seed=3)
    with Stream([source], encoder, plan, skips=skips, num_workers=num_workers) as stream:
        if state is not None:
            stream.load_state_dict(state)
        taken = [(batch.number, batch.ids, batch.digest, batch.data["texts"]) for batch in islice(stream, num)]
        return taken, stream.state_dict(), skips


@pytest.mark.parametrize("pattern", FORMATS)
@pytest.mark.parametrize("server", ["nginx", "s3"])
def test_samples_and_their_order_equal_those_on_disk(request, monkeypatch, parts, shards: Path, server, pattern):
    here = opened(str(shards / pattern))
    if server == "s3":
        use_s3(monkeypatch, request.getfixturevalue("s3"))
        there = opened(f"s3://shards/deep/{pattern}")
    else:
        number = "{0..2}" if pattern.endswith("tar") else "{0..1}"
        there = opened(f"http://127.0.0.1:{request.getfixturevalue('nginx').port}/{pattern.replace('*', number)}")
    order = random.Random(1).sample(range(len(here)), len(here))
    assert dump(there, order) == dump(here, order)
    assert there.shards == here.shards
    assert there.fingerprint == here.fingerprint
    encoder = parts[1].Whole()
    assert batches(there, encoder, 6)[:2] == batches(here, encoder, 6)[:2]
    assert there.take_retries() == (0, "")


@pytest.mark.parametrize("server", ["nginx", "s3"])
def test_dropped_slowed_cut_and_wrong_answers_change_nothing_and_are_counted(
    request, monkeypatch, parts, shards: Path, server
):
    """Every range is asked for twice, since the first answer to it is harmed in one of nine ways."""
    servers, workers = parts
    here = opened(str(shards / "pair-*.tar"))
    expected, state, _ = batches(here, workers.Whole(), 6)
    upstream = request.getfixturevalue(server)
    with servers.proxy(upstream.port if server == "nginx" else upstream) as proxy:
        if server == "s3":
            use_s3(monkeypatch, proxy.port)
        proxy.harm.of = servers.once(*KINDS)
        address = "s3://shards/deep" if server == "s3" else f"http://127.0.0.1:{proxy.port}"
        there = opened(f"{address}/pair-{{0..2}}.tar", HASTY)
        got, state_there, skips = batches(there, workers.Whole(), 6)
        assert dump(there) == dump(here)
        num_later = there.take_retries()[0]
    assert (got, state_there) == (expected, state)
    assert set(proxy.harm.done) == set(KINDS)
    assert skips.num_retries + num_later == len(proxy.harm.done) == len(proxy.harm.requests) / 2
    assert skips.table() == {}


@pytest.mark.parametrize("pattern", ["text-{0..1}.jsonl", "rows-{0..1}.parquet"])
def test_every_container_bears_harm(parts, shards: Path, proxy, pattern):
    proxy.harm.of = parts[0].once("cut", "shift", "drop")
    there = opened(f"http://127.0.0.1:{proxy.port}/{pattern}", HASTY)
    assert dump(there) == dump(opened(str(shards / pattern.replace("{0..1}", "*"))))
    assert there.take_retries()[0] == len(proxy.harm.done) > 4


def unchecked_head(status, headers, start, stop, known):
    found = headers["Content-Range"].rpartition("/")[2]
    return stop - start, Version(int(found), headers.get("ETag", ""))


@pytest.mark.parametrize(
    ("kind", "is_head_checked", "are_bytes_checked", "is_same"),
    [
        ("shift", True, True, True),
        ("shift", False, True, True),
        ("lie", True, True, True),
        ("shift", True, False, True),
        ("shift", False, False, False),
        ("lie", True, False, False),
    ],
)
def test_a_wrong_range_is_refused_by_its_head_or_its_checksum(
    monkeypatch, parts, shards: Path, proxy, kind, is_head_checked, are_bytes_checked, is_same
):
    """With both checks off, or a head that lies and no checksums, wrong bytes pass for data: the checks are needed."""
    there = opened(f"http://127.0.0.1:{proxy.port}/pair-{{0..2}}.tar")
    proxy.harm.of = parts[0].once(kind, "", "")
    if not is_head_checked:
        monkeypatch.setattr(http_ranges, "check_answer", unchecked_head)
    if not are_bytes_checked:
        monkeypatch.setattr(remote.RemoteObject, "read_checked", lambda self, read, crc32, what: read())
    assert (dump(there) == dump(opened(str(shards / "pair-*.tar")))) is is_same
    if is_same:
        assert there.take_retries()[0] >= len(proxy.harm.done) > 3


def test_a_state_from_disk_goes_on_over_http_in_workers_that_count_their_retries(parts, shards: Path, proxy):
    _, workers = parts
    here, encoder = opened(str(shards / "pair-*.tar")), workers.Whole()
    _, state, _ = batches(here, encoder, 3)
    expected, last, _ = batches(here, encoder, 5, state)
    there = opened(f"http://127.0.0.1:{proxy.port}/pair-{{0..2}}.tar")
    assert there.take_retries() == (0, "")
    kinds = cycle(["cut", *[""] * 6])
    proxy.harm.of = lambda path, asked: next(kinds)
    got, last_there, skips = batches(there, encoder, 5, state, num_workers=2)
    assert (got, last_there) == (expected, last)
    assert 0 < skips.num_retries <= len(proxy.harm.done)
    assert list(skips.retries) == ["far"]


def test_a_saved_state_is_the_same_with_and_without_retries(parts, proxy, caplog):
    """And the log says how many there were, each time that their number has doubled."""
    address = f"http://127.0.0.1:{proxy.port}/pair-{{0..2}}.tar"
    _, expected, _ = batches(opened(address), parts[1].Whole(), 6)
    proxy.harm.of = parts[0].once("drop")
    forget()
    with caplog.at_level(logging.WARNING):
        _, state, skips = batches(opened(address), parts[1].Whole(), 6)
    assert json.dumps(state) == json.dumps(expected)
    lines = [record.getMessage() for record in caplog.records]
    assert lines
    assert len(lines) <= skips.num_retries.bit_length()
    assert "RemoteDisconnected" in lines[-1]


def test_a_read_that_never_succeeds_ends_with_shard_range_and_reason(proxy):
    source = opened(f"http://127.0.0.1:{proxy.port}/text-0.jsonl", RemoteLimits(total_s=0.3))
    proxy.harm.of = lambda path, asked: "drop"
    with pytest.raises(ShardError, match=r"text-0\.jsonl: expected bytes 0 to \d+ within 0\.3 s.*RemoteDisconnected"):
        source[0]


def test_a_server_that_is_not_there_is_named():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(ShardError, match=r"far: .*ConnectionRefusedError"):
            opened(f"http://127.0.0.1:{unused.getsockname()[1]}/a.tar", RemoteLimits(total_s=0.1))


def test_a_server_without_ranges_is_refused(nginx):
    with pytest.raises(ShardError, match=r"serves no ranges.*copy the shards to a disk"):
        opened(f"http://127.0.0.1:{nginx.port}/whole/pair-0.tar")


@pytest.mark.parametrize(
    ("path", "words"),
    [("none.tar", "status 404"), ("closed/pair-0.tar", "status 401"), ("pair-*.tar", r"a-\{000\.\.099\}\.tar")],
)
def test_what_asking_again_does_not_change_ends_at_once(nginx, path, words):
    with pytest.raises(ShardError, match=words):
        opened(f"http://127.0.0.1:{nginx.port}/{path}")


def test_an_outage_ends_the_run_and_skips_nothing(parts, proxy):
    """Parquet too, where much else is made a skip."""
    for name in ("pair-0.tar", "rows-0.parquet"):
        proxy.harm.of = lambda path, asked: ""
        source = opened(f"http://127.0.0.1:{proxy.port}/{name}", RemoteLimits(total_s=0.2))
        proxy.harm.of = lambda path, asked: "drop"
        with pytest.raises(ShardError, match=name):
            batches(source, parts[1].Whole(), 1)


@pytest.fixture
def own(shards: Path, tmp_path: Path) -> Iterator[Path]:
    """A folder of the served ones for one test alone."""
    folder = shards / tmp_path.name
    folder.mkdir()
    yield folder
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def test_an_object_that_was_replaced_is_indexed_again_on_opening(nginx, own: Path):
    address = f"http://127.0.0.1:{nginx.port}/{own.name}/a.jsonl"
    (own / "a.jsonl").write_text('{"text": "before"}\n{"text": "before"}\n')
    before = opened(address)
    assert told(before, 0) == ("a.jsonl:0", ["before"])
    (own / "a.jsonl").write_text('{"text": "behind"}\n{"text": "behind"}\n')
    os.utime(own / "a.jsonl", (1, 1))
    after = opened(address)
    assert after.fingerprint != before.fingerprint
    assert dump(after) == [("a.jsonl:0", ["behind"]), ("a.jsonl:1", ["behind"])]
    # Whoever still reads by the index of before is told.
    with pytest.raises(ShardError, match="another object than was indexed"):
        before[1]
    (own / "a.jsonl").write_text('{"text": "of another size"}\n')
    with pytest.raises(ShardError, match="expected 38 bytes with 2 samples as indexed, got 28"):
        opened(address)


def test_a_copy_that_is_cut_while_it_is_indexed_is_refused(monkeypatch, nginx):
    """As by another host that shares the cache folder, but no locks."""
    make_index = containers.make_index

    def cut(path: str) -> Any:
        lines = Path(path).read_bytes().splitlines(keepends=True)
        Path(path).write_bytes(b"".join(lines[:-1]))
        return make_index(path)

    monkeypatch.setattr(containers, "make_index", cut)
    address = f"http://127.0.0.1:{nginx.port}/text-0.jsonl"
    with pytest.raises(ShardError, match=r"text-0\.jsonl: expected \d+ bytes in the copy at .*XDG_CACHE_HOME"):
        opened(address)
    # Nothing of it is kept.
    monkeypatch.setattr(containers, "make_index", make_index)
    assert len(opened(address)) == 7


def test_bytes_that_stay_wrong_are_skipped_as_on_a_disk(nginx, own: Path):
    path = own / "a.tar"
    write_tar(path, 0, 3)
    address = f"http://127.0.0.1:{nginx.port}/{own.name}/a.tar"
    for place in (address, str(path)):
        opened(place)
    times = path.stat().st_mtime_ns
    data = bytearray(path.read_bytes())
    data[data.index(b"caption 1")] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(times, times))
    there, here = dump(opened(address)), dump(opened(str(path)))
    assert there == here
    assert there[1] == ("skipped", "checksum")


def test_an_index_is_made_once_and_lies_in_the_cache_folder(tmp_path: Path, proxy):
    address = f"http://127.0.0.1:{proxy.port}/pair-0.tar"
    opened(address)
    place = Path(local_place(address))
    assert place.is_relative_to(tmp_path / "cache" / "interleave-data")
    # The copy that it was made from is gone.
    assert sorted(path.name for path in place.parent.iterdir()) == ["pair-0.tar.index", "pair-0.tar.lock"]
    proxy.harm.requests.clear()
    opened(address)
    assert proxy.harm.requests == [("/pair-0.tar", "bytes=0-0")]


def test_the_index_tool_takes_addresses(repo_root: Path, proxy):
    """Twice: the second time nothing is left to do, and nothing is read but the sizes."""
    address = f"http://127.0.0.1:{proxy.port}/text-{{0..1}}.jsonl"
    for said in ("indexed 2 of 2 shards, 14 samples; 0 were up to date", "0 samples; 2 were up to date"):
        proxy.harm.requests.clear()
        command = [sys.executable, str(repo_root / "tools" / "index.py"), address, "--jobs", "1"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert said in done.stdout, done.stderr
    assert {asked for _, asked in proxy.harm.requests} == {"bytes=0-0"}
    assert len(dump(opened(address))) == 14


def test_only_indexed_shards_are_taken_where_that_is_asked_for(nginx):
    base = f"http://127.0.0.1:{nginx.port}"
    opened(f"{base}/pair-1.tar")
    source = opened(f"{base}/pair-{{0..2}}.tar", indexed_only=True)
    assert (list(source.shards), source.num_left_out) == (["pair-1.tar"], 2)


def test_a_damaged_shard_is_named_by_its_address(nginx, own: Path):
    (own / "cut.tar").write_bytes(b"no tar")
    with pytest.raises(ShardError, match=rf"far: http://127\.0\.0\.1:\d+/{own.name}/cut\.tar: expected a whole tar"):
        opened(f"http://127.0.0.1:{nginx.port}/{own.name}/cut.tar")


def test_records_of_a_pack_are_fetched_together_and_what_is_kept_is_bounded(monkeypatch, shards: Path, proxy):
    source = opened(f"http://127.0.0.1:{proxy.port}/pair-{{0..2}}.tar")
    here = opened(str(shards / "pair-*.tar"))
    proxy.harm.requests.clear()
    source.read_ahead([3, 0, 1, 2, 12, 11])
    # Neighbours in one request, two shards in two.
    assert len(proxy.harm.requests) == 2
    assert dump(source, [0, 1, 2, 3, 11, 12]) == dump(here, [0, 1, 2, 3, 11, 12])
    assert len(proxy.harm.requests) == 2
    forget()
    monkeypatch.setattr(remote, "_KEPT_BYTES", 4000)
    for _ in range(2):
        source.read_ahead(range(15))
        assert dump(source) == dump(here)
        assert 0 < remote._process().kept.num_bytes <= 4000


def test_large_records_are_read_member_by_member(monkeypatch, shards: Path, proxy):
    source = opened(f"http://127.0.0.1:{proxy.port}/pair-0.tar")
    monkeypatch.setattr(remote, "_RECORD_BYTES", 100)
    assert dump(source) == dump(opened(str(shards / "pair-0.tar")))
    assert remote._process().kept.num_bytes == 0


def test_an_address_in_a_sample_is_not_opened(tmp_path: Path, own: Path, proxy, monkeypatch):
    """Of a tar's record, of JSON lines with an image root, and without one."""
    dialled: list[object] = []
    connect = socket.create_connection
    monkeypatch.setattr(
        socket, "create_connection", lambda address, *a, **k: dialled.append(address) or connect(address, *a, **k)
    )
    base = f"http://127.0.0.1:{proxy.port}"
    images = [f"{base}/pair-0.tar", "s3://shards/deep/pair-0.tar", "gs://a/b.jpg", "file:///etc/passwd", "/etc/passwd"]
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "that"}]
    lines = [json.dumps({"id": str(n), "image": image, "conversations": turns}) for n, image in enumerate(images)]
    (own / "a.jsonl").write_text("\n".join(lines))
    for root in (str(tmp_path), None):
        cfg = SourceConfig(name="far", format="llava-json", path=f"{base}/{own.name}/a.jsonl", image_root=root)
        source = open_source(cfg)
        reasons = []
        for index in range(len(source)):
            with pytest.raises(SkipSample) as caught:
                [image.read() for image in source[index].images()]
            reasons.append(caught.value.reason.value)
        assert set(reasons) <= {"path_refused", "unreadable_file"}
        assert len(reasons) == len(images)
    assert set(proxy.harm.paths) == {f"/{own.name}/a.jsonl"}
    # The proxy's own calls are its server's.
    assert set(dialled) == {("127.0.0.1", proxy.port), ("127.0.0.1", proxy.upstream)}


def test_passwords_and_signatures_are_used_and_never_shown(nginx, caplog):
    address = f"http://me:secret@127.0.0.1:{nginx.port}/closed/pair-0.tar?sig=abc123"
    with caplog.at_level(logging.DEBUG):
        assert len(opened(address)) == 5
        with pytest.raises(ShardError) as caught:
            opened(address.replace("secret", "guess-secret"))
        assert "status 401" in str(caught.value)
        with pytest.raises(DataFileError) as unknown:
            opened(address.replace(".tar", ".zip"))
    said = " ".join([str(caught.value), str(unknown.value), caplog.text, repr(caught.value.__context__)])
    assert "127.0.0.1" in said
    for part in ("secret", "me:", "abc123"):
        assert part not in said
    # Who asks does not matter for where the index lies.
    assert local_place(address) == local_place(address.replace("me:secret@", "").replace("abc", "def"))


def test_keys_and_signed_addresses_of_a_store_are_never_shown(monkeypatch, s3: int, caplog):
    use_s3(monkeypatch, s3)
    with caplog.at_level(logging.DEBUG, "interleave_data"), pytest.raises(ShardError) as missing:
        opened("s3://shards/deep/none.tar")
    assert "s3://shards/deep/none.tar" in str(missing.value)
    assert "status 404" in str(missing.value)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/none")
    pytest.importorskip("s3fs").S3FileSystem.clear_instance_cache()
    stores._STORES.clear()
    with pytest.raises(ShardError, match="NoCredentialsError; check the credentials in the environment") as refused:
        opened("s3://shards/deep/pair-0.tar")
    said = f"{missing.value} {refused.value} {caplog.text}"
    for part in ("very-secret", "Signature", "X-Amz"):
        assert part not in said


def test_a_store_gives_its_own_headers(monkeypatch, nginx):
    """gs:// as gcsfs has it: an address, and a token in the head; here a login that nginx knows."""

    class Credentials:
        def apply(self, headers: dict[str, str]) -> None:
            headers["Authorization"] = "Basic bWU6c2VjcmV0"

    @dataclass
    class Store:
        credentials = Credentials()

        def url(self, path: str) -> str:
            return f"http://127.0.0.1:{nginx.port}/closed/{path.removeprefix('bucket/')}?alt=media"

        def glob(self, pattern: str) -> list[str]:
            return ["bucket/pair-2.tar", "bucket/pair-1.tar", "bucket/notes.txt"]

    monkeypatch.setitem(stores._STORES, (os.getpid(), "gs"), Store())
    source = opened("gs://bucket/pair-*.tar")
    assert list(source.shards) == ["pair-1.tar", "pair-2.tar"]
    assert told(source, 0)[0] == "pair-1.tar:0005"


def test_a_store_whose_package_is_missing_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ShardError, match=r"s3://: expected interleave-data\[remote\], got no s3fs; install it"):
        opened("s3://shards/a.tar")


def test_tls_is_spoken_to_trusted_servers_only(monkeypatch, nginx):
    if nginx.tls_port is None:
        pytest.skip("no openssl: expected the program to make a certificate, got none")
    address = f"https://127.0.0.1:{nginx.tls_port}/pair-0.tar"
    with pytest.raises(ShardError, match="a certificate that is not to be trusted"):
        opened(address)
    monkeypatch.setenv("SSL_CERT_FILE", str(nginx.certificate))
    forget()
    assert len(dump(opened(address))) == 5


def test_redirections_and_proxies_are_followed(monkeypatch, nginx, proxy):
    there = dump(opened(f"http://127.0.0.1:{nginx.port}/pair-0.tar"))
    assert dump(opened(f"http://127.0.0.1:{nginx.port}/moved/pair-0.tar")) == there
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.port}")
    assert dump(opened("http://shards.invalid/pair-0.tar")) == there
    assert set(proxy.harm.paths) == {"/pair-0.tar"}


def test_what_lets_in_is_not_sent_on_to_another_host_nor_in_the_clear():
    asked = Target("https://me:secret@host/a.tar", {"Authorization": "Bearer x"})
    assert http_ranges._next_hop(asked, "/b.tar") == Target("https://me:secret@host/b.tar", asked.headers)
    assert http_ranges._next_hop(asked, "https://other/b.tar") == Target("https://other/b.tar", {})
    for location in ("http://host/a.tar", "file:///etc/passwd", ""):
        with pytest.raises(Refusal, match="which is not followed"):
            http_ranges._next_hop(asked, location)


def test_a_read_that_goes_on_failing_is_heard_of(proxy, caplog):
    source = opened(f"http://127.0.0.1:{proxy.port}/text-0.jsonl")
    left = iter(range(9))
    proxy.harm.of = lambda path, asked: "busy" if next(left, None) is not None else ""
    with caplog.at_level(logging.WARNING):
        assert told(source, 0)[1]
    said = " ".join(record.getMessage() for record in caplog.records)
    assert re.findall(r"(\d+) attempts failed, the last with status 503", said) == ["4", "8"]


FORKED = """
import os, sys
from interleave_data import SourceConfig, open_source, remote
remote._KEPT_BYTES = 0
source = open_source(SourceConfig(name="far", format="text", path=sys.argv[1]))
texts = lambda: [source[n].turns[0].parts[0].text for n in range(7)]
expected = [f"line 0.{n} " + "x" * (n * 13 % 7) for n in range(7)]
assert texts() == expected
child = os.fork()
is_same = all(texts() == expected for _ in range(20))
if child == 0:
    os._exit(0 if is_same else 1)
assert is_same and os.waitpid(child, 0)[1] == 0 and source.take_retries() == (0, "")
"""


def test_a_forked_process_shares_no_connection(nginx):
    """Both read the same records over and over; with one socket between them each would get the other's answers."""
    address = f"http://127.0.0.1:{nginx.port}/text-0.jsonl"
    done = subprocess.run([sys.executable, "-c", FORKED, address], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_paths_of_a_data_file_may_be_addresses_and_lists(tmp_path: Path, shards: Path, nginx):
    base = f"http://127.0.0.1:{nginx.port}"
    (tmp_path / "near.jsonl").write_text('{"text": "near"}\n')
    (tmp_path / "data.toml").write_text(
        f'[[sources]]\nname = "mixed"\nformat = "text"\n'
        f'path = ["near.jsonl", "{base}/text-{{0..1}}.jsonl"]\n[remote]\ntotal_s = 20.0\n'
    )
    data_file = load_data_file(tmp_path / "data.toml")
    (source,) = open_sources(data_file)
    assert isinstance(source, RecordSource)
    assert list(source.shards) == ["near.jsonl", "text-0.jsonl", "text-1.jsonl"]
    assert dump(source)[1:] == dump(opened(str(shards / "text-*.jsonl")))
    assert data_file.remote.total_s == 20


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"path": "ftp://host/a.tar"}, "path: expected a path, or an address with s3://"),
        ({"path": "file:///a.tar"}, "path: expected a path, or an address with s3://"),
        ({"path": "https:/me:secret@host/a.tar"}, "path: expected https://…, got https:…; an address has two slashes"),
        ({"path": "S3:bucket/a.tar"}, "path: expected S3://…, got S3:…; an address has two slashes"),
        ({"path": ()}, "path: expected at least one"),
        ({"path": "https://host/a.tar", "image_root": "s3://me:secret@a/b"}, "image_root: expected .*, got s3://a/b"),
        ({"path": "https://host/a.tar", "cut_shards": "skip"}, "cut_shards: expected"),
    ],
)
def test_a_source_refuses_what_it_cannot_read(fields, words):
    with pytest.raises(ValueError, match=words):
        SourceConfig(name="far", format="captions", **fields)


def test_an_address_without_a_host_is_refused():
    for address in ("https:///a.tar", "https://host:port/a.tar", "https://me:secret@[::1/a.tar"):
        with pytest.raises(DataFileError, match="expected https://HOST/NAME") as caught:
            opened(address)
        assert "secret" not in str(caught.value)
    for address in ("s3:///a.tar", "gs://bucket-of-a.tar"):
        with pytest.raises(DataFileError, match=r"expected (s3|gs)://BUCKET/NAME"):
            opened(address)
    for address in ("http://a..b/a.tar", "http://a b/a.tar"):
        with pytest.raises(ShardError, match="an address that is none"):
            opened(address)


def test_a_shard_that_is_named_twice_is_refused(nginx):
    address = f"http://127.0.0.1:{nginx.port}/pair-0.tar"
    with pytest.raises(DataFileError, match=r"expected each shard once, got http://127\.0\.0\.1"):
        opened((address, address))


def test_shards_that_differ_in_their_query_alone_are_refused():
    """One place in the cache folder would hold both indexes, in turn."""
    with pytest.raises(DataFileError, match=r"expected each shard once, got http://host/a\.tar\?…"):
        opened(("http://host/a.tar?part=1", "http://host/a.tar?part=2"))


@pytest.mark.parametrize("location", ["http://host:port/a.tar", "http://[::1/a.tar", "//host:99999/a.tar"])
def test_a_redirection_to_no_address_is_refused(location):
    with pytest.raises(Refusal, match="an address that is none"):
        http_ranges._next_hop(Target("http://host/a.tar"), location)


def test_braces_are_written_out():
    assert list(expand("a-{08..11}-{x,y}.tar"))[:3] == ["a-08-x.tar", "a-08-y.tar", "a-09-x.tar"]
    assert len(list(expand("a-{08..11}-{x,y}.tar"))) == 8
    assert list(expand("plain")) == ["plain"]
    with pytest.raises(ValueError, match="at most 1000000 shards"):
        expand("{0..9999}-{0..9999}")


def test_addresses_are_shown_without_what_lets_in():
    assert shown("https://u:p@host:1/a/b.tar?sig=1") == "https://host:1/a/b.tar?…"
    assert shown("s3://u:p@bucket/a?b#c.tar") == "s3://bucket/a?b#c.tar"
    assert shown("data/a.tar") == "data/a.tar"
    assert shown("s3://") == "s3://"
    assert shown("https://u:p@[::1/a.tar") == "https://…"
    assert "secret" not in repr(remote.RemoteObject("https://me:secret@host/a.tar").slice(0, 5))


KNOWN = Version(100, '"a"')
GOOD = {"Content-Range": "bytes 10-19/100", "Content-Length": "10", "ETag": '"a"'}


@pytest.mark.parametrize(
    ("status", "headers", "error"),
    [
        (206, GOOD, None),
        (206, {**GOOD, "Content-Range": "bytes 10-19/*"}, None),
        (206, {k: v for k, v in GOOD.items() if k != "ETag"}, None),
        (200, {"Content-Length": "100"}, WrongAnswer),
        (206, {}, WrongAnswer),
        (206, {**GOOD, "Content-Range": "bytes 9-18/100"}, WrongAnswer),
        (206, {**GOOD, "Content-Range": "bytes 10-18/100"}, WrongAnswer),
        (206, {**GOOD, "Content-Length": "9"}, WrongAnswer),
        (206, {**GOOD, "Content-Encoding": "gzip"}, WrongAnswer),
        (206, {**GOOD, "Content-Range": "bytes 10-19/101"}, Refusal),
        (206, {**GOOD, "ETag": '"b"'}, Refusal),
        (403, {}, Refusal),
        (416, {"Content-Range": "bytes */5"}, Refusal),
        (429, {}, Interrupted),
        (503, {}, Interrupted),
        (522, {}, Interrupted),
        (206, {**GOOD, "Content-Range": f"bytes 10-19/{'9' * 5000}"}, WrongAnswer),
    ],
)
def test_an_answer_is_held_against_the_question(status, headers, error):
    if error is None:
        assert check_answer(status, headers, 10, 20, KNOWN)[0] == 10
    else:
        with pytest.raises(error):
            check_answer(status, headers, 10, 20, KNOWN)


def test_an_empty_object_has_size_nought():
    assert check_answer(416, {"Content-Range": "bytes */0", "ETag": '"e"'}, 0, 1, None) == (0, Version(0, '"e"'))
