"""Several processes train what one does: order, losses, guards, checkpoints; judged by what they wrote.

All of it in this file, which is one worker's: ranks of two tests at once would only wait for each other's cores. What
takes longer is in `test_trainer_ranks_nightly.py`.
"""

import shutil
import socket
from pathlib import Path
from typing import Any

import msgspec
import pytest
from ranks import (
    ENGINES,
    digests,
    each_engine,
    furthest,
    hex_losses,
    losses,
    needs_deepspeed,
    needs_linux,
    said,
)
from ranks_run import Job, epoch, run
from safetensors import safe_open

from blip3_lite import read_manifest
from trainer_lite import OptimizerConfig, ParallelConfig, Processes, RunFolder, TrainConfig, read_metrics
from trainer_lite.config import check_division
from trainer_lite.watchman import LOST_STATUS

STEPS, FEW = 8, 3


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """What one process makes of the same jobs."""
    folder = tmp_path_factory.mktemp("one")
    for job in (
        Job(name="mixed", steps=STEPS),
        Job(name="bf16", steps=FEW, precision="bf16"),
        Job(name="apart", steps=FEW, kinds="apart"),
        Job(name="empty", steps=FEW, kinds="empty"),
    ):
        run(msgspec.structs.replace(job, is_saved=False), folder, Processes())
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory, forks) -> Path:
    """All that two processes are asked to do, in one start of theirs."""
    folder = tmp_path_factory.mktemp("two")
    jobs: list[dict[str, Any]] = []
    for engine in ENGINES:
        jobs.append({"name": f"{engine}-mixed", "engine": engine, "steps": STEPS})
        jobs.append({"name": f"{engine}-again", "engine": engine, "steps": STEPS, "stop_after": 3})
        jobs.append({"name": f"{engine}-again", "engine": engine, "steps": STEPS, "resume": True})
        few = {"engine": engine, "steps": FEW, "is_saved": False}
        jobs += [{"name": f"{engine}-{kinds}", "kinds": kinds, **few} for kinds in ("apart", "empty")]
        jobs.append({"name": f"{engine}-bf16", "precision": "bf16", **few})
        jobs.append({**few, "name": f"{engine}-spoilt", "steps": 6, "blow": [2, 0], "poison": [4, 1]})
        if engine in ("zero1", "zero2", "zero3"):
            jobs.append({"name": f"{engine}-offload", "kinds": "apart", "offload": True, **few})
    if "zero3" in ENGINES:
        jobs.append({"name": "chain", "engine": "zero3", "steps": STEPS, "stop_after": 2})
        jobs.append({"name": "chain", "engine": "zero2", "steps": STEPS, "stop_after": 5, "resume": True})
    jobs += [{"name": f"unlike-{what}", "unlike": what} for what in ("code", "data")]
    jobs.append({"name": "full-disk", "save_every": 2, "steps": STEPS, "stop_after": 2})
    jobs.append({"name": "full-disk", "save_every": 2, "steps": STEPS, "resume": True, "refuse_shard": 1})
    ended = forks.launch(2, folder, jobs)
    # Of a clean run the last line is written, whatever its process ends with.
    assert len(said(folder, "full-disk")) == 2, ended
    return folder


@needs_linux
@each_engine
def test_two_processes_have_the_order_and_losses_of_one(one: Path, two: Path, engine: str) -> None:
    assert digests(two, f"{engine}-mixed") == digests(one, "mixed")
    assert furthest(losses(two, f"{engine}-mixed"), losses(one, "mixed")) <= 1e-6
    assert furthest(losses(two, f"{engine}-bf16"), losses(one, "bf16")) <= 1e-3
    # The comparison can fail: the next batches' losses are others.
    assert furthest(losses(one, "mixed")[1:], losses(one, "mixed")[:-1]) > 0.1


@needs_linux
@each_engine
@pytest.mark.parametrize("kinds", ["apart", "empty"])
def test_ranks_with_unlike_batches_keep_in_step(one: Path, two: Path, engine: str, kinds: str) -> None:
    """(T19): text alone on one rank and 13 tiles on the other; batches without targets, and without samples.

    Of the latter the whole second step is without targets: its loss is 0, and nothing moves, not by momentum either.
    "mixed" has 13 tiles on one rank beside 1 on the other.
    """
    assert digests(two, f"{engine}-{kinds}") == digests(one, kinds)
    assert furthest(losses(two, f"{engine}-{kinds}"), losses(one, kinds)) <= 1e-6


