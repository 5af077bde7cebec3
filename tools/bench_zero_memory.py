"""Does the plan's memory model say what processes hold? Tensor bytes by part of real DeepSpeed runs beside the plan.

    uv run tools/bench_zero_memory.py [--worlds 1 2 4] [--stages 0 1 2 3] [--weights fp32 bf16] [--out FILE]

Starts 1, 2 and 4 gloo processes on this machine's CPU for each of two models (frozen vision tower, trained connector
and language model) under each ZeRO stage, weights in fp32 or bf16, and makes two steps of two batches each. In each
process all live tensors are found (as the garbage collector sees them, and as the engine names them); of each part the
bytes of their storages are added up, each storage once:

- each at its most, looked at in the middle of every backward pass and behind it: weights, masters, moments, gradients,
  bucket; what stage 3 has gathered in the middle is apart;
- behind the step: what is held between steps.

They are compared with `trainer_lite.state_bytes`, and bytes given to collectives in the second step, by a ring's rule,
with `trainer_lite.sent_bytes`. `other` is what no part claims, and counts. Resident bytes, grown since before the model
was made, stand beside: they hold activations, code and freed memory too, so they are no measure of the plan.

Exit status 1 if a sum is off by more than 10 %. Needs deepspeed, g++ and ninja. Buckets are small here (--bucket), so
that what they weigh does not hide the rest; no parameter is kept gathered.
"""

import argparse
import gc
import importlib
import importlib.metadata
import json
import logging
import multiprocessing
import os
import platform
import queue
import socket
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import replace
from torch import Tensor, nn

from anyres_tiler import TilingConfig
from bench_index import processor_name
from blip3_lite import Blip3, Blip3Config, PackedBatch
from perceiver_resampler import ResamplerConfig
from phi3_lite import Phi3Config
from siglip_lite import SiglipVisionConfig
from trainer_lite import Sharding, sent_bytes, state_bytes

MOST_OFF = 0.1
_TOKENS, _BATCHES, _TIMEOUT_S = 64, 2, 120.0
_COLLECTIVES = {
    "all_reduce": "all-reduce",
    "all_gather_into_tensor": "all-gather",
    "all_gather": "all-gather",
    "reduce_scatter_tensor": "reduce-scatter",
    "all_to_all_single": "reduce-scatter",
    "reduce": "reduce",
    "broadcast": "broadcast",
}
_MASTERS = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat", "fp32_groups")
"""Where DeepSpeed's optimisers keep them, by stage and type of weights."""
_PARTS = ("parameters", "masters", "moments", "gradients", "bucket")


def models() -> dict[str, Blip3Config]:
    """Two sizes, 1.5 M and 13 M numbers."""
    small = Blip3Config(
        vision=SiglipVisionConfig(
            image_px=32, patch_px=8, width=96, num_layers=2, num_heads=4, mlp_width=256, use_head=False
        ),
        connector=ResamplerConfig(dim=96, dim_out=128, depth=2, num_heads=2, head_dim=32, num_latents=4),
        lm=Phi3Config(vocab_size=1031, width=128, num_layers=4, num_heads=4, num_kv_heads=4, mlp_width=384),
        tiling=TilingConfig(tile_px=32, kind="base"),
    )
    return {
        "small": small,
        "larger": replace(
            small,
            vision=replace(small.vision, width=192, mlp_width=512, num_layers=4),
            connector=replace(small.connector, dim=192, dim_out=320),
            lm=replace(small.lm, vocab_size=4099, width=320, num_layers=8, mlp_width=864),
        ),
    }


class _Loss(nn.Module):
    """The model with its loss on top, as an engine calls it."""

    seen: Tensor
    """What comes out of the language model's first layer, where the backward pass is almost through."""

    def __init__(self, model: Blip3) -> None:
        super().__init__()
        self.model = model
        model.lang_model.model.layers[0].register_forward_hook(self._see)

    def _see(self, module: nn.Module, inputs: object, output: Tensor) -> None:
        self.seen = output

    def forward(self, batch: PackedBatch) -> Tensor:
        return self.model.loss_sum(batch).float() / batch.num_targets


