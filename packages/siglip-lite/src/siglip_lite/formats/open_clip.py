"""Folders of open_clip (a pair: open_clip_config.json) and of timm (a vision tower: config.json with an architecture).

Both hold the vision tower as timm's VisionTransformer names it, open_clip under `visual.trunk.`; open_clip's text tower
is its own TextTransformer. Sizes of the vision tower follow from timm's name of the architecture.

All weights that were published so were trained with the tanh approximation of GELU and are computed with it here. The
first classes of both libraries for them (`vit_base_patch16_siglip_224`, text towers without `act_kwargs`) compute the
exact GELU instead, so their outputs differ a little from those here and in transformers.

Source: names as of open_clip 3.3.0 (model.py, transformer.py) and timm 1.0 (vision_transformer.py, attention_pool.py).
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec
from torch import Tensor

from weight_files import Piece, Recipe, WeightsError

from ..config import SiglipTextConfig, SiglipVisionConfig
from .folder import TEXT, VISION, PublishedFolder, read_json, require

OPEN_CLIP_CONFIG = "open_clip_config.json"
TIMM_CONFIG = "config.json"
_WEIGHTS = "open_clip_model.safetensors"


@dataclass(frozen=True)
class TrunkSize:
    """What one word of a timm name stands for."""

    width: int
    num_layers: int
    num_heads: int
    mlp_width: int


TRUNK_SIZES = {
    "base": TrunkSize(768, 12, 12, 3072),
    "large": TrunkSize(1024, 24, 16, 4096),
    "so400m": TrunkSize(1152, 27, 16, 4304),
    "giantopt": TrunkSize(1536, 40, 16, 6144),
}
_TRUNK_NAME = re.compile(r"vit_([a-z0-9]+)_patch(\d+)_siglip(_gap)?_(\d+)(?:\..*)?")

# Of a layer: ours, then theirs. Matrices with a bias each.
_TIMM_BLOCK = {
    "layer_norm1": "norm1",
    "self_attn.out_proj": "attn.proj",
    "layer_norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_TIMM_POOL = {
    "attention.out_proj": "proj",
    "layernorm": "norm",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_TEXT_BLOCK = {
    "layer_norm1": "ln_1",
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}

# Fields of open_clip's configs that change nothing about a loaded model.
_INERT = frozenset(
    {
        "eos_id",
        "hf_model_pretrained",
        "hf_tokenizer_name",
        "init_logit_bias",
        "init_logit_scale",
        "nonscalar_logit_scale",
        "output_tokens",
        "pad_id",
        "timm_model_pretrained",
        "tokenizer_kwargs",
        "tokenizer_mode",
    }
)


class _VisionFields(msgspec.Struct):
    timm_model_name: str | None = None
    image_size: int | None = None
    timm_pool: str = "avg"
    timm_proj: str | None = "linear"


class _TextFields(msgspec.Struct):
    context_length: int = 77
    vocab_size: int = 49408
    width: int = 512
    heads: int = 8
    layers: int = 12
    mlp_ratio: float = 4.0
    norm_kwargs: dict[str, float] | None = None
    act_kwargs: dict[str, object] | None = None
    no_causal_mask: bool = False
    proj_bias: bool = False
    proj_type: str = "linear"
    pool_type: str = "argmax"


class _ModelFields(msgspec.Struct):
    embed_dim: int
    vision_cfg: _VisionFields
    text_cfg: _TextFields
    custom_text: bool = False


class _Preprocessing(msgspec.Struct, frozen=True):
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)


class _OpenClipConfig(msgspec.Struct):
    model_cfg: _ModelFields
    preprocess_cfg: _Preprocessing = _Preprocessing()


class _RawModel(msgspec.Struct):
    model_cfg: dict[str, object]


class _TimmConfig(msgspec.Struct):
    architecture: str
    model_args: dict[str, object] = {}
    pretrained_cfg: _Preprocessing = _Preprocessing()


def read_open_clip(folder: Path) -> PublishedFolder:
    """Read a folder that open_clip writes for the hub.

    Raises:
        WeightsError: another kind of model than SigLIP, or a variant that is not implemented.
    """
    path = folder / OPEN_CLIP_CONFIG
    config = read_json(path, _OpenClipConfig)
    model = config.model_cfg
    _require_nothing_else(path, read_json(path, _RawModel).model_cfg)
    vision = _trunk_config(str(path), "vision_cfg.timm_model_name", model.vision_cfg.timm_model_name)
    text = model.text_cfg
    half = (0.5, 0.5, 0.5)
    require(
        str(path),
        {
            "custom_text": (model.custom_text, True),
            "embed_dim": (model.embed_dim, vision.width),
            "vision_cfg.image_size": (model.vision_cfg.image_size or vision.image_px, vision.image_px),
            "vision_cfg.timm_pool": (model.vision_cfg.timm_pool, "map"),
            "vision_cfg.timm_proj": (model.vision_cfg.timm_proj or "none", "none"),
            "text_cfg.no_causal_mask": (text.no_causal_mask, True),
            "text_cfg.pool_type": (text.pool_type, "last"),
            "text_cfg.proj_type": (text.proj_type, "linear"),
            "text_cfg.proj_bias": (text.proj_bias, True),
            "text_cfg.act_kwargs": (text.act_kwargs or {"approximate": "tanh"}, {"approximate": "tanh"}),
            "text_cfg.norm_kwargs": (sorted(text.norm_kwargs or ()), ["eps"]),
            "preprocess_cfg.mean": (config.preprocess_cfg.mean, half),
            "preprocess_cfg.std": (config.preprocess_cfg.std, half),
        },
    )
    assert text.norm_kwargs is not None
    text_cfg = SiglipTextConfig(
        vocab_size=text.vocab_size,
        max_tokens=text.context_length,
        width=text.width,
        num_layers=text.layers,
        num_heads=text.heads,
        mlp_width=int(text.width * text.mlp_ratio),
        dim_out=model.embed_dim,
        layer_norm_eps=text.norm_kwargs["eps"],
    )
    weights = folder / _WEIGHTS
    return PublishedFolder(
        weights if weights.is_file() else folder, vision, text_cfg, partial(_pair_recipes, vision, text_cfg)
    )


def read_timm(folder: Path) -> PublishedFolder:
    """Read a folder that timm writes for the hub: a vision tower alone.

    Raises:
        WeightsError: another architecture than SigLIP's, or a variant that is not implemented.
    """
    path = folder / TIMM_CONFIG
    config = read_json(path, _TimmConfig)
    vision = _trunk_config(str(path), "architecture", config.architecture)
    half = (0.5, 0.5, 0.5)
    require(
        str(path),
        {
            "model_args": (config.model_args, {}),
            "pretrained_cfg.mean": (config.pretrained_cfg.mean, half),
            "pretrained_cfg.std": (config.pretrained_cfg.std, half),
        },
    )
    return PublishedFolder(folder, vision, None, lambda _: _trunk_recipes(vision, ""))


def _trunk_config(where: str, field: str, name: str | None) -> SiglipVisionConfig:
    match = _TRUNK_NAME.fullmatch(name or "")
    if match is None or match[1] not in TRUNK_SIZES:
        raise WeightsError(
            f"{where}: {field}: expected vit_SIZE_patchN_siglip_PX with a size of {', '.join(TRUNK_SIZES)}, "
            f"got {name}; no other vision tower is implemented"
        )
    size = TRUNK_SIZES[match[1]]
    return SiglipVisionConfig(
        image_px=int(match[4]),
        patch_px=int(match[2]),
        width=size.width,
        num_layers=size.num_layers,
        num_heads=size.num_heads,
        mlp_width=size.mlp_width,
        # "gap": without the head, for use with the mean of the features or with all of them.
        use_head=match[3] is None,
    )


def _require_nothing_else(path: Path, model: dict[str, object]) -> None:
    """Raise WeightsError for fields that are switched on and neither read nor inert: they change the architecture."""
    faults: dict[str, tuple[object, object]] = {}
    for prefix, fields, read in (
        ("", model, _ModelFields),
        ("vision_cfg.", model["vision_cfg"], _VisionFields),
        ("text_cfg.", model["text_cfg"], _TextFields),
    ):
        assert isinstance(fields, dict)
        strange = fields.keys() - set(read.__struct_fields__) - _INERT
        faults |= {prefix + name: (fields[name] or None, None) for name in sorted(strange)}
    require(str(path), faults)


def _pair_recipes(vision: SiglipVisionConfig, text: SiglipTextConfig, _held: Collection[str]) -> Mapping[str, Recipe]:
    scalars: dict[str, Recipe] = {name: [Piece(name, transform=_as_vector)] for name in ("logit_scale", "logit_bias")}
    return {**_trunk_recipes(vision, "visual.trunk."), **_text_recipes(text), **scalars}


def _trunk_recipes(cfg: SiglipVisionConfig, source: str) -> dict[str, Recipe]:
    recipes = _both(f"{VISION}embeddings.patch_embedding", f"{source}patch_embed.proj")
    recipes[f"{VISION}embeddings.position_embedding.weight"] = [Piece(f"{source}pos_embed", transform=_without_batch)]
    for i in range(cfg.num_layers):
        ours, theirs = f"{VISION}encoder.layers.{i}.", f"{source}blocks.{i}."
        recipes |= _split_qkv(f"{ours}self_attn.", f"{theirs}attn.qkv.", cfg.width)
        for a, b in _TIMM_BLOCK.items():
            recipes |= _both(ours + a, theirs + b)
    recipes |= _both(f"{VISION}post_layernorm", f"{source}norm")
    if cfg.use_head:
        ours, theirs = f"{VISION}head.", f"{source}attn_pool."
        recipes[f"{ours}probe"] = [Piece(f"{theirs}latent")]
        for kind in ("weight", "bias"):
            recipes[f"{ours}attention.in_proj_{kind}"] = [Piece(f"{theirs}q.{kind}"), Piece(f"{theirs}kv.{kind}")]
        for a, b in _TIMM_POOL.items():
            recipes |= _both(ours + a, theirs + b)
    return recipes


def _text_recipes(cfg: SiglipTextConfig) -> dict[str, Recipe]:
    recipes: dict[str, Recipe] = {
        f"{TEXT}embeddings.token_embedding.weight": [Piece("text.token_embedding.weight")],
        f"{TEXT}embeddings.position_embedding.weight": [Piece("text.positional_embedding")],
    }
    for i in range(cfg.num_layers):
        ours, theirs = f"{TEXT}encoder.layers.{i}.", f"text.transformer.resblocks.{i}."
        recipes |= _split_qkv(f"{ours}self_attn.", f"{theirs}attn.in_proj_", cfg.width)
        for a, b in _TEXT_BLOCK.items():
            recipes |= _both(ours + a, theirs + b)
    recipes |= _both(f"{TEXT}final_layer_norm", "text.ln_final")
    return recipes | _both(f"{TEXT}head", "text.text_projection")


def _both(ours: str, theirs: str) -> dict[str, Recipe]:
    return {f"{ours}.{kind}": [Piece(f"{theirs}.{kind}")] for kind in ("weight", "bias")}


def _split_qkv(ours: str, theirs: str, width: int) -> dict[str, Recipe]:
    """Queries, keys and values lie on top of each other in one matrix."""
    return {
        f"{ours}{name}_proj.{kind}": [Piece(theirs + kind, rows=(part * width, (part + 1) * width))]
        for part, name in enumerate("qkv")
        for kind in ("weight", "bias")
    }


def _without_batch(table: Tensor) -> Tensor:
    return table.squeeze(0)


def _as_vector(scalar: Tensor) -> Tensor:
    return scalar.reshape(1)
