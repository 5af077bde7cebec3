"""The command line of `apps/evaluate`. Imports no torch."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import tyro

from blip3_lite.config import DeviceChoice
from eval_lite.tasks import TASKS, check_task


class EvaluateConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Ask a checkpoint questions with known answers: the embedded world's, or benchmarks' own files.

    Writes predictions (JSON lines), figures with 95 % intervals (JSON) and a page with pictures and errors. Interrupted
    or killed, the same line goes on where it was.
    """

    checkpoint: Annotated[str, tyro.conf.Positional]
    """A checkpoint of ours, or a folder of xGen-MM."""
    tasks: tuple[str, ...] = ("world",)
    """Names of tasks, or NAME=FOLDER where a task's files lie elsewhere than in DATA/NAME."""
    data: str = "."
    """Folder that holds a folder for each task, named as the task is. Nothing is downloaded."""
    out: str | None = None
    """Folder for predictions and report.html; by default one under runs/evaluate, named after the checkpoint."""
    json: str | None = None
    """File for the figures; by default figures.json in the folder."""
    compare: str | None = None
    """Another checkpoint, asked the same: differences with intervals, drawn in pairs."""
    manner: Literal["auto", "instruct", "base"] = "auto"
    """How questions are put: as a chat, or to be gone on from among worked examples. `auto`: base for a model whose
    chat format is plain."""
    mode: Literal["say", "likelihood"] = "say"
    """What decides: the answer as it is said, or which of the possible answers is likeliest. Questions that have no
    list of answers are then left out."""
    shots: int = 0
    """Worked examples in front of each question."""
    demonstrations: Literal["random", "similar"] = "random"
    """Which: drawn at random, or those whose pictures look most like the question's to the model's own vision tower."""
    text_only_shots: int = 0
    """Worked examples without their pictures where there are no others, as Flamingo's zero-shot figures have two."""
    seed: int = 0
    """Of the drawn examples."""
    limit: int | None = None
    """First questions of each group of a task (a skill, a split) that are asked; None for all."""
    batch_size: int = 16
    """Questions answered together; it changes no answer but for ties in rounding, which are listed."""
    quantize: Literal["int8", "int4"] | None = None
    """Hold the language model's matrices as integers, the rest in bf16."""
    device: DeviceChoice = "auto"
    """Where to compute: on the GPU where there is one (`auto`), or as said."""

    def __post_init__(self) -> None:
        """Check ranges, and that each task is there."""
        if not self.tasks:
            raise ValueError(f"tasks: expected at least one of {', '.join(TASKS)}, got none; name one")
        names = [name for name, _ in self.places]
        for name in names:
            check_task(name)
        if len(set(names)) != len(names):
            raise ValueError(f"tasks: expected each once, got {', '.join(names)}; leave the second out")
        for name, least in (("shots", 0), ("text_only_shots", 0), ("batch_size", 1), ("limit", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}; raise it")
        if self.shots and self.text_only_shots:
            raise ValueError(
                f"text_only_shots: expected 0 beside shots, got {self.text_only_shots}; they stand in for them"
            )

    @property
    def places(self) -> list[tuple[str, Path]]:
        """Each task's name and folder."""
        parted = [one.partition("=") for one in self.tasks]
        return [(name, Path(folder) if folder else Path(self.data) / name) for name, _, folder in parted]

    @property
    def folder(self) -> Path:
        """Where everything is written."""
        if self.out is not None:
            return Path(self.out)
        parts = [part for part in Path(self.checkpoint).parts if part not in ("/", ".", "..", "runs")]
        return Path("runs/evaluate") / ("-".join(parts) or "model")

    @property
    def json_file(self) -> Path:
        """Where the figures go."""
        return self.folder / "figures.json" if self.json is None else Path(self.json)


def parse_command_line(arguments: Sequence[str]) -> EvaluateConfig:
    """Return the config, or exit with status 2 and a reason."""
    description = f"{EvaluateConfig.__doc__}\n\nTasks: {', '.join(TASKS)}."
    try:
        return tyro.cli(
            EvaluateConfig,
            prog="evaluate",
            description=description,
            args=arguments,
            config=(tyro.conf.FlagConversionOff,),
        )
    except ValueError as error:
        print(f"evaluate: {error}", file=sys.stderr)
        sys.exit(2)
