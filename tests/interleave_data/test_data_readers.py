import json
import os
from contextlib import nullcontext
from io import BytesIO

import pytest
from PIL import Image

from interleave_data import (
    Encoder,
    FileBytes,
    ImagePart,
    InMemory,
    PlanConfig,
    PreferenceSample,
    RecordSource,
    Sample,
    ShardError,
    Size,
    SkipCounter,
    SkipLimits,
    SkipReason,
    SkipSample,
    Source,
    SourceConfig,
    Stream,
    TextPart,
    TooManySkips,
    Turn,
    open_source,
    samples_digest,
)
from interleave_data.containers import make_index
from interleave_data.json_shards import JsonShard
from interleave_data.sources import path_inside


@pytest.fixture
def root(tmp_path):
    """A folder with two pictures, and a third one outside it."""
    folder = tmp_path / "images"
    folder.mkdir()
    for path, side in [(folder / "a.png", 1), (folder / "b.png", 2), (tmp_path / "outside.png", 3)]:
        Image.new("RGB", (side, side)).save(path)
    return folder


def opened(path, fmt: str, text: str, root=None, name: str = "s") -> RecordSource:
    """A source of a file that is written now, whatever was there before."""
    path.write_text(text)
    path.with_name(f"{path.name}.index").unlink(missing_ok=True)
    return open_source(SourceConfig(name=name, format=fmt, path=str(path), image_root=root and str(root)))


def llava(root, *records, lines=False) -> RecordSource:
    text = "\n".join(map(json.dumps, records)) if lines else json.dumps(list(records), indent=1)
    return opened(root.parent / "data.json", "llava-json", text, root, "chat")


def talk(*values, **more) -> dict:
    speakers = ["human", "gpt"] * len(values)
    return {"conversations": [{"from": who, "value": text} for who, text in zip(speakers, values, strict=False)]} | more


def outline(sample) -> list[tuple[str, list[str]]]:
    """Turns as (role, parts), a picture written as its key in angle brackets."""
    return [
        (turn.role, [f"<{part.key}>" if isinstance(part, ImagePart) else part.text for part in turn.parts])
        for turn in sample.turns
    ]


def skip_of(source, index=0) -> SkipSample:
    with pytest.raises(SkipSample) as caught:
        source[index]
    return caught.value


def test_llava_single_image_in_place(root):
    source = llava(root, talk("<image>\nWhat?", "A dot.", "Sure?", "Yes.", id=7, image="a.png"))
    assert outline(source[0]) == [
        ("user", ["<a.png>", "What?"]),
        ("assistant", ["A dot."]),
        ("user", ["Sure?"]),
        ("assistant", ["Yes."]),
    ]
    assert (source[0].id, source[0].source) == ("data.json:0", "chat")
    assert source[0].images()[0].decode().size == (1, 1)


def test_llava_single_image_in_the_middle_stays_there(root):
    source = llava(root, talk("Hi", "Hello.", "In <image> is?", "A dot.", image="a.png"))
    assert outline(source[0])[2] == ("user", ["In ", "<a.png>", " is?"])


@pytest.mark.parametrize("question", ["What?", "<image>What?<image>", "<image>\n<image>\nWhat?"])
def test_llava_single_image_without_a_mark_of_its_own_goes_to_the_front(root, question):
    source = llava(root, talk(question, "A dot.", "Sure? ", "Yes. ", image=["a.png"]))
    turns = outline(source[0])
    assert turns[0][1][0] == "<a.png>"
    assert "".join(turns[0][1][1:]) == "What?"
    assert turns[2:] == [("user", ["Sure? "]), ("assistant", ["Yes. "])]


def test_llava_several_images_in_reading_order(root):
    source = llava(
        root, talk("<image> and <image>: same?", "No.", "And <image>?", "Yes.", image=["b.png", "a.png", "b.png"])
    )
    assert outline(source[0]) == [
        ("user", ["<b.png>", " and ", "<a.png>", ": same?"]),
        ("assistant", ["No."]),
        ("user", ["And ", "<b.png>", "?"]),
        ("assistant", ["Yes."]),
    ]
    assert [part.decode().size[0] for part in source[0].images()] == [2, 1, 2]


@pytest.mark.parametrize(
    ("question", "images"),
    [("What?", ["a.png", "b.png"]), ("<image>?", ["a.png", "b.png"]), ("<image><image><image>", ["a.png", "b.png"])],
)
def test_llava_marks_other_than_images_are_skipped(root, question, images):
    """(T17): none, fewer, more"""
    assert skip_of(llava(root, talk(question, "Yes.", image=images))).reason == SkipReason.IMAGE_MARKS


