"""From an address to what a web server is asked: s3:// and gs:// through fsspec, web addresses as they stand.

fsspec's filesystems know where credentials come from (the environment, profiles, the machine's role) and list buckets;
the bytes come by our own requests (`http_ranges`), to the address that they sign. Headers for web addresses are taken
from fsspec's settings too (`FSSPEC_HTTPS`), and name and password from the address itself. Nothing of this is logged.
"""

import os
import threading
from collections.abc import Iterator
from typing import Any, cast
from urllib.parse import urlsplit

from .errors import ShardError
from .http_ranges import Target
from .places import expand, scheme_of, shown

_SIGNED_FOR_S = 3600
_PATTERN = frozenset("*?[")

_STORES: dict[tuple[int, str], Any] = {}
"""By process: the filesystems hold sockets and a thread."""
_OPENING = threading.Lock()


def target_of(address: str) -> Target:
    """Where to ask for an object, signed anew each time: credentials may be short-lived.

    Raises:
        ShardError: if there are no credentials, or the store's package is not installed.
    """
    scheme = scheme_of(address)
    if scheme in ("http", "https"):
        return Target(address, _web_headers(scheme))
    store = _store(scheme)
    path = address.split("://", 1)[1]
    try:
        if scheme == "s3":
            return Target(store.url(path, expires=_SIGNED_FOR_S))
        headers: dict[str, str] = {}
        store.credentials.apply(headers)
        return Target(store.url(path), headers)
    except Exception as error:  # noqa: BLE001  (each store's library has errors of its own)
        raise _no_access(address, error) from None


def find_objects(address: str) -> list[str]:
    """Write out braces, and ask the store what matches `*`; in the order of the braces, then of the names.

    Raises:
        ShardError: if the store cannot be asked, or is a web server, which lists nothing.
        ValueError: if that are too many, or an address names no host or no bucket.
    """
    return [found for one in expand(address) for found in _matches(one)]


def _matches(address: str) -> Iterator[str]:
    scheme = scheme_of(address)
    if scheme in ("http", "https"):
        if not _has_server(address):
            raise ValueError(f"path: expected {scheme}://HOST/NAME, got {shown(address)}; check the address")
        if "*" in address:
            raise ShardError(
                f"{shown(address)}: expected names, got a pattern, and a web server lists nothing; write "
                "a-{000..099}.tar, or a list"
            )
        yield address
        return
    bucket, _, name = address.split("://", 1)[1].partition("/")
    if not bucket or not name:
        raise ValueError(f"path: expected {scheme}://BUCKET/NAME, got {shown(address)}; check the address")
    if not _PATTERN & set(address):
        yield address
        return
    try:
        names = cast("list[str]", _store(scheme).glob(address.split("://", 1)[1]))
    except Exception as error:  # noqa: BLE001  (as above)
        raise _no_access(address, error) from None
    yield from (f"{scheme}://{name}" for name in sorted(names))


def _has_server(address: str) -> bool:
    try:
        parts = urlsplit(address)
        return bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _web_headers(scheme: str) -> dict[str, str]:
    try:
        from fsspec.config import conf
    except ImportError:
        return {}
    settings = cast("dict[str, Any]", conf).get(scheme, {})
    return {**settings.get("headers", {}), **dict(settings.get("client_kwargs", {})).get("headers", {})}


def _store(scheme: str) -> Any:
    key = (os.getpid(), scheme)
    if key in _STORES:
        return _STORES[key]
    with _OPENING:
        if key in _STORES:
            return _STORES[key]
        try:
            import fsspec

            if scheme == "s3":
                # By name, so that a missing one is told from one that does not work.
                import s3fs  # noqa: F401  # pyright: ignore[reportUnusedImport]
            _STORES[key] = fsspec.filesystem(scheme)
        except ImportError as error:
            wanted = "interleave-data[remote]" if scheme == "s3" else "interleave-data[remote] and gcsfs"
            raise ShardError(f"{scheme}://: expected {wanted}, got no {error.name or 'gcsfs'}; install it") from error
        except Exception as error:  # noqa: BLE001  (as above)
            raise _no_access(f"{scheme}://", error) from None
        return _STORES[key]


def _no_access(address: str, error: Exception) -> ShardError:
    # The library's own words may hold a key or a signature; the kind of its error does not.
    return ShardError(
        f"{shown(address)}: expected to reach its store, got {type(error).__name__}; check the credentials in the "
        "environment, the bucket and the region or endpoint"
    )
