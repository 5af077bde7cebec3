"""Two hosts, as network namespaces of one machine; torchrun meets across them, and the wire is cut in mid-step."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path

import pytest
from ranks import PROGRAM, digests, furthest, losses, needs_deepspeed
from ranks_run import Job, run

from trainer_lite import Processes, read_metrics

# Waits and timeouts of seconds, which a machine with two busy cores does not keep.
pytestmark = pytest.mark.nightly

HOSTS = ("blip3-host0", "blip3-host1")
WIRES = ("blip3-wire0", "blip3-wire1")
ADDRESSES = ("10.77.13.1", "10.77.13.2")
PORT = 29511
STEPS, TIMEOUT_S, MOST_S = 30, 20, 300


def ip(*arguments: str) -> bool:
    return subprocess.run(["ip", *arguments], capture_output=True).returncode == 0


def clear() -> None:
    for host in HOSTS:
        ip("netns", "del", host)


@pytest.fixture
def hosts() -> Generator[None]:
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("needs root and iproute2, to make network namespaces")
    clear()
    if not (ip("netns", "add", HOSTS[0]) and ip("netns", "add", HOSTS[1])):
        clear()
        pytest.skip("this machine makes no network namespaces")
    assert ip("link", "add", WIRES[0], "netns", HOSTS[0], "type", "veth", "peer", WIRES[1], "netns", HOSTS[1])
    for host, wire, address in zip(HOSTS, WIRES, ADDRESSES, strict=True):
        assert ip("-n", host, "address", "add", f"{address}/24", "dev", wire)
        assert ip("-n", host, "link", "set", "lo", "up")
        assert ip("-n", host, "link", "set", wire, "up")
    yield
    clear()


def start(folder: Path, job: dict) -> list[tuple[subprocess.Popen[bytes], Path]]:
    started: list[tuple[subprocess.Popen[bytes], Path]] = []
    for place, (host, wire) in enumerate(zip(HOSTS, WIRES, strict=True)):
        command = ["ip", "netns", "exec", host, sys.executable, "-m", "torch.distributed.run"]
        command += ["--nnodes", "2", "--node-rank", str(place), "--nproc-per-node", "1"]
        command += ["--master-addr", ADDRESSES[0], "--master-port", str(PORT)]
        log = folder / f"host-{place}-{time.monotonic_ns()}"
        env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": wire}
        with log.open("wb") as stream:
            whole = [*command, str(PROGRAM), str(folder), json.dumps([job])]
            started.append((subprocess.Popen(whole, env=env, stdout=stream, stderr=stream), log))
    return started


def end(started: list[tuple[subprocess.Popen[bytes], Path]], seconds: float) -> list[tuple[int | None, str]]:
    deadline_s = time.monotonic() + seconds
    ended: list[tuple[int | None, str]] = []
    for process, log in started:
        try:
            status = process.wait(max(0.1, deadline_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            status = None
            process.kill()
            process.wait()
        ended.append((status, log.read_text(errors="replace")))
    return ended


def num_steps(folder: Path) -> int:
    file = folder / "cut" / "metrics.jsonl"
    return len(list(read_metrics(file))) if file.exists() else 0


@needs_deepspeed
def test_a_cut_between_hosts_is_named_and_the_run_goes_on(hosts, figures, tmp_path: Path) -> None:
    job = {"name": "cut", "engine": "zero2", "steps": STEPS, "save_every": 2, "resume": True, "timeout_s": TIMEOUT_S}
    started = start(tmp_path, {**job, "pause_s": 0.15})
    begun_s = time.monotonic()
    while num_steps(tmp_path) < 5 and time.monotonic() < begun_s + MOST_S:
        time.sleep(0.05)
    assert ip("-n", HOSTS[0], "link", "set", WIRES[0], "down")
    cut_s = time.monotonic()
    (first, words), (second, others) = end(started, MOST_S)
    ended_s = time.monotonic() - cut_s
    assert first not in (0, None)
    assert second not in (0, None)
    assert "rank 1 (" in words, words[-3000:]
    assert "no sign of life" in words
    assert "rank 1 reaches nobody" in others or "rank 0 (" in others, others[-3000:]
    done = num_steps(tmp_path)
    assert 5 <= done < STEPS
    assert ip("-n", HOSTS[0], "link", "set", WIRES[0], "up")
    end(start(tmp_path, job), MOST_S)
    run(Job(name="whole", steps=STEPS, is_saved=False), tmp_path, Processes())
    off = furthest(losses(tmp_path, "cut"), losses(tmp_path, "whole"))
    silent_s = float(words.partition("no sign of life for ")[2].partition(" s")[0])
    figures(
        hosts=2, cut_behind_step=done, timeout_s=TIMEOUT_S, named_after_s=silent_s, ended_after_s=ended_s, most_off=off
    )
    assert silent_s <= TIMEOUT_S
    assert digests(tmp_path, "cut") == digests(tmp_path, "whole")
    assert off <= 1e-6
