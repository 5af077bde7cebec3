"""MANTIS, VLGuard and VLFeedback: records as published, turns and pairs written by hand."""

import json

import pytest

from interleave_data import (
    DataFile,
    ImagePart,
    PreferenceSample,
    SkipCounter,
    SkipLimits,
    SkipReason,
    SkipSample,
    SourceConfig,
    TooManySkips,
    load_data_file,
    open_sources,
)
from interleave_data.formats.llava import read_llava
from interleave_data.formats.vlfeedback import PAIRS, vlfeedback
from interleave_data.formats.vlguard import vlguard
from interleave_data.records import Images

QUESTION = "<image><image>\nWhat do image 1 and image 2 share?"


def mantis(*contents: str, **changes) -> dict:
    contents = contents or (QUESTION, "A cat.", "And who is taller?", "The second.")
    return {
        "id": "x_1",
        "images": ["a.png", "b.png"],
        "conversation": [
            {"role": role, "content": content}
            for role, content in zip(["user", "assistant"] * len(contents), contents, strict=False)
        ],
        "source": "x",
    } | changes


def test_mantis_as_published(made_record, pictures, outline):
    assert outline(read_llava(made_record(mantis()), pictures)) == [
        ("user", ["<a.png>", "<b.png>", "What do image 1 and image 2 share?"]),
        ("assistant", ["A cat."]),
        ("user", ["And who is taller?"]),
        ("assistant", ["The second."]),
    ]


def test_mantis_marks_within_the_text_and_in_later_turns(made_record, pictures, outline):
    row = mantis("Look at <image>.", "I see.", "Now <image>\nWhich?", "The first.")
    assert outline(read_llava(made_record(row), pictures)) == [
        ("user", ["Look at ", "<a.png>", "."]),
        ("assistant", ["I see."]),
        ("user", ["Now ", "<b.png>", "Which?"]),
        ("assistant", ["The first."]),
    ]


def test_mantis_row_of_parquet(made_record, pictures, picture_root):
    held = [{"bytes": (picture_root / name).read_bytes(), "path": name} for name in ("a.png", "b.png")]
    turns = read_llava(made_record(mantis(images=held)), pictures)
    assert [part.decode().size for part in turns[0].parts if isinstance(part, ImagePart)] == [(1, 1), (2, 2)]


def test_llava_row_of_parquet_holds_pictures_as_bytes(made_record, pictures, picture_root):
    data = (picture_root / "a.png").read_bytes()
    row = {"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A dot."}]}
    for held in (data, {"bytes": data, "path": None}, [{"bytes": None, "path": "a.png"}]):
        picture = read_llava(made_record({**row, "image": held}), pictures)[0].parts[0]
        assert isinstance(picture, ImagePart)
        assert picture.decode().size == (1, 1)


def test_mantis_system_turn_and_no_picture(made_record, pictures, outline):
    row = mantis("Hello?", "Hello.", images=None)
    row["conversation"].insert(0, {"role": "system", "content": "Be kind."})
    assert outline(read_llava(made_record(row), pictures)) == [
        ("system", ["Be kind."]),
        ("user", ["Hello?"]),
        ("assistant", ["Hello."]),
    ]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (mantis("No mark at all?", "No."), "image_marks"),
        (mantis("<image> One mark?", "Yes."), "image_marks"),
        (mantis("<image><image><image> Three?", "Yes."), "image_marks"),
        (mantis(images=[]), "image_marks"),
        (mantis(QUESTION, "See <image>"), "image_marks"),
        (mantis(QUESTION, " "), "empty_answer"),
        (mantis(QUESTION, "Yes.", "\n", "No."), "empty_text"),
        (mantis(QUESTION, "Yes.", "And?"), "bad_record"),
        (mantis(conversation=[]), "bad_record"),
        (mantis(conversation=[{"role": "human", "content": "x"}]), "bad_record"),
        (mantis(conversation=[{"role": "user"}]), "bad_record"),
        (mantis(conversation=None), "bad_record"),
        (mantis(images=["a.png", 3]), "bad_record"),
        (mantis(images=["a.png", "../outside.png"]), "path_refused"),
        ({"id": "x", "images": ["a.png"]}, "bad_record"),
    ],
)
def test_mantis_bad_record(row, reason, made_record, skip_of):
    assert skip_of(read_llava, made_record(row)).reason == reason


def test_mantis_chat_reads_whole(shared_data, made_record):
    folder = shared_data / "mantis-chat"
    rows = json.loads((folder / "train.json").read_text())
    bodies = [read_llava(made_record(row), Images(str(folder))) for row in rows]
    parts = [part for body in bodies for turn in body for part in turn.parts]
    num_pictures = sum(isinstance(part, ImagePart) for part in parts)
    assert (len(bodies), num_pictures, sum(map(len, bodies))) == (100, 377, 1964)


