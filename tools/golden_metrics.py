"""Write the golden files of vlm-metrics' tests: inputs of our making, scored by the benchmarks' own code.

    uv pip install --no-deps --target FOLDER lmms-eval==0.7.3 ms-vlmeval==0.0.20 pycocoevalcap==1.2 \\
        open-flamingo==2.0.1 llava-torch==1.2.2.post1 salesforce-lavis==1.0.2
    uv run tools/golden_metrics.py FOLDER               # all files, tests/vlm_metrics/golden/*.json
    uv run tools/golden_metrics.py FOLDER --only cider  # one of them; cider, ptb, faults need java

Nothing of these packages is imported, as that would pull in models and their dependencies: the functions are taken out
of their files and run here. Inputs come from a fixed seed. Each file names the package, its version and the function.
"""

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path

from golden_answers import anls, evalai, grounding, relaxed, vqa
from golden_captions import cider, ptb
from golden_choices import choices, circular, mmmu
from golden_faults import faults
from golden_official import Golden, Packages
from golden_yes_no import hallusion, mme, pope, reading

SEED = 7
OUT = Path(__file__).resolve().parents[1] / "tests" / "vlm_metrics" / "golden"


FILES: dict[str, Callable[[Packages, random.Random], Golden]] = {
    function.__name__: function
    for function in (
        vqa, evalai, anls, relaxed, ptb, cider, choices, mmmu, pope, reading, mme, hallusion, circular, grounding,
        faults,
    )
}  # fmt: skip


def lines(golden: Golden) -> str:
    """JSON with one case a line, so that a change shows as the lines it changes."""
    parts: list[str] = []
    for key, value in golden.items():
        text = json.dumps(value, ensure_ascii=False)
        if isinstance(value, list) and len(text) > 200:
            text = (
                "[\n" + ",\n".join(json.dumps(row, ensure_ascii=False, separators=(",", ":")) for row in value) + "\n]"
            )
        parts.append(f"{json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> None:
    """Write the files."""
    assert __doc__
    parser = argparse.ArgumentParser(
        prog="golden_metrics", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the packages were installed")
    parser.add_argument("--only", choices=sorted(FILES), help="write this file alone")
    args = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    for name, function in FILES.items():
        if args.only in (None, name):
            text = lines(function(Packages(args.folder), random.Random(SEED)))
            (OUT / f"{name}.json").write_text(text, encoding="utf-8")
            print(f"{name}: {len(text)} characters")


if __name__ == "__main__":
    main()
