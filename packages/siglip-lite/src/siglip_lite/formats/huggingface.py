"""Hugging Face's folders: config.json, preprocessor_config.json, and safetensors under our own names.

The defaults of an absent field are those of transformers' config classes at 5.23.0, which are the sizes of
`google/siglip-base-patch16-224`; published config files leave them out.
"""

import json
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch

from weight_files import Piece, Recipe, SavedTensor, WeightsError, as_they_are, shard_writers, unique_tensors

from ..config import SiglipTextConfig, SiglipVisionConfig
from ..model import Siglip
from ..text import SiglipText
from ..tokenizer import SiglipTokenizer
from ..vision import SiglipVision
from .folder import TEXT, VISION, PublishedFolder, read_json, require

CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
_WEIGHTS = "model.safetensors"
_ACTIVATION = "gelu_pytorch_tanh"
_BICUBIC = 3


class _VisionFields(msgspec.Struct):
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


class _TextFields(msgspec.Struct):
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


class _PairFields(msgspec.Struct):
    text_config: _TextFields | None = None
    vision_config: _VisionFields | None = None


class _Head(msgspec.Struct):
    model_type: str | None = None
    quantization_config: dict[str, object] | None = None


class _Preprocessor(msgspec.Struct):
    image_mean: float | list[float] = 0.5
    image_std: float | list[float] = 0.5
    rescale_factor: float = 1 / 255
    do_rescale: bool = True
    do_normalize: bool = True


def read_huggingface(folder: Path) -> PublishedFolder:
    """Read a folder whose config.json says `siglip`, `siglip_vision_model` or `siglip_text_model`.

    Raises:
        WeightsError: another kind of model, or a variant of this one that is not implemented.
    """
    path = folder / CONFIG
    head = read_json(path, _Head)
    if head.model_type in ("siglip2", "siglip2_vision_model", "siglip2_text_model"):
        raise WeightsError(
            f"{path}: expected model_type siglip, got {head.model_type}, the variant of SigLIP 2 with images of any "
            "aspect ratio (NaFlex); it is not implemented: use a SigLIP 2 of fixed resolution, whose type is siglip"
        )
    require(str(path), {"quantization_config": (head.quantization_config, None)})
    vision, text = None, None
    if head.model_type == "siglip":
        pair = read_json(path, _PairFields)
        vision = _vision_config(str(path), pair.vision_config or _VisionFields(), "vision_config.")
        text = _text_config(str(path), pair.text_config or _TextFields(), "text_config.")
    elif head.model_type == "siglip_vision_model":
        vision = _vision_config(str(path), read_json(path, _VisionFields))
    elif head.model_type == "siglip_text_model":
        text = _text_config(str(path), read_json(path, _TextFields))
    else:
        raise WeightsError(
            f"{path}: expected model_type siglip, siglip_vision_model or siglip_text_model, got {head.model_type}; "
            "name the folder of a SigLIP model"
        )
    if vision is not None and (folder / PREPROCESSOR).is_file():
        _require_own_normalisation(folder / PREPROCESSOR)
    return PublishedFolder(_weights_in(folder), vision, text, partial(_recipes, vision, text))


def tensors_to_save(model: Siglip | SiglipVision | SiglipText, dtype: torch.dtype | None = None) -> list[SavedTensor]:
    """List what `save_huggingface` writes: names, shapes, dtypes; a model on the meta device will do."""
    prefix = "" if isinstance(model, Siglip) else VISION if isinstance(model, SiglipVision) else TEXT
    return as_they_are({prefix + name: tensor for name, tensor in unique_tensors(model).items()}, dtype)


