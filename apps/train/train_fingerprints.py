"""What the processes of one run compare before they train: the code they run and the settings they were given."""

import hashlib
from pathlib import Path

import msgspec
import torch

import trainer_lite
from train_cli import FREE_ON_RESUME
from train_config import StageRun


def code_fingerprint() -> str:
    """Of every Python file of the packages and of this program, and of torch."""
    digest = hashlib.sha256(torch.__version__.encode())
    # packages/trainer-lite/src/trainer_lite/__init__.py: the workspace's packages lie beside each other.
    package = Path(str(trainer_lite.__file__)).parent
    packages = package.parents[2] if package.parents[2].name == "packages" else package.parent
    roots = [Path(__file__).parent, packages] if packages.name == "packages" else [Path(__file__).parent, package]
    for root in roots:
        for file in sorted(root.rglob("*.py")):
            digest.update(file.relative_to(root).as_posix().encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def settings_fingerprint(recipe: str, config: StageRun) -> str:
    """Of the settings that move the course of training, and of the engine."""
    settings = msgspec.to_builtins(config)
    for name in (name for name in FREE_ON_RESUME if "." not in name):
        settings.pop(name, None)
    content = msgspec.json.encode([recipe, settings], order="sorted")
    return hashlib.sha256(content).hexdigest()[:16]
