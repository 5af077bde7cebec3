"""The reference model's log-probability of each answer, computed once and kept by the digest of what was computed.

The reference never changes, so its forward passes need not be repeated, and once all answers are in the cache the
reference model is not needed at all. The key is made from the sequence itself (`answer_digest`), not from a sample's
name: a name that comes again with another answer, picture or tiling finds nothing. What the values depend on besides
(weights) is the caller's to sum up in a fingerprint; a file with another fingerprint is refused.
"""

import math
import os
from collections.abc import Iterable, Sequence
from hashlib import sha256
from pathlib import Path

import msgspec
import torch
from jaxtyping import Float, Int64
from torch import Tensor


class ReferenceCacheError(ValueError):
    """A cache that does not hold what is asked of it, is not of this reference, or cannot be read."""


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    format: int
    fingerprint: str
    log_probs: dict[str, float]


_FORMAT = 2


def answer_digest(ids: Int64[Tensor, " t"], targets: Int64[Tensor, " t"], pictures: Iterable[str] = ()) -> str:
    """Name a prompt with an answer by what the model gets: its tokens, which of them count, and its pictures' names.

    `pictures`: of each tile a name that no other tile has, such as a digest of its content. 32 hexadecimal digits.
    """
    digest = sha256()
    for part in (*(msgspec.json.encode(tensor.tolist()) for tensor in (ids, targets)), *(p.encode() for p in pictures)):
        # The length keeps parts apart that could be cut otherwise.
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:32]


class ReferenceCache:
    """A log-probability in nats for each answer, by its digest."""

    def __init__(self, fingerprint: str) -> None:
        """Start empty. `fingerprint` names all that the values depend on beside the answers."""
        self.fingerprint = fingerprint
        self._log_probs: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._log_probs)

    def __contains__(self, digest: object) -> bool:
        return digest in self._log_probs

    def missing(self, digests: Sequence[str]) -> list[str]:
        """Return those of the digests that have no value yet, in their order."""
        return [digest for digest in digests if digest not in self._log_probs]

    def put(self, digests: Sequence[str], log_probs: Float[Tensor, " n"]) -> None:
        """Keep the values of these answers; a digest that is there already keeps the value that it has.

        Raises:
            ReferenceCacheError: if the counts differ or a value is not finite; nothing is kept then.
        """
        if len(digests) != log_probs.shape[0]:
            raise ReferenceCacheError(
                f"reference log-probabilities: expected {len(digests)}, one a digest, got {log_probs.shape[0]}; "
                "give those of the same answers"
            )
        values = log_probs.tolist()
        for digest, value in zip(digests, values, strict=True):
            if not math.isfinite(value):
                raise ReferenceCacheError(
                    f"reference log-probability of {digest!r}: expected a finite value, got {value}; "
                    "check the reference model"
                )
        for digest, value in zip(digests, values, strict=True):
            # The same sequence in another pack may round otherwise; what was used once is used ever after.
            self._log_probs.setdefault(digest, value)

    def get(self, digests: Sequence[str]) -> Float[Tensor, " n"]:
        """Return the values, fp32, in the order of the digests.

        Raises:
            ReferenceCacheError: if a digest has none.
        """
        missing = self.missing(digests)
        if missing:
            raise ReferenceCacheError(
                f"answers: expected such with reference log-probabilities, got {len(missing)} without, "
                f"the first {missing[:3]}; run the reference over these answers"
            )
        return torch.tensor([self._log_probs[digest] for digest in digests])

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
