"""The loop: what a step computes, what it refuses to do, what it writes."""

import dataclasses
import json
import math
import os
import signal
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

import trainer_lite.loop
from blip3_lite import read_manifest
from trainer_lite import (
    LossSum,
    NonFiniteError,
    OptimizerConfig,
    RunFolder,
    ScheduleConfig,
    StopFlag,
    TrainConfig,
    read_metrics,
    samples_digest,
)
from trainer_lite.guards import is_spike, with_loss
from trainer_lite.metrics import format_record


def config(max_steps: int = 3, **settings) -> TrainConfig:
    return TrainConfig(max_steps=max_steps, **settings)


def weights(trainer) -> torch.Tensor:
    return nn.utils.parameters_to_vector(trainer.model.network.parameters()).detach().clone()


def run_keeping_gradients(trainer) -> list[torch.Tensor]:
    """Fit, and return the gradient that each update was made with."""
    kept: list[torch.Tensor] = []
    step = trainer.optimizers.step

    def keep_and_step() -> None:
        kept.append(torch.cat([gradient.flatten() for gradient in trainer.optimizers.gradients()]).clone())
        step()

    trainer.optimizers.step = keep_and_step
    trainer.fit()
    return kept


def test_accumulation_partial_last_window_equals_one_batch(tiny):
    """(T22)"""
    # 1 + 5 + 2 + 3, then 4 + 1 as the stream ends: the same as a batch of 11 and one of 5.
    split = tiny.trainer(
        config(9, accumulation_steps=4, grad_clip=0.05), dropout=0, stream=tiny.stream((1, 5, 2, 3, 4, 1), length=6)
    )
    whole = tiny.trainer(config(9, grad_clip=0.05), dropout=0, stream=tiny.stream((11, 5), length=2))
    ours, theirs = run_keeping_gradients(split), run_keeping_gradients(whole)
    assert len(ours) == len(theirs) == 2
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=0)
        # Clipped once: as long as it may be, not shorter.
        assert mine.norm().item() == pytest.approx(0.05, rel=1e-4)
    torch.testing.assert_close(weights(split), weights(whole), atol=1e-6, rtol=0)


class MeanOfMeans:
    """Averages every batch by itself, as if all were of one size."""

    def __init__(self, model) -> None:
        self.inner, self.network = model, model.network

    def loss(self, batch) -> LossSum:
        loss = self.inner.loss(batch)
        return LossSum(loss.total / loss.num_targets, 1, loss.parts)


def check_ragged_accumulation(tiny, grad_clip: float, models=(None, None)) -> None:
    sizes = (1, 5, 2, 3)
    more = {"accumulation_steps": 4, "grad_clip": grad_clip}
    split = tiny.trainer(config(**more), dropout=0, stream=tiny.stream(sizes), model=models[0])
    whole = tiny.trainer(config(grad_clip=grad_clip), dropout=0, stream=tiny.stream((sum(sizes),)), model=models[1])
    records = {"split": [], "whole": []}
    split.on_step, whole.on_step = records["split"].append, records["whole"].append
    for ours, theirs in zip(run_keeping_gradients(split), run_keeping_gradients(whole), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    torch.testing.assert_close(weights(split), weights(whole), atol=1e-6, rtol=0)
    for ours, theirs in zip(records["split"], records["whole"], strict=True):
        assert ours.loss == pytest.approx(theirs.loss, abs=1e-6)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-5)
        assert ours.parts["absolute"] == pytest.approx(theirs.parts["absolute"], abs=1e-6)
        assert (ours.target_tokens, ours.samples_digest) == (theirs.target_tokens, theirs.samples_digest)


@pytest.mark.parametrize("grad_clip", [0.0, 0.05])
def test_accumulation_ragged_equals_one_batch(tiny, grad_clip):
    """(T22)"""
    check_ragged_accumulation(tiny, grad_clip)


def test_a_mean_of_means_shows(tiny):
    """(T22): the control."""
    models = []
    for _ in range(2):
        torch.manual_seed(7)
        models.append(MeanOfMeans(tiny.model(0.0)))
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        check_ragged_accumulation(tiny, 0.0, models)