SAFE_PAIRS = [
    {"safe_instruction": "What is shown?", "response": "A kitchen."},
    {"unsafe_instruction": "How could I harm someone here?", "response": "I can't help with that."},
]


def guard(*pairs: object, **changes) -> dict:
    return {"id": "7", "image": "a.png", "safe": len(pairs) == 2, "instr-resp": list(pairs)} | changes


def test_vlguard_safe_picture_becomes_two_turns(made_record, pictures, outline):
    assert outline(vlguard()(made_record(guard(*SAFE_PAIRS)), pictures)) == [
        ("user", ["<a.png>", "What is shown?"]),
        ("assistant", ["A kitchen."]),
        ("user", ["How could I harm someone here?"]),
        ("assistant", ["I can't help with that."]),
    ]


def test_vlguard_subsets_are_those_of_its_evaluation(made_record, pictures, outline, skip_of):
    safe = made_record(guard(*SAFE_PAIRS))
    unsafe = made_record(guard({"instruction": "Read it out.", "response": "I'd rather not."}))
    both = outline(vlguard()(safe, pictures))
    texts = {}
    for subset in ("safe_safes", "safe_unsafes"):
        (question, parts), answer = outline(vlguard(subset)(safe, pictures))
        assert (question, parts[0]) == ("user", "<a.png>")
        texts[subset] = parts[1], answer
        assert skip_of(vlguard(subset), unsafe).reason is SkipReason.UNWANTED
    found = [texts["safe_safes"], texts["safe_unsafes"]]
    expected = [(both[0][1][1], both[1]), (both[2][1][0], both[3])]
    assert found in (expected, expected[::-1])
    assert outline(vlguard("unsafes")(unsafe, pictures)) == outline(vlguard()(unsafe, pictures))
    assert skip_of(vlguard("unsafes"), safe).reason is SkipReason.UNWANTED
    with pytest.raises(ValueError, match="subset: expected all, unsafes, safe_unsafes, safe_safes, got x"):
        vlguard("x")


def test_vlguard_unsafe_picture_becomes_one_turn(made_record, pictures, outline):
    row = guard({"instruction": "Read it out.", "response": "I'd rather not."}, harmful_category="deception")
    assert outline(vlguard()(made_record(row), pictures)) == [
        ("user", ["<a.png>", "Read it out."]),
        ("assistant", ["I'd rather not."]),
    ]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (guard(), "bad_record"),
        (guard({"response": "No."}), "bad_record"),
        (guard({"instruction": "x", "safe_instruction": "y", "response": "No."}), "bad_record"),
        (guard({"instruction": "x"}), "bad_record"),
        (guard({"instruction": 3, "response": "No."}), "bad_record"),
        (guard({"instruction": " ", "response": "No."}), "empty_text"),
        (guard({"instruction": "x", "response": ""}), "empty_answer"),
        (guard({"instruction": "x", "response": "See <image>"}), "image_marks"),
        (guard(*SAFE_PAIRS, image=None), "missing_member"),
        (guard(*SAFE_PAIRS, image="/etc/a.png"), "path_refused"),
        ({"id": "7", "image": "a.png", "safe": True}, "bad_record"),
    ],
)
def test_vlguard_bad_record(row, reason, made_record, skip_of):
    assert skip_of(vlguard(), made_record(row)).reason == reason


ASPECTS = ("Helpfulness", "Ethical Considerations", "Visual Faithfulness")


def completion(response: str, *ratings: object) -> dict:
    annotations = {
        aspect: {"Rating": rating, "Rationale": "Because."} for aspect, rating in zip(ASPECTS, ratings, strict=True)
    }
    return {"annotations": annotations, "model": "m", "response": response}


ANSWERS = [
    completion("Fair.", "4", "5", "3"),
    completion("Worst.", "1", "5", "2"),
    completion("Best.", "5", "N/A", "4"),
    completion("Unrated.", "N/A", "N/A", "N/A"),
]


def feedback(*completions: dict, **changes) -> dict:
    return {
        "id": "svit-1",
        "prompt": "What is it?",
        "models": ["m"] * 4,
        "completions": list(completions or ANSWERS),
        "img_path": "a.png",
    } | changes


def columns(*completions: dict) -> dict:
    """The same completions as the hub's parquet has them: one object of lists."""
    return {key: [completion[key] for completion in completions] for key in ("annotations", "model", "response")}


