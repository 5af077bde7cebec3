"""`--dry-run`: what a stage would train and on what, without training, a run folder or, but for parts, weights."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from blip3_lite import Blip3, Blip3Config, EncodedSample, Processor, load_tokenizer, read_manifest, spans_of
from blip3_lite.checkpoint import read_config
from blip3_lite.model import undrawn_model
from blip3_lite.opening import is_release
from blip3_lite.presets import xgen_mm_config
from blip3_lite.xgen_mm import detect_kind, xgen_mm_tokenizer
from interleave_data import ImageLimits, Plan, PlannedPack, Size, SkipCounter, SkipSample
from interleave_data.plan import Entry
from train_activations import FORMULAS, kept_numbers, loss_bytes, num_groups, passing_numbers
from train_config import PlanRequest, StageConfig, StageRun
from train_errors import BadInputError
from train_objectives import SamplePair
from train_operations import PackShape
from train_plan import MOMENTS_OF, Packs, assumed_packs, model_parts, plan_lines
from train_stages import freeze
from train_stream import IMAGE_CACHE_BYTES, StageData, StageEncoder, base_view_processor, plan_config
from trainer_lite import group_parameters

_PACKS, _MEASURED = 16, 300
"""So many packs are planned, or those of so many samples."""
_SHOWN, _CHARACTERS = 3, 2000
_TILES_PER_CALL = 64
_MIB = 2**20


@dataclass(frozen=True)
class PartSize:
    """One part of the model: numbers of parameters and bytes."""

    name: str
    num_parameters: int
    num_trained: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes + self.activation_bytes


def shell_config(path: Path) -> Blip3Config:
    """The model's config at `path`: of a checkpoint of ours or a release of xGen-MM.

    Raises:
        ValueError: it is neither.
    """
    if is_release(path):
        return xgen_mm_config(detect_kind(path))
    read_manifest(path, verify=False)
    return read_config(path).model


def shell_of(path: Path, limits: ImageLimits) -> tuple[Blip3, Processor]:
    """The model at `path` without its weights, and its processor.

    Raises:
        ValueError: it is neither a checkpoint of ours nor a release of xGen-MM.
    """
    cfg = shell_config(path)
    if is_release(path):
        tokenizer = xgen_mm_tokenizer(path / "tokenizer.json")
    else:
        tokenizer = load_tokenizer(path / read_config(path).tokenizer_file)
    return undrawn_model(cfg), Processor(cfg, tokenizer, limits, IMAGE_CACHE_BYTES)


def part_sizes(model: Blip3, stage: StageConfig) -> list[PartSize]:
    """Sizes of the three parts under the freeze plan, which `freeze` must have applied; activations left out."""
    named = dict(model.named_parameters())
    kinds = {name: group.kind for group in group_parameters(named, stage.train.optimizer) for name in group.names}
    names = {id(parameter): name for name, parameter in named.items()}
    sizes: list[PartSize] = []
    for part, module in model_parts(model).items():
        held = list(module.parameters())
        trained = [parameter for parameter in held if parameter.requires_grad]
        sizes.append(
            PartSize(
                part,
                num_parameters=sum(parameter.numel() for parameter in held),
                num_trained=sum(parameter.numel() for parameter in trained),
                weight_bytes=sum(parameter.nbytes for parameter in held),
                gradient_bytes=sum(parameter.nbytes for parameter in trained),
                optimizer_bytes=sum(
                    parameter.nbytes * MOMENTS_OF[kinds[names[id(parameter)]]] for parameter in trained
                ),
            )
        )
    return sizes


def with_activations(
    sizes: Sequence[PartSize], cfg: Blip3Config, stage: StageConfig, tiles: int, tiles_a_call: int
) -> list[PartSize]:
    """Add what a pack of the whole budget keeps; a part behind a trained one keeps it too, for gradients pass it."""
    number_bytes = 4 if stage.train.precision == "fp32" else 2
    numbers = kept_numbers(cfg, stage.max_tokens, tiles)
    has_graph = False
    found: list[PartSize] = []
    for size in sizes:
        has_graph = has_graph or size.num_trained > 0
        kept = numbers[size.name] * number_bytes if has_graph else 0
        if size.name == "vision tower" and not has_graph:
            kept = passing_numbers(cfg, min(tiles, tiles_a_call)) * number_bytes
        if size.name == "language model":
            kept += loss_bytes(cfg, stage.max_tokens, number_bytes, trains_head=stage.trains_head)
        found.append(replace(size, activation_bytes=kept))
    return found


@dataclass(frozen=True)
class Ahead:
    """The first packs, as planned from sizes alone."""

    plan: Plan
    packs: list[PlannedPack]

    @property
    def drawn(self) -> list[Entry]:
        """All samples that were drawn. Of the packed ones alone more are long than will be later."""
        return [*(entry for pack in self.packs for entry in pack.entries), *self.plan.waiting]

    @property
    def pack_tokens(self) -> float:
        """Tokens of a pack, on average."""
        return sum(pack.size.tokens for pack in self.packs) / len(self.packs)

    def samples_a_pack(self) -> dict[int, float]:
        """By source: as many of its samples as were drawn for the tokens of one pack."""
        drawn = self.drawn
        packs = sum(entry.size.tokens for entry in drawn) / self.pack_tokens
        return {source: count / packs for source, count in Counter(entry.draw.source for entry in drawn).items()}

    def mean_size(self, source: int | None = None) -> tuple[float, float]:
        """Tokens and tiles of a sample, of one source or any."""
        sizes = [entry.size for entry in self.drawn if source in (None, entry.draw.source)]
        count = len(sizes) or 1
        return sum(size.tokens for size in sizes) / count, sum(size.tiles for size in sizes) / count


def look_ahead(stage: StageConfig, data: StageData, encoder: StageEncoder, skips: SkipCounter) -> Ahead:
    """Plan the first packs.

    Raises:
        TooManySkips: the data is worse than its limits allow.
        BadInputError: there is not one pack.
    """
    plan = Plan(data.sources, encoder.measure, plan_config(stage, data, stage.train.seed))
    packs: list[PlannedPack] = []
    num_measured = 0
    while len(packs) < _PACKS and num_measured < _MEASURED and (pack := next(plan, None)) is not None:
        num_measured += len(pack.entries)
        for hole in pack.holes:
            skips.skip(hole.source, hole.skip, hole.follows_good)
        for entry in pack.entries:
            skips.keep(data.sources[entry.draw.source].name)
        packs += [pack] if pack.entries else []
    if not packs:
        raise BadInputError("data: expected at least one sample that can be used, got none; see tools/preview.py")
    return Ahead(plan, packs)


def describe_plan(recipe: str, config: StageRun, model: Blip3, request: PlanRequest) -> list[str]:
    """Lines on parameters of a stage and on what it takes on several devices, from its recipe alone.

    Raises:
        ValueError: settings do not fit each other.
    """
    stage = config.stage
    with model.device:
        freeze(model, stage)
    cfg = model.cfg.with_base_views() if stage.views == "base" else model.cfg
    return [
        f"dry run of {recipe}: nothing is trained, no run folder is made",
        "",
        *_parameter_lines(part_sizes(model, stage)),
        "",
        *plan_lines(model, cfg, stage, assumed_packs(cfg, stage, request.image_share), request),
    ]


def _planned_packs(ahead: Ahead, cfg: Blip3Config, stage: StageConfig, most_tiles: int) -> Packs:
    """The shapes of the first packs; every text token counts as a target, for none is encoded."""
    shapes: list[PackShape] = []
    for pack in ahead.packs:
        lengths = [entry.size.tokens for entry in pack.entries]
        if stage.objective == "preference":
            lengths = [half for length in lengths for half in (length // 2, length - length // 2)]
        tiles = pack.size.tiles
        groups = num_groups(cfg, tiles) if tiles else 0
        targets = max(0, sum(lengths) - groups * cfg.connector.num_latents)
        shapes.append(PackShape(tuple(lengths), tiles, groups, targets))
    origin = f"the first {len(shapes)} of the data; every text token is taken for a target"
    return Packs(shapes, most_tiles, origin)


def describe_stage(
    recipe: str,
    config: StageRun,
    model: Blip3,
    processor: Processor,
    data: StageData,
    request: PlanRequest | None = None,
) -> list[str]:
    """Lines on parameters, memory, steps and first samples of a stage, and on several devices where that is asked for.

    Raises:
        ValueError: settings or data do not fit each other.
        TooManySkips: the data is worse than its limits allow.
    """
    stage = config.stage
    # Adapters are made where the model is.
    with model.device:
        freeze(model, stage)
    if stage.views == "base":
        processor = base_view_processor(processor)
    encoder = StageEncoder(processor, stage.objective, is_collated=False)
    skips = SkipCounter(data.skip_limits)
    ahead = look_ahead(stage, data, encoder, skips)
    tiles = max(pack.size.tiles for pack in ahead.packs) if stage.max_tiles is None else stage.max_tiles
    tiles_a_call = _TILES_PER_CALL if config.feature_cache_mb > 0 else tiles
    sizes = with_activations(part_sizes(model, stage), processor.cfg, stage, tiles, tiles_a_call)
    plan: list[str] = []
    if request is not None:
        packs = _planned_packs(ahead, processor.cfg, stage, tiles)
        plan = [*plan_lines(model, processor.cfg, stage, packs, request), ""]
    return [
        f"dry run of {recipe}: nothing is trained, no run folder is made",
        "",
        *_parameter_lines(sizes),
        "",
        *_memory_lines(config, data, sizes, processor.cfg, ahead, tiles),
        "",
        *_step_lines(stage, data, ahead, skips),
        "",
        *plan,
        *_sample_lines(ahead, encoder, stage),
    ]


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _parameter_lines(sizes: Sequence[PartSize]) -> list[str]:
    total, trained = (sum(numbers) for numbers in zip(*((s.num_parameters, s.num_trained) for s in sizes), strict=True))
    return [
        f"{'parameters':<24}{'all':>16}{'trained':>16}",
        *(f"{size.name:<24}{size.num_parameters:>16,}{size.num_trained:>16,}" for size in sizes),
        f"{'all':<24}{total:>16,}{trained:>16,}",
    ]


def _memory_lines(
    config: StageRun, data: StageData, sizes: Sequence[PartSize], cfg: Blip3Config, ahead: Ahead, tiles: int
) -> list[str]:
    stage = config.stage
    columns = ("weights", "gradients", "optimiser", "activations", "sum")
    rows: dict[str, tuple[int, ...]] = {
        size.name: (
            size.weight_bytes,
            size.gradient_bytes,
            size.optimizer_bytes,
            size.activation_bytes,
            size.total_bytes,
        )
        for size in sizes
    }
    rows["all"] = tuple(sum(column) for column in zip(*rows.values(), strict=True))
    lines = [f"{'memory in MiB':<24}" + "".join(f"{column:>13}" for column in columns)]
    lines += [f"{name:<24}" + "".join(f"{size / _MIB:>13,.1f}" for size in row) for name, row in rows.items()]
    caches = 0
    if not stage.trains_tower and config.feature_cache_mb > 0:
        tile_bytes = cfg.vision.num_patches * cfg.vision.width * 4
        num_tiles = sum(ahead.mean_size(n)[1] * len(source) for n, source in enumerate(data.sources))
        kept = min(config.feature_cache_mb * _MIB, int(num_tiles) * tile_bytes)
        said = f"if no picture comes again, {num_tiles:,.0f} tiles of {tile_bytes:,} bytes; at most "
        said += f"{config.feature_cache_mb:,} MiB"
        lines.append(f"{'kept features':<24}{'':>52}{kept / _MIB:>13,.1f}  {said}")
        caches += kept
    if stage.num_workers == 0:
        lines.append(f"{'kept tiles, at most':<24}{'':>52}{IMAGE_CACHE_BYTES / _MIB:>13,.1f}")
        caches += IMAGE_CACHE_BYTES
    lines.append(f"{'with these':<24}{'':>52}{(rows['all'][-1] + caches) / _MIB:>13,.1f}")
    number = "4 bytes" if stage.train.precision == "fp32" else "2 bytes (bf16)"
    lines.append(
        f"Activations are an estimate: what the backward pass needs of a pack of {stage.max_tokens:,} tokens and "
        f"{_count(tiles, 'tile')}, {number} a number."
    )
    for size in sizes:
        formula = FORMULAS[size.name]
        if size.name == "vision tower" and not size.num_trained:
            at_most = f"{_TILES_PER_CALL} tiles at most" if config.feature_cache_mb > 0 else "tiles"
            formula = f"nothing is kept; in use {at_most} × patches × max(6 width, 2 width + 2 mlp)"
        if size.name == "language model":
            formula += " + head and loss: a chunk of logits, the targets' rows, the gradient of the head"
        lines.append(f"  {size.name}: {formula if size.activation_bytes else 'none, as nothing before it is trained'}")
    return lines


def _step_lines(stage: StageConfig, data: StageData, ahead: Ahead, skips: SkipCounter) -> list[str]:
    batches, tokens = stage.train.accumulation_steps, ahead.pack_tokens
    samples = ahead.samples_a_pack()
    in_all = sum(samples.values()) * batches
    lines = [
        f"tokens a step: {stage.max_tokens * batches:,} at most ({batches} × {stage.max_tokens:,}); of the first "
        f"{len(ahead.packs)} packs on average {tokens * batches:,.0f} ({tokens / stage.max_tokens:.1%}), "
        f"{in_all:.1f} samples, {ahead.mean_size()[1] * in_all:.1f} tiles"
        + (f"; a pack ends at {_count(stage.max_samples, 'sample')}" if stage.max_samples else ""),
        f"{'source':<24}{'samples':>12}{'tokens each':>14}{'tiles each':>12}{'a step':>10}{'steps an epoch':>16}",
    ]
    for number, source in enumerate(data.sources):
        a_step = samples.get(number, 0.0) * batches
        mean_tokens, mean_tiles = ahead.mean_size(number)
        steps = f"{len(source) / a_step:,.1f}" if a_step else "–"
        lines.append(
            f"{source.name:<24}{len(source):>12,}{mean_tokens:>14,.1f}{mean_tiles:>12,.1f}{a_step:>10.1f}{steps:>16}"
        )
    epochs = [
        f"{stage.train.max_steps * samples.get(number, 0.0) * batches / len(source):.2f} of {source.name}"
        for number, source in enumerate(data.sources)
    ]
    lines.append(f"{stage.train.max_steps:,} steps are these epochs: {', '.join(epochs)}")
    if left_out := skips.by_reason():
        lines.append("left out so far: " + ", ".join(f"{reason} {count}" for reason, count in left_out.items()))
    return lines


def _sample_lines(ahead: Ahead, encoder: StageEncoder, stage: StageConfig) -> list[str]:
    """The first samples as the model will see them."""
    lines = ["first samples; the loss is taken of what stands between « and »"]
    limit = Size(stage.max_tokens, stage.max_tiles or 1 << 31)
    for entry in [entry for pack in ahead.packs for entry in pack.entries][:_SHOWN]:
        try:
            sample = ahead.plan.read(entry)
            encoded = encoder.encode(sample, limit if entry.is_cut else None)
        except SkipSample as skip:
            lines.append(f"left out: {skip}")
            continue
        for part in [encoded.chosen, encoded.rejected] if isinstance(encoded, SamplePair) else [encoded]:
            lines.append(
                f"{sample.source}/{sample.id}: {part.length:,} tokens, {part.num_targets:,} of them learnt, "
                f"{_count(len(part.tiles_per_image), 'image')} in {_count(len(part.tiles), 'tile')}"
            )
            lines.append("  " + _marked(part, encoder.processor))
    return lines


def _marked(sample: EncodedSample, processor: Processor) -> str:
    """The text with marks around what is learnt, and each image as one word."""
    parts: list[str] = []
    num_images = 0
    for span in spans_of(sample, processor):
        if span.kind == "image":
            num_images += 1
            parts.append(f"[image {num_images}: {_count(span.num_tokens, 'token')}, {_count(span.num_tiles, 'tile')}]")
        else:
            text = span.text.replace("\n", "↵")
            parts.append(f"«{text}»" if span.kind == "learnt" else text)
    whole = "".join(parts)
    return whole if len(whole) <= _CHARACTERS else f"{whole[:_CHARACTERS]}… ({len(whole) - _CHARACTERS:,} more)"
