"""Right and shuffled images: what the split must not leave to the text, and the comparison not to the right image."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from interleave_data import ImageLimits


@pytest.fixture
def tool(repo_root: Path, monkeypatch: pytest.MonkeyPatch):
    """The tool as a module."""
    monkeypatch.syspath_prepend(str(repo_root / "tools"))
    import image_reliance

    return image_reliance


def _record(image: str, question: str, answer: str) -> dict[str, object]:
    talk = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"id": image, "image": image, "conversations": talk}


def _split(repo_root: Path, folder: Path, num: int) -> subprocess.CompletedProcess[str]:
    rows = [_record(f"{i}.png", "what is it?", f"thing {i % 3}") for i in range(6)]
    rows += [_record(f"{i + 6}.png", "is it a photo?", "yes") for i in range(6)]
    (folder / "train.json").write_text(json.dumps(rows))
    command = [sys.executable, str(repo_root / "tools/image_reliance.py"), "split", "train.json", "--image-root", "."]
    return subprocess.run([*command, "--out", "out", "--num", str(num)], cwd=folder, capture_output=True, text=True)


def test_split_takes_only_questions_that_the_text_cannot_answer(repo_root: Path, tmp_path: Path) -> None:
    done = _split(repo_root, tmp_path, 3)
    assert done.returncode == 0, done.stderr
    right = json.loads((tmp_path / "out/right.json").read_text())
    assert {record["conversations"][0]["value"] for record in right} == {"<image>\nwhat is it?"}
    assert {record["conversations"][1]["value"] for record in right} == {"thing 0", "thing 1", "thing 2"}
    shuffled = json.loads((tmp_path / "out/shuffled.json").read_text())
    pairs = {(record["image"], record["conversations"][1]["value"]) for record in shuffled}
    assert len(shuffled) == len(pairs) == 9
    assert (tmp_path / "out/right.toml").is_file()


def test_split_says_how_many_there_are(repo_root: Path, tmp_path: Path) -> None:
    done = _split(repo_root, tmp_path, 9)
    assert done.returncode != 0
    assert "expected 9 with several answers, got 3" in done.stderr


def _groups(*num_answers: int) -> list[tuple[str, str, str]]:
    """One question for each number, with that many answers, each on an image of its own."""
    return [(f"{q}-{a}.png", f"question {q}", f"{a}") for q, count in enumerate(num_answers) for a in range(count)]


@pytest.mark.parametrize(
    ("num_answers", "count"),
    [((3,) * 5, 4), ((3,) * 5, 7), ((3,) * 5, 8), ((2,) * 5, 6), ((5,), 2), ((7, 2), 8)],
)
def test_every_question_of_the_split_keeps_two_answers(tool, num_answers: tuple[int, ...], count: int) -> None:
    for seed in range(20):
        rows = tool.ambiguous_rows(_groups(*num_answers), count, seed)
        assert len(rows) == len({image for image, _, _ in rows}) == count
        for question in {row[1] for row in rows}:
            assert len({answer for _, asked, answer in rows if asked == question}) > 1


def test_split_fills_no_place_with_a_question_that_stands_once(tool) -> None:
    with pytest.raises(ValueError, match="expected 5 with several answers"):
        tool.ambiguous_rows(_groups(2, 2, 2), 5, 0)
    with pytest.raises(ValueError, match="expected at least 2"):
        tool.ambiguous_rows(_groups(2, 2, 2), 1, 0)


def test_split_passes_over_bad_and_text_only_records(tool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [_record(f"{i}.png", "what is it?", f"thing {i}") for i in range(2)]
    (tmp_path / "train.json").write_text(json.dumps([3, {"question": "two and two?", "answer": "four"}, *rows]))
    tool.split(
        argparse.Namespace(file=tmp_path / "train.json", image_root=tmp_path, out=tmp_path / "out", num=2, seed=0)
    )
    assert capsys.readouterr().out.startswith("left out  2 of 4 records: bad_record 1, no image 1\n2 questions, 1 ")
    right = json.loads((tmp_path / "out/right.json").read_text())
    assert {record["image"] for record in right} == {"0.png", "1.png"}


def test_comparison_gives_each_question_a_different_image(tool, tmp_path: Path) -> None:
    for name, grey in [("a", 0), ("b", 80), ("copy of b", 80), ("c", 160)]:
        Image.new("L", (8, 8), grey).save(tmp_path / f"{name}.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    names = ["a", "a", "b", "copy of b", "c", "broken", "absent"]
    records = [_record(f"{name}.png", "what is it?", name) for name in names]
    records += [
        {"conversations": records[0]["conversations"]},
        {"question": "two and two?", "answer": "four"},
        {"image": ["a.png", "b.png"], "question": "<image><image>same?", "answer": "no"},
    ]
    (tmp_path / "eval.json").write_text(json.dumps(records))
    source = tool.questions(tmp_path / "eval.json", tmp_path)
    samples, left_out = tool.usable_samples(source, lambda image: tool.image_digest(image, ImageLimits()))
    assert [sample.images()[0].key for sample, _ in samples] == [f"{name}.png" for name in names[:5]]
    assert left_out == {"not_an_image": 1, "unreadable_file": 1, "image_marks": 1, "no image": 1, "several images": 1}
    for seed in range(20):
        others = tool.other_images(samples, seed)
        for (sample, _), other in zip(samples, others, strict=True):
            assert sample.images()[0].decode().getpixel((0, 0)) != other.decode().getpixel((0, 0))
    assert len({tuple(image.key for image in tool.other_images(samples, seed)) for seed in range(20)}) > 1


def test_comparison_needs_two_different_images(tool, tmp_path: Path) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "eval.json").write_text(json.dumps([_record("a.png", "what?", "one")] * 2))
    source = tool.questions(tmp_path / "eval.json", tmp_path)
    samples, _ = tool.usable_samples(source, lambda image: tool.image_digest(image, ImageLimits()))
    with pytest.raises(ValueError, match="images: expected at least two different ones, got 1"):
        tool.other_images(samples, 0)
