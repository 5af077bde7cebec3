import subprocess
import sys

import pytest

from interleave_data import (
    DataFileError,
    Mixture,
    PreferenceSample,
    RecordSource,
    Sample,
    ShardError,
    Size,
    SkipLimits,
    SourceConfig,
    load_data_file,
    open_sources,
)


def write(tmp_path, text):
    path = tmp_path / "data.toml"
    path.write_text(text)
    return path


WHOLE = """
[[sources]]
name = "chat"
format = "llava-json"
path = "chat.json"
image_root = "images"
ratio = 3

[[sources]]
name = "docs"
format = "obelics-jsonl"
path = "docs.jsonl"

[[sources]]
name = "pairs"
format = "preference-jsonl"
path = "pairs.jsonl"

[image_limits]
max_pixels = 1000

[skip_limits]
max_share = 0.5
"""


def test_data_file_opens_its_sources(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "chat.json").write_text('[{"question": "a", "answer": "b"}]')
    (tmp_path / "docs.jsonl").write_text('{"images": [null], "texts": ["t"]}\n')
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "p", "chosen": "c", "rejected": "r"}\n')
    data_file = load_data_file(write(tmp_path, WHOLE))
    sources = open_sources(data_file)
    assert [type(source[0]) for source in sources] == [Sample, Sample, PreferenceSample]
    assert [source.name for source in sources] == ["chat", "docs", "pairs"]
    assert [source.ratio for source in data_file.sources] == [3, 1, 1]
    assert data_file.image_limits.max_pixels == 1000
    assert data_file.skip_limits == SkipLimits(max_share=0.5)
    assert data_file.sources[0].image_root == str(tmp_path / "images")
    assert all(source[0].source == source.name for source in sources)


def test_caption_shards_by_pattern_in_order(shared_data, tmp_path):
    # Indexes are written beside shards, and the data are not ours.
    for shard in (shared_data / "captions").glob("*.tar"):
        (tmp_path / shard.name).symlink_to(shard)
    text = '[[sources]]\nname = "c"\nformat = "caption-tars"\npath = "*.tar"\ncaption = "json:alt"\n'
    (source,) = open_sources(load_data_file(write(tmp_path, text)))
    assert isinstance(source, RecordSource)
    assert len(source) == 450
    assert source[0].id.startswith("000000.tar")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (("ratio =", "ration ="), r"data\.toml: .*`ration`.*sources.*did you mean `ratio`"),
        (("[image_limits]", "[image_limit]"), "did you mean `image_limits`"),
        (("max_pixels", "maxpixel"), "did you mean `max_pixels`"),
        (("max_share", "zzz"), "known keys are max_share, max_consecutive, min_seen"),
        (("ratio = 3", 'ratio = "3"'), r"Expected `float`, got `str` - at `\$\.sources\[0\]\.ratio`"),
        (("ratio = 3", "ratio = 0"), "ratio: expected above 0"),
        (("llava-json", "llava"), "format: expected one of .*, got 'llava'; did you mean `llava-json`"),
        (('name = "docs"', 'name = "chat"'), "sources: expected each name once, got chat"),
        (('name = "docs"', 'name = ""'), "name: expected some text"),
        (('path = "docs.jsonl"', ""), "missing required field `path`"),
        (("max_pixels = 1000", "max_pixels = 0"), "max_pixels: expected 1 to"),
        (("max_share = 0.5", "max_share = 2"), "max_share: expected 0 to 1"),
        (("[[sources]]", "[[sources]"), r"data\.toml"),
    ],
)
def test_mistakes_are_named(tmp_path, change, match):
    with pytest.raises(DataFileError, match=match):
        load_data_file(write(tmp_path, WHOLE.replace(*change)))


