"""Hugging Face's folders: config.json, preprocessor_config.json, and safetensors under our own names."""

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
from .huggingface_config import (
    PairFields,
    TextFields,
    VisionFields,
    text_config,
    text_fields,
    vision_config,
    vision_fields,
)

CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
_WEIGHTS = "model.safetensors"
_BICUBIC = 3


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
        pair = read_json(path, PairFields)
        vision = vision_config(str(path), pair.vision_config or VisionFields(), "vision_config.")
        text = text_config(str(path), pair.text_config or TextFields(), "text_config.")
    elif head.model_type == "siglip_vision_model":
        vision = vision_config(str(path), read_json(path, VisionFields))
    elif head.model_type == "siglip_text_model":
        text = text_config(str(path), read_json(path, TextFields))
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
        return {"architectures": ["SiglipVisionModel"], **vision_fields(model.cfg), **stored}
    if isinstance(model, SiglipText):
        return {"architectures": ["SiglipTextModel"], **text_fields(model.cfg, tokenizer), **stored}
    return {
        "architectures": ["SiglipModel"],
        "model_type": "siglip",
        "initializer_factor": 1.0,
        "text_config": text_fields(model.text_model.cfg, tokenizer),
        "vision_config": vision_fields(model.vision_model.cfg),
        **stored,
    }


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
