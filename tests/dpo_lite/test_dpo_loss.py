"""The preference losses against values computed by hand."""

import math
import subprocess
import sys

import msgspec
import pytest
import torch

from dpo_lite import (
    DpoConfig,
    PairLogProbs,
    answer_tokens,
    dpo_loss,
    ipo_loss,
    kl_estimate,
    kto_baseline,
    kto_loss,
    normalised_dpo_loss,
    orpo_loss,
    preference_loss,
    reference_free_loss,
    simpo_loss,
)


def column(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_loss_of_a_policy_that_is_the_reference_is_log_2():
    x, y = column(-3.0, -40.0), column(-5.0, -1.0)
    for smoothing in (0.0, 0.3):
        out = dpo_loss(x, y, x, y, beta=0.7, label_smoothing=smoothing)
        assert out.loss.item() == pytest.approx(math.log(2))
        assert out.accuracy.item() == 0
        assert out.margin.tolist() == [0, 0]


def test_loss_and_rewards_by_hand():
    # chosen gains 2 nats, rejected loses 1: rewards 1.0 and -0.5, margin 1.5
    out = dpo_loss(column(-8.0), column(-5.0), column(-10.0), column(-4.0), beta=0.5)
    assert out.chosen_reward.tolist() == [1.0]
    assert out.rejected_reward.tolist() == [-0.5]
    assert out.loss.item() == pytest.approx(math.log(1 + math.exp(-1.5)))
    assert out.accuracy.item() == 1


def test_label_smoothing_by_hand():
    out = dpo_loss(column(-8.0), column(-5.0), column(-10.0), column(-4.0), beta=0.5, label_smoothing=0.2)
    expected = 0.8 * math.log(1 + math.exp(-1.5)) + 0.2 * math.log(1 + math.exp(1.5))
    assert out.loss.item() == pytest.approx(expected)


def test_loss_is_the_mean_over_pairs_and_accuracy_the_share_of_positive_margins():
    chosen, rejected, zero = column(1.0, -2.0, 3.0), column(0.0, 0.0, 0.0), column(0.0, 0.0, 0.0)
    out = dpo_loss(chosen, rejected, zero, zero, beta=1.0)
    assert out.loss.item() == pytest.approx(sum(math.log(1 + math.exp(-m)) for m in (1, -2, 3)) / 3)
    assert out.accuracy.item() == pytest.approx(2 / 3)


def test_gradient_by_hand_reaches_the_policy_only():
    inputs = [column(value).requires_grad_() for value in (-8.0, -5.0, -10.0, -4.0)]
    out = dpo_loss(*inputs, beta=0.5)
    grads = torch.autograd.grad(out.loss, inputs, allow_unused=True)
    # -beta · sigmoid(-margin) on the chosen side, the opposite on the rejected
    slope = 0.5 / (1 + math.exp(1.5))
    assert [None if grad is None else grad.item() for grad in grads] == [
        pytest.approx(-slope),
        pytest.approx(slope),
        None,
        None,
    ]
    assert not out.chosen_reward.requires_grad


def test_extreme_margins_stay_finite():
    out = dpo_loss(column(-1e4).requires_grad_(), column(0.0), column(0.0), column(-1e4), beta=1.0, label_smoothing=0.1)
    assert out.loss.item() == pytest.approx(0.9 * 2e4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": 0.0}, "beta: expected a positive number, got 0.0"),
        ({"beta": math.nan}, "beta"),
        ({"label_smoothing": 0.5}, "label_smoothing: expected at least 0 and below 0.5, got 0.5"),
        ({"label_smoothing": -0.1}, "label_smoothing"),
    ],
)
def test_settings_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        DpoConfig(**change)
    with pytest.raises(ValueError, match=message):
        dpo_loss(column(0.0), column(0.0), column(0.0), column(0.0), **({"beta": 0.1} | change))


def test_no_pair_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        dpo_loss(column(), column(), column(), column(), beta=0.1)


def test_config_refuses_an_unknown_key():
    with pytest.raises(msgspec.ValidationError, match="betta"):
        msgspec.json.decode(b'{"betta": 0.1}', type=DpoConfig)


def test_config_imports_without_torch():
    code = "import dpo_lite.config, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def pair(chosen=-8.0, rejected=-6.0, chosen_tokens=4, rejected_tokens=2):
    return PairLogProbs(
        column(chosen), column(rejected), torch.tensor([chosen_tokens]), torch.tensor([rejected_tokens])
    )


def softplus(x):
    return math.log(1 + math.exp(x))


def test_length_normalised_loss_by_hand():
    # The chosen answer gains 2 nats on 4 tokens, the rejected one loses 1 on 2: margin 2 · (0.5 + 0.5).
    out = normalised_dpo_loss(pair(), column(-10.0), column(-5.0), beta=2.0)
    assert out.loss.item() == pytest.approx(softplus(-2.0))
    assert (out.chosen_reward.item(), out.rejected_reward.item()) == (1.0, -1.0)


def test_ipo_by_hand_pulls_back_what_is_beyond_its_aim():
    out = ipo_loss(pair(), column(-10.0), column(-5.0), beta=0.25)
    assert out.loss.item() == pytest.approx((1.0 - 2.0) ** 2)
    policy = pair(chosen=-1.0)
    policy.chosen.requires_grad_()
    beyond = ipo_loss(policy, column(-10.0), column(-5.0), beta=1.0)
    (grad,) = torch.autograd.grad(beyond.loss, policy.chosen)
    assert grad.item() == pytest.approx(2 * (9 / 4 + 0.5 - 0.5) / 4)


