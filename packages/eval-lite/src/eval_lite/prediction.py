"""Questions in, predictions out: the same processor and the same decoding as training and chat."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import torch

from blip3_lite import Blip3, Collate, EncodedSample, Processor, SamplingConfig, answer_batch, collate
from interleave_data import Sample, SkipSample

Scorer = Callable[["EvalItem", str], bool]
"""(item, prediction) → whether it is right."""


@dataclass(frozen=True, kw_only=True)
class EvalItem:
    """One question."""

    group: str
    """What it is counted under: a skill, a benchmark, a split."""
    prompt: Sample
    """A conversation that ends with the user's turn."""
    answer: str
    """The known answer."""
    references: tuple[str, ...] = ()
    """All accepted answers, or captions by several people; empty where `answer` is the only one."""
    choices: tuple[str, ...] = ()
    """What is listed under the question with letters; the answer is then a letter."""
    candidates: tuple[str, ...] = ()
    """Answers that can be compared by their likelihood where there are no `choices`."""
    facts: Mapping[str, str] = field(default_factory=dict[str, str])
    """What the scoring rule needs besides, such as the figure that a question belongs to."""

    @property
    def id(self) -> str:
        """The sample's id."""
        return self.prompt.id


class Prediction(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the model said to one question; one line of a predictions file."""

    id: str
    group: str
    answer: str
    prediction: str
    is_correct: bool
    skip_reason: str = ""
    """Why the question could not be asked (a picture that cannot be read); it is counted as wrong then, unanswered."""


def encode_prompts(processor: Processor, items: Sequence[EvalItem]) -> list[EncodedSample]:
    """Encode every item's prompt once, so that several evaluations can share it.

    Raises:
        SkipSample: an item that cannot be encoded, with its id. `predict` without `prompts` goes on past such items.
    """
    prompts: list[EncodedSample] = []
    for item in items:
        prompt = _encode_or_skip(processor, item)
        if isinstance(prompt, SkipSample):
            raise prompt
        prompts.append(prompt)
    return prompts


def _encode_or_skip(processor: Processor, item: EvalItem) -> EncodedSample | SkipSample:
    try:
        return processor.encode_prompt(item.prompt)
    except SkipSample as skip:
        return SkipSample(skip.reason, skip.detail, skip.where or item.id)


def predict(
    model: Blip3,
    processor: Processor,
    items: Sequence[EvalItem],
    scorer: Scorer,
    *,
    prompts: Sequence[EncodedSample | SkipSample] | None = None,
    sampling: SamplingConfig | None = None,
    batch_size: int = 64,
    collate_prompts: Collate = collate,
    generator: torch.Generator | None = None,
    on_progress: Callable[[int], object] | None = None,
) -> list[Prediction]:
    """Answer and score all items, in their order; greedy unless `sampling` says otherwise, and then by `generator`.

    `prompts`: what `encode_prompts` gave for the same items; a SkipSample stands for one that could not be encoded. An
    item without a prompt counts as wrong and carries the reason, so that no score rises because a picture is broken.
    `on_progress` gets the number of items just done.

    Raises:
        ValueError: another number of prompts than of items.
    """
    if prompts is None:
        prompts = [_encode_or_skip(processor, item) for item in items]
    if len(prompts) != len(items):
        raise ValueError(f"prompts: expected {len(items)}, one per item, got {len(prompts)}; encode these items")
    askable = [prompt for prompt in prompts if not isinstance(prompt, SkipSample)]
    if on_progress is not None and len(askable) < len(items):
        on_progress(len(items) - len(askable))
    was_training = model.training
    model.eval()
    try:
        answers = iter(
            answer_batch(
                model,
                processor,
                askable,
                sampling or SamplingConfig(max_new_tokens=32),
                batch_size=batch_size,
                generator=generator,
                collate_prompts=collate_prompts,
                on_progress=on_progress,
            )
        )
    finally:
        model.train(was_training)
    return [
        _unanswered(item, prompt) if isinstance(prompt, SkipSample) else _scored(item, next(answers), scorer)
        for item, prompt in zip(items, prompts, strict=True)
    ]


def _scored(item: EvalItem, said: str, scorer: Scorer) -> Prediction:
    return Prediction(id=item.id, group=item.group, answer=item.answer, prediction=said, is_correct=scorer(item, said))


def _unanswered(item: EvalItem, skip: SkipSample) -> Prediction:
    return Prediction(
        id=item.id,
        group=item.group,
        answer=item.answer,
        prediction="",
        is_correct=False,
        skip_reason=skip.reason.value,
    )


def write_predictions(path: Path, predictions: Sequence[Prediction]) -> None:
    """Write one JSON object a line, in the order of the items; the file is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    encoder = msgspec.json.Encoder()
    work = path.with_name(f".{path.name}.writing")
    work.write_bytes(b"".join(encoder.encode(prediction) + b"\n" for prediction in predictions))
    os.replace(work, path)
