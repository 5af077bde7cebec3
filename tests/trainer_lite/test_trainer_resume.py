"""A killed and resumed run is the same run, bit for bit; and the test can fail."""

import dataclasses
import json
import os
import signal
from typing import Literal

import pytest
import torch
from safetensors.torch import save as save_tensors

import trainer_lite.loop
import trainer_lite.train_state
from blip3_lite import CheckpointError, write_folder
from interleave_data import SkipReason, SkipSample, StoppedWaiting, TooManySkips
from trainer_lite import OptimizerConfig, Optimizers, RunFolder, ScheduleConfig, TrainConfig

STEPS, CUT = 20, 10


def config(kind: Literal["adamw", "muon"] = "adamw", **settings) -> TrainConfig:
    optimizer = OptimizerConfig(kind=kind, learning_rate=0.02, muon_learning_rate=0.05)
    return TrainConfig(max_steps=STEPS, accumulation_steps=2, optimizer=optimizer, **settings)


def trajectory(run: RunFolder) -> list[tuple]:
    lines = [json.loads(line) for line in run.metrics.path.read_text().splitlines()]
    return [
        (line["stage"], line["step"], line["loss_hex"], line["samples_digest"], line["lr"], line["skipped"])
        for line in lines
    ]


def uninterrupted(tiny, folder, kind: Literal["adamw", "muon"] = "adamw") -> list[tuple]:
    run = RunFolder.create(folder, {})
    tiny.trainer(config(kind), stream=tiny.stream((3, 2)), run=run, with_files=True, stage="sft").fit()
    return trajectory(run)


def cut_run(tiny, folder, kind: Literal["adamw", "muon"] = "adamw", at: int = CUT) -> RunFolder:
    run = RunFolder.create(folder, {})
    trainer = tiny.trainer(config(kind), stream=tiny.stream((3, 2)), run=run, with_files=True, stage="sft")
    trainer.on_step = lambda record: trainer.stop.set() if record.step == at else None
    assert trainer.fit().reason == "stopped"
    return run


def resumed(tiny, run: RunFolder, kind: Literal["adamw", "muon"] = "adamw", stop_at: int | None = None, **more):
    trainer = tiny.trainer(config(kind), stream=tiny.stream((3, 2)), run=run, with_files=True, stage="sft", **more)
    # A fresh process has other random states and weights; only the checkpoint may bring the old ones back.
    torch.manual_seed(999)
    for param in trainer.model.network.parameters():
        param.data.normal_()
    found = run.find_checkpoint()
    assert found.path is not None
    trainer.resume(found.path)
    if stop_at is not None:
        trainer.on_step = lambda record: trainer.stop.set() if record.step == stop_at else None
    return trainer


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_resume_equals_uninterrupted(tiny, tmp_path, kind):
    """(T1)"""
    whole = uninterrupted(tiny, tmp_path / "whole", kind)
    run = cut_run(tiny, tmp_path / "cut", kind)
    result = resumed(tiny, run, kind).fit()
    assert trajectory(run) == whole
    assert len(whole) == STEPS
    assert (result.counters.step, result.counters.updates, result.reason) == (STEPS, STEPS, "max_steps")


def test_resume_twice_and_save_at_once(tiny, tmp_path):
    """(T2)"""
    whole = uninterrupted(tiny, tmp_path / "whole")
    run = cut_run(tiny, tmp_path / "cut", at=7)
    trainer = resumed(tiny, run)
    trainer.stop.set("at once")
    assert trainer.fit().counters.step == 7
    assert resumed(tiny, run, stop_at=13).fit().counters.step == 13
    resumed(tiny, run).fit()
    assert trajectory(run) == whole


def test_resume_after_a_kill_redoes_the_lost_steps(tiny, tmp_path):
    whole = uninterrupted(tiny, tmp_path / "whole")
    run = RunFolder.create(tmp_path / "cut", {})
    cfg = config(save_every=4)
    trainer = tiny.trainer(cfg, stream=tiny.stream((3, 2)), run=run, with_files=True, stage="sft")

    def die(record) -> None:
        if record.step == 11:
            raise SystemExit(137)

    trainer.on_step = die
    with pytest.raises(SystemExit):
        trainer.fit()
    # The kill hit the middle of a line.
    with run.metrics.path.open("ab") as file:
        file.write(b'{"stage":"sft","step":12,"lo')
    assert run.latest_path.read_text() == "step-00000008\n"
    resumed(tiny, run).fit()
    assert trajectory(run) == whole


