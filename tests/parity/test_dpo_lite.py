"""The losses against TRL, its own code executed: methods of its trainers on stubs with only what they read."""

import importlib
import warnings
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer

from dpo_lite import (
    PairLogProbs,
    dpo_loss,
    ipo_loss,
    kto_baseline,
    kto_loss,
    normalised_dpo_loss,
    orpo_loss,
    reference_free_loss,
    simpo_loss,
)


def experimental(trainer: str):
    """The trainer that TRL has under this name; on import it warns that its place may change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        name = trainer.removesuffix("Trainer").lower()
        return getattr(importlib.import_module(f"trl.experimental.{name}.{name}_trainer"), trainer)


def gather(tensor):
    return tensor


ACCELERATOR = SimpleNamespace(device=torch.device("cpu"), gather=gather, gather_for_metrics=gather)


def trl_loss(
    policy_chosen,
    policy_rejected,
    reference_chosen,
    reference_rejected,
    *,
    beta,
    loss_type,
    label_smoothing=0.0,
    tokens=None,
):
    """Return TRL's loss and metrics; its model is a stub with each answer's log-probability on its first token."""
    b = policy_chosen.shape[0]
    tokens = torch.ones(2 * b, dtype=torch.int64) if tokens is None else tokens
    longest = int(tokens.max())

    def model(**inputs):
        per_token = torch.zeros(2 * b, longest, dtype=torch.float64)
        per_token[:, 0] = torch.cat([policy_chosen, policy_rejected])
        zeros = torch.zeros_like(per_token)
        return SimpleNamespace(log_probs=per_token, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())

    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=ACCELERATOR,
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=label_smoothing,
        use_weighting=False,
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
    )
    inputs = {
        "input_ids": torch.zeros(2 * b, longest + 1, dtype=torch.int64),
        "attention_mask": torch.ones(2 * b, longest + 1, dtype=torch.int64),
        "completion_mask": (torch.arange(longest + 1) <= tokens[:, None]) & (torch.arange(longest + 1) > 0),
        "ref_chosen_logps": reference_chosen,
        "ref_rejected_logps": reference_rejected,
    }
    loss = DPOTrainer._compute_loss(trainer, model, inputs, return_outputs=False)
    return loss, trainer._metrics["eval"]


def log_probs(b):
    return [(-50 * torch.rand(b, dtype=torch.float64)).requires_grad_(side < 2) for side in range(4)]


@pytest.mark.parametrize("b", [1, 7])
@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0])
def test_loss_rewards_and_gradients_are_those_of_trl(b, beta):
    inputs = log_probs(b)
    out = dpo_loss(*inputs, beta=beta)
    expected, metrics = trl_loss(*inputs, beta=beta, loss_type="sigmoid")
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(torch.autograd.grad(out.loss, inputs[:2]), torch.autograd.grad(expected, inputs[:2]))
    assert out.chosen_reward.mean().item() == pytest.approx(metrics["rewards/chosen"][0])
    assert out.rejected_reward.mean().item() == pytest.approx(metrics["rewards/rejected"][0])
    assert out.margin.mean().item() == pytest.approx(metrics["rewards/margins"][0])
    assert out.accuracy.item() == pytest.approx(metrics["rewards/accuracies"][0])


@pytest.mark.parametrize("label_smoothing", [0.1, 0.4])
def test_label_smoothing_is_that_of_trl(label_smoothing):
    # TRL's "sigmoid" takes no smoothing. Its "aot" has the smoothed loss, on sorted ratios: the same for a single pair.
    for _ in range(5):
        inputs = log_probs(1)
        out = dpo_loss(*inputs, beta=0.1, label_smoothing=label_smoothing)
        expected, _ = trl_loss(*inputs, beta=0.1, loss_type="aot", label_smoothing=label_smoothing)
        torch.testing.assert_close(out.loss, expected)
        torch.testing.assert_close(torch.autograd.grad(out.loss, inputs[:2]), torch.autograd.grad(expected, inputs[:2]))


def drawn_pairs(b):
    inputs = log_probs(b)
    tokens = torch.randint(1, 40, (2, b))
    return inputs, PairLogProbs(*inputs[:2], *tokens), tokens.flatten()


def assert_same(ours, theirs, inputs):
    """Value and gradients, to 1e-6 and better."""
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(
        torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), atol=1e-9, rtol=1e-9
    )


@pytest.mark.parametrize("b", [1, 7])
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_ipo_and_normalised_dpo_are_those_of_trl(b, beta):
    inputs, policy, tokens = drawn_pairs(b)
    theirs, _ = trl_loss(*inputs, beta=beta, loss_type="ipo", tokens=tokens)
    assert_same(ipo_loss(policy, *inputs[2:], beta=beta).loss, theirs, inputs[:2])
    theirs, _ = trl_loss(*inputs, beta=beta, loss_type="sigmoid_norm", tokens=tokens)
    assert_same(normalised_dpo_loss(policy, *inputs[2:], beta=beta).loss, theirs, inputs[:2])


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_reference_free_and_simpo_are_those_of_trl(label_smoothing):
    inputs, policy, _ = drawn_pairs(7)
    settings = {"beta": 2.0, "label_smoothing": label_smoothing, "alpha": 0.0, "accelerator": ACCELERATOR}
    stub = SimpleNamespace(loss_type="sigmoid", **settings)
    cpo_loss = experimental("CPOTrainer").cpo_loss
    theirs, chosen, rejected = cpo_loss(stub, policy.chosen, policy.rejected)
    ours = reference_free_loss(policy.chosen, policy.rejected, beta=2.0, label_smoothing=label_smoothing)
    assert_same(ours.loss, theirs.mean(), inputs[:2])
    torch.testing.assert_close((ours.chosen_reward, ours.rejected_reward), (chosen, rejected))
    stub = SimpleNamespace(loss_type="simpo", simpo_gamma=0.5, **settings)
    means = policy.chosen / policy.chosen_tokens, policy.rejected / policy.rejected_tokens
    theirs, chosen, rejected = cpo_loss(stub, *means)
    ours = simpo_loss(policy, beta=2.0, target_margin=0.5, label_smoothing=label_smoothing)
    assert_same(ours.loss, theirs.mean(), inputs[:2])
    torch.testing.assert_close((ours.chosen_reward, ours.rejected_reward), (chosen, rejected))


def test_odds_ratio_of_orpo_is_that_of_trl():
    # TRL's likelihood term takes in the prompt's tokens; the paper's, and ours, is that of the answer.
    inputs, policy, _ = drawn_pairs(7)
    means = policy.chosen / policy.chosen_tokens, policy.rejected / policy.rejected_tokens
    stub = SimpleNamespace(beta=0.3, accelerator=ACCELERATOR)
    ratio, *_ = experimental("ORPOTrainer").odds_ratio_loss(stub, *means)
    theirs = -means[0].mean() - ratio.mean().double()
    ours = orpo_loss(policy, beta=0.3).loss
    # TRL goes over to fp32.
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    found, expected = torch.autograd.grad(ours, inputs[:2]), torch.autograd.grad(theirs, inputs[:2])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("shift", [-60.0, 60.0])
def test_kto_is_that_of_trl(shift):
    """With a baseline above 0, and with one that is cut at 0."""
    inputs, policy, _ = drawn_pairs(5)
    mismatched, reference = -50 * torch.rand(5, dtype=torch.float64), -50 * torch.rand(5, dtype=torch.float64) - shift

    def model(**inputs):
        values = torch.cat([policy.chosen, policy.rejected])[:, None]
        return SimpleNamespace(log_probs=values, entropy=torch.zeros(10, 1), mean_logits=torch.zeros(10, 1))

    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=ACCELERATOR,
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        calculate_KL=True,
        loss_type="kto",
        beta=0.2,
        desirable_weight=1.0,
        undesirable_weight=1.0,
        _compute_kl_logps=lambda model, batch: mismatched,
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    batch = {
        "input_ids": torch.zeros(10, 2, dtype=torch.int64),
        "attention_mask": torch.ones(10, 2, dtype=torch.int64),
        "completion_mask": torch.tensor([[0, 1]]).expand(10, 2),
        "label": torch.tensor([True] * 5 + [False] * 5),
        "ref_logps": torch.cat([side.detach() for side in inputs[2:]]),
        "ref_KL_logps": reference,
    }
    theirs = KTOTrainer._compute_loss(trainer, model, batch, return_outputs=False)
    baseline = kto_baseline(mismatched, reference)
    assert (baseline.item() > 0) == (shift > 0)
    ours = kto_loss(policy.chosen, policy.rejected, *inputs[2:], baseline=baseline, beta=0.2)
    assert_same(ours.loss, theirs, inputs[:2])
