"""`--dry-run --devices N --kind KIND`: what a stage would take on several devices, in memory, sending and time."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from blip3_lite import Blip3, Blip3Config
from train_activations import (
    checkpointed_numbers,
    kept_numbers,
    loss_bytes,
    num_groups,
    passing_numbers,
)
from train_config import PlanRequest, StageConfig
from train_operations import Operations, PackShape, pack_operations
from trainer_lite import DEVICE_KINDS, DeviceKind, Sharding, group_parameters, sent_bytes, state_bytes, step_seconds

_GIB = 2**30
_DOCUMENT_TOKENS = 2048
"""Length of a document where neither data nor the recipe says one."""
_USED_SHARE = 0.9
"""A plan fits if it takes no more than this of a device's memory: context, NCCL and fragments take the rest [ours]."""
_WEIGHTS = "fp32"
"""What our engines hold; `precision` bf16 is autocast's."""
MOMENTS_OF = {"adamw": 2, "muon": 1}
"""Numbers that a rule keeps of each parameter: first and second moment, or momentum."""
_SHARDINGS: tuple[tuple[str, dict[str, object]], ...] = (
    ("ZeRO-0, or DDP", {"stage": 0}),
    ("ZeRO-1", {"stage": 1}),
    ("ZeRO-2", {"stage": 2}),
    ("  optimiser on the host", {"stage": 2, "offloads_optimizer": True}),
    ("ZeRO-3", {"stage": 3}),
    ("  optimiser on the host", {"stage": 3, "offloads_optimizer": True}),
    ("  weights there too", {"stage": 3, "offloads_optimizer": True, "offloads_parameters": True}),
)


@dataclass(frozen=True)
class Packs:
    """What the plan knows of the data: the shapes of packs, and how it came by them."""

    shapes: Sequence[PackShape]
    most_tiles: int
    origin: str

    @property
    def mean_tokens(self) -> float:
        """Tokens of a pack."""
        return sum(shape.num_tokens for shape in self.shapes) / len(self.shapes)


