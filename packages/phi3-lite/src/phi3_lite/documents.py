"""Documents end to end in one sequence: their lengths, and each token's place."""

from itertools import pairwise

import torch
from jaxtyping import Int, Int32
from torch import Tensor


def document_lengths(cu_seqlens: Int32[Tensor, " bounds"], num_tokens: int) -> list[int]:
    """Return each document's length, after checking that the bounds cover the `num_tokens` tokens in order.

    Raises:
        ValueError: the bounds do not begin at 0, do not end at num_tokens or decrease.
    """
    bounds: list[int] = cu_seqlens.tolist()
    lengths = [end - start for start, end in pairwise(bounds)]
    if not lengths or bounds[0] != 0 or bounds[-1] != num_tokens or min(lengths) < 0:
        raise ValueError(
            f"cu_seqlens: expected document bounds rising from 0 to the number of tokens {num_tokens}, "
            f"got {bounds[:8]}{'…' if len(bounds) > 8 else ''} ending at {bounds[-1] if bounds else None}; "
            "build it as the cumulative sum of the documents' lengths, with a 0 in front"
        )
    return lengths


def document_positions(cu_seqlens: Int32[Tensor, " bounds"], num_tokens: int) -> Int[Tensor, " t"]:
    """Return every token's position in its own document: counting restarts at each bound."""
    starts = torch.repeat_interleave(cu_seqlens[:-1].long(), cu_seqlens.diff().long(), output_size=num_tokens)
    return torch.arange(num_tokens, device=cu_seqlens.device) - starts


def document_extents(positions: Int[Tensor, " t"], cu_seqlens: Int32[Tensor, " bounds"]) -> Int[Tensor, " t"]:
    """Return for every token the length of its document: one more than the largest position in it."""
    counts = cu_seqlens.diff().long()
    documents = torch.repeat_interleave(
        torch.arange(len(counts), device=positions.device), counts, output_size=len(positions)
    )
    largest = positions.new_zeros(len(counts)).scatter_reduce(0, documents, positions, "amax")
    return largest[documents] + 1
