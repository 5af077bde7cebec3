"""What a training checkpoint holds beside the model: optimiser tensors, random states, counters and the stream's place.

Files: optimizer.safetensors (`<parameter>/<key>`; of several processes shards and their index), rng.safetensors
(uint8 states), state.json. No pickle.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
from safetensors.torch import load_file, save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from weight_files import SafetensorsFiles
from weight_files.source import INDEX_SUFFIX

from .config import TrainConfig
from .optimizer import Optimizers

OPTIMIZER_FILE = "optimizer.safetensors"
OPTIMIZER_INDEX = f"optimizer{INDEX_SUFFIX}"
"""In its place where several processes have written their shares."""
RNG_FILE = "rng.safetensors"
STATE_FILE = "state.json"


class Counters(msgspec.Struct, kw_only=True):
    """Where a stage stands."""

    step: int = 0
    """Steps done, skipped ones included; the stream has handed out the batches of exactly these."""
    updates: int = 0
    """Steps that moved the parameters; the learning rate is a function of this."""
    nonfinite_in_a_row: int = 0
    skipped_updates: dict[str, int] = {}
    recent_losses: list[float] = []
    """The losses that the median of the spike guard runs over, oldest first."""
    failed_saves: int = 0
    """Checkpoints on the way that could not be written."""
    tokens: int = 0
    targets: int = 0
    wall_s: float = 0.0


class SavedState(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """state.json."""

    format: Literal[1] = 1
    stage: str
    counters: Counters
    stream: dict[str, Any]
    config: TrainConfig
    data_fingerprint: str
    parameters: dict[str, list[str]]
    """Each trainable parameter with the keys of its optimiser state: none before its first update."""


def rng_state() -> dict[str, Tensor]:
    """Return the states of torch's CPU generator and of each GPU's as uint8 tensors."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda:{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def set_rng_state(states: Mapping[str, Tensor]) -> None:
    """Restore what `rng_state` returned; states of GPUs that are not here are left out."""
    torch.set_rng_state(states["cpu"])
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"cuda:{index}" in states:
            torch.cuda.set_rng_state(states[f"cuda:{index}"], index)


def state_writers(state: SavedState, optimizers: Optimizers | None) -> dict[str, Callable[[Path], object]]:
    """Return the writers of the three files; each reads the live state when it is called.

    Without optimisers, of the two others: each process writes its share of their tensors.
    """

    def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)

    writers: dict[str, Callable[[Path], object]] = {}
    if optimizers is not None:
        writers[OPTIMIZER_FILE] = lambda path: write_tensors(path, optimizers.state_tensors())
    return {
        **writers,
        RNG_FILE: lambda path: write_tensors(path, rng_state()),
        STATE_FILE: lambda path: _write(path, msgspec.json.format(msgspec.json.encode(state), indent=2)),
    }


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def read_state(folder: Path) -> SavedState:
    """Read state.json.

    Raises:
        ValueError: the folder holds no training state, or one of another form.
    """
    path = folder / STATE_FILE
    if not path.is_file():
        raise ValueError(
            f"checkpoint {folder}: expected {STATE_FILE}, got a model without training state; "
            "start a new stage from it instead of resuming"
        )
    try:
        return msgspec.json.decode(path.read_bytes(), type=SavedState)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"checkpoint {path}: expected a training state of format 1, got: {error}; use the version that wrote it"
        ) from error


def state_keys(optimizers: Optimizers) -> dict[str, list[str]]:
    """Return what `SavedState.parameters` holds of these optimisers."""
    keys: dict[str, list[str]] = {name: [] for name in optimizers.parameters}
    for full_name in optimizers.state_tensors():
        name, _, key = full_name.rpartition("/")
        keys[name].append(key)
    return keys


def parameter_differences(saved: Mapping[str, list[str]], optimizers: Optimizers) -> list[str]:
    """List the parameters that were trained and are not, or are trained and were not."""
    current = optimizers.parameters
    return [f"{name}: trained in the checkpoint only" for name in saved if name not in current] + [
        f"{name}: trained now only" for name in current if name not in saved
    ]


def load_tensors(
    folder: Path,
    parameters: Mapping[str, list[str]],
    load_state: Callable[[Mapping[str, list[str]], Callable[[str], Tensor]], None],
) -> None:
    """Load the optimiser's tensors and, last of all, the random states. `parameters`: as in state.json.

    load_state: given the keys and a reader of one tensor by its name (as of `Engine`).

    Raises:
        ValueError: the optimiser's file does not hold the tensors that state.json names, or they do not fit; nothing
            has been changed.
    """
    file = folder / OPTIMIZER_INDEX
    if not file.is_file():
        file = folder / OPTIMIZER_FILE
    with SafetensorsFiles(file) as source:
        expected = {f"{name}/{key}" for name, keys in parameters.items() for key in keys}
        if wrong := sorted(expected ^ source.tensors.keys()):
            raise ValueError(
                f"checkpoint {file}: expected the {len(expected)} tensors that {STATE_FILE} names, got "
                f"{len(source.tensors)}, at odds in {', '.join(wrong[:8])}; use an earlier checkpoint"
            )
        load_state(parameters, source.read)
    set_rng_state(load_file(folder / RNG_FILE))


_FREE_TO_CHANGE = (
    "log_every",
    "save_every",
    "eval_every",
    "keep_last",
    "on_save_error",
    "max_nonfinite_steps",
    # What goes back to before a spike wants to pass it this time.
    "spike_ratio",
    "spike_window",
    "spike_guard",
)


def config_differences(saved: TrainConfig, current: TrainConfig) -> list[str]:
    """List the settings that change the course of training and are not the same in both."""
    differences: list[str] = []
    for name in TrainConfig.__struct_fields__:
        before, now = getattr(saved, name), getattr(current, name)
        if name not in _FREE_TO_CHANGE and before != now:
            differences.append(f"{name}: {before!r} in the checkpoint, {now!r} now")
    return differences