def _batch(cfg: Blip3Config) -> PackedBatch:
    ids = torch.randint(0, cfg.lm.vocab_size, (_TOKENS,))
    side = cfg.vision.image_px
    return PackedBatch(
        sample_ids=["0"],
        ids=ids,
        targets=ids.roll(-1),
        positions=torch.arange(_TOKENS),
        cu_seqlens=torch.tensor([0, _TOKENS], dtype=torch.int32),
        image_index=torch.arange(cfg.connector.num_latents),
        tiles=torch.randint(0, 256, (1, 3, side, side), dtype=torch.uint8),
        valid=torch.ones(1, cfg.vision.num_patches, dtype=torch.bool),
        tiles_per_image=(1,),
    )


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested containers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes by address."""
    kept = (tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu")
    return {storage.data_ptr(): storage.nbytes() for storage in kept if storage.nbytes() > 0}


def _live() -> dict[int, int]:
    """The storages of all tensors that came since `gc.freeze`."""
    gc.collect()
    with warnings.catch_warnings():
        # Asking every object for its class wakes deprecated ones.
        warnings.simplefilter("ignore")
        return _storages(found for found in gc.get_objects() if isinstance(found, Tensor))


def held_bytes(engine: Any) -> dict[str, int]:
    """Bytes by part, each storage once; `other`: of tensors that belong to none."""
    wrapper = engine.optimizer
    inner = getattr(wrapper, "optimizer", wrapper)
    parameters: list[Any] = list(engine.module.parameters())
    masters = list(_tensors([getattr(wrapper, name, []) for name in _MASTERS]))
    gradients = [getattr(holder, "grad", None) for holder in (*parameters, *masters)]
    gradients += [getattr(parameter, "grad_accum", None) for parameter in parameters]
    gradients += [
        getattr(wrapper, name, None)
        for name in ("averaged_gradients", "all_grad_tensors", "grad_partitions_flat_buffer")
    ]
    parts: dict[str, Iterable[Tensor]] = {
        "parameters": _tensors([(each.data, getattr(each, "ds_tensor", None)) for each in parameters]),
        "masters": masters,
        "moments": _tensors([list(state.values()) for state in inner.state.values()]),
        # Gradients that are under way lie in it.
        "bucket": _tensors([bucket.buffer for bucket in getattr(wrapper, "ipg_buckets", {}).values()]),
        "gradients": _tensors(gradients),
    }
    seen: set[int] = set()
    found: dict[str, int] = {}
    for name, tensors in parts.items():
        storages = _storages(tensors)
        found[name] = sum(size for place, size in storages.items() if place not in seen)
        seen |= storages.keys()
    found["other"] = sum(size for place, size in _live().items() if place not in seen)
    return found


def _count_sent(sent: dict[str, int], num_devices: int) -> None:
    """Have torch's collectives add up what a ring sends for them."""
    import torch.distributed as dist

    def counting(name: str) -> Any:
        plain = getattr(dist, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            sizes = [tensor.nbytes for tensor in _tensors([*args, *kwargs.values()])]
            # The larger side is the whole; a list is the whole in pieces.
            whole = sum(sizes[:-1]) if name == "all_gather" else max(sizes, default=0)
            kind = _COLLECTIVES[name]
            times = 2 if kind == "all-reduce" else 1
            sent[kind] = sent.get(kind, 0) + times * whole * (num_devices - 1) // num_devices
            return plain(*args, **kwargs)

        return call

    for name in _COLLECTIVES:
        setattr(dist, name, counting(name))


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _engine(deepspeed: Any, case: dict[str, Any]) -> tuple[Any, list[list[int]]]:
    """DeepSpeed's engine of a case; numbers of each trained tensor, and of each frozen one."""
    torch.manual_seed(0)
    model = Blip3(models()[case["model"]])
    model.vision_encoder.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    numels = [[p.numel() for p in model.parameters() if p.requires_grad == wanted] for wanted in (True, False)]
    engine, *_ = deepspeed.initialize(
        model=_Loss(model),
        optimizer=torch.optim.AdamW(trained, lr=1e-4, fused=True),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": _BATCHES,
            "bf16": {"enabled": case["weights"] == "bf16"},
            "zero_optimization": {
                "stage": case["stage"],
                "reduce_bucket_size": case["bucket_numbers"],
                "stage3_param_persistence_threshold": 0,
            },
            "zero_allow_untested_optimizer": True,
        },
    )
    return engine, numels


