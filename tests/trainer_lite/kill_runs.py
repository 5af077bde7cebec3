"""Run a program again and again, each time in a forked child that is killed at a chosen moment, the last one in peace.

    python kill_runs.py PROGRAM FOLDER REQUEST      REQUEST: {"arguments", "kills", "seed", "changes"}

PROGRAM is a file with `main(folder, arguments) -> int`; it begins the run in FOLDER or goes on with it. One import
serves all children, so that thirty kills take seconds. A kill is a SIGKILL that the child sends itself before its n-th
Python call, or before its n-th operation on the disk (sync, rename, removal), with n drawn from the seed within a share
of what a whole run has: calls lie mostly in steps, operations in saves, between write and rename, and in the pruning.
`kills` names the kind of each kill in turn: "calls", "disk", or "startup", a call before the first step of the child.
`changes`, which may be left out, are lists of arguments that the children of the killed run get in turn as well.
"""

import itertools
import json
import os
import random
import runpy
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from trainer_lite import MetricsLog, RunFolder, StepRecord, read_metrics

KINDS = ("calls", "disk", "startup")


class Countdown:
    """Kills this process before the n-th call of `tick`; with n = 0 it only counts."""

    def __init__(self, kill_at: int) -> None:
        self.kill_at, self.count, self.is_over = kill_at, 0, False

    def tick(self, *_event: object) -> None:
        self.count += not self.is_over
        if not self.is_over and self.count == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def before(self, holder: object, name: str) -> None:
        original: Callable[..., object] = getattr(holder, name)

        def counted(*arguments: object, **more: object) -> object:
            self.tick()
            return original(*arguments, **more)

        setattr(holder, name, counted)


def forked(program: Callable[[Path, list[str]], int], folder: Path, arguments: list[str], **kill_at: int):
    """Run it in a child; return its exit code (negative: signal) and, if it was not killed, its counts of events."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        status = 70
        try:
            counts = {kind: Countdown(kill_at.get(kind, 0)) for kind in KINDS}
            for holder, name in ((os, "fsync"), (Path, "rename"), (Path, "replace"), (shutil, "rmtree")):
                counts["disk"].before(holder, name)
            append = MetricsLog.append

            def append_first(log: MetricsLog, record: StepRecord) -> None:
                counts["startup"].is_over = True
                append(log, record)

            setattr(MetricsLog, "append", append_first)  # noqa: B010  (pyright takes it for another method)

            def call(*_event: object) -> None:
                counts["calls"].tick()
                counts["startup"].tick()

            threading.setprofile(call)
            sys.setprofile(call)
            status = program(folder, arguments)
            sys.setprofile(None)
            os.write(writer, json.dumps({kind: countdown.count for kind, countdown in counts.items()}).encode())
        except Exception:  # noqa: BLE001  (the parent reads the status)
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    counts = json.loads(os.read(reader, 99) or b"{}")
    os.close(reader)
    return os.waitstatus_to_exitcode(status), counts


def main(program_file: str, folder: Path, request: dict) -> list[dict]:
    program, arguments, kills = runpy.run_path(program_file)["main"], request["arguments"], request["kills"]
    # Here, so that whatever is imported late is there for all children, which begin with this run's random state.
    program(folder / "whole", arguments)
    status, counts = forked(program, folder / "again", arguments)
    if status != 0:
        raise SystemExit(f"the run that nobody kills ended with {status}")
    drawn = random.Random(request["seed"])
    run = RunFolder(folder / "killed")
    attempts: list[dict] = []
    changes = itertools.cycle(request.get("changes", [[]]))
    for kind in kills:
        # All shares together are less than a whole run, so that none of the children gets to its end.
        # Start-up is half of one at most, as a run that goes on skips some of what a new one does.
        share = counts[kind] // (2 if kind == "startup" else len(kills))
        kill_at = drawn.randint(1 if kind == "startup" else share // 2, share)
        status, _ = forked(program, run.path, [*arguments, *next(changes)], **{kind: kill_at})
        found = run.find_checkpoint()
        steps = [record.step for record in read_metrics(run.metrics.path)] if run.metrics.path.exists() else []
        attempts.append(
            {
                "kill": [kind, kill_at],
                "status": status,
                "step": max(steps, default=0),
                "resumes_at": int(found.path.name.removeprefix("step-")) if found.path else 0,
                "refused": found.refused,
                "temporary": temporary(run),
            }
        )
    status, _ = forked(program, run.path, [*arguments, *next(changes)])
    attempts.append({"kill": None, "status": status, "temporary": temporary(run)})
    return attempts


def temporary(run: RunFolder) -> list[str]:
    return [path.name for path in run.path.glob("**/.*writing*")]


if __name__ == "__main__":
    # Before anything forks: a child of a process with threads may hang.
    torch.set_num_threads(1)
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]))))
