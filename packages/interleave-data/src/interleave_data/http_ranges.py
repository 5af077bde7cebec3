"""One stretch of bytes from a web server: ask for the range, hold what is answered against it, give up in time.

Nothing counts as data that is not exactly what was asked for: status 206, a Content-Range that says the same bytes of
an object of the known size and version, and as many bytes as that. Every wait has an end, also where a server sends a
byte now and then: each `recv` is bounded, and so is the whole answer. Connections are kept open between requests, a few
for each process; a process that was forked opens its own.
"""

import http.client
import io
import os
import re
import select
import socket
import ssl
import time
import urllib.request
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from email.message import Message
from functools import partial
from typing import Any, NamedTuple
from urllib.parse import quote, unquote, urljoin, urlsplit

from .config import RemoteLimits
from .index_file import Version
from .places import shown

_SLOWEST_BYTES_PER_S = 1 << 16
_MAX_HOPS = 5
_MAX_IDLE = 16
# No longer numbers than a size can have: Python refuses to read some that a header could hold.
_CONTENT_RANGE = re.compile(r"bytes (?:([0-9]{1,18})-([0-9]{1,18})|\*)/([0-9]{1,18}|\*)")
_AGAIN = (408, 425, 429)
"""Beside the server's own errors, of which caches in front of it have more than the standard names (520 to 527)."""


class Target(NamedTuple):
    """Where and how to ask."""

    address: str
    headers: Mapping[str, str] = {}


class Interrupted(Exception):  # noqa: N818  (says what happened)
    """An answer that was cut, slow, or an error of the server's: ask again."""


class WrongAnswer(Exception):  # noqa: N818  (says what happened)
    """An answer to another question than was asked. Asking again helps if something on the way is at fault."""


class Refusal(Exception):  # noqa: N818  (says what happened)
    """An answer that asking again does not change."""


def fetch(target: Target, start: int, stop: int, limits: RemoteLimits, deadline: float, known: Version | None) -> bytes:
    """Get the bytes from `start` up to `stop` of an object whose version is known.

    Raises:
        Interrupted, WrongAnswer, Refusal: as they say.
    """
    return _ask(target, start, stop, limits, deadline, known)[0]


def find_version(target: Target, limits: RemoteLimits, deadline: float) -> Version:
    """Ask for the first byte, and so for size, version, and whether the server serves ranges at all.

    Raises:
        Interrupted, WrongAnswer, Refusal: as they say.
    """
    return _ask(target, 0, 1, limits, deadline, None)[1]


def check_answer(
    status: int, headers: Mapping[str, str] | Message, start: int, stop: int, known: Version | None
) -> tuple[int, Version]:
    """Hold status and headers against the question; return how many bytes must follow, and the object's version.

    Raises:
        Interrupted, WrongAnswer, Refusal: as they say.
    """
    total = known.num_bytes if known else None
    length = headers.get("Content-Length")
    found = _CONTENT_RANGE.fullmatch(headers.get("Content-Range", "").strip())
    # A weak ETag differs from the strong one of the same object by its mark alone.
    tag = (headers.get("ETag") or headers.get("Last-Modified") or "").removeprefix("W/")
    if status == 416 and known is None and found is not None and found[3] == "0":
        return 0, Version(0, tag)
    if status in _AGAIN or status >= 500:
        raise Interrupted(f"status {status}")
    if status == 200:
        raise WrongAnswer("status 200 with the whole object where a range was asked for (the server serves no ranges)")
    if status != 206:
        raise Refusal(f"status {status} ({http.client.responses.get(status, 'unknown')})")
    if found is None or found[1] is None:
        raise WrongAnswer("no Content-Range that could be read")
    if found[3] == "*" and total is None:
        raise Refusal("a Content-Range without the object's size")
    version = Version(total if found[3] == "*" and total is not None else int(found[3]), tag)
    if known is not None and (version != known and not (version.num_bytes == known.num_bytes and not tag)):
        raise Refusal(
            f"another object than was indexed ({version.num_bytes} bytes, {version.tag or 'no tag'}; indexed were "
            f"{known.num_bytes} bytes, {known.tag or 'no tag'})"
        )
    if (int(found[1]), int(found[2]) + 1) != (start, stop):
        raise WrongAnswer(f"bytes {found[1]} to {found[2]}")
    if length is not None and length.strip() != str(stop - start):
        raise WrongAnswer(f"a length of {length} bytes for {stop - start}")
    if headers.get("Content-Encoding", "identity").lower() != "identity":
        raise WrongAnswer(f"bytes encoded as {headers['Content-Encoding']}")
    return stop - start, version