def test_llava_text_only(root):
    assert outline(llava(root, talk("2 + 2?", "4"))[0]) == [("user", ["2 + 2?"]), ("assistant", ["4"])]
    assert skip_of(llava(root, talk("Spell <image>.", "4"))).reason == SkipReason.IMAGE_MARKS


def test_llava_mark_in_an_answer_is_skipped(root):
    assert skip_of(llava(root, talk("What?", "See <image>.", image="a.png"))).reason == SkipReason.IMAGE_MARKS


@pytest.mark.parametrize("lines", [False, True])
def test_llava_other_spellings_read_the_same(root, lines):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "<image>What?"},
        {"role": "assistant", "content": "A dot."},
    ]
    records = [
        {"images": ["a.png"], "conversation": messages, "source": "elsewhere"},
        {"image": "a.png", "messages": messages},
        {"image": "a.png", "conversations": [{"from": m["role"], "value": m["content"]} for m in messages]},
    ]
    source = llava(root, *records, lines=lines)
    assert len(source) == 3
    assert source[0].turns == source[1].turns == source[2].turns
    assert [turn.role for turn in source[0].turns] == ["system", "user", "assistant"]


def test_llava_question_with_answer(root):
    source = llava(root, {"question_id": "q1", "image": "a.png", "question": "What?", "answer": "dot"})
    assert source[0].id == "data.json:0"
    assert outline(source[0]) == [("user", ["<a.png>", "What?"]), ("assistant", ["dot"])]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (talk("What?", ""), SkipReason.EMPTY_ANSWER),
        (talk("What?", " \n"), SkipReason.EMPTY_ANSWER),
        (talk("", "Yes."), SkipReason.EMPTY_TEXT),
        (talk("What?"), SkipReason.BAD_RECORD),
        ({"conversations": []}, SkipReason.BAD_RECORD),
        ({"id": "x"}, SkipReason.BAD_RECORD),
        ({"conversations": [{"from": "gpt", "value": "Hi"}]}, SkipReason.BAD_RECORD),
        ({"conversations": [{"from": "bot", "value": "Hi"}]}, SkipReason.BAD_RECORD),
        ({"conversations": [{"from": "human"}]}, SkipReason.BAD_RECORD),
        ({"conversations": [{"from": "system", "value": "Hi"}]}, SkipReason.BAD_RECORD),
        ({"conversations": "Hi"}, SkipReason.BAD_RECORD),
        (17, SkipReason.BAD_RECORD),
        (talk("What?", "Yes.", image="../outside.png"), SkipReason.PATH_REFUSED),
        (talk("What?", "Yes.", image=""), SkipReason.BAD_RECORD),
        (talk("What?", "Yes.", image="a\0.png"), SkipReason.PATH_REFUSED),
        (talk("What?", "Yes.", image="C:\\a.png"), SkipReason.PATH_REFUSED),
    ],
)
def test_llava_bad_records_are_skipped_with_a_reason(root, record, reason):
    source = llava(root, talk("Fine?", "Fine."), record, talk("Fine?", "Fine."))
    assert skip_of(source, 1).reason == reason
    assert len(source) == 3
    assert outline(source[0]) == outline(source[2])


def test_paths_may_not_leave_the_root(root):
    """(T25)"""
    os.symlink(root.parent / "outside.png", root / "link.png")
    (root.parent / "images-private").mkdir()
    for path in [str(root / "a.png"), "link.png", "../images-private/x.png", "sub/../../outside.png"]:
        with pytest.raises(SkipSample, match="path_refused"):
            path_inside(str(root), path)
    assert path_inside(str(root), "sub/../a.png") == os.path.realpath(root / "a.png")
    with pytest.raises(SkipSample, match="path_refused"):
        path_inside("/", "/etc/passwd")
    # The control: a check by the first letters of the path lets the neighbour in.
    assert os.path.realpath(root / "../images-private/x.png").startswith(os.path.realpath(root))


