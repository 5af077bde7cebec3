"""The ablations: what the paper says, our arms, and the rule of the verdict, fixed before the run that is shown.

Lengths and samples were chosen by pilots with seed 0. Where a pilot changed what is asked, `done` says so.

An arm is some hundred steps behind a start that all arms share, on kinds of pictures from which so short a run learns:
at most two minutes on one core. Of an ablation all arms learn from the same number of samples, or of pictures, a step,
whatever their tokens are. "xGen-MM" is xGen-MM (BLIP-3), arXiv:2408.08872.
"""

from collections.abc import Callable
from typing import Literal

from msgspec.structs import replace

from scene_world import PictureKind
from train_ablate_plan import Ablation, Arm, Contrast, Control, Lesson
from train_config import StageConfig, WarmupConfig
from train_recipes import dpo_stage, pretrain_stage, safety_stage, sft_stage, warmup_stage
from trainer_lite.config import ScheduleConfig

SAMPLES_A_STEP = 8
_TOKENS_A_SAMPLE = 320
"""More than any sample has; the number of samples bounds a pack."""
_TOWER_STEPS = 240
_PLAIN: tuple[PictureKind, ...] = ("scene", "crowd", "chart")


def _tower(objective: Literal["dense", "sigmoid"]) -> WarmupConfig:
    warmup = warmup_stage()
    schedule = ScheduleConfig(kind="cosine", warmup_steps=20, min_ratio=0.05)
    train = replace(warmup.train, max_steps=_TOWER_STEPS, schedule=schedule)
    return replace(warmup, train=train, objective=objective, world_samples=_TOWER_STEPS * warmup.batch_size)


TOWERS: dict[str, tuple[WarmupConfig, tuple[PictureKind, ...]]] = {
    "tower-print": (_tower("dense"), ("scene", "word", "crowd", "word", "chart", "word")),
    "tower-plain": (_tower("dense"), _PLAIN),
    "tower-sigmoid": (_tower("sigmoid"), _PLAIN),
}
"""Warm-ups besides the demo's, and the kinds of pictures that the dense ones see in turn."""


