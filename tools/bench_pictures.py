"""Suite `data`: a photograph's bytes to its tiles, beside LLaVA-NeXT's two image processors; one thread."""

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from anyres_tiler import TilingConfig, tile_image
from bench_data import image_processor
from bench_pairs import GateError, Pair
from blip3_lite.presets import xgen_mm_config
from interleave_data import ImageLimits, open_image

FOLDER: Path | None = None
"""Of photographs."""
_MOST_UNLIKE = {"torchvision": 1e-4, "pil": 2e-3}
"""Largest share of values beyond ±1/255. Pillow 13 resizes the rows of some shapes first."""
_SIZES = ((1280, 853), (853, 1280), (2048, 1024), (640, 480))


def photographs() -> list[bytes]:
    """Files of the folder that the gate lets through, or some that are made."""
    if FOLDER is None:
        return made()
    files = [path.read_bytes() for path in sorted(FOLDER.iterdir()) if path.suffix in (".jpg", ".jpeg", ".png")]
    if not files:
        raise SystemExit(f"--photos {FOLDER}: expected JPEG or PNG files, got none; name another folder")
    return files


def made() -> list[bytes]:
    """Smooth colours with edges, as JPEG."""
    rng = np.random.default_rng(0)
    files: list[bytes] = []
    for width, height in _SIZES:
        small = rng.integers(0, 256, (height // 32, width // 32, 3), dtype=np.uint8)
        out = io.BytesIO()
        Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(out, "JPEG", quality=90)
        files.append(out.getvalue())
    return files


def our_tiles(data: bytes, limits: ImageLimits, cfg: TilingConfig) -> Tensor:
    """Through the gate, upright, tiled."""
    return tile_image(open_image(data, limits), cfg).pixels


def their_tiles(data: bytes, processor: Any) -> Tensor:
    """Decoded to RGB by Pillow, tiled and normalised."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return processor([image], return_tensors="pt")["pixel_values"][0]


def same_tiles(files: Sequence[bytes], ours: Callable[[bytes], Tensor], theirs: Callable[[bytes], Tensor], most: float):
    """Compare all values.

    Raises:
        GateError: other tiles, or too many values that differ.
    """
    beyond = total = 0
    for data in files:
        own, other = ours(data), theirs(data)
        if own.shape != other.shape:
            raise GateError(f"tiles: expected {tuple(other.shape)}, got {tuple(own.shape)}")
        # from -1 … 1 back to 0 … 255
        beyond += int((((other + 1) * 127.5 - own).abs() > 1.01).sum())
        total += own.numel()
    if beyond > most * total:
        raise GateError(f"tiles: expected at most {most:.0e} of the values beyond 1/255, got {beyond / total:.1e}")
    return f"{beyond / total:.0e} of values beyond 1/255"


def read_from(folder: Path) -> None:
    """Take photographs from a folder."""
    global FOLDER
    FOLDER = folder


def pairs() -> Iterator[Pair]:
    """Both of LLaVA-NeXT's processors."""
    import time

    cfg, limits, files = xgen_mm_config("interleave"), ImageLimits(), photographs()
    threads = torch.get_num_threads()
    for way, most in _MOST_UNLIKE.items():
        processor = image_processor(way, cfg)

        def ours(data: bytes) -> Tensor:
            return our_tiles(data, limits, cfg.tiling)

        def theirs(data: bytes, processor: Any = processor) -> Tensor:
            return their_tiles(data, processor)

        def alone(run: Callable[[bytes], Tensor]) -> Callable[[], float]:
            def seconds() -> float:
                torch.set_num_threads(1)
                start = time.perf_counter()
                for data in files:
                    run(data)
                elapsed = time.perf_counter() - start
                torch.set_num_threads(threads)
                return elapsed

            return seconds

        yield Pair(
            suite="data",
            name=f"{len(files)} {'photographs' if FOLDER else 'made pictures'}, bytes to tiles, one thread",
            peer=f"LLaVA-NeXT's {way} processor",
            unit="pictures/s",
            amount=len(files),
            ours=alone(ours),
            theirs=alone(theirs),
            check=lambda theirs=theirs, most=most: same_tiles(files, ours, theirs, most),
        )
