"""How fast does a full-size model answer, and in how much memory? On random weights, each kind in a fresh process.

    uv run tools/bench_release.py --out bench.json                    # xGen-MM v1.5: bf16, int8 and int4
    uv run tools/bench_release.py --layers 2 --kinds int4             # a quick look: two layers of each part
    uv run tools/bench_release.py --folder DIR --transformers         # from files on disk; beside transformers, in bf16

The question is one picture of `--tiles` tiles and 100 tokens of text. Decoding a token reads every weight of the
language model once, so memory sets its bound. `share` is the part of it that is reached: bytes read for a token ×
tokens a second ÷ the copy bandwidth (bytes read and bytes written) of the same process and threads. Without `--folder`
the weights are made as they are asked for, and the load time is that of converting them; with it, a sharded checkpoint
is written there once and read by each kind (8.8 GB). transformers runs the same vision tower and language model; it has
no connector, so that the language model gets random image tokens there.
"""

import argparse
import importlib
import json
import multiprocessing
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec
import torch
from torch import Tensor, nn

from blip3_lite import Blip3, Blip3Config, PackedBatch
from blip3_lite.model import undrawn_model
from blip3_lite.presets import xgen_mm_config
from phi3_lite import Phi3, SamplingConfig, generate, load_targets, quantise_linears
from trainer_lite import peak_rss_bytes
from weight_files import Piece, SafetensorsFiles, SavedTensor, TensorInfo, TensorSource, load_tensors, shard_writers

KINDS = ("bf16", "int8", "int4")
_TEXT_TOKENS = 100
_COPY_BYTES = 1 << 28


@dataclass(frozen=True)
class Settings:
    """One measurement."""

    kind: str
    cfg: Blip3Config
    folder: Path | None
    tiles: int
    new: int
    threads: int


@dataclass(frozen=True)
class Result:
    """What a kind of weights cost."""

    kind: str
    load_s: float
    """Building, reading, converting and quantising."""
    peak_bytes: int
    """Largest resident set of the process, weights and libraries and all."""
    image_s: float
    """From the picture's tiles to its image tokens."""
    first_token_s: float
    """From the tiles and the question's ids to the first token."""
    tokens_per_s: float
    """After the first token."""
    bytes_per_token: int
    """Weights and the cache's keys and values that a step reads, at the middle of the answer."""
    copy_bytes_per_s: float
    share: float
    """bytes_per_token × tokens_per_s ÷ copy_bytes_per_s."""


