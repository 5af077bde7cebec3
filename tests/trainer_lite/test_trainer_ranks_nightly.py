"""The long tests of several processes: 50 steps by two and four, changes on the way, and thirty kills.

uv run pytest -m nightly tests/trainer_lite/test_trainer_ranks_nightly.py --figures benchmarks/results/ranks.jsonl
"""

import random
from pathlib import Path
from typing import Any

import pytest
from ranks import ENGINES, digests, each_engine, furthest, hex_losses, losses, needs_deepspeed, needs_linux
from ranks_run import Job, run

from trainer_lite import Processes
from trainer_lite.watchman import LOST_STATUS

pytestmark = [pytest.mark.nightly, needs_linux]
STEPS = 50
MOST_OFF = {"fp32": 1e-6, "bf16": 1e-3}


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    for precision in MOST_OFF:
        run(Job(name=precision, steps=STEPS, precision=precision, is_saved=False), folder, Processes())
    return folder


@pytest.fixture(scope="module")
def many(tmp_path_factory, forks) -> Path:
    """50 steps under each engine, by two processes and by four."""
    folder = tmp_path_factory.mktemp("many")
    for count in (2, 4):
        jobs: list[dict[str, Any]] = [
            {"name": f"{engine}-{precision}-{count}", "engine": engine, "steps": STEPS, "precision": precision}
            for engine in ENGINES
            for precision in MOST_OFF
        ]
        forks.launch(count, folder, [{**job, "is_saved": False} for job in jobs])
    return folder


@each_engine
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("precision", MOST_OFF)
def test_fifty_steps_have_the_order_and_losses_of_one(
    one: Path, many: Path, figures, engine: str, count: int, precision: str
) -> None:
    ours, theirs = losses(many, f"{engine}-{precision}-{count}"), losses(one, precision)
    assert digests(many, f"{engine}-{precision}-{count}") == digests(one, precision)
    off = furthest(ours, theirs)
    figures(engine=engine, processes=count, precision=precision, steps=STEPS, most_off=off, order="exact")
    assert off <= MOST_OFF[precision]
    # The comparison can fail: something is learnt, and the next batches' losses are others.
    assert furthest(theirs[1:], theirs[:-1]) > 0.1
    assert sum(theirs[-10:]) < 0.9 * sum(theirs[:10])
    assert precision == "fp32" or furthest(theirs, losses(one, "fp32")) > 1e-4


@pytest.fixture(scope="module")
def changed(tmp_path_factory, forks) -> Path:
    """Runs that were stopped, and went on with other processes, another stage, or as they were."""
    folder = tmp_path_factory.mktemp("changed")
    whole = {"steps": STEPS}
    begun = {**whole, "engine": "zero3", "stop_after": 17}
    jobs: list[dict[str, Any]] = [{"name": name, **begun} for name in ("ranks", "stages")]
    jobs.append({**whole, "name": "stages", "engine": "zero2", "stop_after": 30, "resume": True})
    for engine in ENGINES:
        jobs.append({**whole, "name": f"{engine}-whole", "engine": engine, "is_saved": False})
        for stop, resume in ((13, False), (29, True), (0, True)):
            again = {"name": f"{engine}-again", "engine": engine, "stop_after": stop, "resume": resume}
            jobs.append({**whole, **again})
    forks.launch(2, folder, jobs)
    forks.launch(1, folder, [{**whole, "name": "ranks", "engine": "zero2", "stop_after": 33, "resume": True}])
    forks.launch(4, folder, [{**whole, "name": "ranks", "engine": "zero1", "resume": True}])
    run(Job(name="stages", steps=STEPS, resume=True), folder, Processes())
    return folder


@needs_deepspeed
@pytest.mark.parametrize("way", ["ranks", "stages"])
def test_a_run_changes_its_processes_and_stages_on_the_way(one: Path, changed: Path, figures, way: str) -> None:
    """(T5): ranks: 2 → 1 → 4 under ZeRO-3, 2 and 1; stages: ZeRO-3 → ZeRO-2 on two, then plain."""
    assert digests(changed, way) == digests(one, "fp32")
    off = furthest(losses(changed, way), losses(one, "fp32"))
    figures(way={"ranks": "2, 1, 4 processes", "stages": "ZeRO-3, ZeRO-2, plain"}[way], steps=STEPS, most_off=off)
    assert off <= MOST_OFF["fp32"]


@each_engine
def test_fifty_steps_with_two_stops_are_bit_equal(changed: Path, figures, engine: str) -> None:
    ours, theirs = (hex_losses(changed, f"{engine}-{name}") for name in ("again", "whole"))
    same = sum(a == b for a, b in zip(ours, theirs, strict=True))
    figures(engine=engine, processes=2, stops=2, steps=STEPS, equal_hex=same)
    assert same == STEPS


@needs_deepspeed
@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_thirty_kills(forks, tmp_path: Path, figures, engine: str) -> None:
    """(T1 over ranks): killed thirty times, and named by the other each time."""
    drawn = random.Random(5)
    steps = 64
    job = {"name": "killed", "engine": engine, "steps": steps, "save_every": 2, "resume": True}
    for number in range(1, 31):
        step, rank = 2 * number + drawn.randint(1, 2), drawn.randint(0, 1)
        ended = forks.launch(2, tmp_path, [{**job, "kill": [step, rank]}])
        assert ended[rank][0] == -9
        status, words = ended[1 - rank]
        assert status == LOST_STATUS, words[-2000:]
        assert f"rank {rank} (" in words, words[-2000:]
    forks.launch(2, tmp_path, [job])
    run(Job(name="whole", steps=steps, is_saved=False), tmp_path, Processes())
    assert digests(tmp_path, "killed") == digests(tmp_path, "whole")
    off = furthest(losses(tmp_path, "killed"), losses(tmp_path, "whole"))
    figures(engine=engine, processes=2, kills=30, named=30, steps=steps, most_off=off)
    assert off <= MOST_OFF["fp32"]


@needs_deepspeed
def test_a_tower_left_out_where_there_is_no_picture_shows(forks, tmp_path: Path) -> None:
    """The control of (T19): ranks that do not call the same modules hang, and are ended, or compute something else."""
    job = {"name": "control", "engine": "zero3", "kinds": "apart", "is_idle_run": False, "timeout_s": 20}
    ended = forks.launch(2, tmp_path, [job], most_s=120)
    run(Job(name="whole", kinds="apart", is_saved=False), tmp_path, Processes())
    file = tmp_path / "control" / "metrics.jsonl"
    ours = losses(tmp_path, "control") if file.exists() else []
    is_whole = len(ours) == 6 and furthest(ours, losses(tmp_path, "whole")) < 1e-6
    assert any(status != 0 for status, _ in ended) or not is_whole