def test_empty_and_absent_and_undecodable_data_files(tmp_path):
    with pytest.raises(DataFileError, match=r"absent\.toml: expected a readable data file"):
        load_data_file(tmp_path / "absent.toml")
    with pytest.raises(DataFileError, match="sources"):
        load_data_file(write(tmp_path, ""))
    with pytest.raises(DataFileError, match="sources: expected at least one"):
        load_data_file(write(tmp_path, "sources = []"))
    (tmp_path / "data.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(DataFileError, match="UTF-8"):
        load_data_file(tmp_path / "data.toml")


@pytest.mark.parametrize(
    ("fmt", "content", "more", "match"),
    [
        ("llava-json", None, "", r"s: expected a file at .*data\.json, got none; check `path`"),
        ("caption-tars", None, "", "s: expected a file at"),
        ("caption-tars", "[1]", "", r"s: expected \.tar for caption-tars, got .*data\.json; check `format`"),
        ("llava-json", "[]", "", "s: expected at least one sample"),
        ("llava-json", "[1", "", "s: .*expected a JSON array"),
        ("llava-json", "[1]", 'image_root = "absent"', "s: expected a folder at .*check `image_root`"),
        ("obelics-jsonl", "", "", "s: .*empty file"),
    ],
)
def test_sources_that_do_not_open_are_named(tmp_path, fmt, content, more, match):
    if content is not None:
        (tmp_path / "data.json").write_text(content)
    path = write(tmp_path, f'[[sources]]\nname = "s"\nformat = "{fmt}"\npath = "data.json"\n{more}\n')
    with pytest.raises((DataFileError, ShardError), match=match):
        open_sources(load_data_file(path))


def test_file_that_is_no_shard_by_its_suffix_is_refused(tmp_path):
    (tmp_path / "data.pkl").write_text("[1]")
    path = write(tmp_path, '[[sources]]\nname = "s"\nformat = "llava-json"\npath = "data.pkl"\n')
    with pytest.raises(DataFileError, match=r"s: expected one of \.tar, \.json, \.jsonl, \.parquet, got .*data\.pkl"):
        open_sources(load_data_file(path))


def test_pattern_takes_shards_of_any_container_and_nothing_else(tmp_path):
    record = '{"question": "a", "answer": "b"}'
    (tmp_path / "b.json").write_text(f"[{record}]")
    (tmp_path / "a.jsonl").write_text(f"{record}\n{record}\n")
    (tmp_path / "README").write_text("not data")
    path = write(tmp_path, '[[sources]]\nname = "s"\nformat = "llava-json"\npath = "*"\n')
    for _ in range(2):  # the second time there are indexes too
        (source,) = open_sources(load_data_file(path))
        assert [source[index].id for index in range(len(source))] == ["a.jsonl:0", "a.jsonl:1", "b.json:0"]


def test_folder_of_the_data_file_is_no_pattern(tmp_path):
    folder = tmp_path / "run[1]*"
    folder.mkdir()
    for name in ("a-0", "a-1"):
        (folder / f"{name}.jsonl").write_text('{"text": "t"}\n')
    for path, count in (("a-*.jsonl", 2), ("a-1.jsonl", 1)):
        data_file = load_data_file(write(folder, f'[[sources]]\nname = "docs"\nformat = "text"\npath = "{path}"\n'))
        assert len(open_sources(data_file)[0]) == count


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "docs.parquet").write_bytes(b"PAR1" + bytes(4) + b"PAR1")
    data_file = load_data_file(write(tmp_path, '[[sources]]\nname = "docs"\nformat = "text"\npath = "docs.parquet"\n'))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DataFileError, match=r"docs: parquet: .* install interleave-data\[parquet\]"):
        open_sources(data_file)


def test_damaged_shard_is_an_error_on_opening(tmp_path):
    (tmp_path / "0.tar").write_bytes(b"x" * 2000)
    path = write(tmp_path, '[[sources]]\nname = "s"\nformat = "caption-tars"\npath = "*.tar"\n')
    with pytest.raises(ShardError, match=r"0\.tar"):
        open_sources(load_data_file(path))


@pytest.mark.parametrize("caption", ["json", "json:", "text", ""])
def test_caption_setting_is_checked(caption):
    with pytest.raises(ValueError, match="caption: expected"):
        SourceConfig(name="s", format="caption-tars", path="x", caption=caption)


@pytest.mark.parametrize("change", [{"max_share": -0.1}, {"max_consecutive": 0}, {"min_seen": 0}])
def test_skip_limits_refuse(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        SkipLimits(**change)


def test_package_imports_without_torch():
    code = "import sys, interleave_data as d; d.Stream, d.DataFile, d.open_sources; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_window_and_epochs_of_a_source_reach_it_and_senseless_ones_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "row {number}"}}\n' for number in range(20)))
    table = '[[sources]]\nname = "a"\nformat = "text"\npath = "a.jsonl"\n'
    (tmp_path / "data.toml").write_text(f"{table}window = 8\nepochs = 1.5\n")
    file = load_data_file(tmp_path / "data.toml")
    [source] = open_sources(file)
    assert isinstance(source, RecordSource)
    assert (source.window, file.sources[0].epochs) == (8, 1.5)
    drawn = Mixture([source], seed=1)
    assert sorted(drawn.index(next(drawn)) for _ in range(20)) == list(range(20))
    for bad, match in (("window = 3", "window: expected at least 8"), ("epochs = 0.0", "epochs: expected above 0")):
        (tmp_path / "data.toml").write_text(f"{table}{bad}\n")
        with pytest.raises(DataFileError, match=match):
            load_data_file(tmp_path / "data.toml")


def test_measured_sizes_are_used_from_when_they_are_asked_for(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "three"}\n')
    (tmp_path / "data.toml").write_text('[[sources]]\nname = "a"\nformat = "text"\npath = "a.jsonl"\n')
    [source] = open_sources(load_data_file(tmp_path / "data.toml"))
    assert isinstance(source, RecordSource)

    def letters(sample) -> Size:
        return Size(len(sample.turns[0].parts[0].text), 0)

    source.measure("letters", letters, lambda: None)
    assert source.size(1) is None
    source.use_lengths("letters")
    assert [source.size(index) for index in range(2)] == [Size(3, 0), Size(5, 0)]
    source.use_lengths("words")
    assert source.size(1) is None
