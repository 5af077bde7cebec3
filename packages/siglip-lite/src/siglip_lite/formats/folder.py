"""What a folder of weights says it holds, before any tensor is read."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from weight_files import Recipe, WeightsError

from ..config import SiglipTextConfig, SiglipVisionConfig

VISION = "vision_model."
TEXT = "text_model."

_Shape = TypeVar("_Shape")


@dataclass(frozen=True)
class PublishedFolder:
    """The sizes of the towers in a folder, and where and under what names their tensors lie."""

    weights: Path
    """A file, an index of shards, or a folder with one of them."""
    vision: SiglipVisionConfig | None
    text: SiglipTextConfig | None
    recipes: Callable[[Collection[str]], Mapping[str, Recipe]]
    """From the names in the files to what each tensor of `Siglip` is made of; of the towers that are there."""


def read_json(path: Path, shape: type[_Shape]) -> _Shape:
    """Read a JSON file of known fields; unknown ones are passed over.

    Raises:
        WeightsError: no such file, no JSON, or a field of the wrong type.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=shape)
    except FileNotFoundError as error:
        raise WeightsError(
            f"{path}: expected a file, got none; finish the download, or name the folder that holds it"
        ) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise WeightsError(f"{path}: expected the config of a SigLIP model, got: {error}; fetch it again") from error


def require(where: str, rules: Mapping[str, tuple[object, object]]) -> None:
    """Compare fields with the only values that are implemented: name → (value, expected).

    Raises:
        WeightsError: lists every field that differs.
    """
    faults = [
        f"{name}: expected {expected!r}, got {value!r}"
        for name, (value, expected) in rules.items()
        if value != expected
    ]
    if faults:
        raise WeightsError(f"{where}: {'; '.join(faults)}; this variant is not implemented")
