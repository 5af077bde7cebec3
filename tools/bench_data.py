"""From tars to batches of tiles: useful tokens a second of our stream, and of webdataset with transformers.

    uv run tools/bench_data.py                                          # ours alone, on tars made for the occasion
    uv run tools/bench_data.py --tars 'captions/*.tar' --tokenizer tokenizer.json --peers --out bench.json

Each way has one worker process of one thread; this process fetches batches and counts. Useful tokens are those that are
no padding: text and image tokens, 128 a tile as xGen-MM has them. Shards are indexed and measured beforehand, once, as
`tools/index.py` does; that time is told apart. Every round takes each way in turn, another one first each time, and
starts its worker anew; the clock runs from the second batch on. Ratios are of the medians over the rounds.

The peers read with webdataset and make pixels with LLaVA-NeXT's image processor, which has the same rule for grids and
the same views as our tiling, so that the pixels can be compared: all values of some samples are, before anything is
timed, and a run with more than one value in 10,000 beyond ±1/255 ends there. What is found is printed. torchvision's
are ours exactly. Pillow's are not all within ±1: its rounding differs by ±2 now and then, and Pillow 13 resizes the
rows of some shapes first, which at sharp edges comes to more. `--peers` needs webdataset, which is not of this
workspace.
"""

import argparse
import importlib
import io
import json
import os
import platform
import shutil
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from glob import glob
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench_index import processor_name
from blip3_lite import Blip3Config, EncodedSample, Processor, collate
from blip3_lite.presets import xgen_mm_config
from blip3_lite.processor import load_tokenizer
from interleave_data import Encoder, PlanConfig, Sample, Size, SourceConfig, Stream, open_source
from phi3_lite import HFTokenizer
from phi3_lite.tokenizer_train import train_tokenizer

MAX_TOKENS = 4096
SAMPLES_PER_BATCH = 8
"""Of the peers, which have no packing: about as many samples as fill one of our packs of such tokens."""
_WORDS = "the a red green cell star orbit light shows with under between microscope galaxy figure of and in"
_MOST_UNLIKE = 1e-4
"""Largest share of values that may differ by more than 1/255."""
WAYS = ("ours", "torchvision", "pil")


@dataclass(frozen=True)
class Settings:
    """What all ways read, and what they make of it."""

    tars: tuple[str, ...]
    tokenizer: str

    @property
    def model(self) -> Blip3Config:
        """The tiling and number of image tokens of xGen-MM v1.5."""
        return xgen_mm_config("interleave")

    @property
    def pattern(self) -> str:
        """All tars."""
        return str(Path(self.tars[0]).parent / "*.tar")


@dataclass(frozen=True)
class Count:
    """What one way did in a round."""

    tokens: int
    seconds: float

    @property
    def rate(self) -> float:
        """Useful tokens a second."""
        return self.tokens / self.seconds


class TilesEncoder(Encoder[EncodedSample, Any]):
    """Captions as the model takes them: packs of ids and uint8 tiles."""

    def __init__(self, processor: Processor) -> None:
        self.processor = processor

    def measure(self, sample: Any, limit: Size | None = None, /) -> Size:
        """Size without pixels."""
        return self.processor.measure(sample, limit)

    def encode(self, sample: Any, limit: Size | None = None, /) -> EncodedSample:
        """Ids and tiles."""
        return self.processor.encode(sample, limit)

    def collate(self, items: Sequence[EncodedSample], ids: Sequence[str], /) -> object:
        """One pack without padding."""
        return replace(collate(items), sample_ids=[]).to_arrays()

    def start_worker(self) -> None:
        """One thread."""
        torch.set_num_threads(1)


def ours(settings: Settings) -> Iterator[int]:
    """Useful tokens of each pack."""
    processor = Processor(settings.model, load_tokenizer(Path(settings.tokenizer)))
    source = open_source(
        SourceConfig(name="captions", format="captions", path=settings.pattern), lengths=processor.size_fingerprint
    )
    cfg = PlanConfig(max_tokens=MAX_TOKENS, epochs=(1,))
    with Stream([source], TilesEncoder(processor), cfg, num_workers=1) as stream:
        for batch in stream:
            assert batch.data["tiles"].dtype == np.uint8
            yield batch.num_tokens


def image_processor(way: str, cfg: Blip3Config) -> Any:
    """LLaVA-NeXT's image processor with our grids and SigLIP's normalisation.

    Raises:
        SystemExit: transformers is not installed.
    """
    name = {
        "torchvision": "transformers.models.llava_next.image_processing_llava_next.LlavaNextImageProcessor",
        "pil": "transformers.models.llava_next.image_processing_pil_llava_next.LlavaNextImageProcessorPil",
    }[way]
    module, _, kind = name.rpartition(".")
    side = cfg.tiling.tile_px
    return getattr(imported(module), kind)(
        size={"height": side, "width": side},
        crop_size={"height": side, "width": side},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        image_grid_pinpoints=[[rows * side, columns * side] for columns, rows in cfg.tiling.grids],
    )


