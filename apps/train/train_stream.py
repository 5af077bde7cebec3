"""A stage's batches: where its samples come from, how they are encoded and packed, and the stream the loop reads."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import msgspec
import torch

from blip3_lite import EncodedSample, FeatureCache, PackedBatch, Processor, collate
from blip3_lite.batch import IGNORE_INDEX
from interleave_data import (
    Encoder,
    ImageLimits,
    PlanConfig,
    PreferenceSample,
    RecordSource,
    Sample,
    Size,
    SkipCounter,
    SkipLimits,
    SkipReason,
    SkipSample,
    Source,
    Stream,
    load_data_file,
    open_sources,
)
from train_config import StageConfig
from train_objectives import PairPack, SamplePair, sample_digest
from train_terminal import say
from trainer_lite import IndexProgress, Processes

IMAGE_CACHE_BYTES = 3 << 27
"""Tiles of images are kept up to this much, so that a repeated picture is decoded and cut once."""

_LOOK_AHEAD = 64
"""Samples that wait to be packed, as far as their number is not bounded."""


@dataclass(frozen=True)
class StageData:
    """Where a stage's samples come from."""

    sources: Sequence[Source]
    ratios: Sequence[float] | None = None
    ratio_unit: Literal["samples", "tokens"] = "samples"
    epochs: Sequence[float | None] | None = None
    group_by_length: bool = False
    skip_limits: SkipLimits = field(default_factory=SkipLimits)
    image_limits: ImageLimits = field(default_factory=ImageLimits)

    @property
    def fingerprint(self) -> str:
        """Changes with any source and with what the image gate lets in; the stream itself compares the ratios."""
        sources = [f"{source.name}={source.fingerprint}" for source in self.sources]
        return " ".join([*sources, f"images={msgspec.json.encode(self.image_limits).decode()}"])


def data_of_file(path: str) -> StageData:
    """The sources that a data file lists, in its ratios and under its limits.

    Raises:
        ValueError: the file or a source of it cannot be used.
    """
    file = load_data_file(path)
    with IndexProgress() as on_index:
        sources = open_sources(file, on_index=on_index)
    return StageData(
        sources,
        [source.ratio for source in file.sources],
        ratio_unit=file.ratio_unit,
        epochs=[source.epochs for source in file.sources],
        group_by_length=file.group_by_length,
        skip_limits=file.skip_limits,
        image_limits=file.image_limits,
    )


class StageEncoder(Encoder[EncodedSample | SamplePair, Any]):
    """Samples as a stage takes them, here or in a worker: sizes, ids and tiles, and packs as arrays.

    `is_collated`: packs come as one batch; else sample by sample, for whoever looks features up before collating.
    """

    def __init__(self, processor: Processor, objective: Literal["next_token", "preference"], is_collated: bool) -> None:
        self.processor, self.objective, self.is_collated = processor, objective, is_collated

    def measure(self, sample: Sample | PreferenceSample, limit: Size | None = None, /) -> Size:
        """Exact size without a pixel."""
        self._check_kind(sample)
        return self.processor.measure(sample, limit)

    def encode(self, sample: Sample | PreferenceSample, limit: Size | None = None, /) -> EncodedSample | SamplePair:
        """Encode a sample or a preference pair."""
        self._check_kind(sample)
        if isinstance(sample, PreferenceSample):
            return SamplePair(*self.processor.encode_preference(sample))
        return self.processor.encode(sample, limit)

    def collate(self, items: Sequence[EncodedSample | SamplePair], ids: Sequence[str], /) -> object:
        """The pack as plain data, without the names, which the stream has; None for an empty one."""
        if not items:
            return None
        samples = [part for item in items for part in ([item] if isinstance(item, EncodedSample) else item.documents)]
        if self.is_collated:
            pack = replace(collate(samples), sample_ids=[]).to_arrays()
            digests = [sample_digest(sample) for sample in samples] if self.objective == "preference" else []
            return {"pack": pack, "digests": digests}
        return [replace(sample, id="", source="").to_arrays() for sample in samples]

    def start_worker(self) -> None:
        """One thread a worker: there are enough workers to keep the cores busy."""
        torch.set_num_threads(1)

    def _check_kind(self, sample: Sample | PreferenceSample) -> None:
        if isinstance(sample, PreferenceSample) != (self.objective == "preference"):
            expected = "a preference pair" if self.objective == "preference" else "a document or conversation"
            raise SkipSample(
                SkipReason.BAD_RECORD, f"expected {expected} for the objective {self.objective}, got another kind"
            )