def test_gradient_is_that_of_the_mean_and_clipped_once(tiny):
    trainer = tiny.trainer(config(1, grad_clip=0.05, accumulation_steps=2), dropout=0, stream=tiny.stream((3, 4)))
    batches = list(tiny.stream((3, 4), length=2))
    network = tiny.trainer(config(1), dropout=0).model.network
    errors = torch.cat([network(batch.inputs)[:, 0] - batch.targets for batch in batches])
    errors.square().mean().backward()
    expected = torch.cat([param.grad.flatten() for param in network.parameters()])
    norm = expected.norm().item()
    assert norm > 0.05
    records = []
    trainer.on_step = records.append
    (gradient,) = run_keeping_gradients(trainer)
    torch.testing.assert_close(gradient, expected * (0.05 / norm))
    assert records[0].grad_norm == pytest.approx(norm, rel=1e-5)
    assert records[0].loss == pytest.approx(errors.square().mean().item(), rel=1e-6)


def test_stream_end_uses_the_partial_window(tiny):
    trainer = tiny.trainer(config(9, accumulation_steps=2), stream=tiny.stream((4,), length=5))
    records = []
    trainer.on_step = records.append
    result = trainer.fit()
    assert (result.reason, result.counters.step) == ("stream_end", 3)
    assert [record.target_tokens for record in records] == [8, 8, 4]


def test_loss_falls_with_either_optimizer(tiny):
    for kind in ("adamw", "muon"):
        records = []
        optimizer = OptimizerConfig(kind=kind, learning_rate=0.02, muon_learning_rate=0.02)
        cfg = config(300, optimizer=optimizer, precision="bf16" if kind == "muon" else "fp32")
        tiny.trainer(cfg, dropout=0, stream=tiny.stream((16,)), on_step=records.append).fit()
        first, last = (sum(record.loss for record in part) / 10 for part in (records[:10], records[-10:]))
        assert last < 0.35 * first, kind


class Lines:
    """Progress that keeps the lines."""

    start = advance = close = lambda self, *arguments: None

    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)


class Poisoned:
    """Makes the loss or one gradient element of given steps infinite or NaN."""

    def __init__(self, model, steps: set[int], where: str) -> None:
        self.inner, self.network, self.steps, self.where, self.calls = model, model.network, steps, where, 0

    def loss(self, batch) -> LossSum:
        self.calls += 1
        loss = self.inner.loss(batch)
        if self.calls not in self.steps:
            return loss
        if self.where == "loss":
            return LossSum(loss.total * math.inf, loss.num_targets)
        first = next(self.network.parameters())

        def poison(gradient: torch.Tensor) -> torch.Tensor:
            poisoned = gradient.clone()
            poisoned.view(-1)[0] = math.nan
            handle.remove()
            return poisoned

        handle = first.register_hook(poison)
        return loss