def assumed_packs(cfg: Blip3Config, stage: StageConfig, image_share: float) -> Packs:
    """Full packs of equal documents, so much of them image tokens, where there is no data to look at."""
    latents = cfg.connector.num_latents
    groups = int(image_share * stage.max_tokens) // latents
    tiles = groups * (cfg.tiling.max_tiles if cfg.tiling.kind == "anyres_fixed" else 1)
    if stage.max_tiles is not None:
        tiles = min(tiles, stage.max_tiles)
    groups = num_groups(cfg, tiles) if tiles else 0
    count = max(1, stage.max_tokens // _DOCUMENT_TOKENS)
    if stage.max_samples is not None:
        count = stage.max_samples * (2 if stage.objective == "preference" else 1)
    lengths = [stage.max_tokens // count + (place < stage.max_tokens % count) for place in range(count)]
    shape = PackShape(tuple(lengths), tiles, groups, stage.max_tokens - groups * latents)
    origin = (
        f"assumed, for want of --data: full packs of {count} documents of {lengths[-1]:,} tokens, {tiles} tiles, "
        f"{image_share:.0%} of the tokens an image's (--image-share), all others targets"
    )
    return Packs([shape], tiles, origin)


def plan_lines(model: Blip3, cfg: Blip3Config, stage: StageConfig, packs: Packs, request: PlanRequest) -> list[str]:
    """Lines on memory, sending and time. `model` may be on the meta device, its freeze plan and adapters applied."""
    kind = DEVICE_KINDS[request.kind]
    number_bytes = 4 if stage.train.precision == "fp32" else 2
    sizes = _ModelSizes.of(model, stage)
    kept, checkpointed = (
        activation_bytes(model, cfg, stage, packs.most_tiles, is_checkpointed) for is_checkpointed in (False, True)
    )
    loss = loss_bytes(cfg, stage.max_tokens, number_bytes, trains_head=model.lang_model.head_weight.requires_grad)
    copies = copy_bytes(model, stage)
    lines = [
        f"plan for {request.devices} × {kind.name}: {kind.memory_bytes / _GIB:.1f} GiB and "
        f"{kind.peak_operations_per_s / 1e12:,.0f} Tflop/s (bf16, dense) each; "
        f"{stage.train.accumulation_steps // request.devices} of a step's {stage.train.accumulation_steps} packs "
        "on each, one after the other",
        f"packs: {packs.origin}",
    ]
    if stage.train.precision == "fp32":
        lines.append("This recipe computes in fp32, which does not reach that peak: add --precision bf16 to plan that.")
    lines += ["", *_memory_lines(sizes, request, kind, (kept, checkpointed), loss, copies)]
    operations = _mean_operations(model, stage, packs)
    lines += ["", *_operation_lines(operations, stage, packs, request)]
    return [*lines, "", *_time_lines(sizes, stage, operations, packs, request, kind)]


@dataclass(frozen=True)
class _ModelSizes:
    trained: list[int]
    frozen: list[int]
    num_moments: int
    num_forward_only: int

    @classmethod
    def of(cls, model: Blip3, stage: StageConfig) -> "_ModelSizes":
        named = dict(model.named_parameters())
        groups = group_parameters(named, stage.train.optimizer)
        # In front of whatever is trained first: the tower, and the connector where both are frozen.
        in_front = 0
        for part in (model.vision_encoder, model.vision_tokenizer):
            if any(parameter.requires_grad for parameter in part.parameters()):
                break
            in_front += sum(parameter.numel() for parameter in part.parameters())
        return cls(
            [parameter.numel() for parameter in named.values() if parameter.requires_grad],
            [parameter.numel() for parameter in named.values() if not parameter.requires_grad],
            sum(MOMENTS_OF[group.kind] * named[name].numel() for group in groups for name in group.names),
            in_front,
        )


def model_parts(model: Blip3) -> dict[str, nn.Module]:
    """The three parts by what they are called here, in the order in which a gradient would reach them last."""
    return {
        "vision tower": model.vision_encoder,
        "connector": model.vision_tokenizer,
        "language model": model.lang_model,
    }


def activation_bytes(model: Blip3, cfg: Blip3Config, stage: StageConfig, tiles: int, is_checkpointed: bool) -> int:
    """Estimate the bytes that a full pack keeps for the backward pass, head and loss apart."""
    number_bytes = 4 if stage.train.precision == "fp32" else 2
    numbers = (checkpointed_numbers if is_checkpointed else kept_numbers)(cfg, stage.max_tokens, tiles)
    total, has_graph = 0, False
    for name, part in model_parts(model).items():
        has_graph = has_graph or any(parameter.requires_grad for parameter in part.parameters())
        if has_graph:
            total += numbers[name]
    # A frozen tower has finished before anything else begins to keep.
    passing = 0 if stage.trains_tower else passing_numbers(cfg, tiles)
    return max(total, passing) * number_bytes


def copy_bytes(model: Blip3, stage: StageConfig) -> int:
    """Bytes of the matrices in bf16 that autocast makes of fp32 ones, for as long as the forward pass lasts.

    With or without checkpointing: it keeps those of trained matrices for use again, and the backward pass needs those
    of frozen ones that a gradient passes. Under ZeRO-3 they are of whole matrices.
    """
    if stage.train.precision == "fp32":
        return 0
    total, has_graph = 0, False
    for part in model_parts(model).values():
        has_graph = has_graph or any(parameter.requires_grad for parameter in part.parameters())
        linears = (module for module in part.modules() if isinstance(module, nn.Linear))
        total += sum(linear.weight.numel() for linear in linears) if has_graph else 0
    return 2 * total


def _sharding(settings: dict[str, object], request: PlanRequest) -> Sharding:
    return Sharding(num_devices=request.devices, weights=_WEIGHTS, **settings)  # pyright: ignore[reportArgumentType]


def _memory_lines(
    sizes: _ModelSizes,
    request: PlanRequest,
    kind: DeviceKind,
    activations: tuple[int, int],
    loss: int,
    copies: int,
) -> list[str]:
    columns = ("weights", "masters", "moments", "gradients", "buffers", "host", "sum", "", "checkpointed", "")
    widths = (9, 9, 9, 11, 9, 9, 9, 5, 14, 5)
    limit = _USED_SHARE * kind.memory_bytes
    lines = [
        f"{'memory in GiB a device':<26}"
        + "".join(f"{column:>{width}}" for column, width in zip(columns, widths, strict=True))
    ]
    for name, settings in _SHARDINGS:
        states = state_bytes(sizes.trained, sizes.frozen, _sharding(settings, request), num_moments=sizes.num_moments)
        held = (
            states.parameters,
            states.masters,
            states.moments,
            states.gradients,
            states.bucket + states.gathered,
            states.host,
        )
        cells = [f"{number / _GIB:.1f}" for number in held]
        for kept in activations:
            most = max(states.before_step + kept + loss + copies, states.in_step)
            cells += [f"{most / _GIB:.1f}", "fits" if most <= limit else "–"]
        lines.append(f"{name:<26}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)))
    kept, checkpointed = (number / _GIB for number in activations)
    return [
        *lines,
        f"in each sum: activations of a full pack, {kept:.1f} GiB, or {checkpointed:.1f} with checkpointing; "
        f"head and loss, {loss / _GIB:.1f}; autocast's copies of the weights, {copies / _GIB:.1f}; these are estimates",
        f"It fits if the sum is at most {_USED_SHARE:.0%} of the memory. Host: that of the device's own share.",
        "Asked for by --parallel.engine ddp, zero1, zero2 or zero3; --parallel.offload-optimizer and "
        "--parallel.offload-parameters (on the host); --parallel.recompute (checkpointed).",
    ]


def _mean_operations(model: Blip3, stage: StageConfig, packs: Packs) -> dict[str, Operations]:
    """Of a pack, by part."""
    count = len(packs.shapes)
    found = [pack_operations(model, shape, is_preference=stage.objective == "preference") for shape in packs.shapes]
    sums = {part: sum((operations[part] for operations in found), Operations()) for part in found[0]}
    return {
        part: Operations(total.forward // count, total.backward // count, total.repeated // count)
        for part, total in sums.items()
    }


def _operation_lines(
    operations: dict[str, Operations], stage: StageConfig, packs: Packs, request: PlanRequest
) -> list[str]:
    batches = stage.train.accumulation_steps
    total = sum(operations.values(), Operations())
    columns = ("forward", "backward", "repeated", "share")
    rows = {**operations, "all": total}
    tokens = packs.mean_tokens * batches
    return [
        f"{'operations of a step, 1e12':<26}" + "".join(f"{column:>14}" for column in columns),
        *(
            f"{name:<26}"
            + "".join(f"{number * batches / 1e12:>14,.1f}" for number in (part.forward, part.backward, part.repeated))
            + f"{part.total / total.total:>14.1%}"
            for name, part in rows.items()
        ),
        f"tokens of a step: {tokens:,.0f}, {tokens / request.devices:,.0f} a device; operations a token: "
        f"{total.total / packs.mean_tokens / 1e9:,.1f}e9, {total.repeated / packs.mean_tokens / 1e9:,.1f}e9 more with "
        "checkpointing",
    ]


def _time_lines(
    sizes: _ModelSizes,
    stage: StageConfig,
    operations: dict[str, Operations],
    packs: Packs,
    request: PlanRequest,
    kind: DeviceKind,
) -> list[str]:
    link = request.link_bytes_per_s(kind.devices_per_host, kind.link_bytes_per_s, kind.network_bytes_per_s)
    num_batches = stage.train.accumulation_steps // request.devices
    total = sum(operations.values(), Operations())
    columns = ("all-reduce", "all-gather", "reduce-scatter", "sending", "step", "days", "checkpointed", "days")
    widths = (12, 12, 16, 10, 9, 9, 14, 9)
    lines = [
        f"{'GB sent a device, seconds':<26}"
        + "".join(f"{column:>{width}}" for column, width in zip(columns, widths, strict=True))
    ]
    for name, settings in _SHARDINGS:
        if settings.get("offloads_optimizer"):
            continue
        sent = sent_bytes(
            sum(sizes.trained),
            sum(sizes.frozen),
            _sharding(settings, request),
            num_batches=num_batches,
            num_forward_only=sizes.num_forward_only,
        )
        cells = [f"{sent.get(collective, 0) / 1e9:.1f}" for collective in columns[:3]]
        for repeated in (0, total.repeated):
            computing, sending = step_seconds(
                (total.total + repeated) * num_batches,
                sum(sent.values()),
                kind,
                utilisation=request.utilisation,
                link_bytes_per_s=link,
            )
            step = max(computing, sending)
            cells += [f"{sending:.2f}"] if not repeated else []
            days = step * stage.train.max_steps / 86_400
            cells += [f"{step:.2f}", f"{days:.1f}" if days >= 1 else f"{days:.2f}"]
        lines.append(f"{name:<26}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)))
    tokens = packs.mean_tokens * stage.train.accumulation_steps * stage.train.max_steps
    return [
        *lines,
        f"for {stage.train.max_steps:,} steps, {tokens / 1e9:,.1f} B tokens, at {request.utilisation:.0%} of the peak; "
        f"sending at {link / 1e9:,.0f} GB/s while computing, so that the longer of the two is a step's time",
        "Left out: the optimiser's own time, the data, and what goes to the host and back.",
    ]
