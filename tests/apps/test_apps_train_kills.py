"""`apps/train` under signals, with pictures, packing and a mixture: no place is lost, each end has its status."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import pytest


def course(folder: Path) -> list[tuple[int, str, str]]:
    """The last line of each step: what must be equal."""
    last = {line["step"]: line for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())}
    return [(step, last[step]["loss_hex"], last[step]["samples_digest"]) for step in sorted(last)]


@pytest.fixture(scope="session")
def mixed_data(llava_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources, 3 to 1: conversations with pictures, and the same without their first two, one picture missing."""
    rows = json.loads((llava_data.parent / "train.json").read_text())
    folder = tmp_path_factory.mktemp("mixed")
    rows[3]["image"] = "nowhere.png"
    (folder / "other.json").write_text(json.dumps(rows[2:]))
    other = f'[[sources]]\nname = "other"\nformat = "llava-json"\npath = "{folder}/other.json"\n'
    other += f'image_root = "{llava_data.parent}"\nratio = 1\n[skip_limits]\nmax_share = 0.5\n'
    file = folder / "data.toml"
    file.write_text(llava_data.read_text() + "ratio = 3\n" + other)
    return file


@pytest.fixture
def command(toy_flags, mixed_data: Path) -> list[str]:
    steps = ["--max-steps", "40", "--checkpoint-every", "2", "--max-samples", "3", "--spike-window", "4"]
    return ["sft", "--data", str(mixed_data), *toy_flags, *steps]


def killed(
    repo_root: Path, folder: Path, arguments: Sequence[str], kills: Sequence[str], seed: int, **more: object
) -> list[dict]:
    request = json.dumps({"arguments": arguments, "kills": kills, "seed": seed, **more})
    script, program = repo_root / "tests/trainer_lite/kill_runs.py", repo_root / "tests/apps/train_program.py"
    done = subprocess.run(
        [sys.executable, script, program, folder, request], capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("kills", "seed"),
    [
        (["startup", "calls", "startup", "disk", "calls"], 1),
        pytest.param(["startup"] * 20, 2, marks=pytest.mark.nightly),
        pytest.param(["calls", "disk", "startup"] * 10, 3, marks=pytest.mark.nightly),
    ],
)
def test_the_same_command_after_each_kill_ends_as_if_there_had_been_none(
    repo_root: Path, tmp_path: Path, command: list[str], kills: list[str], seed: int
) -> None:
    """(T1, T29): kills in steps, in saves, and in the start-up; controls: tests/trainer_lite/test_trainer_kills.py."""
    if len(kills) > 5:
        command += ["--max-steps", "200"]
    attempts = killed(repo_root, tmp_path, command, kills, seed)
    assert [attempt["status"] for attempt in attempts] == [-9] * len(kills) + [0]
    assert [attempt["refused"] for attempt in attempts[:-1]] == [[]] * len(kills)
    assert attempts[-1]["temporary"] == []
    whole = course(tmp_path / "whole")
    assert len(whole) >= 40
    assert course(tmp_path / "killed") == whole
    weights = [
        next((tmp_path / name).glob(f"checkpoints/step-{len(whole):08d}/model.safetensors"))
        for name in ("whole", "killed")
    ]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.parametrize("is_forgetful", [False, True])
def test_the_embedded_world_goes_on_where_it_was(train, parse, monkeypatch, tiny_processor, is_forgetful: bool) -> None:
    """(T2, T8): packs of two sources with their pictures; the control forgets what waits to be packed."""
    import train_stream
    from interleave_data import Packer
    from train_stream import make_stream
    from train_world import stage_data

    monkeypatch.setattr(train_stream, "_LOOK_AHEAD", 6)
    stage = parse("interleaved", "--max-tokens", "1024").stage
    data = stage_data("interleaved", 4, seed=1)

    def stream(state: dict | None = None):
        made = make_stream(stage, data, tiny_processor, None)
        if state is not None:
            made.load_state_dict(json.loads(json.dumps(state)))
        return made

    whole = [(batch.sample_ids, batch.ids.tolist()) for batch in islice(stream(), 5)]
    if is_forgetful:
        load = Packer.load_state_dict
        monkeypatch.setattr(
            Packer, "load_state_dict", lambda self, state, make: load(self, {**state, "waiting": []}, make)
        )
    resumed, state = [], None
    for count in (1, 0, 2, 2):
        made = stream(state)
        resumed += [(batch.sample_ids, batch.ids.tolist()) for batch in islice(made, count)]
        state = made.state_dict()
    assert (resumed == whole) is not is_forgetful


