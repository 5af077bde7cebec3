"""Several processes train what one does: order, losses, guards, checkpoints; judged by what they wrote."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from ranks import digests, furthest, launch, losses, needs_deepspeed, said
from ranks_run import Job, run
from safetensors import safe_open

from blip3_lite import read_manifest
from trainer_lite import ParallelConfig, Processes, RunFolder, TrainConfig, read_metrics
from trainer_lite.loop import check_division

# Many starts of two and four processes, a minute or two: more than two busy cores should spend on every run.
pytestmark = [needs_deepspeed, pytest.mark.nightly]
ENGINES = ("ddp", "zero0", "zero1", "zero2", "zero3")
STEPS = 50


def alone(folder: Path, **job: Any) -> None:
    """The same job in this process."""
    run(Job(**job), folder, Processes())


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    alone(folder, name="mixed", steps=STEPS)
    alone(folder, name="bf16", steps=STEPS, precision="bf16")
    alone(folder, name="short", steps=20)
    for kinds in ("apart", "empty"):
        alone(folder, name=kinds, kinds=kinds)
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """All that two processes are asked to do, in one start of theirs."""
    folder = tmp_path_factory.mktemp("two")
    jobs: list[dict[str, Any]] = []
    for engine in ENGINES:
        jobs.append({"name": f"{engine}-mixed", "engine": engine, "steps": STEPS})
        # Half of the engines to the end: a step of a process pair takes up to a tenth of a second.
        cut = {} if engine in ("ddp", "zero2") else {"stop_after": 20}
        jobs.append({"name": f"{engine}-bf16", "engine": engine, "steps": STEPS, "precision": "bf16", **cut})
        jobs += [{"name": f"{engine}-{kinds}", "engine": engine, "kinds": kinds} for kinds in ("apart", "empty")]
        jobs.append({"name": f"{engine}-poison", "engine": engine, "poison": [4, 1]})
        jobs.append({"name": f"{engine}-again", "engine": engine, "steps": STEPS, "stop_after": 7})
        jobs.append({"name": f"{engine}-again", "engine": engine, "steps": STEPS, "stop_after": 14, "resume": True})
    jobs += [{"name": f"{name}-offload", "engine": name, "kinds": "apart", "offload": True} for name in ENGINES[2:]]
    begun = {"engine": "zero3", "steps": STEPS, "stop_after": 17}
    jobs += [{"name": name, **begun} for name in ("chain-ranks", "chain-stages")]
    jobs.append({"name": "chain-stages", "engine": "zero2", "steps": STEPS, "stop_after": 30, "resume": True})
    jobs.append({"name": "unlike", "is_unlike": True})
    jobs.append({"name": "full-disk", "engine": "ddp", "save_every": 2, "steps": 8, "stop_after": 2})
    jobs.append({"name": "full-disk", "engine": "ddp", "save_every": 2, "steps": 8, "resume": True, "refuse_shard": 1})
    ended = launch(2, folder, jobs, timeout_s=150)
    assert said(folder, "full-disk"), ended
    return folder


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_have_the_order_and_losses_of_one(one: Path, two: Path, engine: str) -> None:
    assert digests(two, f"{engine}-mixed") == digests(one, "mixed")
    assert furthest(losses(two, f"{engine}-mixed"), losses(one, "mixed")) < 1e-6
    in_bf16 = losses(two, f"{engine}-bf16")
    assert len(in_bf16) == (STEPS if engine in ("ddp", "zero2") else 21)
    assert furthest(in_bf16, losses(one, "bf16")[: len(in_bf16)]) < 1e-3
    # The comparison can fail: something is learnt, and the next batches' losses are others.
    assert furthest(losses(one, "mixed")[1:], losses(one, "mixed")[:-1]) > 0.1
    assert sum(losses(one, "mixed")[-10:]) < 0.9 * sum(losses(one, "mixed")[:10])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kinds", ["apart", "empty"])
def test_ranks_with_unlike_batches_keep_in_step(one: Path, two: Path, engine: str, kinds: str) -> None:
    """(T19): text alone on one rank and pictures alone on the other; batches without targets, and without samples."""
    assert digests(two, f"{engine}-{kinds}") == digests(one, kinds)
    assert furthest(losses(two, f"{engine}-{kinds}"), losses(one, kinds)) < 1e-6


@pytest.mark.parametrize("engine", ENGINES)
def test_a_nan_on_one_rank_moves_nothing_on_any(two: Path, engine: str) -> None:
    """(T20)."""
    first, second = said(two, f"{engine}-poison")
    assert first["before"] == first["after"] == second["before"] == second["after"]
    assert (first["step"], first["updates"]) == (second["step"], second["updates"]) == (6, 5)
    records = list(read_metrics(two / f"{engine}-poison" / "metrics.jsonl"))
    assert records[3].skipped == {"non_finite_update": 1}
    # The rate is a function of the updates made.
    assert records[3].lr == records[4].lr != records[5].lr


@pytest.mark.parametrize("engine", ENGINES)
def test_resume_in_the_same_set_up_is_bit_equal(two: Path, engine: str) -> None:
    whole, again = (
        [record.loss_hex for record in read_metrics(two / f"{engine}-{name}" / "metrics.jsonl")]
        for name in ("mixed", "again")
    )
    # Asked to stop in steps 7 and 14, all ranks agree on it a step later.
    assert len(again) == 15
    assert again == whole[:15]


@pytest.mark.parametrize("engine", ENGINES[2:])
def test_offload_of_the_optimiser_changes_no_loss(one: Path, two: Path, engine: str) -> None:
    assert digests(two, f"{engine}-offload") == digests(one, "apart")
    assert furthest(losses(two, f"{engine}-offload"), losses(one, "apart")) < 1e-6


@pytest.fixture(scope="module")
def chained(two: Path) -> Path:
    """What two processes began under ZeRO-3 goes on: on one under ZeRO-2 and on four; and without DeepSpeed."""
    launch(1, two, [{"name": "chain-ranks", "engine": "zero2", "steps": STEPS, "stop_after": 33, "resume": True}])
    more = [{"name": f"{engine}-four", "engine": engine, "steps": 20} for engine in ENGINES]
    launch(4, two, [{"name": "chain-ranks", "engine": "zero1", "steps": STEPS, "resume": True}, *more])
    alone(two, name="chain-stages", steps=STEPS, resume=True)
    return two


@pytest.mark.parametrize("way", ["ranks", "stages"])
def test_a_run_changes_its_processes_and_stages_on_the_way(one: Path, chained: Path, way: str) -> None:
    """(T5): 2 → 1 → 4 processes, and ZeRO-3 → ZeRO-2 → plain."""
    assert digests(chained, f"chain-{way}") == digests(one, "mixed")
    assert furthest(losses(chained, f"chain-{way}"), losses(one, "mixed")) < 1e-6


@pytest.mark.parametrize("engine", ENGINES)
def test_four_processes_have_the_order_and_losses_of_one(one: Path, chained: Path, engine: str) -> None:
    """(T28) at 4 ranks: every batch once, whatever is in it."""
    assert digests(chained, f"{engine}-four") == digests(one, "short")
    assert furthest(losses(chained, f"{engine}-four"), losses(one, "short")) < 1e-6


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


def test_a_full_disk_on_one_rank_fails_the_save_on_all(two: Path) -> None:
    first, second = said(two, "full-disk")
    for words in (first["error"], second["error"]):
        assert "rank 1: No space left on device" in words
    folder = two / "full-disk" / "checkpoints"
    # Asked to stop in step 2, all ranks agree on it in step 3.
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["step-00000002", "step-00000003"]
    for path in folder.glob("step-*"):
        read_manifest(path)


def test_hosts_with_other_data_are_refused_on_every_rank(two: Path) -> None:
    for told in said(two, "unlike"):
        assert "data: fingerprint 0 on rank 0, fingerprint 1 on rank 1; bring every host" in told["error"]
        assert "the same on rank" not in told["error"]


@pytest.mark.parametrize("damage", ["missing", "flipped"])
def test_a_shard_of_one_rank_that_is_missing_or_damaged_is_named(two: Path, tmp_path: Path, damage: str) -> None:
    shutil.copytree(two / "zero2-mixed", tmp_path / "run")
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


@pytest.mark.parametrize("count", [5, 8, 24])
def test_a_number_of_processes_that_does_not_divide_the_step_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=rf"divides the 12 batches .* got {count}; use one of 1, 2, 3, 4, 6, 12"):
        check_division(12, count)


def test_deepspeed_absent_says_what_to_install(tiny, monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"expected DeepSpeed, got no such package; install trainer-lite\[deepspeed\]"):
        tiny.trainer(TrainConfig(max_steps=1), parallel=ParallelConfig(engine="zero2"), network=tiny.model().network)


def test_muon_under_zero_is_refused(tiny) -> None:
    from trainer_lite import OptimizerConfig

    cfg = TrainConfig(max_steps=1, optimizer=OptimizerConfig(kind="muon"))
    with pytest.raises(ValueError, match="expected the optimiser adamw, got muon"):
        tiny.trainer(cfg, parallel=ParallelConfig(engine="zero2"), network=tiny.model().network)
