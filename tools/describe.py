"""Print what a checkpoint or a preset holds: the tree of modules with parameters, dtype and memory.

    uv run tools/describe.py DIR                         # a checkpoint of ours, or a folder of published weights
    uv run tools/describe.py DIR --preset xgen-mm-v1.5   # and what would be missing or unexpected in such a release
    uv run tools/describe.py --preset xgen-mm-v1.5       # a full-size release; nothing is allocated
    uv run tools/describe.py --preset xgen-mm-v1.5 --json  # every tensor that our export of it would hold

A checkpoint of ours is compared with its own config without being asked. Only the headers of files are read.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from blip3_lite import CheckpointError
from blip3_lite.checkpoint import read_config
from blip3_lite.model import undrawn_model
from blip3_lite.presets import XgenKind, xgen_mm_config
from blip3_lite.xgen_mm import PUBLISHED_DTYPE, recipes, xgen_mm_tensors
from weight_files import Differences, SafetensorsFiles, TensorInfo, WeightsError, compare_tensors, same_names
from weight_files import unique_tensors as own_tensors

PRESETS: dict[str, XgenKind] = {
    "xgen-mm-v1.5": "singleimg",
    "xgen-mm-v1.5-base": "base",
    "xgen-mm-v1.5-singleimg": "singleimg",
    "xgen-mm-v1.5-interleave": "interleave",
    "xgen-mm-v1.5-dpo": "dpo",
}


@dataclass
class Node:
    """A module: the tensors directly in it, and the modules below."""

    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    below: dict[str, "Node"] = field(default_factory=dict)

    def all_tensors(self) -> list[TensorInfo]:
        """Its own and those of everything below."""
        return [*self.tensors.values(), *(info for node in self.below.values() for info in node.all_tensors())]

    def shape(self) -> tuple[object, ...]:
        """Equal for modules that look alike."""
        return tuple(self.tensors.items()), tuple((name, node.shape()) for name, node in self.below.items())


def tree(tensors: Mapping[str, TensorInfo]) -> Node:
    """Arrange tensors by the dots in their names; the last part is the tensor's own name and makes no node."""
    root = Node()
    for name, info in tensors.items():
        *parts, own = name.split(".")
        node = root
        for part in parts:
            node = node.below.setdefault(part, Node())
        node.tensors[own] = info
    return root


def render(node: Node, name: str = "all", depth: int = 0, max_depth: int = 3) -> list[str]:
    """Lines of a node and of those below; neighbours that are numbered and look alike share one."""
    infos = node.all_tensors()
    numbers = sum(torch.Size(info.shape).numel() for info in infos)
    size_bytes = sum(torch.Size(info.shape).numel() * info.dtype.itemsize for info in infos)
    dtypes = "/".join(sorted({str(info.dtype).removeprefix("torch.") for info in infos}))
    lines = [f"{'  ' * depth + name:<44}{numbers:>16,}  {dtypes:<9}{size_bytes / 2**20:>12,.2f} MiB"]
    if depth < max_depth:
        for first, last, child in alike(node.below):
            label = first if first == last else f"{first} … {last}, each"
            lines += render(child, label, depth + 1, max_depth)
    return lines


def alike(nodes: Mapping[str, Node]) -> list[tuple[str, str, Node]]:
    """(first name, last name, node) of runs of numbered nodes that look alike; others are runs of one."""
    runs: list[tuple[str, str, Node]] = []
    for name, node in nodes.items():
        if runs and name.isdecimal() and runs[-1][1].isdecimal() and runs[-1][2].shape() == node.shape():
            runs[-1] = (runs[-1][0], name, runs[-1][2])
        else:
            runs.append((name, name, node))
    return runs


def release_tensors(kind: XgenKind) -> dict[str, TensorInfo]:
    """Every tensor of an export, in its order."""
    saved = xgen_mm_tensors(undrawn_model(xgen_mm_config(kind)), PUBLISHED_DTYPE[kind])
    return {tensor.name: TensorInfo(tensor.shape, tensor.dtype) for tensor in saved}


def differences(source: SafetensorsFiles, path: Path, kind: XgenKind | None) -> Differences | None:
    """What a load would complain of; None where nobody said which model it should be."""
    if kind is not None:
        cfg = xgen_mm_config(kind)
        targets = own_tensors(undrawn_model(cfg))
        return compare_tensors(source, targets, recipes(cfg, list(targets)))
    try:
        model = undrawn_model(read_config(path).model)
    except CheckpointError:
        return None
    return compare_tensors(source, own_tensors(model), same_names(model))


def show(tensors: Mapping[str, TensorInfo], is_json: bool, max_depth: int) -> None:
    """Print the tree, or each tensor as JSON."""
    if is_json:
        rows = [
            {"name": name, "shape": list(info.shape), "dtype": str(info.dtype).removeprefix("torch.")}
            for name, info in tensors.items()
        ]
        print(json.dumps(rows, indent=1))
        return
    print(f"{'module':<44}{'parameters':>16}  {'dtype':<9}{'memory':>16}")
    print("\n".join(render(tree(tensors), max_depth=max_depth)))
    print(f"{len(tensors)} tensors")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0, 1 where tensors differ, 2 where nothing can be read."""
    parser = argparse.ArgumentParser(prog="describe", description="What does a checkpoint or a preset hold?")
    parser.add_argument("folder", type=Path, nargs="?", help="a checkpoint's folder, or one safetensors file")
    parser.add_argument("--preset", choices=PRESETS, help="a published model, alone or to compare the folder with")
    parser.add_argument("--json", action="store_true", help="every tensor's name, shape and dtype")
    parser.add_argument("--depth", type=int, default=3, help="levels of modules to show")
    args = parser.parse_args(arguments)
    kind = None if args.preset is None else PRESETS[args.preset]
    if args.folder is None:
        if kind is None:
            parser.error("expected a folder, a --preset, or both, got neither")
        show(release_tensors(kind), args.json, args.depth)
        return 0
    try:
        with SafetensorsFiles(args.folder) as source:
            show(source.tensors, args.json, args.depth)
            found = differences(source, args.folder, kind)
    except WeightsError as error:
        print(f"describe: {error}", file=sys.stderr)
        return 2
    if found is not None:
        print(found if found else "the tensors are exactly those of the model", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
