"""A device that is none: tensors say that they are on it, compute on the CPU, and refuse to meet tensors that are not.

It stands for a GPU where there is none. Torch calls it `meta`, whose own tensors hold nothing; these hold numbers.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

PRETENDED = torch.device("meta")
_CROSSES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class _There(Tensor):
    """A tensor on the device; its numbers are in `inner`."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "_There":
        made = Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=PRETENDED,
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = {id(one.inner): one for one in given if isinstance(one, _There)}
    here = [one for one in given if not isinstance(one, _There) and one.ndim > 0]
    if there and here and func not in _CROSSES:
        raise RuntimeError(f"{func}: expected all tensors on one device, got {len(there)} there and {len(here)} here")
    is_there = bool(there)
    if kwargs.get("device") is not None:
        is_there = torch.device(kwargs["device"]) == PRETENDED
        kwargs = {**kwargs, "device": torch.device("cpu")}
    args, kwargs = tree_map(lambda one: one.inner if isinstance(one, _There) else one, (args, kwargs))
    found = func(*args, **kwargs)

    def outward(one: Any) -> Any:
        if not isinstance(one, Tensor) or isinstance(one, _There):
            return one
        # What was written in place is the tensor that it was.
        return there.get(id(one)) or (_There(one) if is_there else one) if is_there else one

    return tree_map(outward, found)


@contextmanager
def pretended_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """The device, for as long as this lasts."""
    tensor = torch.tensor

    def moved(data: Any, *, device: Any = None, **more: Any) -> Tensor:
        # Of meta, torch itself would keep the shape alone.
        return tensor(data, **more) if device is None else tensor(data, **more).to(device)

    with monkeypatch.context() as patch, _Mode():
        patch.setattr(torch, "tensor", moved)
        # Neither knows meta.
        patch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
        patch.setattr(torch, "is_autocast_enabled", lambda *_: False)
        yield PRETENDED