def short(stage: StageConfig, steps: int, samples_a_step: int = SAMPLES_A_STEP) -> StageConfig:
    """A recipe's stage with a number of steps, each of as many samples, none of which comes twice."""
    schedule = ScheduleConfig(kind="cosine", warmup_steps=min(20, steps // 10), min_ratio=0.05)
    return replace(
        stage,
        train=replace(stage.train, max_steps=steps, schedule=schedule),
        max_tokens=samples_a_step * _TOKENS_A_SAMPLE,
        max_samples=samples_a_step,
        world_samples=steps * samples_a_step,
        num_workers=0,
    )


def _questions(steps: int, *kinds: PictureKind) -> Lesson:
    return Lesson(sources={"questions": 1.0}, kinds=kinds, stage=short(sft_stage(), steps))


def _above(says: str, better: str, than: str, *skills: str, decides: bool = True) -> Contrast:
    return Contrast(says=says, weights={better: 1, than: -1}, skills=skills, decides=decides)


def _same(says: str, one: str, other: str, *skills: str, decides: bool = True) -> Contrast:
    return Contrast(says=says, weights={one: 1, other: -1}, skills=skills, expects="same", decides=decides)


def tiling() -> Ablation:
    """Base view, any-resolution, and any-resolution with fixed sampling."""
    stage = short(sft_stage(), 140, 10)
    lesson = Lesson(sources={"small print": 0.6, "questions": 0.4}, stage=stage)
    return Ablation(
        title="Tiling strategies",
        claim="On text-rich tasks any-resolution with patch sampling is better than fixed sampling, and that better "
        "than the base resolution.",
        source="xGen-MM, ablation of any-resolution vision token sampling (bars on DocVQA, ChartQA, TextVQA, OCRBench)",
        done="SFT on questions for the small print of pages of two by two tiles, and about scenes of one tile, behind "
        "the same tower, connector and pre-trained language model. Other skills are asked on scenes.",
        start="pretrain",
        arms={
            "base": Arm(means="one view of the whole picture, 16 image tokens", lessons=(lesson,), tiling="base"),
            "anyres": Arm(means="thumbnail and tiles, 16 image tokens each (patch sampling)", lessons=(lesson,)),
            "fixed": Arm(
                means="the same views, read together into 16 image tokens (fixed sampling)",
                lessons=(lesson,),
                tiling="anyres_fixed",
            ),
        },
        skills=("print", "colour", "shape", "place"),
        contrasts=(
            _above("small print: any-resolution above base", "anyres", "base", "print"),
            _above("small print: patch above fixed sampling", "anyres", "fixed", "print"),
            _above("small print: fixed sampling above base", "fixed", "base", "print", decides=False),
            _same("scenes: any-resolution as base", "anyres", "base", "colour", "shape", "place", decides=False),
        ),
        control=Control(arm="anyres", skills=("colour", "shape", "place")),
    )


def tokens() -> Ablation:
    """4, 8, 16 and 32 image tokens a tile."""
    lesson = _questions(140, "word", "scene")
    skills = ("colour", "shape", "place", "word")
    return Ablation(
        title="Number of image tokens",
        claim="128 image tokens can become 64 with little loss; 16 lose more.",
        source="xGen-MM v1, ablation of the number of visual tokens (table over 16 to 256; its figures are not at "
        "hand); MM1, arXiv:2403.09611, finds more tokens better from 64 to 144",
        done="The paper's 16, 32, 64 and 128 of 729 patches are 4, 8, 16 and 32 of 64 patches here: a quarter. The "
        "tower is shared; each arm's connector begins fresh, learns the warm-up's labels for 100 steps behind the "
        "frozen tower, then SFT follows. The language model is pre-trained, behind a connector of 16 that no arm "
        "keeps. All arms see the same samples.",
        start="pretrain",
        arms={
            str(number): Arm(
                means=f"{number} image tokens a tile", lessons=(lesson,), num_latents=number, connector_steps=100
            )
            for number in (4, 8, 16, 32)
        },
        skills=skills,
        contrasts=(
            _same("half of the largest is as good (±5)", "32", "16", *skills),
            _above("16 above 4", "16", "4", *skills),
            _above("16 above 8", "16", "8", *skills, decides=False),
            _above("8 above 4", "8", "4", *skills, decides=False),
        ),
        control=Control(arm="16", skills=("colour", "shape", "place")),
    )


def scale() -> Ablation:
    """Pre-training on one, two and four times the samples."""

    def arm(steps: int) -> Arm:
        lesson = Lesson(sources={"captions": 1.0}, stage=short(pretrain_stage(), steps, 16))
        return Arm(means=f"{steps} steps of pre-training", lessons=(lesson,))

    return Ablation(
        title="Data scale",
        claim="More multimodal tokens in pre-training keep helping: much up to 60 B, moderately up to 100 B.",
        source="xGen-MM, pre-training data scaling from 2 B to 100 B tokens (curves of captioning at 4 and 8 shots)",
        done="Pre-training on captions of scenes for 60, 120 and 240 steps of 16 fresh samples. Asked is the beginning "
        "of a held-out scene's caption, as the paper measures captioning. A first version asked questions behind 50 "
        "more steps of SFT: how fast those took to the new format hid what pre-training had given, and its seed 0 "
        "went against the claim.",
        start="warmup",
        arms={"x1": arm(60), "x2": arm(120), "x4": arm(240)},
        skills=("0-shot",),
        contrasts=(
            _above("twice the data above once", "x2", "x1", "0-shot"),
            _above("four times above twice", "x4", "x2", "0-shot"),
            Contrast(
                says="the first doubling gives more than the second",
                weights={"x1": -1, "x2": 2, "x4": -1},
                skills=("0-shot",),
                decides=False,
            ),
        ),
        control=Control(arm="x4", skills=("0-shot",)),
    )


def interleaved() -> Ablation:
    """Captions alone, worked examples alone, and both, asked with 0, 4 and 8 worked examples."""
    pictures, steps = 24, 120
    captions = Lesson(sources={"captions": 1.0}, stage=short(pretrain_stage(), steps, pictures))
    examples = Lesson(sources={"examples": 1.0}, stage=short(pretrain_stage(), steps, pictures // 4))
    # A document has four pictures on average, so one in five samples holds half of the pictures.
    mixed = Lesson(sources={"captions": 0.8, "examples": 0.2}, stage=short(pretrain_stage(), steps, 5 * pictures // 8))
    return Ablation(
        title="Interleaved documents against captions",
        claim="Interleaved data are what makes few-shot good, caption data what makes zero-shot good.",
        source="MM1, arXiv:2403.09611 (8-shot 45 without interleaved data, above 61 with half; 0-shot 25.8 to "
        "39.3 as captions go from none to all); xGen-MM mixes both in equal parts",
        done="Scenes can be described in four orders. A caption is one scene in one of them; an interleaved document "
        "is two to six scenes told in the same order. All arms see 24 scenes a step, each told once. Asked is the "
        "beginning of a caption: without examples any order counts, behind 4 or 8 worked examples only theirs.",
        start="warmup",
        arms={
            "captions": Arm(means="captions alone", lessons=(captions,)),
            "mixed": Arm(means="half of the pictures in captions, half in interleaved documents", lessons=(mixed,)),
            "interleaved": Arm(means="interleaved documents alone", lessons=(examples,)),
        },
        skills=("0-shot", "4-shot", "8-shot"),
        contrasts=(
            _above("4-shot: interleaved above captions", "interleaved", "captions", "4-shot"),
            _above("8-shot: interleaved above captions", "interleaved", "captions", "8-shot"),
            _above("0-shot: captions above interleaved", "captions", "interleaved", "0-shot"),
            _above("8-shot: mixed above captions", "mixed", "captions", "8-shot", decides=False),
            _same("0-shot: mixed as captions (±5)", "mixed", "captions", "0-shot", decides=False),
        ),
        control=Control(arm="mixed", skills=("0-shot", "4-shot")),
    )


def mixture() -> Ablation:
    """Pre-training with and without what OCR and grounding captions say."""
    last = Lesson(sources={"questions": 1.0}, kinds=("word", "scene"), stage=short(sft_stage(), 50))

    def after(source: str) -> tuple[Lesson, ...]:
        return Lesson(sources={source: 1.0}, kinds=("word", "scene"), stage=short(pretrain_stage(), 220, 12)), last

    others = ("colour", "shape")
    return Ablation(
        title="OCR and grounding captions in pre-training",
        claim="OCR captions make a model read better, and grounding captions make it locate better; other tasks keep.",
        source="xGen-MM puts 5 % each of BLIP3-OCR-200M and BLIP3-GROUNDING-50M into the mixture for this (it shows no "
        "ablation of them alone); Idefics2, arXiv:2405.02246: DocVQA 42.9 to 49.9 with OCR data",
        done="Pre-training for 220 steps on captions of scenes and of large print, which say all, or leave out what is "
        "printed, or where things are (in words or as boxes); then the same 50 steps of SFT on questions. Grounding "
        "was first asked as boxes, of which a pilot got 0 to 4 % right in all arms; now it is asked as places.",
        start="warmup",
        arms={
            "full": Arm(means="captions say what is printed and where things are", lessons=after("captions")),
            "no-ocr": Arm(means="what is printed left out", lessons=after("captions without print")),
            "no-places": Arm(means="where things are left out", lessons=after("captions without places")),
        },
        skills=("word", "place", *others),
        contrasts=(
            _above("printed words: with OCR captions above without", "full", "no-ocr", "word"),
            _above("places: with grounding captions above without", "full", "no-places", "place"),
            _same("colour, shape: as without OCR (±5)", "full", "no-ocr", *others, decides=False),
            _same("colour, shape: as without places (±5)", "full", "no-places", *others, decides=False),
        ),
        control=Control(arm="full", skills=("word", "place", *others)),
    )


def backbone() -> Ablation:
    """Vision towers of several warm-ups."""
    lesson = _questions(140, "word", "scene")

    def arm(tower: str, means: str) -> Arm:
        return Arm(means=means, lessons=(lesson,), tower=tower, connector_steps=80)

    return Ablation(
        title="Visual backbone",
        claim="The backbone matters most where there is text to read: SigLIP gives TextVQA 49.1 against DFN's 41.1 (4 "
        "shots), and the same on OKVQA.",
        source="xGen-MM, table of vision backbones (10 B tokens of pre-training, 4 and 8 shots)",
        done=f"Towers of {_TOWER_STEPS} steps of warm-up: on labels of scenes, crowds, charts and large print; on the "
        "same without print; and on SigLIP's loss between pictures and captions. Behind each a fresh connector learns "
        "the labels for 80 steps, the tower frozen, then SFT follows with a language model that was pre-trained behind "
        "another tower.",
        start="pretrain",
        arms={
            "print": arm("tower-print", "labels, print among the pictures"),
            "plain": arm("tower-plain", "labels, no print among the pictures"),
            "sigmoid": arm("tower-sigmoid", "SigLIP's loss between pictures and captions"),
        },
        skills=("word", "colour", "shape"),
        contrasts=(
            _above("printed words: the tower that has seen print above", "print", "plain", "word"),
            _same("colour, shape: as the tower without print (±5)", "print", "plain", "colour", "shape"),
            _above("colour, shape: labels above SigLIP's loss", "plain", "sigmoid", "colour", "shape", decides=False),
        ),
        control=Control(arm="print", skills=("colour", "shape")),
    )


def instruction() -> Ablation:
    """Queries joined by the words of the question, or not."""
    stage = short(sft_stage(), 160)
    lesson = Lesson(sources={"single questions": 1.0}, kinds=("scene", "word"), stage=stage)
    skills = ("colour", "shape", "place", "word")
    return Ablation(
        title="Instruction-aware queries",
        claim="Text features appended to the resampler's queries make no significant difference.",
        source="xGen-MM, ablation of instruction-aware vision token sampling (bars without figures)",
        done="SFT on one question a picture. In one arm the words of the question, as the language model embeds them, "
        "are projected and join the queries of the resampler (`connector.kind = instructed_perceiver`).",
        start="pretrain",
        arms={
            "plain": Arm(means="the resampler sees the picture alone", lessons=(lesson,)),
            "instructed": Arm(means="it reads the question too", lessons=(lesson,), reads_question=True),
        },
        skills=skills,
        contrasts=(
            _same("with the question as without (±5)", "instructed", "plain", *skills),
            _above("with the question above without", "instructed", "plain", *skills, decides=False),
        ),
        control=Control(arm="plain", skills=("colour", "shape", "place")),
    )


def text() -> Ablation:
    """Sums among the text-only samples, or none."""
    stage = short(sft_stage(), 160)

    def lesson(**text_only: float) -> tuple[Lesson, ...]:
        return (Lesson(sources={"questions": 0.55, "sums of bars": 0.1, **text_only}, kinds=("chart",), stage=stage),)

    return Ablation(
        title="Diversity of the text-only share",
        claim="Mathematics and code among the text-only SFT data help visual mathematics (MathVista), and change "
        "little elsewhere.",
        source="xGen-MM v1, ablation of the diversity of text-only instruction data (its figures are not at hand)",
        done="SFT on charts: heights of bars, and a few questions for the sum of two bars. A third of the samples is "
        "text alone: strings to be reversed, or half of those and half sums of two digits.",
        start="pretrain",
        arms={
            "plain": Arm(means="text alone: strings", lessons=lesson(spelling=0.35)),
            "sums": Arm(means="text alone: strings and sums", lessons=lesson(spelling=0.175, sums=0.175)),
        },
        skills=("sum of bars", "chart"),
        contrasts=(
            _above("sums of two bars: with sums in the text above", "sums", "plain", "sum of bars"),
            _same("other questions on charts: the same (±5)", "sums", "plain", "chart"),
        ),
        control=Control(arm="sums", skills=("chart",)),
    )


def posttrain() -> Ablation:
    """SFT, DPO, safety, and both."""
    dpo = Lesson(sources={"preferences": 1.0}, stage=short(dpo_stage(), 40, 24))
    safety = Lesson(
        sources={"cards": 2 / 7, "questions": 5 / 7},
        kinds=("scene", "word", "crowd"),
        stage=short(safety_stage(), 80, 16),
    )
    helpful = ("colour", "shape", "place", "word")
    return Ablation(
        title="DPO and safety SFT",
        claim="DPO makes answers more truthful (POPE, HallusionBench) and safety SFT cuts the attack success rate, "
        "while helpfulness keeps or rises a little.",
        source="xGen-MM v1, table of post-training (VLGuard's attack success rate from about 56 % to about 5 %)",
        done="Behind the demo's SFT: DPO on pairs about presence, safety SFT on private cards, look-alikes and SFT "
        "questions, and both in this order; adapters on the language model. A question of the attack is right if it is "
        "refused; truthfulness is asked as presence.",
        start="sft",
        arms={
            "sft": Arm(means="as it comes from SFT"),
            "dpo": Arm(means="with DPO", lessons=(dpo,)),
            "safety": Arm(means="with safety SFT", lessons=(safety,)),
            "both": Arm(means="with DPO, then safety SFT", lessons=(dpo, safety)),
        },
        skills=("presence", "attack", "look-alike", *helpful),
        contrasts=(
            _above("presence: DPO above SFT", "dpo", "sft", "presence"),
            _above("attacks refused: safety above SFT", "safety", "sft", "attack"),
            _above("attacks refused: both above DPO", "both", "dpo", "attack"),
            _same("helpfulness: both as SFT (±5)", "both", "sft", *helpful),
            _above("look-alikes answered: both above SFT", "both", "sft", "look-alike", decides=False),
            _same("helpfulness: DPO as SFT (±5)", "dpo", "sft", *helpful, decides=False),
        ),
        control=Control(arm="sft", skills=helpful),
    )


ABLATIONS: dict[str, Callable[[], Ablation]] = {
    "tiling": tiling,
    "tokens": tokens,
    "instruction": instruction,
    "backbone": backbone,
    "interleaved": interleaved,
    "scale": scale,
    "mixture": mixture,
    "text": text,
    "posttrain": posttrain,
}
