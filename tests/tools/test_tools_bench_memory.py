"""Memory over a stream, by Python's own count of its blocks, and that the measurement would see a leak."""

import json
import subprocess
import sys
from pathlib import Path

# In a process without the shape hook, which makes every call in it ten times as slow. Counted are the blocks that
# Python's own allocator gives out, one for each object of up to 512 bytes: exact, and unlike tracemalloc at no cost.
# Large buffers are not among them; those show in the resident bytes that tools/bench_memory.py looks at.
SCRIPT = """
import gc, json, sys
from pathlib import Path
import bench_memory

def blocks():
    gc.collect()
    return sys.getallocatedblocks()

def slope(batches):
    found, points = bench_memory.slope_per_10k(batches, blocks, every=500, skip=0.3)
    assert points[-1][0] == 5000
    return found

bench_memory.write_shards(Path(sys.argv[1]), 5000, "tar", num_shards=5)
kept = []
flat = slope(bench_memory.streamed(sys.argv[1] + "/*"))
leaking = slope(kept.append(ids) or ids for ids in bench_memory.streamed(sys.argv[1] + "/*"))
print(json.dumps([flat, leaking]))
"""


def test_memory_is_flat_over_a_stream_and_a_leak_would_be_seen(repo_root: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(repo_root / 'tools')!r}){SCRIPT}"]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, check=True)
    flat, leaking = json.loads(done.stdout)
    assert abs(flat) < 2000
    # The name of each of 10,000 samples is a block.
    assert leaking > 8000
