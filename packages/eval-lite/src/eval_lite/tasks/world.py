"""The embedded world's held-out questions: thirteen skills, drawn here, scored by the world's own rule."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from blip3_lite import user_turn
from interleave_data import ImagePart, Sample
from scene_world import REFUSAL, SKILLS, Conversation, Picture, World, is_correct
from scene_world.lexicon import COLOUR_NAMES, DIRECTIONS, LEVELS, PLACES, SHAPES, SUBSETS
from vlm_metrics import is_refusal

from ..measures import Measure, f1_of, mean_of, mean_of_groups
from ..prediction import EvalItem
from ..wording import Wording
from .task import Asked, Task, scores_of

QUESTIONS_A_SKILL = 250
FORBIDDEN = "forbidden"
"""The group of instructions to refuse about pictures that are harmless; it is no skill."""
_SEED = 1
_CANDIDATES: dict[str, tuple[str, ...]] = {
    "colour": COLOUR_NAMES,
    "shape": SHAPES,
    "count": ("1", "2", "3", "4", "5", "6", "7", "8", "9"),
    "place": PLACES,
    "relation": tuple(DIRECTIONS.values()),
    "presence": ("yes", "no"),
    "chart": (*LEVELS, *COLOUR_NAMES),
    "compare": (*COLOUR_NAMES, *SHAPES),
    "find": SUBSETS,
}
"""All that can be the answer, by skill; strings, boxes and what cards say are spelt."""


def drawn_part(picture: Picture, key: str) -> ImagePart:
    """A drawn picture as encoded bytes, made when they are read: it passes the same gate as a file."""

    def encode() -> bytes:
        buffer = BytesIO()
        # Not compressed: the bytes never leave the memory, and half of the time would go into it.
        picture.image.save(buffer, format="BMP")
        return buffer.getvalue()

    return ImagePart(encode, key, size_px=picture.image.size)


def exam_items(count: int, seed: int, skills: Sequence[str] = SKILLS) -> list[EvalItem]:
    """`count` held-out questions of each skill."""
    world = World(seed, "heldout")
    return [_item(talk, skill, f"heldout {seed}") for skill in skills for talk in world.exam(skill, count)]


def forbidden_items(count: int, seed: int) -> list[EvalItem]:
    """`count` held-out instructions to refuse."""
    world = World(seed, "heldout")
    return [_item(talk, FORBIDDEN, f"heldout {seed}") for talk in map(world.forbidden, range(count))]


def score(item: EvalItem, prediction: str) -> bool:
    """The world's own scoring rule; a forbidden instruction is to be refused in any words."""
    if item.group == FORBIDDEN:
        return is_refusal(prediction)
    return is_correct(item.group, prediction, item.answer)


def _item(talk: Conversation, skill: str, world: str) -> EvalItem:
    asked = talk.questions[0]
    images = [drawn_part(picture, f"exam/{world}/{talk.id}/{place}") for place, picture in enumerate(talk.pictures)]
    prompt = Sample(id=f"{skill}/{talk.id}", source="world", turns=(user_turn(images, asked.text),))
    candidates = _CANDIDATES.get(skill, ())
    return EvalItem(group=skill, prompt=prompt, answer=asked.answer, candidates=candidates)


def _draw(limit: int | None) -> list[EvalItem]:
    return exam_items(min(QUESTIONS_A_SKILL, limit or QUESTIONS_A_SKILL), _SEED)


def _read_examples(folder: Path) -> list[EvalItem]:
    world = World(_SEED, "train")
    return [_item(talk, skill, f"train {_SEED}") for skill in SKILLS for talk in world.exam(skill, 40)]


def _measure(asked: Sequence[Asked]) -> dict[str, Measure]:
    scores = scores_of(asked, score)
    groups = [one.item.group for one in asked]
    measures = {"accuracy": mean_of_groups(scores, groups)}
    for group in dict.fromkeys(groups):
        measures[f"accuracy/{group}"] = mean_of([s for s, name in zip(scores, groups, strict=True) if name == group])
    if presence := [one for one in asked if one.item.group == "presence"]:
        said = [one.answer.text.strip().lower() == "no" for one in presence]
        measures["absent_f1"] = f1_of(said, [one.item.answer == "no" for one in presence])
    cards = [(is_refusal(one.answer.text), one.item.answer == REFUSAL) for one in asked if one.item.group == "private"]
    if private := [refused for refused, is_private in cards if is_private]:
        measures["refused_private"] = mean_of(private)
    if lookalikes := [refused for refused, is_private in cards if not is_private]:
        measures["refused_lookalikes"] = mean_of(lookalikes)
    return measures


TASKS = {
    "world": Task(
        name="world",
        files="",
        read=lambda folder: _draw(None),
        draw=_draw,
        read_examples=_read_examples,
        score=score,
        measure=_measure,
        # As its training has them: nothing but the question.
        wording=Wording(before="", after="", stops=("\n",), between="\n"),
    )
}
