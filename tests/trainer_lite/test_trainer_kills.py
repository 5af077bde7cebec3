"""Kill a run at any moment, resume it, and nothing shows; and the comparison can fail."""

import json
import resource
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import msgspec
import pytest
import torch

import trainer_lite.train_state
from trainer_lite import LossSum, Optimizers, TrainConfig, read_metrics

HERE = Path(__file__).parent
# The program that the children run, too.
_spec = spec_from_file_location("tiny_run", HERE / "tiny_run.py")
assert _spec is not None
assert _spec.loader is not None
tiny_run = sys.modules["tiny_run"] = module_from_spec(_spec)
_spec.loader.exec_module(tiny_run)
settings, trainer = tiny_run.settings, tiny_run.trainer


def course(folder: Path) -> list[tuple[int, str, str, float]]:
    """The last line of each step: what must be equal."""
    last = {record.step: record for record in read_metrics(folder / "metrics.jsonl")}
    return [(step, last[step].loss_hex, last[step].samples_digest, last[step].lr) for step in sorted(last)]


def killed(tmp_path: Path, max_steps: int, save_every: int, kills: list[str], seed: int) -> list[dict]:
    request = {"arguments": [str(max_steps), str(save_every)], "kills": kills, "seed": seed}
    command = [sys.executable, HERE / "kill_runs.py", HERE / "tiny_run.py", tmp_path, json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check_kills(tmp_path: Path, attempts: list[dict], max_steps: int, save_every: int) -> None:
    assert [attempt["status"] for attempt in attempts] == [-9] * (len(attempts) - 1) + [0]
    for attempt in attempts[:-1]:
        assert attempt["refused"] == []
        # The checkpoint that the kill interrupted, and those steps that were made while it became whole.
        assert attempt["step"] - attempt["resumes_at"] <= 2 * save_every
    assert attempts[-1]["temporary"] == []
    whole = course(tmp_path / "whole")
    assert len(whole) == max_steps
    assert course(tmp_path / "killed") == whole == course(tmp_path / "again")
    ends = [tmp_path / name / f"checkpoints/step-{max_steps:08d}" for name in ("whole", "killed")]
    for name in ("model.safetensors", "optimizer.safetensors", "rng.safetensors"):
        assert (ends[0] / name).read_bytes() == (ends[1] / name).read_bytes()


def test_five_kills_do_not_show(tmp_path: Path) -> None:
    """(T1): in steps, in saves, between write and rename; the controls are in `test_resume_without_a_part_shows`."""
    attempts = killed(tmp_path, max_steps=60, save_every=3, kills=["calls", "disk"] * 2 + ["calls"], seed=4)
    check_kills(tmp_path, attempts, max_steps=60, save_every=3)
    assert any(attempt["resumes_at"] > 0 for attempt in attempts[:-1])
    # One of them hit a save: it left a folder that is not whole, which nobody took for a checkpoint.
    assert any(attempt["temporary"] for attempt in attempts[:-1])


@pytest.mark.nightly
@pytest.mark.parametrize("seed", [2, 3])
def test_thirty_kills_do_not_show(tmp_path: Path, seed: int) -> None:
    """(T1)"""
    attempts = killed(tmp_path, max_steps=600, save_every=3, kills=["calls", "disk"] * 15, seed=seed)
    check_kills(tmp_path, attempts, max_steps=600, save_every=3)


def stop_behind(folder: Path, cfg, *steps: int, **more) -> None:
    """Run and stop behind each of `steps` in turn; the same step again means: save at once."""
    for step in steps:
        made = trainer(folder, cfg, **more)
        made.on_step = lambda record, made=made, step=step: made.stop.set() if record.step >= step else None
        if made.counters.step >= step:
            made.stop.set()
        assert made.fit().counters.step == step


def emptied(state: object, name: str) -> int:
    """Empty every list of that name in a nested state; return how many things were thrown away."""
    if not isinstance(state, dict):
        return 0
    thrown = sum(emptied(part, name) for part in state.values())
    if isinstance(state.get(name), list):
        thrown += len(state[name])
        state[name] = []
    return thrown


@pytest.mark.parametrize("omitted", ["nothing", "random states", "optimiser", "stream", "waiting samples", "schedule"])
def test_resume_without_a_part_shows(tmp_path: Path, monkeypatch, omitted: str) -> None:
    """(T1, T2): the controls. Without any part of the state the course is another one."""
    cfg = settings(max_steps=20, save_every=0)
    trainer(tmp_path / "whole", cfg).fit()
    whole = course(tmp_path / "whole")
    stop_behind(tmp_path / "cut", cfg, 9)
    # What stands in the checkpoint is loaded a second time without the part.
    if omitted == "random states":
        monkeypatch.setattr(trainer_lite.train_state, "set_rng_state", lambda states: torch.manual_seed(5))
    if omitted == "optimiser":
        monkeypatch.setattr(Optimizers, "load_state_tensors", lambda self, tensors: None)
    if omitted == "stream":
        monkeypatch.setattr(tiny_run.RowStream, "load_state_dict", lambda self, state: None)
    if omitted == "waiting samples":
        load = tiny_run.RowStream.load_state_dict

        def load_without(self, state: dict) -> None:
            assert emptied(state, "waiting") > 0
            load(self, state)

        monkeypatch.setattr(tiny_run.RowStream, "load_state_dict", load_without)
    made = trainer(tmp_path / "cut", cfg)
    if omitted == "schedule":
        made.counters.updates = 0
    made.fit()
    got = course(tmp_path / "cut")
    assert [row[0] for row in got] == [row[0] for row in whole]
    assert got[:9] == whole[:9]
    assert (got == whole) is (omitted == "nothing")
    is_other_order = [row[2] for row in got] != [row[2] for row in whole]
    assert is_other_order is (omitted in ("stream", "waiting samples"))


def test_resume_at_an_epochs_end_twice_in_one_and_at_once(tmp_path: Path) -> None:
    """(T2): with two packs a step, and samples that wait; the end to the very sample is in test_data_stream.py."""
    # 24 + 8 samples: an epoch of the first source ends every few steps, and stops fall on, before and behind its end.
    cfg = settings(max_steps=16, save_every=0)
    made = trainer(tmp_path / "whole", cfg, num_samples=24)
    made.fit()
    # Samples have 5 tokens on average, and one in ten is bad.
    assert made.counters.tokens > 4 * 24 * 4.5
    whole = course(tmp_path / "whole")
    for stops in [[step] for step in range(3, 10)] + [[3, 4, 5], [7, 7, 7, 12]]:
        folder = tmp_path / "-".join(map(str, stops))
        stop_behind(folder, cfg, *stops, num_samples=24)
        trainer(folder, cfg, num_samples=24).fit()
        assert course(folder) == whole, stops


class Killed(BaseException):
    """Stands for the end of the process: nothing in the loop may catch it."""


def killed_in_a_window(folder: Path, cfg: TrainConfig, micro_batch: int) -> None:
    """Let a run die before it has seen this micro-batch, counted over all windows."""
    made = trainer(folder, cfg)
    loss, seen = made.model.loss, []

    def loss_until(batch) -> LossSum:
        seen.append(batch)
        if len(seen) == micro_batch:
            raise Killed
        return loss(batch)

    made.model.loss = loss_until
    with pytest.raises(Killed):
        made.fit()


def check_window_is_done_again(tmp_path: Path, cfg: TrainConfig, micro_batch: int, border: int) -> None:
    """A run that dies in a window goes on from the border before, and nothing of it shows."""
    trainer(tmp_path / "whole", cfg).fit()
    killed_in_a_window(tmp_path / "cut", cfg, micro_batch)
    made = trainer(tmp_path / "cut", cfg)
    assert made.counters.step == border
    assert made.stream.stream.state_dict()["plan"]["packer"]["waiting"]
    made.fit()
    assert course(tmp_path / "cut") == course(tmp_path / "whole")


# Windows of three packs, a checkpoint behind every second step: twelve packs are behind the one of step 4.
@pytest.mark.parametrize(("micro_batch", "border"), [(14, 4), (15, 4), (13, 4), (18, 4), (19, 6)])
def test_a_window_that_a_kill_cut_in_two_is_done_again_from_its_border(tmp_path, micro_batch, border):
    """(T2): in the middle of an accumulation window."""
    cfg = msgspec.structs.replace(settings(max_steps=9, save_every=2), accumulation_steps=3)
    check_window_is_done_again(tmp_path, cfg, micro_batch, border)


def test_a_state_from_within_a_window_shows(tmp_path: Path, monkeypatch) -> None:
    """(T2): the control. What a loader saves that is one pack further than the step."""
    state_dict = tiny_run.RowStream.state_dict

    def ahead(self) -> dict:
        copy = tiny_run.RowStream(60)
        copy.load_state_dict(json.loads(json.dumps(state_dict(self))))
        next(iter(copy))
        return state_dict(copy)

    monkeypatch.setattr(tiny_run.RowStream, "state_dict", ahead)
    cfg = msgspec.structs.replace(settings(max_steps=9, save_every=2), accumulation_steps=3)
    with pytest.raises(AssertionError, match="At index 4"):
        check_window_is_done_again(tmp_path, cfg, 14, 4)


@pytest.mark.nightly
def test_two_thousand_steps_with_kills_end_in_the_same_weights(tmp_path: Path) -> None:
    """(T32)"""
    attempts = killed(tmp_path, max_steps=2000, save_every=20, kills=["calls", "disk", "startup"] * 10, seed=4)
    check_kills(tmp_path, attempts, max_steps=2000, save_every=20)


@pytest.mark.nightly
def test_memory_stays_flat(tmp_path: Path) -> None:
    """(T32)"""
    made = trainer(tmp_path / "run", settings(max_steps=2000, save_every=50))
    resident: list[int] = []

    def look(record) -> None:
        if record.step % 100 == 0:
            resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize())

    made.on_step = look
    made.fit()
    # The first hundreds fill caches.
    slope = (resident[-1] - resident[4]) / (len(resident) - 5)
    assert slope < 1 << 20
