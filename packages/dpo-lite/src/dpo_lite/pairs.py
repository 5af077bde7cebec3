"""Preference pairs as one packed sequence of documents: chosen 0, rejected 0, chosen 1, rejected 1, …

Both answers of a pair stand side by side, each a whole document with the prompt in front. How a document is encoded and
packed is the caller's business, as only the caller knows what else is in it (images, for one).
"""

from collections.abc import Sequence
from typing import TypeVar

import torch
from jaxtyping import Float, Int32, Int64, Shaped
from torch import Tensor

T = TypeVar("T")


def side_by_side(pairs: Sequence[tuple[T, T]]) -> list[T]:
    """Lay (chosen, rejected) pairs of anything out in the order of the documents."""
    return [document for pair in pairs for document in pair]


def split_pairs(values: Shaped[Tensor, " docs"]) -> tuple[Shaped[Tensor, " b"], Shaped[Tensor, " b"]]:
    """Split one value a document into those of the chosen and those of the rejected answers: undo `side_by_side`.

    Raises:
        ValueError: if the number of values is odd.
    """
    if values.shape[0] % 2:
        raise ValueError(f"values: expected an even number, two for each pair, got {values.shape[0]}; give whole pairs")
    return values[0::2], values[1::2]


def sequence_log_probs(
    token_log_probs: Float[Tensor, " t"], cu_seqlens: Int32[Tensor, " docs_plus_1"]
) -> Float[Tensor, " docs"]:
    """Sum the tokens' log-probabilities over each document; differentiable. An empty document has 0, the log of 1.

    Raises:
        ValueError: if the boundaries do not end at t.
    """
    lengths = cu_seqlens.diff().long()
    num_documents = lengths.shape[0]
    if int(cu_seqlens[-1]) != token_log_probs.shape[0]:
        raise ValueError(
            f"token_log_probs: expected {int(cu_seqlens[-1])}, the last boundary, got {token_log_probs.shape[0]}; "
            "give the boundaries of this pack"
        )
    document = torch.arange(num_documents, device=lengths.device).repeat_interleave(lengths)
    return token_log_probs.new_zeros(num_documents).index_add(0, document, token_log_probs)


def answer_tokens(
    targets: Int64[Tensor, " t"], cu_seqlens: Int32[Tensor, " docs_plus_1"], *, ignore_index: int = -100
) -> Int64[Tensor, " docs"]:
    """Count each document's targets: the tokens that `sequence_log_probs` sums over."""
    return sequence_log_probs((targets != ignore_index).double(), cu_seqlens).long()