def check_nonfinite_step_moves_nothing(tiny, folder: Path, where: str) -> None:
    torch.manual_seed(7)
    model = Poisoned(tiny.model(0.0), {3}, where)
    run = RunFolder.create(folder, {})
    cfg = config(5, schedule=ScheduleConfig(kind="linear", min_ratio=0.0))
    trainer = tiny.trainer(cfg, model=model, run=run)
    seen, moments = [], []

    def look(record) -> None:
        seen.append((record, weights(trainer)))
        moments.append({name: value.clone() for name, value in trainer.optimizers.state_tensors().items()})

    trainer.on_step = look
    result = trainer.fit()
    assert torch.equal(seen[1][1], seen[2][1])
    assert not torch.equal(seen[2][1], seen[3][1])
    assert all(torch.equal(moments[1][name], moments[2][name]) for name in moments[1])
    # The rate waits too: the step after the skipped one has the rate the skipped one would have had.
    rates = [record.lr for record, _ in seen]
    assert rates[3] == rates[2] < rates[1]
    assert result.counters.skipped_updates == {"non_finite_update": 1}
    assert (result.counters.step, result.counters.updates) == (5, 4)
    (entry,) = [json.loads(line) for line in run.nonfinite.path.read_text().splitlines()]
    assert (entry["step"], entry["sample_ids"]) == (3, ["s8", "s9", "s10", "s11"])
    lines = [json.loads(line) for line in run.metrics.path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert lines[2]["skipped"]["non_finite_update"] == 1
    assert lines[2]["loss"] is None if where == "loss" else lines[2]["grad_norm"] is None


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nonfinite_step_moves_nothing(tiny, tmp_path, where):
    """(T20)"""
    check_nonfinite_step_moves_nothing(tiny, tmp_path / "run", where)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_loop_that_does_not_look_at_its_gradients_shows(tiny, tmp_path, monkeypatch, where):
    """(T20): the control, one NaN gets into every parameter."""
    monkeypatch.setattr(trainer_lite.loop, "left_out", lambda *_: None)
    with pytest.raises(AssertionError):
        check_nonfinite_step_moves_nothing(tiny, tmp_path / "run", where)


@pytest.mark.parametrize("spike_guard", [False, True])
def test_spike_is_written_down_and_left_out_by_the_guard_alone(tiny, tmp_path, spike_guard):
    """(T21): without the guard, which is the control, the same spike moves the weights."""

    class Spiking:
        """Ten times the median at step 6."""

        def __init__(self, model) -> None:
            self.inner, self.network, self.calls, self.losses = model, model.network, 0, []

        def loss(self, batch) -> LossSum:
            self.calls += 1
            loss = self.inner.loss(batch)
            self.losses.append(loss.total.item() / loss.num_targets)
            factor = 10 * sorted(self.losses[:5])[2] / self.losses[-1] if self.calls == 6 else 1.0
            return LossSum(loss.total * factor, loss.num_targets)

    run = RunFolder.create(tmp_path / "run", {})
    model = Spiking(tiny.model(0.0))
    cfg = config(8, spike_guard=spike_guard, spike_window=5, optimizer=OptimizerConfig(learning_rate=1e-4))
    trainer = tiny.trainer(cfg, model=model, run=run, progress=(progress := Lines()))
    states, moments = [], []

    def look(record) -> None:
        states.append(weights(trainer))
        moments.append({name: value.clone() for name, value in trainer.optimizers.state_tensors().items()})

    trainer.on_step = look
    result = trainer.fit()
    (entry,) = [json.loads(line) for line in run.spikes.path.read_text().splitlines()]
    assert (entry["step"], entry["sample_ids"], entry["is_left_out"]) == (6, ["s20", "s21", "s22", "s23"], spike_guard)
    assert entry["loss"] / entry["median"] == pytest.approx(10, rel=1e-5)
    assert entry["median"] == sorted(read_metrics(run.metrics.path)[step].loss for step in range(5))[2]
    assert torch.equal(states[4], states[5]) is spike_guard
    assert all(torch.equal(moments[4][name], moments[5][name]) for name in moments[4]) is spike_guard
    assert not torch.equal(states[5], states[6])
    assert result.counters.skipped_updates == ({"loss_spike_update": 1} if spike_guard else {})
    assert [record.skipped.get("loss_spike_update", 0) for record in read_metrics(run.metrics.path)] == (
        [0] * 5 + [int(spike_guard)] * 3
    )
    assert ["10.0 times the median of the last 5" in line for line in progress.lines if "median" in line] == [True]


def test_spike_guard_is_off_by_default():
    assert not config().spike_guard


@pytest.mark.parametrize(
    ("loss", "recent", "is_one"),
    [
        (5.1, [1.0, 2.0, 0.5], True),
        (5.0, [1.0, 2.0, 0.5], False),
        (99.0, [1.0, 2.0], False),  # too few to tell
        (99.0, [-1.0, -2.0, -3.0], False),  # no ratio
        (99.0, [0.0, 0.0, 0.0], False),
        # Of a longer list, as after a resume with a smaller window, the newest count.
        (6.0, [9.0, 9.0, 1.0, 1.0, 1.0], True),
    ],
)
def test_is_spike_by_hand(loss, recent, is_one):
    assert is_spike(loss, recent, config(spike_window=3, spike_ratio=5.0)) is is_one
    assert not is_spike(loss, recent, config(spike_window=3, spike_ratio=0.0))


def test_spikes_that_stay_become_the_new_level():
    recent, skipped = [1.0] * 4, 0
    cfg = config(spike_window=4)
    for _ in range(8):
        skipped += is_spike(9.0, recent, cfg)
        recent = with_loss(recent, 9.0, cfg)
    assert (skipped, recent) == (2, [9.0] * 4)


def test_nonfinite_steps_in_a_row_raise(tiny, tmp_path):
    """(T20)"""
    model = Poisoned(tiny.model(), {2, 4, 5, 6}, "loss")
    run = RunFolder.create(tmp_path / "run", {})
    trainer = tiny.trainer(config(9, max_nonfinite_steps=3), model=model, run=run)
    with pytest.raises(NonFiniteError, match=r"step 6: expected a finite loss .* 3 steps in a row; .*nonfinite.jsonl"):
        trainer.fit()
    assert len(run.metrics.path.read_text().splitlines()) == 6


def test_empty_targets_cost_nothing_and_move_nothing(tiny):
    trainer = tiny.trainer(config(4), stream=tiny.stream((4, 0)))
    records, states = [], []

    def look(record) -> None:
        records.append(record)
        states.append(weights(trainer))

    trainer.on_step = look
    trainer.fit()
    assert [record.loss == 0.0 for record in records] == [False, True, False, True]
    assert [record.target_tokens for record in records] == [4, 0, 4, 0]
    assert torch.equal(states[0], states[1])
    assert records[-1].skipped["no_target_update"] == 2
    assert records[1].parts == {}


def test_empty_batch_inside_a_window_changes_nothing(tiny):
    with_empty = tiny.trainer(config(accumulation_steps=2), dropout=0, stream=tiny.stream((4, 0)))
    without = tiny.trainer(config(), dropout=0, stream=tiny.stream((4,)))
    with_empty.fit()
    without.fit()
    assert torch.equal(weights(with_empty), weights(without))


def test_metrics_line_holds_what_is_promised(tiny, tmp_path):
    run = RunFolder.create(tmp_path / "run", {})
    optimizer = OptimizerConfig(learning_rate=0.5)
    cfg = config(4, optimizer=optimizer, schedule=ScheduleConfig(kind="constant", warmup_steps=4), eval_every=2)
    tiny.trainer(cfg, run=run, stage="sft", evaluate=lambda step: {"accuracy": step / 10}).fit()
    lines = [json.loads(line) for line in run.metrics.path.read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines] == [("sft", step) for step in (1, 2, 3, 4)]
    assert [line["lr"] for line in lines] == pytest.approx([0.125, 0.25, 0.375, 0.5])
    assert all(float.fromhex(line["loss_hex"]) == line["loss"] for line in lines)
    assert [line["samples_digest"] for line in lines] == [
        samples_digest(f"s{4 * step + offset}" for offset in range(4)) for step in range(4)
    ]
    assert [line["skipped"] for line in lines] == [{}, {}, {"broken_image": 1}, {"broken_image": 1}]
    assert [line.get("evaluation") for line in lines] == [None, {"accuracy": 0.2}, None, {"accuracy": 0.4}]
    assert all(line["tokens_per_s"] > 0 and line["grad_norm"] > 0 for line in lines)


def test_evaluation_leaves_the_random_state_alone(tiny):
    def draw(step: int) -> dict[str, float]:
        assert not torch.is_grad_enabled()
        return {"draw": torch.rand(step).sum().item()}

    plain, evaluated = tiny.trainer(config(6)), tiny.trainer(config(6, eval_every=1), evaluate=draw)
    plain.fit()
    evaluated.fit()
    assert torch.equal(weights(plain), weights(evaluated))


def test_ids_that_are_no_utf8_are_logged(tiny, tmp_path):
    """A file name may hold such bytes; Python shows them as surrogates."""

    class Named(tiny.stream):
        def __iter__(self):
            for batch in super().__iter__():
                yield dataclasses.replace(batch, sample_ids=["\udcff.png"])

    run = RunFolder.create(tmp_path / "run", {})
    trainer = tiny.trainer(config(2), model=Poisoned(tiny.model(), {1}, "loss"), stream=Named(), run=run)
    trainer.fit()
    first, _ = read_metrics(run.metrics.path)
    assert first.samples_digest == samples_digest(["\udcff.png"])
    assert json.loads(run.nonfinite.path.read_text())["sample_ids"] == [r"\udcff.png"]


def check_signal_finishes_the_step_and_saves(tiny, folder: Path, number: signal.Signals) -> None:
    run = RunFolder.create(folder, {})
    before = signal.getsignal(number)

    def ask(record) -> None:
        if record.step == 2:
            os.kill(os.getpid(), number)

    trainer = tiny.trainer(config(9), run=run, with_files=True, on_step=ask)
    result = trainer.fit()
    assert (result.reason, result.counters.step, trainer.stop.reason) == ("stopped", 2, number.name)
    assert result.checkpoint == run.checkpoints_path / "step-00000002" == run.find_checkpoint().path
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_finishes_the_step_and_saves(tiny, tmp_path, number):
    """(T29): that it exits with 143 and goes on is in tests/apps/test_apps_train_kills.py."""
    check_signal_finishes_the_step_and_saves(tiny, tmp_path / "run", number)


def test_a_loop_that_takes_no_signals_shows(tiny, tmp_path, monkeypatch, request):
    """(T29): the control; with SIGTERM it would be the end of this process."""
    monkeypatch.setattr(StopFlag, "on_signals", lambda self: nullcontext())
    # What starts in a shell's background begins with Ctrl-C ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with pytest.raises(KeyboardInterrupt):
        check_signal_finishes_the_step_and_saves(tiny, tmp_path / "run", signal.SIGINT)
    assert RunFolder(tmp_path / "run").checkpoints() == []


def test_second_signal_does_not_wait(tiny):
    """(T29)"""

    def ask_twice(record) -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        tiny.trainer(config(9), on_step=ask_twice).fit()


def test_stop_flag_shared_by_stages(tiny):
    stop = StopFlag()
    stop.set("time is up")
    stop.set("later reason")
    result = tiny.trainer(config(9), stop=stop).fit()
    assert (result.reason, result.counters.step, stop.reason) == ("stopped", 0, "time is up")


def test_stop_before_the_first_step_leaves_the_end_of_the_stage_before(tiny, tmp_path):
    run = RunFolder.create(tmp_path / "run", {})
    first = tiny.trainer(config(2), run=run, with_files=True, stage="pretrain").fit()
    before = {path.name: path.read_bytes() for path in first.checkpoint.iterdir()}
    stop = StopFlag()
    stop.set()
    for more in ({"stop": stop}, {"stream": tiny.stream(length=0)}):
        second = tiny.trainer(config(2), run=run, with_files=True, stage="sft", first_step=2, **more).fit()
        assert (second.counters.step, second.checkpoint) == (0, None)
        assert {path.name: path.read_bytes() for path in first.checkpoint.iterdir()} == before
    assert run.checkpoints() == [first.checkpoint]


def test_stop_in_the_last_step_ends_a_whole_stage(tiny, tmp_path):
    run = RunFolder.create(tmp_path / "run", {})
    stop = StopFlag()
    result = tiny.trainer(config(1), run=run, with_files=True, stop=stop, on_step=lambda record: stop.set()).fit()
    assert (result.reason, stop.is_set) == ("max_steps", True)
    assert read_manifest(result.checkpoint)["is_kept"] is True


class Broken:
    def __init__(self, model, loss) -> None:
        self.network, self.loss = model.network, loss


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (
            lambda batch: LossSum(torch.ones(3), 3),
            r"loss of \['s0', 's1', 's2'\]: expected a scalar sum .* shape \(3,\)",
        ),
        (lambda batch: LossSum(torch.ones(()), -1), r"expected a scalar sum over >= 0 targets, got .* over -1"),
        (lambda batch: LossSum(torch.ones(()), 4), "expected one that depends on trainable parameters, got a constant"),
    ],
)
def test_loss_that_breaks_the_contract(tiny, loss, message):
    with pytest.raises(ValueError, match=message):
        tiny.trainer(config(), model=Broken(tiny.model(), loss)).fit()


