"""Which implementation of an operation runs: decided per call, from the arguments alone, and never silently.

Each operation is an `Op`: a name and its backends, the preferred one first, the readable `reference` last. `auto` takes
the first that can run the call; a backend that is named either runs or raises with the reason. Nothing is decided at
import time, and no environment variable is read. Triton is imported by the first call that runs one of its kernels.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Generic, ParamSpec, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

P = ParamSpec("P")
R = TypeVar("R")


class BackendError(ValueError):
    """A backend was asked for by name and does not exist or cannot run the call."""


@dataclass(frozen=True)
class BackendRow:
    """One line of the table of what runs where."""

    op: str
    """The operation's name."""
    backend: str
    """What `auto` takes."""
    reason: str
    """Why: its own note, then why each backend before it in preference was passed over."""


def anywhere(device: torch.device, dtype: torch.dtype) -> str | None:
    """Refuse nothing: any device and any floating dtype."""
    del device
    return None if dtype.is_floating_point else f"it needs a floating dtype, got {dtype}"


TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_OLDEST_CAPABILITY = (8, 0)


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(device)


@functools.cache
def _has_triton() -> bool:
    # Kept: where it is not installed every call would search the whole path.
    return find_spec("triton") is not None


def on_cuda_with_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """Refuse all but the dtypes of our Triton kernels, on a CUDA device of compute capability 8.0 or above."""
    if device.type != "cuda":
        return f"it needs a CUDA device, got {device}"
    if dtype not in TRITON_DTYPES:
        return f"it is written for bf16, fp16 and fp32, got {dtype}"
    if not _has_triton():
        return "Triton is not installed"
    if torch.cuda.is_available() and capability(device) < _OLDEST_CAPABILITY:
        return f"it needs compute capability 8.0, got {'.'.join(map(str, capability(device)))}"
    return None


def on_cuda_in_half_precision(device: torch.device, dtype: torch.dtype) -> str | None:
    """Refuse as `on_cuda_with_triton`, and fp32: matrix units would round it to tf32."""
    if device.type == "cuda" and dtype == torch.float32:
        return "its matrix products are for bf16 and fp16"
    return on_cuda_with_triton(device, dtype)


@dataclass(frozen=True)
class Backend(Generic[P, R]):
    """One implementation of an operation."""

    name: str
    run: Callable[P, R]
    note: str
    """What it is, in a few words, for the report."""
    refuse: Callable[[torch.device, torch.dtype], str | None] = anywhere
    """The reason why it cannot run on this device with this dtype, or None if it can."""
    refuse_call: Callable[..., str | None] | None = None
    """The reason why it cannot run these arguments (shapes, mixed dtypes), or None if it can; None: it runs all."""


def apply(function: type[torch.autograd.Function], *args: object) -> Tensor:
    """Call a hand-written autograd function of one result, typed."""
    return cast(Tensor, function.apply(*args))  # pyright: ignore[reportUnknownMemberType]


def apply_pair(function: type[torch.autograd.Function], *args: object) -> tuple[Tensor, Tensor]:
    """Call a hand-written autograd function of two results, typed."""
    return cast(tuple[Tensor, Tensor], function.apply(*args))  # pyright: ignore[reportUnknownMemberType]


def once(backward: Callable[P, R]) -> Callable[P, R]:
    """Mark a hand-written backward pass as one that cannot itself be differentiated (typed `once_differentiable`)."""
    return once_differentiable(backward)  # pyright: ignore[reportArgumentType, reportReturnType]


class Op(Generic[P, R]):
    """A named operation and its backends in order of preference; the last one is the reference and runs anywhere."""

    def __init__(self, name: str, *backends: Backend[P, R]) -> None:
        if not backends or backends[-1].name != "reference":
            names = [backend.name for backend in backends]
            raise ValueError(f"backends of {name}: expected 'reference' as the last, got {names}; put it there")
        self.name = name
        self.backends = {backend.name: backend for backend in backends}
        self._able: dict[tuple[torch.device, torch.dtype], list[Backend[P, R]]] = {}

    def choose(
        self,
        backend: str,
        device: torch.device,
        dtype: torch.dtype,
        refuse_call: Callable[[Backend[P, R]], str | None] | None = None,
    ) -> Callable[P, R]:
        """Return the implementation for `backend`, which is a name or "auto".

        Raises:
            BackendError: if the named backend is unknown or refuses this device, dtype or call; for "auto", if all do.
        """
        if backend == "auto":
            for candidate in self._all_able(device, dtype):
                if refuse_call is None or refuse_call(candidate) is None:
                    return candidate.run
            backend = "reference"
        if backend not in self.backends:
            known = ", ".join(["auto", *self.backends])
            raise BackendError(f"backend of {self.name}: expected one of {known}, got {backend!r}; choose one of these")
        named = self.backends[backend]
        reason = named.refuse(device, dtype) or (None if refuse_call is None else refuse_call(named))
        if reason is not None:
            raise BackendError(
                f"backend of {self.name}: expected one that can run {dtype} on {device}, "
                f"got {backend!r}: {reason}; use 'auto'"
            )
        return named.run

    def _all_able(self, device: torch.device, dtype: torch.dtype) -> list[Backend[P, R]]:
        """What can run there, in order of preference."""
        key = (device, dtype)
        if key not in self._able:
            # What a machine can run does not change; a decoding step of a small model asks dozens of times.
            able = [candidate for candidate in self.backends.values() if candidate.refuse(device, dtype) is None]
            self._able[key] = able
        return self._able[key]

    def run(self, backend: str, device: torch.device, dtype: torch.dtype, /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the implementation that `choose` gives for these arguments.

        Raises:
            BackendError: as `choose`.
        """
        if backend == "auto":
            # as `choose`, without a function to be made and called for each candidate
            for candidate in self._all_able(device, dtype):
                if candidate.refuse_call is None or candidate.refuse_call(*args, **kwargs) is None:
                    return candidate.run(*args, **kwargs)

        def refuse_call(candidate: Backend[P, R]) -> str | None:
            return None if candidate.refuse_call is None else candidate.refuse_call(*args, **kwargs)

        return self.choose(backend, device, dtype, refuse_call)(*args, **kwargs)

    def report(self, device: torch.device, dtype: torch.dtype) -> BackendRow:
        """Say what "auto" takes on this device with this dtype, and why."""
        passed_over: list[str] = []
        for candidate in self.backends.values():
            reason = candidate.refuse(device, dtype)
            if reason is None:
                return BackendRow(self.name, candidate.name, "; ".join([candidate.note, *passed_over]))
            passed_over.append(f"not {candidate.name}: {reason}")
        return BackendRow(self.name, "none", "; ".join(passed_over))
