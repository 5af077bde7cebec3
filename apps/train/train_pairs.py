"""Preference pairs made before a stage: the wrong answers that the model itself gives, each against the right one."""

from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import msgspec
import torch

from blip3_lite import Blip3, EncodedSample, FeatureCache, Processor, SamplingConfig, collate
from eval_lite import EvalItem, predict
from interleave_data import PreferenceSample, Sample, SkipCounter, SkipSample, Source, TextPart
from interleave_data.sources import AnySample
from train_stream import StageData
from trainer_lite import Progress

_QUESTIONS_AT_A_TIME = 512
_ANSWER = SamplingConfig(max_new_tokens=64, temperature=1.0)
"""Drawn, not the likeliest: pairs then come from both sides of the turning point, each wrong answer as often as the
model holds it for right. A model taught where its likeliest answers are wrong turns round what is like them, right
answers too."""


class OwnError(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One line of the file: which sample was asked, and what the model said to it."""

    source: str
    index: int
    said: str


@dataclass(frozen=True)
class OwnErrors:
    """A source of pairs: those of its samples that the model answered wrongly, its answer being the rejected one."""

    source: Source
    errors: tuple[tuple[int, str], ...]

    @property
    def name(self) -> str:
        """That of the source."""
        return self.source.name

    @property
    def fingerprint(self) -> str:
        """Digest of the source and of the answers."""
        return sha256(f"{self.source.fingerprint}/{self.errors}".encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.errors)

    def __getitem__(self, index: int) -> PreferenceSample:
        number, said = self.errors[index]
        sample = self.source[number]
        question = _question(sample)
        assert question is not None
        prompt, right = question
        return PreferenceSample(sample.id, sample.source, prompt.turns, right, said)


def _question(sample: AnySample) -> tuple[Sample, str] | None:
    """The prompt and the right answer of a pair, or of a conversation's last question; None of anything else."""
    if isinstance(sample, PreferenceSample):
        return Sample(sample.id, sample.source, sample.turns), sample.chosen
    if len(sample.turns) < 2 or sample.turns[-1].role != "assistant":
        return None
    right = "".join(part.text for part in sample.turns[-1].parts if isinstance(part, TextPart))
    return replace(sample, turns=sample.turns[:-1]), right


def is_same_answer(item: EvalItem, said: str) -> bool:
    """Whether the words are the right ones; case and white space do not matter."""
    return said.casefold().split() == item.answer.casefold().split()


def own_errors(
    data: StageData,
    num_questions: int,
    model: Blip3,
    processor: Processor,
    features: FeatureCache | None,
    path: Path,
    progress: Progress,
    *,
    seed: int,
) -> StageData:
    """The data with the model's wrong answers in the place of the rejected ones, to the first questions of each source.

    It is asked once, and answers as it is drawn by `seed` (temperature 1).

    The answers are kept in `path`, and read from there if it is there: a run that goes on has the same pairs.

    Raises:
        ValueError: nothing was answered wrongly, so that there is no pair.
        TooManySkips: more of a source cannot be asked than the data's limits allow.
    """
    if path.exists():
        errors = [msgspec.json.decode(line, type=OwnError) for line in path.read_bytes().splitlines()]
    else:
        draws = torch.Generator(model.device).manual_seed(seed)
        # Of what cannot be asked no pair is made, so the stream would never come to it.
        skips = SkipCounter(data.skip_limits)
        errors = [
            error
            for source in data.sources
            for error in _ask(source, num_questions, model, processor, features, draws, skips, progress)
        ]
        if skips.by_reason():
            left_out = ", ".join(f"{reason} {count}" for reason, count in skips.by_reason().items())
            progress.line(f"could not be asked, of all sources: {left_out}")
        partial = path.with_name(path.name + ".partial")
        partial.write_bytes(b"".join(msgspec.json.encode(error) + b"\n" for error in errors))
        partial.replace(path)
    sources = [
        OwnErrors(source, tuple((error.index, error.said) for error in errors if error.source == source.name))
        for source in data.sources
    ]
    kept = [place for place, source in enumerate(sources) if len(source)]
    if not kept:
        raise ValueError(
            f"own_errors: expected a wrong answer to {num_questions} questions a source, got none; ask more questions"
        )
    return replace(
        data,
        sources=[sources[place] for place in kept],
        ratios=None if data.ratios is None else [data.ratios[place] for place in kept],
        epochs=None if data.epochs is None else [data.epochs[place] for place in kept],
    )


def _ask(
    source: Source,
    num_questions: int,
    model: Blip3,
    processor: Processor,
    features: FeatureCache | None,
    draws: torch.Generator,
    skips: SkipCounter,
    progress: Progress,
) -> list[OwnError]:
    errors: list[OwnError] = []
    num_asked, count = 0, min(num_questions, len(source))
    for start in range(0, count, _QUESTIONS_AT_A_TIME):
        asked: list[tuple[int, EvalItem]] = []
        prompts: list[EncodedSample] = []
        for index in range(start, min(start + _QUESTIONS_AT_A_TIME, count)):
            try:
                question = _question(source[index])
                if question is None:
                    continue
                prompts.append(processor.encode_prompt(question[0]))
            except SkipSample as skip:
                skips.skip(source.name, SkipSample(skip.reason, skip.detail, skip.where or f"{source.name}:{index}"))
                continue
            skips.keep(source.name)
            asked.append((index, EvalItem(group=source.name, prompt=question[0], answer=question[1])))
        predictions = predict(
            model,
            processor,
            [item for _, item in asked],
            is_same_answer,
            prompts=prompts,
            sampling=_ANSWER,
            generator=draws,
            collate_prompts=collate if features is None else features.collate,
        )
        errors += [
            OwnError(source=source.name, index=index, said=prediction.prediction)
            for (index, _), prediction in zip(asked, predictions, strict=True)
            # Nothing said is nothing to be unlearnt: an empty answer is no sample.
            if not prediction.is_correct and prediction.prediction
        ]
        num_asked += len(asked)
        progress.line(f"{source.name}: {num_asked} questions asked, {len(errors)} answered wrongly")
    return errors
