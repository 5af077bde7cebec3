"""What can be asked: benchmarks in their own files, the embedded world, perplexity. Importing this reads nothing."""

from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .task import Task as Task

TASKS: dict[str, str] = {
    "world": "world",
    "world-captions": "world_captions",
    "world-documents": "documents",
    "vqav2": "vqa",
    "okvqa": "vqa",
    "textvqa": "textvqa",
    "docvqa": "docvqa",
    "chartqa": "chartqa",
    "coco-captions": "coco_captions",
    "mmbench": "mmbench",
    "seed": "seed",
    "mmmu": "mmmu",
    "pope": "pope",
    "hallusion": "hallusion",
    "mme": "mme",
    "scienceqa": "scienceqa",
    "daquar": "daquar",
    "sroie": "sroie",
    "captions": "figure_captions",
    "documents": "documents",
}
"""Name of each task → the module that reads and scores it."""

WORLD_TASKS = ("world", "world-captions", "world-documents")
"""Tasks that need no files: their pictures are drawn."""


def check_task(name: str) -> None:
    """Raise ValueError for a name that no task has."""
    if name not in TASKS:
        nearest = get_close_matches(name, TASKS, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else "choose one of these"
        raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {name!r}; {hint}")


def load_task(name: str) -> "Task":
    """The task of this name.

    Raises:
        ValueError: there is none.
    """
    check_task(name)
    return import_module(f".{TASKS[name]}", __name__).TASKS[name]
