"""Answers to encoded prompts: streamed for one, batched for many. Chat and evaluation use the same path."""

from collections.abc import Callable, Iterator, Sequence

import torch

from phi3_lite import FINISHED, GenerationStep, SamplingConfig, StopTexts, cut_at_stop, generate, stream_text

from .batch import EncodedSample, PackedBatch, collate
from .memory import ChatMemory
from .model import Blip3
from .processor import Processor

Collate = Callable[[Sequence[EncodedSample]], PackedBatch]


@torch.inference_mode()
def generate_steps(
    model: Blip3,
    prompts: Sequence[EncodedSample],
    sampling: SamplingConfig,
    stop_ids: Sequence[int],
    *,
    generator: torch.Generator | None = None,
    collate_prompts: Collate = collate,
    ends: Callable[[torch.Tensor], torch.Tensor] | None = None,
    with_margins: bool = False,
) -> Iterator[GenerationStep]:
    """Yield the next token of every prompt, step by step, until all have stopped.

    All tiles of all prompts go through the vision tower in one call; `collate_prompts` may bring kept features instead.
    A repetition penalty counts the answers' own tokens: the prompts are embeddings, as in the original, where it sees
    none of them either (transformers 5.23). `ends` and `with_margins` as in `phi3_lite.generate`.
    """
    batch = collate_prompts(prompts).to(model.device)
    yield from generate(
        model.lang_model,
        model.embed(batch),
        batch.cu_seqlens,
        sampling,
        stop_ids,
        generator,
        ends=ends,
        with_margins=with_margins,
    )


def stream_answer(
    model: Blip3,
    processor: Processor,
    prompt: EncodedSample,
    sampling: SamplingConfig,
    *,
    stop_texts: Sequence[str] = (),
    generator: torch.Generator | None = None,
    memory: ChatMemory | None = None,
) -> Iterator[str]:
    """Yield the answer to one prompt as pieces of text, up to the first of `stop_texts` (`phi3_lite.stream_text`).

    memory: of this model; what it has read already is not read again, and it remembers prompt and answer.
    """
    if memory is None:
        steps = generate_steps(model, [prompt], sampling, processor.stop_ids, generator=generator)
    else:
        steps = memory.generate_steps(prompt, sampling, processor.stop_ids, generator=generator)
    yield from stream_text(steps, processor.tokenizer, processor.stop_ids, stop_texts)


def answer_batch(
    model: Blip3,
    processor: Processor,
    prompts: Sequence[EncodedSample],
    sampling: SamplingConfig,
    *,
    batch_size: int = 64,
    stop_texts: Sequence[str] = (),
    generator: torch.Generator | None = None,
    collate_prompts: Collate = collate,
    on_progress: Callable[[int], object] | None = None,
) -> list[str]:
    """Answers to many prompts, in their order, each up to the first of `stop_texts` in it.

    Prompts of similar length are decoded together; with greedy sampling the batch size changes no answer but for ties
    in rounding. `on_progress` is called with the number of prompts just answered.
    """
    order = sorted(range(len(prompts)), key=lambda index: prompts[index].length)
    answers = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        steps = generate_steps(
            model,
            [prompts[row] for row in rows],
            sampling,
            processor.stop_ids,
            generator=generator,
            collate_prompts=collate_prompts,
            ends=StopTexts(processor.tokenizer, stop_texts, len(rows)) if stop_texts else None,
        )
        columns = torch.stack([step.tokens for step in steps], dim=1)
        for row, tokens in zip(rows, columns.tolist(), strict=True):
            answer = processor.tokenizer.decode([token for token in tokens if token != FINISHED])
            # cut first: a stop text may begin or end with the white space that is stripped
            answers[row] = cut_at_stop(answer, stop_texts).strip()
        if on_progress is not None:
            on_progress(len(rows))
    return answers
