"""The kernels in C++ (`cpu_kernels.cpp`), compiled once by the machine that runs them, for its own instructions.

They need a C++ compiler once, no header but the compiler's own, and threads from the OpenMP library that PyTorch has
loaded. What is built lies in this package's `__pycache__`, beside Python's own compiled files.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

_SOURCE = Path(__file__).with_name("cpu_kernels.cpp")
# products and sums are fused in every loop alike, and are not put into another order
_FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
    *("-fopenmp", "-shared", "-fPIC"),
)
_COMPILERS = ("c++", "g++", "clang++")
_LIMIT_S = 300
_INT, _ADDRESS = ctypes.c_int64, ctypes.c_void_p
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_ARGUMENTS = {
    "decoder_layers": (_ADDRESS,) * 12,
    "decode_tokens": (_ADDRESS,) * 12,
    "linear": (_INT,) * 4 + (_ADDRESS,) * 4,
}


class NativeError(RuntimeError):
    """The kernels cannot be built or loaded here."""


def _processor() -> str:
    """What instructions the processor has, so that a folder that two machines share serves both."""
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        first = file.read(1 << 16).split("\n\n")[0]
    return "\n".join(line for line in first.splitlines() if line.startswith(("model name", "flags", "Features")))


def _build(target: Path) -> None:
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        raise NativeError(f"no C++ compiler is installed ({', '.join(_COMPILERS)})")
    command = [compiler, *_FLAGS, str(_SOURCE), "-o", str(target)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeError(f"{compiler}: {error}") from error
    if done.returncode != 0:
        said = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()
        raise NativeError(f"{compiler} failed: {next((line for line in said if 'error' in line), said[-1])}")


def _load(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeError(str(error)) from error


def _library() -> ctypes.CDLL:
    if sys.platform != "linux":
        raise NativeError(f"it was tried on Linux alone, this is {sys.platform}")
    parts = [_SOURCE.read_bytes(), " ".join(_FLAGS).encode(), _processor().encode()]
    digest = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    kept = _SOURCE.parent / "__pycache__" / f"{_SOURCE.stem}.{digest}.so"
    if kept.exists():
        return _load(kept)
    try:
        kept.parent.mkdir(exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=kept.parent, prefix="build-")
    except OSError:
        # installed where this user cannot write: for this process alone
        with tempfile.TemporaryDirectory(prefix="fused-kernels-") as folder:
            _build(Path(folder, kept.name))
            return _load(Path(folder, kept.name))
    with scratch as folder:
        _build(Path(folder, kept.name))
        # two processes may build at once: each puts a whole file there
        os.replace(Path(folder, kept.name), kept)
    return _load(kept)


@functools.cache
def _functions() -> dict[tuple[str, torch.dtype], Callable[..., int]] | str:
    """All functions, or why there are none."""
    try:
        library = _library()
    except (NativeError, OSError) as error:
        # the latter where nothing can be written at all, or the processor is not described
        return str(error)
    found = {}
    for name, arguments in _ARGUMENTS.items():
        for dtype, suffix in _NAMES.items():
            function = library[f"{name}_{suffix}"]
            function.argtypes, function.restype = arguments, ctypes.c_int
            found[name, dtype] = function
    return found


def refuse_native(device: torch.device, dtype: torch.dtype) -> str | None:
    """Refuse all but fp32 and bf16 on a CPU whose machine can compile; the first call compiles, a few seconds."""
    if device.type != "cpu":
        return f"it is for a CPU, got {device}"
    if dtype not in _NAMES:
        return f"it is written for fp32 and bf16, got {dtype}"
    functions = _functions()
    return functions if isinstance(functions, str) else None


def call_native(name: str, dtype: torch.dtype, *args: object) -> int:
    """Call the function of this name for tensors of this dtype, which `refuse_native` has let through: 0 = done."""
    functions = _functions()
    assert not isinstance(functions, str), functions
    return functions[name, dtype](*args)
