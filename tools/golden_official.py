"""Functions of the benchmarks' own code, taken out of installed packages without importing these."""

import ast
import math
import os
import random
import re
import string
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

Golden = dict[str, Any]


class Packages:
    """A folder of installed packages whose functions can be taken out one by one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def take(self, path: str, *names: str, edit: tuple[str, str] | None = None, **given: object) -> SimpleNamespace:
        """Run the named functions, classes and constants of a file, with `given` as what the file would have imported.

        Decorators are left out. `edit` replaces a text of the file that stands in it exactly once.
        """
        source = (self.folder / path).read_text()
        if edit is not None:
            if source.count(edit[0]) != 1:
                raise ValueError(
                    f"{path}: expected {edit[0]!r} once, got {source.count(edit[0])}; install the pinned version"
                )
            source = source.replace(*edit)
        kept: list[ast.stmt] = []
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in names:
                node.decorator_list = []
                kept.append(node)
            elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in names:
                kept.append(node)
        if len(kept) != len(names):
            raise ValueError(f"{path}: expected {names}, got {len(kept)} of them; install the pinned version")
        space: dict[str, Any] = {
            "re": re,
            "np": np,
            "math": math,
            "string": string,
            "random": random,
            "os": os,
            **given,
        }
        exec(compile(ast.Module(kept, []), path, "exec"), space)
        return SimpleNamespace(**space)

    def source(self, distribution: str, function: str) -> str:
        """Name a function with the version of its distribution."""
        found = list(self.folder.glob(f"{distribution.replace('-', '_')}-*.dist-info"))
        if not found:
            raise ValueError(f"{self.folder}: expected {distribution}, got no such package; install the pinned version")
        return f"{distribution} {found[0].name.split('-')[1].removesuffix('.dist')}, {function}"
