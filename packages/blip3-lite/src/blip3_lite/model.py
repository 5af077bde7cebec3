"""The joined model: tiles → vision tower → connector → image tokens among text embeddings → language model.

The parts carry the names of the published checkpoints (`vision_encoder`, `vision_tokenizer`, `lang_model`).
Source: xGen-MM (BLIP-3), arXiv:2408.08872 §3.
"""

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from fused_kernels import linear_cross_entropy
from perceiver_resampler import PerceiverResampler
from phi3_lite import Phi3
from siglip_lite import SiglipVision, normalise

from .batch import PackedBatch
from .config import Blip3Config
from .fusion import place_image_tokens


class Blip3(nn.Module):
    """A vision tower, a connector and a language model as one next-token predictor over text and images."""

    def __init__(self, cfg: Blip3Config) -> None:
        super().__init__()
        self.cfg = cfg
        self.vision_encoder = SiglipVision(cfg.vision)
        self.vision_tokenizer = PerceiverResampler(cfg.connector)
        self.lang_model = Phi3(cfg.lm)

    def image_tokens(
        self,
        tiles: UInt8[Tensor, "p 3 s s"] | None,
        valid: Bool[Tensor, "p n"],
        features: Float[Tensor, "p n dv"] | None = None,
    ) -> Float[Tensor, "m d"]:
        """Image tokens of all tiles, end to end: tile by tile, latent by latent.

        `features` (what `patch_features` gave) take the place of `tiles` where they were kept.
        """
        if features is None:
            if tiles is None:
                raise ValueError(
                    "image tokens: expected tiles or features, got neither; collate the batch with one of them"
                )
            features = self.patch_features(tiles, valid)
        return self.vision_tokenizer(features, valid).flatten(0, 1)

    def patch_features(self, tiles: UInt8[Tensor, "p 3 s s"], valid: Bool[Tensor, "p n"]) -> Float[Tensor, "p n dv"]:
        """Return what the vision tower says of each patch; a frozen tower builds no graph."""
        tower = self.vision_encoder
        mask = valid if self.cfg.masks_padding_in_vision and not valid.all() else None
        first, *_ = parameters = list(tower.parameters())
        is_trained = any(parameter.requires_grad for parameter in parameters)
        with torch.set_grad_enabled(is_trained and torch.is_grad_enabled()):
            return tower(normalise(tiles, first.dtype), valid=mask)

    def embed(self, batch: PackedBatch) -> Float[Tensor, "t d"]:
        """Text embeddings with the image tokens in their slots."""
        embeds = self.lang_model.embed(batch.ids)
        if batch.valid.shape[0] == 0:
            return embeds
        return place_image_tokens(
            embeds, self.image_tokens(batch.tiles, batch.valid, batch.features), batch.image_index
        )

    def forward(self, batch: PackedBatch) -> Float[Tensor, "t d"]:
        """Hidden states after the final norm; the head is applied only where it is needed."""
        return self.lang_model(self.embed(batch), batch.positions, batch.cu_seqlens)

    def loss_sum(self, batch: PackedBatch) -> Float[Tensor, ""]:
        """Cross-entropy in nats, summed over the target positions of the batch (0 where there is none)."""
        return linear_cross_entropy(
            self(batch), self.lang_model.head_weight, batch.targets, self.lang_model.head_bias, reduction="sum"
        )

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.lang_model.model.norm.weight.device
