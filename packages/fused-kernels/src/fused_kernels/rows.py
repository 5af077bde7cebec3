"""Rows written into a sequence by position: image tokens among text embeddings."""

from jaxtyping import Float, Int64
from torch import Tensor

from .dispatch import Backend, Op, on_cuda_with_triton


def _replace_rows_reference(x: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    return x.index_copy(0, index, rows)


def _replace_rows_triton(x: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    from .rows_triton import replace_rows

    return replace_rows(x, rows, index)


REPLACE_ROWS = Op(
    "replace_rows",
    Backend("triton", _replace_rows_triton, "one Triton kernel each way", on_cuda_with_triton),
    Backend("reference", _replace_rows_reference, "PyTorch's index_copy"),
)


def replace_rows(
    x: Float[Tensor, "t d"], rows: Float[Tensor, "m d"], index: Int64[Tensor, " m"], *, backend: str = "auto"
) -> Float[Tensor, "t d"]:
    """Return x with row index[j] replaced by rows[j]; a fresh tensor.

    Indices lie in [0, t) and differ from each other; they are not looked at, which would wait for the device.

    Raises:
        ValueError: if x and rows are of two dtypes.
        BackendError: if `backend` is unknown or cannot run.
    """
    if rows.dtype != x.dtype:
        raise ValueError(f"rows of replace_rows: expected {x.dtype}, as x, got {rows.dtype}; cast them")
    return REPLACE_ROWS.run(backend, x.device, x.dtype, x, rows, index)
