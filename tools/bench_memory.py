"""Does memory stay flat over a long stream? Resident bytes of one process, by the samples that it has streamed.

    uv run tools/bench_memory.py [--samples 200000] [--kind tar] [--out memory.json]

Writes tiny synthetic samples in shards, indexes them, and streams them once through source, order, plan and packing in
this process. The slope is that of a straight line through the resident bytes at every 2,000 samples from the first
tenth on, when everything that is kept is there. Above 1 MB per 10,000 samples the exit status is 1.

Then 40,000 samples are streamed again while 200 bytes of each are kept, which must show as a slope of about 2.4 MB: a
gauge that does not move would call everything flat.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench_index import processor_name, write_shard
from interleave_data import Encoder, PlanConfig, Size, SourceConfig, Stream, open_source
from interleave_data.containers import write_index
from interleave_data.samples import TextPart

MOST_BYTES = 1_000_000
"""Per 10,000 samples."""
_EVERY = 2_000
_CONTROL_SAMPLES = 40_000
_LEAKED_BYTES = 200


@dataclass(frozen=True)
class Text:
    """A sample as its bytes."""

    data: bytes

    @property
    def length(self) -> int:
        """A byte is a token."""
        return len(self.data)


class TextEncoder(Encoder[Text, int]):
    """Bytes of the text; a batch is their number, so that whatever grows is the stream's."""

    def measure(self, sample: Any, limit: Size | None = None, /) -> Size:
        """Bytes."""
        return Size(self.encode(sample).length, 0)

    def encode(self, sample: Any, limit: Size | None = None, /) -> Text:
        """Bytes."""
        parts = [part.text for turn in sample.turns for part in turn.parts if isinstance(part, TextPart)]
        return Text("".join(parts).encode())

    def collate(self, items: Sequence[Text], ids: Sequence[str], /) -> int:
        """Their number."""
        return sum(item.length for item in items)


def streamed(pattern: str, max_tokens: int = 512) -> Iterator[Sequence[str]]:
    """Names of the samples of each batch, over one epoch."""
    source = open_source(SourceConfig(name="tiny", format="text", path=pattern))
    cfg = PlanConfig(max_tokens=max_tokens, epochs=(1,))
    with Stream([source], TextEncoder(), cfg) as stream:
        for batch in stream:
            yield batch.ids


def slope_per_10k(
    batches: Iterator[Sequence[str]], num_bytes: Callable[[], int], every: int = _EVERY, skip: float = 0.1
) -> tuple[float, list[tuple[int, int]]]:
    """Bytes per 10,000 samples by least squares, without the first share `skip`; and (samples, bytes) as found."""
    found: list[tuple[int, int]] = []
    done = 0
    for ids in batches:
        done += len(ids)
        if done // every > len(found):
            found.append((done, num_bytes()))
    kept = [point for point in found if point[0] >= skip * done]
    samples, sizes = np.array(kept, dtype=np.float64).T
    return float(np.polyfit(samples, sizes, 1)[0] * 10_000), found


def leaking(batches: Iterator[Sequence[str]]) -> Iterator[Sequence[str]]:
    """The first batches, keeping some bytes for each sample."""
    kept: list[bytes] = []
    for ids in batches:
        kept.extend(bytes(_LEAKED_BYTES) for _ in ids)
        yield ids
        if len(kept) >= _CONTROL_SAMPLES:
            return


def resident_bytes() -> int:
    """Resident set of this process now (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def write_shards(folder: Path, num_samples: int, kind: str, num_shards: int = 20) -> None:
    """Tiny samples, indexed."""
    for shard in range(num_shards):
        path = folder / f"{shard:03}{'.jsonl' if kind == 'json' else '.tar'}"
        write_shard(path, num_samples // num_shards)
        write_index(os.fspath(path))


def main() -> None:
    """Stream and print the slope."""
    parser = argparse.ArgumentParser(prog="bench_memory", description="Memory over a long stream.")
    parser.add_argument("--samples", type=int, default=200_000, help="at least 40,000")
    parser.add_argument("--kind", choices=["json", "tar"], default="tar")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    args = parser.parse_args()
    if args.samples < 40_000:
        parser.error(f"--samples: expected at least 40000, got {args.samples}; a slope needs some points")
    with tempfile.TemporaryDirectory() as name:
        write_shards(Path(name), args.samples, args.kind)
        start = time.perf_counter()
        slope, found = slope_per_10k(streamed(f"{name}/*"), resident_bytes)
        seconds = time.perf_counter() - start
        control, _ = slope_per_10k(leaking(streamed(f"{name}/*")), resident_bytes)
    print(f"{found[-1][0]:,} samples in {seconds:.0f} s: {slope / 1e6:+.3f} MB per 10,000 samples")
    print(f"with {_LEAKED_BYTES} bytes a sample kept on purpose: {control / 1e6:+.3f} MB per 10,000 samples")
    if args.out is not None:
        result = {
            "machine": {"processor": processor_name(), "cores": os.cpu_count(), "load_average": os.getloadavg()},
            "kind": args.kind,
            "seconds": seconds,
            "bytes_per_10k": slope,
            "bytes_per_10k_with_a_leak": control,
            "samples_and_bytes": found,
        }
        args.out.write_text(json.dumps(result) + "\n")
    if control < MOST_BYTES:
        sys.exit(f"memory: expected the leak to show as above {MOST_BYTES} bytes, got {control:.0f}; mind the gauge")
    if slope > MOST_BYTES:
        sys.exit(f"memory: expected at most {MOST_BYTES} bytes per 10,000 samples, got {slope:.0f}")


if __name__ == "__main__":
    main()
