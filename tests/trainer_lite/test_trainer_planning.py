"""Memory and sending by ZeRO's own figures, by hand, and refused where they cannot be meant."""

import subprocess
import sys

import pytest

from trainer_lite import DEVICE_KINDS, Sharding, sent_bytes, state_bytes, step_seconds


@pytest.mark.parametrize(("stage", "gigabytes"), [(0, 120.0), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_states_are_those_of_the_papers_figure_1(stage, gigabytes):
    # 7.5 B numbers, 64 devices, mixed precision: arXiv:1910.02054 figure 1.
    cfg = Sharding(stage=stage, num_devices=64, weights="bf16", bucket_numbers=1, live_numbers=0, persistent_numbers=0)
    # Even tensors, so that none lies on a border.
    held = state_bytes([7_500_000_000 // 640] * 640, [], cfg)
    assert held.before_step / 1e9 == pytest.approx(gigabytes, abs=0.05)


def test_states_of_three_tensors_by_hand():
    def held(stage, **more):
        cfg = Sharding(stage=stage, num_devices=2, bucket_numbers=100, live_numbers=0, persistent_numbers=0, **more)
        states = state_bytes([30, 5, 6], [7], cfg)
        return (
            states.parameters,
            states.masters,
            states.moments,
            states.gradients,
            states.bucket,
            states.between_steps,
        )

    assert held(0) == (4 * 48, 0, 8 * 41, 4 * 41, 0, 4 * 48 + 8 * 41)
    # 41 numbers are padded to 44, two parts of 22.
    assert held(1) == (4 * 51, 4 * 22, 8 * 22, 4 * 41, 400, 4 * 51 + 12 * 22)
    # The second part begins inside the first tensor, and keeps its gradient whole: 30 + 5 + 6.
    assert held(2) == (4 * 51, 4 * 22, 8 * 22, 4 * 41, 400, 4 * 51 + 12 * 22)
    # Tensor by tensor: 15 + 3 + 3, and 4 of the frozen one. Gradients and bucket stay.
    assert held(3) == (4 * 25, 4 * 21, 8 * 21, 4 * 21, 400, 4 * 25 + 16 * 21 + 400)
    assert held(0, weights="bf16") == (2 * 48, 4 * 41, 8 * 41, 2 * 41, 0, 2 * 48 + 12 * 41)
    assert held(3, weights="bf16")[:4] == (2 * 25, 4 * 21, 8 * 21, 2 * 21)


def test_stage_2_keeps_the_gradients_of_its_own_tensors_alone():
    cfg = Sharding(stage=2, num_devices=2, bucket_numbers=1)
    assert state_bytes([10, 10], [], cfg).gradients == 4 * 10
    assert state_bytes([8, 12], [], cfg).gradients == 4 * 20
    assert state_bytes([10, 4, 6], [], cfg).gradients == 4 * 10


def test_what_is_offloaded_is_on_the_host():
    def states(**more):
        return state_bytes([100], [50], Sharding(stage=3, num_devices=2, bucket_numbers=1, live_numbers=80, **more))

    here, optimizer, both = (
        states(),
        states(offloads_optimizer=True),
        states(offloads_optimizer=True, offloads_parameters=True),
    )
    assert here.host == 0
    assert (optimizer.masters, optimizer.moments, optimizer.gradients) == (0, 0, 0)
    # Master, two moments, fp32 gradient and a copy of the weight, 4 bytes each.
    assert optimizer.host == 20 * 50
    assert both.parameters == 0
    assert both.host - optimizer.host == here.parameters == 4 * 75
    # Tensors this small stay gathered, whatever the limit says.
    assert both.gathered == 4 * 150
    assert state_bytes([200_000], [], Sharding(stage=3, num_devices=2, live_numbers=80)).gathered == 4 * 80


def test_momentum_alone_takes_half_of_adams_moments():
    cfg = Sharding(stage=1, num_devices=2)
    assert 2 * state_bytes([8, 8], [], cfg, num_moments=16).moments == state_bytes([8, 8], [], cfg).moments


def test_sent_by_hand():
    def sent(stage, **more):
        cfg = Sharding(stage=stage, num_devices=4, live_numbers=20)
        return sent_bytes(100, 40, cfg, num_batches=3, num_forward_only=40, **more)

    # Three quarters of 400 bytes: a ring's all-gather; its all-reduce sends that twice.
    assert sent(0) == {"all-reduce": 600}
    assert sent(1) == {"all-reduce": 600, "all-gather": 300}
    assert sent(2) == {"all-reduce": 1800, "all-gather": 300}
    # The frozen 40 are gathered for the forward pass alone, and of the others 10 are still there.
    assert sent(3) == {"all-gather": 3 * 690, "reduce-scatter": 3 * 300}
    alone = sent_bytes(100, 40, Sharding(stage=3, num_devices=1))
    assert set(alone.values()) == {0}


def test_seconds_by_hand():
    seconds = step_seconds(989 * 10**12, 90 * 10**9, DEVICE_KINDS["h100"], utilisation=0.5, link_bytes_per_s=45e9)
    assert seconds == (2.0, 2.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stage": 0, "num_devices": 0}, "num_devices: expected at least 1, got 0"),
        ({"stage": 1, "num_devices": 2, "bucket_numbers": 0}, "bucket_numbers: expected at least 1, got 0"),
        (
            {"stage": 0, "num_devices": 2, "offloads_optimizer": True},
            "offloads_optimizer: expected stage 1 to 3, got 0",
        ),
        ({"stage": 2, "num_devices": 2, "offloads_parameters": True}, "offloads_parameters: expected stage 3, got 2"),
    ],
)
def test_sharding_that_cannot_be_meant(settings, message):
    with pytest.raises(ValueError, match=message):
        Sharding(**settings)


def test_planning_imports_no_torch():
    code = "import sys; from trainer_lite import Sharding, state_bytes; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