def _two_steps(engine: Any, sent: dict[str, int]) -> dict[str, dict[str, int]]:
    """Bytes by part at the moments of the second step; `sent` then holds what that step has sent."""
    batch = _batch(engine.module.model.cfg)
    moments: list[dict[str, int]] = []
    in_backward: list[dict[str, int]] = []
    held: dict[str, dict[str, int]] = {}

    def look(*_: object) -> None:
        in_backward.append(held_bytes(engine))

    for _ in range(2):
        sent.clear()
        moments.clear()
        in_backward.clear()
        for _ in range(_BATCHES):
            loss = engine(batch)
            engine.module.seen.register_hook(look)
            engine.backward(loss)
            moments.append(held_bytes(engine))
            engine.step()
        held["between_steps"] = held_bytes(engine)
    most = {name: max(moment[name] for moment in moments) for name in moments[0]}
    most["bucket"] = max(moment["bucket"] for moment in (*moments, *in_backward))
    held["before_step"] = most
    held["gathered"] = {"parameters": max(moment["parameters"] for moment in in_backward) - most["parameters"]}
    return held


def _process(rank: int, case: dict[str, Any], port: int, results: Any) -> None:
    """One rank: make the engine, make two steps, say what is held."""
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(case["world_size"]),
    }
    import torch.distributed as dist

    # An optional dependency; imported by whoever forks this process.
    deepspeed: Any = importlib.import_module("deepspeed")
    torch.set_num_threads(1)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    resident = _resident_bytes()
    sent: dict[str, int] = {}
    # DeepSpeed takes some of torch's functions aside when it starts.
    _count_sent(sent, case["world_size"])
    deepspeed.init_distributed("gloo")
    engine, numels = _engine(deepspeed, case)
    held = _two_steps(engine, sent)
    grown = _resident_bytes() - resident
    results.put({"rank": rank, "numels": numels, "held": held, "sent": dict(sent), "resident_bytes_grown": grown})
    results.close()
    results.join_thread()
    dist.barrier()
    dist.destroy_process_group()
    # DeepSpeed's own end can abort, and there is nothing left to do.
    os._exit(0)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_case(case: dict[str, Any]) -> list[dict[str, Any]]:
    """What each rank reports.

    Raises:
        TimeoutError: not all of them did; their errors stand on standard error.
    """
    # Forked, so that torch and deepspeed are imported once.
    context = multiprocessing.get_context("fork")
    results, port = context.Queue(), _free_port()
    processes = [
        context.Process(target=_process, args=(rank, case, port, results)) for rank in range(case["world_size"])
    ]
    for process in processes:
        process.start()
    try:
        return sorted((results.get(timeout=_TIMEOUT_S) for _ in processes), key=lambda report: report["rank"])
    except queue.Empty:
        raise TimeoutError(f"{case}: expected a report of every rank within {_TIMEOUT_S} s, got none") from None
    finally:
        for process in processes:
            process.join(10)
            process.kill()


def planned(case: dict[str, Any], numels: list[list[int]]) -> dict[str, Any]:
    """What the plan says of the same."""
    sharding = Sharding(
        stage=case["stage"],
        num_devices=case["world_size"],
        weights=case["weights"],
        bucket_numbers=case["bucket_numbers"],
        persistent_numbers=0,
    )
    trained, frozen = numels
    states = state_bytes(trained, frozen, sharding)
    parts = {name: getattr(states, name) for name in _PARTS}
    sent = sent_bytes(
        sum(trained), sum(frozen), sharding, num_batches=case["num_batches"], num_forward_only=sum(frozen)
    )
    # Nothing is gathered at the moments that are compared.
    sums = {"before_step": states.before_step - states.gathered, "between_steps": states.between_steps}
    return {"held": parts, "sums": sums, "gathered": states.gathered, "sent": sent}


