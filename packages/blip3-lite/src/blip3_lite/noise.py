"""NEFTune: noise on the embeddings of instruction tuning (Jain et al., arXiv:2310.05914, algorithm 1).

    x + ε · alpha / √(L d)        ε uniform in [-1, 1), L the document's tokens, d the width

In a packed sequence each document has its own L, image tokens counted: it gets the noise that it would get alone.
"""

import torch
from jaxtyping import Float, Int32
from torch import Tensor


def with_embedding_noise(
    embeds: Float[Tensor, "t d"],
    cu_seqlens: Int32[Tensor, " docs_plus_1"],
    alpha: float,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "t d"]:
    """Add the noise, drawn with `generator` on the embeddings' device (None: torch's global one, as dropout's).

    Image slots get it too: their tokens take the place of what is there.
    """
    lengths = cu_seqlens.diff().long()
    sizes = alpha / (lengths.to(embeds.dtype) * embeds.shape[1]).sqrt()
    noise = torch.rand(embeds.shape, generator=generator, dtype=embeds.dtype, device=embeds.device) * 2 - 1
    return embeds + noise * sizes.repeat_interleave(lengths)[:, None]
