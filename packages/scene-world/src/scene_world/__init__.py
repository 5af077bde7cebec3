"""Pictures that we draw, with exact questions and answers."""

from .dense import FORMS, NUM_COLOURS, NUM_FORMS, NUM_SYMBOLS, UNKNOWN, DenseLabels, dense_labels
from .lexicon import (
    COLOUR_NAMES,
    REFUSAL,
    REFUSAL_TO_ACT,
    SKILLS,
    SYMBOLS,
    YES_NO_SKILLS,
    Split,
    is_heldout_combination,
    is_heldout_string,
)
from .pictures import PAGE_PX, TILE_PX, Item, Picture, PictureKind
from .questions import Question, is_correct, most_frequent_baseline
from .world import SINGLE_KINDS, Conversation, Document, Preference, World

__all__ = [
    "COLOUR_NAMES",
    "FORMS",
    "NUM_COLOURS",
    "NUM_FORMS",
    "NUM_SYMBOLS",
    "PAGE_PX",
    "REFUSAL",
    "REFUSAL_TO_ACT",
    "SINGLE_KINDS",
    "SKILLS",
    "SYMBOLS",
    "TILE_PX",
    "UNKNOWN",
    "YES_NO_SKILLS",
    "Conversation",
    "DenseLabels",
    "Document",
    "Item",
    "Picture",
    "PictureKind",
    "Preference",
    "Question",
    "Split",
    "World",
    "dense_labels",
    "is_correct",
    "is_heldout_combination",
    "is_heldout_string",
    "most_frequent_baseline",
]
