"""Losses on preferences: pure functions of the log-probabilities of b chosen (w) and b rejected (l) answers.

π is the policy's log-probability of a whole answer, r the frozen reference's, n the answer's number of tokens. With
the log-ratios δ = π - r, log-odds(p) = p - log(1 - eᵖ), smoothing ε, and σ the logistic function, of each pair

    dpo              -(1 - ε) log σ(m) - ε log σ(-m)             m = β (δw - δl)
    dpo-norm         the same                                    m = β (δw / nw - δl / nl)
    ipo              (δw / nw - δl / nl - 1 / 2β)²
    reference-free   as dpo                                      m = β (πw - πl)
    simpo            as dpo                                      m = β (πw / nw - πl / nl) - γ
    orpo             -πw / nw - β log σ(log-odds(πw / nw) - log-odds(πl / nl))
    kto              (1 - σ(β (δw - z)) + 1 - σ(β (z - δl))) / 2

Sources:
    dpo              Rafailov et al., arXiv:2305.18290, eq. 7; ε, the assumed share of flipped preferences: Mitchell,
                     "A note on DPO with noisy preferences", eq. 3, https://ericmitchell.ai/cdpo.pdf
    dpo-norm         Tulu 3, arXiv:2411.15124, eq. 6
    ipo              Azar et al., arXiv:2310.12036, eq. 17; the mean over tokens in place of the sum is TRL's,
                     after IPO's authors, so that the aim of 1 / 2β is not the nearer the longer the answers are
    reference-free   DPO with a uniform reference: the preference term of CPO, Xu et al., arXiv:2401.08417, eq. 4
    simpo            Meng et al., arXiv:2405.14734, eq. 6
    orpo             Hong et al., arXiv:2403.07691, eq. 6 and 7; the likelihood term is that of the answer alone
    kto              Ethayarajh et al., arXiv:2402.01306, eq. 8, λ = 1, a pair counting as one answer of each kind; z
                     estimates KL(π ‖ r), see `kto_baseline`

Gradients reach the policy's log-probabilities only. Give them in fp32: their differences are small beside them.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from .config import DpoConfig, check_beta, check_label_smoothing, check_target_margin

Answers = Float[Tensor, " b"]
Counts = Int64[Tensor, " b"]


@dataclass(frozen=True)
class PreferenceOutput:
    """The loss, and for each pair what the policy has come to think of its answers, without gradient."""

    loss: Float[Tensor, ""]
    """Mean over pairs."""
    chosen_reward: Answers
    """Implicit reward in nats, as the loss has it: β times the log-ratio, or for some losses the log-probability."""
    rejected_reward: Answers

    @property
    def margin(self) -> Answers:
        """How much more the chosen answer is worth to the policy than the rejected one."""
        return self.chosen_reward - self.rejected_reward

    @property
    def accuracy(self) -> Float[Tensor, ""]:
        """The share of pairs whose margin is positive."""
        return (self.margin > 0).float().mean()


@dataclass(frozen=True)
class PairLogProbs:
    """Log-probability in nats of both whole answers of b pairs, and their numbers of tokens."""

    chosen: Answers
    rejected: Answers
    chosen_tokens: Counts
    rejected_tokens: Counts


def dpo_loss(
    policy_chosen: Answers,
    policy_rejected: Answers,
    reference_chosen: Answers,
    reference_rejected: Answers,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> PreferenceOutput:
    """Return DPO's loss and rewards of b ≥ 1 pairs.

    Raises:
        ValueError: if there is no pair, beta is not positive, or label_smoothing is outside [0, 0.5).
    """
    chosen_reward = beta * (policy_chosen - reference_chosen.detach())
    rejected_reward = beta * (policy_rejected - reference_rejected.detach())
    return _logistic(chosen_reward, rejected_reward, beta, label_smoothing)


def normalised_dpo_loss(
    policy: PairLogProbs,
    reference_chosen: Answers,
    reference_rejected: Answers,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> PreferenceOutput:
    """Return the loss `dpo-norm`, in which a long answer weighs no more than a short one.

    Raises:
        ValueError: as `dpo_loss`.
    """
    chosen, rejected = _means(policy, reference_chosen, reference_rejected)
    return _logistic(beta * chosen, beta * rejected, beta, label_smoothing)


def ipo_loss(
    policy: PairLogProbs, reference_chosen: Answers, reference_rejected: Answers, *, beta: float
) -> PreferenceOutput:
    """Return IPO's loss, which pulls the margin to 1 / 2β and not beyond.

    Raises:
        ValueError: if there is no pair or beta is not positive.
    """
    _check(policy.chosen, beta)
    chosen, rejected = _means(policy, reference_chosen, reference_rejected)
    losses = (chosen - rejected - 1 / (2 * beta)).square()
    return PreferenceOutput(losses.mean(), beta * chosen.detach(), beta * rejected.detach())


def reference_free_loss(
    policy_chosen: Answers, policy_rejected: Answers, *, beta: float, label_smoothing: float = 0.0
) -> PreferenceOutput:
    """Return DPO's loss with a reference to which all answers are alike.

    Raises:
        ValueError: as `dpo_loss`.
    """
    return _logistic(beta * policy_chosen, beta * policy_rejected, beta, label_smoothing)


def simpo_loss(
    policy: PairLogProbs, *, beta: float, target_margin: float, label_smoothing: float = 0.0
) -> PreferenceOutput:
    """Return SimPO's loss: rewards are log-probabilities a token, and their margin is to exceed `target_margin`.

    Raises:
        ValueError: as `dpo_loss`, or if target_margin is negative.
    """
    check_target_margin(target_margin)
    chosen, rejected = policy.chosen / policy.chosen_tokens, policy.rejected / policy.rejected_tokens
    return _logistic(beta * chosen, beta * rejected, beta, label_smoothing, target_margin)


def orpo_loss(policy: PairLogProbs, *, beta: float) -> PreferenceOutput:
    """Return ORPO's loss: the likelihood of the chosen answer, and β times the odds ratio of the two.

    Raises:
        ValueError: if there is no pair or beta is not positive.
    """
    _check(policy.chosen, beta)
    chosen, rejected = policy.chosen / policy.chosen_tokens, policy.rejected / policy.rejected_tokens
    losses = -chosen - beta * F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))
    return PreferenceOutput(losses.mean(), beta * chosen.detach(), beta * rejected.detach())


def kto_loss(
    policy_chosen: Answers,
    policy_rejected: Answers,
    reference_chosen: Answers,
    reference_rejected: Answers,
    *,
    baseline: Float[Tensor, ""],
    beta: float,
) -> PreferenceOutput:
    """Return KTO's loss; `baseline` is z, as `kto_baseline` estimates it.

    Raises:
        ValueError: if there is no pair or beta is not positive.
    """
    _check(policy_chosen, beta)
    z = baseline.detach()
    chosen = policy_chosen - reference_chosen.detach()
    rejected = policy_rejected - reference_rejected.detach()
    losses = (2 - torch.sigmoid(beta * (chosen - z)) - torch.sigmoid(beta * (z - rejected))) / 2
    return PreferenceOutput(losses.mean(), beta * chosen.detach(), beta * rejected.detach())


def kto_baseline(policy: Float[Tensor, " n"], reference: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    """Estimate z of KTO: the mean log-ratio of answers to prompts that are not theirs, no less than 0 (§4.1).

    Without such answers (n = 0) it is 0.
    """
    return (policy - reference).detach().mean().clamp(min=0) if policy.numel() else policy.new_zeros(())


def preference_loss(
    cfg: DpoConfig,
    policy: PairLogProbs,
    reference: tuple[Answers, Answers] | None,
    *,
    baseline: Float[Tensor, ""] | None = None,
) -> PreferenceOutput:
    """Return the loss that `cfg` names; `reference`: of the chosen and of the rejected answers, `baseline`: KTO's z.

    Raises:
        ValueError: if there is no pair, or what the loss needs is missing.
    """
    if not cfg.needs_reference:
        return _loss_without_reference(cfg, policy)
    if reference is None:
        raise ValueError(f"reference: expected log-probabilities for {cfg.kind}, got none; run the reference model")
    match cfg.kind:
        case "dpo-norm":
            return normalised_dpo_loss(policy, *reference, beta=cfg.beta, label_smoothing=cfg.label_smoothing)
        case "ipo":
            return ipo_loss(policy, *reference, beta=cfg.beta)
        case "kto":
            if baseline is None:
                raise ValueError("baseline: expected one for kto, got none; see kto_baseline")
            return kto_loss(policy.chosen, policy.rejected, *reference, baseline=baseline, beta=cfg.beta)
        case _:
            return dpo_loss(
                policy.chosen, policy.rejected, *reference, beta=cfg.beta, label_smoothing=cfg.label_smoothing
            )


def _loss_without_reference(cfg: DpoConfig, policy: PairLogProbs) -> PreferenceOutput:
    match cfg.kind:
        case "simpo":
            return simpo_loss(
                policy, beta=cfg.beta, target_margin=cfg.target_margin, label_smoothing=cfg.label_smoothing
            )
        case "orpo":
            return orpo_loss(policy, beta=cfg.beta)
        case _:
            return reference_free_loss(
                policy.chosen, policy.rejected, beta=cfg.beta, label_smoothing=cfg.label_smoothing
            )


def kl_estimate(policy: Float[Tensor, " n"], reference: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    """Estimate how far the policy has gone from the reference: the mean of δ² / 2, in nats an answer.

    Never negative. For answers drawn from the policy it comes close to KL(π ‖ r) while that is small (k2 of Schulman,
    http://joschu.net/blog/kl-approx.html); of given answers it says how far the policy has moved on these.
    """
    return (policy - reference).detach().square().mean() / 2


def _check(policy_chosen: Answers, beta: float) -> None:
    check_beta(beta)
    if policy_chosen.numel() == 0:
        raise ValueError("pairs: expected at least one, got 0; leave an empty batch out")


def _means(policy: PairLogProbs, reference_chosen: Answers, reference_rejected: Answers) -> tuple[Answers, Answers]:
    """Log-ratios a token."""
    chosen = (policy.chosen - reference_chosen.detach()) / policy.chosen_tokens
    rejected = (policy.rejected - reference_rejected.detach()) / policy.rejected_tokens
    return chosen, rejected


def _logistic(
    chosen_reward: Answers, rejected_reward: Answers, beta: float, label_smoothing: float, target_margin: float = 0.0
) -> PreferenceOutput:
    _check(chosen_reward, beta)
    check_label_smoothing(label_smoothing)
    margin = chosen_reward - rejected_reward
    if target_margin:
        margin = margin - target_margin
    losses = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    return PreferenceOutput(losses.mean(), chosen_reward.detach(), rejected_reward.detach())


def _log_odds(log_prob: Answers) -> Answers:
    """log(p / (1 - p)); p = 1 is taken for the number before it, whose odds are finite."""
    below_one = log_prob.clamp(max=-torch.finfo(log_prob.dtype).eps)
    # Near 0 the one form loses all digits, far from it the other; each gets only what it is good at, for the gradient.
    is_near = below_one > -0.6931471805599453
    near = below_one.where(is_near, -0.5)
    far = below_one.where(~is_near, -1.0)
    return below_one - torch.where(is_near, (-near.expm1()).log(), (-far.exp()).log1p())
