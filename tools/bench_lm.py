"""How fast does the language model decode, and in how much memory? On random weights, each kind in a fresh process.

    uv run tools/bench_lm.py --out bench.json                        # Phi-3-mini: bf16, int8 and int4
    uv run tools/bench_lm.py --layers 2 --kinds int4 --prompt 64     # a quick look
    uv run tools/bench_lm.py --folder DIR --transformers             # from files on disk; beside transformers, in bf16

Decoding a token reads every weight once, so memory sets its bound. `share` is the part of it that is reached: bytes
read for a token × tokens a second ÷ the copy bandwidth (bytes read and bytes written) of the same process and threads.
Without `--folder` the weights are made as they are asked for, and the load time is that of converting them; with it, a
sharded checkpoint is written there once and read by each kind (Phi-3-mini: 7.6 GB).
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

from phi3_lite import Phi3, Phi3Config, SamplingConfig, generate, load_targets, mini_4k, quantise_linears
from trainer_lite import peak_rss_bytes
from weight_files import Piece, SafetensorsFiles, SavedTensor, TensorInfo, TensorSource, load_tensors, shard_writers

KINDS = ("bf16", "int8", "int4")
PRESETS = {"phi3-mini": mini_4k()}
_COPY_BYTES = 1 << 28


@dataclass(frozen=True)
class Settings:
    """One measurement."""

    kind: str
    cfg: Phi3Config
    folder: Path | None
    prompt: int
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
    first_token_s: float
    """From the prompt's embeddings to the first token."""
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


def empty_model(cfg: Phi3Config) -> Phi3:
    """The model without memory."""
    with torch.device("meta"):
        return Phi3(cfg).to(torch.bfloat16).eval().requires_grad_(False)


def write_checkpoint(cfg: Phi3Config, folder: Path) -> None:
    """Write random weights as shards."""
    source = RandomWeights(empty_model(cfg))
    saved = [
        SavedTensor(name, info.shape, info.dtype, lambda name=name: source.read(name))
        for name, info in source.tensors.items()
    ]
    folder.mkdir(parents=True)
    for name, write in shard_writers(saved, max_shard_bytes=1_000_000_000).items():
        write(folder / name)


def load(settings: Settings) -> Phi3:
    """Build the model and fill it."""
    model = empty_model(settings.cfg)
    source: TensorSource = RandomWeights(model) if settings.folder is None else SafetensorsFiles(settings.folder)
    if settings.kind != "bf16":
        quantise_linears(model, "int8" if settings.kind == "int8" else "int4")
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


def result(settings: Settings, load_s: float, peak: int, times: list[float], read: int) -> Result:
    """Put the measurements together; times: of the start and of each token."""
    tokens_per_s = (len(times) - 2) / (times[-1] - times[1])
    copy = copy_bandwidth()
    return Result(
        settings.kind, load_s, peak, times[1] - times[0], tokens_per_s, read, copy, read * tokens_per_s / copy
    )