@pytest.mark.parametrize(
    ("picture", "reason"),
    [
        ("absent.png", "unreadable_file"),
        ("s3://bucket/a.png", "unreadable_file"),
        ("coco/train2017/a.png", "unreadable_file"),
        ("locked.png", "unreadable_file"),
        ("/a.png", "path_refused"),
        # The control: the same record with a picture that is there.
        ("b.png", None),
    ],
)
def test_pictures_that_cannot_be_had_are_counted_by_reason_and_end_a_run(root, monkeypatch, picture, reason):
    """(T12): missing, of an unknown prefix, not permitted; that the status is 3 is in test_apps_train_cli.py."""

    read = FileBytes.__call__

    def refuse(path: FileBytes) -> bytes:
        if path.path.endswith("locked.png"):
            raise PermissionError(13, "Permission denied")
        return read(path)

    # To root everything is permitted.
    monkeypatch.setattr(FileBytes, "__call__", refuse)
    for name in ("locked.png", "b.png"):
        (root / name).write_bytes((root / "a.png").read_bytes())
    records = [talk("What?", "Dot.", image="a.png"), talk("What?", "Dot.", image=picture)]

    def epochs(limits: SkipLimits, count: int) -> SkipCounter:
        skips = SkipCounter(limits)
        plan = PlanConfig(max_tokens=2, epochs=(count,))
        list(Stream([llava(root, *records)], Decoding(), plan, skips=skips))
        return skips

    skips = epochs(SkipLimits(max_share=1.0), 2)
    assert skips.by_reason() == ({} if reason is None else {reason: 2})
    assert skips.num_seen("chat") == 4
    with (
        pytest.raises(TooManySkips, match=f"expected at most 1.00% bad samples, got 1 .*{reason}")
        if reason
        else (nullcontext())
    ):
        epochs(SkipLimits(min_seen=1), 1)
    records[0] = records[1]
    with pytest.raises(TooManySkips, match=f"bad samples in a row, got 100 .*{reason}") if reason else nullcontext():
        epochs(SkipLimits(max_share=1.0), 51)


class Decoding(Encoder):
    """One token a sample; pictures are decoded."""

    length = 1

    def measure(self, sample, limit=None, /) -> Size:
        return Size(1, 1)

    def encode(self, sample, limit=None, /):
        assert [image.decode().mode for image in sample.images()] == ["RGB"]
        return self

    def collate(self, items, ids, /) -> None:
        return None


def test_missing_picture_is_noticed_when_it_is_read(root):
    """(T12)"""
    sample = llava(root, talk("What?", "Dot.", image="absent.png"))[0]
    with pytest.raises(SkipSample, match=r"unreadable_file.*absent\.png"):
        sample.images()[0].decode()


def test_broken_line_spoils_only_itself(root):
    path = root.parent / "data.jsonl"
    text = '{"question": "a", "answer": "b"}\n\n{"question": "a", "ans\n{"question": "a", "answer": "c"}'
    source = opened(path, "llava-json", text)
    assert len(source) == 3
    assert skip_of(source, 1).reason == SkipReason.BAD_RECORD
    assert outline(source[2])[1] == ("assistant", ["c"])


@pytest.mark.parametrize("text", ["", "[", '[{"a": 1}, {"a"', '[{"a": 1} {"a": 2}]', "[1, 2,", "[1]x"])
def test_broken_array_is_an_error_on_opening(tmp_path, text):
    with pytest.raises(ShardError, match=r"s: .*data\.json: expected a JSON array"):
        opened(tmp_path / "data.json", "llava-json", text)


def records_of(path) -> JsonShard:
    return JsonShard(str(path), path.name, make_index(str(path)))


@pytest.mark.parametrize("separator", [",", ", ", " ,\n\t", "\r\n,"])
def test_json_shard_finds_records_between_any_separators(tmp_path, separator):
    records = [{"a": "é,]"}, [1, ","], "x, y", 5, None, {}, {"deep": [{"b": '}\\"'}]}]
    path = tmp_path / "data.json"
    path.write_text(f" \n[ {separator.join(json.dumps(r, ensure_ascii=False) for r in records)}\n] \n")
    file = records_of(path)
    assert [file.record(row).decode(object) for row in range(len(file))] == records


def test_json_shard_reads_lines_with_any_ending(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n' + b" " * 300 + b'\n{"a": 2}\n' + b" " * 300 + b'{"a": 3}')
    file = records_of(path)
    assert [file.record(row).decode(dict)["a"] for row in range(len(file))] == [1, 2, 3]


def test_json_shard_that_shrank_while_it_is_read_is_a_skip(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n')
    file = records_of(path)
    path.write_text('{"a": 1}\n')
    with pytest.raises(SkipSample, match="unreadable_file"):
        file.record(1).decode(object)


def obelics(root, record) -> RecordSource:
    return opened(root.parent / "documents.jsonl", "obelics-jsonl", json.dumps(record) + "\n", root, "docs")


def test_obelics_document_in_reading_order(root):
    record = {"images": ["a.png", None, None, "b.png", None], "texts": [None, "One.", "", None, "Two."]}
    for more in ({"general_metadata": '{"id": "d7"}', "metadata": None}, {}, {"general_metadata": "[broken"}):
        sample = obelics(root, record | more)[0]
        assert sample.id == "documents.jsonl:0"
        assert outline(sample) == [("document", ["<a.png>", "One.", "<b.png>", "Two."])]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"images": [None], "texts": ["a", "b"]}, SkipReason.BAD_RECORD),
        ({"images": ["a.png"], "texts": ["a"]}, SkipReason.BAD_RECORD),
        ({"images": [None], "texts": [None]}, SkipReason.BAD_RECORD),
        ({"images": ["a.png", None], "texts": [None, " "]}, SkipReason.EMPTY_TEXT),
        ({"images": [], "texts": []}, SkipReason.EMPTY_TEXT),
        ({"images": ["/etc/passwd", None], "texts": [None, "a"]}, SkipReason.PATH_REFUSED),
        ({"texts": ["a"]}, SkipReason.BAD_RECORD),
    ],
)
def test_obelics_bad_records_are_skipped_with_a_reason(root, record, reason):
    assert skip_of(obelics(root, record)).reason == reason


