"""The reference model's log-probabilities of both answers of each pair, computed once and kept by sample id.

The reference never changes, so its forward passes need not be repeated each epoch. What it was computed with (weights,
tokenizer, tiling) is the caller's to sum up in a fingerprint; a file with another fingerprint is refused.
"""

import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import msgspec
import torch
from jaxtyping import Float
from torch import Tensor


class ReferenceCacheError(ValueError):
    """A cache that does not hold what is asked of it, is not of this reference, or cannot be read."""


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    format: int
    fingerprint: str
    log_probs: dict[str, tuple[float, float]]


_FORMAT = 1


class ReferenceCache:
    """Two log-probabilities in nats, of the chosen and of the rejected answer, for each sample id."""

    def __init__(self, fingerprint: str) -> None:
        """Start empty. `fingerprint` names all that the values depend on."""
        self.fingerprint = fingerprint
        self._log_probs: dict[str, tuple[float, float]] = {}

    def __len__(self) -> int:
        return len(self._log_probs)

    def __contains__(self, sample_id: object) -> bool:
        return sample_id in self._log_probs

    def missing(self, sample_ids: Sequence[str]) -> list[str]:
        """Return those of the ids that have no values yet, in their order."""
        return [sample_id for sample_id in sample_ids if sample_id not in self._log_probs]

    def put(self, sample_ids: Sequence[str], chosen: Float[Tensor, " b"], rejected: Float[Tensor, " b"]) -> None:
        """Keep the values of these pairs; an id that is there already gets the new ones.

        Raises:
            ReferenceCacheError: if the counts differ, an id is there twice or a value is not finite; nothing is kept
                then.
        """
        if not len(sample_ids) == chosen.shape[0] == rejected.shape[0]:
            raise ReferenceCacheError(
                f"reference log-probabilities: expected {len(sample_ids)} of each answer, one a sample id, "
                f"got {chosen.shape[0]} and {rejected.shape[0]}; give those of the same pairs"
            )
        if repeated := [sample_id for sample_id, count in Counter(sample_ids).items() if count > 1]:
            raise ReferenceCacheError(
                f"sample ids: expected each once, got {len(repeated)} again, the first {repeated[:3]}; "
                "give different pairs different ids, or they would share one reference"
            )
        values = dict(zip(sample_ids, zip(chosen.tolist(), rejected.tolist(), strict=True), strict=True))
        for sample_id, pair in values.items():
            if not all(math.isfinite(value) for value in pair):
                raise ReferenceCacheError(
                    f"reference log-probabilities of {sample_id!r}: expected finite values, got {pair}; "
                    "check the reference model"
                )
        self._log_probs.update(values)

    def get(self, sample_ids: Sequence[str]) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """Return the chosen and the rejected answers' values, fp32, in the order of the ids.

        Raises:
            ReferenceCacheError: if an id has none.
        """
        missing = self.missing(sample_ids)
        if missing:
            raise ReferenceCacheError(
                f"sample ids: expected ids with reference log-probabilities, got {len(missing)} without, "
                f"the first {missing[:3]}; run the reference over these pairs"
            )
        values = torch.tensor([self._log_probs[sample_id] for sample_id in sample_ids]).reshape(-1, 2)
        return values[:, 0], values[:, 1]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file, replacing an old one only once the new one is whole. fp32 values come back bit for bit."""
        target = Path(path)
        partial = target.with_name(target.name + ".partial")
        content = _File(format=_FORMAT, fingerprint=self.fingerprint, log_probs=self._log_probs)
        partial.write_bytes(msgspec.json.encode(content))
        os.replace(partial, target)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, fingerprint: str) -> "ReferenceCache":
        """Read a file that `save` wrote.

        Raises:
            FileNotFoundError: if there is none.
            ReferenceCacheError: if it is not such a file, or was made with another fingerprint.
        """
        try:
            content = msgspec.json.decode(Path(path).read_bytes(), type=_File)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ReferenceCacheError(
                f"reference cache {path}: expected a file written by ReferenceCache.save, got {error}; make it anew"
            ) from error
        if content.format != _FORMAT:
            raise ReferenceCacheError(
                f"format of reference cache {path}: expected {_FORMAT}, got {content.format}; make it anew"
            )
        if content.fingerprint != fingerprint:
            raise ReferenceCacheError(
                f"fingerprint of reference cache {path}: expected {fingerprint!r}, got {content.fingerprint!r}; "
                "it was made with another reference model or other inputs: make it anew"
            )
        cache = cls(fingerprint)
        cache._log_probs = content.log_probs
        return cache
