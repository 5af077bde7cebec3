"""tools/index.py and tools/pack_shards.py: what they write is what is read, and nothing is done twice or in silence."""

import io
import json
import subprocess
import sys
import tarfile
from hashlib import sha256
from pathlib import Path

import pytest
from PIL import Image

from interleave_data import (
    ImagePart,
    RecordSource,
    SkipCounter,
    SkipLimits,
    SourceConfig,
    load_data_file,
    open_source,
)

ADDRESS = "https://example.com/cat.png"


def run(repo_root: Path, tool: str, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(repo_root / f"tools/{tool}.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True)


def png(side: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with a.png, b.png and what was found at an address; of 1, 2 and 3 pixels."""
    folder = tmp_path / "pictures"
    digest = sha256(ADDRESS.encode()).hexdigest()
    (folder / digest[:2]).mkdir(parents=True)
    for name, side in [("a.png", 1), ("b.png", 2), (f"{digest[:2]}/{digest}.png", 3)]:
        (folder / name).write_bytes(png(side))
    return folder


def outline(sample) -> list[object]:
    """Parts of all turns: a text, or the width of a picture."""
    parts = [part for turn in sample.turns for part in turn.parts]
    return [part.decode().width if isinstance(part, ImagePart) else part.text for part in parts]


def opened(path: object, fmt: str, root: Path | None = None, **more) -> RecordSource:
    return open_source(SourceConfig(name="s", format=fmt, path=str(path), image_root=root and str(root), **more))


@pytest.fixture
def index_here(repo_root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """tools/index.py in this process, which has torch at hand already: arguments → what it prints."""
    monkeypatch.syspath_prepend(str(repo_root / "tools"))
    import index

    def call(*args: object) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["index", *map(str, args)])
        index.main()
        return capsys.readouterr().out.splitlines()

    return call


@pytest.mark.parametrize("jobs", [1, 2])
def test_index_writes_what_is_missing_and_names_what_is_damaged(repo_root: Path, tmp_path: Path, jobs: int) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("a.jsonl", "deep/b.jsonl"):
        (tmp_path / name).write_text('{"text": "x"}\n' * 3)
    (tmp_path / "bad.tar").write_bytes(b"x" * 2000)
    (tmp_path / "README").write_text("not a shard")
    done = run(repo_root, "index", tmp_path, "--jobs", jobs)
    assert done.returncode == 1
    assert done.stdout == "indexed 2 of 3 shards, 6 samples; 0 were up to date\n"
    assert "bad.tar: expected a whole tar archive" in done.stderr
    assert sorted(path.name for path in tmp_path.rglob("*.index")) == ["a.jsonl.index", "b.jsonl.index"]
    (tmp_path / "bad.tar").unlink()
    # A shard that grew is indexed anew, since that is what was asked for; one more is added.
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write('{"text": "y"}\n')
    (tmp_path / "c.jsonl").write_text('{"text": "x"}\n')
    done = run(repo_root, "index", tmp_path / "*.jsonl", tmp_path / "deep", "--jobs", jobs)
    assert (done.returncode, done.stdout) == (0, "indexed 2 of 3 shards, 5 samples; 1 were up to date\n")
    assert len(opened(tmp_path / "*.jsonl", "text", indexed_only=True)) == 5


def test_index_refuses_what_it_cannot_do(repo_root: Path, tmp_path: Path) -> None:
    for args, words in [
        ([tmp_path / "absent.tar"], "absent.tar: expected .tar, .json, .jsonl, .parquet there, got none"),
        ([tmp_path, "--checkpoint", tmp_path], "--checkpoint: expected data files"),
        ([tmp_path, "--jobs", 0], "--jobs: expected at least 1, got 0"),
        ([tmp_path / "absent.toml"], "absent.toml: expected a readable data file"),
    ]:
        done = run(repo_root, "index", *args)
        assert done.returncode == 2
        assert words in done.stderr


def test_index_measures_samples_exactly_for_a_checkpoint(
    index_here, tmp_path: Path, pictures: Path, tiny_model, tiny_processor
) -> None:
    from blip3_lite import save_model

    save_model(tmp_path / "model", tiny_model, tiny_processor)
    rows = [
        {"images": ["b.png", None], "texts": [None, "the square"]},
        {"images": ["absent.png", None], "texts": [None, "red"]},
        {"images": [None], "texts": ["what colour is the square?"]},
    ]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data_file = tmp_path / "data.toml"
    data_file.write_text('[[sources]]\nname = "s"\nformat = "obelics"\npath = "x.jsonl"\nimage_root = "pictures"\n')
    for num_bad in (1, 0):  # what is measured is not measured again
        told = index_here(data_file, "--checkpoint", tmp_path / "model")
        assert told[1] == f"measured s: 3 samples, {num_bad} newly found that cannot be encoded"
    (cfg,) = load_data_file(data_file).sources
    source = open_source(cfg, lengths=tiny_processor.size_fingerprint)
    encoded = [tiny_processor.encode(source[n]) for n in (0, 2)]
    assert [source.size(n) for n in (0, 2)] == [(item.length, len(item.tiles)) for item in encoded]
    assert source.size(1) is None
    assert open_source(cfg, lengths="another").size(0) is None


def test_lengths_are_those_that_a_run_asks_for(
    index_here, tmp_path: Path, pictures: Path, tiny_model, tiny_processor
) -> None:
    """Under the data file's limits on pictures, and for pre-training's one view."""
    from blip3_lite import Processor, save_model

    save_model(tmp_path / "model", tiny_model, tiny_processor)
    Image.new("RGB", (40, 10)).save(pictures / "wide.png")
    (tmp_path / "x.jsonl").write_text(json.dumps({"images": ["wide.png", None], "texts": [None, "the square"]}))
    data_file = tmp_path / "data.toml"
    data_file.write_text(
        '[[sources]]\nname = "s"\nformat = "obelics"\npath = "x.jsonl"\nimage_root = "pictures"\n'
        "[image_limits]\nmax_pixels = 500\n"
    )
    for views in ("tiles", "base"):
        told = index_here(data_file, "--checkpoint", tmp_path / "model", "--views", views)
        assert told[1].startswith("measured s: 1 samples")
    loaded = load_data_file(data_file)
    for cfg in (tiny_processor.cfg, tiny_processor.cfg.with_base_views()):
        processor = Processor(cfg, tiny_processor.tokenizer, loaded.image_limits)
        source = open_source(loaded.sources[0], lengths=processor.size_fingerprint)
        assert source.size(0) == processor.measure(source[0])


def test_packed_llava_reads_as_the_records_did(repo_root: Path, tmp_path: Path, pictures: Path) -> None:
    def talk(text: str, **more) -> dict:
        return {"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": '"KEY.0.jpg"'}], **more}

    records = [
        talk("<image>What?", image="a.png"),
        talk("<image> or <image>, not <image>?", image=["b.png", "a.png", "b.png"], id=7),
        talk("<image>Lost?", image="absent.png"),
        talk("2 + 2?"),
    ]
    (tmp_path / "x.json").write_text(json.dumps(records))
    out = tmp_path / "out"
    done = run(repo_root, "pack_shards", tmp_path / "x.json", out, "--image-root", pictures, "--samples-per-shard", 2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"3 samples in 2 shards, in {out}", "left out: unreadable_file 1"]
    assert "x.json:2: unreadable_file" in done.stderr
    before = opened(tmp_path / "x.json", "llava-json", pictures)
    after = opened(out / "*.tar", "llava-json", indexed_only=True)
    assert [outline(after[n]) for n in range(3)] == [outline(before[n]) for n in (0, 1, 3)]
    assert [after[n].id for n in range(3)] == ["000000.tar:000000000", "000000.tar:000000001", "000001.tar:000000002"]
    # As webdataset groups members: by the name up to its first dot, in runs.
    with tarfile.open(out / "000000.tar") as tar:
        members = [(member.name, member.mtime, member.uid) for member in tar]
    assert members == [
        (name, 0, 0)
        for name in (
            "000000000.json", "000000000.0.png", "000000001.json", "000000001.0.png", "000000001.1.png",
        )
    ]  # fmt: skip
    again = tmp_path / "again"
    run(repo_root, "pack_shards", tmp_path / "x.json", again, "--image-root", pictures, "--samples-per-shard", 2)
    for path in out.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name
    assert sorted(path.name for path in out.iterdir()) == [
        "000000.tar", "000000.tar.index", "000001.tar", "000001.tar.index",
    ]  # fmt: skip


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_packed_documents_read_as_the_rows_did(repo_root: Path, tmp_path: Path, pictures: Path, suffix: str) -> None:
    rows: list[dict] = [
        {"images": [None, ADDRESS, None], "texts": ["One.", None, "Two."], "metadata": '{"a": 1}'},
        {"images": ["b.png", None], "texts": [None, "Three."], "metadata": None},
    ]
    path = tmp_path / f"x{suffix}"
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    done = run(repo_root, "pack_shards", path, tmp_path / "out", "--image-root", pictures)
    assert done.returncode == 0, done.stderr
    before, after = opened(path, "obelics", pictures), opened(tmp_path / "out/*.tar", "obelics", tmp_path)
    assert [outline(after[n]) for n in range(2)] == [outline(before[n]) for n in range(2)]
    assert outline(after[0]) == ["One.", 3, "Two."]


def test_packed_folder_is_caption_pairs(repo_root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in" / "sub"
    folder.mkdir(parents=True)
    for name, side in [("b.c.png", 2), ("a.png", 1)]:
        (folder / name).write_bytes(png(side))
        (folder / name).with_suffix(".txt").write_text(f"caption of {name}")
    (folder / "lone.png").write_bytes(png(4))
    done = run(repo_root, "pack_shards", tmp_path / "in", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    source = opened(tmp_path / "out/*.tar", "caption-tars")
    assert [outline(source[n]) for n in range(2)] == [[1, "caption of a.png"], [2, "caption of b.c.png"]]
    assert len(source) == 3
    done = run(repo_root, "pack_shards", tmp_path / "in", tmp_path / "out")
    assert done.returncode == 2
    assert "expected an empty folder or none" in done.stderr


def test_bench_index_reports_what_it_measures(repo_root: Path) -> None:
    for kind in ("json", "tar"):
        done = run(repo_root, "bench_index", "--most", 1000, "--kind", kind)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[1].split()[0] == "1,000"


def test_packed_mmc4_holds_its_nested_pictures(repo_root: Path, tmp_path: Path, pictures: Path) -> None:
    images = [
        {"image_name": "b.png", "raw_url": "https://example.com/absent.png", "matched_text_index": 1},
        {"image_name": None, "raw_url": ADDRESS, "matched_text_index": 0},
    ]
    (tmp_path / "x.jsonl").write_text(json.dumps({"text_list": ["One.", "Two."], "image_info": images}))
    done = run(repo_root, "pack_shards", tmp_path / "x.jsonl", tmp_path / "out", "--image-root", pictures)
    assert done.returncode == 0, done.stderr
    assert outline(opened(tmp_path / "out/*.tar", "mmc4")[0]) == [3, "One.", 2, "Two."]


def test_packing_takes_sample_after_sample(tmp_path: Path, repo_root: Path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(repo_root / "tools"))
    from pack_shards import pack

    out = tmp_path / "out"
    out.mkdir()

    def samples():
        for number in range(5):
            written = sum(path.stat().st_size for path in out.glob(".*.tmp")) + 40_000 * len(list(out.glob("*.tar")))
            # What was given out before is on disk: no shard is gathered in memory.
            assert written >= 20_000 * (number - number % 2)
            yield str(number), [("txt", bytes(20_000))]

    assert pack(samples(), out, 2) == 5
    assert [len(opened(path, "caption-tars")) for path in sorted(out.glob("*.tar"))] == [2, 2, 1]


def test_packing_names_what_it_cannot_write(repo_root: Path, tmp_path: Path, pictures: Path) -> None:
    (tmp_path / "file").write_text("")
    done = run(repo_root, "pack_shards", pictures, tmp_path / "file" / "out")
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert "Not a directory" in done.stderr


def test_packing_leaves_out_and_names_what_would_not_be_read(repo_root: Path, tmp_path: Path) -> None:
    """To the byte: the longest record that is read is written, and reads as it did."""
    overhead = len('{"text":""}')
    lengths = [1, (4 << 20) - overhead + 1, (4 << 20) - overhead]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": "x" * length}) + "\n" for length in lengths))
    done = run(repo_root, "pack_shards", tmp_path / "x.jsonl", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"2 samples in 1 shards, in {tmp_path / 'out'}", "left out: too_many_bytes 1"]
    assert "x.jsonl:1: too_many_bytes: expected a .json member of at most 4194304 bytes, got 4194305" in done.stderr
    before, after = opened(tmp_path / "x.jsonl", "text"), opened(tmp_path / "out/*.tar", "text")
    assert [outline(after[n]) for n in range(2)] == [outline(before[n]) for n in (0, 2)]


def test_packing_a_folder_leaves_out_and_names_what_would_not_be_read(tmp_path: Path, repo_root: Path, monkeypatch):
    monkeypatch.syspath_prepend(str(repo_root / "tools"))
    from pack_shards import folder_samples

    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes(png(1))
    (tmp_path / "a.txt").write_text("fine")
    for name, num_bytes in (("b.txt", (4 << 20) + 1), ("c.png", (64 << 20) + 1)):
        with (tmp_path / name).open("r+b" if name == "c.png" else "wb") as file:
            file.truncate(num_bytes)
    left_out: list[str] = []
    skips = SkipCounter(SkipLimits(max_share=1, max_consecutive=9), on_skip=lambda _, skip: left_out.append(str(skip)))
    assert [name for name, _ in folder_samples(tmp_path, skips)] == [str(tmp_path / "a.png")]
    assert [text.partition(":")[0] for text in left_out] == [str(tmp_path / f"{name}.png") for name in "bc"]
    assert skips.by_reason() == {"too_many_bytes": 2}