def preferences(root, **record) -> RecordSource:
    return opened(root.parent / "pairs.jsonl", "preference-jsonl", json.dumps(record) + "\n", root, "pairs")


def test_preferences_pair(root):
    pair = preferences(root, id=3, image="a.png", question="What?", chosen="A dot.", rejected="A cat.")[0]
    assert isinstance(pair, PreferenceSample)
    assert (pair.id, pair.source, pair.chosen, pair.rejected) == ("pairs.jsonl:0", "pairs", "A dot.", "A cat.")
    assert outline(pair) == [("user", ["<a.png>", "What?"])]
    pair = preferences(root, images=["a.png", "b.png"], prompt="<image>, <image>?", chosen="x", rejected="y")[0]
    assert outline(pair) == [("user", ["<a.png>", ", ", "<b.png>", "?"])]
    assert len(pair.images()) == 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"chosen": " "}, SkipReason.EMPTY_ANSWER),
        ({"rejected": ""}, SkipReason.EMPTY_ANSWER),
        ({"rejected": "A dot."}, SkipReason.BAD_RECORD),
        ({"prompt": None}, SkipReason.EMPTY_TEXT),
        ({"prompt": "<image>?"}, SkipReason.IMAGE_MARKS),
        ({"chosen": "<image>"}, SkipReason.IMAGE_MARKS),
        ({"chosen": 1}, SkipReason.BAD_RECORD),
    ],
)
def test_preferences_bad_pairs_are_skipped_with_a_reason(root, change, reason):
    record = {"prompt": "What?", "chosen": "A dot.", "rejected": "A cat."} | change
    assert skip_of(preferences(root, **record)).reason == reason


def test_records_have_ids_of_their_own_whatever_they_call_themselves(root):
    chat = llava(root, talk("a", "b", id=1), talk("c", "d", id="1"), talk("e", "f"), lines=True)
    assert [chat[index].id for index in range(3)] == ["data.json:0", "data.json:1", "data.json:2"]


def test_records_nested_too_deeply_spoil_only_themselves(root):
    deep = "[" * 100_000 + "]" * 100_000
    path = root.parent / "deep.jsonl"
    text = f'{{"question": "a", "answer": "b"}}\n{{"id": {deep}}}\n{{"question": "a", "answer": "c"}}\n'
    source = opened(path, "llava-json", text)
    assert skip_of(source, 1).reason == SkipReason.BAD_RECORD
    assert outline(source[2])[1] == ("assistant", ["c"])
    with pytest.raises(ShardError, match=r"deep\.jsonl: expected a JSON array"):
        opened(path, "llava-json", f"[{deep}]")
    assert outline(obelics(root, {"images": [None], "texts": ["a"], "general_metadata": deep})[0])


def test_in_memory_source():
    buffer = BytesIO()
    Image.new("RGB", (2, 3)).save(buffer, "PNG")
    sample = Sample("s", "drawn", (Turn("user", (ImagePart(buffer.getvalue()), TextPart("?"))),))
    source = InMemory("drawn", [sample], version="seed 1")
    assert isinstance(source, Source)
    assert (len(source), source[0], source.name) == (1, sample, "drawn")
    assert source.fingerprint != InMemory("drawn", [sample], version="seed 2").fingerprint
    assert source[0].images()[0].decode().size == (2, 3)


def test_samples_digest_depends_on_order_and_borders():
    digests = {samples_digest(ids) for ids in (["ab", "c"], ["a", "bc"], ["c", "ab"], ["abc"], [], [""])}
    assert len(digests) == 6
    assert samples_digest(iter(["ab", "c"])) == samples_digest(["ab", "c"])
    assert len(samples_digest(["a"])) == 16
