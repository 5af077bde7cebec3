"""Ranks for tests, forked from one process that has imported everything: a start costs a tenth of an interpreter's.

    python ranks_forks.py       a line of standard input: a JSON list of launches (see `Launch`), all begun at once;
                                a line of standard output: for each launch a list of [exit status, file of its output],
                                by rank

An exit status below 0 is a signal's. The end of standard input is the end.
"""

import os
import signal
import socket
import sys
import threading
import time
import traceback
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import msgspec
import torch
from ranks_run import Job, main

from trainer_lite import RankLostError
from trainer_lite.watchman import LOST_STATUS


class Launch(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Processes that do the same jobs together."""

    folder: str
    count: int
    jobs: list[Job]
    port: int = 0
    """Where they meet; 0 takes a free one."""
    told: int = 0
    """Another number of processes than there are, for them to be told."""
    most_s: float = 400.0
    """After this long they are killed: so that a hang ends, far beyond what a slow machine needs."""
    is_over_with_first: bool = False
    """Kill the others when one has ended: a process that was stopped stays so."""


def free_port() -> int:
    """A port that nothing listens at now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Ranks:
    """The forked processes of one launch."""

    def __init__(self, launch: Launch) -> None:
        port = launch.port or free_port()
        self.deadline_s = time.monotonic() + launch.most_s
        self.is_over_with_first = launch.is_over_with_first
        self.logs = [Path(launch.folder) / f"rank-{rank}-{time.monotonic_ns()}.log" for rank in range(launch.count)]
        self.processes = [_fork(launch, rank, port, log) for rank, log in enumerate(self.logs)]
        self.statuses: dict[int, int] = {}

    def have_ended(self) -> bool:
        """Look; end what will not end by itself."""
        for process in self.processes:
            if process not in self.statuses:
                ended, status = os.waitpid(process, os.WNOHANG)
                if ended:
                    self.statuses[process] = os.waitstatus_to_exitcode(status)
        left = [process for process in self.processes if process not in self.statuses]
        is_over = self.is_over_with_first and len(self.statuses) > 0
        if is_over or time.monotonic() > self.deadline_s:
            for process in left:
                os.kill(process, signal.SIGKILL)
        return not left


def _fork(launch: Launch, rank: int, port: int, log: Path) -> int:
    if (child := os.fork()) != 0:
        return child
    status = 1
    try:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(launch.told or launch.count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        output = os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        status = main(Path(launch.folder), launch.jobs)
    except BaseException as error:  # noqa: BLE001  (the parent reads the status)
        traceback.print_exc()
        status = LOST_STATUS if isinstance(error, RankLostError) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # Past the parent's own end.
        os._exit(status)


def serve() -> None:
    """Do what the lines of standard input ask for."""
    # DeepSpeed's log goes to standard output, where the answers are to be alone.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    for name in ("torch._dynamo", "deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer"):
        if find_spec(name.partition(".")[0]) is not None:
            # What the first optimiser and the first engine of a process import takes seven seconds.
            import_module(name)
    # A child of a process with threads may hang.
    assert threading.active_count() == 1
    for line in sys.stdin:
        begun = [Ranks(launch) for launch in msgspec.json.decode(line, type=list[Launch])]
        # All are looked at each time.
        while sum(not ranks.have_ended() for ranks in begun):
            time.sleep(0.02)
        said = [
            [[ranks.statuses[process], str(log)] for process, log in zip(ranks.processes, ranks.logs, strict=True)]
            for ranks in begun
        ]
        print(msgspec.json.encode(said).decode(), file=answers, flush=True)


if __name__ == "__main__":
    serve()
