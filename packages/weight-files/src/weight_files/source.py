"""Named tensors that lie in files and are read one at a time, whole or by rows.

A source is opened by its headers alone; a tensor's bytes are touched when it is read. Safetensors files come alone or
as shards with an index (`*.safetensors.index.json`, whose `weight_map` says which file holds which tensor).
"""

import math
import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import msgspec
import torch
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import WeightsError

INDEX_SUFFIX = ".safetensors.index.json"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@runtime_checkable
class TensorSource(Protocol):
    """Tensors by name, in files or anywhere else."""

    @property
    def where(self) -> str:
        """Path or name, for messages."""
        ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor's name, shape and dtype."""
        ...

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Shaped[Tensor, "..."]:
        """Return a tensor, or its rows [start, end) along the first axis; on the CPU."""
        ...


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


class _Entry(msgspec.Struct):
    data_offsets: tuple[int, int]


@dataclass(frozen=True)
class _Place:
    file: BufferedReader
    start: int


class SafetensorsFiles:
    """A safetensors file, or a folder that holds one or a sharded set. Use as a context manager, or `close` it."""

    def __init__(self, path: Path | str) -> None:
        """Open all headers.

        Raises:
            WeightsError: nothing there, several sets in one folder, shards that are missing or cut, or an index that
                does not fit its shards; every fault is listed.
        """
        self._path = Path(path)
        self._stack = ExitStack()
        # For holders that hand it on and cannot say when its last tensor was read.
        weakref.finalize(self, self._stack.close)
        self._tensors: dict[str, TensorInfo] = {}
        self._places: dict[str, _Place] = {}
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "SafetensorsFiles":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the files."""
        self._stack.close()

    @property
    def where(self) -> str:
        """The path."""
        return str(self._path)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor's name, shape and dtype."""
        return self._tensors

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Shaped[Tensor, "..."]:
        """Return a tensor, or its rows [start, end) along the first axis, in memory of its own.

        Not mapped: pages of a mapped file count as the process's own until it is closed, a second model beside it.

        Raises:
            WeightsError: the file has become shorter.
        """
        info, place = self._tensors[name], self._places[name]
        first, stop = (0, info.shape[0]) if rows is None and info.shape else rows or (0, 1)
        row_bytes = math.prod(info.shape[1:]) * info.dtype.itemsize
        tensor = torch.empty((stop - first, *info.shape[1:]) if info.shape else (), dtype=info.dtype)
        if tensor.numel() == 0:
            return tensor
        place.file.seek(place.start + first * row_bytes)
        # A view as bytes, since numpy has no bfloat16.
        num_read = place.file.readinto(tensor.view(-1).view(torch.uint8).numpy().data)
        if num_read != tensor.nbytes:
            raise WeightsError(
                f"weights {place.file.name}: expected {tensor.nbytes} bytes of {name}, got {num_read}; fetch it again"
            )
        return tensor

    def _open(self) -> None:
        files, weight_map = self._files()
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise WeightsError(
                f"weights {self._path}: expected {len(files)} shards, got {len(missing)} missing: "
                f"{', '.join(missing)}; finish the download"
            )
        faults: list[str] = []
        for file in files:
            try:
                self._open_file(file)
            except (SafetensorError, OSError) as error:
                faults.append(f"{file.name}: {error}")
        if not faults and weight_map is not None:
            faults += [
                f"{name}: in {Path(place.file.name).name}, not where the index has it"
                for name, place in self._places.items()
                if weight_map.get(name) != Path(place.file.name).name
            ]
            faults += [f"{name}: in the index only" for name in weight_map.keys() - self._tensors.keys()]
        if faults:
            raise WeightsError(
                f"weights {self._path}: expected whole safetensors files, got: {'; '.join(sorted(faults)[:20])}; "
                "they are cut, damaged or of two downloads: fetch them again"
            )

    def _open_file(self, file: Path) -> None:
        handle: Any
        # Its checks: header, offsets, and that the file is as long as they say.
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118
                part = handle.get_slice(name)
                self._tensors[name] = TensorInfo(tuple(part.get_shape()), _dtype(file, name, part.get_dtype()))
        opened = self._stack.enter_context(file.open("rb"))
        self._places.update({name: _Place(opened, start) for name, start in _starts(opened).items()})

    def _files(self) -> tuple[list[Path], dict[str, str] | None]:
        """The files to open, and the index's weight map where there is an index."""
        if self._path.is_file():
            return self._indexed(self._path) if self._path.name.endswith(INDEX_SUFFIX) else ([self._path], None)
        if not self._path.is_dir():
            raise WeightsError(f"weights {self._path}: expected a file or folder, got nothing there; check the path")
        indices = sorted(self._path.glob(f"*{INDEX_SUFFIX}"))
        files = sorted(self._path.glob("*.safetensors"))
        if len(indices) == 1:
            return self._indexed(indices[0])
        if len(indices) > 1 or len(files) != 1:
            names = [file.name for file in indices + files]
            raise WeightsError(
                f"weights {self._path}: expected one safetensors file or one index of shards, got "
                f"{', '.join(names) or 'neither'}; name the file or the index itself"
            )
        return files, None

    def _indexed(self, index: Path) -> tuple[list[Path], dict[str, str]]:
        try:
            weight_map = msgspec.json.decode(index.read_bytes(), type=_Index).weight_map
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise WeightsError(f"weights {index}: expected an index with a weight_map, got: {error}") from error
        names = sorted(set(weight_map.values()))
        if strange := [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]:
            raise WeightsError(f"weights {index}: expected plain safetensors file names, got {strange[:3]}")
        return [index.parent / name for name in names], weight_map


def _starts(file: BufferedReader) -> dict[str, int]:
    """Where each tensor begins: behind the header's length (8 bytes, little-endian) and the header, as it says."""
    size = int.from_bytes(file.read(8), "little")
    header = msgspec.json.decode(file.read(size), type=dict[str, msgspec.Raw])
    return {
        name: 8 + size + msgspec.json.decode(entry, type=_Entry).data_offsets[0]
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _dtype(file: Path, name: str, dtype: str) -> torch.dtype:
    if dtype not in _DTYPES:
        raise WeightsError(f"weights {file}: {name}: expected one of {', '.join(_DTYPES)}, got {dtype}; convert it")
    return _DTYPES[dtype]


class TensorDict:
    """Tensors that are in memory already, as a source."""

    def __init__(self, tensors: Mapping[str, Tensor], where: str = "tensors in memory") -> None:
        self._held = dict(tensors)
        # Once: a load asks for every tensor's.
        self._tensors = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        self._where = where

    @property
    def where(self) -> str:
        """The name it was given."""
        return self._where

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor's name, shape and dtype."""
        return self._tensors

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Shaped[Tensor, "..."]:
        """Return a tensor, or its rows [start, end) along the first axis."""
        tensor = self._held[name]
        return tensor if rows is None else tensor[rows[0] : rows[1]]
