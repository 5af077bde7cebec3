"""Start the ranks of `ranks_run.py` as processes, and read what they wrote."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from trainer_lite import read_metrics

PROGRAM = Path(__file__).with_name("ranks_run.py")
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs DeepSpeed")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(
    count: int, folder: Path, jobs: Sequence[dict[str, Any]], *, timeout_s: float = 100, port: int = 0, told: int = 0
) -> list[tuple[int, str]]:
    """Exit status and standard error of each rank. `told`: another number of processes than there are."""
    port = port or free_port()
    folder.mkdir(exist_ok=True)
    logs = [folder / f"stderr-{rank}-{time.monotonic_ns()}" for rank in range(count)]
    ranks: list[subprocess.Popen[bytes]] = []
    for rank in range(count):
        env = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(told or count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        with logs[rank].open("wb") as log:
            command = [sys.executable, str(PROGRAM), str(folder), json.dumps(list(jobs))]
            ranks.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
    deadline_s = time.monotonic() + timeout_s
    try:
        # One that has been stopped does not end by itself.
        while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline_s:
            time.sleep(0.05)
            done = [rank for rank in ranks if rank.poll() is not None]
            if done and all(rank.poll() is not None or is_stopped(rank.pid) for rank in ranks):
                break
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    return [(rank.returncode, log.read_text(errors="replace")) for rank, log in zip(ranks, logs, strict=True)]


def is_stopped(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


def losses(folder: Path, name: str) -> list[float]:
    return [record.loss for record in read_metrics(folder / name / "metrics.jsonl")]


def digests(folder: Path, name: str) -> list[str]:
    return [record.samples_digest for record in read_metrics(folder / name / "metrics.jsonl")]


def said(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted((folder / name).glob("rank-*.json"))]


def furthest(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Largest relative difference."""
    assert len(ours) == len(theirs) > 0
    return max(abs(a - b) / max(abs(b), 1e-30) for a, b in zip(ours, theirs, strict=True))
