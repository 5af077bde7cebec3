"""Load a source into a model of another layout: strictly, and one tensor at a time.

A recipe says of what rows a tensor of the model is made: `[Piece("q"), Piece("k"), Piece("v")]` lays three matrices on
top of each other. All names and shapes are compared before anything is written, so a load happens wholly or not at all,
and what is in memory at any time is the model and one tensor of the source.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from .errors import WeightsError
from .source import TensorSource

_NUM_LISTED = 40


@dataclass(frozen=True)
class Piece:
    """Some rows of a source's tensor, as they come or transformed."""

    name: str
    """In the source."""
    rows: tuple[int, int] | None = None
    """[start, end) along the first axis; None for all."""
    transform: Callable[[Tensor], Tensor] | None = None
    """What to do with them; also called with a meta tensor, to learn the shape."""


Recipe = Sequence[Piece]
"""Pieces that are laid end to end along the first axis."""


@runtime_checkable
class Target(Protocol):
    """What a load writes into, where it is not a plain tensor (a quantised matrix)."""

    @property
    def shape(self) -> Sequence[int]:
        """Shape that the pieces must add up to."""
        ...

    def write(self, start: int, rows: Tensor) -> None:
        """Take rows [start, start + len(rows))."""
        ...


@dataclass(frozen=True)
class _TensorTarget:
    tensor: Tensor

    @property
    def shape(self) -> Sequence[int]:
        return self.tensor.shape

    @torch.no_grad()
    def write(self, start: int, rows: Tensor) -> None:
        if self.tensor.ndim == 0:
            self.tensor.copy_(rows)
        else:
            self.tensor[start : start + len(rows)].copy_(rows)


def same_names(module: nn.Module, prefix: str = "") -> dict[str, Recipe]:
    """Recipes for a source whose tensors have the model's own names, with `prefix` in front."""
    return {name: [Piece(prefix + name)] for name in unique_tensors(module)}


def unique_tensors(module: nn.Module) -> dict[str, Tensor]:
    """State by name; a tensor that goes by two names (a tied head) only once, by its first."""
    seen: set[int] = set()
    unique: dict[str, Tensor] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            unique[name] = tensor
    return unique


@dataclass(frozen=True)
class Differences:
    """How the tensors of a source and of a model differ, by names; all empty where a load would succeed."""

    where: str
    """The source."""
    missing: tuple[str, ...]
    """Source tensors that the model needs."""
    unexpected: tuple[str, ...]
    """Source tensors that nothing needs."""
    misshaped: tuple[str, ...]
    """In words: what was expected of which, and what is there."""
    left: tuple[str, ...]
    """Target tensors that are missing and allowed to be."""

    def __bool__(self) -> bool:
        """Whether there is any that matters."""
        return bool(self.missing or self.unexpected or self.misshaped)

    def __str__(self) -> str:
        lines = [f"weights {self.where}: the tensors are not those of the model"]
        for what, names in (
            ("missing", self.missing), ("unexpected", self.unexpected), ("misshaped", self.misshaped),
        ):  # fmt: skip
            if names:
                more = f" and {len(names) - _NUM_LISTED} more" if len(names) > _NUM_LISTED else ""
                lines.append(f"  {what} ({len(names)}): {'; '.join(sorted(names)[:_NUM_LISTED])}{more}")
        return "\n".join(lines)


def compare_tensors(
    source: TensorSource,
    targets: Mapping[str, Tensor | Target],
    recipes: Mapping[str, Recipe],
    *,
    ignored: Sequence[str] = (),
    allow_missing: Sequence[str] = (),
) -> Differences:
    """Compare names and shapes as `load_tensors` does, and load nothing; arguments as there."""
    held = source.tensors
    missing, misshaped, left = list[str](), list[str](), list[str]()
    for name, target in targets.items():
        recipe = recipes.get(name)
        absent = [piece.name for piece in recipe or () if piece.name not in held]
        if recipe is None or absent:
            if any(fnmatchcase(name, pattern) for pattern in allow_missing):
                left.append(name)
            else:
                missing += absent or [f"(nothing for {name})"]
        elif (shape := _shape_of(source, recipe)) != tuple(target.shape):
            names = " + ".join(piece.name for piece in recipe)
            in_all = " in all" if len(recipe) > 1 else ""
            misshaped.append(f"{names}: expected {list(target.shape)}{in_all}, got {list(shape)}")
    used = {piece.name for name in targets for piece in recipes.get(name, ())}
    unexpected = [name for name in held if name not in used and not any(fnmatchcase(name, p) for p in ignored)]
    return Differences(source.where, tuple(missing), tuple(unexpected), tuple(misshaped), tuple(left))


def load_tensors(
    source: TensorSource,
    targets: Mapping[str, Tensor | Target],
    recipes: Mapping[str, Recipe],
    *,
    ignored: Sequence[str] = (),
    allow_missing: Sequence[str] = (),
    on_tensor: Callable[[str], None] | None = None,
) -> list[str]:
    """Fill `targets` as `recipes` say, converting dtype and device; return the names that were left as they were.

    ignored: shell patterns of source names that nothing needs. allow_missing: shell patterns of target names that may
    stay as they are where the source lacks them. on_tensor: called with each target's name once it is filled.

    Raises:
        WeightsError: missing, unexpected or misshaped tensors; all of them are listed and nothing is written.
    """
    differences = compare_tensors(source, targets, recipes, ignored=ignored, allow_missing=allow_missing)
    if differences:
        raise WeightsError(f"{differences}\nnothing was loaded")
    for name, target in targets.items():
        if name in differences.left:
            continue
        sink: Target = _TensorTarget(target) if isinstance(target, Tensor) else target
        start = 0
        for piece in recipes[name]:
            rows = source.read(piece.name, piece.rows)
            rows = rows if piece.transform is None else piece.transform(rows)
            sink.write(start, rows)
            start += len(rows) if rows.ndim else 1
            # else it would stay alive while the next one is read
            del rows
        if on_tensor is not None:
            on_tensor(name)
    return list(differences.left)


def _shape_of(source: TensorSource, recipe: Recipe) -> tuple[int, ...]:
    shapes: list[tuple[int, ...]] = []
    for piece in recipe:
        shape = source.tensors[piece.name].shape
        if piece.rows is not None:
            shape = (min(piece.rows[1], shape[0]) - piece.rows[0], *shape[1:]) if shape else shape
        if piece.transform is not None:
            try:
                shape = tuple(piece.transform(torch.empty(shape, device="meta")).shape)
            except RuntimeError:
                # A shape that the transform cannot take cannot be right either.
                return shape
        shapes.append(shape)
    if len(shapes) == 1 or not shapes[0] or any(shape[1:] != shapes[0][1:] for shape in shapes):
        return shapes[0]
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])