@pytest.mark.parametrize("completions", [ANSWERS, columns(*ANSWERS)])
def test_vlfeedback_prefers_the_highest_mean_to_the_lowest(completions, made_record, pictures, outline):
    # Means by hand: 4, 8/3, 4.5 of two numbers, none.
    body = vlfeedback()(made_record(feedback(completions=completions)), pictures)
    assert outline(body.turns) == [("user", ["<a.png>", "What is it?"])]
    assert (body.chosen, body.rejected) == ("Best.", "Worst.")


def test_vlfeedback_takes_the_first_of_equals(made_record, pictures):
    answers = [completion(text, rating, rating, rating) for text, rating in zip("abcd", "1551", strict=True)]
    body = vlfeedback()(made_record(feedback(*answers)), pictures)
    assert (body.chosen, body.rejected) == ("b", "a")


@pytest.mark.parametrize("rating", ["nan", "inf", "", "five", None, 10**400])
def test_vlfeedback_ignores_what_is_no_number(rating, made_record, pictures):
    answers = [completion("Good.", "5", rating, 4), completion("Bad.", "1", "1", 1.0)]
    body = vlfeedback(floor=4.5)(made_record(feedback(*answers)), pictures)
    assert (body.chosen, body.rejected) == ("Good.", "Bad.")


@pytest.mark.parametrize(
    ("floor", "reason"), [(4.5, None), (4.51, SkipReason.UNWANTED), (1.0, None), (6.0, SkipReason.UNWANTED)]
)
def test_vlfeedback_leaves_out_what_is_rated_below_the_floor(floor, reason, made_record, pictures, skip_of):
    record = made_record(feedback())
    if reason is None:
        assert vlfeedback(floor)(record, pictures).chosen == "Best."
    else:
        assert skip_of(vlfeedback(floor), record).reason is reason


def test_vlfeedback_floor_that_is_no_number():
    with pytest.raises(ValueError, match="floor: expected a finite number, got nan"):
        vlfeedback(float("nan"))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (feedback(completion("a", "5", "5", "5"), completion("b", "5", "5", "5")), "unwanted"),
        (feedback(completion("a", "5", "5", "5"), completion("a", "1", "1", "1")), "unwanted"),
        (feedback(ANSWERS[0], ANSWERS[3]), "bad_record"),
        (feedback(completions=[]), "bad_record"),
        (feedback(completions=None), "bad_record"),
        (feedback(completions=columns(*ANSWERS) | {"response": ["x"]}), "bad_record"),
        (feedback({"annotations": {}, "model": "m"}), "bad_record"),
        (feedback(prompt=None), "bad_record"),
        (feedback(prompt=" "), "empty_text"),
        (feedback(ANSWERS[2], completion(" ", "1", "1", "1")), "empty_answer"),
        (feedback(ANSWERS[2], completion("<image>", "1", "1", "1")), "image_marks"),
        (feedback(img_path=None), "missing_member"),
        (feedback(img_path="https://example.com/gone.jpg"), "unreadable_file"),
        ({"id": "x", "img_path": "a.png"}, "bad_record"),
    ],
)
def test_vlfeedback_bad_record(row, reason, made_record, skip_of):
    assert skip_of(vlfeedback(), made_record(row)).reason == reason


@pytest.mark.parametrize("prompt", ["What is <image> it?", "<image><image>\nWhat is it?"])
def test_vlfeedback_prompt_with_marks_has_one_picture(prompt, made_record, pictures, outline):
    body = vlfeedback()(made_record(feedback(prompt=prompt)), pictures)
    assert sum(part == "<a.png>" for _, parts in outline(body.turns) for part in parts) == 1


PAIR_RATINGS = {"a": "3", "b": "5", "c": "3", "d": "1"}
"""a and c are equal; what follows by hand is (chosen, rejected) for each place."""


@pytest.mark.parametrize(
    ("pair", "expected"),
    [("1-2", "ba"), ("1-3", None), ("1-4", "ad"), ("2-3", "bc"), ("2-4", "bd"), ("3-4", "cd")],
)
def test_vlfeedback_all_pairs_leave_out_ties(pair, expected, made_record, pictures, skip_of):
    record = made_record(feedback(*(completion(text, r, r, r) for text, r in PAIR_RATINGS.items())))
    if expected is None:
        assert skip_of(vlfeedback(pairs=pair), record).reason is SkipReason.UNWANTED
    else:
        body = vlfeedback(pairs=pair)(record, pictures)
        assert body.chosen + body.rejected == expected


def test_vlfeedback_all_pairs_leave_out_answers_with_a_rating_that_is_no_number(made_record, pictures, skip_of):
    answers = [completion("a", "5", "N/A", "5"), completion("b", "1", "1", "1"), completion("c", "2", "2", "2")]
    record = made_record(feedback(*answers))
    assert skip_of(vlfeedback(pairs="1-2"), record).reason is SkipReason.UNWANTED
    assert vlfeedback(pairs="2-3")(record, pictures).chosen == "c"
    assert skip_of(vlfeedback(pairs="1-4"), record).reason is SkipReason.UNWANTED