def compare(case: dict[str, Any], reports: list[dict[str, Any]]) -> dict[str, Any]:
    """Plan and measurement of a case side by side; shares are of the rank that is furthest off."""
    plan = planned(case, reports[0]["numels"])

    def off(moment: str) -> float:
        sums = [sum(report["held"][moment].values()) for report in reports]
        return max((total / plan["sums"][moment] - 1 for total in sums), key=abs)

    sent = [sum(report["sent"].values()) for report in reports]
    wanted = sum(plan["sent"].values())
    return {
        **case,
        "planned": plan,
        "measured": [{key: report[key] for key in ("held", "sent", "resident_bytes_grown")} for report in reports],
        "numels": reports[0]["numels"],
        "off_before_step": off("before_step"),
        "off_between_steps": off("between_steps"),
        "off_sent": max((total / wanted - 1 for total in sent), key=abs) if wanted else 0.0,
    }


def _say(row: dict[str, Any]) -> None:
    held = row["measured"][0]["held"]["before_step"]
    cells = " ".join(f"{name} {held[name] / 1e6:.2f}/{size / 1e6:.2f}" for name, size in row["planned"]["held"].items())
    grown = max(report["resident_bytes_grown"] for report in row["measured"]) / 1e6
    gathered = max(report["held"]["gathered"]["parameters"] for report in row["measured"]) / 1e6
    print(
        f"{row['model']:<7}{row['weights']} ZeRO-{row['stage']} × {row['world_size']}: measured/planned MB {cells}, "
        f"other {held['other'] / 1e6:.2f}; off {row['off_before_step']:+.1%} before a step, "
        f"{row['off_between_steps']:+.1%} between, sent {row['off_sent']:+.1%}; resident +{grown:.0f} MB"
        + (f", gathered in the middle {gathered:.2f}" if gathered else ""),
        flush=True,
    )


def main(argv: list[str]) -> int:
    """Run the cases; write rows as JSON, those of other worlds that are in the file kept."""
    parser = argparse.ArgumentParser(prog="bench_zero_memory", description="Planned memory against measured.")
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3], choices=[0, 1, 2, 3])
    parser.add_argument("--weights", nargs="+", default=["fp32"], choices=["fp32", "bf16"])
    parser.add_argument("--bucket", type=int, default=50_000, help="numbers of gradient that are sent together")
    parser.add_argument("--out", type=Path, help="JSON; rows of the same worlds are replaced")
    args = parser.parse_args(argv)
    try:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        importlib.import_module("deepspeed")
    except ImportError:
        print("bench_zero_memory: expected deepspeed, got none; install it with ninja and g++", file=sys.stderr)
        return 2
    # What the imports made is no matter of the runs, and there is a lot of it to go through.
    gc.collect()
    gc.freeze()
    rows: list[dict[str, Any]] = []
    for world_size in args.worlds:
        for weights in args.weights:
            for stage in args.stages:
                for model in models():
                    case = {
                        "model": model,
                        "weights": weights,
                        "stage": stage,
                        "world_size": world_size,
                        "bucket_numbers": args.bucket,
                        "num_batches": _BATCHES,
                    }
                    rows.append(compare(case, run_case(case)))
                    _say(rows[-1])
                    # At once, as a later case can fail.
                    if args.out is not None:
                        _write(args.out, rows)
    worst = max(abs(row[name]) for row in rows for name in ("off_before_step", "off_between_steps"))
    print(f"furthest off: {worst:.1%}")
    return int(worst > MOST_OFF)


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    versions = {name: importlib.metadata.version(name) for name in ("torch", "deepspeed")}
    machine = {"processor": processor_name(), "cores": os.cpu_count(), "python": platform.python_version(), **versions}
    if path.exists():
        done = {(row["world_size"], row["weights"], row["stage"], row["model"]) for row in rows}
        old = json.loads(path.read_text())["rows"]
        rows = [
            row for row in old if (row["world_size"], row["weights"], row["stage"], row["model"]) not in done
        ] + rows
    rows = sorted(rows, key=lambda row: (row["model"], row["weights"], row["stage"], row["world_size"]))
    path.write_text(json.dumps({"machine": machine, "rows": rows}) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