@needs_linux
@each_engine
def test_an_infinite_loss_or_a_nan_on_one_rank_moves_nothing_on_any(two: Path, engine: str) -> None:
    """(T20): an infinite loss on rank 0 in step 2, a NaN in one gradient on rank 1 in step 4."""
    first, second = said(two, f"{engine}-spoilt")
    assert first["before"] == first["after"] == second["before"] == second["after"]
    assert len(set(first["before"])) == 2
    assert (first["step"], first["updates"]) == (second["step"], second["updates"]) == (6, 4)
    records = list(read_metrics(two / f"{engine}-spoilt" / "metrics.jsonl"))
    assert [record.skipped.get("non_finite_update", 0) for record in records] == [0, 1, 1, 2, 2, 2]
    # The rate is a function of the updates made.
    assert records[1].lr == records[2].lr != records[4].lr
    assert records[3].lr == records[4].lr != records[5].lr
    noted = (two / f"{engine}-spoilt" / "nonfinite.jsonl").read_bytes().splitlines()
    assert [msgspec.json.decode(line)["step"] for line in noted] == [2, 4]
    # Step 2 has the batches 4 to 7, of both ranks.
    assert {name.split(".")[0] for name in msgspec.json.decode(noted[0])["sample_ids"]} == {"s4", "s5", "s6", "s7"}


@needs_linux
@each_engine
def test_resume_in_the_same_set_up_is_bit_equal(two: Path, engine: str) -> None:
    """Asked to stop in step 3, all ranks agree on it a step later."""
    assert hex_losses(two, f"{engine}-again") == hex_losses(two, f"{engine}-mixed")
    folders = (two / f"{engine}-again" / "checkpoints").glob("step-*")
    assert sorted(path.name for path in folders) == ["step-00000004", "step-00000008"]


@needs_linux
@needs_deepspeed
@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3"])
def test_offload_of_the_optimiser_changes_no_loss(one: Path, two: Path, engine: str) -> None:
    assert digests(two, f"{engine}-offload") == digests(one, "apart")
    assert furthest(losses(two, f"{engine}-offload"), losses(one, "apart")) <= 1e-6


@needs_linux
@needs_deepspeed
def test_a_run_changes_its_stage_and_its_processes_on_the_way(one: Path, two: Path) -> None:
    """(T5): ZeRO-3, then ZeRO-2, on two processes; then one that needs no DeepSpeed."""
    run(Job(name="chain", steps=STEPS, resume=True), two, Processes())
    assert digests(two, "chain") == digests(one, "mixed")
    assert furthest(losses(two, "chain"), losses(one, "mixed")) <= 1e-6


@needs_linux
def test_an_epoch_has_every_sample_once_for_any_number_of_ranks(forks, tmp_path: Path) -> None:
    """(T28), with bad samples: pictures and text, packed by length, over 2, 4 and 8 processes."""
    job = {"name": "epoch", "kinds": "epoch"}
    counts = (2, 4, 8)
    forks.at_once(tmp_path, *({"count": count, "jobs": [{**job, "name": f"epoch-{count}"}]} for count in counts))
    alone = epoch(Processes())
    names = [name for pack in alone["packs"] for name in pack]
    assert len(names) == len(set(names)) == 131 - alone["skips"]["broken_image"] < 131
    for count in counts:
        ranks = said(tmp_path, f"epoch-{count}")
        assert len(ranks) == count
        assert all(rank["skips"] == alone["skips"] for rank in ranks)
        packs = [pack for turn in zip(*(rank["packs"] for rank in ranks), strict=True) for pack in turn]
        # The last round is filled up with packs of nothing.
        assert packs[: len(alone["packs"])] == alone["packs"]
        assert not any(packs[len(alone["packs"]) :])


@needs_linux
@needs_deepspeed
def test_every_rank_writes_its_share_and_no_tensor_twice(two: Path) -> None:
    folder = sorted((two / "zero3-mixed" / "checkpoints").glob("step-*"))[-1]
    names: list[str] = []
    sizes: list[int] = []
    for file in sorted(folder.glob("model-*.safetensors")):
        with safe_open(file, framework="pt") as shard:
            names += list(shard.keys())
            sizes.append(file.stat().st_size)
    assert len(sizes) == 2
    assert max(sizes) < 2 * min(sizes)
    assert len(names) == len(set(names)) > 10
    assert {"model-00001-of-00002.safetensors", "optimizer-00002-of-00002.safetensors"} <= set(
        read_manifest(folder)["files"]  # pyright: ignore[reportArgumentType]
    )


@needs_linux
def test_a_full_disk_on_one_rank_fails_the_save_on_all(two: Path) -> None:
    first, second = said(two, "full-disk")
    for words in (first["error"], second["error"]):
        assert "rank 1: No space left on device" in words
    folder = two / "full-disk" / "checkpoints"
    # Asked to stop in step 2, all ranks agree on it in step 3.
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["step-00000002", "step-00000003"]
    for path in folder.glob("step-*"):
        read_manifest(path)


@needs_linux
@pytest.mark.parametrize("what", ["code", "data"])
def test_hosts_with_other_code_or_data_are_refused_on_every_rank(two: Path, what: str) -> None:
    for told in said(two, f"unlike-{what}"):
        assert f"got {what}: fingerprint 0 on rank 0, fingerprint 1 on rank 1; bring every host" in told["error"]


