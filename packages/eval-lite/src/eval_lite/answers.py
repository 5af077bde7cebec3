"""Answers of a model to encoded prompts: said, or chosen by their likelihood; and what documents cost it.

An answer depends on its prompt alone, whatever stands beside it in the batch, but for rounding: where the two likeliest
tokens are closer than `NEAR_TIE`, another batch may go on with the other one. Such places are noted.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import msgspec
import torch
from torch import Tensor

from blip3_lite import Blip3, Collate, EncodedSample, Processor, SamplingConfig, collate, generate_steps
from fused_kernels import linear_cross_entropy
from phi3_lite import FINISHED, StopTexts, cut_at_stop

NEAR_TIE = 1e-4
"""Logits closer than this may change places with the shape of a batch (float32)."""


class NearTie(msgspec.Struct, frozen=True, kw_only=True):
    """The first place of an answer where another token was as likely, but for rounding."""

    step: int
    margin: float
    """How far apart the two logits were."""


class Answer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a model gave for one item."""

    text: str = ""
    """What it said, up to the stop texts; or what it found likeliest."""
    tokens: tuple[int, ...] = ()
    """As it came, the stop token included."""
    near_tie: NearTie | None = None
    nats: tuple[float, ...] = ()
    """Of each candidate, or of a document: the negative log-likelihood, summed over its tokens."""
    num_tokens: tuple[int, ...] = ()
    """Tokens of each candidate, or of a document, that were predicted."""
    skip_reason: str = ""
    """Why it could not be asked."""


@torch.inference_mode()
def say(
    model: Blip3,
    processor: Processor,
    prompts: Sequence[EncodedSample],
    *,
    max_new_tokens: int,
    stop_texts: Sequence[str] = (),
    batch_size: int,
    collate_prompts: Collate = collate,
) -> list[Answer]:
    """Answer greedily, in the prompts' order; prompts of similar length are decoded together."""
    answers: list[Answer | None] = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda index: prompts[index].length)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        steps = list(
            generate_steps(
                model,
                [prompts[row] for row in rows],
                SamplingConfig(max_new_tokens=max_new_tokens),
                processor.stop_ids,
                collate_prompts=collate_prompts,
                ends=StopTexts(processor.tokenizer, stop_texts, len(rows)) if stop_texts else None,
                with_margins=True,
            )
        )
        tokens = torch.stack([step.tokens for step in steps], dim=1).tolist()
        margins = torch.stack([_margins(step.margins) for step in steps], dim=1).tolist()
        for row, of_row, margins_of_row in zip(rows, tokens, margins, strict=True):
            answers[row] = _said(processor, of_row, margins_of_row, stop_texts)
    return [answer for answer in answers if answer is not None]


def _margins(margins: Tensor | None) -> Tensor:
    assert margins is not None
    return margins


def _said(processor: Processor, tokens: list[int], margins: list[float], stop_texts: Sequence[str]) -> Answer:
    kept = [token for token in tokens if token != FINISHED]
    near = next((step for step, margin in enumerate(margins) if margin < NEAR_TIE), None)
    return Answer(
        # cut first: a stop text may begin or end with the white space that is stripped
        text=cut_at_stop(processor.tokenizer.decode(kept), stop_texts).strip(),
        tokens=tuple(kept),
        near_tie=None if near is None else NearTie(step=near, margin=margins[near]),
    )


def sequence_nats(
    model: Blip3,
    samples: Sequence[EncodedSample],
    *,
    batch_size: int,
    collate_prompts: Collate = collate,
) -> list[float]:
    """Negative log-likelihood in nats of each sample's targets, summed; `batch_size` samples at a time."""
    nats: list[float] = []
    for start in range(0, len(samples), batch_size):
        part = samples[start : start + batch_size]
        with torch.inference_mode():
            batch = collate_prompts(part).to(model.device)
            lm = model.lang_model
            losses = linear_cross_entropy(
                model(batch), lm.head_weight, batch.targets, lm.head_bias, reduction="none"
            ).double()
        bounds = batch.cu_seqlens.tolist()
        nats += [losses[first:last].sum().item() for first, last in pairwise(bounds)]
    return nats


def behind_prompt(prompt: EncodedSample, whole: EncodedSample, *, ends_with_mark: bool) -> EncodedSample:
    """The whole sequence with the loss on what stands behind the prompt alone.

    A tokenizer may join the prompt's last letters with what follows: such tokens count as behind it. ends_with_mark:
    whether the mark that ends the answer is to be predicted too.
    """
    shared = min(prompt.length, whole.length)
    differs = (prompt.ids[:shared] != whole.ids[:shared]).nonzero()
    # Nothing is in front of the first token to predict it from.
    first = max(1, int(differs[0]) if len(differs) else shared)
    last = whole.length if ends_with_mark else whole.length - 1
    targets = torch.full_like(whole.targets, -100)
    # The target of a position is the token behind it.
    targets[first - 1 : last - 1] = whole.ids[first:last]
    return replace(whole, targets=targets)


def likeliest(nats: Sequence[float], num_tokens: Sequence[int] | None = None) -> int:
    """Which candidate is likeliest; with their numbers of tokens, the one whose tokens are so on average."""
    costs = nats if num_tokens is None else [cost / max(1, n) for cost, n in zip(nats, num_tokens, strict=True)]
    return min(range(len(costs)), key=lambda index: (math.inf if math.isnan(costs[index]) else costs[index], index))