def test_reference_free_and_simpo_by_hand():
    out = reference_free_loss(column(-8.0), column(-6.0), beta=0.5, label_smoothing=0.1)
    assert out.loss.item() == pytest.approx(0.9 * softplus(1.0) + 0.1 * softplus(-1.0))
    # A token -2 and -3: margin 2 · 1, less 0.5
    out = simpo_loss(pair(), beta=2.0, target_margin=0.5)
    assert out.loss.item() == pytest.approx(softplus(-1.5))
    assert out.margin.item() == pytest.approx(2.0)


def test_orpo_by_hand():
    # A token: chosen 1/2 (odds 1), rejected 1/4 (odds 1/3).
    policy = pair(4 * math.log(0.5), 2 * math.log(0.25))
    out = orpo_loss(policy, beta=0.3)
    assert out.loss.item() == pytest.approx(math.log(2) - 0.3 * math.log(3 / 4))


def test_orpo_of_certain_and_of_impossible_answers_is_finite_with_its_gradient():
    for dtype in (torch.float32, torch.float64):
        chosen = torch.tensor([0.0, -1e-9, -500.0], dtype=dtype, requires_grad=True)
        policy = PairLogProbs(
            chosen, torch.tensor([-500.0, 0.0, 0.0], dtype=dtype), torch.ones(3).long(), torch.ones(3).long()
        )
        out = orpo_loss(policy, beta=0.1)
        (grad,) = torch.autograd.grad(out.loss, chosen)
        assert out.loss.isfinite()
        assert grad.isfinite().all()


def test_kto_by_hand():
    # log-ratios 2 and -1 against a baseline of 0.5
    out = kto_loss(column(-8.0), column(-5.0), column(-10.0), column(-4.0), baseline=torch.tensor(0.5), beta=2.0)
    sigmoid = 1 / (1 + math.exp(-3.0))
    assert out.loss.item() == pytest.approx(1 - sigmoid)
    assert kto_baseline(column(-1.0, -2.0), column(-2.0, -4.0)).item() == 1.5
    assert kto_baseline(column(-2.0), column(-1.0)).item() == 0
    assert kto_baseline(column(), column()).item() == 0


def test_kl_estimate_by_hand():
    assert kl_estimate(column(-1.0, -2.0), column(-2.0, -4.0)).item() == pytest.approx((1 + 4) / 4)


@pytest.mark.parametrize("kind", ["dpo", "dpo-norm", "ipo", "reference-free", "simpo", "orpo", "kto"])
def test_loss_by_name_is_the_function_and_moves_the_answers_apart(kind):
    cfg = DpoConfig(kind=kind, beta=0.7)
    policy = PairLogProbs(
        column(-8.0, -3.0).requires_grad_(),
        column(-6.0, -9.0).requires_grad_(),
        torch.tensor([4, 1]),
        torch.tensor([2, 3]),
    )
    reference = column(-9.0, -3.5), column(-5.0, -9.5)
    zero = torch.zeros(())
    expected = {
        "dpo": lambda: dpo_loss(policy.chosen, policy.rejected, *reference, beta=0.7),
        "dpo-norm": lambda: normalised_dpo_loss(policy, *reference, beta=0.7),
        "ipo": lambda: ipo_loss(policy, *reference, beta=0.7),
        "reference-free": lambda: reference_free_loss(policy.chosen, policy.rejected, beta=0.7),
        "simpo": lambda: simpo_loss(policy, beta=0.7, target_margin=0.0),
        "orpo": lambda: orpo_loss(policy, beta=0.7),
        "kto": lambda: kto_loss(policy.chosen, policy.rejected, *reference, baseline=zero, beta=0.7),
    }
    found = preference_loss(cfg, policy, reference if cfg.needs_reference else None, baseline=zero)
    assert found.loss.item() == expected[kind]().loss.item()
    chosen, rejected = torch.autograd.grad(found.loss, (policy.chosen, policy.rejected))
    # IPO alone pushes back, where the margin is beyond its aim: that of the first pair is, 1/4 + 1/2 > 1/1.4.
    sign = torch.tensor([-1.0, 1.0]) if kind == "ipo" else 1.0
    assert (chosen * sign < 0).all()
    assert (rejected * sign > 0).all()
    if cfg.needs_reference:
        with pytest.raises(ValueError, match="reference: expected log-probabilities"):
            preference_loss(cfg, policy, None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "ipo", "label_smoothing": 0.1}, "label_smoothing: expected 0 for ipo"),
        ({"kind": "dpo", "target_margin": 0.5}, "target_margin: expected 0 for dpo"),
        ({"kind": "simpo", "target_margin": -1.0}, "target_margin: expected at least 0"),
    ],
)
def test_settings_of_another_loss_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DpoConfig(**settings)


def test_answer_tokens_count_the_targets_of_each_document():
    targets = torch.tensor([-100, 5, 6, -100, -100, 7, 1])
    cu_seqlens = torch.tensor([0, 3, 3, 7], dtype=torch.int32)
    assert answer_tokens(targets, cu_seqlens).tolist() == [2, 0, 2]
