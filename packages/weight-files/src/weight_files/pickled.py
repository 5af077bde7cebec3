"""The one exception to safetensors: a `.pt` file of plain tensors, which only `weights_only=True` ever reads."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import WeightsError
from .source import TensorDict


def open_pickled(path: Path | str, *, prefix: str = "") -> TensorDict:
    """Read a `.pt` file of tensors in plain containers: the one exception to safetensors, so ask the user first.

    Only `weights_only=True` is used: a file that names any code is refused unread. Tensors of nested dicts whose keys
    are not tensors' names (`model_state_dict`) are found under the first level that holds tensors; `prefix` is removed.

    Raises:
        WeightsError: the file holds anything but tensors and plain values, or no tensor.
    """
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError as error:
        raise WeightsError(f"weights {path}: expected a .pt file, got nothing there; check the path") from error
    except Exception as error:
        # torch raises whatever the bytes lead to: UnpicklingError, RuntimeError, EOFError, KeyError …
        raise WeightsError(
            f"weights {path}: expected tensors in plain containers, got {type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''}; nothing in it was run"
        ) from error
    while isinstance(content, dict) and not any(isinstance(value, Tensor) for value in content.values()):
        inner = [value for value in content.values() if isinstance(value, dict) and value]
        content = inner[0] if inner else None
    if not isinstance(content, dict):
        raise WeightsError(f"weights {path}: expected named tensors, got none; is it a model's state?")
    tensors = {str(name).removeprefix(prefix): value for name, value in content.items() if isinstance(value, Tensor)}
    return TensorDict(tensors, str(path))
