"""The settings of the preference losses."""

import math
from typing import Literal

import msgspec

LossKind = Literal["dpo", "dpo-norm", "ipo", "reference-free", "simpo", "orpo", "kto"]
_SMOOTHED = ("dpo", "dpo-norm", "reference-free", "simpo")
_WITHOUT_REFERENCE = ("reference-free", "simpo", "orpo")


class DpoConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which loss, how strongly preferences pull, and how far they are trusted."""

    kind: LossKind = "dpo"
    """The loss; `dpo_lite.loss` has the equations. `dpo-norm` is DPO on log-probabilities a token."""
    beta: float = 0.1
    """Scale of the implicit reward; larger holds the policy closer to the reference (ORPO: weight of the odds ratio).
    SimPO takes 2 to 10."""
    label_smoothing: float = 0.0
    """Assumed share of pairs whose preference is the wrong way round, from 0 up to (not including) 0.5."""
    target_margin: float = 0.0
    """For SimPO: γ, by how much the chosen answer's reward is to exceed the other's."""

    def __post_init__(self) -> None:
        check_beta(self.beta)
        check_label_smoothing(self.label_smoothing)
        if self.label_smoothing and self.kind not in _SMOOTHED:
            raise ValueError(
                f"label_smoothing: expected 0 for {self.kind}, got {self.label_smoothing}; it has no such form"
            )
        check_target_margin(self.target_margin)
        if self.target_margin and self.kind != "simpo":
            raise ValueError(f"target_margin: expected 0 for {self.kind}, got {self.target_margin}; it is SimPO's")

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares the policy with a reference model."""
        return self.kind not in _WITHOUT_REFERENCE


def check_beta(beta: float) -> None:
    """Raise ValueError unless beta is positive and finite."""
    if not (math.isfinite(beta) and beta > 0):
        raise ValueError(f"beta: expected a positive number, got {beta}; 0.1 is usual")


def check_label_smoothing(label_smoothing: float) -> None:
    """Raise ValueError unless label_smoothing is in [0, 0.5)."""
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(
            f"label_smoothing: expected at least 0 and below 0.5, got {label_smoothing}; use 0 to trust every pair"
        )


def check_target_margin(target_margin: float) -> None:
    """Raise ValueError unless target_margin is finite and not negative."""
    if not (math.isfinite(target_margin) and target_margin >= 0):
        raise ValueError(f"target_margin: expected at least 0, got {target_margin}; about half of beta is usual")
