"""What the processes of one run compare before they train: code, settings, order of the data, weights."""

import hashlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec
import torch
from torch import nn

import trainer_lite
from train_cli import FREE_ON_RESUME
from train_config import StageConfig, StageRun
from train_stages import StageData, plan_config

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
