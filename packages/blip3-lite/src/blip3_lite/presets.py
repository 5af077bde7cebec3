"""The published models' configs; importable without torch."""

from typing import Literal

import msgspec

from anyres_tiler.config import TilingConfig
from perceiver_resampler.config import xgen_mm as xgen_mm_resampler
from phi3_lite.config import SamplingConfig, mini_4k
from siglip_lite.presets import so400m_patch14_384

from .config import XGEN_MM_SYSTEM_PROMPT, Blip3Config

XgenKind = Literal["base", "singleimg", "interleave", "dpo"]
EXTRA_TOKENS = ("<image>", "<image placeholder>", "<|endofchunk|>")
PAD_TOKEN = "<pad>"
NUM_USED_ROWS = 32_012
"""Rows of the released tables that ids reach: Phi-3's tokens and `<pad>`; the extra tokens come behind."""


def xgen_mm_config(kind: XgenKind) -> Blip3Config:
    """The full-size model of a release (4.4 B parameters)."""
    lm = msgspec.structs.replace(mini_4k(), vocab_size=NUM_USED_ROWS + len(EXTRA_TOKENS), has_head_bias=True)
    vision, connector = so400m_patch14_384().vision, xgen_mm_resampler()
    if kind == "base":
        return Blip3Config(
            vision=vision,
            connector=connector,
            lm=lm,
            tiling=TilingConfig(kind="base"),
            masks_padding_in_vision=False,
            chat="plain",
            has_leading_space=False,
        )
    return Blip3Config(
        vision=vision,
        connector=connector,
        lm=lm,
        tiling=TilingConfig(),
        masks_padding_in_vision=False,
        tile_grouping="bands",
        has_leading_space=False,
        system_prompt=XGEN_MM_SYSTEM_PROMPT,
        image_separator="\n",
    )


def xgen_mm_sampling(kind: XgenKind) -> SamplingConfig:
    """How the authors sample a release: their notebook for the instruct models, their zero-shot demo for the base."""
    if kind == "base":
        return SamplingConfig(max_new_tokens=256, repetition_penalty=2.0)
    return SamplingConfig(max_new_tokens=1024)
