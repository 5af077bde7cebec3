"""Ours beside a peer in one run: first that both compute the same, then times in turn with what the machine could do.

Machines that others share change their speed within seconds, so nothing is compared across time: each round takes the
two floors (a large matrix product, a large copy), then both sides, the other one first every second round. A ratio is
the median over the rounds of theirs / ours, in seconds or bytes: above 1, ours is better.
"""

import ctypes
import gc
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from bench_index import processor_name
from trainer_lite import peak_rss_bytes

T = TypeVar("T")

_PACKAGES = ("torch", "transformers", "trl", "torchvision", "pillow", "triton")
_GEMM_SIDE = 1024
_COPY_BYTES = 1 << 27


class GateError(Exception):
    """Two sides do not compute the same: there is nothing to be timed."""


@dataclass(frozen=True)
class Row:
    """One comparison, as it is printed and saved."""

    suite: str
    name: str
    peer: str
    ours: float | None
    """In `unit`; like the next ones None where the gate is red."""
    theirs: float | None
    unit: str
    ratio: float | None
    """Above 1: ours is better, whichever way the unit goes."""
    share_of_floor: float | None
    """How much of the matrix product's rate or of the copy's bandwidth ours reached; None where neither is a bound."""
    gate: str
    """What was found equal, or "red: " and what was not."""

    @property
    def is_red(self) -> bool:
        """Whether the two sides differ."""
        return self.gate.startswith("red")


@dataclass(frozen=True)
class Floors:
    """What the machine gave just now."""

    flops_per_s: float
    """Of a product of two matrices that fit into the cache, fp32."""
    copy_bytes_per_s: float
    """Read and written by a copy between arrays that no cache holds."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Something that both sides can do. `ours` and `theirs` do it once and return the seconds that count."""

    suite: str
    name: str
    peer: str
    ours: Callable[[], float]
    theirs: Callable[[], float]
    check: Callable[[], str]
    """Say what is equal; raises GateError."""
    unit: str = "ms"
    """ms, or something per second."""
    amount: float = 1.0
    """Of what the unit counts, how much is done at once."""
    least_s: Callable[[Floors], float] | None = None
    """Seconds that ours would take at the floor."""
    held_s: Callable[[], float] | None = None
    """Seconds of the last run of ours that are held against the floor; None: all of it."""


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Memory of both sides; each function runs in a process of its own and returns bytes."""

    suite: str
    name: str
    peer: str
    ours: Callable[[], int]
    theirs: Callable[[], int]
    check: Callable[[], str]


def clocked(work: Callable[[], object]) -> Callable[[], float]:
    """Give work the form that `Pair` wants."""

    def run() -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return run


def agree(what: str, ours: Tensor, theirs: Tensor, tolerance: float) -> str:
    """Say how far apart two results are: RMS of the difference over RMS of theirs.

    Raises:
        GateError: further than `tolerance`, or NaN.
    """
    difference = (ours.detach().double() - theirs.detach().double()).square().mean().sqrt()
    found = float(difference / theirs.detach().double().square().mean().sqrt().clamp(min=1e-30))
    if not found <= tolerance:
        raise GateError(f"{what}: expected a relative error of at most {tolerance:.0e}, got {found:.1e}")
    return f"{what} within {found:.0e}"


class FloorGauge:
    """Measures the floors again and again, on the same matrices."""

    def __init__(self) -> None:
        self._a, self._b = torch.randn(2, _GEMM_SIDE, _GEMM_SIDE)
        self._from = torch.ones(_COPY_BYTES, dtype=torch.uint8)
        self._to = torch.zeros_like(self._from)
        self.found: list[Floors] = []
        self.measure()

    def measure(self) -> Floors:
        """Take both, the better of two."""
        gemm_s = min(clocked(lambda: self._a @ self._b)() for _ in range(2))
        copy_s = min(clocked(lambda: self._to.copy_(self._from))() for _ in range(2))
        self.found.append(Floors(2 * _GEMM_SIDE**3 / gemm_s, 2 * _COPY_BYTES / copy_s))
        return self.found[-1]

    def medians(self) -> dict[str, float]:
        """Of all that was measured."""
        return {
            "matmul_gflops": statistics.median(floors.flops_per_s for floors in self.found) / 1e9,
            "copy_gb_per_s": statistics.median(floors.copy_bytes_per_s for floors in self.found) / 1e9,
        }


def compare(pair: Pair, gauge: FloorGauge, rounds: int) -> Row:
    """Check, warm both sides up, take turns."""
    try:
        gate = pair.check()
    except GateError as error:
        return _red(pair, pair.unit, error)
    pair.ours()
    pair.theirs()
    ours: list[float] = []
    theirs: list[float] = []
    shares: list[float] = []
    for turn in range(rounds):
        floors = gauge.measure()
        sides = [(pair.ours, ours), (pair.theirs, theirs)]
        for run, seconds in sides[:: 1 if turn % 2 == 0 else -1]:
            seconds.append(run())
        if pair.least_s is not None:
            shares.append(pair.least_s(floors) / (ours[-1] if pair.held_s is None else pair.held_s()))
    in_unit = (lambda s: 1e3 * s) if pair.unit == "ms" else (lambda s: pair.amount / s)
    return Row(
        suite=pair.suite,
        name=pair.name,
        peer=pair.peer,
        ours=in_unit(statistics.median(ours)),
        theirs=in_unit(statistics.median(theirs)),
        unit=pair.unit,
        ratio=statistics.median(other / own for own, other in zip(ours, theirs, strict=True)),
        share_of_floor=statistics.median(shares) if shares else None,
        gate=gate,
    )


def weigh(footprint: Footprint) -> Row:
    """Check, then run each side in a fresh process."""
    try:
        gate = footprint.check()
    except GateError as error:
        return _red(footprint, "MB", error)
    ours, theirs = (in_a_process(run) for run in (footprint.ours, footprint.theirs))
    return Row(
        suite=footprint.suite,
        name=footprint.name,
        peer=footprint.peer,
        ours=ours / 1e6,
        theirs=theirs / 1e6,
        unit="MB",
        ratio=theirs / ours,
        share_of_floor=None,
        gate=gate,
    )


def _red(what: Pair | Footprint, unit: str, error: GateError) -> Row:
    return Row(what.suite, what.name, what.peer, None, None, unit, None, None, f"red: {error}")


def in_a_process(run: Callable[[], T]) -> T:
    """Run it in a fresh process with as many threads."""
    with multiprocessing.get_context("spawn").Pool(1, _set_threads, (torch.get_num_threads(),)) as pool:
        return pool.apply(run)


def _set_threads(threads: int) -> None:
    torch.set_num_threads(threads)


def peak_of(work: Callable[[], object]) -> int:
    """Bytes by which this process grows at most while it works (Linux); freed memory is given back first.

    Raises:
        SystemExit: the system has no such counter.
    """
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, AttributeError) as error:
        raise SystemExit(
            f"bench: expected Linux's counter of a process's peak, got {error}; leave memory out"
        ) from error
    work()
    return peak_rss_bytes() - before


def peer(name: str) -> Any:
    """Import a module of a peer; it is of the workspace's development group and no dependency of the packages.

    Raises:
        SystemExit: it is not installed.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise SystemExit(f"bench: expected {name} to be installed, got {error}; run it by `uv run`") from error


def machine() -> dict[str, object]:
    """Device, threads and versions."""
    return {
        "device": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **_versions(_PACKAGES)},
    }


def _versions(packages: Iterable[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
