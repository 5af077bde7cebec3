"""A rank that dies or hangs is named by the others in time, and a restart goes on as if nothing had happened."""

import random
import socket
from pathlib import Path

import pytest
from ranks import free_port, furthest, launch, losses, needs_deepspeed
from ranks_run import Job, run

from trainer_lite import Processes

# Waits and timeouts of seconds, which a machine with two busy cores does not keep.
pytestmark = pytest.mark.nightly

LOST = 6


def expected(folder: Path, steps: int) -> list[float]:
    run(Job(name="whole", steps=steps), folder, Processes())
    return losses(folder, "whole")


def killed_and_resumed(folder: Path, engine: str, kills: list[tuple[int, int]], steps: int) -> None:
    for step, rank in kills:
        job = {"name": "killed", "engine": engine, "steps": steps, "save_every": 2, "resume": True, "timeout_s": 30}
        ended = launch(2, folder, [{**job, "kill": [step, rank]}])
        status, words = ended[1 - rank]
        assert ended[rank][0] == -9
        assert status != 0
        assert f"rank {rank} (" in words, words[-2000:]
    launch(2, folder, [job])


@needs_deepspeed
def test_a_rank_killed_twice_under_zero2_is_named_and_the_run_goes_on(tmp_path: Path) -> None:
    killed_and_resumed(tmp_path, "zero2", [(4, 1), (7, 0)], steps=9)
    assert furthest(losses(tmp_path, "killed"), expected(tmp_path, 9)) < 1e-6


@needs_deepspeed
@pytest.mark.nightly
@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_thirty_kills(tmp_path: Path, engine: str) -> None:
    """(T1 over ranks)."""
    drawn = random.Random(5)
    steps = 64
    kills = [(2 * number + drawn.randint(1, 2), drawn.randint(0, 1)) for number in range(1, 31)]
    killed_and_resumed(tmp_path, engine, kills, steps)
    assert furthest(losses(tmp_path, "killed"), expected(tmp_path, steps)) < 1e-6


@pytest.mark.parametrize(("how", "words"), [("hang", "no sign of life"), ("doze", "alive but without progress for")])
def test_a_rank_that_hangs_is_named_within_the_timeout(tmp_path: Path, how: str, words: str) -> None:
    ended = launch(2, tmp_path, [{"name": "hung", how: [3, 1], "timeout_s": 6}], timeout_s=60)
    status, said = ended[0]
    assert status == LOST, said[-2000:]
    assert "rank 1 (" in said
    assert "last seen at step" in said
    assert words in said


@needs_deepspeed
@pytest.mark.nightly
def test_a_tower_left_out_where_there_is_no_picture_shows(tmp_path: Path) -> None:
    """The control of (T19): ranks that do not call the same modules hang, and are ended, or compute something else."""
    job = {"name": "control", "engine": "zero3", "kinds": "apart", "is_idle_run": False, "timeout_s": 10}
    ended = launch(2, tmp_path, [job], timeout_s=90)
    run(Job(name="whole", kinds="apart"), tmp_path, Processes())
    file = tmp_path / "control" / "metrics.jsonl"
    ours = losses(tmp_path, "control") if file.exists() else []
    is_whole = len(ours) == 6 and furthest(ours, losses(tmp_path, "whole")) < 1e-6
    assert any(status != 0 for status, _ in ended) or not is_whole


def test_a_port_that_another_process_holds_is_said_so(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        ended = launch(1, tmp_path, [{"name": "x", "timeout_s": 3}], port=taken.getsockname()[1], told=2)
    assert ended[0][0] != 0
    assert "expected 2 processes to meet there within 3 s" in ended[0][1]


def test_a_rank_that_never_comes_is_waited_for_no_longer_than_the_timeout(tmp_path: Path) -> None:
    ended = launch(1, tmp_path, [{"name": "x", "timeout_s": 3}], port=free_port(), told=2)
    assert ended[0][0] != 0
    assert "expected 2 processes to meet there within 3 s" in ended[0][1]
