"""tools/kernel_report.py: a kernel is compiled for a GPU that is not there."""

import json
import os
import subprocess
import sys
from pathlib import Path

SHAPES = """
import json, sys
sys.path.insert(0, "tools")
import kernel_report as report
names = list(report.cases())
found = [(launch, arch) for arch in report.ARCHS for launch in report.launches(names, arch)]
rows = [[launch.kernel.__name__, launch.case, arch, *launch.options.values()] for launch, arch in found]
print(json.dumps(rows))
"""
"""Prints what is launched for each architecture: kernel, case, architecture, warps and, where it says so, stages."""


def compiling_environment(tmp_path: Path) -> dict[str, str]:
    """For a process of its own: in this one Triton may run its interpreter, which compiles nothing."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return env | {"TRITON_CACHE_DIR": str(tmp_path / "cache")}


def test_kept_report_is_of_the_launches_of_today_and_none_spills_without_a_reason(repo_root: Path, tmp_path: Path):
    env = compiling_environment(tmp_path)
    done = subprocess.run([sys.executable, "-c", SHAPES], cwd=repo_root, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    launches = json.loads(done.stdout)
    rows = json.loads((repo_root / "benchmarks" / "results" / "kernel_report.json").read_text())["rows"]
    names = ("kernel", "case", "arch", "num_warps", "num_stages")
    kept = [[row[name] for name in names] for row in rows]
    assert len(kept) == len(launches)
    assert all(kernel[: len(launch)] == launch for kernel, launch in zip(kept, launches, strict=True))
    assert all(row["reason"] for row in rows if row["spilled_bytes"])


def test_report_compiles_a_kernel_and_counts_its_registers(repo_root: Path, tmp_path: Path) -> None:
    env = compiling_environment(tmp_path)
    out = tmp_path / "rows.json"
    command = [sys.executable, "tools/kernel_report.py", "--arch", "90", "--only", "integers", "--json", str(out)]
    done = subprocess.run(command, cwd=repo_root, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert {row["kernel"] for row in rows} == {"_int8_kernel", "_int4_kernel"}
    assert all(row["arch"] == 90 and 16 <= row["registers"] <= 255 and row["spilled_bytes"] == 0 for row in rows)
    assert "_int8_kernel".strip("_") in done.stdout
