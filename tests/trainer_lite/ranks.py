"""Have ranks forked by `ranks_forks.py`, and read what they wrote."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from trainer_lite import read_metrics

PROGRAM = Path(__file__).with_name("ranks_run.py")
_FORKS = Path(__file__).with_name("ranks_forks.py")
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: its ranks are forked")
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs DeepSpeed")
ENGINES = ("ddp", "zero0", "zero1", "zero2", "zero3") if find_spec("deepspeed") else ("ddp",)
"""Those that can be tried here."""
each_engine = pytest.mark.parametrize(
    "engine", ["ddp", *(pytest.param(f"zero{stage}", marks=needs_deepspeed) for stage in range(4))]
)


class Forks:
    """A process that forks ranks; it stays until `close`."""

    def __init__(self, log: Path) -> None:
        # A process that has touched a GPU cannot fork.
        env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self._log = log
        with log.open("wb") as stream:
            self._process = subprocess.Popen(
                [sys.executable, str(_FORKS)], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stream
            )

    def at_once(self, folder: Path, *launches: dict[str, Any]) -> list[list[tuple[int, str]]]:
        """Exit status and output of each rank of each launch (see `ranks_forks.Launch`), all begun together."""
        folder.mkdir(exist_ok=True)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        asked = [{"folder": str(folder), **launch} for launch in launches]
        self._process.stdin.write(json.dumps(asked).encode() + b"\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, self._log.read_text(errors="replace")[-3000:]
        return [
            [(status, Path(log).read_text(errors="replace")) for status, log in ranks] for ranks in json.loads(answer)
        ]

    def launch(self, count: int, folder: Path, jobs: Sequence[dict[str, Any]], **more: Any) -> list[tuple[int, str]]:
        """The same of one launch."""
        return self.at_once(folder, {"count": count, "jobs": list(jobs), **more})[0]

    def close(self) -> None:
        """End it."""
        # Waits, and closes its files.
        self._process.communicate()


def losses(folder: Path, name: str) -> list[float]:
    return [record.loss for record in read_metrics(folder / name / "metrics.jsonl")]


def hex_losses(folder: Path, name: str) -> list[str]:
    return [record.loss_hex for record in read_metrics(folder / name / "metrics.jsonl")]


def digests(folder: Path, name: str) -> list[str]:
    return [record.samples_digest for record in read_metrics(folder / name / "metrics.jsonl")]


def said(folder: Path, name: str) -> list[dict[str, Any]]:
    """What each rank answered, in the order of ranks; those of the last launch, if there were several of one size."""
    return [json.loads(file.read_text()) for file in sorted((folder / name).glob("rank-*.json"))]


def furthest(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Largest relative difference."""
    assert len(ours) == len(theirs) > 0
    return max(abs(a - b) / max(abs(b), 1e-30) for a, b in zip(ours, theirs, strict=True))