def _ask(
    target: Target, start: int, stop: int, limits: RemoteLimits, deadline: float, known: Version | None
) -> tuple[bytes, Version]:
    # So long an answer may take in all: one that drips is dropped, though no single wait is long.
    deadline = min(deadline, time.monotonic() + limits.stall_s + (stop - start) / _SLOWEST_BYTES_PER_S)
    connection = None
    try:
        for _ in range(_MAX_HOPS):
            connection = _pool().take(target.address, limits, deadline)
            answer = connection.ask(target, f"bytes={start}-{stop - 1}")
            if answer.status not in (301, 302, 303, 307, 308):
                break
            connection.close()
            target = _next_hop(target, answer.headers.get("Location", ""))
        else:
            raise Refusal(f"more than {_MAX_HOPS} redirections")
        num_bytes, version = check_answer(answer.status, answer.headers, start, stop, known)
        # One more than there should be: a longer answer must not pass for a whole one.
        data = answer.read(num_bytes + 1) if answer.status == 206 else b""
    except (Interrupted, WrongAnswer, Refusal):
        if connection is not None:
            connection.close()
        raise
    except (OSError, http.client.HTTPException, UnicodeError) as error:
        if connection is not None:
            connection.close()
        if isinstance(error, ssl.SSLCertVerificationError):
            raise Refusal(f"a certificate that is not to be trusted ({error.verify_message})") from None
        if isinstance(error, http.client.InvalidURL | UnicodeError):
            raise Refusal("an address that is none") from None
        # From None: what a library says of a request may hold the signed address.
        raise Interrupted(_said(error)) from None
    if len(data) != num_bytes:
        connection.close()
        raise Interrupted(f"{len(data)} bytes of {num_bytes}")
    if answer.status == 206 and not answer.will_close:
        _pool().give_back(connection)
    else:
        connection.close()
    return data, version


