"""The fields of Hugging Face's config.json for SigLIP, to our configs and back.

The defaults of an absent field are those of transformers' config classes at 5.23.0, which are the sizes of
`google/siglip-base-patch16-224`; published config files leave them out.
"""

from typing import Any

import msgspec

from ..config import SiglipTextConfig, SiglipVisionConfig
from ..tokenizer import SiglipTokenizer
from .folder import require

_ACTIVATION = "gelu_pytorch_tanh"


class VisionFields(msgspec.Struct):
    """Of `siglip_vision_model`."""

    model_type: str = "siglip_vision_model"
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int | list[int] = 224
    patch_size: int | list[int] = 16
    hidden_act: str = _ACTIVATION
    layer_norm_eps: float = 1e-6
    attention_dropout: float = 0.0
    vision_use_head: bool = True


class TextFields(msgspec.Struct):
    """Of `siglip_text_model`."""

    model_type: str = "siglip_text_model"
    vocab_size: int = 32000
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 64
    hidden_act: str = _ACTIVATION
    layer_norm_eps: float = 1e-6
    attention_dropout: float = 0.0
    projection_size: int | None = None


class PairFields(msgspec.Struct):
    """Of `siglip`."""

    text_config: TextFields | None = None
    vision_config: VisionFields | None = None


def vision_config(where: str, fields: VisionFields, prefix: str = "") -> SiglipVisionConfig:
    """Return our config; fields are named with `prefix` where they are refused, by WeightsError."""
    image_px, patch_px = _side(fields.image_size), _side(fields.patch_size)
    require(
        where,
        {
            f"{prefix}model_type": (fields.model_type, "siglip_vision_model"),
            f"{prefix}hidden_act": (fields.hidden_act, _ACTIVATION),
            f"{prefix}num_channels": (fields.num_channels, 3),
            f"{prefix}attention_dropout": (fields.attention_dropout, 0.0),
            # None stands for sides that differ; then this is never equal.
            f"{prefix}image_size": (fields.image_size if image_px is None else "square", "square"),
            f"{prefix}patch_size": (fields.patch_size if patch_px is None else "square", "square"),
        },
    )
    assert image_px is not None
    assert patch_px is not None
    return SiglipVisionConfig(
        image_px=image_px,
        patch_px=patch_px,
        width=fields.hidden_size,
        num_layers=fields.num_hidden_layers,
        num_heads=fields.num_attention_heads,
        mlp_width=fields.intermediate_size,
        layer_norm_eps=fields.layer_norm_eps,
        use_head=fields.vision_use_head,
    )


def text_config(where: str, fields: TextFields, prefix: str = "") -> SiglipTextConfig:
    """Return our config; fields are named with `prefix` where they are refused, by WeightsError."""
    require(
        where,
        {
            f"{prefix}model_type": (fields.model_type, "siglip_text_model"),
            f"{prefix}hidden_act": (fields.hidden_act, _ACTIVATION),
            f"{prefix}attention_dropout": (fields.attention_dropout, 0.0),
        },
    )
    return SiglipTextConfig(
        vocab_size=fields.vocab_size,
        max_tokens=fields.max_position_embeddings,
        width=fields.hidden_size,
        num_layers=fields.num_hidden_layers,
        num_heads=fields.num_attention_heads,
        mlp_width=fields.intermediate_size,
        dim_out=fields.hidden_size if fields.projection_size is None else fields.projection_size,
        layer_norm_eps=fields.layer_norm_eps,
    )


def vision_fields(cfg: SiglipVisionConfig) -> dict[str, Any]:
    """Return what describes the tower to transformers; ValueError for a stem that has no published form."""
    if cfg.stem != "patch":
        raise ValueError(f"SiglipVisionConfig.stem: expected patch, got {cfg.stem}; no other has a published form")
    fields = VisionFields(
        hidden_size=cfg.width,
        intermediate_size=cfg.mlp_width,
        num_hidden_layers=cfg.num_layers,
        num_attention_heads=cfg.num_heads,
        image_size=cfg.image_px,
        patch_size=cfg.patch_px,
        layer_norm_eps=cfg.layer_norm_eps,
        vision_use_head=cfg.use_head,
    )
    return msgspec.structs.asdict(fields)


def text_fields(cfg: SiglipTextConfig, tokenizer: SiglipTokenizer | None) -> dict[str, Any]:
    """Return what describes the tower to transformers, with the tokenizer's ids."""
    fields = TextFields(
        vocab_size=cfg.vocab_size,
        hidden_size=cfg.width,
        intermediate_size=cfg.mlp_width,
        num_hidden_layers=cfg.num_layers,
        num_attention_heads=cfg.num_heads,
        max_position_embeddings=cfg.max_tokens,
        layer_norm_eps=cfg.layer_norm_eps,
        projection_size=cfg.dim_out,
    )
    # Nothing computes with these ids; transformers' defaults lie beyond the vocabulary, of which it warns.
    pad, end = (1, 1) if tokenizer is None else (tokenizer.pad_id, tokenizer.end_id)
    return {**msgspec.structs.asdict(fields), "pad_token_id": pad, "bos_token_id": end, "eos_token_id": end}


def _side(size: int | list[int]) -> int | None:
    """Return the side of a square that is given by one number or two; None where it is no square."""
    sides = {size} if isinstance(size, int) else set(size)
    return sides.pop() if len(sides) == 1 else None
