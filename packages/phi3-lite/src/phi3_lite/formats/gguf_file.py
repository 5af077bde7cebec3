"""A GGUF file's metadata, and its tensors as a source of weights.

Layout (specification: ggml-org/ggml, docs/gguf.md, version 3): magic, version, counts; key/value metadata; for each
tensor its name, extents (innermost first), type and offset; then, aligned, the tensors' bytes. The header is read here,
with every length held against the file's size: a damaged length ends in an error, not in a loop, and a vocabulary of
49,152 tokens takes tenths of a second instead of the seconds that the `gguf` package's reader needs. What the bytes of
a quantised tensor mean is that package's business.
"""

import mmap
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize
from jaxtyping import Float
from torch import Tensor

from weight_files import TensorInfo, WeightsError

Value = int | float | bool | str | list[int] | list[float] | list[bool] | list[str]
"""A metadata value."""

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32
_MAX_DIMS = 4
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_QUANTISED = ("Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K")
# by the number that a value's type has in the file
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


class _Stored(NamedTuple):
    """Where a tensor lies, and how."""

    shape: tuple[int, ...]
    kind: str
    start: int
    num_bytes: int


def is_gguf(path: Path | str) -> bool:
    """Whether a file of this name or of this beginning is there."""
    path = Path(path)
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return path.suffix == ".gguf" or file.read(4) == MAGIC


class GGUFFile:
    """Metadata and tensors of a file; tensors come as float32, one at a time, quantised ones dequantised.

    The file stays mapped for as long as a tensor read from it lives.
    """

    def __init__(self, path: Path | str) -> None:
        """Read the header.

        Raises:
            WeightsError: no such file, no GGUF file, one that is cut or damaged, or tensors of a type not handled.
        """
        self._path = Path(path)
        try:
            with self._path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                self.metadata, self._stored = _Header(data).read()
                size = len(data)
        except (FileNotFoundError, IsADirectoryError) as error:
            raise WeightsError(f"weights {path}: expected a GGUF file, got none there; check the path") from error
        except (struct.error, ValueError) as error:
            raise WeightsError(f"weights {path}: expected a whole GGUF file, got: {error}; fetch it again") from error
        self._refuse_other_types()
        # private: a page that is only read stays the file's own
        self._bytes = torch.from_file(str(self._path), shared=False, size=size, dtype=torch.uint8)

    @property
    def where(self) -> str:
        """The path."""
        return str(self._path)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor's name and shape, and the dtype in which it is given out."""
        return {name: TensorInfo(stored.shape, torch.float32) for name, stored in self._stored.items()}

    @property
    def kinds(self) -> Mapping[str, str]:
        """Every tensor's name and type in the file (`Q4_K`)."""
        return {name: stored.kind for name, stored in self._stored.items()}

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Float[Tensor, "..."]:
        """Return a tensor, or its rows [start, end) along the first axis; only they are dequantised."""
        stored = self._stored[name]
        data = self._bytes[stored.start : stored.start + stored.num_bytes]
        shape = stored.shape
        if rows is not None and shape:
            start, end, _ = slice(*rows).indices(shape[0])
            data = data.view(shape[0], -1)[start:end].flatten()
            shape = (max(0, end - start), *shape[1:])
        if stored.kind in _PLAIN:
            return data.view(_PLAIN[stored.kind]).float().view(shape)
        if not data.numel():
            return torch.empty(shape)
        blocks = data.view(prod(shape[:-1]), -1).numpy()
        return torch.from_numpy(dequantize(blocks, GGMLQuantizationType[stored.kind])).view(shape)

    def _refuse_other_types(self) -> None:
        handled = (*_PLAIN, *_QUANTISED)
        others = [f"{name} in {stored.kind}" for name, stored in self._stored.items() if stored.kind not in handled]
        if others:
            raise WeightsError(
                f"weights {self._path}: expected tensors in {', '.join(handled)}, got {len(others)} others: "
                f"{', '.join(others[:8])}; take a file of another quantisation"
            )


