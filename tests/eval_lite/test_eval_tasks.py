"""Benchmarks' own files, written here as their publishers lay them out: what is asked, and what answers score."""

import base64
import json
import tarfile
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from eval_lite import TASKS, Answer, Asked, TaskFileError, check_task, load_task
from eval_lite.tasks.world import exam_items
from interleave_data import TextPart
from vlm_metrics import (
    HallusionItem,
    MmeItem,
    circular_accuracy,
    hallusion_scores,
    mme_scores,
    pope_scores,
)


def _png() -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (8, 8), (200, 30, 30)).save(buffer, "PNG")
    return buffer.getvalue()


def _put(folder: Path, files: dict[str, object]) -> Path:
    """Write files: bytes and text as they are, lists of lines as JSON lines, all else as JSON."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def _lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _vqa(people: list[list[str]], subset: str = "val2014") -> dict[str, object]:
    questions = [{"question_id": 10 + n, "image_id": 42 + n, "question": f"what {n}?"} for n in range(len(people))]
    annotations = [
        {
            "question_id": 10 + n,
            "image_id": 42 + n,
            "answer_type": "other",
            "answers": [{"answer": a, "answer_id": i} for i, a in enumerate(answers)],
        }
        for n, answers in enumerate(people)
    ]
    return {
        "v2_OpenEnded_mscoco_val2014_questions.json": {"data_subtype": subset, "questions": questions},
        "v2_mscoco_val2014_annotations.json": {"annotations": annotations},
        f"{subset}/COCO_{subset}_000000000042.jpg": _png(),
    }


SEED_ROW = {
    "question_id": "1", "question": "How many?", "choice_a": "1", "choice_b": "2", "choice_c": "3", "choice_d": "4",
    "answer": "B", "data_id": "7_x", "data_type": "image", "question_type_id": 5,
}  # fmt: skip
HALLUSION_ROW = {
    "category": "VS", "subcategory": "chart", "visual_input": "0", "set_id": "0", "figure_id": "0", "question_id": "0",
    "question": "Is it?", "gt_answer": "1", "filename": None,
}  # fmt: skip


def _figure(row: dict, figure: str, question: str, answer: str) -> dict:
    name = f"./hallusion_bench/VS/chart/0_{figure}.png"
    return row | {"figure_id": figure, "question_id": question, "gt_answer": answer, "filename": name}


def _mmbench(rows: list[list[str]]) -> str:
    header = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image"]
    quoted = [['"' + cell.replace('"', '""') + '"' for cell in row] for row in rows]
    return "\n".join("\t".join(row) for row in [header, *quoted]) + "\n"


PICTURE = base64.b64encode(_png()).decode()
FILES: dict[str, dict[str, object]] = {
    "vqav2": _vqa([["red"] * 7 + ["Red"] * 3, ["two"] * 10]),
    "okvqa": _vqa([["race"] * 6 + ["run"] * 4]),
    "textvqa": {
        "TextVQA_0.5.1_val.json": {
            "data": [{"question_id": 1, "image_id": "ab", "question": "brand?", "answers": ["dell"] * 5 + ["hp"] * 5}]
        },
        "train_images/ab.jpg": _png(),
    },
    "docvqa": {
        "val_v1.0_withQT.json": {
            "data": [
                {"questionId": 3, "question": "who?", "image": "documents/a_1.png", "answers": ["acme corp", "acme"]}
            ]
        },
        "documents/a_1.png": _png(),
    },
    "chartqa": {
        "test/test_human.json": [{"imgname": "1.png", "query": "how much?", "label": "10"}],
        "test/test_augmented.json": [{"imgname": "1.png", "query": "which?", "label": "Yes"}] * 3,
        "test/png/1.png": _png(),
    },
    "coco-captions": {
        "annotations/captions_val2014.json": {
            "images": [{"id": n, "file_name": f"{n}.jpg"} for n in range(3)],
            "annotations": [
                {"image_id": n, "id": 9, "caption": caption}
                for n, captions in enumerate(
                    [
                        ["a cat sits on the mat", "a cat is sitting on a mat"],
                        ["a dog is running in the park", "the dog runs through a park"],
                        ["a man riding a wave on a surfboard", "a surfer rides a wave"],
                    ]
                )
                for caption in captions
            ],
        },
        "val2014/0.jpg": _png(),
    },
    "mmbench": {
        "MMBench_DEV_EN.tsv": _mmbench(
            [
                ["5", 'Which\n"one"?', "Look.", "red", "blue", "", "", "B", "colour", PICTURE],
                ["9", "And?", "", "x", "y", "z", "", "A", "shape", "5"],
            ]
        )
    },
    "seed": {
        "SEED-Bench.json": {
            "questions": [SEED_ROW, SEED_ROW | {"data_type": "video"}],
            "question_type": {"Instances Counting": 5},
        },
        "SEED-Bench-image/7_x": _png(),
    },
    "mmmu": {
        "validation.json": [
            {
                "id": "validation_Art_Theory_1",
                "question": "See <image 1> and say.",
                "options": "['red', 'blue']",
                "answer": "B",
                "question_type": "multiple-choice",
                "image_1": "a.png",
                "image_2": None,
            },
            {
                "id": "validation_Math_2",
                "question": "How many?",
                "options": "[]",
                "answer": "['5', 'five']",
                "question_type": "open",
                "image_1": "a.png",
            },
        ],
        "a.png": _png(),
    },
    "pope": {
        "coco_pope_random.json": _lines(
            [
                {"question_id": n, "image": "a.jpg", "text": "Is there a dog?", "label": label}
                for n, label in enumerate(["yes", "no"] * 2)
            ]
        ),
        "coco_pope_popular.json": _lines([{"question_id": 1, "image": "a.jpg", "text": "A cat?", "label": "no"}]),
        "val2014/a.jpg": _png(),
    },
    "hallusion": {
        "HallusionBench.json": [
            HALLUSION_ROW,
            _figure(HALLUSION_ROW, "1", "0", "1"),
            _figure(HALLUSION_ROW, "1", "1", "0"),
            _figure(HALLUSION_ROW, "2", "1", "0"),
        ],
        "hallusion_bench/VS/chart/0_1.png": _png(),
    },
    "mme": {
        "existence/a.txt": "Is there a cat? Please answer yes or no.\tYes\nA dog?\tNo\n",
        "existence/a.jpg": _png(),
        "existence/b.txt": "A cat?\tYes\nA dog?\tNo\n",
        "OCR/questions_answers_YN/c.txt": "Word?\tYes\nOther?\tNo",
        "OCR/images/c.png": _png(),
        "code_reasoning/d.txt": "x?\tYes\ny?\tNo\n",
    },
    "scienceqa": {
        "problems.json": {
            "7": {
                "question": "Why?",
                "choices": ["a", "b"],
                "answer": 1,
                "hint": "H",
                "image": "image.png",
                "split": "test",
                "subject": "natural science",
            },
            "8": {"question": "Who?", "choices": ["a", "b"], "answer": 0, "hint": "", "image": None, "split": "test"},
            "9": {
                "question": "Ho?",
                "choices": ["a", "b"],
                "answer": 0,
                "hint": "",
                "image": "image.png",
                "split": "train",
            },
        },
        "pid_splits.json": {"test": ["8", "7"], "train": ["9"]},
        "test/7/image.png": _png(),
    },
    "daquar": {
        "eval.json": [
            {"question_id": "i_0", "image": "images/i.jpg", "question": "what is on the desk", "answer": "cup"}
        ],
        "train.json": [
            {
                "id": "t",
                "image": "images/t.jpg",
                "conversations": [
                    {"from": "human", "value": "<image>\nhow many"},
                    {"from": "gpt", "value": "2"},
                    {"from": "human", "value": "what"},
                    {"from": "gpt", "value": "bed"},
                ],
            }
        ],
        "images/i.jpg": _png(),
    },
    "sroie": {
        "receipts.jsonl": _lines(
            [{"uid": "1", "image": "images/1.jpg", "key": {"company": "ACME", "total": "9.00", "date": ""}}]
        ),
        "images/1.jpg": _png(),
    },
    "documents": {
        "held-out.jsonl": _lines([{"images": [None, "a.png", None], "texts": ["before", None, "after"]}]),
        "a.png": _png(),
    },
}


@pytest.fixture
def read(tmp_path: Path):
    """Task name → task and the items of its files."""

    def call(name: str):
        task = load_task(name)
        return task, task.read(_put(tmp_path / name, FILES[name]))

    return call


def _text(item) -> str:
    return "".join(part.text for part in item.prompt.turns[-1].parts if isinstance(part, TextPart))


def _value(task, items, said: list[str], name: str) -> float:
    asked = [Asked(item, Answer(text=text)) for item, text in zip(items, said, strict=True)]
    return task.measure(asked)[name].figure.value


@pytest.mark.parametrize("name", sorted(FILES))
def test_every_format_is_read_with_pictures_below_its_folder(read, name: str) -> None:
    _, items = read(name)
    assert items
    pictures = [item.prompt.images() for item in items]
    assert any(pictures)
    first = next(images[0] for images in pictures if images)
    assert first.decode().size == (8, 8)
    assert len({item.id for item in items}) == len(items)


def test_vqa_scores_by_the_official_rule(read) -> None:
    task, items = read("vqav2")
    assert [item.answer for item in items] == ["red", "two"]
    # People disagree: all is normalised. They agree: nothing is, so a digit is not their word.
    assert _value(task, items, ["RED.", "2"], "accuracy") == pytest.approx(0.5)
    task, items = read("okvqa")
    assert _value(task, items, ["run"], "accuracy") == pytest.approx(1.0)


def test_text_and_document_questions_score_by_their_rules(read, tmp_path: Path) -> None:
    task, items = read("textvqa")
    assert _value(task, items, ["Dell,"], "accuracy") == pytest.approx(1.0)
    task, items = read("docvqa")
    assert _value(task, items, ["acme corp."], "anls") == pytest.approx(0.9)
    task, items = read("sroie")
    assert [_text(item) for item in items] == ["Which company issued the receipt?", "What is the total amount?"]
    assert _value(task, items, ["acme", "8"], "anls") == pytest.approx(0.5)
    task, items = read("daquar")
    assert _value(task, items, ["Cup."], "accuracy") == 1
    assert task.read_examples is not None
    examples = task.read_examples(tmp_path / "daquar")
    assert [(_text(one), one.answer) for one in examples] == [("how many", "2"), ("what", "bed")]


def test_chart_questions_count_their_halves_the_same(read) -> None:
    task, items = read("chartqa")
    said = ["10.4", "yes", "no", "no"]
    assert _value(task, items, said, "relaxed_accuracy") == pytest.approx((1 + 1 / 3) / 2)
    assert _value(task, items, said, "relaxed_accuracy/human") == 1


def test_captions_score_the_golden_cider(read) -> None:
    task, items = read("coco-captions")
    said = ["a cat sits on a mat", "a dog runs in the park", "a man riding a wave"]
    # Golden values of the official code, whitespace-tokenised; these captions have nothing else to part.
    assert _value(task, items, said, "cider_d") == pytest.approx(100 * 3.954777, abs=1e-3)


def test_mmbench_rotates_choices_and_wants_all_right(read) -> None:
    task, items = read("mmbench")
    assert [item.id for item in items] == ["5", "1000005", "9", "1000009", "2000009"]
    assert [item.choices for item in items[:2]] == [("red", "blue"), ("blue", "red")]
    assert [item.answer for item in items] == ["B", "A", "A", "C", "B"]
    assert _text(items[0]) == 'Look.\nWhich\n"one"?'
    # The second row's picture is the first one's, by its index.
    assert items[2].prompt.images()[0].open == items[0].prompt.images()[0].open
    said = ["B", "A", "A", "A", "B"]
    right = [text == item.answer for text, item in zip(said, items, strict=True)]
    expected = circular_accuracy([item.facts["question"] for item in items], right)
    assert _value(task, items, said, "circular_accuracy") == expected == 0.5
    assert _value(task, items, said, "accuracy") == 1
    assert _value(task, items, said, "circular_accuracy/shape") == 0


def test_a_file_with_rotations_of_its_own_gets_no_more(tmp_path: Path) -> None:
    rows = [["5", "q", "", "a", "b", "", "", "A", "c", PICTURE], ["1000005", "q", "", "b", "a", "", "", "B", "c", "5"]]
    items = load_task("mmbench").read(_put(tmp_path, {"MMBench.tsv": _mmbench(rows)}))
    assert [item.id for item in items] == ["5", "1000005"]


def test_seed_keeps_image_questions_and_both_ways_of_scoring(read) -> None:
    task, items = read("seed")
    assert [(item.group, item.answer, item.choices) for item in items] == [
        ("Instances Counting", "B", ("1", "2", "3", "4"))
    ]
    assert _value(task, items, ["B."], "accuracy") == 1
    # The sum prefers the short wrong choice, the mean over tokens the right one.
    answer = Answer(text="A", nats=(2.0, 3.0, 9.0, 9.0), num_tokens=(1, 3, 1, 1))
    measures = task.measure([Asked(items[0], answer)])
    assert (measures["accuracy"].figure.value, measures["accuracy_per_token"].figure.value) == (0, 1)


def test_mmmu_puts_pictures_where_their_marks_are(read) -> None:
    task, items = read("mmmu")
    assert [item.group for item in items] == ["Art_Theory", "Math"]
    kinds = [part.text if isinstance(part, TextPart) else "*" for part in items[0].prompt.turns[0].parts]
    assert kinds == ["See ", "*", " and say."]
    assert [part.text if isinstance(part, TextPart) else "*" for part in items[1].prompt.turns[0].parts] == [
        "How many?",
        "*",
    ]
    assert _value(task, items, ["The answer is (B).", "It is 5"], "accuracy") == 1
    assert _value(task, items, ["A", "50"], "accuracy") == 0


def test_mmmu_reads_parquet(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    row = {"id": "validation_Art_1", "question": "<image 1>?", "options": "['a', 'b']", "answer": "A"}
    row |= {"question_type": "multiple-choice", "image_1": {"bytes": _png(), "path": "1.png"}, "image_2": None}
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "validation-00000-of-00001.parquet")
    (item,) = load_task("mmmu").read(tmp_path)
    assert item.prompt.images()[0].decode().size == (8, 8)
    assert (item.choices, item.answer) == (("a", "b"), "A")


def test_pope_figures_are_the_scorers(read) -> None:
    task, items = read("pope")
    said = ["no", "Yes, there is.", "No.", "yes", "NO"]
    labels = [item.answer for item in items]
    expected = pope_scores(said, labels)
    for name in ("f1", "accuracy", "precision", "recall", "yes_ratio"):
        assert _value(task, items, said, name) == pytest.approx(getattr(expected, name))
    assert (items[0].group, labels[0]) == ("popular", "no")
    assert _value(task, items, said, "accuracy/popular") == 1


def test_hallusion_figures_are_the_scorers(read) -> None:
    task, items = read("hallusion")
    assert [len(item.prompt.images()) for item in items] == [0, 1, 1, 1]
    said = ["yes", "no", "no", "No, it is not."]
    rows = [
        HallusionItem(**item.facts, correct=(text.lower()[:2] == item.answer[:2]))
        for item, text in zip(items, said, strict=True)
    ]
    expected = hallusion_scores(rows)
    for name in ("a_acc", "q_acc", "f_acc"):
        assert _value(task, items, said, name) == pytest.approx(getattr(expected, name))


def test_mme_figures_are_the_scorers(read) -> None:
    task, items = read("mme")
    # Pictures (1, 1), (1, 0), (1, 1), (0, 0), by subtask existence twice, OCR, code.
    right = dict(zip([item.id for item in items], [True, True, True, False, True, True, False, False], strict=True))
    said = [item.answer if right[item.id] else "?" for item in items]
    expected = mme_scores([MmeItem(item.group, item.facts["picture"], right[item.id]) for item in items])
    assert _value(task, items, said, "perception") == pytest.approx(expected.perception)
    assert expected.perception == pytest.approx(125 + 200)
    assert _value(task, items, said, "cognition") == expected.cognition == 0
    assert _value(task, items, said, "score/existence") == pytest.approx(125)


def test_scienceqa_asks_the_test_split_s_questions_with_a_picture(read) -> None:
    task, items = read("scienceqa")
    assert [(item.id, item.answer, _text(item)) for item in items] == [("7", "B", "H\nWhy?")]
    assert _value(task, items, ["B. b"], "accuracy") == 1


def test_captions_of_tars_are_read_where_they_lie(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, data in (("k.jpg", _png()), ("k.txt", b" a plain picture\n"), ("l.jpg", _png())):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, BytesIO(data))
    (item,) = load_task("captions").read(tmp_path)
    assert (item.answer, item.prompt.images()[0].decode().size) == ("a plain picture", (8, 8))


def test_documents_are_read_in_order(read) -> None:
    task, (item,) = read("documents")
    assert [part.text if isinstance(part, TextPart) else "*" for part in item.prompt.turns[0].parts] == [
        "before",
        "*",
        "after",
    ]
    assert task.measure([Asked(item, Answer(nats=(4.0,), num_tokens=(2,)))])[
        "perplexity"
    ].figure.value == pytest.approx(7.389, abs=1e-3)


def test_the_world_is_drawn_and_scored_by_its_own_rule() -> None:
    task = load_task("world")
    items = exam_items(4, 1)
    perfect = [item.answer for item in items]
    assert _value(task, items, perfect, "accuracy") == 1
    assert _value(task, items, perfect, "absent_f1") == 1
    assert _value(task, items, perfect, "refused_private") == 1
    assert _value(task, items, perfect, "refused_lookalikes") == 0
    for item in items:
        assert not item.candidates or item.answer in item.candidates, item.group


def test_drawn_tasks_with_a_limit_begin_as_they_do_without() -> None:
    for name, limit, count in (("world-captions", 2, 8), ("world-documents", 3, 3)):
        task = load_task(name)
        assert task.draw is not None
        few = task.draw(limit)
        assert [item.id for item in few] == [item.id for item in task.read(Path())[:count]]
        assert len(few) == count


def test_world_captions_ask_for_one_of_four_orders() -> None:
    task = load_task("world-captions")
    items = task.read(Path())[:4]
    assert len({item.group for item in items}) == 4
    assert _value(task, items, [item.answer for item in items], "exact") == 1
    reordered = [", ".join(reversed(item.answer.rstrip(".").split(", "))) + "." for item in items]
    assert _value(task, items, reordered, "things") == 1


OTHER_NOTES = {"annotations": [{"question_id": 1, "answers": []}]}
BAD: list[tuple[str, dict[str, object], str]] = [
    ("seed", {}, r"expected SEED-Bench\*.json or \*.json, got nothing"),
    ("seed", {"SEED-Bench.json": "{"}, r"SEED-Bench.json: expected JSON"),
    ("seed", {"SEED-Bench.json": {"rows": []}}, r"expected a list under 'questions', got the keys rows"),
    ("seed", {"SEED-Bench.json": {"questions": []}}, r"expected at least one row"),
    (
        "seed",
        {"SEED-Bench.json": {"questions": [SEED_ROW, {"question_id": 2}]}},
        r"SEED-Bench.json: row 2: object missing",
    ),
    (
        "seed",
        {"SEED-Bench.json": {"questions": [SEED_ROW | {"answer": "E"}]}},
        r"row 1: expected an answer A to D, got 'E'",
    ),
    (
        "seed",
        {"SEED-Bench.json": {"questions": [SEED_ROW | {"data_id": "../../x"}]}},
        r"row 1: .*inside the image root",
    ),
    ("seed", {"SEED-Bench.json": {"questions": [SEED_ROW | {"data_id": "/etc/passwd"}]}}, r"row 1: "),
    ("seed", {"SEED-Bench.json": {"questions": [SEED_ROW | {"data_id": "https://a/b"}]}}, r"no address is opened"),
    (
        "vqav2",
        {"a_questions.json": {"questions": []}, "b_questions.json": {}},
        r"expected one file \*questions\*.json, got a",
    ),
    ("vqav2", _vqa([["a"]]), r"row 1: expected ten answers, got 1"),
    (
        "vqav2",
        _vqa([["a"] * 10]) | {"v2_mscoco_val2014_annotations.json": OTHER_NOTES},
        r"too, got 1 without, the first 10",
    ),
    ("pope", {"coco_pope_a.json": '{"image": "a", "text": "b", "label": "maybe"}\n'}, r"row 1: expected yes or no"),
    ("pope", {"coco_pope_a.json": '\n{"image": 3}\n'}, r"coco_pope_a.json: line 2: expected `str`, got `int`"),
    ("pope", {}, r"expected coco_pope_\*.json"),
    ("mme", {"existence/a.txt": "x\tYes\n"}, r"a.txt: expected two questions, one a line, got 1"),
    ("mme", {"existence/a.txt": "x\tYes\ny No\n"}, r"row 2: expected question TAB Yes or No"),
    ("mme", {}, r"folders of MME's subtasks"),
    ("mmbench", {"a.tsv": "index\tquestion\n1\n"}, r"row 2: expected 2 cells, as in the header, got 1"),
    ("mmbench", {"a.tsv": "index\tquestion\n1\tq\n"}, r"row 2: expected a column image"),
    (
        "mmbench",
        {"a.tsv": _mmbench([["5", "q", "", "a", "b", "", "", "A", "c", "§§"]])},
        r"row 2: expected a picture in base64",
    ),
    (
        "mmbench",
        {"a.tsv": _mmbench([["5", "q", "", "a", "b", "", "", "", "c", PICTURE]])},
        r"a choice's letter as answer",
    ),
    (
        "mmmu",
        {"a.json": [{"id": "1", "question": "q", "options": "[a", "answer": "A"}]},
        r"row 1: expected a list as text",
    ),
    ("mmmu", {"a.parquet": b"PAR1"}, r"expected a parquet file"),
    ("hallusion", {"a.json": [HALLUSION_ROW | {"gt_answer": "2"}]}, r"row 1: expected 0 or 1 as gt_answer, got '2'"),
    ("documents", {"a.jsonl": '{"images": [], "texts": ["a"]}'}, r"row 1: expected as many images as texts"),
    ("captions", {"a.tar": b"none"}, r"a.tar: expected an uncompressed tar"),
    ("docvqa", {"val_v1.0.json": b"\xff\xfe"}, r"val_v1.0.json: expected JSON"),
]


@pytest.mark.parametrize(("name", "files", "message"), BAD, ids=[f"{name}-{n}" for n, (name, *_) in enumerate(BAD)])
def test_bad_files_are_named_with_their_row(tmp_path: Path, name: str, files: dict, message: str) -> None:
    _put(tmp_path, files)
    with pytest.raises(TaskFileError, match=message):
        load_task(name).read(tmp_path)


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(_png())
    folder = _put(tmp_path / "seed", {"SEED-Bench.json": {"questions": [SEED_ROW | {"data_id": "link"}]}})
    (folder / "link").symlink_to(tmp_path / "secret.png")
    with pytest.raises(TaskFileError, match="inside the image root"):
        load_task("seed").read(folder)


def test_a_picture_that_is_not_there_is_left_for_the_count(tmp_path: Path) -> None:
    folder = _put(tmp_path, {"SEED-Bench.json": {"questions": [SEED_ROW]}})
    (item,) = load_task("seed").read(folder)
    with pytest.raises(Exception, match="unreadable_file"):
        item.prompt.images()[0].decode()


def test_every_name_has_a_task_and_a_typing_error_a_hint() -> None:
    assert [load_task(name).name for name in TASKS] == list(TASKS)
    with pytest.raises(ValueError, match="did you mean chartqa"):
        check_task("chartq")


def test_sample_data_are_read(shared_data: Path) -> None:
    counts = {name: len(load_task(name).read(shared_data / name)) for name in ("daquar", "sroie", "captions")}
    assert (counts["daquar"], counts["captions"]) == (258, 450)
    assert 200 <= counts["sroie"] <= 240
    examples = load_task("daquar").read_examples
    assert examples is not None
    assert len(examples(shared_data / "daquar")) == 3406
    assert len(load_task("documents").read(shared_data / "openstax-physics")) == 70
