"""A new model from published parts: a SigLIP folder, a language model's folder or GGUF file, and a fresh connector."""

from pathlib import Path

import torch
from msgspec.structs import replace

from anyres_tiler.config import TilingConfig
from perceiver_resampler import PerceiverResampler, ResamplerConfig
from phi3_lite import HFTokenizer
from phi3_lite.formats.loading import load_lm
from siglip_lite import load_siglip_vision
from weight_files import WeightsError

from .checkpoint import LoadedModel, load_model
from .config import Blip3Config, CheckpointConfig
from .folder import MANIFEST
from .model import undrawn_model
from .processor import Processor


def assemble(
    vision: Path,
    language: Path,
    connector: ResamplerConfig,
    tiling: TilingConfig,
    *,
    dtype: torch.dtype = torch.float32,
    generator: torch.Generator | None = None,
) -> LoadedModel:
    """Join a vision tower, a language model and a fresh connector between them.

    vision: a published SigLIP folder, or a checkpoint of ours, whose tower is taken. language: a Hugging Face folder of
    Phi-3 or Llama, or a GGUF file. connector, tiling: as given, but for the widths and the tile side that the two parts
    ask for. generator: draws the connector (None: torch's global one).

    Raises:
        WeightsError: a part that cannot be loaded, or a language model without a tokenizer or a known chat format.
    """
    lm = load_lm(language, dtype=dtype)
    if not isinstance(lm.tokenizer, HFTokenizer) or lm.chat is None:
        raise WeightsError(
            f"language model {language}: expected a tokenizer that a tokenizer.json can hold and a chat format that is "
            f"known, got {type(lm.tokenizer).__name__} and {'none' if lm.chat is None else lm.chat.kind}; "
            "put tokenizer.json and tokenizer_config.json beside the weights"
        )
    tower = load_model(vision).model.vision_encoder if (vision / MANIFEST).exists() else load_siglip_vision(vision)
    tower = tower.to(dtype)
    cfg = Blip3Config(
        vision=tower.cfg,
        connector=replace(connector, dim=tower.cfg.width, dim_out=lm.model.cfg.width),
        lm=lm.model.cfg,
        tiling=replace(tiling, tile_px=tower.cfg.image_px),
        chat=lm.chat.kind,
    )
    model = undrawn_model(cfg, dtype)
    model.vision_encoder, model.lang_model = tower, lm.model
    fresh = PerceiverResampler(cfg.connector)
    fresh.init_weights(generator)
    model.vision_tokenizer = fresh.to(dtype)
    model.requires_grad_(False).eval()
    return LoadedModel(model, Processor(cfg, lm.tokenizer), CheckpointConfig(model=cfg))
