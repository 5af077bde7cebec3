"""What is different about the data since a state was saved, in words: which source, and which shard of it."""

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from .sources import Source


@runtime_checkable
class HasShards(Protocol):
    """A source of several files that can tell which of them has changed."""

    @property
    def shards(self) -> Mapping[str, str]:
        """Digest of each file by its name, in order."""
        ...


def shards_of(sources: Sequence[Source]) -> dict[str, dict[str, str]]:
    """Digests of the shards of every source that has any: what `source_changes` compares."""
    return {source.name: dict(source.shards) for source in sources if isinstance(source, HasShards)}


def shard_changes(saved: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Say in words how the shards of a source differ from those that were saved; empty if they do not."""
    kept = [name for name in now if name in saved]
    changes = {
        "removed": [name for name in saved if name not in now],
        "added": [name for name in now if name not in saved],
        "changed": [name for name in kept if saved[name] != now[name]],
        "in another order": [] if kept == [name for name in saved if name in now] else kept,
    }
    return "; ".join(f"{what}: {_some(names)}" for what, names in changes.items() if names)


def source_changes(
    saved: Mapping[str, str], saved_shards: Mapping[str, Mapping[str, str]], sources: Sequence[Source]
) -> dict[str, str]:
    """Say of each source that is new, gone or other than it was what is different; by name, sorted.

    `saved`: fingerprint of each source then. `saved_shards`: `shards_of` them; a source may be missing there.
    """
    now = {source.name: source.fingerprint for source in sources}
    shards = shards_of(sources)
    words: dict[str, str] = {}
    for name in sorted(saved.keys() | now.keys()):
        if name not in now:
            words[name] = "the source is gone"
        elif name not in saved:
            words[name] = "a new source"
        elif saved[name] != now[name]:
            known = name in saved_shards and name in shards
            unsaid = "other settings of its format" if known else "other contents or settings"
            words[name] = (shard_changes(saved_shards[name], shards[name]) if known else "") or unsaid
    return words


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