def imported(name: str) -> Any:
    """Import a module of the peers.

    Raises:
        SystemExit: with what to install.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        sys.exit(
            f"--peers: expected {package} to be installed, got {error}; install it into a folder of its own "
            f"(python -m pip install --target FOLDER {package}) and put that on PYTHONPATH"
        )


class PeerBatch:
    """What a peer's worker makes of some captions: padded ids, and pixels with as many tiles for each."""

    def __init__(self, way: str, settings: Settings) -> None:
        self.way, self.settings = way, settings
        self._ready: tuple[Any, Any] | None = None

    def __call__(self, samples: Sequence[tuple[Any, str]]) -> dict[str, torch.Tensor]:
        """Encode; processor and tokenizer are made in the worker, on first use."""
        if self._ready is None:
            torch.set_num_threads(1)
            tokenizer = imported("transformers").PreTrainedTokenizerFast(tokenizer_file=self.settings.tokenizer)
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
            self._ready = image_processor(self.way, self.settings.model), tokenizer
        processor, tokenizer = self._ready
        images, texts = zip(*samples, strict=True)
        text = tokenizer(list(texts), padding=True, return_tensors="pt")
        pixels = processor(list(images), return_tensors="pt")
        return {**text, **pixels}


def peer(way: str, settings: Settings, num_batches: int) -> Iterator[int]:
    """Useful tokens of each batch of webdataset and transformers; image tokens as our tiling gives them."""
    from anyres_tiler import num_tiles

    cfg = settings.model
    webdataset = imported("webdataset")
    dataset = (
        webdataset.WebDataset(list(settings.tars), shardshuffle=False, empty_check=False)
        .decode("pilrgb")
        .to_tuple("jpg;png", "txt")
        .slice(SAMPLES_PER_BATCH * num_batches)
        .batched(SAMPLES_PER_BATCH, collation_fn=PeerBatch(way, settings))
    )
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=None, num_workers=1, multiprocessing_context="spawn", prefetch_factor=2
    )
    for batch in loader:
        sizes = [(int(width), int(height)) for height, width in batch["image_sizes"]]
        num_image = sum(cfg.num_image_tokens(num_tiles(size, cfg.tiling)) for size in sizes)
        yield int(batch["attention_mask"].sum()) + num_image


def timed(batches: Iterator[int]) -> Count:
    """Count from the second batch on, as the first waits for a worker to start, up to the last."""
    next(batches)
    start = end = time.perf_counter()
    tokens = 0
    for num_tokens in batches:
        tokens += num_tokens
        # Here, as a worker takes its time to end behind the last one.
        end = time.perf_counter()
    if not tokens:
        sys.exit("tars: expected enough samples for two batches, got fewer; give more")
    return Count(tokens, end - start)


