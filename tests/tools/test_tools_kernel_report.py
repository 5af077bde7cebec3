"""tools/kernel_report.py: a kernel is compiled for a GPU that is not there."""

import json
import os
import subprocess
import sys
from pathlib import Path


def test_report_compiles_a_kernel_and_counts_its_registers(repo_root: Path, tmp_path: Path) -> None:
    # In a process of its own: in this one Triton may run its interpreter, which compiles nothing.
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    out = tmp_path / "rows.json"
    command = [sys.executable, "tools/kernel_report.py", "--arch", "90", "--only", "integers", "--json", str(out)]
    done = subprocess.run(command, cwd=repo_root, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert {row["kernel"] for row in rows} == {"_int8_kernel", "_int4_kernel"}
    assert all(row["arch"] == 90 and 16 <= row["registers"] <= 255 and row["spilled_bytes"] == 0 for row in rows)
    assert "_int8_kernel".strip("_") in done.stdout
