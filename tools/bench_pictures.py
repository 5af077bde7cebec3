"""Suite `data`: a photograph's bytes to its tiles, beside LLaVA-NeXT's two image processors, and tiles to features.

Tiles are made by one thread, as a data worker has it. The tower is SigLIP so400m, of random weights that both sides
share.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from msgspec.structs import replace
from PIL import Image
from torch import Tensor

from anyres_tiler import TilingConfig, tile_image
from bench_data import image_processor, imported
from bench_models import TOLERANCE, their_tower, tower_flops
from bench_pairs import Floors, GateError, Pair, agree, clocked
from blip3_lite.presets import xgen_mm_config
from interleave_data import ImageLimits, open_image
from siglip_lite import SiglipVision, SiglipVisionConfig, normalise

FOLDER: Path | None = None
"""Of photographs."""
_MOST_UNLIKE = 1e-5
"""Largest share of a picture's values beyond ±1/255: roundings of two passes that meet; none is beyond ±2/255."""
_LAYERS = 27
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
    """Opened by Pillow; the processor converts (it lays transparency on white, as our gate does), tiles, normalises."""
    return processor([Image.open(io.BytesIO(data))], return_tensors="pt")["pixel_values"][0]


def stepwise_tiles(image: Image.Image, grids: Sequence[Sequence[int]], *, rows_first: bool) -> Tensor:
    """The published steps one by one, with transformers' geometry and Pillow's bicubic along one axis at a time.

    The whole picture squashed; the picture fitted into the best of `grids` (height, width), centred on black, cut up.
    Columns come first in torchvision, and in the Pillow of the release's days (10.3, compared on 12 photographs: equal
    in all values). Pillow 13 does the rows first where a picture is tall, which at edges changes up to 15 of 255; that
    order is given too, so that it can be told from a fault.
    """
    utils = imported("transformers.image_processing_utils")
    side = min(min(grid) for grid in grids)
    height, width = utils.select_best_resolution(image.size[::-1], [list(grid) for grid in grids])
    fitted = utils.get_patch_output_size(np.asarray(image), (height, width), "channels_last")

    def resized(rows: int, columns: int) -> Image.Image:
        half = (image.width, rows) if rows_first else (columns, image.height)
        return image.resize(half, Image.Resampling.BICUBIC).resize((columns, rows), Image.Resampling.BICUBIC)

    canvas = Image.new("RGB", (width, height))
    canvas.paste(resized(*fitted), ((width - fitted[1]) // 2, (height - fitted[0]) // 2))
    boxes = [(x, y, x + side, y + side) for y in range(0, height, side) for x in range(0, width, side)]
    views = [resized(side, side), *(canvas.crop(box) for box in boxes)]
    return torch.stack([torch.tensor(np.asarray(view)).permute(2, 0, 1) for view in views])


def like(what: str, found: Tensor, *references: Tensor) -> float:
    """Compare each of a picture's tiles with the one of the references that is nearest, values 0 … 255.

    Returns the share of values beyond ±1/255.

    Raises:
        GateError: other tiles, or too many values that differ.
    """
    for reference in references:
        if found.shape != reference.shape:
            raise GateError(f"{what}: expected tiles {tuple(reference.shape)}, got {tuple(found.shape)}")
    # half a hundredth for floats that were normalised
    differences = torch.stack([(found.float() - reference.float()).abs() - 0.01 for reference in references])
    nearest = differences.flatten(2).mean(2).argmin(0)
    difference = differences[nearest, torch.arange(len(found))]
    beyond = float((difference > 1).float().mean())
    if beyond > _MOST_UNLIKE or float(difference.max()) > 2:
        raise GateError(
            f"{what}: expected at most {_MOST_UNLIKE:.0e} of the values beyond 1/255 and none beyond 2/255, "
            f"got {beyond:.1e} and up to {float(difference.max()):.0f}"
        )
    return beyond


def same_tiles(
    files: Sequence[bytes],
    ours: Callable[[bytes], Tensor],
    theirs: Callable[[bytes], Tensor],
    steps: Callable[[bytes, bool], Tensor],
) -> str:
    """Hold both sides against the published steps: ours in the published order, theirs in either.

    Raises:
        GateError: either does something else.
    """
    beyond = 0.0
    for number, data in enumerate(files):
        columns_first, rows_first = steps(data, False), steps(data, True)
        beyond = max(beyond, like(f"picture {number}, ours", ours(data), columns_first))
        # from -1 … 1 back to 0 … 255
        other = (theirs(data) + 1) * 127.5
        beyond = max(beyond, like(f"picture {number}, theirs", other, columns_first, rows_first))
    return f"the steps within 1/255 but for {beyond:.0e} of a picture's values"


def read_from(folder: Path) -> None:
    """Take photographs from a folder."""
    global FOLDER
    FOLDER = folder


def pairs() -> Iterator[Pair]:
    """Bytes to tiles, tiles to features."""
    yield from tile_pairs()
    # A ninth of the layers for five tiles: a layer is a layer, and bf16 takes the peer minutes.
    for num_tiles, num_layers in ((1, _LAYERS), (5, _LAYERS // 9)):
        for dtype in (torch.float32, torch.bfloat16):
            yield tower_pair(num_tiles, num_layers, dtype)


def tower_config(num_layers: int) -> SiglipVisionConfig:
    """SigLIP so400m, as xGen-MM has it, or its first layers."""
    return replace(xgen_mm_config("interleave").vision, num_layers=num_layers, use_head=False)


@cache
def towers(num_layers: int, dtype: torch.dtype) -> tuple[SiglipVision, Any]:
    """Ours and transformers', on the same weights."""
    torch.manual_seed(0)
    ours = SiglipVision(tower_config(num_layers)).to(dtype).requires_grad_(False)
    return ours, their_tower(ours)


def tower_pair(num_tiles: int, num_layers: int, dtype: torch.dtype) -> Pair:
    """Bytes of tiles to one feature a patch."""
    cfg = tower_config(num_layers)
    generator = torch.Generator().manual_seed(1)
    tiles = torch.randint(0, 256, (num_tiles, 3, cfg.image_px, cfg.image_px), dtype=torch.uint8, generator=generator)

    @torch.no_grad()
    def ours() -> Tensor:
        return towers(num_layers, dtype)[0](normalise(tiles, dtype))

    @torch.no_grad()
    def theirs() -> Tensor:
        pixels = (tiles.float() / 127.5 - 1.0).to(dtype)
        return towers(num_layers, dtype)[1](pixel_values=pixels).last_hidden_state

    def check() -> str:
        return agree("features", ours(), theirs(), TOLERANCE[dtype])

    what = "one tile" if num_tiles == 1 else f"{num_tiles} tiles"
    layers = "" if num_layers == _LAYERS else f", {num_layers} of {_LAYERS} layers"
    name = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    return Pair(
        suite="data",
        name=f"SigLIP so400m {name}, {what} to features{layers}",
        peer="transformers SiglipVisionModel",
        unit="tiles/s",
        amount=num_tiles,
        ours=clocked(ours),
        theirs=clocked(theirs),
        check=check,
        least_s=partial(_least_s, tower_flops(cfg, num_tiles)),
    )


def _least_s(flops: float, floors: Floors) -> float:
    return flops / floors.flops_per_s


def tile_pairs() -> Iterator[Pair]:
    """Both of LLaVA-NeXT's processors."""
    import time

    cfg, limits, files = xgen_mm_config("interleave"), ImageLimits(), photographs()
    threads = torch.get_num_threads()
    for way in ("torchvision", "pil"):
        processor = image_processor(way, cfg)

        def steps(data: bytes, rows_first: bool, grids: Any = processor.image_grid_pinpoints) -> Tensor:
            return stepwise_tiles(open_image(data, limits), grids, rows_first=rows_first)

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
            check=lambda theirs=theirs, steps=steps: same_tiles(files, ours, theirs, steps),
        )