def unlike_pixels(way: str, settings: Settings, num_samples: int = 96) -> dict[str, float]:
    """Compare our tiles with a peer's pixels, value by value; shares of values beyond ±1/255, and the largest.

    Raises:
        SystemExit: they are not the same.
    """
    processor = Processor(settings.model, load_tokenizer(Path(settings.tokenizer)))
    source = open_source(SourceConfig(name="captions", format="captions", path=settings.pattern))
    peers = image_processor(way, settings.model)
    beyond = total = largest = 0
    for index in range(0, len(source), max(1, len(source) // num_samples)):
        sample = source[index]
        assert isinstance(sample, Sample)
        tiles = processor.encode(sample).tiles
        image = Image.open(io.BytesIO(sample.images()[0].read())).convert("RGB")
        pixels = peers([image], return_tensors="pt")["pixel_values"][0]
        if pixels.shape != tiles.shape:
            sys.exit(f"{way}: expected the tiles {tuple(tiles.shape)} of {sample.id}, got {tuple(pixels.shape)}")
        # From -1 … 1 back to 0 … 255.
        difference = ((pixels + 1) * 127.5 - tiles).abs()
        beyond += int((difference > 1.01).sum())
        total += difference.numel()
        largest = max(largest, float(difference.max()))
    if beyond > _MOST_UNLIKE * total:
        sys.exit(f"{way}: expected the same pixels within 1/255, got {beyond} of {total} beyond, up to {largest:.0f}")
    return {"values": total, "share_beyond_1": beyond / total, "largest": round(largest, 2)}


def write_tars(folder: Path, num_shards: int, samples_per_shard: int) -> None:
    """Write caption tars of pictures with smooth colours and edges, in the shapes that photographs have."""
    rng = np.random.default_rng(0)
    for shard in range(num_shards):
        with tarfile.open(folder / f"{shard:06}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for number in range(samples_per_shard):
                width, height = rng.choice([(640, 480), (480, 640), (640, 427), (640, 224), (500, 500)])
                small = rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
                picture = io.BytesIO()
                Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(picture, "JPEG")
                caption = " ".join(rng.choice(_WORDS.split(), int(rng.integers(20, 180))))
                for suffix, data in [("jpg", picture.getvalue()), ("txt", caption.encode())]:
                    info = tarfile.TarInfo(f"{shard:03}{number:06}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


def prepare(tars: Sequence[str], tokenizer: str | None, folder: Path) -> Settings:
    """Put tars and a tokenizer into one folder that can be written to."""
    if tars:
        for path in tars:
            shutil.copy(path, folder)
    else:
        write_tars(folder, num_shards=3, samples_per_shard=100)
    if tokenizer is None:
        made: HFTokenizer = train_tokenizer([_WORDS], vocab_size=320)
        tokenizer = str(folder / "tokenizer.json")
        made.save(Path(tokenizer))
    return Settings(tuple(sorted(glob(str(folder / "*.tar")))), tokenizer)


def main() -> None:
    """Prepare, compare the pixels, time the ways in turn, print."""
    parser = argparse.ArgumentParser(prog="bench_data", description="Useful tokens a second from tars to batches.")
    parser.add_argument("--tars", help="pattern of caption tars; by default some are made")
    parser.add_argument("--tokenizer", help="tokenizer.json; by default one is trained on the made captions")
    parser.add_argument("--peers", action="store_true", help="measure webdataset with transformers too")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, default=8, help="batches that are timed in each round")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    args = parser.parse_args()
    if min(args.rounds, args.batches) < 1:
        parser.error(f"--rounds, --batches: expected at least 1, got {args.rounds} and {args.batches}; give more")
    tars = sorted(glob(args.tars)) if args.tars else []
    if args.tars and not tars:
        parser.error(f"--tars: expected files at {args.tars}, got none; check the pattern")
    ways = list(WAYS) if args.peers else ["ours"]
    if args.peers:
        imported("webdataset")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        report(prepare(tars, args.tokenizer, Path(name)), ways, args)


def report(settings: Settings, ways: Sequence[str], args: argparse.Namespace) -> None:
    """Run all rounds and print a table; write all numbers as JSON if asked to."""
    processor = Processor(settings.model, load_tokenizer(Path(settings.tokenizer)))
    start = time.perf_counter()
    source = open_source(SourceConfig(name="captions", format="captions", path=settings.pattern))
    source.measure(processor.size_fingerprint, processor.measure, lambda: None)
    indexed_s = time.perf_counter() - start
    print(f"{len(source)} samples in {len(settings.tars)} tars, indexed and measured in {indexed_s:.1f} s")
    pixels = {way: unlike_pixels(way, settings) for way in ways if way != "ours"}
    for way, found in pixels.items():
        print(f"pixels like {way}'s: {found['share_beyond_1']:.1e} of {found['values']:,} values beyond 1/255")
    counts: dict[str, list[Count]] = {way: [] for way in ways}
    for turn in range(args.rounds):
        order = [ways[(turn + place) % len(ways)] for place in range(len(ways))]
        for way in order:
            num_batches = args.batches + 1
            batches = islice(ours(settings), num_batches) if way == "ours" else peer(way, settings, num_batches)
            counts[way].append(timed(batches))
    rates = {way: statistics.median(count.rate for count in counts[way]) for way in ways}
    print(f"{'way':<13}{'tokens/s':>10}{'ours is':>9}   each round")
    for way in ways:
        rounds = " ".join(f"{count.rate:,.0f}" for count in counts[way])
        print(f"{way:<13}{rates[way]:>10,.0f}{rates['ours'] / rates[way]:>8.2f}x   {rounds}")
    if args.out is not None:
        found = {
            "machine": {"processor": processor_name(), "cores": os.cpu_count(), "load_average": os.getloadavg()},
            "versions": {"python": platform.python_version(), "torch": torch.__version__, **peer_versions(ways)},
            "samples": len(source),
            "tars": "given" if args.tars else "made",
            "indexed_s": indexed_s,
            "pixels": pixels,
            "rounds": {way: [asdict(count) for count in counts[way]] for way in ways},
            "tokens_per_s": rates,
            "ratios": {way: rates["ours"] / rates[way] for way in ways},
        }
        args.out.write_text(json.dumps(found, indent=2) + "\n")


def peer_versions(ways: Sequence[str]) -> dict[str, str]:
    """Versions of what the peers run on."""
    names = ("webdataset", "transformers", "torchvision", "PIL") if len(ways) > 1 else ("PIL",)
    return {name: str(getattr(imported(name), "__version__", "unknown")) for name in names}


if __name__ == "__main__":
    main()
