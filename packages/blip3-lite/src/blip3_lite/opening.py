"""Open whatever lies at a path: a checkpoint of ours, a release of xGen-MM, or a language model alone."""

from collections.abc import Callable
from pathlib import Path

import msgspec
import torch

from phi3_lite import LoadedLM, Quantisation, load_lm, quantise_linears
from weight_files import SafetensorsFiles, WeightsError

from .checkpoint import CONFIG, LoadedModel, load_model
from .folder import MANIFEST, read_manifest
from .xgen_mm import PREFIX, load_xgen_mm


def open_model(
    path: Path,
    *,
    quantize: Quantisation | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    on_tensor: Callable[[str], None] | None = None,
    on_count: Callable[[int], None] | None = None,
) -> LoadedModel | LoadedLM:
    """Load the model at `path`; what lies there tells its format. A language model alone comes as a `LoadedLM`.

    quantize: hold the language model's matrices as integers. dtype: by default the file's. For progress, on_count is
    called once with the number of tensors to come, on_tensor with each one's name once it is there.

    Raises:
        ValueError: nothing that can be loaded, or not what it says it is (`CheckpointError`, `WeightsError`).
    """
    # First: a release that we have written has a manifest too.
    if is_release(path):
        if (path / MANIFEST).exists():
            read_manifest(path)
        return load_xgen_mm(path, quantize=quantize, dtype=dtype, device=device, on_tensor=on_tensor, on_count=on_count)
    if _is_ours(path):
        loaded = load_model(path, dtype=dtype, device=device, on_tensor=on_tensor, on_count=on_count)
        if quantize is not None:
            quantise_linears(loaded.model.lang_model, quantize)
        return loaded
    return load_lm(path, quantize=quantize, dtype=dtype, device=device, on_tensor=on_tensor, on_count=on_count)


def _is_ours(path: Path) -> bool:
    """Whether a folder is a checkpoint of ours, or one half-written, which lacks its manifest."""
    if (path / MANIFEST).exists():
        return True
    try:
        return "format_version" in msgspec.json.decode((path / CONFIG).read_bytes(), type=dict[str, object])
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return False


def is_release(path: Path) -> bool:
    """Whether a folder holds tensors of xGen-MM; one whose files are broken is left to the loaders to complain of."""
    try:
        if not path.is_dir():
            return False
        with SafetensorsFiles(path) as source:
            return any(name.startswith(PREFIX) for name in source.tensors)
    except WeightsError:
        return False
