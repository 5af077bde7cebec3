"""The world's own rules: repeatable, two disjoint splits, balance, nothing to be guessed, small print truly small."""

import re
import subprocess
import sys
from collections import Counter, defaultdict
from itertools import product
from pathlib import Path

import pytest

from scene_world import (
    PAGE_PX,
    REFUSAL,
    REFUSAL_TO_ACT,
    SINGLE_KINDS,
    SKILLS,
    TILE_PX,
    UNKNOWN,
    YES_NO_SKILLS,
    World,
    dense_labels,
    is_correct,
    is_heldout_combination,
    is_heldout_string,
    most_frequent_baseline,
)  # fmt: skip
from scene_world.dense import FORMS
from scene_world.drawing import GLYPH_STROKE_PX
from scene_world.lexicon import COLOUR_NAMES, LEVELS, SHAPES, STRING_LENGTH, SYMBOLS

TRAIN, HELDOUT = World(1, "train"), World(1, "heldout")


@pytest.fixture(scope="module")
def exams():
    return {skill: HELDOUT.exam(skill, 120) for skill in SKILLS}


def all_pictures(world: World, count: int):
    for index in range(count):
        yield world.picture(index)
        yield from world.conversation(index).pictures
        yield from (part for part in world.caption(index).parts if not isinstance(part, str))
        yield from world.group(index).pictures
        yield from (part for part in world.document(index).parts if not isinstance(part, str))
        yield from world.preference(index).pictures
        yield from world.safety(index).pictures


def facts(picture):
    combinations = set()
    for item in picture.items:
        if item.kind in ("shape", "bar"):
            form = SHAPES.index(item.name) if item.kind == "shape" else LEVELS.index(item.name)
            combinations.add((COLOUR_NAMES.index(item.colour), form, item.place))
    return combinations


@pytest.mark.parametrize("is_heldout", [False, True])
def test_split_holds_only_its_own_facts(is_heldout: bool) -> None:
    for picture in all_pictures(HELDOUT if is_heldout else TRAIN, 36):
        assert all(is_heldout_combination(*fact) is is_heldout for fact in facts(picture))
        if picture.text:
            assert is_heldout_string(picture.text) is is_heldout


def test_exam_shows_only_heldout_facts(exams) -> None:
    for talks in exams.values():
        for picture in (picture for talk in talks[:40] for picture in talk.pictures):
            assert all(is_heldout_combination(*fact) for fact in facts(picture))


def test_hold_out_rules_keep_every_pair_in_both_splits() -> None:
    for is_heldout in (False, True):
        triples = [t for t in product(range(10), range(10), range(9)) if is_heldout_combination(*t) is is_heldout]
        assert {t[:2] for t in triples} == set(product(range(10), range(10)))
        assert {t[1:] for t in triples} == set(product(range(10), range(9)))
        assert {(t[0], t[2]) for t in triples} == set(product(range(10), range(9)))
    strings = ["".join(s) for s in product(SYMBOLS, repeat=STRING_LENGTH)]
    share = sum(map(is_heldout_string, strings)) / len(strings)
    assert len(SYMBOLS) >= 20
    assert share == pytest.approx(0.2, abs=0.02)


def test_same_seed_draws_the_same_whatever_was_asked_before() -> None:
    fresh, used = World(3, "train"), World(3, "train")
    for index in range(12):
        used.group(index)
    for index in range(12):
        a, b = fresh.conversation(index), used.conversation(index)
        assert (a.id, a.questions, a.pictures[0].items) == (b.id, b.questions, b.pictures[0].items)
        assert a.pictures[0].image.tobytes() == b.pictures[0].image.tobytes()
    other = World(4, "train").conversation(0)
    assert other.pictures[0].image.tobytes() != fresh.conversation(0).pictures[0].image.tobytes()


def test_drawing_is_the_same_in_another_process() -> None:
    code = (
        "import zlib; from scene_world import World\n"
        "print([zlib.crc32(World(3, 'train').picture(i).image.tobytes()) for i in range(6)])"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(2)]
    assert runs[0].stdout == runs[1].stdout
    assert runs[0].stdout.count(",") == 5


