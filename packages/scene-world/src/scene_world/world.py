"""The world: every sample is a pure function of (seed, split, purpose, index)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Literal, TypeAlias

from . import questions as ask
from .lexicon import COLOUR_NAMES, SHAPES, SKILLS, Split
from .pictures import Painter, Picture, PictureKind
from .questions import CAPTION_ORDERS, Question, describe

SINGLE_KINDS: tuple[PictureKind, ...] = ("scene", "crowd", "word", "page", "chart", "card")
"""Kinds of which single-image conversations and captions are made; their cards are never private."""

_PICTURES_KEPT = 8192

Group: TypeAlias = Literal["pair", "triple", "mixed"]


@dataclass(frozen=True)
class Document:
    """Text and pictures in reading order; a caption is a picture and a text."""

    id: str
    parts: tuple[str | Picture, ...]


@dataclass(frozen=True)
class Conversation:
    """Pictures, then one or more questions about them."""

    id: str
    pictures: tuple[Picture, ...]
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Preference:
    """Pictures, a question, and a better and a worse answer."""

    id: str
    pictures: tuple[Picture, ...]
    question: str
    chosen: str
    rejected: str


class World:
    """Draws samples of one split; two worlds with the same seed and split draw the same, whatever was asked before."""

    def __init__(self, seed: int, split: Split = "train") -> None:
        """Take any whole number as seed; "train" and "heldout" share no string and no colour × shape × place."""
        self.seed = seed
        self.split: Split = split
        self._painter = Painter(split)
        # Captions and conversations come back to the same pictures; one weighs 28 kB, a page four times that.
        self._drawn = lru_cache(maxsize=_PICTURES_KEPT)(self._draw_picture)

    def __reduce__(self) -> tuple[type["World"], tuple[int, Split]]:
        """What a worker process gets: it draws the same pictures itself."""
        return World, (self.seed, self.split)

    def picture(self, index: int, kind: PictureKind | None = None) -> Picture:
        """Draw one picture; without a kind, each of ``SINGLE_KINDS`` in turn. Cards of odd index are private.

        Captions, conversations and safety samples are about these pictures: what is computed from one can be kept.
        """
        return self._drawn(index, kind or SINGLE_KINDS[index % len(SINGLE_KINDS)])

    def _draw_picture(self, index: int, kind: PictureKind) -> Picture:
        rng, _ = self._start(f"picture/{kind}", index)
        return self._draw(rng, kind, is_private=index % 2 == 1)

    def caption(self, index: int, kind: PictureKind | None = None, variant: int = 0) -> Document:
        """Return one picture, never a private card, with its complete caption; the picture is ``conversation``'s.

        Another ``variant`` tells the same in another of the ``CAPTION_ORDERS``.
        """
        kind = kind or SINGLE_KINDS[index % len(SINGLE_KINDS)]
        picture = self._benign(index, kind)
        order = CAPTION_ORDERS[variant % len(CAPTION_ORDERS)]
        return Document(f"{self.split}/caption/{kind}/{order}/{index}", (picture, describe(picture, order)))

    def document(self, index: int) -> Document:
        """Write a document of two or three pictures with captions; its end depends on the first and the last."""
        rng, name = self._start("document", index)
        pictures = [self._painter.scene(rng) for _ in range(rng.randint(2, 3))]
        parts: list[str | Picture] = []
        for number, picture in enumerate(pictures):
            parts += ["First" if number == 0 else "Next", picture, describe(picture)]
        first, last = pictures[0].shapes, pictures[-1].shapes
        shared = [
            colour for colour in COLOUR_NAMES if all(colour in [s.colour for s in side] for side in (first, last))
        ]
        parts.append("Both first and last have " + (", ".join(shared) if shared else "nothing") + ".")
        return Document(name, tuple(parts))

    def conversation(
        self, index: int, kind: PictureKind | None = None, max_questions: int = 6, variant: int = 0
    ) -> Conversation:
        """Ask up to ``max_questions`` different questions about one picture, never a private card, in random order.

        Another ``variant`` asks about the same picture anew.

        Raises:
            ValueError: max_questions is below one.
        """
        if max_questions < 1:
            raise ValueError(f"max_questions: expected at least 1, got {max_questions}; ask for one or more")
        kind = kind or SINGLE_KINDS[index % len(SINGLE_KINDS)]
        rng, name = self._start(f"conversation/{kind}/{variant}", index)
        picture = self._benign(index, kind)
        return Conversation(name, (picture,), tuple(self._questions(rng, picture)[:max_questions]))

    def group(self, index: int, kind: Group = "mixed", max_questions: int = 4) -> Conversation:
        """Draw two pictures to compare, or three to find things in, with questions about all of them."""
        if kind == "mixed":
            kind = ("pair", "triple")[index % 2]
        rng, name = self._start(f"group/{kind}", index)
        if kind == "pair":
            pictures: Sequence[Picture] = self._painter.scenes_sharing(rng)
            asked = list(ask.ask_shared(pictures))
        else:
            what: Literal["colour", "shape"] = "colour" if rng.random() < 0.5 else "shape"
            targets = rng.sample(range(10), 3)
            pictures = self._painter.scenes_with(rng, what, targets)
            names = COLOUR_NAMES if what == "colour" else SHAPES
            asked = [ask.ask_which(pictures, names[target]) for target in targets]
        rng.shuffle(asked)
        return Conversation(name, tuple(pictures), tuple(asked[:max_questions]))

    def preference(self, index: int) -> Preference:
        """Draw a scene with a presence question; the worse answer is the other of yes and no, in two of three a yes."""
        rng, name = self._start("preference", index)
        picture = self.picture(index, "scene")
        question = ask.ask_presence(rng, picture, is_present=index % 3 == 0)
        wrong = "no" if question.answer == "yes" else "yes"
        return Preference(name, (picture,), question.text, question.answer, wrong)

    def safety(self, index: int) -> Conversation:
        """Draw a card with one question about it; every other card is private, and the question must be refused."""
        picture = self.picture(index, "card")
        questions = [ask.ask_string(picture), ask.ask_emblem(picture)]
        return Conversation(f"{self.split}/safety/{index}", (picture,), (questions[(index // 2) % 2],))

    def forbidden(self, index: int) -> Conversation:
        """Draw a card that is not private with an instruction that must be refused all the same.

        The cards are those of ``safety``. These words are not among ``texts``.
        """
        rng, name = self._start("forbidden", index)
        return Conversation(name, (self._benign(index, "card"),), (ask.ask_forbidden(rng, self.split),))

    def exam(self, skill: str, count: int) -> list[Conversation]:
        """Return ``count`` one-question samples of a skill; yes and no, refusals and look-alikes in equal parts.

        Raises:
            ValueError: there is no such skill.
        """
        if skill not in SKILLS:
            raise ValueError(f"skill: expected one of {', '.join(SKILLS)}, got {skill!r}; see scene_world.SKILLS")
        return [self.exam_item(skill, index) for index in range(count)]

    def texts(self, count: int) -> Iterator[str]:
        """Yield all text of ``count`` rounds of every kind of sample, to train a tokenizer on."""
        for index in range(count):
            for document in (*(self.caption(index, kind, index) for kind in SINGLE_KINDS), self.document(index)):
                yield " ".join(part for part in document.parts if isinstance(part, str))
            talks = [self.conversation(index, kind, 12) for kind in SINGLE_KINDS]
            for talk in (*talks, self.group(index, "pair"), self.group(index, "triple"), self.safety(index)):
                for question in talk.questions:
                    yield f"{question.text} {question.answer}"

    def exam_item(self, skill: str, index: int) -> Conversation:
        """Return one of ``exam``; of the training split one that no exam on held-out pictures asks."""
        if skill == "private":
            return self.safety(index)
        if skill in ("compare", "find"):
            return self.group(index, "pair" if skill == "compare" else "triple", max_questions=1)
        rng, name = self._start(f"exam/{skill}", index)
        kinds: dict[str, PictureKind] = {"count": "crowd", "word": "word", "print": "page", "chart": "chart"}
        while True:
            picture = self._draw(rng, kinds.get(skill, "scene"))
            if skill == "presence":
                return Conversation(name, (picture,), (ask.ask_presence(rng, picture, is_present=index % 2 == 0),))
            fitting = [question for question in self._questions(rng, picture) if question.skill == skill]
            if fitting:
                return Conversation(name, (picture,), (fitting[0],))

    def _benign(self, index: int, kind: PictureKind) -> Picture:
        return self.picture(2 * index if kind == "card" else index, kind)

    def _start(self, purpose: str, index: int) -> tuple[Random, str]:
        name = f"{self.split}/{purpose}/{index}"
        return Random(f"{self.seed}/{name}"), name

    def _draw(self, rng: Random, kind: PictureKind, *, is_private: bool = False) -> Picture:
        if kind == "card":
            return self._painter.card(rng, is_private=is_private)
        drawers = {
            "scene": self._painter.scene,
            "crowd": self._painter.crowd,
            "word": self._painter.word,
            "page": self._painter.page,
            "chart": self._painter.chart,
        }
        return drawers[kind](rng)

    def _questions(self, rng: Random, picture: Picture) -> list[Question]:
        """Return every kind of question that this picture allows, shuffled."""
        shapes = list(picture.shapes)
        if picture.kind == "chart":
            asked = [ask.ask_bar(bar) for bar in picture.items]
            asked += [ask.ask_extreme_bar(picture, is_highest) for is_highest in (True, False)]
        elif picture.kind == "crowd":
            asked = ask.ask_counts(picture)
        elif picture.kind == "card":
            asked = [ask.ask_string(picture), ask.ask_emblem(picture)]
        else:
            # A shape asked for by its name and one asked for by its colour are different ones where there are two, so
            # that no answer can be read off an earlier question.
            asked = [ask.ask_place(rng.choice(shapes)), ask.ask_box(rng.choice(shapes), picture.image.width)]
            by_name, by_colour = rng.sample(shapes, 2) if len(shapes) > 1 else (shapes[0], shapes[0])
            asked += [ask.ask_colour(by_name), ask.ask_shape(by_colour)]
            asked += [ask.ask_presence(rng, picture, is_present) for is_present in (True, False)]
            if len(shapes) > 1:
                asked.append(ask.ask_relation(*rng.sample(shapes, 2)))
            if picture.text:
                asked.append(ask.ask_string(picture))
        rng.shuffle(asked)
        if picture.text and picture.kind != "card":
            # What is printed comes first: pictures with print exist for it.
            asked.sort(key=lambda question: question.skill not in ("word", "print"))
        return asked