def measure(settings: Settings) -> Result:
    """Load, warm up, answer; run in a process of its own, so that the peak is this kind's."""
    torch.set_num_threads(settings.threads)
    start = time.perf_counter()
    model = load(settings)
    load_s = time.perf_counter() - start
    ids = torch.randint(0, settings.cfg.vocab_size, (settings.prompt,), generator=torch.Generator().manual_seed(1))
    times: list[float] = []
    for prompt, num_new in ((ids[:8], 2), (ids, settings.new)):
        times = [time.perf_counter()]
        bounds = torch.tensor([0, len(prompt)], dtype=torch.int32)
        for _ in generate(model, model.embed(prompt), bounds, SamplingConfig(max_new_tokens=num_new)):
            times.append(time.perf_counter())
    # Before the bandwidth is measured, which takes memory of its own.
    peak = peak_rss_bytes()
    return result(settings, load_s, peak, times, bytes_per_token(model, settings.prompt + settings.new // 2))


@torch.inference_mode()
def measure_transformers(settings: Settings) -> Result:
    """The same with transformers' model on the same numbers, greedy, with its cache."""
    torch.set_num_threads(settings.threads)
    # A test-only dependency of the workspace, and not one of this tool's unless it is asked for.
    transformers = importlib.import_module("transformers")
    cfg, start = settings.cfg, time.perf_counter()
    config = transformers.Phi3Config(
        vocab_size=cfg.vocab_size, hidden_size=cfg.width, num_hidden_layers=cfg.num_layers,
        num_attention_heads=cfg.num_heads, num_key_value_heads=cfg.num_kv_heads, intermediate_size=cfg.mlp_width,
        max_position_embeddings=cfg.max_positions, sliding_window=cfg.sliding_window, rms_norm_eps=cfg.norm_eps,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, attn_implementation="sdpa", dtype=torch.bfloat16,
    )  # fmt: skip
    ours = empty_model(cfg)
    source: TensorSource = RandomWeights(ours) if settings.folder is None else SafetensorsFiles(settings.folder)
    with torch.device("meta"):
        model = transformers.Phi3ForCausalLM(config).to(torch.bfloat16).eval()
    rotary = type(model.model.rotary_emb)(config=config)
    model.to_empty(device="cpu")
    # Its angles are no part of a checkpoint, and were lost with the meta device.
    model.model.rotary_emb = rotary
    targets = model.state_dict()
    load_tensors(source, targets, {name: [Piece(name)] for name in targets})
    load_s = time.perf_counter() - start
    ids = torch.randint(0, cfg.vocab_size, (1, settings.prompt), generator=torch.Generator().manual_seed(1))
    times: list[float] = []
    for prompt, num_new in ((ids[:, :8], 2), (ids, settings.new)):
        times, step, cache = [time.perf_counter()], prompt, None
        for _ in range(num_new):
            out = model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
            step, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
            times.append(time.perf_counter())
    peak = peak_rss_bytes()
    quantity = 2 * cfg.num_layers * cfg.num_kv_heads * cfg.head_dim * (settings.prompt + settings.new // 2) * 2
    read = sum(tensor.nbytes for name, tensor in targets.items() if "embed_tokens" not in name) + quantity
    return result(settings, load_s, peak, times, read)


def main() -> None:
    """Measure each kind and print a table; write all numbers as JSON if asked to."""
    parser = argparse.ArgumentParser(prog="bench_lm", description="Speed and memory of the language model.")
    parser.add_argument("--preset", choices=PRESETS, default="phi3-mini")
    parser.add_argument("--layers", type=int, help="take only so many layers of the preset")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--prompt", type=int, default=740, help="tokens of the prompt; default: five tiles, a question")
    parser.add_argument("--new", type=int, default=32, help="tokens to generate, at least 3")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, help="keep the random weights as files here, and load them from there")
    parser.add_argument("--transformers", action="store_true", help="measure transformers' model as well, in bf16")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    args = parser.parse_args()
    if args.new < 3 or args.prompt < 1:
        parser.error(f"--new, --prompt: expected at least 3 and 1, got {args.new} and {args.prompt}; give more")
    cfg = PRESETS[args.preset]
    cfg = msgspec.structs.replace(cfg, num_layers=args.layers or cfg.num_layers)
    if args.folder is not None and not args.folder.exists():
        write_checkpoint(cfg, args.folder)
    jobs = [(measure, kind) for kind in args.kinds]
    if args.transformers:
        jobs.append((measure_transformers, "transformers"))
    results: list[Result] = []
    print(
        f"{'kind':<13}{'load s':>8}{'peak GB':>9}{'first s':>9}{'tokens/s':>10}{'GB/token':>10}{'GB/s':>7}{'share':>7}"
    )
    for run, kind in jobs:
        settings = Settings(kind, cfg, args.folder, args.prompt, args.new, args.threads)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found = pool.apply(run, (settings,))
        results.append(found)
        print(
            f"{found.kind:<13}{found.load_s:>8.1f}{found.peak_bytes / 1e9:>9.2f}{found.first_token_s:>9.2f}"
            f"{found.tokens_per_s:>10.2f}{found.bytes_per_token / 1e9:>10.2f}{found.copy_bytes_per_s / 1e9:>7.1f}"
            f"{found.share:>7.0%}",
            flush=True,
        )
    if args.out is not None:
        report = {
            "machine": {"processor": platform.processor() or platform.machine(), "threads": args.threads},
            "torch": torch.__version__,
            "model": msgspec.to_builtins(cfg),
            "prompt_tokens": args.prompt,
            "new_tokens": args.new,
            "results": [asdict(found) for found in results],
        }
        args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
