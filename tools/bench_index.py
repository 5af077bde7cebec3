"""How long a source takes to open, and how much memory, by the number of its indexed samples.

    uv run tools/bench_index.py [--most 1000000] [--kind json]

Writes tiny synthetic samples in ten shards, indexes them, and then opens them in a fresh process of its own for each
size: the time of opening alone, of the first sample at random, and the memory that both added.
"""

import argparse
import io
import json
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from interleave_data.containers import write_index

NUM_SHARDS = 10
OPEN = """
import glob, json, resource, sys, time
from interleave_data import SourceConfig, open_source
cfg = SourceConfig(name="bench", format="text", path=sys.argv[1] + "/warm.*")
open_source(cfg)[0]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
source = open_source(SourceConfig(name="bench", format="text", path=sys.argv[1] + "/0*"))
opened = time.perf_counter()
source[len(source) * 2 // 3]
first = time.perf_counter()
added = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(json.dumps([len(source), 1e3 * (opened - start), 1e3 * (first - opened), added / 1024]))
"""


def write_shard(path: Path, num_samples: int) -> None:
    """Write samples of a few words, as JSON lines or as .json members."""
    records = (json.dumps({"text": f"sample {number}"}).encode() for number in range(num_samples))
    if path.suffix == ".jsonl":
        path.write_bytes(b"\n".join(records) + b"\n")
        return
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, record in enumerate(records):
            info = tarfile.TarInfo(f"{number:09}.json")
            info.size = len(record)
            tar.addfile(info, io.BytesIO(record))
            tar.members = []  # pyright: ignore[reportAttributeAccessIssue]  (absent from the stubs only)


def processor_name() -> str:
    """What the machine's processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def main() -> None:
    """Measure each power of ten and print a table."""
    parser = argparse.ArgumentParser(prog="bench_index", description="How long a source takes to open.")
    parser.add_argument("--most", type=int, default=10**6, help="the largest number of samples, from 1000 by tens")
    parser.add_argument("--kind", choices=["json", "tar"], default="json")
    args = parser.parse_args()
    suffix = {"json": ".jsonl", "tar": ".tar"}[args.kind]
    print("   samples  index s  open ms  first ms  added MB")
    num_samples = 1000
    while num_samples <= args.most:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            shards = [folder / f"{shard:03}{suffix}" for shard in range(NUM_SHARDS)]
            for shard in [folder / f"warm{suffix}", *shards]:
                write_shard(shard, num_samples // NUM_SHARDS if shard in shards else 1)
            start = time.perf_counter()
            for shard in [folder / f"warm{suffix}", *shards]:
                write_index(os.fspath(shard))
            indexed_s = time.perf_counter() - start
            done = subprocess.run([sys.executable, "-c", OPEN, name], capture_output=True, text=True, check=True)
            found, open_ms, first_ms, added_mb = json.loads(done.stdout)
            print(f"{found:10,} {indexed_s:8.2f} {open_ms:8.2f} {first_ms:9.2f} {added_mb:9.1f}", flush=True)
        num_samples *= 10


if __name__ == "__main__":
    main()
