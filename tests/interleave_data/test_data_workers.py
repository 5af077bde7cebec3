"""Packs made in other processes: the same as here, in order, and no process left behind.

Starting a worker takes a good part of a second, so a test asks for as few as it can.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any, cast

import pytest

from interleave_data import PlanConfig, SkipCounter, SkipLimits, StoppedWaiting, Stream, WorkerError

PLAN = PlanConfig(max_tokens=90, ratios=(2.0, 1.0), seed=5, look_ahead=6)


@pytest.fixture
def parts(repo_root: Path, monkeypatch: pytest.MonkeyPatch):
    """The module that workers import."""
    monkeypatch.syspath_prepend(str(repo_root / "tests" / "interleave_data"))
    import worker_parts

    return worker_parts


def stream(parts, num_workers=0, encoder=None, fifo=None, **options) -> Stream:
    sources = [parts.source("long", 40, fifo), parts.source("short", 9)]
    skips = SkipCounter(SkipLimits(max_share=0.9))
    return Stream(sources, encoder or parts.Letters(), PLAN, num_workers=num_workers, skips=skips, **options)


def outline(data: Stream, batch) -> tuple:
    """All that must be the same, skips and saved state included."""
    arrays = batch.data
    return (
        batch.number, batch.ids, batch.num_tokens, arrays["letters"].tobytes(), arrays["ends"].tolist(),
        str(arrays["ends"].dtype), arrays["nested"][0]["empty"].shape, json.dumps(data.state_dict(), sort_keys=True),
    )  # fmt: skip


def test_any_number_of_workers_on_resume_gives_the_same_batches(parts):
    """(T6, T10): 2 → 0 → 4 workers, which are more than there are sources."""
    whole = stream(parts)
    expected = [outline(whole, batch) for batch in islice(whole, 30)]
    got, state = [], None
    for num_workers, count in [(2, 9), (0, 5), (4, 16)]:
        with stream(parts, num_workers) as data:
            if state is not None:
                data.load_state_dict(json.loads(state))
            got += [outline(data, batch) for batch in islice(data, count)]
            state = json.dumps(data.state_dict())
    assert got == expected
    # The skips of both kinds are in the states compared; they are there.
    assert set(whole.skips.by_reason()) == {"bad_record", "broken_image"}


def test_a_state_of_what_was_made_ahead_loses_batches(parts):
    """(T6): the control, what a loader does that saves where its workers are."""
    data = stream(parts)
    expected = [batch.ids for batch in islice(data, 12)]
    before = stream(parts)
    for _ in range(4):
        next(before)
    ahead = before.state_dict()
    for _ in range(2):
        # As a worker would, without anybody's consuming it.
        assert before._packs is not None
        ahead["plan"] = dict(next(before._packs).state)
    after = stream(parts)
    after.load_state_dict(json.loads(json.dumps(ahead)))
    assert [batch.ids for batch in islice(after, 8)] != expected[4:]


def test_a_stream_that_was_closed_goes_on_from_what_was_consumed(parts):
    data = stream(parts, 1)
    whole = stream(parts)
    expected = [outline(whole, batch) for batch in islice(whole, 6)]
    got = [outline(data, batch) for batch in islice(data, 3)]
    data.close()
    got += [outline(data, batch) for batch in islice(data, 3)]
    data.close()
    assert got == expected


def test_the_end_of_the_sources_is_the_end_of_the_stream(parts):
    cfg = PlanConfig(max_tokens=90, epochs=(2.0,), look_ahead=6)
    skips = [SkipCounter(SkipLimits(max_share=0.9)) for _ in range(2)]
    ends = []
    for num_workers in (0, 1):
        with Stream(
            [parts.source("a", 20)], parts.Letters(), cfg, num_workers=num_workers, skips=skips[num_workers]
        ) as data:
            ends.append([batch.ids for batch in data])
    assert ends[0] == ends[1]
    assert sum(map(len, ends[0])) == 2 * len([n for n in range(20) if n % 7 not in (3, 5)])
    assert skips[0].table() == skips[1].table()


def test_workers_are_at_most_two_packs_ahead(parts, tmp_path: Path):
    with stream(parts, 1, parts.Counting(str(tmp_path))) as data:
        for _ in range(6):
            next(data)
        consumed = cast(Any, data.state_dict()["plan"])["number"]
        deadline = time.monotonic() + 10
        while len(list(tmp_path.iterdir())) < consumed + 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert len(list(tmp_path.iterdir())) == consumed + 2


@contextmanager
def stalled(parts, tmp_path: Path) -> Iterator[tuple[Stream, Any]]:
    """A stream whose worker will stall, and its pool. The shard was a file when its index was made; a pipe that nobody
    writes to stands for a stalled disk."""
    fifo = str(tmp_path / "000.tar")
    os.mkfifo(fifo)
    with stream(parts, 1, fifo=fifo, data_timeout_s=60.0) as data:
        # The start of the process takes its time; the pipe is not in the first packs.
        next(data)
        yield data, data._packs


def check_stall_is_told(data: Stream, within_s: float) -> None:
    """It ends in time, with the sample and its worker; if it does not, nobody waits for it here."""
    raised: list[BaseException] = []
    done = threading.Event()

    def read() -> None:
        try:
            list(islice(data, 30))
        except BaseException as error:  # noqa: BLE001  (looked at below)
            raised.append(error)
        done.set()

    threading.Thread(target=read, daemon=True).start()
    assert done.wait(within_s)
    assert len(raised) == 1
    assert isinstance(raised[0], WorkerError)
    assert re.search(r"data worker 0: .* within 1 s, .* it is reading long:11 \(11\)", str(raised[0]))


def test_a_stalled_reader_is_named_after_the_timeout(parts, tmp_path: Path):
    """(T30)"""
    with stalled(parts, tmp_path) as (data, pool):
        pool._timeout_s = 1.0
        check_stall_is_told(data, within_s=20.0)


@pytest.mark.parametrize("is_asked", [True, False])
def test_a_stalled_reader_keeps_nobody_from_stopping(parts, tmp_path: Path, is_asked: bool):
    """(T29): a real signal while the worker stalls; the control, a wait in which nobody asks, ends by its timeout."""
    wishes: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: wishes.append(number))
    sender = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM))
    try:
        with stalled(parts, tmp_path) as (data, pool):
            if is_asked:
                data.stop_waiting_if(lambda: bool(wishes))
            else:
                pool._timeout_s = 1.5
            sender.start()
            with pytest.raises(StoppedWaiting if is_asked else WorkerError):
                list(islice(data, 30))
            assert wishes == [signal.SIGTERM]
            assert not any(process.is_alive() for process in pool._processes)
    finally:
        sender.join()
        signal.signal(signal.SIGTERM, before)


def test_a_timeout_that_is_not_heeded_shows(parts, tmp_path: Path):
    """(T30): the control, a wait as long as the worker takes."""
    with stalled(parts, tmp_path) as (data, _), pytest.raises(AssertionError, match=r"wait\(3"):
        check_stall_is_told(data, within_s=3.0)


def test_a_dead_worker_and_its_pack_are_named(parts):
    """(T30)"""
    with (
        stream(parts, 2, parts.Dying()) as data,
        pytest.raises(WorkerError, match=r"data worker \d: expected pack \d+ from here, .* \(signal SIGKILL\)"),
    ):
        list(islice(data, 30))


@pytest.mark.parametrize(
    ("encoder", "message"), [("Faulty", "KeyError: 'oops'"), ("Unsendable", "collate: expected numbers, .* got object")]
)
def test_a_fault_in_a_worker_is_raised_here_with_its_trace(parts, encoder, message):
    with (
        stream(parts, 1, getattr(parts, encoder)()) as data,
        pytest.raises(WorkerError, match=f"data worker 0: .*{message}") as error,
    ):
        list(islice(data, 30))
    assert "worker_parts.py" in error.value.__notes__[0] or encoder == "Unsendable"


RUN = """
import signal, sys, worker_parts
from interleave_data import PlanConfig, SkipCounter, SkipLimits, Stream
if __name__ == "__main__":
    # A shell's background job is born deaf to it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sources = [worker_parts.source("long", 40), worker_parts.source("short", 9)]
    cfg = PlanConfig(max_tokens=90, ratios=(2.0, 1.0), seed=5, look_ahead=6)
    skips = SkipCounter(SkipLimits(max_share=0.9))
    data = Stream(sources, worker_parts.Letters(), cfg, num_workers=2, skips=skips)
    next(data)
    print(*(process.pid for process in data._packs._processes), flush=True)
    for batch in data:
        pass