def test_saving_needs_run_and_files(tiny):
    with pytest.raises(ValueError, match="expected both run and files to save checkpoints"):
        tiny.trainer(config(save_every=2))
    with pytest.raises(ValueError, match="expected both run and files"):
        tiny.trainer(config(), with_files=True)


def test_the_share_of_a_step_that_waited_for_data_is_logged_where_the_stream_counts_it(tiny) -> None:
    class Waiting(tiny.stream):
        reads = 0

        @property
        def waited_s(self) -> float:
            # Read before and behind each step: a tenth of a millisecond apart.
            self.reads += 1
            return self.reads * 1e-4

    records = {}
    for stream in (tiny.stream(), Waiting()):
        trainer = tiny.trainer(config(max_steps=1), stream=stream)
        records[type(stream)] = trainer.fit().last
    silent, waiting = records.values()
    assert silent.data_wait == 0.0
    assert "data" not in format_record(silent, 1)
    # The rate says how long the step took.
    assert waiting.data_wait * waiting.target_tokens / waiting.tokens_per_s == pytest.approx(1e-4)
    assert format_record(waiting, 1).endswith(f"data {waiting.data_wait:.0%}")


def test_reads_that_were_tried_again_are_logged_by_source_where_the_stream_counts_them(tiny) -> None:
    stream = tiny.stream()
    assert "read again" not in format_record(tiny.trainer(config(max_steps=1), stream=stream).fit().last, 1)
    stream.read_again = {"web": 2, "captions": 5}
    last = tiny.trainer(config(max_steps=1), stream=stream).fit().last
    assert last.read_again == {"web": 2, "captions": 5}
    assert format_record(last, 1).endswith("read again 7 (captions 5, web 2)")