@pytest.mark.parametrize("omitted", ["random states", "optimiser", "stream", "update count"])
def test_resume_without_a_part_differs(tiny, tmp_path, monkeypatch, omitted):
    """(T1, T2): the controls"""
    whole = uninterrupted(tiny, tmp_path / "whole")
    run = cut_run(tiny, tmp_path / "cut")
    if omitted == "random states":
        monkeypatch.setattr(trainer_lite.train_state, "set_rng_state", lambda states: None)
    if omitted == "optimiser":
        monkeypatch.setattr(Optimizers, "load_state_tensors", lambda self, tensors: None)
    if omitted == "stream":
        monkeypatch.setattr(tiny.stream, "load_state_dict", lambda self, state: None)
    trainer = resumed(tiny, run)
    if omitted == "update count":
        trainer.counters.updates = 0
    trainer.fit()
    got = trajectory(run)
    # The first half stands in the file. In the second the losses differ, and the samples only where they are at fault.
    assert got[:CUT] == whole[:CUT]
    assert [row[2] for row in got[CUT:]] != [row[2] for row in whole[CUT:]]
    assert ([row[3] for row in got] != [row[3] for row in whole]) is (omitted == "stream")


def test_resume_refuses_other_settings_unless_accepted(tiny, tmp_path):
    run = cut_run(tiny, tmp_path / "cut")
    changed = config(schedule=ScheduleConfig(warmup_steps=1), log_every=3)
    trainer = tiny.trainer(changed, run=run, with_files=True, stage="sft", data_fingerprint="other")
    before = [param.detach().clone() for param in trainer.model.network.parameters()]
    with pytest.raises(ValueError, match="expected the same settings and data") as caught:
        trainer.resume(run.checkpoints()[0])
    assert "schedule: " in str(caught.value)
    assert "data: '' in the checkpoint, 'other' now" in str(caught.value)
    assert "log_every" not in str(caught.value)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.network.parameters(), strict=True))
    trainer.resume(run.checkpoints()[0], accept_changes=True)
    assert trainer.counters.step == CUT


def test_changed_data_pass_by_their_own_wish_and_the_stream_hears_of_it(tiny, tmp_path):
    run = cut_run(tiny, tmp_path / "cut")
    heard = []

    class Telling(tiny.stream):
        def load_state_dict(self, state, *, accept_data_change: bool = False) -> None:
            heard.append(accept_data_change)
            super().load_state_dict(state)

    def changed(stream, **settings):
        cfg = config(**settings)
        return tiny.trainer(cfg, stream=stream, run=run, with_files=True, stage="sft", data_fingerprint="other")

    changed(Telling((3, 2))).resume(run.checkpoints()[0], accept_data_change=True)
    changed(tiny.stream((3, 2))).resume(run.checkpoints()[0], accept_data_change=True)
    assert heard == [True]
    # It is not a wish for other settings.
    with pytest.raises(ValueError, match=r"grad_clip: 1\.0 in the checkpoint, 2\.0 now"):
        changed(Telling(), grad_clip=2.0).resume(run.checkpoints()[0], accept_data_change=True)


def test_a_stream_that_can_say_what_changed_is_asked(tiny, tmp_path):
    """(T7)"""
    run = cut_run(tiny, tmp_path / "cut")

    class Telling(tiny.stream):
        words: tuple[str, ...] = ("a (removed: 1.tar)", "b (a new source)")

        def changes(self, state) -> list[str]:
            assert state["num_batches"] == 2 * CUT
            return list(self.words)

    telling = Telling((3, 2))
    trainer = tiny.trainer(config(), stream=telling, run=run, with_files=True, stage="sft", data_fingerprint="other")
    with pytest.raises(ValueError, match=r"got data: a \(removed: 1\.tar\), b \(a new source\); restore them"):
        trainer.resume(run.checkpoints()[0])
    # What is no matter of the sources, such as limits on images, only the fingerprints tell.
    telling.words = ()
    with pytest.raises(ValueError, match=r"got data: '' in the checkpoint, 'other' now; restore them"):
        trainer.resume(run.checkpoints()[0])


