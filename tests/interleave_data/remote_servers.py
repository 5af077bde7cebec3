"""Servers for shards on loopback: a real nginx, an S3 server (moto), and a proxy in front of either that does harm."""

import http.client
import os
import re
import shutil
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import pytest

NGINX = """
daemon off; {user} worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{ worker_connections 64; }}
http {{
    access_log off; keepalive_timeout 20;
    client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder};
    uwsgi_temp_path {folder}; scgi_temp_path {folder};
    server {{
        listen 127.0.0.1:{port}; root {root}; {tls}
        location /closed/ {{ alias {root}/; auth_basic "shards"; auth_basic_user_file {folder}/users; }}
        location /whole/ {{ alias {root}/; max_ranges 0; }}
        location /moved/ {{ rewrite ^/moved/(.*)$ /$1 redirect; }}
    }}
}}
"""


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until the server takes connections."""
    end = time.monotonic() + 30
    while process.poll() is None and time.monotonic() < end:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    process.kill()
    raise RuntimeError(f"{process.args}: expected a server, got {log.read_text()[-2000:]}")


class Nginx(NamedTuple):
    """Where it listens."""

    port: int
    tls_port: int | None
    """None if there is nothing here to make a certificate with."""
    certificate: Path


@contextmanager
def nginx(root: Path, folder: Path) -> Iterator[Nginx]:
    """Serve a folder, with and without TLS.

    `/closed/` asks for "me" and "secret", `/whole/` knows no ranges, `/moved/` redirects.
    """
    program = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")
    if program is None:
        pytest.skip("no nginx: expected the program, got none; install it (Debian: nginx-light)")
    port, tls_port, tls = free_port(), free_port(), ""
    certificate, key = folder / "cert.pem", folder / "key.pem"
    if openssl := shutil.which("openssl"):
        new = f"req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -keyout {key} -out {certificate}"
        named = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
        subprocess.run([openssl, *new.split(), *named], check=True, capture_output=True)
        tls = f"listen 127.0.0.1:{tls_port} ssl; ssl_certificate {certificate}; ssl_certificate_key {key};"
    (folder / "users").write_text("me:{PLAIN}secret\n")
    # A worker of a server that root starts would be nobody, who may not look into the folders of a test.
    user = "user root;" if os.geteuid() == 0 else ""
    (folder / "nginx.conf").write_text(NGINX.format(folder=folder, root=root, port=port, user=user, tls=tls))
    log = folder / "start.log"
    command = [program, "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", str(folder / "error.log")]
    with open(log, "wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            wait_for(port, process, log)
            yield Nginx(port, tls_port if tls else None, certificate)
        finally:
            process.terminate()


@contextmanager
def s3(root: Path, folder: Path) -> Iterator[int]:
    """Serve the files of a folder as s3://shards/deep/NAME; the port."""
    pytest.importorskip("moto")
    pytest.importorskip("s3fs")
    port = free_port()
    log = folder / "s3.log"
    command = [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with open(log, "wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            wait_for(port, process, log)
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            login = "AWS4-HMAC-SHA256 Credential=me/20260101/us-east-1/s3/aws4_request"
            names = {"/shards": b""} | {f"/shards/deep/{path.name}": path.read_bytes() for path in root.iterdir()}
            for name, data in names.items():
                connection.request("PUT", name, data, {"Authorization": login})
                answer = connection.getresponse()
                assert answer.status == 200, answer.read()
                answer.read()
            connection.close()
            yield port
        finally:
            process.terminate()


@dataclass
class Harm:
    """What the proxy does to the answers to requests for a range."""

    of: Callable[[str, str], str] = lambda path, asked: ""
    """(path, range) → one of the kinds below, or nothing. The proxy calls it for one request at a time."""
    stall_s: float = 1.0
    paths: list[str] = field(default_factory=list)
    """Of each request of any kind."""
    requests: list[tuple[str, str]] = field(default_factory=list)
    """(path, range) of each."""
    done: list[str] = field(default_factory=list)
    """What was done, in order."""
    lock: threading.Lock = field(default_factory=threading.Lock)


class HarmfulProxy(socketserver.ThreadingTCPServer):
    """Hands requests on to a server, and answers back with what `Harm` says done to them."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 64

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream, self.harm = port, Harm()
        self.port = self.server_address[1]


@contextmanager
def proxy(port: int) -> Iterator[HarmfulProxy]:
    """A proxy in front of a port of loopback."""
    with HarmfulProxy(port) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class _Handler(socketserver.StreamRequestHandler):
    server: HarmfulProxy

    def handle(self) -> None:
        try:
            while self._answer():
                pass
        except OSError:
            # The client has had enough.
            pass

    def _answer(self) -> bool:
        """Answer one request; whether the connection stays open."""
        line = self.rfile.readline().decode()
        if not line:
            return False
        method, path, _ = line.split()
        headers = dict(
            re.split(r":\s*", one.decode().strip(), maxsplit=1) for one in iter(self.rfile.readline, b"\r\n")
        )
        asked = headers.get("Range", "")
        # The whole address where we are somebody's proxy; S3's has a signature behind it.
        path = re.sub(r"^http://[^/]*", "", path)
        name = path.partition("?")[0]
        harm, kind = self.server.harm, ""
        harm.paths.append(name)
        if asked:
            with harm.lock:
                harm.requests.append((name, asked))
                kind = harm.of(name, asked)
                if kind:
                    harm.done.append(kind)
        if kind == "drop":
            return False
        if kind == "stall":
            time.sleep(harm.stall_s)
            return False
        if kind == "busy":
            return self._send(503, {}, b"not now")
        if kind in ("shift", "lie"):
            first, last = (int(number) for number in asked.removeprefix("bytes=").split("-"))
            headers["Range"] = f"bytes={first + 1}-{last + 1}" if first == 0 else f"bytes={first - 1}-{last - 1}"
        if kind == "whole":
            del headers["Range"]
        status, found, body = self._upstream(method, path, headers)
        if kind == "lie":
            found["Content-Range"] = re.sub(r"\d+-\d+", asked.removeprefix("bytes="), found["Content-Range"])
        if kind == "short":
            body = body[:-1]
        if kind == "long":
            body += b"\0"
        if kind == "other":
            found["ETag"] = '"another"'
        return self._send(status, found, body, kind)

    def _upstream(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.upstream, timeout=10)
        try:
            connection.request(method, path, headers={k: v for k, v in headers.items() if k != "Connection"})
            answer = connection.getresponse()
            kept = ("ETag", "Last-Modified", "Content-Range", "Content-Type", "Location")
            return answer.status, {name: answer.headers[name] for name in kept if name in answer.headers}, answer.read()
        finally:
            connection.close()

    def _send(self, status: int, headers: dict[str, str], body: bytes, kind: str = "") -> bool:
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        answer = f"HTTP/1.1 {status} X\r\n{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        if kind == "cut":
            self.wfile.write(answer[: len(answer) - (len(body) + 1) // 2])
            return False
        if kind == "drip":
            # Never silent for long, and never done.
            for byte in answer[:100]:
                self.wfile.write(bytes([byte]))
                time.sleep(self.server.harm.stall_s / 20)
            return False
        self.wfile.write(answer)
        return True


def once(*kinds: str) -> Callable[[str, str], str]:
    """Harm the first request for each range, in turn by each of the kinds; the second gets through."""
    seen: set[tuple[str, str]] = set()

    def of(path: str, asked: str) -> str:
        if (path, asked) in seen:
            return ""
        seen.add((path, asked))
        return kinds[(len(seen) - 1) % len(kinds)]

    return of
