"""Write image tokens into the text sequence, by position and by count.

The sequence is one flat row of embeddings. Each image token has an index that says which row it takes; the indices are
made together with the ids, by the processor, so nothing here searches for an id that a user might have typed.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from fused_kernels import replace_rows


def place_image_tokens(
    embeds: Float[Tensor, "t d"], image_tokens: Float[Tensor, "m d"], image_index: Int64[Tensor, " m_slots"]
) -> Float[Tensor, "t d"]:
    """Return `embeds` with row `image_index[j]` replaced by `image_tokens[j]`.

    A new tensor; gradients flow to the image tokens and to the rows that stay. Source: xGen-MM, arXiv:2408.08872 §3.

    Raises:
        ValueError: if the number of slots is not the number of image tokens, or a slot lies outside the sequence.
    """
    num_slots, num_tokens = image_index.shape[0], image_tokens.shape[0]
    if num_slots != num_tokens:
        raise ValueError(
            f"image slots: expected {num_tokens} (tokens from the connector), got {num_slots} slots in the text; "
            "the sequence was built for other tiles or another number of latents: encode it with this model's processor"
        )
    if num_slots == 0:
        return embeds
    lowest, highest = torch.aminmax(image_index)
    if lowest < 0 or highest >= embeds.shape[0]:
        raise ValueError(
            f"image slots: expected indices in [0, {embeds.shape[0]}), got [{int(lowest)}, {int(highest)}]; "
            "the batch was cut after its slots were counted"
        )
    return replace_rows(embeds, image_tokens.to(embeds.dtype), image_index)