def test_spike_guard_goes_on_with_the_median_that_it_had(tiny, tmp_path):
    """And may be switched on where a run is taken up, which is when one wishes for it."""
    run = cut_run(tiny, tmp_path / "cut")
    assert state(run)["counters"]["recent_losses"] == [float.fromhex(row[2]) for row in trajectory(run)]
    cfg = config(spike_guard=True, spike_window=CUT, spike_ratio=2.0)
    trainer = tiny.trainer(cfg, stream=tiny.stream((3, 2)), run=run, with_files=True, stage="sft")
    loss = trainer.model.loss
    trainer.model.loss = lambda batch: dataclasses.replace(loss(batch), total=loss(batch).total * 1e3)
    trainer.resume(run.checkpoints()[0])
    trainer.on_step = lambda record: trainer.stop.set()
    assert trainer.fit().counters.skipped_updates == {"loss_spike_update": 1}
    # The step will be done again by who resumes from before it: the log of spikes forgets it too.
    assert json.loads(run.spikes.path.read_text())["step"] == CUT + 1
    trainer.resume(run.checkpoints()[0])
    assert run.spikes.path.read_text() == ""


def test_resume_refuses_another_stage(tiny, tmp_path):
    run = cut_run(tiny, tmp_path / "cut")
    trainer = tiny.trainer(config(), run=run, with_files=True, stage="dpo")
    with pytest.raises(
        ValueError, match="expected stage 'dpo', got 'sft'; resume that stage, or start this one from its"
    ):
        trainer.resume(run.checkpoints()[0])


def rewritten(run: RunFolder, changed: str, content: bytes):
    """The checkpoint with one other file under a manifest that fits, so that only a look inside can tell."""
    folder = run.checkpoints()[0]
    contents = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "MANIFEST.json"}
    contents[changed] = content
    write_folder(folder, {name: lambda path, data=data: path.write_bytes(data) for name, data in contents.items()}, {})
    return folder


def state(run: RunFolder) -> dict:
    return json.loads((run.checkpoints()[0] / "state.json").read_text())


def test_resume_refuses_other_trainable_parameters(tiny, tmp_path):
    run = cut_run(tiny, tmp_path / "cut")
    trainer = tiny.trainer(config(), run=run, with_files=True, stage="sft")
    frozen, kept = tiny.model(), trainer.optimizers
    frozen.network[0].requires_grad_(False)
    fewer = tiny.trainer(config(), model=frozen, run=run, with_files=True, stage="sft")
    with pytest.raises(ValueError, match=r"got 0\.weight: trained in the checkpoint only; 0\.bias: trained in"):
        fewer.resume(run.checkpoints()[0], accept_changes=True)
    saved = state(run)
    assert saved["parameters"].keys() == kept.parameters.keys()
    del saved["parameters"]["0.bias"]
    with pytest.raises(ValueError, match=r"expected the same trainable parameters, got 0\.bias: trained now only;"):
        trainer.resume(rewritten(run, "state.json", json.dumps(saved).encode()))


def test_resume_refuses_an_optimiser_file_without_its_tensors(tiny, tmp_path):
    run = cut_run(tiny, tmp_path / "cut")
    trainer = tiny.trainer(config(), run=run, with_files=True, stage="sft")
    with pytest.raises(ValueError, match=r"tensors that state\.json names, got 0, at odds in 0\.bias/exp_avg"):
        trainer.resume(rewritten(run, "optimizer.safetensors", save_tensors({})))


@pytest.mark.parametrize("content", [b'{"format": 2}', b'{"stage": "\xff"}'])
def test_resume_refuses_a_state_of_another_form(tiny, tmp_path, content):
    run = cut_run(tiny, tmp_path / "cut")
    trainer = tiny.trainer(config(), run=run, with_files=True, stage="sft")
    if b"format" in content:
        content = json.dumps({**state(run), "format": 2}).encode()
    with pytest.raises(ValueError, match=r"state\.json: expected a training state of format 1, got: "):
        trainer.resume(rewritten(run, "state.json", content))