"""


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A process that nobody has waited for is dead all the same.
    return " Z " not in Path(f"/proc/{pid}/stat").read_text() if Path(f"/proc/{pid}/stat").exists() else True


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_its_parent(parts, tmp_path: Path, number):
    script = tmp_path / "run.py"
    script.write_text(RUN)
    folder = str(Path(parts.__file__).parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([folder, *sys.path])}
    process = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, text=True
    )
    assert process.stdout is not None
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 2
    assert all(is_alive(pid) for pid in pids)
    process.send_signal(number)
    process.wait(30)
    process.stdout.close()
    deadline = time.monotonic() + 30
    while any(is_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(is_alive(pid) for pid in pids)


ORDER = """
import os, sys, worker_parts
from pathlib import Path
from interleave_data import PlanConfig, SkipCounter, SkipLimits, Stream
from interleave_data.config import DataFile, SourceConfig
from interleave_data import open_sources
if __name__ == "__main__":
    if "unsorted" in sys.argv[1]:
        import interleave_data.opening
        interleave_data.opening.sorted = list
    if "shuffled" in sys.argv[1]:
        listed, scanned = os.listdir, os.scandir
        os.listdir = lambda *args: sorted(listed(*args), reverse=True)
        class Scan(list):
            __enter__ = lambda self: self
            __exit__ = lambda self, *_: None
            def __next__(self): return self.pop()
        os.scandir = lambda *args: Scan(sorted(scanned(*args), key=lambda entry: entry.name, reverse=True))
    cfg = SourceConfig(name="tars", format="caption-tars", path=sys.argv[2])
    (source,) = open_sources(DataFile(sources=(cfg,)))
    from worker_parts import Letters, Encoded, Size, text_of
    class Texts(Letters):
        def measure(self, sample, limit=None, /): return Size(len(text_of(sample)), 1)
        def encode(self, sample, limit=None, /): return Encoded(text_of(sample), len(text_of(sample)))
    print(hash("a"))
    stream = Stream([source], Texts(), PlanConfig(max_tokens=60, epochs=(1.0,)))
    for batch in stream:
        print(batch.digest, *batch.ids)
