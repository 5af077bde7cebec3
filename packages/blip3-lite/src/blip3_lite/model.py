"""The joined model: tiles → vision tower → connector → image tokens among text embeddings → language model.

The parts carry the names of the published checkpoints (`vision_encoder`, `vision_tokenizer`, `lang_model`).
Source: xGen-MM (BLIP-3), arXiv:2408.08872 §3.
"""

from contextlib import nullcontext

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from fused_kernels import linear_cross_entropy
from perceiver_resampler import InstructedResamplerConfig, PerceiverResampler
from phi3_lite import Phi3
from siglip_lite import SiglipVision

from .batch import PackedBatch
from .config import Blip3Config
from .fusion import place_image_tokens
from .grouping import group_images
from .instruction import instructions
from .noise import with_embedding_noise


class Blip3(nn.Module):
    """A vision tower, a connector and a language model as one next-token predictor over text and images."""

    def __init__(self, cfg: Blip3Config, *, generator: torch.Generator | None = None) -> None:
        """Make the model with fresh weights, drawn with `generator` on its device (None: torch's global one)."""
        super().__init__()
        self.cfg = cfg
        self.always_sees = False
        """Run tower and connector on an empty tile, at no weight, where a batch has no picture. Processes that hold
        parts of one model need it: they must call the same modules for each batch."""
        self.neftune_alpha = 0.0
        """In training, how much noise is added to the text's embeddings (see `noise`); 0 for none."""
        # The parts' constructors draw from the global generator, but not for tensors on the meta device.
        with nullcontext() if generator is None else torch.device("meta"):
            self.vision_encoder = SiglipVision(cfg.vision)
            self.vision_tokenizer = PerceiverResampler(cfg.connector)
            self.lang_model = Phi3(cfg.lm)
        if generator is not None:
            self.to_empty(device=generator.device)
            self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew, each part by its own rule."""
        self.vision_encoder.init_weights(generator)
        self.vision_tokenizer.init_weights(generator)
        self.lang_model.reset_parameters(generator)

    def image_tokens(self, batch: PackedBatch) -> Float[Tensor, "m d"]:
        """Image tokens of all images, end to end: group by group (see `grouping`), latent by latent.

        Kept features (`batch.features`) take the place of the tiles.

        Raises:
            ValueError: the batch has neither tiles nor features.
        """
        features, valid = batch.features, batch.valid
        if features is None:
            if batch.tiles is None:
                raise ValueError(
                    "image tokens: expected tiles or features, got neither; collate the batch with one of them"
                )
            features = self.patch_features(batch.tiles, valid)
        if self.cfg.tiling.kind == "anyres_fixed":
            features, valid = group_images(features, valid, batch.tiles_per_image)
        elif batch.feature_order is not None:
            features = features.flatten(0, 1)[batch.feature_order].view_as(features)
            valid = valid.flatten()[batch.feature_order].view_as(valid)
        if not isinstance(self.cfg.connector, InstructedResamplerConfig):
            return self.vision_tokenizer(features, valid).flatten(0, 1)
        ids, is_text = instructions(batch, features.shape[0])
        return self.vision_tokenizer(features, valid, self.lang_model.embed(ids), is_text).flatten(0, 1)

    def patch_features(self, tiles: UInt8[Tensor, "p 3 s s"], valid: Bool[Tensor, "p n"]) -> Float[Tensor, "p n dv"]:
        """Return what the vision tower says of each patch; a frozen tower builds no graph."""
        tower = self.vision_encoder
        mask = valid if self.cfg.masks_padding_in_vision and not valid.all() else None
        is_trained = any(parameter.requires_grad for parameter in tower.parameters())
        with torch.set_grad_enabled(is_trained and torch.is_grad_enabled()):
            return tower(tiles, valid=mask)

    def embed(self, batch: PackedBatch) -> Float[Tensor, "t d"]:
        """Text embeddings with the image tokens in their slots."""
        embeds = self.lang_model.embed(batch.ids)
        if self.training and self.neftune_alpha:
            embeds = with_embedding_noise(embeds, batch.cu_seqlens, self.neftune_alpha)
        if batch.valid.shape[0] == 0:
            return embeds + 0.0 * self._idle_tokens().sum() if self.always_sees else embeds
        return place_image_tokens(embeds, self.image_tokens(batch), batch.image_index)

    def _idle_tokens(self) -> Float[Tensor, "m d"]:
        """Image tokens of an empty tile."""
        side, num_patches = self.cfg.tiling.tile_px, self.cfg.vision.grid_side**2
        tiles = torch.zeros(1, 3, side, side, dtype=torch.uint8, device=self.device)
        valid = torch.ones(1, num_patches, dtype=torch.bool, device=self.device)
        features = self.patch_features(tiles, valid)
        if not isinstance(self.cfg.connector, InstructedResamplerConfig):
            return self.vision_tokenizer(features, valid).flatten(0, 1)
        word = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        return self.vision_tokenizer(features, valid, self.lang_model.embed(word)).flatten(0, 1)

    def recompute_layers(self, is_wanted: bool = True) -> None:
        """Keep no activations of the layers of tower and language model in training (checkpointing), or keep them."""
        self.vision_encoder.encoder.recomputes = is_wanted
        self.lang_model.model.recomputes = is_wanted

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


def undrawn_model(cfg: Blip3Config, dtype: torch.dtype = torch.float32) -> Blip3:
    """A model without weights, on the meta device: to be measured, or filled after `to_empty`. Draws nothing."""
    with torch.device("meta"):
        return Blip3(cfg).to(dtype)
