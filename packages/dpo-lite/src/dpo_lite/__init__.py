"""Direct preference optimisation on packed sequences: pairs, reference log-probabilities, loss."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import DpoConfig as DpoConfig
    from .loss import DpoOutput as DpoOutput
    from .loss import dpo_loss as dpo_loss
    from .pairs import sequence_log_probs as sequence_log_probs
    from .pairs import side_by_side as side_by_side
    from .pairs import split_pairs as split_pairs
    from .reference import ReferenceCache as ReferenceCache
    from .reference import ReferenceCacheError as ReferenceCacheError

__all__ = [
    "DpoConfig",
    "DpoOutput",
    "ReferenceCache",
    "ReferenceCacheError",
    "dpo_loss",
    "sequence_log_probs",
    "side_by_side",
    "split_pairs",
]
_HOMES = {
    "DpoConfig": "config",
    "DpoOutput": "loss",
    "ReferenceCache": "reference",
    "ReferenceCacheError": "reference",
    "dpo_loss": "loss",
    "sequence_log_probs": "pairs",
    "side_by_side": "pairs",
    "split_pairs": "pairs",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