class RandomWeights:
    """A checkpoint that is made up as it is read: bf16 rows cut from one pool of random numbers."""

    where = "random weights"

    def __init__(self, model: nn.Module) -> None:
        self._infos = {
            name: TensorInfo(tuple(tensor.shape), torch.bfloat16) for name, tensor in model.state_dict().items()
        }
        self._pool = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor of the model."""
        return self._infos

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """The same numbers again and again, from another place for each name; norms are ones."""
        shape = self._infos[name].shape
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        out = torch.empty(shape, dtype=torch.bfloat16)
        pool = self._pool.roll(sum(name.encode()) * 977)
        flat = out.view(-1)
        for start in range(0, len(flat), len(pool)):
            part = flat[start : start + len(pool)]
            part.copy_(pool[: len(part)])
        return out if rows is None else out[slice(*rows)]


def empty_model(cfg: Blip3Config) -> Blip3:
    """The model without memory."""
    return undrawn_model(cfg, torch.bfloat16).eval().requires_grad_(False)


def write_checkpoint(cfg: Blip3Config, folder: Path) -> None:
    """Write random weights as shards."""
    source = RandomWeights(empty_model(cfg))
    saved = [
        SavedTensor(name, info.shape, info.dtype, lambda name=name: source.read(name))
        for name, info in source.tensors.items()
    ]
    folder.mkdir(parents=True)
    for name, write in shard_writers(saved, max_shard_bytes=1_000_000_000).items():
        write(folder / name)


def load(settings: Settings) -> Blip3:
    """Build the model and fill it."""
    model = empty_model(settings.cfg)
    source: TensorSource = RandomWeights(model) if settings.folder is None else SafetensorsFiles(settings.folder)
    if settings.kind != "bf16":
        quantise_linears(model.lang_model, "int8" if settings.kind == "int8" else "int4")
    model.to_empty(device="cpu")
    targets = load_targets(model)
    load_tensors(source, targets, {name: [Piece(name)] for name in targets})
    return model


def copy_bandwidth() -> float:
    """Bytes read and written a second by a copy between two arrays that no cache holds; the best of seven."""
    first = torch.ones(_COPY_BYTES, dtype=torch.uint8)
    second = torch.zeros_like(first)
    best = 0.0
    for _ in range(7):
        start = time.perf_counter()
        second.copy_(first)
        best = max(best, 2 * _COPY_BYTES / (time.perf_counter() - start))
    return best


def bytes_per_token(model: Phi3, positions: int) -> int:
    """What a step reads: all weights but the embedding, of which it reads a row, and the keys and values so far."""
    cfg = model.cfg
    table = 0 if cfg.is_head_tied else sum(tensor.nbytes for tensor in model.model.embed_tokens.state_dict().values())
    weights = sum(tensor.nbytes for tensor in model.state_dict().values()) - table
    seen = positions if cfg.sliding_window is None else min(positions, cfg.sliding_window)
    return weights + 2 * cfg.num_layers * cfg.num_kv_heads * cfg.head_dim * seen * torch.bfloat16.itemsize


def question(settings: Settings) -> PackedBatch:
    """A picture and a text of 100 tokens, as the model takes them; the same each time."""
    cfg, generator = settings.cfg, torch.Generator().manual_seed(1)
    num_image = settings.tiles * cfg.connector.num_latents
    length = num_image + _TEXT_TOKENS
    size = cfg.tiling.tile_px
    return PackedBatch(
        sample_ids=["question"],
        ids=torch.randint(0, cfg.lm.vocab_size, (length,), generator=generator),
        targets=torch.full((length,), -100),
        positions=torch.arange(length),
        cu_seqlens=torch.tensor([0, length], dtype=torch.int32),
        image_index=torch.arange(num_image),
        tiles=torch.randint(0, 256, (settings.tiles, 3, size, size), generator=generator, dtype=torch.uint8),
        valid=torch.ones(settings.tiles, cfg.vision.num_patches, dtype=torch.bool),
        tiles_per_image=(settings.tiles,),
    )


def result(settings: Settings, load_s: float, peak: int, image_s: float, times: list[float], read: int) -> Result:
    """Put the measurements together; times: of the start and of each token."""
    tokens_per_s = (len(times) - 2) / (times[-1] - times[1])
    copy = copy_bandwidth()
    first_s = times[1] - times[0]
    return Result(settings.kind, load_s, peak, image_s, first_s, tokens_per_s, read, copy, read * tokens_per_s / copy)


@torch.inference_mode()
def measure(settings: Settings) -> Result:
    """Load, warm up, answer; run in a process of its own, so that the peak is this kind's."""
    torch.set_num_threads(settings.threads)
    start = time.perf_counter()
    model = load(settings)
    load_s = time.perf_counter() - start
    batch = question(settings)
    embeds = model.lang_model.embed(batch.ids[:8])
    for _ in generate(model.lang_model, embeds, torch.tensor([0, 8], dtype=torch.int32), _sampling(2)):
        pass
    times = [time.perf_counter()]
    embeds = model.embed(batch)
    image_s = time.perf_counter() - times[0]
    for _ in generate(model.lang_model, embeds, batch.cu_seqlens, _sampling(settings.new)):
        times.append(time.perf_counter())
    # Before the bandwidth is measured, which takes memory of its own.
    peak = peak_rss_bytes()
    read = bytes_per_token(model.lang_model, len(batch.ids) + settings.new // 2)
    return result(settings, load_s, peak, image_s, times, read)


def _sampling(num_new: int) -> SamplingConfig:
    return SamplingConfig(max_new_tokens=num_new)


@torch.inference_mode()
def measure_transformers(settings: Settings) -> Result:
    """The same with transformers' vision tower and language model on the same numbers, greedy, with its cache."""
    torch.set_num_threads(settings.threads)
    # A test-only dependency of the workspace, and not one of this tool's unless it is asked for.
    transformers = importlib.import_module("transformers")
    vision_cfg, cfg, start = settings.cfg.vision, settings.cfg.lm, time.perf_counter()
    lm_config = transformers.Phi3Config(
        vocab_size=cfg.vocab_size, hidden_size=cfg.width, num_hidden_layers=cfg.num_layers,
        num_attention_heads=cfg.num_heads, num_key_value_heads=cfg.num_kv_heads, intermediate_size=cfg.mlp_width,
        max_position_embeddings=cfg.max_positions, sliding_window=cfg.sliding_window, rms_norm_eps=cfg.norm_eps,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, attn_implementation="sdpa", dtype=torch.bfloat16,
    )  # fmt: skip
    tower_config = transformers.SiglipVisionConfig(
        hidden_size=vision_cfg.width, intermediate_size=vision_cfg.mlp_width, num_hidden_layers=vision_cfg.num_layers,
        num_attention_heads=vision_cfg.num_heads, image_size=vision_cfg.image_px, patch_size=vision_cfg.patch_px,
        vision_use_head=False, attn_implementation="sdpa", dtype=torch.bfloat16,
    )  # fmt: skip
    ours = empty_model(settings.cfg)
    source: TensorSource = RandomWeights(ours) if settings.folder is None else SafetensorsFiles(settings.folder)
    with torch.device("meta"):
        lm = transformers.Phi3ForCausalLM(lm_config).to(torch.bfloat16).eval()
    rotary = type(lm.model.rotary_emb)(config=lm_config)
    lm.to_empty(device="cpu")
    # Its angles are no part of a checkpoint, and were lost with the meta device.
    lm.model.rotary_emb = rotary
    targets = lm.state_dict()
    prefix = "lang_model."
    skipped = [name for name in source.tensors if name.removeprefix(prefix) not in targets]
    load_tensors(source, targets, {name: [Piece(prefix + name)] for name in targets}, ignored=skipped)
    # No numbers depend on the tower's weights here, and making them is no part of loading.
    tower = transformers.SiglipVisionModel(tower_config).to(torch.bfloat16).eval()
    load_s = time.perf_counter() - start
    batch = question(settings)
    assert batch.tiles is not None
    num_image = len(batch.image_index)
    lm(input_ids=batch.ids[None, :8], logits_to_keep=1)
    times = [time.perf_counter()]
    tower(pixel_values=batch.tiles.bfloat16() / 127.5 - 1)
    image_s = time.perf_counter() - times[0]
    embeds = lm.get_input_embeddings()(batch.ids[None])
    embeds[0, :num_image] = 0.02
    out = lm(inputs_embeds=embeds, use_cache=True, logits_to_keep=1)
    times.append(time.perf_counter())
    for _ in range(settings.new - 1):
        step = out.logits[:, -1:].argmax(-1)
        out = lm(input_ids=step, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
        times.append(time.perf_counter())
    peak = peak_rss_bytes()
    positions = len(batch.ids) + settings.new // 2
    cache = 2 * cfg.num_layers * cfg.num_kv_heads * cfg.head_dim * positions * torch.bfloat16.itemsize
    read = sum(tensor.nbytes for name, tensor in targets.items() if "embed_tokens" not in name) + cache
    return result(settings, load_s, peak, image_s, times, read)


def shortened(cfg: Blip3Config, num_layers: int | None) -> Blip3Config:
    """The model with so many layers in each part."""
    if num_layers is None:
        return cfg
    return msgspec.structs.replace(
        cfg,
        vision=msgspec.structs.replace(cfg.vision, num_layers=num_layers),
        connector=msgspec.structs.replace(cfg.connector, depth=num_layers),
        lm=msgspec.structs.replace(cfg.lm, num_layers=num_layers),
    )


def main() -> None:
    """Measure each kind and print a table; write all numbers as JSON if asked to."""
    parser = argparse.ArgumentParser(prog="bench_release", description="Speed and memory of a full-size model.")
    parser.add_argument("--layers", type=int, help="take only so many layers of each part")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--tiles", type=int, default=5, help="tiles of the picture, the base view among them")
    parser.add_argument("--new", type=int, default=32, help="tokens to generate, at least 3")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, help="keep the random weights as files here, and load them from there")
    parser.add_argument("--transformers", action="store_true", help="measure transformers' models as well, in bf16")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    args = parser.parse_args()
    if args.new < 3 or args.tiles < 1:
        parser.error(f"--new, --tiles: expected at least 3 and 1, got {args.new} and {args.tiles}; give more")
    cfg = shortened(xgen_mm_config("interleave"), args.layers)
    if args.folder is not None and not args.folder.exists():
        write_checkpoint(cfg, args.folder)
    jobs = [(measure, kind) for kind in args.kinds]
    if args.transformers:
        jobs.append((measure_transformers, "transformers"))
    results: list[Result] = []
    print(
        f"{'kind':<13}{'load s':>8}{'peak GB':>9}{'image s':>9}{'first s':>9}{'tokens/s':>10}{'GB/token':>10}"
        f"{'GB/s':>7}{'share':>7}"
    )
    for run, kind in jobs:
        settings = Settings(kind, cfg, args.folder, args.tiles, args.new, args.threads)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found = pool.apply(run, (settings,))
        results.append(found)
        print(
            f"{found.kind:<13}{found.load_s:>8.1f}{found.peak_bytes / 1e9:>9.2f}{found.image_s:>9.2f}"
            f"{found.first_token_s:>9.2f}{found.tokens_per_s:>10.2f}{found.bytes_per_token / 1e9:>10.2f}"
            f"{found.copy_bytes_per_s / 1e9:>7.1f}{found.share:>7.0%}",
            flush=True,
        )
    if args.out is not None:
        report = {
            "machine": {"processor": platform.processor() or platform.machine(), "threads": args.threads},
            "torch": torch.__version__,
            "model": msgspec.to_builtins(cfg),
            "tiles": args.tiles,
            "text_tokens": _TEXT_TOKENS,
            "new_tokens": args.new,
            "results": [asdict(found) for found in results],
        }
        args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
