"""Captions of the embedded world, told in one of four orders; with worked examples, the order is theirs.

Without examples nothing says which order is wanted, so at best about a quarter can be right; what examples add is
what a model learns in context.
"""

from collections.abc import Sequence
from pathlib import Path

from interleave_data import Sample, Turn
from scene_world import Picture, World
from vlm_metrics import exact_match

from ..measures import Measure, mean_of
from ..prediction import EvalItem
from ..wording import Wording
from .task import Asked, Task, scores_of
from .world import drawn_part

NUM_CAPTIONS = 200
_NUM_EXAMPLES = 100
_ORDERS = 4
_SEED = 1


def _items(split: str, count: int) -> list[EvalItem]:
    world = World(_SEED, "heldout" if split == "heldout" else "train")
    items: list[EvalItem] = []
    for index in range(count):
        document = world.caption(index, "scene", variant=index % _ORDERS)
        (picture,) = (part for part in document.parts if isinstance(part, Picture))
        (caption,) = (part for part in document.parts if isinstance(part, str))
        turn = Turn(role="user", parts=(drawn_part(picture, f"caption/{split} {_SEED}/{index}"),))
        prompt = Sample(id=document.id, source="world-captions", turns=(turn,))
        items.append(EvalItem(group=f"order {index % _ORDERS}", prompt=prompt, answer=caption))
    return items


def _draw(limit: int | None) -> list[EvalItem]:
    return _items("heldout", NUM_CAPTIONS if limit is None else min(NUM_CAPTIONS, _ORDERS * limit))


def _read_examples(folder: Path) -> list[EvalItem]:
    return _items("train", _NUM_EXAMPLES * _ORDERS)


def _facts(caption: str) -> set[str]:
    return {" ".join(sorted(thing.split())) for thing in caption.lower().rstrip(". ").split(",") if thing.strip()}


def _score(item: EvalItem, said: str) -> float:
    """Whether the caption is the one that is wanted, word for word."""
    return float(exact_match(said, item.answer))


def _measure(asked: Sequence[Asked]) -> dict[str, Measure]:
    told = [(_facts(one.answer.text), _facts(one.item.answer)) for one in asked]
    return {
        "exact": mean_of(scores_of(asked, _score)),
        "things": mean_of([len(said & true) / len(true) for said, true in told]),
    }


TASKS = {
    "world-captions": Task(
        name="world-captions",
        files="",
        read=lambda folder: _draw(None),
        draw=_draw,
        read_examples=_read_examples,
        score=_score,
        measure=_measure,
        wording=Wording(before="", after="", stops=("\n",), between=""),
        max_new_tokens=64,
    )
}
