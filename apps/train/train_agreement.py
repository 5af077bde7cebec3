"""What the processes of one run agree on before they train: code, settings, data, weights, run folder, checkpoint."""

import hashlib
import secrets
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec
import torch
from torch import nn

import trainer_lite
from blip3_lite import CheckpointError
from blip3_lite.folder import file_sha256
from train_cli import AUTO, FREE_ON_RESUME, NEWEST
from train_config import StageConfig, StageRun
from train_errors import BadInputError
from train_stream import StageData, plan_config
from train_terminal import say
from trainer_lite import Processes, RunFolder

_SEEN_WITHIN_S = 60.0
"""A network file system may remember for so long that a file was not there."""
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Whole numbers, by their bytes, as which any tensor can be read."""


def code_fingerprint() -> str:
    """Of every Python file of this program and of the packages where they lie in a workspace, of torch and DeepSpeed.

    Of packages that are installed one by one, `trainer_lite` stands for all.
    """
    digest = hashlib.sha256(f"{torch.__version__} {_deepspeed_version()}".encode())
    package = Path(str(trainer_lite.__file__)).parent
    # packages/trainer-lite/src/trainer_lite: the workspace's packages lie beside each other.
    workspace = package.parents[2]
    for root in (Path(__file__).parent, workspace if workspace.name == "packages" else package):
        for file in sorted(root.rglob("*.py")):
            digest.update(file.relative_to(root).as_posix().encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _deepspeed_version() -> str:
    try:
        return version("deepspeed")
    except PackageNotFoundError:
        return "none"


def settings_fingerprint(recipe: str, config: StageRun) -> str:
    """Of the settings that move the course of training, and of the engine."""
    settings = msgspec.to_builtins(config)
    for name in (name for name in FREE_ON_RESUME if "." not in name):
        settings.pop(name, None)
    content = msgspec.json.encode([recipe, settings], order="sorted")
    return hashlib.sha256(content).hexdigest()[:16]


def order_fingerprint(stage: StageConfig, data: StageData) -> str:
    """Of what decides which sample comes when beside the sources themselves: a data file's ratios, epochs, limits."""
    content = msgspec.json.encode([plan_config(stage, data, stage.train.seed), data.skip_limits])
    return hashlib.sha256(content).hexdigest()[:16]


def weights_fingerprint(model: nn.Module) -> str:
    """Of every number of a model. Sums of the bits, which are the same for any order of adding and take little time."""
    sums = {
        name: int(tensor.contiguous().view(-1).view(_BITS[tensor.element_size()]).sum(dtype=torch.int64))
        for name, tensor in model.state_dict().items()
    }
    return hashlib.sha256(msgspec.json.encode(sums)).hexdigest()[:16]


def agree_on_order(recipe: str, config: StageRun, device: torch.device, data: StageData, processes: Processes) -> None:
    """Compare what decides which sample comes when and what is made of it.

    Raises:
        ValueError: on every rank, if it is not the same on all.
    """
    if processes.count > 1:
        processes.agree(
            {
                "code": code_fingerprint(),
                "settings": settings_fingerprint(recipe, config),
                "data": data.fingerprint,
                "kind of device": device.type,
                "order": order_fingerprint(config.stage, data),
            }
        )


def agree_on_weights(model: nn.Module, processes: Processes) -> None:
    """Compare those that a run begins with: of a folder of the same name, or drawn by another kind of processor.

    Raises:
        ValueError: on every rank, if they are not the same on all.
    """
    if processes.count > 1:
        processes.agree({"weights": weights_fingerprint(model)})


def run_to_continue(path: Path, config: StageRun, processes: Processes) -> tuple[RunFolder | None, Path | None]:
    """The run's folder, if it is not to be a new one, and the checkpoint to go on from, if there is one.

    Raises:
        BadInputError: no such checkpoint is there, or none that is whole.
        OSError: on every rank, if there is no such run, or another process is at work there.
        ValueError: on every rank, if one of them sees another checkpoint, or not the folder.
    """
    # A run of which there is only a folder has died before it was one.
    is_new = config.resume is None or (config.resume == AUTO and not RunFolder(path).config_path.exists())
    # As the first process sees it, before it makes the folder.
    if processes.share(is_new)[0]:
        return None, None
    run_folder = _reopened(path, processes)
    return run_folder, _agreed_resume_point(run_folder, str(config.resume), processes)


def _agreed_resume_point(run_folder: RunFolder, wish: str, processes: Processes) -> Path | None:
    """The checkpoint that the first process finds; the others must see the same one."""
    found = _resume_point(run_folder, wish) if processes.is_first else None
    first = processes.share(None if found is None else str(found))[0]
    if first is None:
        return None
    manifest = Path(first) / "MANIFEST.json"
    seen = file_sha256(manifest) if manifest.is_file() else "no such folder"
    processes.agree({f"checkpoint {first}": seen})
    return Path(first)


def _resume_point(run_folder: RunFolder, wish: str) -> Path | None:
    """The checkpoint to go on from; None where the run ended before it saved one, so that it begins again."""
    if wish not in (NEWEST, AUTO):
        named = Path(wish)
        if named.resolve().parent != run_folder.checkpoints_path.resolve():
            raise BadInputError(
                f"--resume: expected auto, newest or a folder in {run_folder.checkpoints_path}, got {wish}; a "
                "checkpoint of another run can start a stage with --init"
            )
        return named
    found = run_folder.find_checkpoint()
    for refused in found.refused:
        say(f"warning: passed over: {refused}")
    if found.path is None and found.refused:
        raise CheckpointError(f"run folder {run_folder.path}: expected a whole checkpoint, got none; start another run")
    return found.path


def _reopened(path: Path, processes: Processes) -> RunFolder:
    """The run's folder; the first process alone holds and clears it."""
    found: list[RunFolder] = [RunFolder(path)]

    def reopen() -> None:
        if processes.is_first:
            found[0] = RunFolder.reopen(path)

    processes.together("run folder", reopen)
    _check_seen_by_all(found[0], processes)
    return found[0]


def created_run(path: Path, recipe: str, config: StageRun, processes: Processes) -> RunFolder:
    """A new run's folder; the first process alone makes and holds it.

    Raises:
        OSError: on every rank, if there is a run already, or it cannot be written.
        ValueError: on every rank, if one of them does not see it.
    """
    found: list[RunFolder] = [RunFolder(path)]

    def create() -> None:
        if processes.is_first:
            saved = {"recipe": recipe, "config": msgspec.structs.replace(config, resume=None)}
            found[0] = RunFolder.create(path, saved)

    processes.together("run folder", create)
    _check_seen_by_all(found[0], processes)
    return found[0]


def _check_seen_by_all(run_folder: RunFolder, processes: Processes) -> None:
    """Every rank will write its share of the checkpoints there, hours from now.

    Raises:
        ValueError: on every rank, if the folder is on a disk that one of them does not see.
        OSError: on every rank, if the first one cannot write there.
    """
    if processes.count == 1:
        return
    # A name that no folder of another host can hold; what a kill leaves of it is cleared when the run is reopened.
    mark = run_folder.path / f".{processes.share(secrets.token_hex(8))[0]}.writing"
    processes.together("run folder", lambda: mark.touch() if processes.is_first else None)
    end_s = time.monotonic() + _SEEN_WITHIN_S
    while not mark.is_file() and time.monotonic() < end_s:
        time.sleep(0.5)
    seen = "there" if mark.is_file() else "not there (--out has to be on a disk that all hosts share)"
    try:
        processes.agree({f"run folder {run_folder.path}": seen})
    finally:
        if processes.is_first:
            mark.unlink(missing_ok=True)
