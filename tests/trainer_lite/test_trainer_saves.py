"""A save that fails, a checkpoint that is damaged, a run that is already at work: nothing is lost, and it is said."""

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import blip3_lite.folder
from blip3_lite import CheckpointError
from trainer_lite import RunFolder, SaveError, TrainConfig, read_metrics
from trainer_lite.guards import StepLog


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """A disk on which no file may grow beyond so many bytes; for root too."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def names(run: RunFolder) -> list[str]:
    return sorted(path.name for path in run.checkpoints_path.iterdir())


def begun(tiny, folder: Path, progress=None, **settings):
    run = RunFolder.create(folder, {})
    return run, tiny.trainer(TrainConfig(save_every=2, **settings), run=run, with_files=True, progress=progress)


def on_a_disk_that_is_full_at(run: RunFolder, *steps: int, num_bytes: int = 100) -> None:
    begin = run.begin_checkpoint

    def begin_there(step: int, *arguments):
        with files_of_at_most(num_bytes if step in steps else 1 << 30):
            return begin(step, *arguments)

    run.begin_checkpoint = begin_there  # type: ignore[method-assign]


def check_full_disk_leaves_the_checkpoint_before(tiny, folder: Path, num_bytes: int) -> None:
    run, trainer = begun(tiny, folder, max_steps=9, keep_last=1)
    on_a_disk_that_is_full_at(run, 4, num_bytes=num_bytes)
    with pytest.raises(SaveError) as caught:
        trainer.fit()
    needed = sum(param.nbytes for param in trainer.model.network.parameters())
    needed += sum(value.nbytes for value in trainer.optimizers.state_tensors().values())
    assert f"checkpoint {run.checkpoints_path}/step-00000004: expected to write {needed:,} bytes" in str(caught.value)
    assert "File too large" in str(caught.value)
    assert names(run) == ["latest", "step-00000002"]
    assert run.find_checkpoint().path == run.checkpoints_path / "step-00000002"


# The model's own file does not fit, or the optimiser's.
@pytest.mark.parametrize("num_bytes", [100, 1500])
def test_full_disk_stops_with_what_is_needed_and_leaves_the_checkpoint_before(tiny, tmp_path, num_bytes):
    """(T3)"""
    check_full_disk_leaves_the_checkpoint_before(tiny, tmp_path / "run", num_bytes)


def test_a_retention_that_makes_room_first_shows(tiny, tmp_path, monkeypatch):
    """(T3): the control, the old checkpoint is removed before the new one is whole."""
    begin = RunFolder.begin_checkpoint

    def make_room_and_begin(self, *arguments):
        for path in self.checkpoints():
            shutil.rmtree(path)
        return begin(self, *arguments)

    monkeypatch.setattr(RunFolder, "begin_checkpoint", make_room_and_begin)
    with pytest.raises(AssertionError):
        check_full_disk_leaves_the_checkpoint_before(tiny, tmp_path / "run", 100)


def test_full_disk_may_be_only_a_warning_until_the_end(tiny, tmp_path):
    """(T3)"""
    lines: list[str] = []

    class Lines:
        start = advance = close = lambda self, *arguments: None

        def line(self, text: str) -> None:
            lines.append(text)

    run, trainer = begun(tiny, tmp_path / "run", Lines(), max_steps=9, keep_last=1, on_save_error="warn")
    on_a_disk_that_is_full_at(run, 4, 6)
    result = trainer.fit()
    assert names(run) == ["latest", "step-00000009"]
    assert [line.split(":")[0] for line in lines if "warning" in line] == ["warning", "warning"]
    assert result.counters.failed_saves == 2
    assert [record.failed_saves for record in read_metrics(run.metrics.path)] == [0, 0, 0, 0, 1, 1, 2, 2, 2]


def test_a_warning_is_not_enough_at_the_end(tiny, tmp_path):
    """The weights at the end are what the run is for."""
    run, trainer = begun(tiny, tmp_path / "run", max_steps=3, on_save_error="warn")
    on_a_disk_that_is_full_at(run, 3)
    with pytest.raises(SaveError):
        trainer.fit()
    assert names(run) == ["latest", "step-00000002"]


def test_metrics_wait_where_the_disk_is_full(tiny, tmp_path):
    run, trainer = begun(tiny, tmp_path / "run", max_steps=6, on_save_error="warn")
    append = run.metrics.append

    def append_there(record) -> None:
        # A quarter of a line still fits behind step 1.
        with files_of_at_most(run.metrics.path.stat().st_size + 99 if record.step in (2, 3) else 1 << 30):
            append(record)
        if record.step == 3:
            assert [line.step for line in read_metrics(run.metrics.path)] == [1]

    run.metrics.append = append_there  # type: ignore[method-assign]
    trainer.fit()
    assert [line.step for line in read_metrics(run.metrics.path)] == [1, 2, 3, 4, 5, 6]


def test_an_error_behind_the_written_files_ends_the_run_too(tiny, tmp_path, monkeypatch):
    run, trainer = begun(tiny, tmp_path / "run", max_steps=9)
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if target.name == "step-00000004":
            raise OSError(30, "Read-only file system")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(SaveError, match=r"step-00000004: .*Read-only file system"):
        trainer.fit()
    assert trainer.counters.step <= 6
    assert names(run) == ["latest", "step-00000002"]


def test_what_the_thread_makes_whole_is_the_step_it_was_written_at(tiny, tmp_path, monkeypatch):
    """The tensors move on while the digests are taken; the file must not."""
    from safetensors.torch import load_file

    import trainer_lite.saving as saving
    from trainer_lite.background import BackgroundSave

    class Late(BackgroundSave):
        """Begins only when somebody waits for it."""

        def __init__(self, finish) -> None:
            self.finish = finish

        @property
        def is_done(self) -> bool:
            return False

        def wait(self) -> Path:
            return self.finish()

    monkeypatch.setattr(saving, "BackgroundSave", Late)
    run, trainer = begun(tiny, tmp_path / "run", max_steps=5, keep_last=9)
    seen = {}
    trainer.on_step = lambda record: seen.update({record.step: trainer.model.network[0].weight.detach().clone()})
    trainer.fit()
    for step in (2, 4, 5):
        saved = load_file(run.checkpoints_path / f"step-{step:08d}" / "model.safetensors")["0.weight"]
        assert torch.equal(saved, seen[step])
    assert not torch.equal(seen[2], seen[3])


def test_read_only_folder_is_named(tiny, tmp_path):
    """(T3)"""
    run, trainer = begun(tiny, tmp_path / "run", max_steps=2)
    # A file in the place of the folder: what root may not write either.
    run.checkpoints_path.write_bytes(b"")
    with pytest.raises(SaveError, match=r"run/checkpoints/step-00000002: expected to write [\d,]+ bytes there, got: "):
        trainer.fit()


def cut_places(folder: Path) -> list[tuple[str, int]]:
    """Twenty places over all files of a checkpoint, their first and last bytes among them."""
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    places = [(name, place) for name, size in sizes.items() for place in (0, size // 3, size // 2, size - 1)]
    assert len(places) == 20
    return places


def check_damage_is_refused_by_name_and_the_one_before_taken(tiny, folder: Path) -> None:
    run, trainer = begun(tiny, folder, max_steps=4)
    trainer.fit()
    first, second = run.checkpoints()
    damages = [(name, place, "cut") for name, place in cut_places(second)]
    damages += [
        (path.name, path.stat().st_size // 2, kind) for path in second.iterdir() for kind in ("flip", "missing")
    ]
    for name, place, kind in damages:
        file = second / name
        whole = file.read_bytes()
        if kind == "missing":
            file.unlink()
        elif kind == "cut":
            file.write_bytes(whole[:place])
        else:
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        found = run.find_checkpoint()
        assert found.path == first, (name, place, kind)
        assert len(found.refused) == 1
        assert str(second) in found.refused[0]
        assert name in found.refused[0]
        with pytest.raises(CheckpointError):
            trainer.resume(second)
        file.write_bytes(whole)
        assert run.find_checkpoint().path == second


def test_a_checkpoint_cut_anywhere_is_refused_by_name_and_the_one_before_taken(tiny, tmp_path):
    """(T4): twenty cuts; of each file a bit flipped, or none of it there, the manifest included."""
    check_damage_is_refused_by_name_and_the_one_before_taken(tiny, tmp_path / "run")


def test_a_manifest_of_sizes_alone_shows(tiny, tmp_path, monkeypatch):
    """(T4): the control, a flipped bit that no digest tells."""
    monkeypatch.setattr(blip3_lite.folder, "file_sha256", lambda path: "0" * 64)
    with pytest.raises(AssertionError, match="flip"):
        check_damage_is_refused_by_name_and_the_one_before_taken(tiny, tmp_path / "run")


def test_retention_never_counts_a_half_written_checkpoint(tmp_path):
    run = RunFolder(tmp_path)

    def save(step: int) -> None:
        run.save_checkpoint(step, {"a": lambda path: path.write_text(str(step))}, {}, keep_last=2)

    for step in (1, 2):
        save(step)
    (run.checkpoints_path / "step-00000002" / "a").write_text("")
    save(3)
    assert names(run) == ["latest", "step-00000001", "step-00000003"]


def test_going_back_leaves_the_later_course_behind(tmp_path):
    run = RunFolder(tmp_path)
    for step in (2, 4, 6, 3):
        run.save_checkpoint(step, {"a": lambda path: path.write_text("x")}, {}, keep_last=3)
    assert names(run) == ["latest", "step-00000002", "step-00000003"]


def test_reopen_clears_what_a_kill_left_and_puts_back_what_waited(tmp_path):
    """(T1)"""
    run = RunFolder.create(tmp_path / "run", {})
    run.save_checkpoint(1, {"a": lambda path: path.write_text("x")}, {}, keep_last=2)
    # Killed between the two renames of a folder that was written again, and while small files were written.
    (run.checkpoints_path / "step-00000001").rename(run.checkpoints_path / ".step-00000001.writing-old")
    (run.checkpoints_path / ".step-00000001.writing-77").mkdir()
    for name in (".latest.writing", "../.metrics.jsonl.writing"):
        (run.checkpoints_path / name).write_text("half")
    assert run.find_checkpoint().path is None
    run = RunFolder.reopen(run.path)
    assert run.find_checkpoint().path == run.checkpoints_path / "step-00000001"
    assert names(run) == ["latest", "step-00000001"]
    assert sorted(path.name for path in run.path.iterdir()) == [".lock", "checkpoints", "config.json"]
    with pytest.raises(FileNotFoundError, match=r"expected a run with config\.json, got none"):
        RunFolder.reopen(tmp_path / "nowhere")


def test_a_run_at_work_is_not_taken_up_and_its_death_frees_it(tmp_path):
    """(T29): no lock outlives its process"""
    code = (
        "import os, sys; from trainer_lite import RunFolder; run = RunFolder.create(sys.argv[1], {})\n"
        "child = os.fork()\n"
        "if child: print(child, flush=True)\n"
        "sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdin is not None
    assert other.stdout is not None
    with other.stdin, other.stdout:
        child = int(other.stdout.readline())
        with pytest.raises(BlockingIOError, match="expected no process at work there, got one that still is"):
            RunFolder.reopen(tmp_path / "run")
        other.kill()
        other.wait()
        # A worker that has outlived it holds nothing.
        os.kill(child, 0)
        RunFolder.reopen(tmp_path / "run")


def test_a_full_disk_leaves_no_half_a_line_in_the_log_of_steps(tmp_path):
    log = StepLog(tmp_path / "skips.jsonl")
    log.append("sft", 1, ["a"], {"reason": "cut"})
    whole = log.path.read_bytes()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 5, before[1]))
    try:
        with pytest.raises(OSError, match=r"too large|No space"):
            log.append("sft", 2, ["b"], {"reason": "cut"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert log.path.read_bytes() == whole