def _said(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "no more bytes in time"
    if isinstance(error, http.client.IncompleteRead):
        return f"an answer that was cut after {len(error.partial)} bytes"
    reason = error.strerror if isinstance(error, OSError) else None
    return f"{type(error).__name__}{f' ({reason})' if reason else ''}"


def _next_hop(target: Target, location: str) -> Target:
    try:
        address = urljoin(target.address, location)
        before, after = _place(target.address), _place(address)
    except ValueError:
        raise Refusal("a redirection to an address that is none") from None
    if not location or after[0] not in ("http", "https") or (before[0], after[0]) == ("https", "http"):
        raise Refusal(f"a redirection to {shown(address) if location else 'nowhere'}, which is not followed")
    # What lets us in here is not for another host.
    return Target(address, target.headers if before == after else {})


def _place(address: str) -> tuple[str, str | None, int | None]:
    """Scheme, host and port."""
    parts = urlsplit(address)
    return parts.scheme, parts.hostname, parts.port


@dataclass
class _Clock:
    """The time until which the answer that is being read must be there."""

    stall_s: float
    deadline: float

    def left_s(self, longest_s: float) -> float:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return min(left, longest_s)


class _TimedFile(io.RawIOBase):
    """The receiving end of a socket, each of whose reads ends in time."""

    def __init__(self, sock: socket.socket, clock: _Clock) -> None:
        self._socket, self._clock = sock, clock
        self._file = sock.makefile("rb", buffering=0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int | None:
        self._socket.settimeout(self._clock.left_s(self._clock.stall_s))
        return self._file.readinto(buffer)

    def close(self) -> None:
        self._file.close()
        super().close()


class _Answer(http.client.HTTPResponse):
    """An answer that is read against the clock, its head too."""

    def __init__(self, sock: socket.socket, *args: object, clock: _Clock, **more: object) -> None:
        super().__init__(sock, *args, **more)  # pyright: ignore[reportArgumentType]
        self.fp.close()
        self.fp = io.BufferedReader(_TimedFile(sock, clock), 1 << 16)


class _Connection:
    """One connection to one server, or to a proxy that leads there."""

    def __init__(self, address: str, limits: RemoteLimits, deadline: float) -> None:
        parts = urlsplit(address)
        self.server = _server(address)
        self._clock = _Clock(limits.stall_s, deadline)
        host, port = parts.hostname or "", parts.port
        is_tls = parts.scheme == "https"
        proxy = urllib.request.getproxies_environment().get(parts.scheme)
        if proxy and urllib.request.proxy_bypass(host):
            proxy = None
        self._is_relayed = bool(proxy) and not is_tls
        kind = partial(http.client.HTTPSConnection, context=_pool().tls()) if is_tls else http.client.HTTPConnection
        via = urlsplit(proxy if "://" in proxy else f"http://{proxy}") if proxy else None
        self._proxy_headers = _login(via.username, via.password, "Proxy-Authorization") if via else {}
        timeout = self._clock.left_s(limits.connect_s)
        if via:
            self._http = kind(via.hostname or "", via.port or 80, timeout=timeout)
            if is_tls:
                self._http.set_tunnel(host, port, self._proxy_headers)
        else:
            self._http = kind(host, port, timeout=timeout)
        self._http.response_class = partial(_Answer, clock=self._clock)  # pyright: ignore[reportAttributeAccessIssue]

    def is_usable(self, limits: RemoteLimits, deadline: float) -> bool:
        """Whether the other end has not closed it meanwhile; if so it has a new deadline."""
        self._clock.stall_s, self._clock.deadline = limits.stall_s, deadline
        if self._http.sock is None:
            return False
        waiting = select.poll()
        waiting.register(self._http.sock, select.POLLIN)
        # Nothing is being waited for: whatever can be read is the end of it.
        return not waiting.poll(0)

    def ask(self, target: Target, byte_range: str) -> http.client.HTTPResponse:
        parts = urlsplit(target.address)
        # Quoted before, or not: what may not stand in a request is quoted, what is stays as it is.
        query = quote(parts.query, safe="/%:@!$&'()*+,;=~?")
        path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~") + (f"?{query}" if query else "")
        headers = {
            **target.headers,
            **_login(parts.username, parts.password, "Authorization"),
            "Range": byte_range,
            "Accept-Encoding": "identity",
        }
        if self._is_relayed:
            headers |= self._proxy_headers
            path = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{path}"
        if self._http.sock is not None:
            self._http.sock.settimeout(self._clock.left_s(self._clock.stall_s))
        self._http.request("GET", path, headers=headers)
        return self._http.getresponse()

    def close(self) -> None:
        self._http.close()


def _server(address: str) -> tuple[str, str]:
    parts = urlsplit(address)
    return parts.scheme, parts.netloc.rpartition("@")[2]


def _login(user: str | None, password: str | None, header: str) -> dict[str, str]:
    if user is None:
        return {}
    encoded = b64encode(f"{unquote(user)}:{unquote(password or '')}".encode()).decode()
    return {header: f"Basic {encoded}"}


class _Pool:
    """Connections of this process that wait to be used again."""

    def __init__(self) -> None:
        self._idle: list[_Connection] = []
        self._tls: ssl.SSLContext | None = None

    def tls(self) -> ssl.SSLContext:
        self._tls = self._tls or ssl.create_default_context()
        return self._tls

    def take(self, address: str, limits: RemoteLimits, deadline: float) -> _Connection:
        server = _server(address)
        for connection in reversed(self._idle):
            if connection.server == server:
                try:
                    self._idle.remove(connection)
                except ValueError:
                    # Another thread was first.
                    continue
                if connection.is_usable(limits, deadline):
                    return connection
                connection.close()
        return _Connection(address, limits, deadline)

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()

    def give_back(self, connection: _Connection) -> None:
        self._idle.append(connection)
        if len(self._idle) > _MAX_IDLE:
            self._idle.pop(0).close()


_POOLS: dict[int, _Pool] = {}


def _pool() -> _Pool:
    """This process's own: two that share a socket would read each other's answers."""
    number = os.getpid()
    if number not in _POOLS:
        for inherited in list(_POOLS.values()):
            inherited.close()
        _POOLS.clear()
    return _POOLS.setdefault(number, _Pool())
