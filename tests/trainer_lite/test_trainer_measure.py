"""What a run costs."""

import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import torch
from trainer_lite import keep_freed_memory

if sys.argv[1] == "kept":
    assert keep_freed_memory()
for round in range(40):
    if round == 24:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(9 << 20) for _ in range(2)]
    del tensors
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator only")
def test_tensors_made_anew_touch_no_new_pages_where_freed_memory_is_kept() -> None:
    faults = {}
    for mode in ("kept", "given back"):
        done = subprocess.run([sys.executable, "-c", FAULTS, mode], capture_output=True, text=True, check=True)
        faults[mode] = int(done.stdout)
    # Sixteen times two tensors of 36 MiB, 9,216 pages each: beyond 32 MiB glibc alone always hands them back. Small
    # things that lie between let the heap grow by a tensor now and then in the first ten rounds, then it is large
    # enough; a kernel that reclaims idle memory takes some pages at any time.
    assert faults["given back"] >= 32 * 9216
    assert faults["kept"] <= faults["given back"] / 4
