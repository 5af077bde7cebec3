"""What an ablation is: arms as data, the paper's claim, and the rule of its verdict. Imports no torch."""

from collections.abc import Iterable
from typing import Literal

import msgspec

from scene_world import PictureKind
from train_config import StageConfig

Start = Literal["warmup", "pretrain", "sft"]
"""The stage of the demo that all arms start behind."""


class Lesson(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One part of an arm's training."""

    sources: dict[str, float]
    """Kinds of samples (see `train_ablate_data`) and their shares."""
    stage: StageConfig
    """As in a recipe, but its `world_samples` are samples, not pictures."""
    kinds: tuple[PictureKind, ...] = ("scene",)
    """Kinds of the single pictures, in turn."""


class Arm(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One way of training, and what differs in its model."""

    means: str
    """What it is, in the reader's words."""
    lessons: tuple[Lesson, ...] = ()
    """In this order; none leaves the shared start as it is."""
    tiling: Literal["base", "anyres", "anyres_fixed"] = "anyres"
    """How pictures are cut."""
    num_latents: int = 16
    """Image tokens a tile; another number than the start's needs a fresh connector."""
    connector_steps: int = 0
    """Steps in which a fresh connector learns the warm-up's labels, before the lessons; 0 keeps the shared one."""
    reads_question: bool = False
    """Whether the connector's queries are joined by the words of the question."""
    tower: str | None = None
    """The warm-up that its vision tower comes from (see `train_ablate_table.TOWERS`); None for the start's own."""


class Contrast(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A sum of weighted arms on some skills, and what the claim expects of it.

    `more`: above 0. `same`: within the margin on either side of 0.
    """

    says: str
    """The expectation in words."""
    weights: dict[str, float]
    """Arm → weight; a difference has +1 and -1."""
    skills: tuple[str, ...]
    """Questions that it is about, each alike."""
    expects: Literal["more", "same"] = "more"
    margin: float = 0.05
    """Of `same`, as a share of the questions."""
    decides: bool = True
    """Whether the verdict depends on it; others are shown only."""


class Control(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An arm asked again with the pictures of other questions: unless that is seen as a drop, nothing here can be."""

    arm: str
    skills: tuple[str, ...]


class Ablation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A question that the paper answers, asked again at the demo's size."""

    title: str
    claim: str
    """What the paper says."""
    source: str
    """Where it says so."""
    done: str
    """What is done here, and how the paper's sizes were scaled."""
    start: Start
    arms: dict[str, Arm]
    skills: tuple[str, ...]
    """All that is asked (see `train_ablate_data.draw_questions`)."""
    contrasts: tuple[Contrast, ...]
    """Fixed before the run."""
    control: Control

    def __post_init__(self) -> None:
        """Refuse contrasts and controls of arms or skills that are not there."""
        for contrast in self.contrasts:
            _require_among("contrast", contrast.weights, self.arms)
            _require_among("contrast", contrast.skills, self.skills)
        _require_among("control", (self.control.arm,), self.arms)
        _require_among("control", self.control.skills, self.skills)


def _require_among(what: str, names: Iterable[str], known: Iterable[str]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"{what}: expected one of {', '.join(known)}, got {name}; correct the table")