def save_huggingface(
    folder: Path | str,
    model: Siglip | SiglipVision | SiglipText,
    *,
    tokenizer: SiglipTokenizer | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a folder that transformers and the loaders here read; the config comes last, so half a folder is none.

    Args:
        folder: new or empty.
        model: a pair or one tower; the stem must be the published one.
        tokenizer: written beside the model.
        dtype: of the files; None for the model's own.
        max_shard_bytes: of one file of tensors.

    Raises:
        ValueError: the folder holds something, the model has no form there, or the tokenizer is another model's.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"folder: expected a new or empty one, got {folder}; choose another or empty it")
    tensors = tensors_to_save(model, dtype)
    config = _config_to_save(model, tokenizer, tensors[0].dtype)
    if tokenizer is not None:
        _require_fitting(tokenizer, model)
    files: dict[str, Callable[[Path], object]] = dict(shard_writers(tensors, max_shard_bytes=max_shard_bytes))
    if not isinstance(model, SiglipText):
        vision = model.vision_model.cfg if isinstance(model, Siglip) else model.cfg
        files[PREPROCESSOR] = partial(_write_json, _preprocessor_to_save(vision))
    files[CONFIG] = partial(_write_json, config)
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        tokenizer.save(folder)
    for name, write in files.items():
        write(folder / name)


def _vision_config(where: str, fields: _VisionFields, prefix: str = "") -> SiglipVisionConfig:
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


def _text_config(where: str, fields: _TextFields, prefix: str = "") -> SiglipTextConfig:
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


def _side(size: int | list[int]) -> int | None:
    """Return the side of a square that is given by one number or two; None where it is no square."""
    sides = {size} if isinstance(size, int) else set(size)
    return sides.pop() if len(sides) == 1 else None


def _require_own_normalisation(path: Path) -> None:
    """Raise WeightsError where the images of a checkpoint are not scaled as `normalise` scales them."""
    said = read_json(path, _Preprocessor)
    for name, value, expected in (
        ("image_mean", said.image_mean, 0.5),
        ("image_std", said.image_std, 0.5),
        ("rescale_factor", said.rescale_factor, 1 / 255),
        ("do_rescale", said.do_rescale, True),
        ("do_normalize", said.do_normalize, True),
    ):
        values = value if isinstance(value, list) else [value]
        if any(abs(v - expected) > 1e-6 for v in values):
            raise WeightsError(
                f"{path}: {name}: expected {expected}, got {value}; `normalise` does not give such images: "
                "scale them yourself, and load from a copy of the folder without this file"
            )


def _weights_in(folder: Path) -> Path:
    names = (f"{_WEIGHTS}.index.json", _WEIGHTS)
    return next((folder / name for name in names if (folder / name).is_file()), folder)


def _recipes(
    vision: SiglipVisionConfig | None, text: SiglipTextConfig | None, held: Collection[str]
) -> Mapping[str, Recipe]:
    """Our names are the published ones; transformers 5 leaves a lone tower's prefix away."""
    with torch.device("meta"):
        towers = (
            (VISION, None if vision is None else SiglipVision(vision)),
            (TEXT, None if text is None else SiglipText(text)),
        )
    recipes: dict[str, Recipe] = {}
    for prefix, tower in towers:
        if tower is not None:
            written = prefix if any(name.startswith(prefix) for name in held) or None not in (vision, text) else ""
            recipes |= {prefix + name: [Piece(written + name)] for name in unique_tensors(tower)}
    if vision is not None and text is not None:
        recipes |= {name: [Piece(name)] for name in ("logit_scale", "logit_bias")}
    return recipes


def _config_to_save(
    model: Siglip | SiglipVision | SiglipText, tokenizer: SiglipTokenizer | None, dtype: torch.dtype
) -> dict[str, Any]:
    # The older of two names for the dtype, which both old and new releases of transformers read.
    stored = {"torch_dtype": str(dtype).removeprefix("torch.")}
    if isinstance(model, SiglipVision):
        return {"architectures": ["SiglipVisionModel"], **_vision_to_save(model.cfg), **stored}
    if isinstance(model, SiglipText):
        return {"architectures": ["SiglipTextModel"], **_text_to_save(model.cfg, tokenizer), **stored}
    return {
        "architectures": ["SiglipModel"],
        "model_type": "siglip",
        "initializer_factor": 1.0,
        "text_config": _text_to_save(model.text_model.cfg, tokenizer),
        "vision_config": _vision_to_save(model.vision_model.cfg),
        **stored,
    }


def _vision_to_save(cfg: SiglipVisionConfig) -> dict[str, Any]:
    if cfg.stem != "patch":
        raise ValueError(f"SiglipVisionConfig.stem: expected patch, got {cfg.stem}; no other has a published form")
    fields = _VisionFields(
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


def _text_to_save(cfg: SiglipTextConfig, tokenizer: SiglipTokenizer | None) -> dict[str, Any]:
    fields = _TextFields(
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


def _preprocessor_to_save(cfg: SiglipVisionConfig) -> dict[str, Any]:
    return {
        "image_processor_type": "SiglipImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": cfg.image_px, "width": cfg.image_px},
        "resample": _BICUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


def _require_fitting(tokenizer: SiglipTokenizer, model: Siglip | SiglipVision | SiglipText) -> None:
    if isinstance(model, SiglipVision):
        raise ValueError("tokenizer: expected none with a vision tower, got one; it reads no text")
    cfg = model.cfg if isinstance(model, SiglipText) else model.text_model.cfg
    if tokenizer.vocab_size > cfg.vocab_size or tokenizer.max_tokens != cfg.max_tokens:
        raise ValueError(
            f"tokenizer: expected at most {cfg.vocab_size} pieces and texts of {cfg.max_tokens} tokens, got "
            f"{tokenizer.vocab_size} and {tokenizer.max_tokens}; give the model's own"
        )


def _write_json(content: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
