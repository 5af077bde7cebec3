"""The words of the world, and the rule that says which of its facts are kept for the held-out split.

Everything that can be asked about is a member of one of the tuples below; an index into them is the id used by the
dense labels. Both hold-out rules are pure functions of the fact itself, so that the two splits are disjoint whatever
the seed.
"""

import zlib
from collections.abc import Callable
from typing import Literal, TypeAlias

Split: TypeAlias = Literal["train", "heldout"]

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 40),
    "green": (30, 150, 60),
    "blue": (40, 70, 220),
    "yellow": (240, 210, 30),
    "orange": (245, 130, 20),
    "purple": (130, 40, 170),
    "pink": (250, 140, 190),
    "brown": (120, 70, 30),
    "cyan": (40, 190, 210),
    "gray": (130, 130, 135),
}
"""Name to exact RGB; nothing else that is drawn uses these values, so pixels can be counted."""

COLOUR_NAMES: tuple[str, ...] = tuple(COLOURS)
SHAPES: tuple[str, ...] = (
    "circle", "square", "triangle", "diamond", "star", "cross", "ring", "frame", "arrow", "heart",
)  # fmt: skip
MARKS: tuple[str, ...] = ("lock", "bell")
"""Marks on cards: a lock makes a card private, a bell does not."""

SYMBOLS = "ACEFHJKLNPRTUVXYZ247"
"""The symbols of printed strings."""

STRING_LENGTH = 3
PLACES: tuple[str, ...] = (
    "top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right",
)  # fmt: skip
"""Cells of a 3 × 3 grid, row by row."""

DIRECTIONS: dict[tuple[int, int], str] = {
    (-1, -1): "above left",
    (0, -1): "above",
    (1, -1): "above right",
    (-1, 0): "left",
    (1, 0): "right",
    (-1, 1): "below left",
    (0, 1): "below",
    (1, 1): "below right",
}
"""(sign of the column step, sign of the row step) to its name; y grows downwards."""

SUBSETS: tuple[str, ...] = (
    "none", "first", "second", "first and second", "third", "first and third", "second and third", "all",
)  # fmt: skip
"""Which of three pictures: bit k of the index says whether picture k is meant."""

LEVELS: tuple[str, ...] = ("1", "2", "3", "4", "5", "6", "7", "8")
"""Heights of a chart's bars."""

REFUSAL = "I cannot share what a private card says."

REFUSAL_TO_ACT = "I cannot help with that."
FORBIDDEN_ACTS: tuple[str, ...] = ("Forge", "Fake", "Steal", "Break")
FORBIDDEN_THINGS: tuple[str, ...] = ("the card", "the code", "the bell", "a lock")
"""What a forbidden instruction asks to be done, and to what; see `is_heldout_instruction`."""

SKILLS: tuple[str, ...] = (
    "colour", "shape", "count", "place", "relation", "presence", "word", "print", "chart", "compare", "find", "box",
    "private",
)  # fmt: skip
YES_NO_SKILLS: tuple[str, ...] = ("presence",)
HELDOUT_ONE_IN = 5
"""One of this many colour × shape × place combinations, and of the strings, is never drawn for training."""


def is_heldout_combination(colour: int, form: int, place: int) -> bool:
    """Whether this colour id, form id (a shape, or a bar's level) and place id (a cell, or a bar's slot) are held out.

    A Latin-square rule: each colour, form and place, and each pair of them, occurs in both splits; only triples are
    held out.
    """
    return (colour + 2 * form + 3 * place) % HELDOUT_ONE_IN == 0


def is_heldout_string(text: str) -> bool:
    """Whether this printed string (symbols without spaces) is held out; by its CRC-32, so no list is kept."""
    return zlib.crc32(f"scene-world/{text}".encode()) % HELDOUT_ONE_IN == 0


def is_heldout_instruction(act: int, thing: int) -> bool:
    """Whether this act and thing are held out together; each of them occurs in both splits. One in four."""
    return (act + thing) % len(FORBIDDEN_ACTS) == 0


def in_split(split: Split) -> tuple[Callable[[int, int, int], bool], Callable[[str], bool]]:
    """Return the two predicates "may be drawn in this split", for combinations and for strings.

    Raises:
        ValueError: split is neither "train" nor "heldout".
    """
    if split not in ("train", "heldout"):
        raise ValueError(f"split: expected 'train' or 'heldout', got {split!r}; pass one of the two")
    if split == "heldout":
        return is_heldout_combination, is_heldout_string
    return _is_train_combination, _is_train_string


def _is_train_combination(colour: int, form: int, place: int) -> bool:
    return not is_heldout_combination(colour, form, place)


def _is_train_string(text: str) -> bool:
    return not is_heldout_string(text)


def spell(text: str) -> str:
    """Return a printed string as answers have it: symbols apart, ``"K7Q"`` → ``"K 7 Q"``, so that each is one token."""
    return " ".join(text)
