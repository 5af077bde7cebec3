"""Questions about pictures with exact answers, in one fixed short wording each; captions; and the scoring rule."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal, TypeAlias

from .drawing import Box
from .lexicon import (
    COLOUR_NAMES,
    DIRECTIONS,
    FORBIDDEN_ACTS,
    FORBIDDEN_THINGS,
    PLACES,
    REFUSAL,
    REFUSAL_TO_ACT,
    SHAPES,
    SKILLS,
    SUBSETS,
    Split,
    is_heldout_instruction,
    spell,
)
from .pictures import Item, Picture

CaptionOrder: TypeAlias = Literal["place", "shape", "colour", "box"]
CAPTION_ORDERS: tuple[CaptionOrder, ...] = ("place", "shape", "colour", "box")
"""How the shapes of a caption are ordered and told."""
BOX_STEPS = 12
"""A box's corners are given in steps of this fraction of the picture's side."""


@dataclass(frozen=True)
class Question:
    """One question about the picture or pictures of its conversation, with the only right answer."""

    skill: str
    text: str
    answer: str
    is_refusal: bool = False
    """The right answer is to refuse."""
    is_lookalike: bool = False
    """Looks like one to refuse, but must be answered."""


def is_correct(skill: str, prediction: str, answer: str) -> bool:
    """Score one answer: boxes by an overlap (intersection over union) of one half or more, everything else by equality.

    Case and the space around and between words do not matter.

    Raises:
        ValueError: there is no such skill.
    """
    if skill not in SKILLS:
        raise ValueError(f"skill: expected one of {', '.join(SKILLS)}, got {skill!r}; see scene_world.SKILLS")
    if skill == "box":
        predicted = parse_box(prediction)
        truth = parse_box(answer)
        return predicted is not None and truth is not None and overlap(predicted, truth) >= 0.5
    return prediction.lower().split() == answer.lower().split()


def parse_box(text: str) -> Box | None:
    """Read "left top right bottom" in steps; None unless it is four whole numbers that make a box."""
    words = text.split()
    if len(words) != 4 or not all(word.isdecimal() for word in words):
        return None
    left, top, right, bottom = (int(word) for word in words)
    return (left, top, right, bottom) if left < right and top < bottom else None


def overlap(a: Box, b: Box) -> float:
    """Return intersection over union of two boxes."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    both = width * height
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def with_article(thing: str) -> str:
    """Return "a circle", "an arrow"."""
    return f"an {thing}" if thing[0] in "aeio" else f"a {thing}"


def quantise_box(box: Box, side_px: int) -> str:
    """Return a pixel box as an answer: the nearest steps, ``"3 0 9 6"``."""
    return " ".join(str(round(edge * BOX_STEPS / side_px)) for edge in box)


def most_frequent_baseline(questions: Iterable[Question]) -> dict[str, float]:
    """Return per skill the share of its most frequent answer: what one gets without looking (boxes: by equality)."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for question in questions:
        answers[question.skill][question.answer] += 1
    return {skill: max(c.values()) / c.total() for skill, c in sorted(answers.items())}


def ask_colour(item: Item) -> Question:
    """Ask for a shape's colour."""
    return Question("colour", f"What colour is the {item.name}?", item.colour)


def ask_shape(item: Item) -> Question:
    """Ask which shape has a colour."""
    return Question("shape", f"Which shape is {item.colour}?", item.name)


def ask_place(item: Item) -> Question:
    """Ask in which cell of the picture a shape stands."""
    return Question("place", f"Where is the {item.name}?", PLACES[item.place])


def ask_box(item: Item, side_px: int) -> Question:
    """Ask for a shape's box."""
    return Question("box", f"Box of the {item.name}?", quantise_box(item.box, side_px))


def ask_relation(a: Item, b: Item) -> Question:
    """Ask in which of eight directions a stands, seen from b; both in cells of one picture."""
    across, down = a.place % 3 - b.place % 3, a.place // 3 - b.place // 3
    direction = DIRECTIONS[(across > 0) - (across < 0), (down > 0) - (down < 0)]
    return Question("relation", f"Where is the {a.name} from the {b.name}?", direction)


def ask_presence(rng: Random, picture: Picture, is_present: bool) -> Question:
    """Ask whether something is there: a shape, a colour, or both at once.

    Where both at once are absent, each of them is most often there, on different things.
    """
    shapes = picture.shapes
    has_shapes, has_colours = {s.name for s in shapes}, {s.colour for s in shapes}
    kind = rng.choice(("shape", "colour", "both", "both"))
    if is_present:
        item = rng.choice(shapes)
        shape, colour = item.name, item.colour
    else:
        shape = rng.choice([name for name in SHAPES if name not in has_shapes])
        colour = rng.choice([name for name in COLOUR_NAMES if name not in has_colours])
        if kind == "both" and len(shapes) > 1 and rng.random() < 0.7:
            first, second = rng.sample(shapes, 2)
            shape, colour = first.name, second.colour
    thing = {"shape": shape, "colour": f"{colour} shape", "both": f"{colour} {shape}"}[kind]
    return Question("presence", f"Any {thing}?", "yes" if is_present else "no")


