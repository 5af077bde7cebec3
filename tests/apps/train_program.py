"""`apps/train` as `kill_runs.py` runs it: one command line that begins the run in a folder or goes on with it."""

import contextlib
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "apps" / "train"))

from train_cli import parse_command_line
from train_run import run


def main(folder: Path, arguments: list[str]) -> int:
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
        return run(parse_command_line([*arguments, "--out", str(folder), "--resume", "auto"]))
