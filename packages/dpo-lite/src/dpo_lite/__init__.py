"""Preference optimisation on packed sequences: pairs, reference log-probabilities, losses."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import DpoConfig as DpoConfig
    from .config import LossKind as LossKind
    from .loss import PairLogProbs as PairLogProbs
    from .loss import PreferenceOutput as PreferenceOutput
    from .loss import dpo_loss as dpo_loss
    from .loss import ipo_loss as ipo_loss
    from .loss import kl_estimate as kl_estimate
    from .loss import kto_baseline as kto_baseline
    from .loss import kto_loss as kto_loss
    from .loss import normalised_dpo_loss as normalised_dpo_loss
    from .loss import orpo_loss as orpo_loss
    from .loss import preference_loss as preference_loss
    from .loss import reference_free_loss as reference_free_loss
    from .loss import simpo_loss as simpo_loss
    from .pairs import answer_tokens as answer_tokens
    from .pairs import sequence_log_probs as sequence_log_probs
    from .pairs import side_by_side as side_by_side
    from .pairs import split_pairs as split_pairs
    from .reference import ReferenceCache as ReferenceCache
    from .reference import ReferenceCacheError as ReferenceCacheError
    from .reference import answer_digest as answer_digest

__all__ = [
    "DpoConfig",
    "LossKind",
    "PairLogProbs",
    "PreferenceOutput",
    "ReferenceCache",
    "ReferenceCacheError",
    "answer_digest",
    "answer_tokens",
    "dpo_loss",
    "ipo_loss",
    "kl_estimate",
    "kto_baseline",
    "kto_loss",
    "normalised_dpo_loss",
    "orpo_loss",
    "preference_loss",
    "reference_free_loss",
    "sequence_log_probs",
    "side_by_side",
    "simpo_loss",
    "split_pairs",
]
_HOMES = {
    "DpoConfig": "config",
    "LossKind": "config",
    "PairLogProbs": "loss",
    "PreferenceOutput": "loss",
    "ReferenceCache": "reference",
    "ReferenceCacheError": "reference",
    "answer_digest": "reference",
    "answer_tokens": "pairs",
    "dpo_loss": "loss",
    "ipo_loss": "loss",
    "kl_estimate": "loss",
    "kto_baseline": "loss",
    "kto_loss": "loss",
    "normalised_dpo_loss": "loss",
    "orpo_loss": "loss",
    "preference_loss": "loss",
    "reference_free_loss": "loss",
    "sequence_log_probs": "pairs",
    "side_by_side": "pairs",
    "simpo_loss": "loss",
    "split_pairs": "pairs",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