class _Header:
    """Reads the header from the front to the back; every read is held against the file's end."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 0

    def read(self) -> tuple[dict[str, Value], dict[str, _Stored]]:
        """Return the metadata by key and the tensors by name."""
        if self._data[:4] != MAGIC:
            raise ValueError(f"{self._data[:4]!r} in front where {MAGIC!r} should be")
        self._at = 4
        version = self._scalar("I")
        if version not in _VERSIONS:
            swapped = int(version).to_bytes(4, "little")[::-1]
            order = " in big-endian order" if int.from_bytes(swapped, "little") in _VERSIONS else ""
            raise ValueError(f"version {version}{order}, where 2 and 3 are handled")
        num_tensors, num_values = int(self._scalar("Q")), int(self._scalar("Q"))
        metadata: dict[str, Value] = {}
        for _ in range(self._count(num_values, 12)):
            key = self._string()
            metadata[key] = self._value(key, int(self._scalar("I")))
        described = [self._tensor() for _ in range(self._count(num_tensors, 24))]
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
            raise ValueError(f"general.alignment {alignment!r}, which is no power of two from 8 on")
        front = -(-self._at // alignment) * alignment
        stored: dict[str, _Stored] = {}
        for name, shape, kind, offset in described:
            if name in stored:
                raise ValueError(f"two tensors named {name}")
            stored[name] = self._placed(name, shape, kind, front + offset, alignment)
        return metadata, stored

    def _scalar(self, code: str) -> int | float | bool:
        (value,) = struct.unpack_from("<" + code, self._data, self._at)
        self._at += struct.calcsize("<" + code)
        return value

    def _count(self, count: int, least_bytes: int) -> int:
        """Check that so many items of at least so many bytes fit in what is left."""
        if count * least_bytes > len(self._data) - self._at:
            raise ValueError(f"{count} items announced at byte {self._at} of {len(self._data)}")
        return count

    def _string(self) -> str:
        size = self._count(int(self._scalar("Q")), 1)
        text = self._data[self._at : self._at + size].decode("utf-8")
        self._at += size
        return text

    def _value(self, key: str, kind: int) -> Value:
        if kind == _STRING:
            return self._string()
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind != _ARRAY:
            raise ValueError(f"{key} of the unknown type {kind}")
        item, count = int(self._scalar("I")), int(self._scalar("Q"))
        if item == _STRING:
            return [self._string() for _ in range(self._count(count, 8))]
        if item not in _SCALARS:
            raise ValueError(f"{key} as an array of the type {item}")
        code = _SCALARS[item]
        form = f"<{self._count(count, struct.calcsize('<' + code))}{code}"
        values = list(struct.unpack_from(form, self._data, self._at))
        self._at += struct.calcsize(form)
        return values

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, num_dims = self._string(), int(self._scalar("I"))
        if not 0 < num_dims <= _MAX_DIMS:
            raise ValueError(f"{name} with {num_dims} axes")
        shape = tuple(int(self._scalar("Q")) for _ in range(num_dims))[::-1]
        if min(shape) < 1:
            raise ValueError(f"{name} of shape {list(shape)}")
        return name, shape, int(self._scalar("I")), int(self._scalar("Q"))

    def _placed(self, name: str, shape: tuple[int, ...], number: int, start: int, alignment: int) -> _Stored:
        try:
            kind = GGMLQuantizationType(number)
        except ValueError as error:
            raise ValueError(f"{name} of the unknown type {number}") from error
        num_in_block, block_bytes = GGML_QUANT_SIZES[kind]
        if shape[-1] % num_in_block:
            raise ValueError(f"{name} in {kind.name} with rows of {shape[-1]}, no multiple of {num_in_block}")
        num_bytes = prod(shape) // num_in_block * block_bytes
        if start % alignment:
            raise ValueError(f"{name} at byte {start}, no multiple of {alignment}")
        if start + num_bytes > len(self._data):
            raise ValueError(f"{len(self._data)} bytes, where {name} ends at {start + num_bytes}")
        return _Stored(shape, kind.name, start, num_bytes)