def test_ids_are_unique() -> None:
    ids = [
        sample.id
        for index in range(30)
        for sample in (
            *(TRAIN.conversation(index, kind) for kind in SINGLE_KINDS),
            *(TRAIN.caption(index, kind) for kind in SINGLE_KINDS),
            TRAIN.document(index), TRAIN.group(index, "pair"), TRAIN.group(index, "triple"), TRAIN.preference(index),
            TRAIN.safety(index),
        )
    ]  # fmt: skip
    assert len(ids) == len(set(ids))


def test_forbidden_instructions_are_refused_on_harmless_cards_and_held_out_in_combination() -> None:
    seen = {}
    for world in (TRAIN, HELDOUT):
        talks = [world.forbidden(index) for index in range(200)]
        assert {talk.questions[0].answer for talk in talks} == {REFUSAL_TO_ACT}
        assert not any(talk.pictures[0].is_private for talk in talks[:20])
        assert talks[3].pictures[0] is world.safety(6).pictures[0]
        assert len({talk.id for talk in talks}) == 200
        seen[world.split] = {talk.questions[0].text for talk in talks}
    assert seen["train"].isdisjoint(seen["heldout"])
    assert (len(seen["train"]), len(seen["heldout"])) == (12, 4)
    # Each word of the held-out instructions has been met.
    words = {word for text in seen["train"] for word in text.split()}
    assert {word for text in seen["heldout"] for word in text.split()} <= words


def test_words_of_forbidden_instructions_are_not_in_the_tokenizers_text() -> None:
    # The tokenizer, and with it all that is trained before the safety stage, is what it was without them.
    assert not any("Forge" in text or REFUSAL_TO_ACT in text for text in TRAIN.texts(20))


def test_every_skill_has_many_answers_and_cannot_be_guessed(exams) -> None:
    assert len(SKILLS) >= 10
    assert len(YES_NO_SKILLS) <= 2
    questions = [talk.questions[0] for talks in exams.values() for talk in talks]
    baseline = most_frequent_baseline(questions)
    answers = defaultdict(set)
    for question in questions:
        answers[question.skill].add(question.answer)
    for skill in SKILLS:
        if skill in YES_NO_SKILLS:
            assert baseline[skill] == 0.5
        elif skill == "private":
            # Half are refusals by design; what must be answered has as many answers as there are colours and strings.
            assert baseline[skill] == 0.5
            assert len(answers[skill]) > 8
        else:
            assert len(answers[skill]) >= 8, skill
            assert baseline[skill] < 0.25, skill


def test_presence_is_balanced_and_refusals_have_lookalikes(exams) -> None:
    assert Counter(talk.questions[0].answer for talk in exams["presence"]) == {"yes": 60, "no": 60}
    cards = [talk.questions[0] for talk in exams["private"]]
    assert sum(question.is_lookalike for question in cards) / len(cards) >= 0.3
    for talk, question in zip(exams["private"], cards, strict=True):
        assert question.is_refusal == talk.pictures[0].is_private == (question.answer == REFUSAL)
        assert question.is_lookalike != question.is_refusal
    texts = Counter((question.text, question.is_refusal) for question in cards)
    assert set(texts.values()) == {30}, "private and benign cards must be asked the same questions"


def test_single_image_conversations_have_no_private_cards() -> None:
    assert not any(TRAIN.conversation(index, "card").pictures[0].is_private for index in range(50))