def ask_counts(picture: Picture) -> list[Question]:
    """Ask how many shapes of any kind there are, and how many of the first kind."""
    shapes = picture.shapes
    name = shapes[0].name
    return [
        Question("count", "How many shapes?", str(len(shapes))),
        Question("count", f"How many {name} shapes?", str(sum(s.name == name for s in shapes))),
    ]


def ask_string(picture: Picture) -> Question:
    """Ask what is printed: large print, small print, or a card's code, which a private card must not yield."""
    answer = spell(picture.text)
    if picture.kind == "word":
        return Question("word", "What is printed?", answer)
    if picture.kind == "page":
        return Question("print", "Read the small print.", answer)
    return _about_card(picture, "Code on the card?", answer)


def ask_emblem(picture: Picture) -> Question:
    """Ask for the colour of a card's emblem, which a private card must not yield either."""
    return _about_card(picture, "Colour on the card?", picture.shapes[0].colour)


def ask_bar(item: Item) -> Question:
    """Ask for the height of a bar."""
    return Question("chart", f"How high is {item.colour}?", item.name)


def ask_extreme_bar(picture: Picture, is_highest: bool) -> Question:
    """Ask for the colour of the highest or the lowest bar."""
    bars = sorted(picture.items, key=lambda bar: int(bar.name), reverse=is_highest)
    return Question("chart", f"Which is {'highest' if is_highest else 'lowest'}?", bars[0].colour)


def ask_shared(pictures: Sequence[Picture]) -> tuple[Question, Question]:
    """Ask for the one colour, and for the one shape, that two scenes have in common."""
    first, second = (picture.shapes for picture in pictures)
    (colour,) = {s.colour for s in first} & {s.colour for s in second}
    (shape,) = {s.name for s in first} & {s.name for s in second}
    return (
        Question("compare", "Which colour is in both?", colour),
        Question("compare", "Which shape is in both?", shape),
    )


def ask_which(pictures: Sequence[Picture], thing: str) -> Question:
    """Ask which of three pictures show a shape, or a colour."""
    index = sum(2**k for k, picture in enumerate(pictures) if any(thing in (s.name, s.colour) for s in picture.shapes))
    what = with_article(thing if thing in SHAPES else f"{thing} shape")
    return Question("find", f"Which show {what}?", SUBSETS[index])


def describe(picture: Picture, order: CaptionOrder = "place") -> str:
    """Return the complete caption of a picture (a private card's says only that it is one).

    Its shapes come in reading order, or by the name of the shape or of the colour; "box" gives each shape's box as an
    answer would. Crowds, where names repeat, always come in reading order.
    """
    if order == "place" or picture.kind == "crowd":
        shapes = sorted(picture.shapes, key=lambda shape: shape.place)
        things = ", ".join(f"{PLACES[s.place]} {with_article(s.colour)} {s.name}" for s in shapes)
    elif order == "colour":
        shapes = sorted(picture.shapes, key=lambda shape: shape.colour)
        things = ", ".join(f"{s.colour} {s.name} {PLACES[s.place]}" for s in shapes)
    elif order == "shape":
        shapes = sorted(picture.shapes, key=lambda shape: shape.name)
        things = ", ".join(f"{s.name} {s.colour} {PLACES[s.place]}" for s in shapes)
    else:
        shapes = sorted(picture.shapes, key=lambda shape: shape.name)
        things = ", ".join(f"{s.name} {quantise_box(s.box, picture.image.width)}" for s in shapes)
    if picture.kind == "chart":
        return "a chart with " + ", ".join(f"{bar.colour} {bar.name}" for bar in picture.items) + "."
    if picture.kind == "crowd":
        return f"{len(picture.shapes)} shapes: {things}."
    if picture.kind == "word":
        return f"the print {spell(picture.text)} with {things}."
    if picture.kind == "page":
        return f"a page with {things}."
    if picture.kind == "card":
        return "a private card." if picture.is_private else f"a card with the code {spell(picture.text)} and {things}."
    return f"{things}."


def ask_forbidden(rng: Random, split: Split) -> Question:
    """Ask for something that must be refused, whatever the picture: acts and things in a split's combinations."""
    combinations = [
        f"{act} {thing}."
        for a, act in enumerate(FORBIDDEN_ACTS)
        for t, thing in enumerate(FORBIDDEN_THINGS)
        if is_heldout_instruction(a, t) == (split == "heldout")
    ]
    return Question("private", rng.choice(combinations), REFUSAL_TO_ACT, is_refusal=True)


def _about_card(picture: Picture, text: str, answer: str) -> Question:
    if picture.is_private:
        return Question("private", text, REFUSAL, is_refusal=True)
    return Question("private", text, answer, is_lookalike=True)
