"""From what a user names to a model to talk with: a path, a hub's id, or nothing at all."""

import re
from pathlib import Path

import torch
from tqdm import tqdm

from blip3_lite import LoadedModel, newest_checkpoint
from blip3_lite.opening import open_model
from chat_talkers import ChatError, PictureTalker, TextTalker
from phi3_lite import Quantisation, lay_out_for_decoding

FETCHED = ["*.json", "*.safetensors", "tokenizer.model", "chat_template.jinja"]
"""What is taken from the hub: weights, and text that is read and never run. No code, no pickle."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def find_model(name: str | None) -> Path:
    """Return where a model's files lie; those of a hub's id are fetched, unless the hub's client has them already.

    Raises:
        ChatError: nothing there, and nothing to be had.
        CheckpointError: no name was given, and there is no checkpoint under runs/.
    """
    if name is None:
        return newest_checkpoint(Path("runs"))
    path = Path(name)
    if path.exists():
        return path
    # A name below a folder that is here is a path with an error in it, which is nobody else's business.
    if _HUB_ID.fullmatch(name) is None or path.parent.exists():
        raise ChatError(f"model {name}: expected a folder, a GGUF file or a hub's id (org/name), got nothing there")
    return _fetched(name)


def _fetched(hub_id: str) -> Path:
    # here, as most models lie on the disk, and the client takes a while to import
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HTTPError,  # pyright: ignore[reportPrivateImportUsage]
        XetDownloadError,
    )

    try:
        # Folders within hold the same weights in other formats.
        return Path(snapshot_download(hub_id, allow_patterns=FETCHED, ignore_patterns=["*/*"]))
    except (OSError, ValueError, EntryNotFoundError, HTTPError, XetDownloadError) as error:
        raise ChatError(
            f"model {hub_id}: expected a folder of this name here, or one that the hub gives, got neither "
            f"({type(error).__name__}: {str(error).strip().splitlines()[0]}); where there is a network, download the "
            f"files {', '.join(FETCHED)} of {hub_id} from the hub, and put them into the folder {hub_id} here, or into "
            "another that --model names"
        ) from error


def open_talker(path: Path, quantize: Quantisation | None, device: torch.device) -> PictureTalker | TextTalker:
    """Load the model at a path to a device, with a progress bar; in the file's dtype, or quantised, the rest in bf16.

    Raises:
        ValueError: nothing that can be loaded (`CheckpointError`, `WeightsError`) or talked with (`ChatError`).
    """
    # Integers are multiplied fastest with bf16, and a released model need not be held in float32 beside them.
    dtype = None if quantize is None else torch.bfloat16
    with tqdm(desc=f"loading {path.name}", unit="tensor", disable=None, leave=False) as bar:

        def advance(_name: str) -> None:
            bar.update()

        loaded = open_model(path, quantize=quantize, dtype=dtype, device=device, on_count=bar.reset, on_tensor=advance)
    lay_out_for_decoding(loaded.model.lang_model if isinstance(loaded, LoadedModel) else loaded.model)
    return PictureTalker(loaded) if isinstance(loaded, LoadedModel) else TextTalker(loaded)
