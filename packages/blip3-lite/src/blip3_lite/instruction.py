"""What is asked about each picture, read off a packed batch: for a connector that reads the question too.

Of a conversation in training it is the text before the first answer; later questions come too late for it. Of a prompt
it is all text, of a document nothing.
"""

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from .batch import IGNORE_INDEX, PackedBatch


def instructions(batch: PackedBatch, num_groups: int) -> tuple[Int64[Tensor, "g t"], Bool[Tensor, "g t"]]:
    """Token ids of the instruction of each group of features (see `grouping`), and which of them are text.

    num_groups: of the batch, all with the same number of image tokens. True = text; the rest is filling.

    Raises:
        ValueError: the image tokens of the batch do not divide into as many groups.
    """
    num_slots = batch.image_index.shape[0]
    if num_groups < 1 or num_slots % num_groups:
        raise ValueError(
            f"groups: expected a divisor of the {num_slots} image slots, got {num_groups}; count them anew"
        )
    starts = batch.cu_seqlens[:-1].long()
    lengths = batch.cu_seqlens.diff().long()
    documents = torch.repeat_interleave(torch.arange(len(lengths), device=starts.device), lengths)
    is_learnt = (batch.targets != IGNORE_INDEX).long()
    learnt_before = is_learnt.cumsum(0) - is_learnt
    is_instruction = learnt_before == learnt_before[starts][documents]
    is_instruction[batch.image_index] = False
    place = is_instruction.long().cumsum(0) - is_instruction.long()
    place = place - place[starts][documents]
    counts = torch.zeros_like(starts).index_add_(0, documents, is_instruction.long())
    ids = batch.ids.new_zeros(len(starts), int(counts.max()))
    ids[documents[is_instruction], place[is_instruction]] = batch.ids[is_instruction]
    is_text = torch.arange(ids.shape[1], device=ids.device) < counts[:, None]
    of_group = documents[batch.image_index[:: num_slots // num_groups]]
    return ids[of_group], is_text[of_group]