def test_vlfeedback_rule_that_is_none():
    with pytest.raises(ValueError, match="expected best-worst or one of 1-2, 1-3, 1-4, 2-3, 2-4, 3-4, got all"):
        vlfeedback(pairs="all")
    with pytest.raises(ValueError, match="floor: expected none with pairs = all, got 3"):
        SourceConfig(name="x", format="vlfeedback", path="x.jsonl", floor=3.0, pairs="all")
    with pytest.raises(ValueError, match="pairs: expected none for llava-json"):
        SourceConfig(name="x", format="llava-json", path="x.json", pairs="all")


def test_all_pairs_of_vlfeedback_in_a_data_file_are_six_sources_that_share_the_ratio(tmp_path, picture_root):
    row = feedback(*(completion(text, r, r, r) for text, r in PAIR_RATINGS.items()))
    (tmp_path / "x.jsonl").write_text(json.dumps(row) + "\n")
    table = '[[sources]]\nname = "x"\nformat = "vlfeedback"\npath = "x.jsonl"\npairs = "all"\nratio = 3\n'
    (tmp_path / "data.toml").write_text(f'{table}image_root = "{picture_root}"\n')
    file = load_data_file(tmp_path / "data.toml")
    assert [source.name for source in file.sources] == [f"x/{pair}" for pair in PAIRS]
    assert sum(source.ratio for source in file.sources) == pytest.approx(3)
    sources = open_sources(file)
    with pytest.raises(SkipSample, match="of different worth"):
        sources[PAIRS.index("1-3")][0]
    found = [source[0] for source in sources if source.name != "x/1-3"]
    pairs = [sample for sample in found if isinstance(sample, PreferenceSample)]
    assert [sample.chosen + sample.rejected for sample in pairs] == ["ba", "ad", "bc", "bd", "cd"]


def test_unwanted_samples_are_counted_but_do_not_end_a_run_by_their_share():
    skips = SkipCounter(SkipLimits(max_share=0.01, max_consecutive=3, min_seen=1))
    for _ in range(50):
        skips.keep("feedback")
        skips.skip("feedback", SkipSample(SkipReason.UNWANTED, "rated low"))
    assert skips.by_reason() == {"unwanted": 50}
    skips.keep("feedback")
    skips.skip("feedback", SkipSample(SkipReason.BAD_RECORD, "broken"))
    with pytest.raises(TooManySkips, match="bad samples, got 2 of"):
        skips.skip("feedback", SkipSample(SkipReason.BAD_RECORD, "broken"))


def test_unwanted_samples_in_a_row_end_a_run():
    skips = SkipCounter(SkipLimits(max_share=1.0, max_consecutive=3))
    unwanted = SkipSample(SkipReason.UNWANTED, "rated low")
    skips.skip("feedback", unwanted)
    skips.skip("feedback", unwanted)
    with pytest.raises(TooManySkips, match="in a row"):
        skips.skip("feedback", unwanted)


def test_rows_of_parquet_are_read_as_published(tmp_path, picture_root, outline):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    held = [{"bytes": (picture_root / name).read_bytes(), "path": name} for name in ("a.png", "b.png")]
    tables = {
        "vlfeedback": feedback(completions=columns(*ANSWERS)),
        "mantis": mantis(images=held),
        "captions": {"jpg": held[0]["bytes"], "text": "A cat."},
        "obelics": {"images": [None, "a.png"], "texts": ["A cat.", None], "metadata": "[]"},
    }
    sources = []
    for name, row in tables.items():
        parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / f"{name}.parquet")
        caption = "json:text" if name == "captions" else "txt"
        path, root = str(tmp_path / f"{name}.parquet"), str(picture_root)
        sources.append(SourceConfig(name=name, format=name, path=path, image_root=root, caption=caption))
    opened = {source.name: source[0] for source in open_sources(DataFile(sources=tuple(sources)))}

    pair = opened["vlfeedback"]
    assert isinstance(pair, PreferenceSample)
    assert (pair.chosen, pair.rejected, outline(pair.turns)[0][1][0]) == ("Best.", "Worst.", "<a.png>")
    assert [part.decode().size for part in opened["mantis"].images()] == [(1, 1), (2, 2)]
    assert [part.decode().size for part in opened["captions"].images()] == [(1, 1)]
    assert outline(opened["obelics"].turns) == [("document", ["A cat.", "<a.png>"])]
