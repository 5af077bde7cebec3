"""Where shards are: files of this disk, or objects that a server sends; and what may be shown of an address.

Only the operator's data file names addresses; what a sample says is never looked at here. An index always lies on this
disk: beside a file, or for an object in the user's cache folder, as the XDG base directory specification has it.
"""

import os
import re
from collections.abc import Iterator
from hashlib import sha256
from itertools import product
from urllib.parse import unquote, urlsplit

SCHEMES = ("s3", "gs", "https", "http")
"""Of the addresses that can be read."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"([0-9]+)\.\.([0-9]+)")
_MAX_SHARDS = 1_000_000


def is_remote(path: str) -> bool:
    """Whether it is an address, of whatever scheme, and no path."""
    return _SCHEME.match(path) is not None


def scheme_of(address: str) -> str:
    """The address's scheme, in lower case; nothing for a path."""
    found = _SCHEME.match(address)
    return "" if found is None else found[1].lower()


def shown(path: str) -> str:
    """What messages say of a path or an address: no user's name, no password, and no query, which may be signed."""
    if not is_remote(path):
        return path
    scheme = scheme_of(path)
    if scheme not in ("http", "https"):
        bucket, slash, name = path.split("://", 1)[1].partition("/")
        return f"{scheme}://{bucket.rpartition('@')[2]}{slash}{name}"
    try:
        parts = urlsplit(path)
    except ValueError:
        # Of what cannot be taken apart nobody knows where a password ends.
        return f"{scheme}://…"
    return f"{scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}{'?…' if parts.query else ''}"


def file_name(path: str) -> str:
    """The last component; of a web address without its query."""
    if scheme_of(path) in ("http", "https"):
        return unquote(urlsplit(path).path).rpartition("/")[2]
    return os.path.basename(path)


def local_place(path: str) -> str:
    """What an index's name is made of: the shard's own path, or a place in the cache folder if it is an address.

    The place does not depend on who asks (user's name, password, query), only on what is asked for.
    """
    if not is_remote(path):
        return path
    name = sha256(shown(path).encode("utf-8", "surrogateescape")).hexdigest()[:32]
    return os.path.join(cache_folder(), name, file_name(path))


def cache_folder() -> str:
    """Where the indexes of objects lie: `interleave-data/shards` in the user's cache folder.

    Source: XDG Base Directory Specification 0.8, `XDG_CACHE_HOME`; a relative one is to be ignored.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    base = base if os.path.isabs(base) else os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(base, "interleave-data", "shards")


def expand(address: str) -> Iterator[str]:
    """Write out `{000..099}` (both ends, as wide as the first) and `{a,b}`, the rightmost turning fastest.

    Raises:
        ValueError: if that are more than a million.
    """
    pieces = _BRACES.split(address)
    choices: list[list[str]] = []
    total = 1
    for place, piece in enumerate(pieces):
        found = _RANGE.fullmatch(piece)
        if place % 2 == 0:
            choices.append([piece])
        elif found is not None:
            first, last = int(found[1]), int(found[2])
            total *= max(last - first + 1, 0)
            if total > _MAX_SHARDS:
                raise ValueError(f"path: expected at most {_MAX_SHARDS} shards, got {shown(address)}; list fewer")
            choices.append([f"{number:0{len(found[1])}d}" for number in range(first, last + 1)])
        else:
            choices.append(piece.split(","))
    return ("".join(chosen) for chosen in product(*choices))
