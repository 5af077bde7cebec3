"""Run the real command lines, in a process of their own, on models of toy size."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path

import pytest
from PIL import Image

TOY_MODEL = [
    "--model.vision.width",
    "16",
    "--model.vision.num-layers",
    "1",
    "--model.vision.num-heads",
    "2",
    "--model.vision.mlp-width",
    "16",
    "--model.connector.dim",
    "16",
    "--model.connector.dim-out",
    "16",
    "--model.connector.depth",
    "1",
    "--model.connector.num-heads",
    "1",
    "--model.connector.head-dim",
    "8",
    "--model.connector.num-latents",
    "4",
    "--model.lm.width",
    "16",
    "--model.lm.num-layers",
    "1",
    "--model.lm.num-heads",
    "2",
    "--model.lm.num-kv-heads",
    "2",
    "--model.lm.mlp-width",
    "16",
]


def _run(
    repo_root: Path,
    app: str,
    arguments: Sequence[str],
    cwd: Path,
    stdin: str = "",
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
    return subprocess.run(
        [sys.executable, str(repo_root / "apps" / app), *arguments],
        cwd=cwd,
        env=environment,
        input=stdin,
        capture_output=True,
        text=True,
        # A lone surrogate stands for a byte that is no UTF-8.
        errors="surrogateescape",
        timeout=300,
    )


@pytest.fixture(scope="session")
def run_app(repo_root: Path):
    """(app, arguments, cwd, stdin, environment) → the finished process."""
    return partial(_run, repo_root)


@cache
def _world_tokenizer(vocab_size: int):
    # Trained once for all runs in this process: it takes longer than they do.
    from train_world import world_tokenizer

    return world_tokenizer(vocab_size)


@pytest.fixture
def train(repo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`apps/train` in this process and an empty folder: arguments → exit status."""
    monkeypatch.syspath_prepend(str(repo_root / "apps/train"))
    monkeypatch.chdir(tmp_path)
    import train_demo
    import train_run

    for module in (train_demo, train_run):
        monkeypatch.setattr(module, "world_tokenizer", _world_tokenizer)
    from train_cli import parse_command_line
    from train_run import run

    def call(*arguments: str) -> int:
        try:
            command = parse_command_line(arguments)
        except SystemExit as end:
            return int(end.code or 0)
        return run(command)

    return call


@pytest.fixture
def parse(repo_root: Path, monkeypatch: pytest.MonkeyPatch):
    """The command line's arguments → the resolved config."""
    monkeypatch.syspath_prepend(str(repo_root / "apps/train"))
    from train_cli import parse_command_line

    return lambda *arguments: parse_command_line(arguments).config


def toy_steps(*prefixes: str) -> list[str]:
    """Flags that make stages two steps long."""
    return [part for prefix in prefixes for part in (f"--{prefix}max-steps", "2")]


@pytest.fixture(scope="session")
def toy_demo(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the demo ran, two steps a stage, three questions a skill."""
    folder = tmp_path_factory.mktemp("demo")
    stages = toy_steps("warmup.", "pretrain.", "sft.", "interleaved.", "dpo.", "safety.")
    # One stage with a worker tells; a process takes seconds to start.
    for stage in ("pretrain", "interleaved", "dpo", "safety"):
        stages += [f"--{stage}.num-workers", "0"]
    done = _run(repo_root, "train", ["--eval-questions", "3", *stages, *TOY_MODEL], folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def toy_model() -> list[str]:
    """Flags for a model of toy size."""
    return TOY_MODEL


@pytest.fixture(scope="session")
def toy_flags() -> list[str]:
    """Flags for one stage: a toy model, two steps."""
    return [*toy_steps(""), *TOY_MODEL]


@pytest.fixture(scope="session")
def llava_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data file over eight conversations with pictures, one with two, one without."""
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for index in range(6):
        Image.new("RGB", (40 + 10 * index, 50), (40 * index, 100, 200)).save(folder / f"{index}.png")
        rows.append(
            {"id": f"q{index}", "image": f"{index}.png", "conversations": _talk("<image>\nwhat?", f"word {index}")}
        )
    rows.append({"id": "two", "image": ["0.png", "1.png"], "conversations": _talk("<image> <image> same?", "no")})
    rows.append({"id": "none", "conversations": _talk("two and two?", "four")})
    (folder / "train.json").write_text(json.dumps(rows))
    file = folder / "data.toml"
    file.write_text(
        f'[[sources]]\nname = "toy"\nformat = "llava-json"\npath = "{folder}/train.json"\nimage_root = "{folder}"\n'
    )
    return file


def _talk(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
