"""Next-token choice and the decoding loop."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int, Int32
from torch import Tensor

from .cache import KVCache
from .config import SamplingConfig
from .model import Phi3

FINISHED = -1
"""Stands in `GenerationStep.tokens` for a row that ended in an earlier step."""

_COMPACT_SHARE = 0.25


class GenerationStep(NamedTuple):
    """What one decoding step gave."""

    tokens: Int[Tensor, " b"]
    """Next token of each row, the stop token included; FINISHED for rows that ended before this step."""
    is_finished: Bool[Tensor, " b"]
    """True = the row has ended, by a stop token in this step or earlier."""
    margins: Float[Tensor, " b"] | None = None
    """How far the likeliest token's logit is above the next one's, where it was asked for; inf for FINISHED rows."""


def choose_tokens(
    logits: Float[Tensor, "b v"], sampling: SamplingConfig, uniform: Float[Tensor, " b"] | None = None
) -> Int[Tensor, " b"]:
    """Return one token a row: the most likely one at temperature 0, else the one at quantile `uniform`.

    Tokens are laid out by falling probability; `uniform` in [0, 1) picks the one in whose stretch of the kept mass it
    falls. A row's token depends on its own logits and number only, not on the rows beside it. Nucleus sampling:
    arXiv:1904.09751 §3.1; the token that crosses `top_p` is kept, so at least one is.
    """
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    if uniform is None:
        raise ValueError("choose_tokens: expected uniform numbers at a temperature above 0, got None; draw one a row")
    probs, order = torch.softmax(logits.float() / sampling.temperature, dim=-1).sort(dim=-1, descending=True)
    mass = probs.cumsum(dim=-1)
    num_kept = ((mass - probs) < sampling.top_p).sum(dim=-1, keepdim=True)
    target = uniform.to(mass)[:, None] * mass.gather(-1, num_kept - 1)
    rank = torch.minimum(torch.searchsorted(mass, target, right=True), num_kept - 1)
    return order.gather(-1, rank)[:, 0]


def penalise_repeats(logits: Float[Tensor, "b v"], seen: Bool[Tensor, "b v"], penalty: float) -> Float[Tensor, "b v"]:
    """Divide the logits of the tokens that were `seen` (True) by `penalty`, or multiply where negative; in float32.

    CTRL, arXiv:1909.05858 §4.1, with the sign told apart as in transformers: dividing a negative logit would favour it.
    """
    logits = logits.float()
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


@torch.inference_mode()
def generate(
    model: Phi3,
    inputs: Float[Tensor, "t d"],
    cu_seqlens: Int32[Tensor, " bounds"],
    sampling: SamplingConfig,
    stop_ids: Sequence[int] | Sequence[Sequence[int]] = (),
    generator: torch.Generator | None = None,
    *,
    prompt_ids: Sequence[Sequence[int]] = (),
    ends: Callable[[Int[Tensor, " b"]], Bool[Tensor, " b"]] | None = None,
    cache: KVCache | None = None,
    with_margins: bool = False,
) -> Iterator[GenerationStep]:
    """Continue a ragged batch of prompts, one step at a time, until every row has ended.

    `inputs` are the prompts' embeddings, packed: one document a row. `stop_ids` are token ids that end a row, the same
    for all rows or one sequence a row. A row ends at its first stop token, which is still given out, or after
    `max_new_tokens`. Ended rows leave the batch, now and then, which changes no other row's tokens. `generator` (None:
    torch's global one) gives one number a row and step; greedy choice draws none. The caller may stop iterating at any
    time.

    A repetition penalty counts each row's `prompt_ids` and what was generated; ids that stand for no text (image slots)
    do not belong there, and without any only what was generated counts. `ends` is asked with each step's tokens, before
    they are given out, which rows are to end with them (True), such as `StopTexts`. `cache` holds what stands before
    each prompt; it is written on, and then holds all of a row but the last token given out. `with_margins` tells how
    close each step's second choice was: where that is within rounding, another batch may choose it.

    Raises:
        ValueError: prompts and bounds do not fit, a prompt is empty, the stop ids are neither shared nor one sequence a
            row, or the prompt ids are not one sequence a row of the model's ids.
    """
    batch, device = cu_seqlens.shape[0] - 1, inputs.device
    stops = _stop_table(stop_ids, batch).to(device)
    seen = None
    if sampling.repetition_penalty != 1:
        seen = _seen_table(prompt_ids, batch, model.cfg.vocab_size).to(device)
    cache = model.new_cache(batch) if cache is None else cache
    logits, likeliest = model.logits(model.prefill(inputs, cu_seqlens, cache)), None
    # rows[j] is the caller's row that stands at place j of the cache
    rows = torch.arange(batch, device=device)
    is_finished = torch.zeros(batch, dtype=torch.bool, device=device)
    num_live = batch
    can_end = stops.shape[1] > 0 or ends is not None
    for index in range(sampling.max_new_tokens):
        uniform = None
        if sampling.temperature > 0:
            draw_device = device if generator is None else generator.device
            # always one for each of the caller's rows, so that dropping rows does not shift the stream
            uniform = torch.rand(batch, generator=generator, device=draw_device).to(device)[rows]
        if seen is not None:
            likeliest = None
            logits = penalise_repeats(logits, seen[rows], sampling.repetition_penalty)
        is_chosen = sampling.temperature == 0 and likeliest is not None
        chosen = cast(Tensor, likeliest) if is_chosen else choose_tokens(logits, sampling, uniform)
        margins = None
        if with_margins:
            first, second = logits.float().topk(2, dim=-1).values.unbind(-1)
            margins = torch.full((batch,), torch.inf, device=device)
            margins[rows] = first - second
            margins[is_finished] = torch.inf
        if not can_end:
            tokens = chosen
        elif num_live == batch:
            tokens = chosen
            is_finished = (tokens[:, None] == stops).any(dim=1)
        else:
            tokens = torch.full((batch,), FINISHED, dtype=torch.int64, device=device)
            tokens[rows] = chosen
            tokens[is_finished] = FINISHED
            is_finished = is_finished | (tokens[:, None] == stops).any(dim=1) & (tokens != FINISHED)
        if ends is not None:
            is_finished = is_finished | ends(tokens).to(device)
        if seen is not None:
            seen[rows, chosen] = True
        yield GenerationStep(tokens, is_finished, margins)
        if can_end:
            num_live = batch - int(is_finished.sum())
        if num_live == 0 or index + 1 == sampling.max_new_tokens:
            return
        if num_live <= (1 - _COMPACT_SHARE) * len(rows):
            kept = (~is_finished[rows]).nonzero()[:, 0]
            cache.select(kept)
            rows, chosen = rows[kept], chosen[kept]
        logits, likeliest = model.next_logits(chosen, cache)


def collect(steps: Iterator[GenerationStep]) -> list[list[int]]:
    """Run a generation to its end; return each row's tokens, the stop token included."""
    columns = [step.tokens for step in steps]
    if not columns:
        return []
    return [[token for token in row if token != FINISHED] for row in torch.stack(columns, dim=1).tolist()]