def test_resume_refuses_a_damaged_checkpoint(tiny, tmp_path):
    run = cut_run(tiny, tmp_path / "cut")
    trainer = tiny.trainer(config(), run=run, with_files=True, stage="sft")
    file = run.checkpoints()[0] / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors"):
        trainer.resume(run.checkpoints()[0])


def test_resume_refuses_a_model_without_training_state(tiny, tmp_path):
    run = RunFolder.create(tmp_path / "run", {})
    trainer = tiny.trainer(config(), run=run, with_files=True)
    path = run.save_checkpoint(1, trainer.files.writers(), {}, keep_last=1)
    with pytest.raises(
        ValueError, match=r"expected state\.json, got a model without training state; start a new stage"
    ):
        trainer.resume(path)


def test_samples_left_out_are_written_down_with_their_step_and_forgotten_with_it(tiny, tmp_path):
    class Naming(tiny.stream):
        """Leaves out one sample before each second batch; too many before the fifth."""

        taken: tuple[tuple[str, SkipSample], ...] = ()

        def __iter__(self):
            for number, batch in enumerate(super().__iter__(), self.num_batches + 1):
                if number % 2 == 0 or number == 5:
                    self.taken = (("a", SkipSample(SkipReason.BROKEN_IMAGE, "cut", f"0.tar:\udcff{number}")),)
                if number == 5:
                    raise TooManySkips("too many")
                yield batch

        def take_skips(self):
            taken, self.taken = self.taken, ()
            return taken

    run, cfg = RunFolder.create(tmp_path / "run", {}), TrainConfig(max_steps=6, accumulation_steps=2, save_every=1)
    first = tiny.trainer(cfg, stream=Naming(), run=run, with_files=True)
    with pytest.raises(TooManySkips):
        first.fit()
    lines = [json.loads(line) for line in run.skips.path.read_text().splitlines()]
    assert [(line["step"], line["sample_ids"]) for line in lines] == [
        (step, [rf"a/0.tar:\udcff{batch}"]) for step, batch in ((1, 2), (2, 4), (3, 5))
    ]
    assert {(line["reason"], line["detail"]) for line in lines} == {("broken_image", "cut")}
    second = tiny.trainer(cfg, stream=Naming(), run=run, with_files=True)
    second.resume(run.find_checkpoint().path)
    assert [json.loads(line)["step"] for line in run.skips.path.read_text().splitlines()] == [1, 2]


def stalling(tiny, stall_at: int):
    """A stream whose batch of that number never comes; a signal does."""

    class Stalling(tiny.stream):
        def stop_waiting_if(self, should_stop) -> None:
            self.should_stop = should_stop

        def __iter__(self):
            for batch in super().__iter__():
                yield batch
                if self.num_batches == stall_at:
                    assert not self.should_stop()
                    os.kill(os.getpid(), signal.SIGTERM)
                    assert self.should_stop()
                    raise StoppedWaiting("the next one")

    return Stalling((3, 2))


@pytest.mark.parametrize("omitted", ["nothing", "random states", "stream"])
def test_a_stop_while_data_are_waited_for_forgets_the_step_at_hand(tiny, tmp_path, monkeypatch, omitted):
    """(T29): two batches a step, of which one had come; the controls do not go back behind it."""
    whole = uninterrupted(tiny, tmp_path / "whole")
    run = RunFolder.create(tmp_path / "cut", {})
    stream = stalling(tiny, stall_at=2 * CUT + 1)
    trainer = tiny.trainer(config(), stream=stream, run=run, with_files=True, stage="sft")
    with monkeypatch.context() as patched:
        if omitted == "random states":
            patched.setattr(trainer_lite.loop, "set_rng_state", lambda states: None)
        if omitted == "stream":
            patched.setattr(tiny.stream, "load_state_dict", lambda self, state: None)
        result = trainer.fit()
    assert (result.reason, result.counters.step, trainer.stop.reason) == ("stopped", CUT, "SIGTERM")
    assert result.checkpoint == run.checkpoints_path / f"step-{CUT:08d}"
    resumed(tiny, run).fit()
    assert (trajectory(run) == whole) == (omitted == "nothing")
    assert len(trajectory(run)) == STEPS
