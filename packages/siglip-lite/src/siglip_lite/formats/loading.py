"""Load a pair or one tower from a folder of any format that is known here: strictly, and one tensor at a time.

The model is made without memory, gets its final dtype and device, and is filled from the files; what is in memory at
any time is the model and the largest tensor of the files.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec
import torch

from weight_files import SafetensorsFiles, WeightsError, load_tensors, unique_tensors

from ..config import SiglipConfig
from ..model import Siglip
from ..text import SiglipText
from ..vision import SiglipVision
from .folder import TEXT, VISION, PublishedFolder, read_json
from .huggingface import CONFIG, read_huggingface
from .open_clip import OPEN_CLIP_CONFIG, read_open_clip, read_timm

_log = logging.getLogger(__name__)

# Counted positions, which old releases of transformers saved.
_IGNORED = ("*embeddings.position_ids",)

_Model = TypeVar("_Model", Siglip, SiglipVision, SiglipText)


def load_siglip(
    path: Path | str,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    allow_missing: Sequence[str] = (),
    on_tensor: Callable[[str], None] | None = None,
) -> Siglip:
    """Load both towers from a folder of Hugging Face's `SiglipModel`, or of open_clip's SigLIP models.

    Args:
        path: the folder.
        dtype: of the model; None for that of the files (the widest, where they mix).
        device: of the model.
        allow_missing: shell patterns of parameter names that may be absent; they are drawn anew and logged.
        on_tensor: called with the name of each parameter once it is there.

    Raises:
        WeightsError: a folder of another model, an unfinished download, or tensors that are missing, unexpected or
            misshaped, of which all are listed; nothing is loaded then.
    """
    folder = read_folder(Path(path))
    if folder.vision is None or folder.text is None:
        held = "a vision tower" if folder.text is None else "a text tower"
        raise WeightsError(f"weights {path}: expected two towers, got {held} alone; load that")
    try:
        cfg = SiglipConfig(vision=folder.vision, text=folder.text)
    except ValueError as error:
        raise WeightsError(f"weights {path}: {error}") from error
    return _load(folder, lambda: Siglip(cfg), "", dtype, device, allow_missing, on_tensor)


def load_siglip_vision(
    path: Path | str,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    allow_missing: Sequence[str] = (),
    on_tensor: Callable[[str], None] | None = None,
) -> SiglipVision:
    """Load the vision tower from a folder that holds it alone (Hugging Face's, timm's) or beside the text tower.

    Arguments and errors as of `load_siglip`.
    """
    folder = read_folder(Path(path))
    if (cfg := folder.vision) is None:
        raise WeightsError(f"weights {path}: expected a vision tower, got a text tower alone; name another folder")
    return _load(folder, lambda: SiglipVision(cfg), VISION, dtype, device, allow_missing, on_tensor)


def load_siglip_text(
    path: Path | str,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    allow_missing: Sequence[str] = (),
    on_tensor: Callable[[str], None] | None = None,
) -> SiglipText:
    """Load the text tower from a folder that holds it alone or beside the vision tower.

    Arguments and errors as of `load_siglip`.
    """
    folder = read_folder(Path(path))
    if (cfg := folder.text) is None:
        raise WeightsError(f"weights {path}: expected a text tower, got a vision tower alone; name another folder")
    return _load(folder, lambda: SiglipText(cfg), TEXT, dtype, device, allow_missing, on_tensor)


class _Kind(msgspec.Struct):
    architecture: str | None = None


def read_folder(path: Path) -> PublishedFolder:
    """Tell the format by its config file, and read that: which towers there are, and of what size.

    Raises:
        WeightsError: no such folder, or one of another model.
    """
    try:
        return _reader(path)(path)
    except WeightsError:
        raise
    except ValueError as error:
        # Sizes that our own configs refuse.
        raise WeightsError(f"weights {path}: {error}") from error


def _reader(path: Path) -> Callable[[Path], PublishedFolder]:
    if (path / OPEN_CLIP_CONFIG).is_file():
        return read_open_clip
    if not (path / CONFIG).is_file():
        raise WeightsError(
            f"weights {path}: expected a folder with {CONFIG} or {OPEN_CLIP_CONFIG}, got neither; "
            "finish the download, or check the path"
        )
    is_timm = read_json(path / CONFIG, _Kind).architecture is not None
    return read_timm if is_timm else read_huggingface


def _load(
    folder: PublishedFolder,
    make: Callable[[], _Model],
    prefix: str,
    dtype: torch.dtype | None,
    device: torch.device | str,
    allow_missing: Sequence[str],
    on_tensor: Callable[[str], None] | None,
) -> _Model:
    with SafetensorsFiles(folder.weights) as source:
        recipes = folder.recipes(source.tensors.keys())
        wanted = {name.removeprefix(prefix): recipe for name, recipe in recipes.items() if name.startswith(prefix)}
        # The other tower's tensors may be there, and only they.
        others = [piece.name for name, recipe in recipes.items() if not name.startswith(prefix) for piece in recipe]
        held = {piece.name for recipe in wanted.values() for piece in recipe} & source.tensors.keys()
        dtypes = {source.tensors[name].dtype for name in held}
        if strange := sorted(str(stored) for stored in dtypes if not stored.is_floating_point):
            raise WeightsError(
                f"weights {folder.weights}: expected floating-point tensors, got some of {', '.join(strange)}; "
                "use the checkpoint that was not quantised"
            )
        with torch.device("meta"):
            model = make()
        model.to(dtype or _widest(dtypes))
        model.to_empty(device=device)
        if allow_missing:
            model.init_weights()
        left = load_tensors(
            source,
            unique_tensors(model),
            wanted,
            ignored=[*_IGNORED, *others],
            allow_missing=allow_missing,
            on_tensor=on_tensor,
        )
    if left:
        _log.warning("weights %s: %d tensors were absent and drawn anew: %s", source.where, len(left), ", ".join(left))
    return model


def _widest(dtypes: set[torch.dtype]) -> torch.dtype:
    widest: torch.dtype | None = None
    for dtype in dtypes:
        widest = dtype if widest is None else torch.promote_types(widest, dtype)
    return widest or torch.float32