"""


def orders(parts, folder: Path, *runs: tuple[str, str]) -> list[list[str]]:
    """What a process of its own says for each (hash seed, way of listing): its hash of a text, then its batches."""
    for shard in range(3):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for number in range(5):
                for suffix, content in (("jpg", b"never decoded"), ("txt", f"caption {shard} {number}".encode())):
                    member = tarfile.TarInfo(f"{number}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, BytesIO(content))
    script = folder / "order.py"
    script.write_text(ORDER)
    said = []
    for seed, listing in runs:
        environment = {
            **os.environ,
            "PYTHONHASHSEED": seed,
            "PYTHONPATH": os.pathsep.join([str(Path(parts.__file__).parent), *sys.path]),
        }
        command = [sys.executable, str(script), listing, str(folder / "*.tar")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        said.append(done.stdout.splitlines())
    return said


def test_order_depends_neither_on_hash_seed_nor_on_how_a_folder_is_listed(parts, tmp_path: Path):
    """(T31): in fresh processes. The control, shards as they are listed, in the last of them."""
    runs = [("0", "plain"), ("1", "shuffled"), ("random", "plain"), ("2", "shuffled unsorted")]
    first, *others, unsorted = orders(parts, tmp_path, *runs)
    assert len({lines[0] for lines in (first, *others)}) == 3
    assert len(" ".join(first[1:]).split()) > 15
    assert [lines[1:] for lines in others] == [first[1:]] * 2
    assert unsorted[1:] != first[1:]
