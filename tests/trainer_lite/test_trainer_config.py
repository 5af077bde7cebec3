"""The settings refuse what cannot be meant, and say so in full."""

import subprocess
import sys

import msgspec
import pytest

from trainer_lite import OptimizerConfig, ParallelConfig, ScheduleConfig, TrainConfig, learning_rate_factor
from trainer_lite.config import check_division


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TrainConfig(max_steps=0), r"train.max_steps: expected a whole number >= 1, got 0; .+"),
        (lambda: TrainConfig(max_steps=1, grad_clip=-1.0), r"train.grad_clip: expected a number >= 0, got -1.0"),
        (lambda: OptimizerConfig(learning_rate=0.0), r"optimizer.learning_rate: expected a number > 0, got 0.0"),
        (lambda: OptimizerConfig(learning_rate=float("nan")), r"optimizer.learning_rate: .+ got nan"),
        (lambda: OptimizerConfig(betas=(0.9, 1.0)), r"optimizer.betas\[1\]: expected 0 <= beta < 1, got 1.0"),
        (lambda: OptimizerConfig(learning_rate_scales={"vit.": -1}), r"learning_rate_scales\['vit.'\]: .+ got -1"),
        (
            lambda: ParallelConfig(timeout_s=0.0),
            r"parallel.timeout_s: expected seconds, above 0 and at most .+ got 0.0",
        ),
        (lambda: ParallelConfig(timeout_s=float("inf")), r"parallel.timeout_s: expected seconds, .+ got inf"),
        (lambda: ParallelConfig(offload_parameters=True), r"parallel.offload_parameters: expected zero3, got 'ddp'"),
        (lambda: check_division(12, 5), "divides the 12 batches of a step .+ got 5; use one of 1, 2, 3, 4, 6, 12"),
        (lambda: check_division(12, 24), "divides the 12 batches of a step .+ got 24; use one of"),
        (lambda: ScheduleConfig(min_ratio=1.5), r"schedule.min_ratio: expected 0 <= x <= 1, got 1.5"),
    ],
)
def test_config_out_of_range(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_config_unknown_key_in_a_file():
    with pytest.raises(msgspec.ValidationError, match="max_step"):
        msgspec.json.decode(b'{"max_steps": 3, "max_step": 4}', type=TrainConfig)


def test_config_round_trip():
    cfg = TrainConfig(max_steps=3, optimizer=OptimizerConfig(kind="muon", learning_rate_scales={"a.": 0.1}))
    assert msgspec.json.decode(msgspec.json.encode(cfg), type=TrainConfig) == cfg


def test_config_import_without_torch():
    code = "import sys, trainer_lite.config; from trainer_lite import TrainConfig; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def factors(max_steps: int, **settings) -> list[float]:
    return [learning_rate_factor(update, max_steps, ScheduleConfig(**settings)) for update in range(max_steps)]


def test_schedule_linear_by_hand():
    # Peak at the last warm-up update (1), 0.2 at the last (5), equal steps between.
    assert factors(6, kind="linear", warmup_steps=2, min_ratio=0.2) == pytest.approx([0.5, 1.0, 0.8, 0.6, 0.4, 0.2])


def test_schedule_cosine_by_hand():
    # Half way down the cosine at the middle update: the mean of 1 and 0.5.
    assert factors(5, kind="cosine", min_ratio=0.5) == pytest.approx([1.0, 0.9267767, 0.75, 0.5732233, 0.5])


def test_schedule_constant_and_single_step():
    assert factors(4, kind="constant", warmup_steps=3) == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0])
    assert factors(1, kind="cosine", min_ratio=0.0) == [1.0]


def test_schedule_warmup_longer_than_the_run_ends_at_the_peak():
    assert factors(4, kind="cosine", warmup_steps=20) == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert TrainConfig(max_steps=4, schedule=ScheduleConfig(warmup_steps=20)).max_steps == 4


def test_schedule_beyond_the_end_stays_at_the_minimum():
    assert learning_rate_factor(50, 10, ScheduleConfig(min_ratio=0.1)) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="update: expected a number >= 0, got -1"):
        learning_rate_factor(-1, 10, ScheduleConfig())
