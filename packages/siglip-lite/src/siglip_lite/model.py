"""The contrastive pair: a vision and a text tower with a learned temperature and bias between them.

Parameter names equal those of the published checkpoints, whose state dict loads key for key.
Source: SigLIP, arXiv:2303.15343.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from .config import SiglipConfig
from .loss import pair_logits
from .text import SiglipText
from .vision import Pixels, SiglipVision


class SiglipOutput(NamedTuple):
    """What a pair of batches gives."""

    image_embeds: Tensor
    """float[b, d], of unit length."""
    text_embeds: Tensor
    """float[c, d], of unit length."""
    logits_per_image: Tensor
    """float32[b, c]: log-odds that image (row) and text (column) belong together."""


class Siglip(nn.Module):
    """Both towers, for contrastive training and for scoring texts against images."""

    def __init__(self, cfg: SiglipConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.text_model = SiglipText(cfg.text)
        self.vision_model = SiglipVision(cfg.vision)
        self.logit_scale = nn.Parameter(torch.empty(1))
        self.logit_bias = nn.Parameter(torch.empty(1))
        self._init_scores()

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew, distributed as for SigLIP's own training."""
        self.text_model.init_weights(generator)
        self.vision_model.init_weights(generator)
        self._init_scores()

    @torch.no_grad()
    def _init_scores(self) -> None:
        # The paper's start (§3.2): nearly all pairs are negative, so the bias begins at their log-odds' scale.
        self.logit_scale.fill_(math.log(10.0))
        self.logit_bias.fill_(-10.0)

    def embed_images(self, pixels: Pixels, *, interpolate: bool = False) -> Float[Tensor, "p d"]:
        """Return one vector of unit length an image; arguments as of `SiglipVision.forward`."""
        return F.normalize(self.vision_model.pool(self.vision_model(pixels, interpolate=interpolate)), dim=-1)

    def embed_texts(self, ids: Int[Tensor, "c t"]) -> Float[Tensor, "c d"]:
        """Return one vector of unit length a text; see `siglip_lite.text` on padding."""
        return F.normalize(self.text_model.pool(self.text_model(ids)), dim=-1)

    def forward(self, pixels: Pixels, ids: Int[Tensor, "c t"]) -> SiglipOutput:
        """Embed images and texts and score all pairs; for the loss, give the embeddings to `sigmoid_loss`."""
        image_embeds, text_embeds = self.embed_images(pixels), self.embed_texts(ids)
        logits = pair_logits(image_embeds, text_embeds, self.logit_scale, self.logit_bias)
        return SiglipOutput(image_embeds, text_embeds, logits)