class PackStream:
    """Batches of the data stream as the model takes them; the state is the data stream's."""

    def __init__(
        self,
        stream: Stream[Any, Any],
        objective: Literal["next_token", "preference"],
        features: FeatureCache | None,
        skips: list[tuple[str, SkipSample]],
        idle: PackedBatch,
    ) -> None:
        """`skips`: where the stream's counter puts what was left out (see `make_stream`). `idle`: for an empty pack."""
        self.stream, self._objective, self.features, self.skips = stream, objective, features, skips
        self.idle = idle

    @property
    def skipped(self) -> Mapping[str, int]:
        """Samples left out so far, by reason."""
        return self.stream.skips.by_reason()

    @property
    def num_truncated(self) -> int:
        """Samples kept so far, but cut to fit."""
        return self.stream.skips.num_truncated

    @property
    def read_again(self) -> Mapping[str, int]:
        """Reads that had to be tried again, by source."""
        return self.stream.skips.retries

    @property
    def waited_s(self) -> float:
        """Seconds spent waiting for packs; the vision tower's share of a batch is not among them."""
        return self.stream.waited_s

    def take_skips(self) -> list[tuple[str, SkipSample]]:
        """What was left out since this was last asked."""
        taken = list(self.skips)
        self.skips.clear()
        return taken

    def __iter__(self) -> Iterator[Any]:
        """Go on from the current state; workers end with the iteration."""
        with self.stream:
            for batch in self.stream:
                ids = list(batch.ids)
                documents: list[EncodedSample] = []
                if not ids:
                    pack, digests = self.idle, []
                elif isinstance(batch.data, dict):
                    pack = PackedBatch.from_arrays({**batch.data["pack"], "sample_ids": ids})
                    digests = list(batch.data["digests"])
                else:
                    documents = [EncodedSample.from_arrays(arrays) for arrays in batch.data]
                    pack = replace(self.collate(documents), sample_ids=ids)
                    is_pairs = self._objective == "preference"
                    digests = [sample_digest(document) for document in documents] if is_pairs else []
                yield PairPack(ids, pack, digests, documents) if self._objective == "preference" else pack

    def collate(self, documents: Sequence[EncodedSample]) -> PackedBatch:
        """Lay documents end to end, with kept features where they are kept."""
        return collate(documents) if self.features is None else self.features.collate(documents)

    def stop_waiting_if(self, should_stop: Callable[[], bool]) -> None:
        """Ask this while a worker lets us wait, and raise `StoppedWaiting` once it says so."""
        self.stream.stop_waiting_if(should_stop)

    def start(self) -> None:
        """Let workers begin."""
        self.stream.start()

    def state_dict(self) -> dict[str, Any]:
        """What has been consumed."""
        return dict(self.stream.state_dict())

    def changes(self, state: dict[str, Any]) -> list[str]:
        """How the data differ from those that a state was saved with, shard by shard."""
        return self.stream.changes(state)

    def load_state_dict(self, state: dict[str, Any], *, accept_data_change: bool = False) -> None:
        """Continue from a saved state; with `accept_data_change` a source that has changed begins anew, and says so."""
        for name, what in self.stream.load_state_dict(state, accept_data_change=accept_data_change).items():
            say(f"{name}: is not as in the checkpoint ({what}), so it is read from its beginning")


def plan_config(stage: StageConfig, data: StageData, seed: int) -> PlanConfig:
    """What decides which samples share a pack."""
    return PlanConfig(
        max_tokens=stage.max_tokens,
        max_tiles=stage.max_tiles,
        max_samples=stage.max_samples,
        look_ahead=_window(stage, data),
        group_by_length=data.group_by_length,
        too_long=stage.too_long,
        ratios=None if data.ratios is None else tuple(data.ratios),
        ratio_unit=data.ratio_unit,
        epochs=None if data.epochs is None else tuple(data.epochs),
        seed=seed,
    )


def _window(stage: StageConfig, data: StageData) -> int:
    """Samples that wait to be packed."""
    if stage.max_samples is None or data.group_by_length:
        return max(_LOOK_AHEAD, stage.max_samples or 1)
    # As they come: the longest of a wider window would always go first, and fill a pack that nothing is lost in anyway.
    return stage.max_samples


def make_stream(
    stage: StageConfig,
    data: StageData,
    processor: Processor,
    features: FeatureCache | None,
    processes: Processes | None = None,
) -> PackStream:
    """The stage's batches; lengths that `tools/index.py` has measured for this processor are taken from the index.

    Of several processes each gets its share, and all count what any of them leaves out. A pack in which nothing is left
    counts as a pack of its step, for any number of processes.

    Raises:
        ValueError: settings and data do not fit each other.
    """
    if features is not None and stage.trains_tower:
        raise ValueError("features: expected none for a stage that trains the vision tower, got a cache; they go stale")
    if stage.views == "base":
        processor = base_view_processor(processor)
    for source in data.sources:
        if isinstance(source, RecordSource):
            source.use_lengths(processor.size_fingerprint)
    left_out: list[tuple[str, SkipSample]] = []
    processes = Processes() if processes is None else processes
    stream: Stream[Any, Any] = Stream(
        data.sources,
        StageEncoder(processor, stage.objective, is_collated=features is None and not stage.noise),
        plan_config(stage, data, stage.train.seed),
        num_workers=stage.num_workers,
        data_timeout_s=stage.data_timeout_s,
        rank=processes.rank,
        num_ranks=processes.count,
        exchange=processes.exchange if processes.count > 1 else None,
        keep_empty=True,
        skips=SkipCounter(data.skip_limits, on_skip=lambda source, skip: left_out.append((source, skip))),
    )
    return PackStream(stream, stage.objective, features, left_out, _idle_pack(processor, stage.objective))


def _idle_pack(processor: Processor, objective: Literal["next_token", "preference"]) -> PackedBatch:
    """Documents of one token without a target: for a pack in which nothing is left."""
    cfg = processor.cfg
    num_documents = 2 if objective == "preference" else 1
    side, num_patches = cfg.tiling.tile_px, cfg.vision.grid_side**2
    return PackedBatch(
        sample_ids=[],
        ids=torch.zeros(num_documents, dtype=torch.int64),
        targets=torch.full((num_documents,), IGNORE_INDEX),
        positions=torch.zeros(num_documents, dtype=torch.int64),
        cu_seqlens=torch.arange(num_documents + 1, dtype=torch.int32),
        image_index=torch.zeros(0, dtype=torch.int64),
        tiles=torch.zeros(0, 3, side, side, dtype=torch.uint8),
        valid=torch.zeros(0, num_patches, dtype=torch.bool),
    )


def base_view_processor(processor: Processor) -> Processor:
    """The same processor, one view an image."""
    return Processor(processor.cfg.with_base_views(), processor.tokenizer, processor.limits, IMAGE_CACHE_BYTES)
