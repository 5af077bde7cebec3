"""One rank of runs with several processes; started by torchrun, or forked by `ranks_forks.py`.

    torchrun … ranks_run.py FOLDER JOBS     JOBS: a JSON list of {"name", …} (see `Job`), done one after the other

The model has what makes ranks wait for each other: a part that only some batches need (as pictures do a tower), table
and head apart, two groups of parameters. What a job comes to is in FOLDER/NAME: the run folder, and rank-R.json.
"""

import errno
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import trainer_lite.shards
from interleave_data import (
    Encoder,
    InMemory,
    PlanConfig,
    Sample,
    Size,
    SkipCounter,
    SkipLimits,
    SkipReason,
    SkipSample,
    Stream,
    TextPart,
    Turn,
    samples_digest,
)
from trainer_lite import (
    LossSum,
    OptimizerConfig,
    ParallelConfig,
    Processes,
    RunFolder,
    ScheduleConfig,
    TrainConfig,
    Trainer,
    join,
)
from weight_files import SafetensorsFiles, load_tensors, same_names, unique_tensors

WIDTH = 16


class Job(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One run."""

    name: str
    engine: str = "ddp"
    steps: int = 6
    accumulation: int = 4
    precision: str = "fp32"
    resume: bool = False
    stop_after: int = 0
    """End in peace behind this step, so that another job of the same name goes on."""
    save_every: int = 0
    poison: tuple[int, int] | None = None
    """(step, rank) whose gradient gets a NaN."""
    blow: tuple[int, int] | None = None
    """(step, rank) whose loss is infinite."""
    kill: tuple[int, int] | None = None
    """(step, rank) that ends itself by SIGKILL in the middle of its batches."""
    hang: tuple[int, int] | None = None
    """(step, rank) whose process is stopped there, as by a machine that swaps."""
    doze: tuple[int, int] | None = None
    """(step, rank) that waits there for what never comes, as for a file on a dead disk."""
    stall: tuple[int, int] | None = None
    """(step, rank) that waits so in the middle of its forward pass."""
    unlike: str = ""
    """What is another on each host: its code, or its data."""
    width: int = WIDTH
    """Another makes it another model."""
    is_saved: bool = True
    """Write checkpoints, at least one at the end."""
    refuse_shard: int | None = None
    """The rank whose disk is full when a checkpoint is written."""
    pause_s: float = 0.0
    """What each batch takes longer."""
    offload: bool = False
    timeout_s: float = 300.0
    kinds: str = "mixed"
    """mixed: as they come; apart: rank 0's batches have text alone, rank 1's pictures alone; empty: some batches have
    no target, some no sample; epoch: no training, but one time through the samples of a stream (`epoch`)."""
    is_idle_run: bool = True
    """Run the tower where there is no picture, as a model must under ZeRO; without it as the control."""


@dataclass(frozen=True)
class Rows:
    sample_ids: list[str]
    inputs: Tensor
    targets: Tensor
    tiles: Tensor
    """float[p, width]: p tiles, 0, 1 or 13."""
    num_targets: int
    num_tokens: int


class Network(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.table = nn.Embedding(11, width)
        self.tower = nn.Sequential(nn.Linear(width, 2 * width), nn.Tanh(), nn.Linear(2 * width, width))
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.norm = nn.LayerNorm(width)
        self.body = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.head = nn.Linear(width, 7, bias=False)
        self.is_idle_run = True

    def forward(self, batch: Rows) -> Tensor:
        x = self.table(batch.inputs)
        if len(batch.tiles):
            x = x + self.tower(batch.tiles).mean(0)
        elif self.is_idle_run:
            x = x + 0.0 * self.tower(torch.zeros(1, self.width)).sum()
        x = self.frozen(x)
        for layer in self.body:
            x = x + torch.tanh(layer(self.norm(x)))
        return self.head(x)


class Model:
    def __init__(self, width: int) -> None:
        torch.manual_seed(1)
        self.network = Network(width)
        self.factor = 1.0
        self.pause_s = 0.0

    def loss(self, batch: Rows) -> LossSum:
        time.sleep(self.pause_s)
        scores = self.network(batch)
        losses = nn.functional.cross_entropy(scores.float(), batch.targets, reduction="sum", ignore_index=-100)
        losses = losses * self.factor
        return LossSum(losses, batch.num_targets, {"first": float(losses.detach())})


class Files:
    weights = "model.safetensors"

    def __init__(self, network: Network) -> None:
        self.network = network

    def tensors(self) -> Mapping[str, Tensor]:
        return unique_tensors(self.network)

    def writers(self) -> Mapping[str, Callable[[Path], object]]:
        return {
            "config.json": lambda path: path.write_text("{}"),
            self.weights: lambda path: save_file(self.network.state_dict(), path),
        }

    def load(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        with SafetensorsFiles(index if index.is_file() else folder / self.weights) as source:
            load_tensors(source, unique_tensors(self.network), same_names(self.network))


class Batches:
    """Batch k is a function of k; rank r of w has r, r + w, …"""

    skipped: Mapping[str, int] = {}

    def __init__(self, job: Job, processes: Processes, on_batch: Callable[[int], None]) -> None:
        self.job, self.processes, self.on_batch, self.position = job, processes, on_batch, 0

    def __iter__(self) -> Iterator[Rows]:
        while True:
            number = self.position + self.processes.rank
            self.position += self.processes.count
            self.on_batch(number)
            yield self._make(number)

    def _make(self, number: int) -> Rows:
        drawn = torch.Generator().manual_seed(number)
        length = int(torch.randint(1, 9, (), generator=drawn))
        inputs = torch.randint(0, 11, (length,), generator=drawn)
        # Half of it cannot be learnt: of a loss near 0 any rounding would be a large share.
        noise = torch.randint(0, 7, (length,), generator=drawn)
        targets = torch.where(noise % 2 == 0, noise, (inputs * 3 + 1) % 7)
        num_tiles = (0, 13, 1, 0, 1, 13)[number % 6]
        if self.job.kinds == "apart":
            num_tiles = 0 if number % 2 == 0 else 13
        tiles = torch.randn(num_tiles, self.job.width, generator=drawn)
        ids = [f"s{number}.{place}" for place in range(length)]
        if self.job.kinds == "empty" and number % 5 == 2:
            targets = torch.full_like(targets, -100)
        if self.job.kinds == "empty" and number % 5 == 4:
            ids, inputs, targets, tiles = [], inputs[:1], targets[:1].clamp(max=-100), tiles[:0]
        return Rows(ids, inputs, targets, tiles, int((targets >= 0).sum()), len(ids))

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


class Item:
    def __init__(self, length: int) -> None:
        self.length = length


class Words(Encoder[Item, list[str]]):
    """A sample of "pictures" is bad every fifth time, which only its decoding tells."""

    def measure(self, sample: Sample, limit: Size | None = None, /) -> Size:
        return Size(Random(sample.id).randint(1, 16), 0)

    def encode(self, sample: Sample, limit: Size | None = None, /) -> Item:
        if sample.id.startswith("pictures") and Random(f"bad {sample.id}").random() < 0.2:
            raise SkipSample(SkipReason.BROKEN_IMAGE, "drawn to be bad")
        return Item(self.measure(sample).tokens)

    def collate(self, items: Sequence[Item], ids: Sequence[str], /) -> list[str]:
        return list(ids)


def epoch(processes: Processes) -> dict[str, Any]:
    """This rank's share of one time through two sources, packed by length: the ids in each pack."""
    sources = [
        InMemory(name, [Sample(f"{name}{i}", name, (Turn("assistant", (TextPart(name),)),)) for i in range(size)])
        for name, size in (("pictures", 90), ("text", 41))
    ]
    stream = Stream(
        sources,
        Words(),
        PlanConfig(ratios=(2, 1), max_tokens=16, look_ahead=8, seed=3, group_by_length=True, epochs=(1, 1)),
        rank=processes.rank,
        num_ranks=processes.count,
        skips=SkipCounter(SkipLimits(max_share=0.5)),
        exchange=processes.exchange if processes.count > 1 else None,
        keep_empty=True,
    )
    packs = [list(batch.ids) for batch in stream]
    return {"packs": packs, "skips": dict(stream.skips.by_reason())}


def run(job: Job, folder: Path, processes: Processes) -> dict[str, Any]:
    path = folder / job.name
    if job.kinds == "epoch":
        return epoch(processes)
    if job.unlike:
        processes.agree({"settings": "the same", job.unlike: f"fingerprint {processes.rank}"})
    cfg = TrainConfig(
        max_steps=job.steps,
        accumulation_steps=job.accumulation,
        precision=job.precision,  # pyright: ignore[reportArgumentType]
        optimizer=OptimizerConfig(learning_rate=0.01, learning_rate_scales={"tower": 0.5}),
        schedule=ScheduleConfig(kind="cosine", warmup_steps=3),
        save_every=job.save_every,
        grad_clip=0.5,
    )
    made = Model(job.width)
    made.network.is_idle_run = job.is_idle_run
    state: dict[str, Any] = {}

    def on_batch(number: int) -> None:
        time.sleep(job.pause_s)
        step = number // job.accumulation + 1
        if job.kill == (step, processes.rank):
            os.kill(os.getpid(), 9)
        if job.hang == (step, processes.rank):
            os.kill(os.getpid(), 19)
        if job.doze == (step, processes.rank):
            time.sleep(1000)
        # A step's batches are all fetched before the first of them is run.
        made.factor = float("inf") if job.blow == (step, processes.rank) else 1.0
        made.pause_s = 1000.0 if job.stall == (step, processes.rank) else 0.0
        if job.poison == (step, processes.rank):
            for parameter in made.network.parameters():
                if parameter.requires_grad:
                    parameter.register_hook(poison)
                    break

    def poison(gradient: Tensor) -> Tensor:
        if trainer.counters.step + 1 == (job.poison or (0, 0))[0]:
            gradient = gradient.clone()
            gradient.view(-1)[0] = float("nan")
        return gradient

    if processes.is_first:
        run_folder = RunFolder.reopen(path) if (path / "config.json").exists() else RunFolder.create(path, cfg)
    else:
        run_folder = RunFolder(path)
    files = Files(made.network)
    trainer = Trainer(
        model=made,
        parameters=made.network.named_parameters(),
        stream=Batches(job, processes, on_batch),
        cfg=cfg,
        run=run_folder,
        files=files if job.is_saved else None,
        processes=processes,
        parallel=ParallelConfig(engine=job.engine, offload_optimizer=job.offload, timeout_s=job.timeout_s),  # pyright: ignore[reportArgumentType]
        network=made.network,
    )
    if job.resume:
        (found,) = set(processes.share(str(run_folder.find_checkpoint().path)))
        if found != "None":
            trainer.resume(Path(found))
        elif processes.is_first:
            run_folder.rewind(trainer.stage, 0)
    if job.stop_after:
        trainer.on_step = lambda record: trainer.stop.set() if record.step == job.stop_after else None

    def digest() -> str:
        live = dict(made.network.named_parameters())
        found = {name: trainer.engine.whole(one, name if one.requires_grad else None) for name, one in live.items()}
        for name, kept in trainer.engine.state_keys().items():
            for key in kept:
                found[f"{name}/{key}"] = trainer.engine.whole(live[name], name, key)
        return samples_digest([f"{name} {tensor.float().flatten().tolist()}" for name, tensor in found.items()])

    if job.poison is not None or job.blow is not None:
        spoilt = [place[0] for place in (job.poison, job.blow) if place is not None]
        state |= {"before": [], "after": []}
        step = trainer._step

        def stepped(batches: Any) -> Any:
            at = trainer.counters.step + 1
            if at in spoilt:
                state["before"].append(digest())
            record = step(batches)
            if at in spoilt:
                state["after"].append(digest())
            return record

        trainer._step = stepped
    if job.refuse_shard == processes.rank:

        def full(*_: object, **__: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        setattr(trainer_lite.shards, "save_file", full)  # noqa: B010  (pyright takes it for private)
    result = trainer.fit()
    return {**state, "reason": result.reason, "step": result.counters.step, "updates": result.counters.updates}


def main(folder: Path, jobs: list[Job]) -> int:
    with join(ParallelConfig(engine=jobs[0].engine, timeout_s=jobs[0].timeout_s)) as processes:  # pyright: ignore[reportArgumentType]
        for job in jobs:
            try:
                said = run(job, folder, processes)
            except (ValueError, OSError) as error:
                # Raised on every rank alike, so that the next job can be done.
                said = {"error": str(error), "trace": traceback.format_exc()}
            (folder / job.name).mkdir(exist_ok=True)
            name = f"rank-{processes.rank}-{job.engine}-{processes.count}.json"
            (folder / job.name / name).write_text(json.dumps(said))
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(Path(sys.argv[1]), msgspec.json.decode(sys.argv[2], type=list[Job])))
