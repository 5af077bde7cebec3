"""The embedded world as sources of samples, one mixture a stage, and as held-out questions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256

from blip3_lite import user_turn
from eval_lite.tasks.world import drawn_part
from interleave_data import ImagePart, PreferenceSample, Sample, SkipLimits, TextPart, Turn
from interleave_data.sources import AnySample
from phi3_lite import HFTokenizer, train_tokenizer
from scene_world import Conversation, Document, Picture, PictureKind, Preference, World
from train_stream import StageData

NOTHING_MAY_BE_SKIPPED = SkipLimits(max_share=0.0, max_consecutive=1, min_seen=1)
"""Drawn pictures are never bad; a skip here is a fault of the program."""


QUESTION_ROUNDS = 3
"""Times that new questions are asked about the same picture before all repeats."""
WORLD_STAGES = ("pretrain", "sft", "interleaved", "dpo", "safety")
"""Stages that the embedded world has samples for."""
QUESTION_KINDS: tuple[PictureKind, ...] = (
    "scene", "scene", "crowd", "word", "page", "chart", "scene", "word", "card", "crowd",
)  # fmt: skip
"""Pictures of captions and questions, in turn."""


@dataclass(frozen=True)
class WorldSource:
    """Samples drawn when asked for: the same index gives the same sample."""

    name: str
    count: int
    draw: Callable[[int], AnySample]
    version: str

    @property
    def fingerprint(self) -> str:
        """Digest of what is drawn, how much of it, and with which seed."""
        return sha256(f"{self.name}/{self.count}/{self.version}".encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> AnySample:
        return self.draw(index)


def world_tokenizer(vocab_size: int) -> HFTokenizer:
    """A tokenizer trained on the world's own text; digits and single capitals stand alone, so strings can be spelt."""
    return train_tokenizer(World(0, "train").texts(300), vocab_size, spelled=" ?[0-9A-Z](?![a-z])")


def _image_parts(pictures: Sequence[Picture], key: str) -> list[ImagePart]:
    return [drawn_part(picture, f"{key}/{place}") for place, picture in enumerate(pictures)]


def document_sample(document: Document, key: str) -> Sample:
    """A caption or an interleaved document."""
    images = iter(_image_parts([part for part in document.parts if isinstance(part, Picture)], key))
    parts = tuple(TextPart(part) if isinstance(part, str) else next(images) for part in document.parts)
    return Sample(id=document.id, source="world", turns=(Turn(role="document", parts=parts),))


def conversation_sample(talk: Conversation, key: str) -> Sample:
    """A whole conversation: pictures and first question in one turn, then answer and question in turn."""
    turns: list[Turn] = []
    for index, question in enumerate(talk.questions):
        turns.append(user_turn(_image_parts(talk.pictures, key) if index == 0 else [], question.text))
        turns.append(Turn(role="assistant", parts=(TextPart(question.answer),)))
    return Sample(id=talk.id, source="world", turns=tuple(turns))


def preference_sample(preference: Preference, key: str) -> PreferenceSample:
    """A question with a better and a worse answer."""
    return PreferenceSample(
        id=preference.id,
        source="world",
        turns=(user_turn(_image_parts(preference.pictures, key), preference.question),),
        chosen=preference.chosen,
        rejected=preference.rejected,
    )


class Drawers:
    """How each kind of training sample is drawn from its index; the same picture has the same key everywhere."""

    def __init__(self, world: World, kinds: Sequence[PictureKind] = QUESTION_KINDS) -> None:
        self.world, self.kinds = world, kinds

    def caption(self, index: int) -> AnySample:
        """One picture with its caption, told in several orders in turn."""
        number, kind = self._picture(index)
        return document_sample(self.world.caption(number, kind, number), f"{kind}/{number}")

    def _picture(self, index: int) -> tuple[int, PictureKind]:
        number, place = divmod(index, len(self.kinds))
        return number, self.kinds[place]

    def document(self, index: int) -> AnySample:
        """Pictures with captions in reading order."""
        return document_sample(self.world.document(index), f"document/{index}")

    def questions(self, index: int) -> AnySample:
        """Questions about one picture: those of the captions, asked anew in each round of `count`."""
        place, variant = divmod(index, QUESTION_ROUNDS)
        number, kind = self._picture(place)
        return conversation_sample(self.world.conversation(number, kind, variant=variant), f"{kind}/{number}")

    def group(self, index: int) -> AnySample:
        """Questions about several pictures."""
        return conversation_sample(self.world.group(index), f"group/{index}")

    def preference(self, index: int) -> AnySample:
        """A better and a worse answer."""
        return preference_sample(self.world.preference(index), f"scene/{index}")

    def presence(self, index: int) -> AnySample:
        """Whether something is there, yes and no in equal parts."""
        return conversation_sample(self.world.exam_item("presence", index), f"presence/{index}")

    def forbidden(self, index: int) -> AnySample:
        """A look-alike with an instruction to refuse."""
        return conversation_sample(self.world.forbidden(index), f"any-card/{2 * index}")

    def card(self, index: int) -> AnySample:
        """A private card or a look-alike."""
        return conversation_sample(self.world.safety(index), f"any-card/{index}")


def stage_data(stage: str, count: int, seed: int, kinds: Sequence[PictureKind] = QUESTION_KINDS) -> StageData:
    """The mixture of one stage over about `count` pictures (or groups of pictures); `kinds`: of the single ones.

    Raises:
        ValueError: no such stage.
    """
    drawers = Drawers(World(seed, "train"), kinds)
    # Source → (how it is drawn, samples per picture, share of the samples).
    mixtures: dict[str, dict[str, tuple[Callable[[int], AnySample], int, float]]] = {
        "pretrain": {"captions": (drawers.caption, 1, 0.85), "documents": (drawers.document, 1, 0.15)},
        "sft": {"questions": (drawers.questions, QUESTION_ROUNDS, 1.0)},
        "interleaved": {
            "groups": (drawers.group, 1, 0.5),
            "questions": (drawers.questions, QUESTION_ROUNDS, 0.5),
        },
        "dpo": {"preferences": (drawers.preference, 1, 1.0)},
        # Of `dpo` where the model is asked first: as often yes as no, or its errors would teach which comes more often.
        "own-errors": {"presence": (drawers.presence, 1, 1.0)},
        # As 2 k pictures of VLGuard, half of them safe with an unsafe instruction besides, and 5 k of both SFTs.
        "safety": {
            "cards": (drawers.card, 1, 2 / 8),
            "instructions": (drawers.forbidden, 1, 1 / 8),
            "questions": (drawers.questions, QUESTION_ROUNDS, 4 / 8),
            "groups": (drawers.group, 1, 1 / 8),
        },
    }
    if stage not in mixtures:
        raise ValueError(f"stage: expected one of {', '.join(mixtures)}, got {stage!r}; use one of them")
    sources = [
        WorldSource(name, max(1, round(count * share)) * rounds, draw, version=f"seed {seed} kinds {','.join(kinds)}")
        for name, (draw, rounds, share) in mixtures[stage].items()
    ]
    ratios = [share for *_, share in mixtures[stage].values()]
    return StageData(sources, ratios, skip_limits=NOTHING_MAY_BE_SKIPPED)
