"""Answers in encoded samples: to be cut off, exchanged for others, or generated for a noised picture."""

from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256

import torch
from torch import Tensor

from blip3_lite import Blip3, EncodedSample, PackedBatch, Processor, SamplingConfig
from blip3_lite.batch import IGNORE_INDEX
from blip3_lite.generation import generate_steps
from phi3_lite import FINISHED


def answer_start(targets: Tensor) -> int:
    """The position whose target is the first token of the last answer."""
    is_target = targets != IGNORE_INDEX
    # An answer begins behind a position without a target; those before it belong to earlier turns.
    begins = is_target & ~is_target.roll(1)
    begins[0] = is_target[0]
    return int(begins.nonzero()[-1])


def with_exchanged_answers(pack: PackedBatch) -> PackedBatch | None:
    """The pack of pairs with each prompt before the next pair's answers (chosen to chosen); None for a single pair.

    Pictures stay with their prompts; documents have other lengths then.
    """
    bounds = pack.cu_seqlens.tolist()
    documents = [(bounds[k], bounds[k + 1]) for k in range(len(bounds) - 1)]
    if len(documents) < 4:
        return None
    starts = [answer_start(pack.targets[low:high]) for low, high in documents]
    ids, targets, positions, ends, shifts = [], [], [], [0], []
    for k, (low, _) in enumerate(documents):
        other = (k + 2) % len(documents)
        (other_low, other_high), start = documents[other], starts[k]
        answer = slice(other_low + starts[other], other_high)
        ids += [pack.ids[low : low + start + 1], pack.ids[answer][1:]]
        targets += [pack.targets.new_full((start,), IGNORE_INDEX), pack.targets[answer]]
        length = start + other_high - other_low - starts[other]
        positions.append(torch.arange(length, device=pack.ids.device))
        shifts.append(ends[-1] - low)
        ends.append(ends[-1] + length)
    # 0-based document of each image token; pictures stand before the answer.
    of_document = torch.bucketize(pack.image_index, pack.cu_seqlens[1:].long(), right=True)
    return replace(
        pack,
        ids=torch.cat(ids),
        targets=torch.cat(targets),
        positions=torch.cat(positions),
        cu_seqlens=torch.tensor(ends, dtype=torch.int32, device=pack.cu_seqlens.device),
        image_index=pack.image_index + torch.tensor(shifts, device=pack.image_index.device)[of_document],
    )


def noised(sample: EncodedSample, share: float, generator: torch.Generator) -> EncodedSample:
    """The sample with noise on its pictures: tile · √(1 - share) + noise · √share, in units of -1 to 1.

    A step of diffusion's forward process with ᾱ = 1 - share (arXiv:2006.11239, eq. 4); pixels are cut at their range.
    """
    if not 0 < share <= 1:
        raise ValueError(f"noise: expected above 0 and at most 1, got {share}; 0.5 leaves outlines")
    tiles = sample.tiles.float() / 127.5 - 1
    noise = torch.randn(tiles.shape, generator=generator)
    mixed = tiles * (1 - share) ** 0.5 + noise * share**0.5
    pixels = ((mixed + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    # The old names would call for the features of the pictures without noise.
    names = tuple(sha256(tile.numpy().tobytes()).hexdigest() for tile in pixels)
    return replace(sample, tiles=pixels, tile_keys=names)


@torch.no_grad()
def answers_to(
    model: Blip3, prompts: Sequence[EncodedSample], stop_ids: Sequence[int], max_new_tokens: int
) -> list[list[int]]:
    """The model's own greedy answers, as tokens without the one that ends them."""
    was_training = model.training
    model.eval()
    try:
        sampling = SamplingConfig(max_new_tokens=max_new_tokens)
        steps = torch.stack([step.tokens for step in generate_steps(model, prompts, sampling, stop_ids)], dim=1)
    finally:
        model.train(was_training)
    return [[token for token in row if token != FINISHED and token not in stop_ids] for row in steps.tolist()]


def with_answer(sample: EncodedSample, answer: Sequence[int]) -> EncodedSample:
    """The sample with other tokens for its last answer, ended as that is."""
    start = answer_start(sample.targets)
    own = sample.targets[start:]
    end = own[own != IGNORE_INDEX][-1:]
    tokens = torch.tensor(list(answer), dtype=torch.int64)
    prompt = sample.ids[: start + 1]
    return replace(
        sample,
        ids=torch.cat([prompt, tokens]),
        targets=torch.cat([sample.targets[:start], tokens, end]),
    )


def prompt_of(sample: EncodedSample) -> EncodedSample:
    """The sample up to where its last answer begins."""
    start = answer_start(sample.targets)
    return replace(sample, ids=sample.ids[: start + 1], targets=torch.full((start + 1,), IGNORE_INDEX))


def noised_rivals(
    model: Blip3, processor: Processor, chosen: Sequence[EncodedSample], share: float, generator: torch.Generator
) -> dict[int, EncodedSample]:
    """By place, the samples with the model's own answers to their noised pictures, where these are others.

    Samples without a picture have none. The answer stands behind the picture without noise: there it is wrong.
    """
    pictured = {place: sample for place, sample in enumerate(chosen) if sample.tiles.shape[0]}
    if not pictured:
        return {}
    prompts = [noised(prompt_of(sample), share, generator) for sample in pictured.values()]
    longest = max(sample.length - answer_start(sample.targets) for sample in pictured.values())
    answers = answers_to(model, prompts, processor.stop_ids, max_new_tokens=longest)
    rivals = {
        place: with_answer(sample, answer) for (place, sample), answer in zip(pictured.items(), answers, strict=True)
    }
    return {place: rival for place, rival in rivals.items() if not _has_same_answer(rival, chosen[place])}


def _has_same_answer(one: EncodedSample, other: EncodedSample) -> bool:
    return one.targets[one.targets != IGNORE_INDEX].equal(other.targets[other.targets != IGNORE_INDEX])