@pytest.mark.nightly
def test_two_thousand_steps_with_kills_bad_samples_and_changing_workers_end_in_the_same_weights(
    repo_root: Path, tmp_path: Path, toy_flags, llava_data: Path
) -> None:
    """(T32): one sample of 200 is bad; the workers change at each of thirty kills."""
    rows = json.loads((llava_data.parent / "train.json").read_text())
    many = [{**rows[index % len(rows)], "id": f"q{index}"} for index in range(200)]
    many[77]["image"] = "nowhere.png"
    (tmp_path / "many.json").write_text(json.dumps(many))
    data = tmp_path / "data.toml"
    data.write_text(llava_data.read_text().replace(f"{llava_data.parent}/train.json", str(tmp_path / "many.json")))
    command = ["sft", "--data", str(data), *toy_flags, "--max-steps", "2000", "--checkpoint-every", "20"]
    command += ["--max-samples", "3"]
    workers = [["--num-workers", number] for number in ("0", "2", "1")]
    kills = ["calls", "disk", "startup"] * 10
    attempts = killed(repo_root, tmp_path, command, kills, 4, changes=workers)
    assert [attempt["status"] for attempt in attempts] == [-9] * len(kills) + [0]
    assert attempts[-1]["temporary"] == []
    whole = course(tmp_path / "whole")
    assert len(whole) == 2000
    assert course(tmp_path / "killed") == whole
    last = [
        json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1]) for name in ("whole", "killed")
    ]
    assert last[0]["skipped"] == last[1]["skipped"]
    assert sum(last[0]["skipped"].values()) >= 20
    weights = [tmp_path / name / "checkpoints/step-00002000/model.safetensors" for name in ("whole", "killed")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def signal_at(monkeypatch, step: int, *numbers: int) -> None:
    """Let this process get signals while it makes that step."""
    from trainer_lite import MetricsLog

    append = MetricsLog.append

    def append_and_signal(self, record) -> None:
        append(self, record)
        if record.step == step:
            for number in numbers:
                os.kill(os.getpid(), number)

    monkeypatch.setattr(MetricsLog, "append", append_and_signal)


def test_sigterm_saves_exits_143_and_the_run_goes_on(
    train, tmp_path: Path, command: list[str], monkeypatch, capsys
) -> None:
    """(T29)"""
    command += ["--max-steps", "6", "--checkpoint-every", "4"]
    assert train(*command, "--out", "whole") == 0
    with monkeypatch.context() as patched:
        signal_at(patched, 3, signal.SIGTERM)
        assert train(*command, "--out", "mine") == 143
    assert "--resume" in capsys.readouterr().err
    assert (tmp_path / "mine/checkpoints/step-00000003/MANIFEST.json").is_file()
    assert "<h1>Run of sft</h1>" in (tmp_path / "mine/report.html").read_text()
    with monkeypatch.context() as patched:
        # The second one does not wait for a checkpoint.
        signal_at(patched, 4, signal.SIGTERM, signal.SIGTERM)
        assert train(*command, "--out", "mine", "--resume", "auto") == 143
    assert (tmp_path / "mine/checkpoints/latest").read_text() == "step-00000003\n"
    assert train(*command, "--out", "mine", "--resume", "auto") == 0
    assert course(tmp_path / "mine") == course(tmp_path / "whole")
    assert len(course(tmp_path / "mine")) == 6


def stall_at(monkeypatch, step: int, after_s: float) -> None:
    """Stop this process's data workers, as a hanging disk would, when a step is made; some time later comes SIGTERM."""
    from trainer_lite import MetricsLog

    append = MetricsLog.append

    def append_and_stall(self, record) -> None:
        append(self, record)
        if record.step == step:
            for worker in multiprocessing.active_children():
                os.kill(int(worker.pid or 0), signal.SIGSTOP)
            threading.Timer(after_s, os.kill, (os.getpid(), signal.SIGTERM)).start()

    monkeypatch.setattr(MetricsLog, "append", append_and_stall)


def test_sigterm_while_a_worker_stalls_saves_the_last_whole_step(
    train, tmp_path: Path, command: list[str], monkeypatch, capsys
) -> None:
    """(T29): three batches a step, of which those made ahead come; controls: tests/interleave_data, /trainer_lite."""
    command += ["--max-steps", "6", "--accumulation-steps", "3", "--checkpoint-every", "5"]
    assert train(*command, "--out", "whole") == 0
    with monkeypatch.context() as patched:
        stall_at(patched, 3, after_s=0.5)
        assert train(*command, "--out", "mine", "--num-workers", "1") == 143
    assert "stopped at step 3; continue with" in capsys.readouterr().err
    assert (tmp_path / "mine/checkpoints/step-00000003/MANIFEST.json").is_file()
    assert train(*command, "--out", "mine", "--resume", "auto") == 0
    assert course(tmp_path / "mine") == course(tmp_path / "whole")
    assert len(course(tmp_path / "mine")) == 6


def test_resume_auto_passes_over_what_is_damaged_and_a_named_one_is_taken(
    train, tmp_path: Path, command: list[str], capsys
) -> None:
    """(T4)"""
    command += ["--max-steps", "4", "--checkpoint-every", "1", "--out", "mine"]
    assert train(*command, "--resume", "auto", "--keep-last", "9") == 0
    whole = course(tmp_path / "mine")
    saved = json.loads((tmp_path / "mine/config.json").read_text())["config"]
    assert (saved["resume"], saved["stage"]["train"]["save_every"]) == (None, 1)
    file = tmp_path / "mine/checkpoints/step-00000004/optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert train(*command, "--resume=auto", "--keep-last", "9") == 0
    said = capsys.readouterr().err
    assert "warning: passed over: checkpoint mine/checkpoints/step-00000004: damaged: optimizer.safetensors" in said
    assert "going on from mine/checkpoints/step-00000003, behind step 3" in said
    assert course(tmp_path / "mine") == whole
    assert train(*command, "--resume", "mine/checkpoints/step-00000002") == 0
    assert "going on from mine/checkpoints/step-00000002, behind step 2" in capsys.readouterr().err
    assert course(tmp_path / "mine") == whole
    for wish, hint in (("newst", "expected auto, newest or a folder in mine/checkpoints, got newst"), ("", "got ;")):
        assert train(*command, "--resume", wish) == 2
        assert hint in capsys.readouterr().err


def test_a_shard_that_changed_is_named_and_its_source_begins_anew_by_a_flag(
    train, tmp_path: Path, toy_flags, llava_data: Path, monkeypatch, capsys
) -> None:
    """(T7)"""
    rows = json.loads((llava_data.parent / "train.json").read_text())
    shards = {"0.jsonl": rows[:3], "1.jsonl": rows[3:6], "2.jsonl": rows[6:]}
    for name, part in shards.items():
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in part))
    source = '[[sources]]\nname = "toy"\nformat = "llava-json"\npath = "*.jsonl"\n'
    (tmp_path / "data.toml").write_text(f'{source}image_root = "{llava_data.parent}"\n')
    command = ["sft", "--data", "data.toml", "--out", "mine", *toy_flags, "--max-steps", "4", "--max-samples", "2"]
    with monkeypatch.context() as patched:
        signal_at(patched, 2, signal.SIGTERM)
        assert train(*command) == 143
    (tmp_path / "1.jsonl").unlink()
    capsys.readouterr()
    assert train(*command, "--resume") == 2
    assert "got data: toy (removed: 1.jsonl); restore them or accept" in capsys.readouterr().err
    assert train(*command, "--resume", "--accept-data-change") == 0
    said = capsys.readouterr().err
    assert "toy: is not as in the checkpoint (removed: 1.jsonl), so it is read from its beginning" in said
    assert [step for step, *_ in course(tmp_path / "mine")] == [1, 2, 3, 4]


def test_full_disk_has_status_4_and_too_many_steps_that_are_not_finite_5(
    train, tmp_path: Path, command: list[str], monkeypatch, capsys
) -> None:
    """(T3, T20): the statuses; the rest is in tests/trainer_lite/test_trainer_saves.py and test_trainer_loop.py."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))
    try:
        assert train(*command, "--out", "full") == 4
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = capsys.readouterr().err
    assert "train: checkpoint full/checkpoints/step-00000002: expected to write " in said
    assert "File too large" in said
    assert train(*command, "--out", "bad", "--optimizer.learning-rate", "1e30", "--max-nonfinite-steps", "2") == 5
    assert "2 steps in a row; lower the learning rate" in capsys.readouterr().err


def test_a_run_that_is_at_work_is_bad_input(train, tmp_path: Path, command: list[str], capsys) -> None:
    command += ["--max-steps", "1", "--out", "mine"]
    assert train(*command) == 0
    code = "import sys; from trainer_lite import RunFolder; run = RunFolder.reopen('mine'); print(); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert train(*command, "--resume", "auto") == 2
        other.kill()
    assert "expected no process at work there, got one that still is" in capsys.readouterr().err