def _seen_table(prompt_ids: Sequence[Sequence[int]], batch: int, vocab_size: int) -> Bool[Tensor, "b v"]:
    """Return which tokens each row's prompt holds."""
    ids = [list(row) for row in prompt_ids]
    if ids and (len(ids) != batch or any(not 0 <= token < vocab_size for row in ids for token in row)):
        raise ValueError(
            f"prompt_ids: expected ids below {vocab_size} for each of {batch} rows, got {len(ids)} rows of ids up to "
            f"{max((token for row in ids for token in row), default=None)}; leave out what is no token of the text"
        )
    seen = torch.zeros(batch, vocab_size, dtype=torch.bool)
    for row, tokens in enumerate(ids):
        seen[row, tokens] = True
    return seen


def _stop_table(stop_ids: Sequence[int] | Sequence[Sequence[int]], batch: int) -> Int[Tensor, "b s"]:
    """Return each row's stop ids, padded with FINISHED, which no token equals."""
    per_row = [[x] if isinstance(x, int) else list(x) for x in stop_ids]
    if all(isinstance(x, int) for x in stop_ids):
        per_row = [[x[0] for x in per_row]] * batch
    elif any(isinstance(x, int) for x in stop_ids) or len(per_row) != batch:
        raise ValueError(
            f"stop_ids: expected token ids, or one sequence of them for each of {batch} rows, "
            f"got {len(per_row)} entries; give one of the two forms"
        )
    size = max((len(x) for x in per_row), default=0)
    return torch.tensor([x + [FINISHED] * (size - len(x)) for x in per_row], dtype=torch.int64).view(batch, size)
