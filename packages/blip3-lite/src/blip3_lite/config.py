"""What a checkpoint's config.json says: the parts, how they are joined, and how images are cut."""

from pathlib import PurePath
from typing import Literal

import msgspec

from anyres_tiler.config import TilingConfig
from lora_lite.config import LoraConfig
from perceiver_resampler.config import InstructedResamplerConfig, ResamplerConfig
from phi3_lite.config import Phi3Config, SamplingConfig
from siglip_lite.config import SiglipVisionConfig

FORMAT_VERSION = 1

DeviceChoice = Literal["auto", "cpu", "cuda"]
"""Where to compute; `auto` is the GPU where there is one, else the CPU (see `blip3_lite.device`)."""

XGEN_MM_SYSTEM_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


class Blip3Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A joined model. Connector and tiling are tagged choices (`kind`), so that others can stand beside them."""

    vision: SiglipVisionConfig
    """The vision tower."""
    connector: ResamplerConfig | InstructedResamplerConfig
    """What turns patch features into image tokens; `instructed_perceiver` reads the question too."""
    lm: Phi3Config
    """The language model."""
    tiling: TilingConfig
    """How an image becomes tiles."""
    masks_padding_in_vision: bool = True
    """Whether patches of padding are hidden in the vision tower too, not only from the connector. The released models
    do not hide them there."""
    tile_grouping: Literal["tiles", "bands"] = "tiles"
    """Which features the connector reads together: those of a tile, or of a band of a row of tiles, as the released
    any-resolution models do (see `blip3_lite.grouping`)."""
    chat: Literal["phi3", "chatml", "plain"] = "phi3"
    """The format of conversations (see `phi3_lite.ChatTemplate`)."""
    has_leading_space: bool = True
    """Whether text behind a marker or image gets the tokenizer's leading space; not with the released models."""
    system_prompt: str | None = None
    """Put before a conversation that has no system turn; None for none."""
    image_separator: str = ""
    """Text behind every image of a user's turn; the released models were taught with a newline there."""

    def __post_init__(self) -> None:
        """Check that neighbours fit."""
        joints = [
            ("connector input width", self.connector.dim, "vision width", self.vision.width),
            ("connector output width", self.connector.dim_out, "language model width", self.lm.width),
            *self._text_joint(),
            ("tile side in pixels", self.tiling.tile_px, "vision input side", self.vision.image_px),
        ]
        for name, got, of, expected in joints:
            if got != expected:
                raise ValueError(f"{name}: expected {expected} ({of}), got {got}; set both to the same value")
        if self.tile_grouping == "bands" and self.tiling.kind != "anyres":
            raise ValueError(
                f"tile_grouping: expected tiles with tiling {self.tiling.kind}, got bands; bands are of anyres tiles"
            )

    def _text_joint(self) -> list[tuple[str, int, str, int]]:
        if not isinstance(self.connector, InstructedResamplerConfig):
            return []
        return [("connector text width", self.connector.dim_text, "language model width", self.lm.width)]

    def with_base_views(self) -> "Blip3Config":
        """The same model, one view an image: without tiles there are no bands, which those of one tile equal."""
        tiling = msgspec.structs.replace(self.tiling, kind="base")
        return msgspec.structs.replace(self, tiling=tiling, tile_grouping="tiles")

    def num_image_tokens(self, num_tiles: int) -> int:
        """Tokens that an image of `num_tiles` tiles, thumbnail included, takes in the sequence."""
        return self.connector.num_latents * (1 if self.tiling.kind == "anyres_fixed" else num_tiles)


class CheckpointConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The content of config.json beside the weights."""

    model: Blip3Config
    """The model that the tensors belong to."""
    lora: LoraConfig | None = None
    """Adapters that are attached (not merged) in these tensors."""
    sampling: SamplingConfig | None = None
    """How its publisher means the model to be sampled; None for one that nobody has published. What ends an answer
    follows from `Blip3Config.chat`."""
    tokenizer_file: str = "tokenizer.json"
    """Name of the tokenizer's file in the checkpoint folder."""
    format_version: int = FORMAT_VERSION
    """Layout of the folder."""

    def __post_init__(self) -> None:
        """Refuse layouts that this code does not know, and files outside the folder."""
        if self.format_version != FORMAT_VERSION:
            raise ValueError(
                f"checkpoint format: expected {FORMAT_VERSION}, got {self.format_version}; "
                "read it with the release that wrote it"
            )
        if PurePath(self.tokenizer_file).name != self.tokenizer_file or self.tokenizer_file in ("", ".."):
            raise ValueError(
                f"tokenizer_file: expected a plain file name, got {self.tokenizer_file!r}; "
                "keep the tokenizer in the checkpoint folder"
            )