@needs_linux
def test_a_checkpoint_of_another_model_is_refused_on_every_rank(two: Path, forks, tmp_path: Path) -> None:
    shutil.copytree(two / "ddp-mixed", tmp_path / "other")
    forks.launch(2, tmp_path, [{"name": "other", "width": 20, "steps": STEPS, "resume": True}])
    told = said(tmp_path, "other")
    assert len(told) == 2
    for rank in told:
        assert "table.weight" in rank["error"]
        assert "tower.2.weight: expected [20, 40], got [16, 32]" in rank["error"]


@needs_linux
@pytest.mark.parametrize("damage", ["missing", "flipped"])
def test_a_shard_of_one_rank_that_is_missing_or_damaged_is_named(two: Path, tmp_path: Path, damage: str) -> None:
    shutil.copytree(two / "ddp-mixed", tmp_path / "run")
    run_folder = RunFolder(tmp_path / "run")
    folder = run_folder.checkpoints()[-1]
    shard = folder / "optimizer-00002-of-00002.safetensors"
    if damage == "missing":
        shard.unlink()
    else:
        content = bytearray(shard.read_bytes())
        content[-5] ^= 1
        shard.write_bytes(content)
    found = run_folder.find_checkpoint()
    assert found.path is None
    assert shard.name in found.refused[0]


@needs_linux
@needs_deepspeed
def test_a_rank_killed_twice_under_zero2_is_named_and_the_run_goes_on(one: Path, forks, tmp_path: Path) -> None:
    job = {"name": "killed", "engine": "zero2", "steps": STEPS, "save_every": 2, "resume": True}
    for step, rank in ((4, 1), (7, 0)):
        ended = forks.launch(2, tmp_path, [{**job, "kill": [step, rank]}])
        assert ended[rank][0] == -9
        status, words = ended[1 - rank]
        assert status == LOST_STATUS, words[-2000:]
        assert f"rank {rank} (" in words, words[-2000:]
    forks.launch(2, tmp_path, [job])
    assert digests(tmp_path, "killed") == digests(one, "mixed")
    assert furthest(losses(tmp_path, "killed"), losses(one, "mixed")) <= 1e-6


@pytest.fixture(scope="module")
def lost(forks, tmp_path_factory) -> dict[str, list[tuple[int, str]]]:
    """How ranks ended that waited for others; all begun at once, as waiting takes no core."""
    folder = tmp_path_factory.mktemp("lost")
    # Longer than a rank that lives is ever kept from its core.
    waiting = {"steps": 6, "timeout_s": 12, "is_saved": False}
    jobs: dict[str, dict[str, Any]] = {"hang": {"hang": [3, 1]}, "doze": {"doze": [3, 1]}}
    if "zero3" in ENGINES:
        jobs["stall"] = {"stall": [3, 1], "engine": "zero3"}
    launches: dict[str, dict[str, Any]] = {
        name: {"count": 2, "jobs": [{"name": name, **job, **waiting}], "is_over_with_first": True}
        for name, job in jobs.items()
    }
    alone = {"count": 1, "told": 2, "jobs": [{"name": "x", "timeout_s": 3}]}
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        launches |= {"taken": {**alone, "port": taken.getsockname()[1]}, "alone": alone}
        ended = forks.at_once(folder, *launches.values())
    return dict(zip(launches, ended, strict=True))


@needs_linux
@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("hang", "no sign of life"),
        ("doze", "last seen at step 3, data, alive but without progress for"),
        pytest.param("stall", "last seen at step 3, batch 1, alive but without progress for", marks=needs_deepspeed),
    ],
)
def test_a_rank_that_hangs_is_named(lost, how: str, words: str) -> None:
    """Stopped as by a machine that swaps; waiting for data; in a forward pass, where the other gathers its parts."""
    status, said = lost[how][0]
    assert status == LOST_STATUS, said[-2000:]
    assert "rank 1 (" in said
    assert words in said


@needs_linux
@pytest.mark.parametrize("how", ["taken", "alone"])
def test_a_meeting_that_does_not_come_about_says_so(lost, how: str) -> None:
    """A port that another program holds, as what is left of an earlier run may; a second rank that never comes."""
    ((status, said),) = lost[how]
    assert status == 1
    assert "expected 2 processes to meet there within 3 s" in said


@pytest.mark.parametrize("count", [5, 8, 24])
def test_a_number_of_processes_that_does_not_divide_the_step_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=rf"divides the 12 batches .* got {count}; use one of 1, 2, 3, 4, 6, 12"):
        check_division(12, count)


def test_deepspeed_absent_says_what_to_install(tiny, monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"expected DeepSpeed, got no such package; install trainer-lite\[deepspeed\]"):
        tiny.trainer(TrainConfig(max_steps=1), parallel=ParallelConfig(engine="zero2"), network=tiny.model().network)


def test_muon_under_zero_is_refused(tiny) -> None:
    cfg = TrainConfig(max_steps=1, optimizer=OptimizerConfig(kind="muon"))
    with pytest.raises(ValueError, match="expected the optimiser adamw, got muon"):
        tiny.trainer(cfg, parallel=ParallelConfig(engine="zero2"), network=tiny.model().network)