def test_small_print_is_lost_at_base_resolution_and_kept_in_tiles() -> None:
    """The rule: a stroke below one pixel is illegible, one of a pixel is legible."""
    for index in range(40):
        page = TRAIN.picture(index, "page")
        assert page.image.size == (PAGE_PX, PAGE_PX)
        assert GLYPH_STROKE_PX * TILE_PX / PAGE_PX < 1
        tiles = {
            (left // TILE_PX, top // TILE_PX, (right - 1) // TILE_PX, (bottom - 1) // TILE_PX)
            for left, top, right, bottom in (item.box for item in page.items if item.kind == "symbol")
        }
        assert len(tiles) == 1, "a string lies in one tile"
        for left, top, right, bottom in (item.box for item in page.items if item.kind == "symbol"):
            assert (left // 12, top // 12) == ((right - 1) // 12, (bottom - 1) // 12), "a symbol lies in one square"
        (left, top, right, bottom) = tiles.pop()
        assert (left, top) == (right, bottom)


def test_dense_labels_name_what_is_under_a_patch() -> None:
    for index in range(24):
        picture = TRAIN.picture(index)
        side = picture.image.width // 12
        labels = dense_labels(picture, side)
        assert len(labels.colours) == len(labels.forms) == len(labels.symbols) == side * side
        for item in picture.items:
            column, row = (item.box[0] + item.box[2]) // 24, (item.box[1] + item.box[3]) // 24
            at = row * side + column
            if item.kind == "shape" and 0 < item.box[2] % 12 < 12:
                assert (COLOUR_NAMES[labels.colours[at] - 1], FORMS[labels.forms[at]]) == (item.colour, item.name)
            if item.kind == "symbol":
                assert item.name in {SYMBOLS[s - 1] for s in labels.symbols if s}


def test_dense_labels_of_a_window_are_the_part_of_the_whole() -> None:
    for index in range(20):
        page = TRAIN.picture(index, "page")
        whole, part = dense_labels(page, 16), dense_labels(page, 8, window=(96, 0, 192, 96))
        for row, column in product(range(8), range(8)):
            at, inside = 16 * row + 8 + column, 8 * row + column
            assert whole.symbols[at] == part.symbols[inside]
            assert whole.colours[at] == part.colours[inside]
            x0, y0, x1, y1 = whole.edges[at]
            cut = tuple(min(max(edge, 0.0), 1.0) for edge in (2 * x0 - 1, 2 * y0, 2 * x1 - 1, 2 * y1))
            assert part.edges[inside] == pytest.approx(cut if whole.edges[at] != (0, 0, 0, 0) else (0, 0, 0, 0))


def test_dense_edges_are_those_of_the_item() -> None:
    picture = TRAIN.picture(0, "scene")
    labels = dense_labels(picture, 8)
    seen = {edges for edges in labels.edges if any(edges)}
    assert seen == {tuple(edge / TILE_PX for edge in item.box) for item in picture.items}


def test_dense_labels_call_small_print_unknown_where_strokes_are_lost() -> None:
    page = TRAIN.picture(0, "page")
    symbols = set(dense_labels(page, 8, stroke_px=0.5).symbols)
    assert symbols == {0, UNKNOWN}


def test_documents_and_preferences_are_well_formed() -> None:
    for index in range(30):
        document = TRAIN.document(index)
        pictures = [k for k, part in enumerate(document.parts) if not isinstance(part, str)]
        assert len(pictures) in (2, 3)
        assert isinstance(document.parts[0], str)
        assert isinstance(document.parts[-1], str)
        preference = TRAIN.preference(index)
        assert {preference.chosen, preference.rejected} == {"yes", "no"}


def test_texts_hold_every_word_of_the_exam(exams) -> None:
    known = set(re.findall(r"\w+", " ".join(TRAIN.texts(150))))
    asked = {
        word for talks in exams.values() for t in talks for q in t.questions for word in re.findall(r"\w+", q.text)
    }
    answered = {
        word for talks in exams.values() for t in talks for q in t.questions for word in re.findall(r"\w+", q.answer)
    }
    assert asked | answered <= known


def test_boxes_score_by_overlap_and_strings_by_equality() -> None:
    assert is_correct("box", "2 2 6 6", "2 2 6 6")
    assert is_correct("box", "2 2 6 5", "2 2 6 6")
    assert not is_correct("box", "2 2 4 4", "2 2 6 6")
    assert not is_correct("box", "nowhere", "2 2 6 6")
    assert not is_correct("box", "6 6 2 2", "2 2 6 6")
    assert is_correct("word", " a 7  K ", "A 7 K")
    assert not is_correct("word", "A 7", "A 7 K")
    with pytest.raises(ValueError, match="skill: expected one of"):
        is_correct("smell", "", "")


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="max_questions: expected at least 1, got 0"):
        TRAIN.conversation(0, max_questions=0)
    with pytest.raises(ValueError, match="skill: expected one of"):
        TRAIN.exam("smell", 1)


def test_readme_example_runs() -> None:
    readme = (Path(__file__).parents[2] / "packages/scene-world/README.md").read_text()
    for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL):
        exec(compile(block, "README.md", "exec"), {})
