"""A new model from published parts: a vision tower, a language model, and a fresh connector between them."""

import math
from pathlib import Path

import torch
from msgspec.structs import replace

from anyres_tiler.config import TilingConfig
from perceiver_resampler import PerceiverResampler, ResamplerConfig
from phi3_lite import HFTokenizer, LoadedLM
from siglip_lite import SiglipVision, load_siglip_vision
from weight_files import WeightsError

from .checkpoint import LoadedModel, load_model
from .config import Blip3Config, CheckpointConfig
from .folder import MANIFEST
from .model import undrawn_model
from .processor import Processor

_WORDS_MEASURED = 4096


def load_tower(path: Path, *, dtype: torch.dtype = torch.float32) -> SiglipVision:
    """Load a vision tower: that of a published SigLIP folder, or of a checkpoint of ours.

    Raises:
        ValueError: there is none (`WeightsError`, `CheckpointError`).
    """
    if (path / MANIFEST).exists():
        return load_model(path, dtype=dtype).model.vision_encoder
    return load_siglip_vision(path, dtype=dtype)


def join_parts(
    tower: SiglipVision,
    lm: LoadedLM,
    connector: ResamplerConfig,
    tiling: TilingConfig,
    *,
    generator: torch.Generator | None = None,
) -> LoadedModel:
    """Put a fresh connector between a vision tower and a language model; both are taken as they are, not copied.

    connector, tiling: as given, but for the widths and the tile's side, which the two parts ask for. generator: draws
    the connector's weights (None: torch's global one). Its tokens begin as large as the language model's words.

    Raises:
        WeightsError: the language model has no tokenizer that a tokenizer.json holds, or no chat format that is known.
    """
    if not isinstance(lm.tokenizer, HFTokenizer) or lm.chat is None:
        raise WeightsError(
            f"language model: expected a tokenizer.json and a known chat format, got {type(lm.tokenizer).__name__} and "
            f"{'none' if lm.chat is None else lm.chat.kind}; put tokenizer.json and tokenizer_config.json beside it"
        )
    weight = lm.model.model.norm.weight
    cfg = Blip3Config(
        vision=tower.cfg,
        connector=replace(connector, dim=tower.cfg.width, dim_out=lm.model.cfg.width),
        lm=lm.model.cfg,
        tiling=replace(tiling, tile_px=tower.cfg.image_px),
        chat=lm.chat.kind,
    )
    model = undrawn_model(cfg)
    fresh = PerceiverResampler(cfg.connector)
    fresh.init_weights(generator)
    with torch.no_grad():
        # Its projection gives 1/√3 a value: a transformer adds too little to what is far larger than its own words.
        words = lm.model.embed(torch.arange(min(cfg.lm.vocab_size, _WORDS_MEASURED), device=weight.device))
        words_rms = words.float().square().mean().sqrt().item()
        fresh.projection.weight *= words_rms * math.sqrt(3)
    model.vision_encoder = tower.to(weight)
    model.vision_tokenizer = fresh.to(weight)
    model.lang_model = lm.model
    model.requires_grad_(False).eval()
    return LoadedModel(model, Processor(cfg, lm.tokenizer), CheckpointConfig(model=cfg))
