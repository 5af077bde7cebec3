"""What the tests of Triton kernels share: the interpreter where there is no GPU, and one check for all kernels."""

import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

NEEDS_GPU = "needs a CUDA device: Triton's interpreter multiplies bf16 wrongly"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run every test of a kernel in fp32 and fp16, and on a GPU in bf16."""
    if "kernel_dtype" in metafunc.fixturenames:
        skip = pytest.mark.skipif(not torch.cuda.is_available(), reason=NEEDS_GPU)
        bf16 = pytest.param(torch.bfloat16, id="bf16", marks=[pytest.mark.gpu, skip])
        low = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.float16, id="fp16"), bf16]
        metafunc.parametrize("kernel_dtype", low)


@pytest.fixture(scope="session")
def _interpreter() -> Iterator[None]:
    """Mend Triton 3.6's interpreter where it is what runs.

    It takes int() of arrays of one element, which numpy 2.4 refuses; and it patches its language anew for every call of
    one kernel function by another, which is most of the time that a small test takes.
    """
    if torch.cuda.is_available():
        # Products are deterministic, as `kernel_device` has it, with a workspace of fixed size only.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    patch_all = interpreter._patch_lang
    scope: Any = patch_all(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    scope.set_attr(tl.tensor, "__index__", lambda self: int(self.handle.data.item()))
    interpreter._patch_lang = lambda fn: SimpleNamespace(restore=lambda: None)
    yield
    interpreter._patch_lang = patch_all
    scope.restore()


@pytest.fixture
def kernel_device(_interpreter: None) -> Iterator[str]:
    """The device of a kernel's test, where what `torch.empty` gives is NaN, so that nothing unwritten goes unseen."""
    torch.use_deterministic_algorithms(True, warn_only=False)
    yield "cuda" if torch.cuda.is_available() else "cpu"
    torch.use_deterministic_algorithms(False)


def is_leaf(arg: object) -> bool:
    return isinstance(arg, Tensor) and arg.requires_grad


def assert_near(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """fp32 number by number; half precision by the ratio of RMS error to RMS value."""
    assert got.shape == expected.shape
    got, expected = got.detach().double().cpu(), expected.detach().double().cpu()
    assert bool(got.isfinite().all())
    greatest = float(expected.abs().max()) if expected.numel() else 0.0
    if dtype == torch.float32:
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * max(1.0, greatest))
    else:
        # What is zero in exact numbers, as the gradient of one key's softmax, is a difference of rounded ones.
        ratio, floor = {torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype], 1e-5 * expected.numel() ** 0.5
        assert (got - expected).norm() <= ratio * expected.norm() + floor


@pytest.fixture
def check_kernel(kernel_device: str) -> Callable[..., None]:
    """(kernel, reference, dtype, *args) → compare results and every gradient with the reference in fp64.

    Tensors that require a gradient are given in fp64 and rounded to dtype for both.
    """

    def check(kernel: Callable[..., Any], reference: Callable[..., Any], dtype: torch.dtype, *args: Any) -> None:
        def cast(arg: Any, to: torch.dtype) -> Any:
            if not isinstance(arg, Tensor):
                return arg
            moved = arg.detach().to(kernel_device)
            if arg.is_floating_point():
                moved = moved.to(dtype).to(to)
            return moved.requires_grad_(arg.requires_grad)

        results: list[list[Tensor]] = []
        for function, to in ((kernel, dtype), (reference, torch.float64)):
            given = [cast(arg, to) for arg in args]
            outs = function(*given)
            outs = outs if isinstance(outs, tuple) else (outs,)
            leaves = [arg for arg in given if is_leaf(arg)]
            grads: tuple[Tensor, ...] = ()
            if leaves:
                generator = torch.Generator().manual_seed(1)
                weights = [torch.randn(out.shape, generator=generator, dtype=torch.float64) for out in outs]
                weights = [w.to(dtype).to(out) for w, out in zip(weights, outs, strict=True)]
                grads = torch.autograd.grad(outs, leaves, weights)
            results.append([*outs, *grads])
        for got, expected in zip(*results, strict=True):
            assert_near(got, expected, dtype)

    return check
